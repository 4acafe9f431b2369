"""Writes `docs/commands.md` from the command line's own parser; `make docs` runs it, and a test compares."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout need not be installed

from tokencore.cli import COMMANDS
from tokencore.commands import EXIT_CODES, parsers

PAGE = Path(__file__).with_suffix(".md")
WIDTH = 110  # columns of the help texts
TOP = """# Commands

Written by `make docs` from the parser of `tokencore`: change the texts there.
"""
COMPLETION = """## Completion in your shell

```console
$ tokencore completion bash > ~/.local/share/bash-completion/completions/tokencore
$ tokencore completion zsh > ~/.zfunc/_tokencore    # with fpath+=~/.zfunc before compinit in ~/.zshrc
$ tokencore completion fish > ~/.config/fish/completions/tokencore.fish
```

It knows the markets of your settings as they were then: write it again when you add one.
"""


def text() -> str:
    """The page."""
    _, found = parsers(COMMANDS)
    for one in found.values():
        one.formatter_class = functools.partial(argparse.HelpFormatter, width=WIDTH)
    index = "\n".join(f"- [`tokencore {name}`](#tokencore-{name})" for name in found)
    sections = [_section(name, one.format_help()) for name, one in found.items()]
    return "\n".join([TOP, index, "", _capital(EXIT_CODES) + ".", "", *sections, COMPLETION])


def _section(name: str, help_text: str) -> str:
    body = help_text.partition("\n\nexit codes:")[0]
    return f"## `tokencore {name}`\n\n```text\n{body}\n```\n"


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
