"""The command line: the table of commands, their parser and what they share; the sandbox and shell completion."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn

from tokencore import __doc__ as about
from tokencore.errors import ConfigurationError
from tokencore.redaction import log, short
from tokencore.tokens import PICKLED, jwts_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from tokencore.config.settings import Settings
    from tokencore.keys import Key

    Command = Callable[[argparse.Namespace], int]  # gets the parsed options and returns the exit code
    AddCommand = Callable[..., argparse.ArgumentParser]  # the function `command` in `parsers`

COMMANDS = {  # commands by module; the module's `add` makes their parsers, so a command imports only its own module
    "tokencore.commands.tokens": ("get", "exec", "reject", "delete"),
    "tokencore.commands.monitoring": ("check", "doctor", "metrics"),
    "tokencore.commands.renewals": ("refresh", "plan", "history", "tick"),
    "tokencore.commands.transfer": ("export", "import"),
    "tokencore.commands.fleet": ("fleet", "follow"),
    "tokencore.commands": ("sandbox", "completion"),
}
EXIT_CODES = (
    "exit codes: 0 done (check: every asked market valid), 1 unexpected, 2 usage or settings, 3 no valid token, "
    "4 issuance limit, 5 credentials refused, 6 KIS unreachable, 7 store unusable"
)
FOR_PROGRAMS = "for programs"  # the help text of --json
SHELLS = ("bash", "zsh", "fish")
INPUT_LIMIT = 65_536  # bytes of standard input; a token has about 350


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{short(message)}; see `{self.prog} --help`.")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version  # imported only for --version

        try:
            print(f"tokencore {version('tokencore')}")
        except PackageNotFoundError:
            print("tokencore is not installed: it runs from its source")
        parser.exit()


def run(arguments: Sequence[str]) -> int:
    """Parse one command line, run the command, and return its exit code.

    Raises:
        TokenError: the command failed; the error's class has the exit code.
    """
    log()
    top, _ = parsers(arguments[0] if arguments else "")
    if not arguments:
        top.print_help()
        raise ConfigurationError("No command was given; `tokencore --help` lists them.")
    if arguments[0] == "exec" and "--" not in arguments:
        own = 3 if arguments[2:3] in (["-h"], ["--help"]) else 2
        arguments = [*arguments[:own], "--"]  # `_exec` then explains how to name the program
    at = arguments.index("--") if arguments[0] == "exec" else len(arguments)
    try:
        options = top.parse_args(arguments[:at])
    except SystemExit:  # after --help and --version; a mistake is a ConfigurationError
        return 0
    options.program = [*arguments[at + 1 :]]  # argparse would remove a second `--`
    code: int = options.run(options)
    return code


def parsers(asked: str = "") -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the command line's parser and the commands' parsers by name; with `asked`, only its module's commands."""
    top = _Parser(prog="tokencore", description=(about or "").partition("\n")[0], epilog=EXIT_CODES)
    top.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        name: str, function: Command, text: str, *, market: str = "", flags: Mapping[str, str] | None = None
    ) -> argparse.ArgumentParser:
        """Add a command that takes a `market` (`one`, `?` or `*`) and `flags`, which map an option to its help text."""
        added = commands.add_parser(name, help=text, description=text, epilog=EXIT_CODES)
        added.set_defaults(run=function)
        if market:
            many = None if market == "one" else market
            added.add_argument("market", nargs=many, metavar="MARKET", help="us, kr, or a market of your settings")
        for flag, meaning in (flags or {}).items():
            added.add_argument(flag, action="store_true", help=meaning)
        return added

    for module in [module for module, names in COMMANDS.items() if asked in names] or COMMANDS:
        import_module(module).add(command)
    return top, dict(commands.choices)


def key_of(settings: Settings, name: str) -> Key:
    """Return the key of the market `name`, with all markets that share it.

    Raises:
        ConfigurationError: there is no such market, or it has no app key or secret; the message says what to set.
    """
    from tokencore.keys import Key  # imports the calendars, which not every command needs

    market = settings.market(name)
    market.identified()
    return Key(settings.sharing(market))


def read_input() -> str:
    """Return the text on standard input; of mojito2's pickle, the tokens in it.

    Raises:
        ConfigurationError: there is none, or far too much.
    """
    content = b""
    if sys.stdin is not None:
        if sys.stdin.isatty():
            print("Paste it, then press Ctrl-D.", file=sys.stderr)
        content = sys.stdin.buffer.read(INPUT_LIMIT + 1)
    text = " ".join(jwts_in(content)) if content.startswith(PICKLED) else content.decode(errors="replace")
    if not text.strip() or len(content) > INPUT_LIMIT:
        raise ConfigurationError(
            "Standard input holds no token: give it, or what `tokencore get MARKET --json` prints."
        )
    return text.removeprefix("\ufeff").strip()


def confirm(option: str, question: str, undone: str) -> None:
    """Return if a person at the terminal answers yes.

    Raises:
        ConfigurationError: there is no terminal, or the answer is another one; the message says what is `undone`.
    """
    if sys.stdin is None or not sys.stdin.isatty():
        raise ConfigurationError(f"{option} asks first, and there is no terminal. Nothing was done; add --yes.")
    print(question, "[y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ConfigurationError(f"The answer was not yes. {undone}")


@contextmanager
def until_stopped() -> Iterator[None]:
    """End the block on SIGINT or SIGTERM, even in a shell's background job, which starts with SIGINT ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        yield


def print_json(content: object) -> None:
    """Print `content` as ASCII JSON, which every pipe passes unchanged, with ISO 8601 times and a line per list item.

    Indenting the items of a list would make a thousand markets take three times as long.
    """
    if isinstance(content, list):
        text = ",\n".join(json.dumps(item, default=_iso) for item in content)
        print(f"[\n{text}\n]" if content else "[]")
    else:
        print(json.dumps(content, indent=2, default=_iso))


def _iso(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def add(command: AddCommand) -> None:
    """Add the commands that are about no market to the parser."""
    sandbox = command("sandbox", _sandbox, "a KIS gateway on loopback, to try things out")
    sandbox.add_argument("--port", type=int, default=9480, help="on 127.0.0.1 (%(default)s; 0: any)")
    completion = command("completion", _completion, "what a shell needs to complete commands and markets")
    completion.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))


def _sandbox(options: argparse.Namespace) -> int:
    from tokencore.sandbox import Sandbox, welcome  # imports a server

    with Sandbox(port=options.port) as gateway, until_stopped():
        print(welcome(gateway.url), flush=True)
        threading.Event().wait()
    return 0


def _completion(options: argparse.Namespace) -> int:
    import shtab  # imported only for this command

    from tokencore.config.settings import Settings

    markets, (top, commands) = [market.name for market in Settings.load().all_markets()], parsers()
    for action in (action for one in commands.values() for action in one._actions):  # noqa: SLF001 - as shtab does
        if action.dest == "market":
            action.choices = markets
        elif action.metavar in ("FILE", "DIR"):
            vars(action)["complete"] = shtab.FILE if action.metavar == "FILE" else shtab.DIRECTORY
    script = shtab.complete(top, options.shell)
    if options.shell == "zsh":  # shtab's "(*)::" would complete only the first of several markets
        script = script.replace('"(*)::', '"*:')
    print(script)
    return 0
