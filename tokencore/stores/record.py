"""The issuance record: one JSON object per line, which other programs read too. It never contains a token or key."""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tokencore.attempts import BY_LENGTH, REASON_LENGTH, Attempt, Outcome, issued_within
from tokencore.stores import files
from tokencore.stores.permissions import refuse_strangers
from tokencore.tokens import sane

if TYPE_CHECKING:
    from tokencore.stores.files import Signature

LENGTHS = {"code": 12, "reason": REASON_LENGTH, "credentials": 8, "by": BY_LENGTH, "host": 64}  # characters kept
KEEP = 1024  # attempts: years of daily renewals, or days of KIS being down
# If the record cannot be written, the lock file gets the time of the last attempt as its modification time, marked by
# an access time that no clock gives. Each second of that after the first stands for one issue that the record lacks.
UNRECORDED, MANY = 1, 50
_WORDS = frozenset(Outcome)
_log = logging.getLogger("tokencore")


class Record:
    """The record of a key in a file; if the disk takes no line, the times of the key's lock file keep the last attempt.

    Only the holder of the key's lock changes it.
    """

    def __init__(self, path: str, lock_path: str) -> None:
        """Set the paths; nothing is opened yet."""
        self._path, self._lock_path = path, lock_path
        self._known: tuple[Signature | None, list[Attempt]] | None = None

    def attempts(self) -> list[Attempt]:
        """Return all known attempts, oldest first; an unchanged file is not parsed again."""
        seen = files.signature(self._path)
        if self._known is None or self._known[0] != seen:
            refuse_strangers(os.path.dirname(self._path))
            try:
                found = parse((files.read_bytes(self._path, tail=True) or b"").decode(errors="replace"))
            except ValueError:  # unreadable; an attempt was made when it last changed
                found = [Attempt(datetime.fromtimestamp(seen[2] / 1e9, UTC), Outcome.SENT)] if seen else []
            self._known = seen, found
        known = self._known[1]
        return [*known, *(one for one in self._unrecorded() if not known or one.at > known[-1].at)]

    def append(self, attempt: Attempt) -> None:
        """Add an attempt durably."""
        self.write([*self.attempts(), attempt])

    def complete(self, begun: Attempt, attempt: Attempt) -> None:
        """Replace the line that was `begun` with `attempt`; append it if the disk did not take that line."""
        known = self.attempts()
        mine = bool(known) and (known[-1].outcome, known[-1].pid) == (Outcome.SENT, begun.pid)
        self.write([*(known[:-1] if mine else known), attempt])

    def write(self, attempts: list[Attempt]) -> None:
        """Replace the record; on a full disk the lock file's times, which can still be set, keep the last attempt."""
        try:
            files.write_bytes(self._path, render(attempts).encode(errors="replace"), writer="record")
        except OSError as error:
            last, issued = attempts[-1], issued_within(self._unrecorded(), attempts[-1].at)
            issues = len(issued) + (last.outcome is Outcome.ISSUED)
            os.utime(self._lock_path, (UNRECORDED + issues, last.at.timestamp()))
            _log.warning("The issuance record cannot be written (%s); the lock file keeps the time.", error.strerror)
        else:
            if self._unrecorded():
                os.utime(self._lock_path)
        self._known = None

    def _unrecorded(self) -> list[Attempt]:
        try:
            found = os.stat(self._lock_path)
        except OSError:
            return []
        if not UNRECORDED <= found.st_atime <= MANY or found.st_atime % 1:
            return []
        at, issues = datetime.fromtimestamp(found.st_mtime, UTC), int(found.st_atime) - UNRECORDED
        return [Attempt(at, Outcome.ISSUED)] * issues or [Attempt(at, Outcome.SENT)]


def parse(text: str) -> list[Attempt]:
    """All attempts, oldest first; a line that cannot be read is skipped."""
    return [attempt for line in text.split("\n") if (attempt := _parse(line))]


def render(attempts: list[Attempt]) -> str:
    """The file's content: the last `KEEP` attempts."""
    return "".join(f"{_line(one)}\n" for one in attempts[-KEEP:])


def _line(attempt: Attempt) -> str:
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
