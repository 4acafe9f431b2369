"""The incidents of an installation: what people were told of, so that all runs together tell it once.

One document, `incidents`, with names and times, never a message or a secret. It is held while Slack is told: what
Slack did not take, or a killed run had not noted, is told by the next run. One key's outage is one incident, whatever
KIS answers while it lasts; a token that someone else issued is another.

An incident is opened; escalated when half of the lead to the endangered need is gone, and once more at the last call
before that need; told again at growing intervals while it lasts; and closed, which is told once.
"""

from __future__ import annotations

import contextlib
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import AwareDatetime, BaseModel, ValidationError, model_validator

from flows.alerts.causes import BY_NAME, FOREIGN_LIMIT, FOREIGN_TOKEN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flows.alerts.causes import Cause
    from tokencore.stores.base import Document

CALM, HALF, LAST_CALL = 0, 1, 2  # stages of escalation
ACT = timedelta(minutes=30)  # before the need: what a person takes to notice, understand and act
NEAR = timedelta(hours=4)  # before the need: who is called then has a reason to get up
# The flows look hourly, so nothing shorter could be kept; each is about twice the one before, as news turns into a
# known state; a day is the longest, because every day has sessions of its own and people of its own on duty.
REMINDERS = tuple(timedelta(hours=hours) for hours in (1, 3, 6, 12, 24))
PUNCTUALITY = timedelta(minutes=5)  # hourly runs are not on the second; a reminder must not wait for the one after
FORGOTTEN = timedelta(days=7)  # unseen for longer, trouble that comes back is new: nobody looked in between


class Telling(NamedTuple):
    """What people are told.

    Attributes:
        kind: which part of the incident's life it is.
        stage: how far the incident is escalated with it.
        page: whether it calls people: a need is near, and it was escalated or only a person can help.

    """

    kind: Literal["opened", "escalated", "reminded"]
    stage: int
    page: bool


class Incident(BaseModel):
    """One key in trouble; times are aware.

    Attributes:
        subject: the key's first market, or the exchange of a run that came to no key.
        cause: the name of its present cause.
        opened_at: when it was first met.
        seen_at: when it was last met.
        told_at: when people last heard of it; None before they did.
        stage: how far it was escalated when they did.
        reminders: how often they were reminded.
        need: when the need that it endangers starts; None where none is known.
        need_since: since when it has endangered that need.
        thread: Slack's channel and the time stamp of the opening, where a bot told it.
        closed_at: when it was over, where that is still to be told.

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

    @model_validator(mode="before")
    @classmethod
    def _earlier(cls, found: Any) -> Any:  # noqa: ANN401 - whatever a file has
        """What a new incident leaves out."""
        if not isinstance(found, dict):
            return found
        return {"seen_at": found.get("opened_at"), "need_since": found.get("opened_at"), **found}

    def heard(self, telling: Telling, now: datetime, thread: tuple[str, str] | None) -> None:
        """People were told at `now`, and in which thread they go on hearing."""
        self.told_at, self.thread = now, thread or self.thread
        self.stage = max(self.stage, telling.stage)
        self.reminders += telling.kind == "reminded"


class Busy(Exception):  # noqa: N818 - no fault: another run is telling
    """Another process holds the incidents; what is still wrong is told by the next run."""


@contextlib.contextmanager
def changing(document: Document, wait: float) -> Iterator[list[Incident]]:
    """What is known, under the lock; changes are written at the end.

    Raises:
        Busy: the lock was not acquired within `wait` seconds.
        OSError: it could not be written.

    """
    with document.lock(wait=wait) as held:
        if not held:
            raise Busy
        content = document.read()
        known = parse(content)
        before = _dumped(known)
        try:
            yield known
        finally:
            if (after := _dumped(known)) != before:
                document.write({**content, "incidents": after})


def parse(content: dict[str, Any]) -> list[Incident]:
    """What a document says; a damaged entry says nothing, and what is still wrong is told again."""
    known = []
    found = content.get("incidents")
    for one in found if isinstance(found, list) else []:
        with contextlib.suppress(ValidationError):
            known.append(Incident.model_validate(one))
    return known


def met(
    known: list[Incident], subject: str, cause: Cause, need: datetime | None, now: datetime, look_again: datetime
) -> tuple[Incident, Telling | None]:
    """Note that the trouble exists and endangers the need that starts then; what people are to be told of it.

    `look_again` is when anybody meets it next, by plan. A new cause of a known incident is told where it now takes a
    person.
    """
    known[:] = [one for one in known if one.closed_at or now - one.seen_at < FORGOTTEN]
    found = [one for one in known if one.subject == subject and _kind(one.cause) == _kind(cause.name)]
    one = max(found, key=lambda one: one.told_at is not None, default=None) or new(subject, cause, need, now)
    known[:] = [*(other for other in known if other not in found), one]
    if cause.by_person and not _known(one.cause).by_person:
        one.told_at = None
    one.cause, one.seen_at = cause.name, now
    one.closed_at = None  # it came back before its end was told: it never ended
    if need != one.need:
        one.need, one.need_since, one.stage = need, now, CALM
    return one, next_telling(one, cause, now, look_again)


def over(known: list[Incident], subject: str, now: datetime, *, foreign: bool, lasting: bool) -> list[Incident]:
    """Close the subject's incidents; those whose end is to be told. One that nobody was told of is forgotten.

    With `foreign` someone else's token is still there, and is what remains of a limit that it caused; with `lasting`
    everything else is not over either.
    """
    mine = [one for one in known if one.subject == subject]
    kept = [one for one in mine if (foreign if _kind(one.cause) else lasting)]
    superseded = [one for one in mine if foreign and one.cause == FOREIGN_LIMIT.name]
    ended = [one for one in mine if one not in kept and one not in superseded and one.told_at]
    known[:] = [one for one in known if one not in mine or one in ended or (one in kept and one not in superseded)]
    for one in ended:
        one.closed_at = one.closed_at or now
    return ended


def next_telling(life: Incident, cause: Cause, now: datetime, look_again: datetime) -> Telling | None:
    """What people are to be told of an incident at `now`; the next time that anybody looks is `look_again`."""
    stage = _stage(life, now, look_again)
    if life.told_at is None:
        heard = cause.at_once or life.need is None or stage > CALM
        return Telling("opened", stage, _page(life, cause, stage, now)) if heard else None
    if stage > life.stage:
        return Telling("escalated", stage, _page(life, cause, stage, now))
    pause = REMINDERS[min(life.reminders, len(REMINDERS) - 1)]
    if cause.reminds and now >= life.told_at + pause - PUNCTUALITY:
        return Telling("reminded", life.stage, page=False)
    return None


def new(subject: str, cause: Cause, need: datetime | None, now: datetime) -> Incident:
    """An incident that begins at `now`."""
    return Incident(subject=subject, cause=cause.name, opened_at=now, seen_at=now, need=need, need_since=now)


def _stage(life: Incident, now: datetime, look_again: datetime) -> int:
    """The last call comes with the last look before it would be too late, rather than with the first after."""
    if life.need is None:
        return CALM
    if max(now, look_again) > life.need - ACT:
        return LAST_CALL
    return HALF if now - life.need_since >= life.need - now else CALM


def _page(life: Incident, cause: Cause, stage: int, now: datetime) -> bool:
    return life.need is not None and life.need - now <= NEAR and (stage > CALM or cause.by_person)


def _kind(cause: str) -> bool:
    return cause == FOREIGN_TOKEN.name


def _known(cause: str) -> Cause:
    return BY_NAME.get(cause) or FOREIGN_LIMIT  # one of a later version needs no person, as far as is known


def _dumped(known: list[Incident]) -> list[dict[str, Any]]:
    return [one.model_dump(mode="json") for one in known]
