"""Texts for people, without what nobody may read: keys and tokens are masked, and nothing drives a terminal."""

from __future__ import annotations

import re

MASK = "***"
SHOWN = 400  # characters that a message repeats of what was given
SECRET_LENGTH = 20  # characters in a row: no word of a setting or of KIS has so many, but every key and token
_ESCAPE_SEQUENCE = re.compile("(?:\x1b\\[|\x9b)[0-?]*[ -/]*[@-~]")  # what a terminal obeys: colours, moves, erasing
_LONG_WORD = re.compile(rf"[\w+/=.%&#;-]{{{SECRET_LENGTH},}}", re.ASCII)


def clean(text: str) -> str:
    """`text` on one line that shows as what it is: no terminal obeys anything in it, and no word runs backwards.

    Escape sequences go whole; whatever else does not print (control and direction characters, line separators, half
    characters) becomes a space.
    """
    return " ".join(printable(_ESCAPE_SEQUENCE.sub(" ", text), " ").split())


def redact(text: str, *secrets: str) -> str:
    """What a server said, on one line, with each of `secrets` and every word that may be one masked."""
    for secret in secrets:
        text = text.replace(secret, MASK)
    return " ".join(_LONG_WORD.sub(MASK, printable(text, " ")).split())


def short(text: str, apart: str = " _") -> str:
    """The beginning of what a person gave, with words (between the characters `apart`) as long as a key masked."""
    return re.sub(f"[^{apart}]{{{SECRET_LENGTH},}}", MASK, printable(text[:SHOWN]))


def printable(text: str, instead: str = "?") -> str:
    """`text` with `instead` for each character that does not print."""
    return "".join(sign if sign.isprintable() else instead for sign in text)
