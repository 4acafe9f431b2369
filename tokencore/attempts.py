"""An issue request as a value: what became of it, who asked, and what a list of them says. Never a token or a key."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from tokencore.errors import ConfigurationError
from tokencore.redaction import clean

if TYPE_CHECKING:
    from collections.abc import Sequence

DAY = timedelta(hours=24)
REASON_LENGTH, BY_LENGTH = 80, 40  # characters that are kept
SHORT_WORDS = r"^[!-~]{0,35}([^!-~][!-~]{0,35})*$"  # no run of visible ASCII as long as an app key (36)


class Outcome(StrEnum):
    """What became of an attempt."""

    SENT = "sent"  # recorded before the request; it stays when the process died in between
    ISSUED = "issued"
    SAME = "same"  # KIS returned the token that it had issued before: its six hours
    IMPORTED = "imported"  # issued elsewhere and taken over: no request of ours
    LIMIT = "limit"
    BAD_KEY = "bad_key"
    BAD_SECRET = "bad_secret"  # noqa: S105 - a word, no secret
    DENIED = "denied"
    SERVER_ERROR = "server_error"
    REFUSED = "refused"  # no known code
    BAD_ANSWER = "bad_answer"
    NO_ANSWER = "no_answer"  # it may have reached KIS
    UNREACHABLE = "unreachable"  # it cannot have reached KIS


GRANTED = frozenset({Outcome.ISSUED, Outcome.SAME, Outcome.IMPORTED})
FAILED = {  # for people, where the outcome's own word says too little
    Outcome.SENT: "its process died",
    Outcome.SAME: "KIS returned the same token",
    Outcome.LIMIT: "KIS allows one request a minute",
    Outcome.SERVER_ERROR: "a fault of KIS's",
    Outcome.REFUSED: "KIS refused",
    Outcome.BAD_ANSWER: "KIS answered without a token",
    Outcome.NO_ANSWER: "no answer from KIS",
    Outcome.UNREACHABLE: "KIS cannot be reached",
}
CREDENTIALS = frozenset({Outcome.BAD_KEY, Outcome.BAD_SECRET, Outcome.DENIED})


class Attempt(NamedTuple):
    """One issue request, as recorded; times are aware UTC.

    Attributes:
        at: when the request left, or its outcome was known.
        outcome: what became of it.
        code: KIS's code of a refusal.
        expires_at: of the token that it brought.
        reason: why it was made.
        credentials: eight hex digits that change with the key or the secret.
        pid, host: the process that made it; no host where only one machine is known.
        by: the person who asked; empty for a program.

    """

    at: datetime
    outcome: Outcome
    code: str | None = None
    expires_at: datetime | None = None
    reason: str = ""
    credentials: str = ""
    pid: int = 0
    by: str = ""
    host: str = ""

    @property
    def counts(self) -> bool:
        """Whether KIS may have seen it, so that the cool-down starts from it."""
        return self.outcome not in (Outcome.UNREACHABLE, Outcome.IMPORTED)


def note(reason: str, by: str) -> tuple[str, str]:
    """Why an issue is asked for, and by which person, as the record keeps them: clean, cut, and nothing like a key.

    Raises:
        ConfigurationError: a word is as long as an app key; nothing was asked of KIS.

    """
    reason, by = clean(reason), clean(by)
    for name, text in (("reason", reason), ("name", by)):
        if not re.fullmatch(SHORT_WORDS, text):
            raise ConfigurationError(
                f"The {name} contains a word of 36 characters or more, as keys and tokens are, so it is not kept. "
                "Nothing was asked of KIS; use shorter words."
            )
    return reason[:REASON_LENGTH].rstrip(), by[:BY_LENGTH].rstrip()


def issued_within(attempts: Sequence[Attempt], now: datetime) -> list[Attempt]:
    """The attempts that brought a new token in the day around `now`; ahead of it too, as clocks are set back."""
    return [one for one in attempts if one.outcome is Outcome.ISSUED and abs(now - one.at) < DAY]


def latest(attempts: Sequence[Attempt]) -> Attempt | None:
    """The last attempt that KIS may have seen, from which the cool-down starts."""
    return next((one for one in reversed(attempts) if one.counts), None)


def failure(attempts: Sequence[Attempt]) -> tuple[datetime, str] | None:
    """When the last attempt was (aware UTC), and in a word or two why it brought no token; None where it did."""
    last = attempts[-1] if attempts else None
    if last is None or last.outcome in GRANTED - {Outcome.SAME}:
        return None
    return last.at, FAILED.get(last.outcome, last.outcome.replace("_", " ")) + (f" ({last.code})" if last.code else "")


def failures(attempts: Sequence[Attempt]) -> int:
    """How many attempts have failed since the last one that brought a token."""
    return next((n for n, one in enumerate(reversed(attempts)) if one.outcome in GRANTED), len(attempts))
