"""The incidents of a token directory: what people were told of, so that all runs together tell it once.

One small file, `incidents.json`, owner-only, replaced as a whole under a lock of its own. It survives
restarts and is shared by every run on the machine. It holds names and times, never a message or a secret.
Telling takes two steps: who is to tell claims it, and says when it is done. What a killed run had
claimed, or Slack did not take, is told by the next run.
"""

from __future__ import annotations

import contextlib
import os
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from pydantic import AwareDatetime, BaseModel, ValidationError, model_validator

from flows.life import next_telling

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    from flows.causes import Cause
    from flows.life import Telling

LOCK_WAIT = 3.0  # seconds; it is held for the milliseconds of one small write
CLAIM = timedelta(seconds=60)  # after which a claim counts as abandoned
FORGOTTEN = timedelta(days=7)  # unseen for longer, trouble that comes back is new: nobody looked in between
_FILE, _FOLDER = 0o600, 0o700


class Incident(BaseModel):
    """One key in trouble for one cause; times are aware.

    Attributes:
        subject: the key's first market, or the exchange of a run that came to no key.
        cause: the name of a `causes.Cause`.
        opened_at: when it was first met.
        seen_at: when it was last met.
        told_at: when people last heard of it; None before they did.
        stage: how far it was escalated when they did.
        reminders: how often they were reminded.
        need: when the need that it endangers starts; None where none is known.
        need_since: since when it has endangered that need.
        thread: Slack's channel and the time stamp of the opening, where a bot told it.
        closed_at: when it was over, where that is still to be told.
        claimed_at: when a run last set out to tell.

    """

    subject: str
    cause: str
    opened_at: AwareDatetime
    seen_at: AwareDatetime
    told_at: AwareDatetime | None = None
    stage: int = 0
    reminders: int = 0
    need: AwareDatetime | None = None
    need_since: AwareDatetime
    thread: tuple[str, str] | None = None
    closed_at: AwareDatetime | None = None
    claimed_at: AwareDatetime | None = None

    @model_validator(mode="before")
    @classmethod
    def _grown(cls, found: Any) -> Any:  # noqa: ANN401 - whatever a file holds
        """What a new incident and the files of version 0.1.0, with `told`, leave out."""
        if not isinstance(found, dict):
            return found
        opened_at = found.get("opened_at")
        told_at = {"told_at": opened_at} if found.get("told") is True else {}
        return {"seen_at": opened_at, "need_since": opened_at, **told_at, **found}

    def met(self, need: datetime | None, now: datetime) -> None:
        """It lasts at `now`, and endangers that need."""
        self.seen_at = now
        self.closed_at = None  # it came back before its end was told: it never ended
        if need != self.need:
            self.need, self.need_since, self.stage = need, now, 0

    def heard(self, telling: Telling, now: datetime) -> None:
        """People were told at `now`."""
        self.told_at, self.claimed_at = now, None
        self.stage = max(self.stage, telling.stage)
        self.reminders += telling.kind == "reminded"

    def claim(self, now: datetime) -> bool:
        """Whether the caller is the one to tell."""
        if self.claimed_at and now < self.claimed_at + CLAIM:
            return False
        self.claimed_at = now
        return True


class _File(BaseModel):
    """Everything that is known, and until when Slack wants to hear nothing."""

    slack_from: AwareDatetime | None = None
    incidents: list[Incident] = []

    @model_validator(mode="before")
    @classmethod
    def _grown(cls, found: object) -> object:
        return {"incidents": found} if isinstance(found, list) else found


class Incidents:
    """The incidents of one token directory.

    Every method may raise OSError (also as filelock.Timeout) where the directory cannot be used; nothing is changed
    then.
    """

    def __init__(self, folder: Path) -> None:
        """Name the files; nothing is opened yet."""
        self._path = folder / "incidents.json"

    def met(
        self, subject: str, cause: Cause, need: datetime | None, now: datetime, look_again: datetime
    ) -> tuple[Incident, Telling | None]:
        """Note that the trouble exists and endangers the need that starts then; what the caller is to tell of it.

        `look_again` is when anybody meets it next, by plan.
        """
        with self._changing() as known:
            known.incidents = [one for one in known.incidents if one.closed_at or now - one.seen_at < FORGOTTEN]
            one = next((one for one in known.incidents if (one.subject, one.cause) == (subject, cause.name)), None)
            if one is None:
                one = new(subject, cause, need, now)
                known.incidents.append(one)
            one.met(need, now)
            telling = next_telling(one, cause, now, look_again)
            claimed = telling and _may_send(known, now) and one.claim(now)
            return one.model_copy(), telling if claimed else None

    def over(self, subject: str, now: datetime, but: Collection[str] = ()) -> list[Incident]:
        """Note that the subject is out of trouble, `but` for these causes; the incidents whose end is to be told.

        One that nobody had set out to tell of is forgotten without a word.
        """
        with self._changing() as known:
            over = [one for one in known.incidents if one.subject == subject and one.cause not in but]
            known.incidents = [one for one in known.incidents if one not in over or one.told_at or one.claimed_at]
            for one in over:
                one.closed_at = one.closed_at or now
            return [
                one.model_copy() for one in over if one in known.incidents and _may_send(known, now) and one.claim(now)
            ]

    def has(self, subject: str) -> bool:
        """Whether anything of the subject is still to be solved or told."""
        return any(one.subject == subject for one in _parse(self._read()).incidents)

    def heard(self, incident: Incident, telling: Telling, now: datetime, thread: tuple[str, str] | None) -> None:
        """Note that people were told at `now`, and in which thread they go on hearing."""
        with self._changing() as known:
            for one in known.incidents:
                if _same(one, incident):
                    one.heard(telling, now)
                    one.thread = thread or one.thread

    def end_heard(self, incident: Incident) -> None:
        """Forget the incident: people know that it is over."""
        with self._changing() as known:
            known.incidents = [one for one in known.incidents if not (_same(one, incident) and one.closed_at)]

    def quiet(self, until: datetime) -> None:
        """Note that Slack wants to hear nothing before that moment; nobody is told to tell until then."""
        with self._changing() as known:
            known.slack_from = until

    @contextlib.contextmanager
    def _changing(self) -> Iterator[_File]:
        """What is known, under the lock; changes are saved at the end."""
        self._path.parent.mkdir(mode=_FOLDER, parents=True, exist_ok=True)
        with FileLock(self._path.with_suffix(".lock"), LOCK_WAIT, _FILE, preserve_lock_file=True):
            text = self._read()
            known = _parse(text)
            yield known
            changed = known.model_dump_json(indent=1)
            if changed != text:
                self._write(changed)

    def _read(self) -> str:
        try:
            return self._path.read_text("utf-8", errors="replace")
        except FileNotFoundError:
            return "{}"

    def _write(self, text: str) -> None:
        draft = self._path.with_suffix(".tmp")
        draft.unlink(missing_ok=True)
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _FILE), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self._path)


def new(subject: str, cause: Cause, need: datetime | None, now: datetime) -> Incident:
    """An incident that begins at `now`."""
    return Incident(subject=subject, cause=cause.name, opened_at=now, seen_at=now, need=need, need_since=now)


def _may_send(known: _File, now: datetime) -> bool:
    return known.slack_from is None or known.slack_from <= now


def _same(one: Incident, other: Incident) -> bool:
    return (one.subject, one.cause, one.opened_at) == (other.subject, other.cause, other.opened_at)


def _parse(text: str) -> _File:
    """What the file says; a damaged one says nothing, and what is still wrong is told again."""
    try:
        return _File.model_validate_json(text)
    except ValidationError:
        return _File()
