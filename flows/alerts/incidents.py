"""The incidents of an installation: what people already know, so that all runs together report it once.

They are kept in one document, `incidents`, with names and times, never a message or a secret. It is locked while a
message is sent; what Slack did not accept, or a killed run had not noted, is sent by the next run. One key's outage
is one incident, whatever KIS answers while it lasts; a token that someone else issued is another.

An incident is opened; escalated when half of the lead to the endangered need is gone, and once more at the last call
before that need; repeated at growing intervals while it lasts; and closed, which is reported once.
"""

from __future__ import annotations

import contextlib
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import AwareDatetime, BaseModel, ValidationError

from flows.alerts.causes import BY_NAME, FOREIGN_LIMIT, FOREIGN_TOKEN, UNFORESEEN

if TYPE_CHECKING:
    from datetime import datetime

    from flows.alerts.causes import Cause

CALM, HALF, LAST_CALL = 0, 1, 2  # stages of escalation
ACT = timedelta(minutes=30)  # before the need: the time that a person takes to notice, understand and act
NEAR = timedelta(hours=4)  # before the need: close enough to get people out of bed
# The flows run hourly, so a shorter interval could not be kept. Each is about twice the previous one, as news turns
# into a known state; the longest is a day, because every day has its own sessions and its own people on duty.
REMINDERS = tuple(timedelta(hours=hours) for hours in (1, 3, 6, 12, 24))
PUNCTUALITY = timedelta(minutes=5)  # hourly runs do not start on the second; a reminder must not wait for the next one
FORGOTTEN = timedelta(days=7)  # trouble that comes back after longer is new: nobody looked in between


class Notification(NamedTuple):
    """A message that is due."""

    kind: Literal["opened", "escalated", "reminded"]
    stage: int  # how far the incident is escalated with it
    page: bool  # whether it calls people: a need is near, and it was escalated or only a person can help


class Incident(BaseModel):
    """One key in trouble; times are aware."""

    subject: str  # names the key, or the run that reached no key
    place: str = ""  # in a fleet: the machine and its market that last met it
    cause: str  # the name of its present cause
    opened_at: AwareDatetime
    seen_at: AwareDatetime  # when a run last met it
    notified_at: AwareDatetime | None = None  # when Slack last accepted a message about it
    stage: int = CALM  # how far it was escalated with that message
    reminders: int = 0
    need: AwareDatetime | None = None  # when the need that it endangers starts, if one is known
    need_since: AwareDatetime  # since when it has endangered that need
    thread: tuple[str, str] | None = None  # Slack's channel and the first message's time stamp, if a bot sent it
    closed_at: AwareDatetime | None = None  # when it ended, if that is still to be reported

    @property
    def kind(self) -> Cause:
        """Its present cause; the name of a cause from a later version counts as unforeseen."""
        return BY_NAME.get(self.cause, UNFORESEEN)

    def concerns(self, subject: str, place: str) -> bool:
        """Whether it is about the subject, or about the key that the market at `place` had before it was corrected."""
        return self.subject == subject or (place != "" and self.place == place)

    def notified(self, sent: Notification, now: datetime, thread: tuple[str, str] | None) -> None:
        """Note that Slack accepted this message at `now`; the next ones go into its thread."""
        self.notified_at, self.thread = now, thread or self.thread
        self.stage = max(self.stage, sent.stage)
        self.reminders += sent.kind == "reminded"


def parse(content: dict[str, Any]) -> list[Incident]:
    """Return the incidents in a document, without damaged entries; what is still wrong is then reported again."""
    known = []
    found = content.get("incidents")
    for one in found if isinstance(found, list) else []:
        with contextlib.suppress(ValidationError):
            known.append(Incident.model_validate(one))
    return known


def dumped(known: list[Incident]) -> dict[str, Any]:
    """Return the document with these incidents."""
    return {"incidents": [one.model_dump(mode="json") for one in known]}


def met(
    known: list[Incident], subject: str, cause: Cause, need: datetime | None, now: datetime, look_again: datetime
) -> tuple[Incident, Notification | None]:
    """Note that the trouble exists and endangers the need that starts at `need`; return the incident and its message.

    The message is None if none is due. `look_again` is when a run will next meet the trouble, by plan. A new cause of
    a known incident is reported if only a person can end it, unlike the old one.
    """
    known[:] = [one for one in known if one.closed_at or now - one.seen_at < FORGOTTEN]
    one = next(
        (one for one in known if one.subject == subject and (one.kind is FOREIGN_TOKEN) == (cause is FOREIGN_TOKEN)),
        None,
    )
    if one is None:
        one = new(subject, cause, need, now)
        known.append(one)
    if cause.by_person and not one.kind.by_person:
        one.notified_at = None
    one.cause, one.seen_at = cause.name, now
    one.closed_at = None  # it came back before its end was reported: it never ended
    if need != one.need:
        one.need, one.need_since, one.stage = need, now, CALM
    return one, due(one, cause, now, look_again)


def over(
    known: list[Incident], subject: str, place: str, now: datetime, *, foreign: bool, lasting: bool
) -> list[Incident]:
    """Close the subject's incidents, and return those whose end is to be reported; forget any that was never reported.

    With `foreign`, someone else's token is still there: its incident goes on, and replaces that of a limit that it
    caused. With `lasting`, all other incidents go on too.
    """
    ended = []
    for one in [one for one in known if one.concerns(subject, place)]:
        superseded = foreign and one.kind is FOREIGN_LIMIT
        if not superseded and (foreign if one.kind is FOREIGN_TOKEN else lasting):
            continue
        if superseded or not one.notified_at:
            known.remove(one)
            continue
        one.closed_at = one.closed_at or now
        ended.append(one)
    return ended


def due(one: Incident, cause: Cause, now: datetime, look_again: datetime) -> Notification | None:
    """Return the message about an incident that is due at `now`, if any; `look_again` is when a run will next look."""
    stage, near = CALM, False
    if one.need:
        near = one.need - now <= NEAR
        if max(now, look_again) > one.need - ACT:  # the next look would be too late
            stage = LAST_CALL
        elif now - one.need_since >= one.need - now:
            stage = HALF
    page = near and (stage > CALM or cause.by_person)
    if one.notified_at is None:
        urgent = cause.at_once or one.need is None or stage > CALM
        return Notification("opened", stage, page) if urgent else None
    if stage > one.stage:
        return Notification("escalated", stage, page)
    pause = REMINDERS[min(one.reminders, len(REMINDERS) - 1)]
    if cause is not FOREIGN_TOKEN and now >= one.notified_at + pause - PUNCTUALITY:
        return Notification("reminded", one.stage, page=False)
    return None


def new(subject: str, cause: Cause, need: datetime | None, now: datetime) -> Incident:
    """Return an incident that begins at `now`."""
    return Incident(subject=subject, cause=cause.name, opened_at=now, seen_at=now, need=need, need_since=now)
