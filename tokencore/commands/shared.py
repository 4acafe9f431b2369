"""What the groups of commands share: arguments that several have, and JSON on standard output."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import argparse

    class AddCommand(Protocol):
        """Adds a command to the command line; its parser, for its arguments."""

        def __call__(self, name: str, function: object, text: str) -> argparse.ArgumentParser:
            """Add `name`; `function` gets the parsed options and returns the exit code."""


def add_market(to: argparse.ArgumentParser, *, many: str | None = None) -> None:
    """Let `to` take one market, or as many as `many` says in argparse's terms."""
    to.add_argument("market", nargs=many, metavar="MARKET", help="us, kr, or a market of your settings")


def add_json(to: argparse._ActionsContainer) -> None:
    """Let `to` answer programs."""
    to.add_argument("--json", action="store_true", help="for programs")


def print_json(content: object) -> None:
    """Print `content` as ASCII, which passes through every pipe unharmed; times as ISO 8601, an item of a list a line.

    Indented further, a thousand markets would take three times as long: only the plain encoder is in C.
    """
    if isinstance(content, list):
        text = ",\n".join(json.dumps(item, default=_iso) for item in content)
        print(f"[\n{text}\n]" if content else "[]")
    else:
        print(json.dumps(content, indent=2, default=_iso))


def _iso(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)
