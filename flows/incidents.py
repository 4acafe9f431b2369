"""The open incidents of a token directory: what people were told of, so that all runs together tell it once.

One small file, `incidents.json`, owner-only, replaced as a whole under a lock of its own. It survives
restarts and is shared by every run on the machine. It holds names and times, never a message or a secret.
Telling takes two steps: who is to tell claims it, and says when it is done. What a killed run had
claimed, or Slack did not take, is told by the next run.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from filelock import FileLock

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LOCK_WAIT = 3.0  # seconds; it is held for the milliseconds of one small write
CLAIM = timedelta(seconds=60)  # after which a claim counts as abandoned
_FILE, _FOLDER = 0o600, 0o700


@dataclass
class Incident:
    """One key in trouble for one cause; times are aware UTC.

    Attributes:
        subject: the key's first market, or the exchange of a run that came to no key.
        cause: the name of a `causes.Cause`.
        opened_at: when it was first met.
        told: whether people know of it.
        closed_at: when it was over, where that is still to be told.
        claimed_at: when a run set out to tell.

    """

    subject: str
    cause: str
    opened_at: datetime
    told: bool = False
    closed_at: datetime | None = None
    claimed_at: datetime | None = None

    def claim(self, now: datetime) -> bool:
        """Whether the caller is the one to tell."""
        if self.claimed_at and now < self.claimed_at + CLAIM:
            return False
        self.claimed_at = now
        return True


class Incidents:
    """The incidents of one token directory.

    Every method may raise OSError or filelock.Timeout where the directory cannot be used; nothing is changed then.
    """

    def __init__(self, folder: Path) -> None:
        """Name the files; nothing is opened yet."""
        self._path = folder / "incidents.json"

    def open(self, subject: str, cause: str, now: datetime) -> bool:
        """Note that the trouble exists; whether the caller is to tell of it."""
        with self._changing() as known:
            found = next((one for one in known if (one.subject, one.cause) == (subject, cause)), None)
            if found is None:
                found = Incident(subject, cause, now)
                known.append(found)
            found.closed_at = None  # it came back before its end was told: it never ended
            return not found.told and found.claim(now)

    def close(self, subject: str, now: datetime) -> list[Incident]:
        """Note that the subject is out of trouble; the incidents whose end the caller is to tell."""
        with self._changing() as known:
            over = [one for one in known if one.subject == subject]
            for one in over:
                one.closed_at = one.closed_at or now
            return [one for one in over if one.claim(now)]

    def opening_told(self, subject: str, cause: str) -> None:
        """Note that people know of the incident."""
        with self._changing() as known:
            for one in known:
                if (one.subject, one.cause) == (subject, cause):
                    one.told, one.claimed_at = True, None

    def end_told(self, incident: Incident) -> None:
        """Forget the incident: people know that it is over."""
        with self._changing() as known:
            known[:] = [one for one in known if not (_same(one, incident) and one.closed_at)]

    @contextlib.contextmanager
    def _changing(self) -> Iterator[list[Incident]]:
        """What is known, under the lock; changes of the list are saved at the end."""
        self._path.parent.mkdir(mode=_FOLDER, parents=True, exist_ok=True)
        with FileLock(self._path.with_suffix(".lock"), LOCK_WAIT, _FILE, preserve_lock_file=True):
            text = self._read()
            known = _parse(text)
            yield known
            changed = json.dumps([_content(one) for one in known], indent=1)
            if changed != text:
                self._write(changed)

    def _read(self) -> str:
        try:
            return self._path.read_text("utf-8", errors="replace")
        except FileNotFoundError:
            return "[]"

    def _write(self, text: str) -> None:
        draft = self._path.with_suffix(".tmp")
        draft.unlink(missing_ok=True)
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _FILE), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self._path)


def _same(one: Incident, other: Incident) -> bool:
    return (one.subject, one.cause, one.opened_at) == (other.subject, other.cause, other.opened_at)


def _content(incident: Incident) -> dict[str, Any]:
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in vars(incident).items()}


def _parse(text: str) -> list[Incident]:
    """What the file says; a damaged one says nothing, and what is still wrong is told again."""
    try:
        return [
            Incident(
                str(item["subject"]),
                str(item["cause"]),
                datetime.fromisoformat(item["opened_at"]).astimezone(UTC),
                item["told"] is True,
                *(datetime.fromisoformat(item[name]) if item[name] else None for name in ("closed_at", "claimed_at")),
            )
            for item in json.loads(text)
        ]
    except (ValueError, KeyError, TypeError):
        return []
