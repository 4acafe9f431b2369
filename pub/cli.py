"""The `tokencore` program; a cached `get` is answered without building a parser.

One outer `except` turns every error into one sentence on standard error and a documented exit code. The commands are
listed in `commands.COMMANDS`, each with the module that has its parser and its function.
"""

from __future__ import annotations

import io
import os
import sys

from tokencore import redaction
from tokencore.errors import TokenError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TextIO

INTERRUPTED = 130  # the shell's exit code for a command ended by Ctrl-C


class _Output:
    """Standard output, which remembers its errors, to distinguish them from those of files and connections."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: BaseException | None = None  # its last failure

    def write(self, text: str) -> int:
        with self:
            return self._stream.write(text)

    def flush(self) -> None:
        with self:
            self._stream.flush()

    def __enter__(self) -> None: ...

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self.error = error or self.error

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (by default that of this process) and return its exit code."""
    _prepare_streams()
    redaction.in_program = True
    stream = sys.stdout
    output = sys.stdout = _Output(stream)
    code = 0
    try:
        code = _answer(list(sys.argv[1:] if argv is None else argv))
        output.flush()
    except TokenError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("Interrupted.", INTERRUPTED)
    except Exception as error:  # noqa: BLE001 - a traceback could show a secret
        if error is not output.error:
            return _fail(_unexpected(error), 1)
        if isinstance(error, BrokenPipeError):  # the reader, such as `head`, has what it wanted
            _discard(stream.fileno())
            return code
        why = f"Standard output cannot be written ({getattr(error, 'strerror', error)})"
        return _fail(f"{why}. Cached tokens are untouched; free space, or write the output elsewhere.", 1)
    finally:
        sys.stdout = stream
    return code


def _answer(arguments: list[str]) -> int:
    if len(arguments) == 2 and arguments[0] == "get" and not arguments[1].startswith("-"):  # noqa: PLR2004
        from tokencore.manager import TokenManager  # building the parser would cost more than the whole answer

        if token := TokenManager(arguments[1]).token_at_hand():
            sys.stdout.write(f"{token}\n")
            return 0
    from tokencore.commands import run

    return run(arguments)


def _prepare_streams() -> None:
    """Buffer standard output, let a closed one fail on writing, and print `?` for characters it cannot encode."""
    if sys.stdout is None:
        sys.stdout = open(os.open(os.devnull, os.O_RDONLY), "w", encoding="utf-8")  # noqa: SIM115 - open as long as the process lives
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - the same
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace", write_through=False)
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(errors="backslashreplace", line_buffering=True, write_through=False)


def _fail(message: str, code: int) -> int:
    try:
        sys.stdout.flush()  # so that what was printed earlier appears before the error
    except OSError:
        _discard(sys.stdout.fileno())
    try:
        sys.stderr.write(f"tokencore: {redaction.clean(message)}\n")
    except OSError:  # standard error is full or closed; only the exit code can report
        _discard(2)
    return code


def _discard(descriptor: int) -> None:
    """Point the descriptor at the null device, so that the interpreter's last flush at exit cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _unexpected(error: Exception) -> str:
    """Say where the error happened, not what it said: the text of an unknown error may contain a secret."""
    import traceback  # needed only when there is a bug

    where = traceback.extract_tb(error.__traceback__)[-1]
    number = error.errno if isinstance(error, OSError) else None
    what = f"{type(error).__name__} ({os.strerror(number)})" if number else type(error).__name__
    place = f"{os.path.basename(where.filename)}:{where.lineno}"
    return f"Unexpected {what} at {place}. Cached tokens are untouched; please report this line."


if __name__ == "__main__":
    sys.exit(main())
