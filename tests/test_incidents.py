"""Incidents: what people are told of them and when, and what the document keeps."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.alerts import causes
from flows.alerts.incidents import (
    ACT,
    FORGOTTEN,
    HALF,
    LAST_CALL,
    NEAR,
    PUNCTUALITY,
    REMINDERS,
    Busy,
    Incident,
    Telling,
    changing,
    met,
    new,
    next_telling,
    over,
    parse,
)
from tokencore import open_document

if TYPE_CHECKING:
    from pathlib import Path

    from flows.alerts.causes import Cause

MONDAY = datetime(2026, 11, 23, 7, 35, tzinfo=UTC)  # 16:35 in Seoul, the anchor
NEED = MONDAY + timedelta(hours=6)
HOUR = timedelta(hours=1)


def story(cause: Cause, need: datetime | None, looks: list[datetime]) -> list[tuple[datetime, Telling]]:
    """What people are told of an incident by runs that look at these times, each knowing of the next."""
    known: list[Incident] = []
    told = []
    for now, later in zip(looks, [*looks[1:], looks[-1] + HOUR], strict=True):
        one, telling = met(known, "us", cause, need, now, later)
        if telling:
            told.append((now, telling))
            one.heard(telling, now, None)
            assert next_telling(one, cause, now, later) is None
    return told


def hourly(hours: int) -> list[datetime]:
    """The hourly looks from the anchor on."""
    return [MONDAY + n * HOUR for n in range(hours)]


def kinds(told: list[tuple[datetime, Telling]]) -> list[tuple[int, str]]:
    """The hour and the kind of each telling."""
    return [((at - MONDAY) // HOUR, telling.kind) for at, telling in told]


def opened(known: list[Incident], cause: Cause, *, subject: str = "us", now: datetime = MONDAY) -> Incident:
    """An incident that people were told of at `now`."""
    one, telling = met(known, subject, cause, None, now, NEED)
    assert telling
    assert telling.kind == "opened"
    one.heard(telling, now, None)
    return one


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
    """Where no need is known, people are reminded after 1, 3, 6, 12 and 24 hours, and then daily."""
    told = story(causes.SETTINGS, None, hourly(24 * 4))
    assert [at for at, _ in kinds(told)] == [0, 1, 4, 10, 22, 46, 70, 94]


def test_kis_being_down_is_told_once_it_is_urgent() -> None:
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
    one.heard(Telling("opened", LAST_CALL, page=True), MONDAY, None)
    known, later = [one], MONDAY + timedelta(minutes=200)
    met(known, "us", causes.LIMIT, NEED, MONDAY, NEED)
    assert met(known, "us", causes.LIMIT, NEED, later, later + timedelta(minutes=5))[1] == Telling(
        "escalated", HALF, page=True
    )


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


def test_one_outage_is_one_incident_whatever_kis_answers() -> None:
    """Another cause is news only where it now takes a person; the length counts from the first."""
    known: list[Incident] = []
    opened(known, causes.LIMIT)
    for cause in (causes.DOWN, causes.WAITING, causes.RESTRICTED):
        assert met(known, "us", cause, None, MONDAY + HOUR / 2, NEED)[1] is None
    _, telling = met(known, "us", causes.CREDENTIALS, None, MONDAY + HOUR / 2, NEED)
    assert telling
    assert telling.kind == "opened"
    assert [(one.cause, one.opened_at) for one in known] == [("credentials", MONDAY)]


def test_trouble_that_returns_before_its_end_was_told_never_ended() -> None:
    """Then there is nothing new to tell, and the length counts from the first time."""
    known: list[Incident] = []
    opened(known, causes.LIMIT)
    assert over(known, "us", MONDAY + HOUR / 4, foreign=False, lasting=False)
    assert met(known, "us", causes.LIMIT, None, MONDAY + HOUR / 3, NEED)[1] is None
    (ended,) = over(known, "us", MONDAY + HOUR, foreign=False, lasting=False)
    assert (ended.opened_at, ended.closed_at) == (MONDAY, MONDAY + HOUR)


def test_what_nobody_was_told_of_ends_without_a_word() -> None:
    """An outage that was never urgent leaves no message and no entry."""
    known: list[Incident] = []
    assert met(known, "us", causes.DOWN, NEED, MONDAY, MONDAY + HOUR)[1] is None
    assert over(known, "us", MONDAY + HOUR, foreign=False, lasting=False) == []
    assert known == []


def test_a_recovery_is_told_until_slack_has_it() -> None:
    """It stays closed, with the time of its end, until whoever told it forgets it; other subjects are left alone."""
    known: list[Incident] = []
    opened(known, causes.LIMIT)
    opened(known, causes.LIMIT, subject="hk")
    for hours in (1, 2):
        (ended,) = over(known, "us", MONDAY + hours * HOUR, foreign=False, lasting=False)
        assert ended.closed_at == MONDAY + HOUR
    assert [one.subject for one in known] == ["us", "hk"]


@pytest.mark.parametrize(
    ("cause", "foreign", "lasting", "ended", "left"),
    [
        (causes.CREDENTIALS, False, True, 0, 1),  # KIS still refuses them
        (causes.FOREIGN_TOKEN, True, False, 0, 1),  # the token is still there
        (causes.FOREIGN_TOKEN, False, True, 1, 1),
        (causes.FOREIGN_LIMIT, True, False, 0, 0),  # the token that comes with it is what remains of it
        (causes.LIMIT, True, False, 1, 1),
    ],
)
def test_what_is_not_over_is_not_called_solved(
    cause: Cause, *, foreign: bool, lasting: bool, ended: int, left: int
) -> None:
    """Refused credentials and someone else's token outlive a check that finds the token in order."""
    known: list[Incident] = []
    opened(known, cause)
    assert len(over(known, "us", MONDAY + HOUR, foreign=foreign, lasting=lasting)) == ended
    assert len(known) == left


def test_what_nobody_met_for_a_week_is_new_when_it_returns() -> None:
    """A paused deployment leaves its incident behind; a later one of the kind is not its continuation."""
    known: list[Incident] = []
    opened(known, causes.SETTINGS, subject="TKSE")
    assert opened(known, causes.SETTINGS, subject="TKSE", now=MONDAY + FORGOTTEN).opened_at == MONDAY + FORGOTTEN


def test_the_document_of_version_0_1_is_read_and_kept(tmp_path: Path) -> None:
    """What was told then is not told again; what this version does not know stays for the other one."""
    told = {"subject": "us", "cause": "limit", "opened_at": MONDAY.isoformat(), "told_at": MONDAY.isoformat()}
    old = {"slack_from": MONDAY.isoformat(), "incidents": [told | {"claimed_at": MONDAY.isoformat()}]}
    (tmp_path / "incidents.json").write_text(json.dumps(old))
    with changing(open_document(str(tmp_path), "incidents"), wait=1) as known:
        assert met(known, "us", causes.LIMIT, None, MONDAY + HOUR / 2, NEED)[1] is None
    kept = json.loads((tmp_path / "incidents.json").read_text())
    assert kept["slack_from"] == MONDAY.isoformat()
    assert [one["subject"] for one in kept["incidents"]] == ["us"]


@pytest.mark.parametrize("content", [{}, {"incidents": 3}, {"incidents": [3, {"subject": "us"}]}])
def test_a_damaged_document_is_begun_anew(content: dict[str, Any]) -> None:
    """Whatever is in it, the trouble is told rather than kept."""
    known = parse(content)
    assert met(known, "us", causes.LIMIT, None, MONDAY, NEED)[1]


def test_what_slack_accepted_is_noted_although_the_run_fails_then(tmp_path: Path) -> None:
    """The changes are written whatever ends the block, so that what was told is not told again."""
    document = open_document(str(tmp_path), "incidents")

    def fail_after_telling() -> None:
        with changing(document, wait=1) as known:
            opened(known, causes.LIMIT)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_after_telling()
    assert [one.told_at for one in parse(document.read())] == [MONDAY]


def test_who_finds_others_telling_gives_up(tmp_path: Path) -> None:
    """The lock is waited for no longer than asked; nothing is changed then."""
    document = open_document(str(tmp_path), "incidents")
    with changing(document, wait=1), pytest.raises(Busy), changing(document, wait=0.05):
        pass
