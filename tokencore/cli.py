"""The `tokencore` command: a cached `get` is answered at once, everything else goes to `commands`.

One outer `except` turns every error into one sentence on standard error and the contract's exit code.
"""

from __future__ import annotations

import errno
import io
import os
import sys

from tokencore.errors import TokenError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

INTERRUPTED = 130  # the shell's code for a command that Ctrl-C ended
UNWRITABLE = (errno.EBADF, errno.EFBIG, errno.EIO, errno.ENOSPC)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: this process's) and return its exit code."""
    _prepare_streams()
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except TokenError as error:
        code = _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        code = _fail("Interrupted.", INTERRUPTED)
    except BrokenPipeError:  # the reader, such as `head`, has what it wanted
        _discard_output()
        return 0
    except Exception as error:  # noqa: BLE001 - so that no traceback shows a secret
        code = _fail(_output_failure(error) or _unexpected(error), 1)
    return code


def _run(arguments: list[str]) -> int:
    if len(arguments) == 2 and arguments[0] == "get" and not arguments[1].startswith("-"):  # noqa: PLR2004
        from tokencore.manager import TokenManager  # the parser costs more than the whole answer

        sys.stdout.write(TokenManager(arguments[1]).get_valid_token() + "\n")
        return 0
    from tokencore.commands import run

    return run(arguments)


def _prepare_streams() -> None:
    """Let what is printed leave in one piece, also with PYTHONUNBUFFERED; a closed output fails when it is written.

    A terminal without Korean or block characters shows question marks.
    """
    if sys.stdout is None:
        sys.stdout = open(os.open(os.devnull, os.O_RDONLY), "w", encoding="utf-8")  # noqa: SIM115 - for the process's life
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - the same
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace", write_through=False)
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(errors="backslashreplace", line_buffering=True, write_through=False)


def _fail(message: str, code: int) -> int:
    try:
        sys.stdout.flush()  # what was printed before comes first
    except OSError:
        _discard_output()
    from tokencore.redaction import clean  # not for an answer

    try:
        sys.stderr.write(f"tokencore: {clean(message)}\n")
    except OSError:  # it is full: the exit code says it
        _discard(2)
    return code


def _output_failure(error: Exception) -> str:
    """The message where standard output could not be written; empty for another error."""
    if not isinstance(error, OSError) or error.filename is not None or error.errno not in UNWRITABLE:
        return ""
    _discard_output()
    return f"Standard output cannot be written ({error.strerror}). Cached tokens are untouched; free or change it."


def _discard_output() -> None:
    """Nothing is left that the interpreter would fail to write at its end."""
    _discard(sys.stdout.fileno())


def _discard(descriptor: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _unexpected(error: Exception) -> str:
    """Where it happened, not what it said: an unknown error's text may hold anything."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    place = f"{os.path.basename(frame.tb_frame.f_code.co_filename)}:{frame.tb_lineno}" if frame else "an unknown place"
    number = error.errno if isinstance(error, OSError) else None
    what = f"{type(error).__name__} ({os.strerror(number)})" if number else type(error).__name__
    return f"Unexpected {what} at {place}. Cached tokens are untouched; please report this line."


if __name__ == "__main__":
    sys.exit(main())
