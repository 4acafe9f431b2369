"""The issuance record of a key: one line per attempt, written before the request and completed after it.

It outlives tokens, processes and reboots: the minute limit, the daily ceiling and the pauses after
failures are judged from it, so that a restarted bot knows what the last one did. It never holds a
token or a key.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from tokencore import remarks, store, tokens

if TYPE_CHECKING:
    from collections.abc import Sequence
    from io import BufferedRandom

LINE = 512  # bytes of a line with its newline: one disk sector, so that completing it in place cannot tear it
CODE_LENGTH, DIGEST_LENGTH, PIDS = 12, 8, 1 << 32  # what is beyond them is not ours, and would not fit into a line
KEEP, TRIM_AT = 1024, 2048  # lines: years of daily renewals, or four days of KIS being down
DAY = timedelta(hours=24)


class Outcome(StrEnum):
    """What became of an attempt."""

    SENT = "sent"  # written before the request; it stays when the process died in between
    ISSUED = "issued"
    SAME = "same"  # KIS handed back the token we had: its six hours
    IMPORTED = "imported"  # issued elsewhere and handed over: no request of ours
    LIMIT = "limit"
    BAD_KEY = "bad_key"
    BAD_SECRET = "bad_secret"  # noqa: S105 - a word, no secret
    DENIED = "denied"
    SERVER_ERROR = "server_error"
    REFUSED = "refused"  # no known code
    BAD_ANSWER = "bad_answer"
    NO_ANSWER = "no_answer"  # it may have reached KIS
    UNREACHABLE = "unreachable"  # it cannot have reached KIS


_WORDS = frozenset(Outcome)
GRANTED = frozenset({Outcome.ISSUED, Outcome.SAME, Outcome.IMPORTED})
CREDENTIALS = frozenset({Outcome.BAD_KEY, Outcome.BAD_SECRET, Outcome.DENIED})


class Attempt(NamedTuple):
    """One line of the record; times are aware UTC."""

    at: datetime
    outcome: Outcome
    code: str | None = None
    expires_at: datetime | None = None
    reason: str = ""
    credentials: str = ""  # eight hex digits that change with the key or the secret
    pid: int = 0
    by: str = ""  # the person who asked; empty for a program

    @property
    def counts(self) -> bool:
        """Whether KIS may have seen it, so that the cool-down runs from it."""
        return self.outcome not in (Outcome.UNREACHABLE, Outcome.IMPORTED)


class History(NamedTuple):
    """What a record holds: its attempts, oldest first, and how the older ones ended that were cut off."""

    attempts: list[Attempt]
    cut: Counter[Outcome]

    def totals(self) -> Counter[Outcome]:
        """How many attempts ended how, since the record began: numbers that only grow.

        The last one is not among them while it is `sent`: it may still become something else.
        """
        final = self.attempts[:-1] if self.attempts and self.attempts[-1].outcome is Outcome.SENT else self.attempts
        return self.cut + Counter(attempt.outcome for attempt in final)


class IssuanceRecord:
    """The record of one key. Reading takes no lock; writing is for the holder of the key's lock."""

    def __init__(self, folder: str, key_fingerprint: str) -> None:
        """Name the file; nothing is opened yet."""
        self.path = os.path.join(folder, f"key-{key_fingerprint}.jsonl")

    def attempts(self) -> list[Attempt]:
        """All attempts, oldest first; lines that cannot be read are passed over, a missing file is empty.

        Of a file that cannot be read at all the time of its last change is known: an attempt was made then.
        """
        try:
            return self.read().attempts
        except ValueError:
            changed = store.changed_at(self.path)
            return [Attempt(datetime.fromtimestamp(changed, UTC), Outcome.SENT)] if changed else []

    def read(self) -> History:
        """All that is recorded; lines that cannot be read are passed over, a missing file is empty.

        Raises:
            ValueError: something is there, but no file that can be read.

        """
        return parse(self.content())

    def content(self) -> bytes:
        """The file as it is; nothing where there is none.

        Raises:
            ValueError: something is there, but no file that can be read.

        """
        return store.read_bytes(self.path, limit=2 * TRIM_AT * LINE) or b""

    def begin(self, attempt: Attempt) -> int:
        """Append `attempt` durably and return where its line stands, for `complete`.

        Raises:
            OSError: it could not be written; nothing may be issued on the strength of it.

        """
        self._trim()
        with open(os.open(self.path, os.O_RDWR | os.O_CREAT | store.NO_FOLLOW, 0o600), "r+b") as file:
            position = file.seek(0, os.SEEK_END)
            # After a torn or foreign line, start on a sector of our own.
            gap = -position % LINE
            file.write(b" " * (gap - 1) + b"\n" if gap else b"")
            file.write(_line(attempt))
            _sync(file)
        if position == 0:
            store.sync_folder(os.path.dirname(self.path))
        return position + gap

    def complete(self, position: int, attempt: Attempt) -> None:
        """Write the outcome over the line that `begin` wrote.

        Raises:
            OSError: it could not be written; the attempt stays recorded as `sent`.

        """
        with open(self.path, "r+b") as file:
            file.seek(position)
            file.write(_line(attempt))
            _sync(file)

    def _trim(self) -> None:
        try:
            too_long = os.path.getsize(self.path) > TRIM_AT * LINE
        except FileNotFoundError:
            return
        if not too_long:
            return
        with contextlib.suppress(ValueError):  # what cannot be read now is not thrown away
            attempts, cut = self.read()
            cut += Counter(attempt.outcome for attempt in attempts[:-KEEP])
            kept = b"".join([_cut_line(cut), *(_line(attempt) for attempt in attempts[-KEEP:])])
            store.write_text(self.path, kept.decode(), temporary="trim")


def parse(content: bytes) -> History:
    """What whole lines of a record say; those that cannot be read are passed over."""
    lines = content.split(b"\n")
    return History([attempt for line in lines if (attempt := _parse(line))], _parse_cut(lines[0]))


def issued_within(attempts: Sequence[Attempt], now: datetime, span: timedelta = DAY) -> list[Attempt]:
    """The attempts that brought a new token in the `span` before `now`; the answer KIS repeated is none.

    Those that seem to lie ahead count too, as the clock may have been set back, but no further than the
    `span`: a clock that was wrong by a year must not forbid a year's issues.
    """
    return [a for a in attempts if a.outcome is Outcome.ISSUED and now - span < a.at < now + span]


def latest(attempts: Sequence[Attempt]) -> Attempt | None:
    """The last attempt that KIS may have seen, from which the cool-down runs."""
    return next((a for a in reversed(attempts) if a.counts), None)


def failures(attempts: Sequence[Attempt]) -> int:
    """How many attempts have failed since the last one that brought a token."""
    count = 0
    for attempt in reversed(attempts):
        if attempt.outcome in GRANTED:
            break
        count += 1
    return count


def _sync(file: BufferedRandom) -> None:
    file.flush()
    os.fsync(file.fileno())


def _line(attempt: Attempt) -> bytes:
    content: dict[str, Any] = {
        "at": attempt.at.isoformat(timespec="milliseconds"),
        "outcome": attempt.outcome.value,
        "code": attempt.code,
        "expires_at": attempt.expires_at.isoformat() if attempt.expires_at else None,
        "reason": attempt.reason[: remarks.REASON_LENGTH],
        "by": attempt.by[: remarks.BY_LENGTH],
        "credentials": attempt.credentials,
        "pid": attempt.pid,
    }
    while len(text := json.dumps(content, ensure_ascii=False).encode(errors="replace")) >= LINE:
        content["reason"] = content["reason"][:-1]
    return text.ljust(LINE - 1) + b"\n"


def _cut_line(cut: Counter[Outcome]) -> bytes:
    """The first line of a record that was cut: no attempt, so readers that know nothing of it pass over it."""
    return json.dumps({"cut": cut}).encode().ljust(LINE - 1) + b"\n"


def _parse_cut(line: bytes) -> Counter[Outcome]:
    try:
        return Counter({Outcome(name): int(count) for name, count in json.loads(line)["cut"].items()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Counter()


def _parse(line: bytes) -> Attempt | None:
    try:
        content = json.loads(line.decode())
        return Attempt(
            at=_aware(content["at"]),
            outcome=_outcome(content["outcome"]),
            code=_word(content.get("code"), CODE_LENGTH) or None,
            expires_at=_aware(content["expires_at"]) if content.get("expires_at") else None,
            reason=str(content.get("reason", "")),
            by=str(content.get("by", "")),
            credentials=_word(content.get("credentials"), DIGEST_LENGTH),
            pid=pid if 0 <= (pid := int(content.get("pid", 0))) < PIDS else 0,
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, OSError):
        return None


def _outcome(word: str) -> Outcome:
    """What a line says; a later version's own word is an attempt of which no more is known than that it was made."""
    return Outcome(word) if word in _WORDS or not isinstance(word, str) else Outcome.SENT


def _word(value: object, length: int) -> str:
    """A short word as `_line` writes it; empty for anything else, which a line might have no room for."""
    return value if isinstance(value, str) and len(value) <= length and value.isascii() and value.isprintable() else ""


def _aware(text: str) -> datetime:
    at = datetime.fromisoformat(text).astimezone(UTC)
    if not tokens.sane(at):
        raise ValueError(at)
    return at
