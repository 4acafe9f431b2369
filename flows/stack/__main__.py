"""`python -m flows.stack`: `up`, `run` (the same in the foreground), `down`, `status`, `demo`, and their parts."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from flows.stack import demo, deploy, service, trial, watch
from flows.stack.crew import CrewError, EndedError
from tokencore import TokenError, TokenStoreError

if TYPE_CHECKING:
    from collections.abc import Callable

INTERRUPTED = 130  # the shell's code for a command that Ctrl-C ended
COMMANDS = {
    "up": service.up,
    "down": service.down,
    "status": service.status,
    "run": service.run,
    "deploy": deploy.deploy,
    "watch": watch.watch,
    "demo": demo.demo,
    "test-alert": trial.send,
}


def main() -> int:
    """Run the command of this process's arguments; its exit code. Failures are told in words, not tracebacks."""
    parser = argparse.ArgumentParser(prog="python -m flows.stack", description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--once", action="store_true", help="let the demo end by itself")
    options = parser.parse_args()
    try:
        return _done(demo.demo, once=True) if options.once else _done(COMMANDS[options.command])
    except TokenError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except CrewError as error:
        print(error, file=sys.stderr)
        return 1
    except (EndedError, KeyboardInterrupt):
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED


def _done(command: Callable[..., int], **options: bool) -> int:
    try:
        return command(**options)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise TokenStoreError(
            f"The token directory cannot be used: {where}{error.strerror or error}. "
            "Mend its permissions or free space, or point KIS_TOKEN_DIR elsewhere.",
        ) from None


if __name__ == "__main__":
    sys.exit(main())
