"""`python -m flows.stack up`, `down`, `status`, `run` (`up` in the foreground) or `demo`, as make calls them."""

from __future__ import annotations

import argparse
import sys

from flows.stack import demo, service
from flows.stack.crew import CrewError, EndedError
from tokencore import TokenError

INTERRUPTED = 130  # the shell's code for a command that Ctrl-C ended
COMMANDS = {"up": service.up, "down": service.down, "status": service.status, "run": service.run, "demo": demo.demo}


def main() -> int:
    """Run the command of this process's arguments; its exit code. Failures are told in words, not tracebacks."""
    parser = argparse.ArgumentParser(prog="python -m flows.stack", description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--once", action="store_true", help="let the demo end by itself")
    options = parser.parse_args()
    try:
        return demo.demo(once=True) if options.once else COMMANDS[options.command]()
    except TokenError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except CrewError as error:
        print(error, file=sys.stderr)
        return 1
    except (EndedError, KeyboardInterrupt):
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
