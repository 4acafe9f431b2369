"""What stands beside an issue in the record: why it was asked for and, where a person asked, by whom.

People write it by hand, and what they have in their clipboard may be a key. Such a note is refused before
anything is asked of KIS, and the refusal does not repeat it.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from tokencore.errors import ConfigurationError

REASON_LENGTH, BY_LENGTH = 80, 40  # characters; what is longer is cut, so that the record's line stays a line
# No run of visible ASCII as long as an app key (36): secrets and tokens are longer. It serves as a form's check too.
SHORT_WORDS = r"^[!-~]{0,35}([^!-~][!-~]{0,35})*$"

_LONG_WORD = re.compile("[!-~]{36,}")

NOTE_FIELDS: dict[str, dict[str, Any]] = {
    "reason": {"maxLength": REASON_LENGTH, "pattern": SHORT_WORDS},
    "by": {"maxLength": BY_LENGTH, "pattern": SHORT_WORDS},
}  # the same for forms, as JSON Schema


def masked(text: str) -> str:
    """What was typed, without the words that may be keys: it stands in logs of cron and on shared screens."""
    return _LONG_WORD.sub("***", text)


class Note(NamedTuple):
    """Why an issue was asked for, and by which person; no name where a program asked."""

    reason: str
    by: str = ""

    def checked(self) -> Note:
        """This note, which holds nothing that looks like a key.

        Raises:
            ConfigurationError: a word of it is as long as an app key; nothing was asked of KIS.

        """
        for name, text in (("reason", self.reason), ("name", self.by)):
            if not re.fullmatch(SHORT_WORDS, text):
                raise ConfigurationError(
                    f"The {name} holds a word of 36 characters or more, as keys and tokens are, so it is not "
                    "kept. Nothing was asked of KIS; say it in shorter words."
                )
        return self
