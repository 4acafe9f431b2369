"""The command that writes a shell's completion: of commands, options, and the markets of the settings."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tokencore import sources
from tokencore.market import market_names

if TYPE_CHECKING:
    from tokencore.commands.shared import AddCommand

SHELLS = ("bash", "zsh", "fish")


def add(command: AddCommand) -> None:
    """Add the command to the parser."""
    completion = command("completion", _completion, "what a shell needs to complete commands and markets")
    completion.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))


def _completion(options: argparse.Namespace) -> int:
    import shtab  # for this command alone

    from tokencore.commands import parser as whole  # of which this one is a part

    top = whole()
    markets = market_names(sources.gather().values)
    for parser in commands(top).values():
        for action in parser._actions:  # noqa: SLF001 - shtab reads it as well; there is no public way
            if action.dest == "market":
                action.choices = markets
            elif action.metavar in ("FILE", "DIR"):
                vars(action)["complete"] = shtab.FILE if action.metavar == "FILE" else shtab.DIRECTORY
    script = shtab.complete(top, options.shell)
    if options.shell == "zsh":  # where shtab's "(*)::" offers one market, and no second one
        script = script.replace('"(*)::', '"*:')
    print(script)
    return 0


def commands(top: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of all commands by their names."""
    found: dict[str, argparse.ArgumentParser] = {}
    for action in top._actions:  # noqa: SLF001 - argparse has no public way to its parts
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            found |= action.choices
    return found
