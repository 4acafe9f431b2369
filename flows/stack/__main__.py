"""`python -m flows.stack`: `up`, `run` (the same in the foreground), `down`, `status`, `demo`, `test-alert`, `watch`.

The others are the parts of a running stack, which supervisord starts.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys

from flows.stack import demo, supervisor, watchdog, worker
from flows.stack.api import StackError
from tokencore import TokenError, TokenStoreError

INTERRUPTED = 130  # the shell's code for a command that Ctrl-C ended
COMMANDS = {
    "up": supervisor.up,
    "down": supervisor.down,
    "status": supervisor.status,
    "run": supervisor.run,
    "demo": demo.demo,
    "test-alert": watchdog.test_alert,
    "watch": watchdog.watch,
    "server": supervisor.become_server,
    "worker": worker.work,
    "deploy": supervisor.deploy,
}


def main() -> int:
    """Run the command that the arguments name, and return its exit code; failures are printed without a traceback."""
    parser = argparse.ArgumentParser(prog="python -m flows.stack", description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--once", action="store_true", help="let the demo end by itself")
    options = parser.parse_args()
    if options.once and options.command != "demo":
        parser.error("--once is for the demo only")
    # Handle all three like Ctrl-C. A signal that a shell ignores for background jobs would stay ignored in programs
    # that this process becomes or starts, and Prefect's worker could then not be stopped.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    os.umask(0o077)
    # Buffered whatever PYTHONUNBUFFERED says: what could not be written stays there, and shows whose fault it is.
    descriptor = sys.stdout.fileno() if sys.stdout else os.open(os.devnull, os.O_RDONLY)  # was closed: refuse writing
    sys.stdout = open(descriptor, "w", errors="replace", closefd=False)  # noqa: SIM115 - open to the end
    try:
        code = demo.demo(once=options.once) if options.command == "demo" else COMMANDS[options.command]()
        sys.stdout.flush()
    except (TokenError, StackError) as error:
        return _failed(error)
    except OSError as error:
        if why := _output_error():
            return _failed(StackError(why))
        where = f"{error.filename}: " if error.filename else ""
        fix = "Fix its permissions or free space, or point KIS_TOKEN_DIR elsewhere."
        return _failed(TokenStoreError(f"The token directory cannot be used: {where}{error.strerror or error}. {fix}"))
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    return code


def _output_error() -> str:
    """Say what is wrong with standard output, which is closed then; empty if it takes what was printed."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return f"Standard output cannot be written ({error.strerror}); free space, or write it elsewhere."
    return ""


def _failed(error: TokenError | StackError) -> int:
    print(error, file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
