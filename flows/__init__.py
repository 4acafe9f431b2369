"""The Prefect flows: thin, one per file; they call tokencore's front door and say what happened."""

import contextlib
import os

# A run works in a temporary folder, but `.env` is the one of the folder where the stack was started.
if _folder := os.environ.get("TOKENCORE_FOLDER"):
    with contextlib.suppress(OSError):
        os.chdir(_folder)
