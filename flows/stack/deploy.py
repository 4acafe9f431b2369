"""What runs when, and what is told when it does not: the deployments of prefect.yaml and the automations."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PREFECT_FILE = Path(__file__).resolve().parents[2] / "prefect.yaml"


def deploy() -> int:
    """Make all of it on the server of this process's settings, or bring it up to date; again, and nothing changes."""
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(PREFECT_FILE)]
    done = subprocess.run(command, check=False)  # noqa: S603 - our own command
    if not done.returncode:
        from flows.stack import automations  # loads all of Prefect

        automations.upsert()
    return done.returncode
