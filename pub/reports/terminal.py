"""Columns and colours on a terminal; a library for them would be a third of what a bot has to install."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDE = 140  # characters of a line when the output is not a terminal: a table must not wrap in a pipe
LEAST = 20  # characters that the last column gets, however narrow the terminal is
CODES = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33, "blue": 34}  # as in ECMA-48
PAINT = re.compile("\033\\[\\d+m")


def width() -> int:
    """Return the number of characters that fit in a line."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDE


def paint(text: str, *styles: str) -> str:
    """Return the text in these styles if the terminal supports them and the user wants them (NO_COLOR, TERM)."""
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    if plain or sys.platform == "win32" or not sys.stdout.isatty():  # Windows' old console shows the codes
        return text
    return "".join(f"\033[{CODES[style]}m" for style in styles) + text + "\033[0m"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the rows under bold headings, aligned; text that the last column has no room for is wrapped."""
    lines = [[paint(head, "bold") for head in columns], *rows]
    widths = [max(map(_cells, column)) for column in zip(*lines, strict=True)][:-1]
    indent = sum(widths) + 2 * len(widths)
    printed = []
    for *cells, last in lines:
        start = "".join(f"{cell}{' ' * (wide - _cells(cell))}  " for cell, wide in zip(cells, widths, strict=True))
        more = textwrap.wrap(last, max(LEAST, width() - indent), break_on_hyphens=False) or [""]
        printed.append(start + f"\n{' ' * indent}".join(more))
    return "\n".join(line.rstrip() for line in printed)


def _cells(text: str) -> int:
    """Return the width of the text in cells: a Korean syllable takes two, a colour code none."""
    return sum(2 if unicodedata.east_asian_width(one) in "WF" else 1 for one in PAINT.sub("", text))
