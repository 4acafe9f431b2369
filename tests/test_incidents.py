"""Incidents: who tells what of them, when, and what the file keeps."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows import causes
from flows.incidents import CLAIM, FORGOTTEN, Incidents, new
from flows.life import ACT, HALF, LAST_CALL, NEAR, PUNCTUALITY, REMINDERS, Telling, next_telling

if TYPE_CHECKING:
    from pathlib import Path

    from flows.causes import Cause

MONDAY = datetime(2026, 11, 23, 7, 35, tzinfo=UTC)  # 16:35 in Seoul, the anchor
NEED = MONDAY + timedelta(hours=6)
HOUR = timedelta(hours=1)


def story(cause: Cause, need: datetime | None, looks: list[datetime]) -> list[tuple[datetime, Telling]]:
    """What people are told of an incident by runs that look at these times, each knowing of the next."""
    one = new("us", cause, need, looks[0])
    told = []
    for now, later in zip(looks, [*looks[1:], looks[-1] + HOUR], strict=True):
        one.met(need, now)
        if telling := next_telling(one, cause, now, later):
            told.append((now, telling))
            one.heard(telling, now)
            assert next_telling(one, cause, now, later) is None
    return told


def hourly(hours: int) -> list[datetime]:
    """The hourly looks from the anchor on."""
    return [MONDAY + n * HOUR for n in range(hours)]


def kinds(told: list[tuple[datetime, Telling]]) -> list[tuple[int, str]]:
    """The hour and the kind of each telling."""
    return [((at - MONDAY) // HOUR, telling.kind) for at, telling in told]


def test_an_incident_is_opened_escalated_twice_and_reminded_in_between() -> None:
    """Wrong credentials at the anchor, six hours before the need, met by the hourly check."""
    told = story(causes.CREDENTIALS, NEED, hourly(9))
    assert kinds(told) == [
        (0, "opened"),
        (1, "reminded"),
        (3, "escalated"),  # half of the lead is gone
        (5, "escalated"),  # the last look before half an hour is left
        (8, "reminded"),
    ]
    assert [telling.stage for _, telling in told] == [0, 0, HALF, LAST_CALL, LAST_CALL]


def test_reminders_come_at_growing_intervals() -> None:
    """Where no need is known, an incident is told again after 1, 3, 6, 12 and 24 hours, and then daily."""
    told = story(causes.SETTINGS, None, hourly(24 * 4))
    assert kinds(told)[0] == (0, "opened")
    assert [at for at, _ in kinds(told)] == [0, 1, 4, 10, 22, 46, 70, 94]


def test_kis_being_down_is_told_once_it_presses() -> None:
    """An outage that ends in the first half of the lead is nobody's business."""
    assert kinds(story(causes.DOWN, NEED, hourly(6))) == [(3, "opened"), (4, "reminded"), (5, "escalated")]
    assert story(causes.DOWN, NEED, hourly(3)) == []


def test_who_has_hours_is_not_called() -> None:
    """A page is an opening or an escalation with a need within hours, which was escalated or only a person can help."""
    late = NEED + 10 * HOUR  # half of the lead is gone eight hours before the need
    pages = [telling.page for _, telling in story(causes.CREDENTIALS, late, hourly(16)) if telling.kind != "reminded"]
    assert pages == [False, False, True]
    assert story(causes.CREDENTIALS, MONDAY + NEAR, hourly(1))[0][1].page
    assert not story(causes.LIMIT, MONDAY + NEAR, hourly(1))[0][1].page
    assert story(causes.LIMIT, MONDAY + ACT, hourly(1))[0][1].page


def test_the_next_need_is_escalated_anew() -> None:
    """When a session was lost and the next comes into danger, people hear of that one too."""
    one = new("us", causes.LIMIT, MONDAY, MONDAY)
    one.heard(Telling("opened", LAST_CALL, page=True), MONDAY)
    one.met(NEED, MONDAY)
    telling = next_telling(one, causes.LIMIT, MONDAY + timedelta(minutes=200), MONDAY + timedelta(minutes=205))
    assert telling == Telling("escalated", HALF, page=True)


def test_a_foreign_token_is_told_once() -> None:
    """It endangers nothing by itself, so nobody is reminded."""
    assert kinds(story(causes.FOREIGN_TOKEN, None, hourly(30))) == [(0, "opened")]


@given(
    lead=st.integers(1, 40 * 60),
    pauses=st.lists(st.integers(1, 60), min_size=1, max_size=120),
    cause=st.sampled_from(causes.CAUSES),
)
def test_whatever_the_times_nothing_is_told_twice(lead: int, pauses: list[int], cause: Cause) -> None:
    """One opening, each stage once and upwards, reminders never closer than the last telling allows.

    Runs that look at least hourly make the last call half an hour before the need, or at the opening.
    """
    need = MONDAY + timedelta(minutes=lead)
    looks = [MONDAY + timedelta(minutes=sum(pauses[:n])) for n in range(len(pauses) + 1)]
    told = story(cause, need, looks)
    assert [telling.kind for _, telling in told].count("opened") == bool(told)
    stages = [telling.stage for _, telling in told if telling.kind != "reminded"]
    assert stages == sorted(set(stages))
    for (before, _), (at, telling) in pairwise(told):
        assert telling.kind != "reminded" or at - before >= REMINDERS[0] - PUNCTUALITY
    if looks[-1] >= need - ACT:
        calls = [at for at, telling in told if telling.stage == LAST_CALL]
        assert calls
        assert calls[0] <= max(need - ACT, MONDAY)


def test_what_a_killed_run_had_set_out_to_tell_is_told_by_another(tmp_path: Path) -> None:
    """A claim keeps others from telling for a minute, not for ever."""
    incidents = Incidents(tmp_path)
    met = [incidents.met("us", causes.LIMIT, NEED, MONDAY + part * CLAIM, NEED)[1] for part in (0, 0.5, 1)]
    assert [telling is not None for telling in met] == [True, False, True]


def test_trouble_that_returns_before_its_end_was_told_never_ended(tmp_path: Path) -> None:
    """Then there is nothing new to tell, and the length counts from the first time."""
    incidents = Incidents(tmp_path)
    one, telling = incidents.met("us", causes.LIMIT, None, MONDAY, NEED)
    assert telling
    incidents.heard(one, telling, MONDAY, None)
    assert incidents.over("us", MONDAY + CLAIM)
    assert incidents.met("us", causes.LIMIT, None, MONDAY + 2 * CLAIM, NEED)[1] is None
    (over,) = incidents.over("us", MONDAY + 3 * CLAIM)
    assert over.opened_at == MONDAY
    assert over.closed_at == MONDAY + 3 * CLAIM


def test_what_nobody_was_to_hear_of_ends_without_a_word(tmp_path: Path) -> None:
    """An outage that did not press leaves no message and nothing in the file."""
    incidents = Incidents(tmp_path)
    assert incidents.met("us", causes.DOWN, NEED, MONDAY, MONDAY + HOUR)[1] is None
    assert incidents.over("us", MONDAY + HOUR) == []
    assert json.loads((tmp_path / "incidents.json").read_text())["incidents"] == []


def test_the_end_of_what_slack_did_not_take_is_told(tmp_path: Path) -> None:
    """People hear at least afterwards of an incident that somebody had set out to tell them of."""
    incidents = Incidents(tmp_path)
    assert incidents.met("us", causes.LIMIT, NEED, MONDAY, MONDAY + HOUR)[1]
    assert [one.cause for one in incidents.over("us", MONDAY + HOUR)] == ["limit"]


def test_what_nobody_met_for_a_week_is_new_when_it_returns(tmp_path: Path) -> None:
    """A paused deployment leaves its incident behind; a later one of the kind is not its continuation."""
    incidents = Incidents(tmp_path)
    one, telling = incidents.met("TKSE", causes.SETTINGS, None, MONDAY, NEED)
    assert telling
    incidents.heard(one, telling, MONDAY, None)
    again, telling = incidents.met("TKSE", causes.SETTINGS, None, MONDAY + FORGOTTEN, NEED)
    assert again.opened_at == MONDAY + FORGOTTEN
    assert telling
    assert telling.kind == "opened"


def test_nobody_tells_before_slack_wants_to_hear(tmp_path: Path) -> None:
    """Slack's Retry-After holds for every run and every incident; what is due waits for its end."""
    incidents = Incidents(tmp_path)
    incidents.quiet(MONDAY + HOUR)
    assert incidents.met("us", causes.LIMIT, None, MONDAY, NEED)[1] is None
    assert incidents.met("kr", causes.LIMIT, None, MONDAY, NEED)[1] is None
    one, telling = incidents.met("us", causes.LIMIT, None, MONDAY + HOUR, NEED)
    assert telling
    assert telling.kind == "opened"
    incidents.heard(one, telling, MONDAY + HOUR, None)
    incidents.quiet(MONDAY + 3 * HOUR)
    assert [len(incidents.over("us", MONDAY + hours * HOUR)) for hours in (2, 3)] == [0, 1]


def test_the_file_of_the_first_version_is_read(tmp_path: Path) -> None:
    """What was told then is not told again; what was closed then is, once."""
    times = {"opened_at": MONDAY.isoformat(), "claimed_at": None}
    old = [
        {"subject": "us", "cause": "limit", "told": True, "closed_at": None, **times},
        {"subject": "kr", "cause": "limit", "told": True, "closed_at": MONDAY.isoformat(), **times},
        {"subject": "hk", "cause": "limit", "told": False, "closed_at": None, **times},
    ]
    (tmp_path / "incidents.json").write_text(json.dumps(old))
    incidents = Incidents(tmp_path)
    later = MONDAY + timedelta(minutes=30)
    assert incidents.met("us", causes.LIMIT, None, later, NEED)[1] is None
    assert [one.closed_at for one in incidents.over("kr", later)] == [MONDAY]
    telling = incidents.met("hk", causes.LIMIT, None, later, NEED)[1]
    assert telling
    assert telling.kind == "opened"


@pytest.mark.parametrize("content", ["", "{", "[1]", '[{"subject": "us"}]', '{"incidents": 3}', "\x00\xff"])
def test_a_damaged_file_of_incidents_is_begun_anew(tmp_path: Path, content: str) -> None:
    """Whatever stands in the file, the trouble is told rather than kept."""
    (tmp_path / "incidents.json").write_text(content, "latin-1")
    assert Incidents(tmp_path).met("us", causes.LIMIT, None, MONDAY, NEED)[1]
    assert not Incidents(tmp_path).met("us", causes.LIMIT, None, MONDAY, NEED)[1]
