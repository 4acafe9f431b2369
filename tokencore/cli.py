"""The `tokencore` command's front door: a cached `get` leaves at once, everything else goes to `commands`.

One outer `except` turns every error into one sentence on standard error and the contract's exit code.
"""

from __future__ import annotations

import gc
import os
import sys

from tokencore.errors import TokenError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

FEW_COLLECTIONS = 50_000  # objects: what a command loads stays to its end, and to search it takes a tenth of its time
INTERRUPTED = 130  # the shell's code for a command that Ctrl-C ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: this process's) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except TokenError as error:
        return _tell(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _tell("Interrupted.", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone: nothing to tell it
        return 0
    except Exception as error:  # noqa: BLE001 - the last resort of the command, so that no traceback shows a secret
        return _tell(_unexpected(error), 1)
    return code


def _run(arguments: list[str]) -> int:
    if len(arguments) == 2 and arguments[0] == "get" and not arguments[1].startswith("-"):  # noqa: PLR2004
        from tokencore.manager import TokenManager  # the parser costs more than the whole answer

        sys.stdout.write(TokenManager(arguments[1]).get_valid_token() + "\n")
        return 0
    gc.set_threshold(FEW_COLLECTIONS)
    from tokencore.commands import run

    return run(arguments)


def _tell(sentence: str, code: int) -> int:
    sys.stderr.write(f"tokencore: {' '.join(sentence.split())}\n")
    return code


def _unexpected(error: Exception) -> str:
    """Where it happened, not what it said: an unknown error's text may hold anything."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    place = f"{os.path.basename(frame.tb_frame.f_code.co_filename)}:{frame.tb_lineno}" if frame else "an unknown place"
    number = error.errno if isinstance(error, OSError) else None
    told = f"{type(error).__name__} ({os.strerror(number)})" if number else type(error).__name__
    return f"Unexpected {told} at {place}. Cached tokens are untouched; please report this line."


if __name__ == "__main__":
    sys.exit(main())
