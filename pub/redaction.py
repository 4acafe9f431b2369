"""Makes texts safe to show, without keys, tokens and control characters; and gives the log that some of them go to."""

from __future__ import annotations

import re
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import logging

in_program = False  # set by the command line: every line that it writes to standard error begins with its name
MASK = "***"
SHOWN = 400  # characters of a user's input that a message repeats
SECRET_LENGTH = 20  # characters in a row: keys and tokens are at least as long, words of settings and of KIS never
_ESCAPE_SEQUENCE = re.compile("(?:\x1b\\[|\x9b)[0-?]*[ -/]*[@-~]")  # terminal commands: colours, moves, erasing
_LONG_WORD = re.compile(rf"[\w+/=.%&#;-]{{{SECRET_LENGTH},}}", re.ASCII)


def log() -> logging.Logger:
    """Return the package's log, for what a cached token rarely needs: importing logging costs as much as reading it."""
    import logging

    if in_program:
        logging.basicConfig(level=logging.WARNING, format="tokencore: %(message)s")
    return logging.getLogger("tokencore")


def is_followed() -> bool:
    """Whether to tell what is going on: in a program's log and at a terminal, but not beside a command's one line."""
    return not in_program or sys.stderr.isatty()


def clean(text: str) -> str:
    """Return `text` on one line, safe to print: nothing in it controls the terminal or reverses the text's direction.

    Whole escape sequences, and all other characters that do not print (control and direction characters, line
    separators, lone surrogates), become spaces.
    """
    return " ".join(printable(_ESCAPE_SEQUENCE.sub(" ", text), " ").split())


def redact(text: str, *secrets: str) -> str:
    """Return a server's text on one line, with each of `secrets` and every word that may be a secret masked."""
    for secret in secrets:
        text = text.replace(secret, MASK)
    return " ".join(_LONG_WORD.sub(MASK, printable(text, " ")).split())


def short(text: str, apart: str = " _") -> str:
    """Return the start of a user's input, with words as long as a key masked; the characters `apart` separate words."""
    return re.sub(f"[^{apart}]{{{SECRET_LENGTH},}}", MASK, printable(text[:SHOWN]))


def printable(text: str, instead: str = "?") -> str:
    """Return `text` with each unprintable character replaced by `instead`."""
    return "".join(sign if sign.isprintable() else instead for sign in text)
