"""Issue requests as values and as the record's lines: what they say, and how long to wait after failures.

They never hold a token or a key.
"""

from __future__ import annotations

import json
import socket
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from tokencore.sealing import digest
from tokencore.tokens import sane

if TYPE_CHECKING:
    from collections.abc import Sequence

DAY = timedelta(hours=24)
CLOCK_ERROR = timedelta(days=2)  # an attempt further in the future than this was recorded by a wrong clock
CLOCK_NOISE = timedelta(seconds=1)  # clocks that differ by less count as equal
MINUTE = 60.0  # seconds after a token request in which KIS refuses another
REASON_LENGTH, BY_LENGTH = 80, 40
LENGTHS = {"code": 12, "reason": REASON_LENGTH, "credentials": 8, "by": BY_LENGTH, "host": 64}  # characters kept


class Outcome(StrEnum):
    """The outcome of an attempt."""

    SENT = "sent"  # recorded before the request; it remains if the process dies before the outcome is known
    ISSUED = "issued"
    SAME = "same"  # KIS returned the token it had issued before, as it does for six hours
    IMPORTED = "imported"  # issued elsewhere and adopted here, without a request of ours
    REVOKED = "revoked"  # a person had KIS revoke the token; no request for one
    LIMIT = "limit"
    BAD_KEY = "bad_key"
    BAD_SECRET = "bad_secret"  # noqa: S105 - a word, no secret
    DENIED = "denied"
    SERVER_ERROR = "server_error"
    REFUSED = "refused"  # with no code that we know
    BAD_ANSWER = "bad_answer"
    NO_ANSWER = "no_answer"  # the request may have reached KIS
    UNREACHABLE = "unreachable"  # the request cannot have reached KIS


SETTLED = frozenset({Outcome.ISSUED, Outcome.IMPORTED, Outcome.REVOKED})  # the outcomes that leave nothing to try again
GRANTED = SETTLED | {Outcome.SAME}
UNSENT = frozenset({Outcome.UNREACHABLE, Outcome.IMPORTED, Outcome.REVOKED})  # those without a request that reached KIS
FAILED = {  # wording for people, where the outcome's own name says too little
    Outcome.SENT: "no answer is recorded: its process died, or still waits",
    Outcome.SAME: "KIS returned the same token",
    Outcome.LIMIT: "KIS allows one request a minute",
    Outcome.SERVER_ERROR: "a fault at KIS",
    Outcome.REFUSED: "KIS refused",
    Outcome.BAD_ANSWER: "KIS answered without a token",
    Outcome.NO_ANSWER: "no answer from KIS",
    Outcome.UNREACHABLE: "KIS cannot be reached",
}
CREDENTIALS = frozenset({Outcome.BAD_KEY, Outcome.BAD_SECRET, Outcome.DENIED})
_WORDS = frozenset(Outcome)


class Attempt(NamedTuple):
    """One issue request, as recorded; times are aware UTC.

    Attributes:
        at: when the request was sent; once the outcome is known, when that was.
        outcome: how it ended.
        code: KIS's code, if KIS refused.
        expires_at: the expiry of the token it brought.
        reason: why it was made.
        credentials: eight hex digits that change with the key or the secret.
        pid, host: the process that made it; `host` is empty if only one machine uses the store.
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
        """Whether KIS may have seen the request, so that the cool-down starts from it."""
        return self.outcome not in UNSENT


def host_name(folder: str) -> str:
    """Return this machine's name in its fleet's record, where the numbers of processes alone would collide."""
    return f"{socket.gethostname()[:50]}:{digest(folder, length=6)}"


def issued_within(attempts: Sequence[Attempt], now: datetime) -> list[Attempt]:
    """Return the attempts within 24 hours before or after `now` (clocks are set back) that brought a new token.

    Two that brought one token count once: machines of a fleet, of which one was asleep when KIS answered.
    """
    issued = [one for one in attempts if one.outcome is Outcome.ISSUED and abs(now - one.at) < DAY]
    last = {one.expires_at: one for one in issued}
    return [one for one in issued if one.expires_at is None or last[one.expires_at] is one]


def redated(attempts: Sequence[Attempt], now: datetime) -> list[Attempt]:
    """Return the attempts; those that a clock which was set back has left in the future are dated `now`."""
    ahead = now + CLOCK_NOISE, now + CLOCK_ERROR
    return [one._replace(at=now) if ahead[0] < one.at <= ahead[1] else one for one in attempts]


def latest(attempts: Sequence[Attempt]) -> Attempt | None:
    """Return the last attempt that KIS may have seen, from which the cool-down starts."""
    return next((one for one in reversed(attempts) if one.counts), None)


def failure(attempts: Sequence[Attempt]) -> tuple[datetime, str] | None:
    """Return when the last attempt was (aware UTC) and, in a few words, why it brought no new token; None if it did."""
    last = attempts[-1] if attempts else None
    if last is None or last.outcome in SETTLED:
        return None
    return last.at, FAILED.get(last.outcome, last.outcome.replace("_", " ")) + (f" ({last.code})" if last.code else "")


def failures(attempts: Sequence[Attempt]) -> int:
    """Count the attempts that have failed since the last one that brought a token."""
    return next((n for n, one in enumerate(reversed(attempts)) if one.outcome in GRANTED), len(attempts))


def retry_delay(failures: int, interval: float = MINUTE) -> timedelta:
    """Return how long to leave KIS alone after this many failures in a row: 65 s three times, then 5 min.

    The waits scale with the issue `interval` in seconds; KIS's own is 60.
    """
    return timedelta(seconds=65 if failures <= 3 else 300) * (interval / MINUTE)  # noqa: PLR2004 - three times


def parse(text: str) -> list[Attempt]:
    """Return the attempts in the lines of `text`; one that cannot be read is skipped."""
    return [attempt for line in text.split("\n") if (attempt := _parse(line))]


def render(attempts: Sequence[Attempt]) -> str:
    """Return the attempts as lines."""
    return "".join(f"{as_line(one)}\n" for one in attempts)


def as_line(attempt: Attempt) -> str:
    """Return the attempt as one JSON object, without a line's end."""
    times = {
        "at": attempt.at.isoformat(timespec="milliseconds"),
        "expires_at": attempt.expires_at.isoformat() if attempt.expires_at else None,
    }
    return json.dumps(attempt._asdict() | times, ensure_ascii=False)


def _parse(line: str) -> Attempt | None:
    try:
        found = json.loads(line)
        texts = {name: str(found.get(name) or "")[:length] for name, length in LENGTHS.items()}
        return Attempt(
            at=_aware(found["at"]),
            # A later version's outcome that this one does not know still shows that an attempt was made.
            outcome=Outcome(found["outcome"]) if found["outcome"] in _WORDS else Outcome.SENT,
            expires_at=_aware(found["expires_at"]) if found.get("expires_at") else None,
            pid=int(found.get("pid", 0)),
            code=texts.pop("code") or None,
            **texts,
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return None


def _aware(text: str) -> datetime:
    at = datetime.fromisoformat(text).astimezone(UTC)
    if not sane(at):
        raise ValueError(at)
    return at
