"""The life of an incident: what people are to be told next. Pure: what is known and `now` go in, a telling comes out.

An incident is opened; escalated when half of the lead to the endangered need is gone, and once more at the last
call before that need; told again at growing intervals while it lasts. Its end is told by who sees it end.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from datetime import datetime
    from typing import Protocol

    from flows.causes import Cause

    class Life(Protocol):
        """What is known of an incident; times are aware UTC."""

        @property
        def told_at(self) -> datetime | None:
            """When people last heard of it; None before they did."""

        @property
        def need(self) -> datetime | None:
            """When the need that it endangers starts; None where none is known."""

        @property
        def need_since(self) -> datetime:
            """Since when it has endangered that need."""

        @property
        def stage(self) -> int:
            """How far it was escalated when people last heard of it."""

        @property
        def reminders(self) -> int:
            """How often people were reminded."""


CALM, HALF, LAST_CALL = 0, 1, 2  # stages of escalation
ACT = timedelta(minutes=30)  # before the need: what a person takes to notice, understand and act
NEAR = timedelta(hours=4)  # before the need: who is called then has a reason to get up
# The flows look hourly, so nothing shorter could be kept; each is about twice the one before, as news turns into a
# known state; a day is the longest, because every day has sessions of its own and people of its own on duty.
REMINDERS = tuple(timedelta(hours=hours) for hours in (1, 3, 6, 12, 24))
PUNCTUALITY = timedelta(minutes=5)  # hourly runs are not on the second; a reminder must not wait for the one after


class Telling(NamedTuple):
    """What is to be told.

    Attributes:
        kind: which chapter of the incident's life it is.
        stage: how far the incident is escalated with it.
        page: whether it calls people: a need is near, and it was escalated or only a person can help.

    """

    kind: Literal["opened", "escalated", "reminded"]
    stage: int
    page: bool


def next_telling(life: Life, cause: Cause, now: datetime, look_again: datetime) -> Telling | None:
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


def _stage(life: Life, now: datetime, look_again: datetime) -> int:
    """The last call comes with the last look before it would be too late, rather than with the first after."""
    if life.need is None:
        return CALM
    if max(now, look_again) > life.need - ACT:
        return LAST_CALL
    return HALF if now - life.need_since >= life.need - now else CALM


def _page(life: Life, cause: Cause, stage: int, now: datetime) -> bool:
    return life.need is not None and life.need - now <= NEAR and (stage > CALM or cause.by_person)
