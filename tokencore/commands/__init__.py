"""The command line: what can be asked for, and of which market; every group of commands has its own room."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn

from tokencore import __doc__ as about
from tokencore.errors import ConfigurationError
from tokencore.remarks import masked
from tokencore.settings import unknown_names

if TYPE_CHECKING:
    from collections.abc import Sequence

# Each room brings its imports, some of them a tenth of a second: a command loads its own only.
ROOMS = {
    "tokencore.commands.tokens": ("get", "check", "refresh", "delete"),
    "tokencore.commands.ahead": ("plan", "history", "tick"),
    "tokencore.commands.handover": ("export", "import"),
    "tokencore.commands.health": ("metrics", "doctor"),
    "tokencore.sandbox": ("sandbox",),
    "tokencore.commands.completion": ("completion",),
}
EXIT_CODES = (
    "exit codes: 0 done (check: every asked market valid), 1 unexpected, 2 usage or settings, 3 no valid token, "
    "4 issuance limit, 5 credentials refused, 6 KIS unreachable, 7 store unusable"
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{masked(message)}; see `{self.prog} --help`.")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib import metadata  # for this alone

        try:
            print(f"tokencore {metadata.version('tokencore')}")
        except metadata.PackageNotFoundError:
            print("tokencore, not installed: it runs from its source")
        parser.exit()


def run(arguments: Sequence[str]) -> int:
    """Parse and run one command line; the exit code.

    Raises:
        TokenError: what the command met; its class has the exit code.

    """
    logging.basicConfig(level=logging.WARNING, format="tokencore: %(message)s")
    _prepare_output()
    top = parser(arguments[0] if arguments else "")
    if not arguments:
        top.print_help()
        sys.stdout.flush()  # the sentence on standard error comes after it
        raise ConfigurationError("No command was given; `tokencore --help` lists them.")
    options = top.parse_args(arguments)
    _warn_of_misspelt()
    code: int = options.run(options)
    return code


def parser(asked: str = "") -> argparse.ArgumentParser:
    """The parser of the whole command line, or, where one of them is `asked`, of that command and its like."""
    top = _Parser(prog="tokencore", description=(about or "").partition("\n")[0], epilog=EXIT_CODES)
    top.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, function: object, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, epilog=EXIT_CODES)
        added.set_defaults(run=function)
        return added

    for room in [room for room, names in ROOMS.items() if asked in names] or ROOMS:
        import_module(room).add(command)
    return top


def _prepare_output() -> None:
    """A line leaves in one piece, also with PYTHONUNBUFFERED, which would send its end into a shared pipe by itself.

    A terminal without Korean or block characters shows question marks.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace", write_through=False)
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(line_buffering=True, write_through=False)


def _warn_of_misspelt() -> None:
    with contextlib.suppress(ConfigurationError):  # who needs the settings says so better
        for name, alike in unknown_names().items():
            if alike:
                logging.getLogger("tokencore").warning("%s is no setting, so it is ignored; %s is one.", name, alike)
