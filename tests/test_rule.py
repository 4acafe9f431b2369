"""The renewal rule on real token directories: what lies ahead, one decision at a time, how pressing a failure is."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from datetime import time as time_of_day
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from builders import make_token
from running import asked, cached, outcomes, raised, snapshot

from tokencore import ConfigurationError, CredentialsError, KRTokenManager, USTokenManager, look, next_attempt, tick
from tokencore.tokens import KST

if TYPE_CHECKING:
    from tokencore import Decision
    from tokencore.sandbox import Sandbox


def kst(text: str) -> datetime:
    """A moment of a week without holidays in November 2025, long before any token of the gateway: `Tue 16:35`."""
    day, _, clock = text.partition(" ")
    date = 24 + ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun").index(day)
    return datetime.fromisoformat(f"2025-11-{date}T{clock}").replace(tzinfo=KST).astimezone(UTC)


def issued(at: str) -> None:
    """The files of us and kr hold a token that was issued then, for a day."""
    moment = kst(at)
    USTokenManager().save_token(make_token(now=moment))


def ticked(at: str) -> Decision:
    """What a tick does then."""
    return tick(KRTokenManager(), kst(at))


@pytest.fixture
def korea(quick: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """Only KRX is traded with the key: needs from 08:30 to 16:30 KST."""
    monkeypatch.setenv("KIS_MARKETS__US__EXCHANGES", "[]")
    return quick


@pytest.mark.usefixtures("gateway")
def test_outlook_knows_needs_anchor_and_the_next_renewal_of_all_markets_of_the_key() -> None:
    """KRX and the US exchanges together: the anchor is 16:35 KST, and a token of one anchor serves to the next."""
    issued("Mon 16:35")
    ahead = look(USTokenManager(), kst("Mon 17:15"))
    assert ahead.anchor == time_of_day(16, 35)
    assert [need[0] for need in ahead.needs[:3]] == [kst("Mon 23:00"), kst("Tue 08:30"), kst("Tue 23:00")]
    assert ahead.unserved is not None
    assert ahead.unserved[0] == kst("Tue 23:00")
    assert ahead.next is not None
    assert timedelta() <= ahead.next.at - kst("Tue 16:35") < timedelta(minutes=1)
    assert ahead.next.exception is None
    assert look(KRTokenManager(), kst("Mon 17:15")).next == ahead.next


def test_looking_changes_nothing(gateway: Sandbox) -> None:
    """Neither a file nor KIS is touched, with a token or without one."""
    look(USTokenManager(), kst("Mon 17:15"))
    assert not list(Path.home().iterdir())
    issued("Mon 16:35")
    before = snapshot(Path.home())
    look(USTokenManager(), kst("Tue 20:00"))
    assert snapshot(Path.home()) == before
    assert asked(gateway) == 0


@pytest.mark.parametrize("at", ["Mon 16:36", "Mon 23:30", "Tue 09:00", "Tue 16:34"])
def test_nothing_is_due_before_the_next_anchor(gateway: Sandbox, at: str) -> None:
    """From its issue at an anchor to the next one a token is left alone."""
    issued("Mon 16:35")
    decision = ticked(at)
    assert (decision.renewed, decision.trouble, decision.level) == (False, None, "")
    assert asked(gateway) == 0


def test_renewal_at_the_anchor_is_one_request_with_the_rules_reason(gateway: Sandbox) -> None:
    """A day later a renewal is due: one request, its reason in the record, and nothing due afterwards."""
    issued("Mon 16:35")
    decision = ticked("Tue 16:36")
    assert (decision.renewed, decision.trouble, decision.level) == (True, None, "")
    assert decision.outlook.token is not None
    assert decision.outlook.token.access_token == USTokenManager().get_valid_token()
    (attempt,) = KRTokenManager().history()
    assert attempt.reason.startswith("rule: ")
    assert asked(gateway) == 1


@pytest.mark.parametrize(("at", "renewed"), [("Sat 16:36", False), ("Sun 12:00", False), ("Sun 16:36", True)])
def test_weekend_has_no_issue_until_the_anchor_before_monday(gateway: Sandbox, at: str, renewed: bool) -> None:  # noqa: FBT001 - a column of the table
    """On Saturday the token may expire: no need starts before Sunday's anchor and an hour."""
    issued("Fri 16:35")
    assert ticked(at).renewed is renewed
    assert asked(gateway) == renewed


def test_without_a_token_the_coming_need_is_served_at_once(gateway: Sandbox) -> None:
    """Nothing cached inside a need: due now, and the record says that this is an exception."""
    assert ticked("Tue 09:00").renewed
    assert "inside the need" in KRTokenManager().history()[0].reason
    assert asked(gateway) == 1


def test_rejected_token_is_renewed_no_sooner_than_six_hours_after_its_issue(gateway: Sandbox) -> None:
    """KIS would hand the dead token back, so the rule waits for a new one, although a need is uncovered."""
    USTokenManager().save_token(make_token(now=kst("Mon 16:35"), rejected=True))
    assert not ticked("Mon 22:30").renewed
    assert asked(gateway) == 0
    ahead = look(USTokenManager(), kst("Mon 22:30"))
    assert ahead.next is not None
    assert abs(ahead.next.at - kst("Mon 22:35")) < timedelta(seconds=5)
    assert ticked("Mon 22:36").renewed


def test_token_that_ends_seconds_before_a_needs_pad_is_left_alone(korea: Sandbox) -> None:
    """Our clock and KIS's differ by a little: half a minute at the end of a pad is no reason to issue twice a day."""
    issued("Mon 16:34:40")
    ahead = look(KRTokenManager(), kst("Tue 08:00"))
    assert ahead.unserved is not None
    assert ahead.unserved[0] == kst("Wed 08:30")
    issued("Mon 16:34:20")
    ahead = look(KRTokenManager(), kst("Tue 08:00"))
    assert ahead.unserved is not None
    assert ahead.unserved[0] == kst("Tue 08:30")
    assert asked(korea) == 0


@pytest.mark.parametrize(
    ("at", "level"),
    [("Tue 16:40", ""), ("Wed 00:00", ""), ("Wed 01:00", "warn"), ("Wed 07:59", "warn"), ("Wed 08:01", "alert")],
)
def test_failure_is_the_more_pressing_the_nearer_the_need(korea: Sandbox, at: str, level: str) -> None:
    """Nothing to say at first, a warning when half of the lead is gone, an alert 30 minutes before the need."""
    issued("Mon 16:35")
    korea.fail("down")
    decision = ticked(at)
    assert decision.trouble is not None
    assert (decision.renewed, decision.level) == (False, level)
    assert decision.outlook.next is not None
    assert decision.outlook.next.at == kst(at)


def test_failures_keep_their_pauses_however_often_the_rule_is_followed(quick: Sandbox) -> None:
    """Many ticks in a row ask no more often than the pauses allow; after the pause a success ends the trouble."""
    issued("Mon 16:35")
    quick.fail("down")
    began = time.monotonic()
    while time.monotonic() - began < 0.5:
        assert ticked("Tue 16:40").trouble is not None
    times = [request["at"] for request in quick.stats()["requests"]]
    assert 2 <= len(times) <= 5
    assert min(later - earlier for earlier, later in pairwise(times)) >= 0.1
    quick.clear()
    time.sleep(0.6)
    assert ticked("Tue 16:41").renewed


def test_refused_credentials_are_not_tried_again_without_a_token(quick: Sandbox) -> None:
    """A key that KIS refused is a person's affair: later ticks ask nothing, with a token or without."""
    quick.fail("bad-key")
    assert isinstance(ticked("Tue 09:00").trouble, CredentialsError)
    time.sleep(0.6)
    decision = ticked("Tue 09:01")
    assert isinstance(decision.trouble, CredentialsError)
    assert decision.level == "alert"
    assert asked(quick) == 1
    assert outcomes() == ["bad_key"]


def test_without_exchanges_the_token_is_renewed_in_the_proactive_window(nowhere: Sandbox) -> None:
    """The plain rule: half an hour before the expiry, and no sooner."""
    issued("Mon 16:35")
    ahead = look(USTokenManager(), kst("Mon 17:00"))
    assert (ahead.needs, ahead.anchor, ahead.unserved) == ([], None, None)
    assert ahead.next is not None
    assert ahead.next.at == kst("Tue 16:05")
    assert not ticked("Tue 16:04").renewed
    assert ticked("Tue 16:06").renewed
    assert asked(nowhere) == 1


@pytest.mark.parametrize(("at", "level"), [("Tue 16:10", "warn"), ("Tue 16:31", "alert")])
def test_without_exchanges_a_failure_warns_while_the_token_serves_and_then_alerts(
    nowhere: Sandbox, at: str, level: str
) -> None:
    """No need tells how pressing it is: the token itself does."""
    issued("Mon 16:35")
    nowhere.fail("down")
    assert ticked(at).level == level


@pytest.mark.usefixtures("nowhere")
def test_without_exchanges_and_token_a_failure_alerts() -> None:
    """There is nothing to serve."""
    manager = USTokenManager()
    ahead = look(manager, kst("Mon 17:00"))
    assert ahead.next is not None
    assert ahead.next.at == kst("Mon 17:00")


def test_next_attempt_is_the_planned_renewal_or_the_end_of_the_pause(
    nowhere: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Early it is the plan's; while a renewal that is due keeps failing, when the rule will ask again."""
    monkeypatch.setenv("KIS_ISSUE_INTERVAL", "1.2")
    cached(20_000)
    manager, now = USTokenManager(), datetime.now(UTC)
    planned = look(manager, now).next
    assert planned is not None
    assert next_attempt(manager, now) == planned.at > now
    cached(1_500)
    nowhere.fail("down")
    assert tick(manager, datetime.now(UTC)).trouble is not None
    again = next_attempt(manager, datetime.now(UTC))
    assert again is not None
    assert again - manager.history()[-1].at == timedelta(seconds=1.3)
    time.sleep(1.3)
    nowhere.clear()
    assert tick(manager, datetime.now(UTC)).renewed


def test_next_attempt_after_refused_credentials_is_a_persons(nowhere: Sandbox) -> None:
    """KIS does not know the key: the rule has nothing to do any more."""
    cached(1_500)
    nowhere.fail("bad-key")
    manager = USTokenManager()
    assert isinstance(tick(manager, datetime.now(UTC)).trouble, CredentialsError)
    assert next_attempt(manager, datetime.now(UTC)) is None


@pytest.mark.usefixtures("gateway")
def test_unknown_exchange_is_a_setting_to_correct(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exchange that KIS does not trade is named."""
    monkeypatch.setenv("KIS_MARKETS__US__EXCHANGES", "MARS")
    error = raised(lambda: ticked("Mon 17:00"))
    assert isinstance(error, ConfigurationError)
    assert "MARS" in str(error)


def test_lost_token_is_fetched_again_while_kis_hands_it_back_and_planned_by_its_issue_later(gateway: Sandbox) -> None:
    """The record remembers the issue of a token whose file is gone: first it is fetched, later the day is kept."""
    USTokenManager().get_valid_token()
    USTokenManager().delete_token()
    KRTokenManager().delete_token()
    issued_at = USTokenManager().history()[-1].at
    soon = look(USTokenManager(), issued_at + timedelta(hours=1)).next
    assert soon
    assert (soon.at, soon.exception) == (issued_at + timedelta(hours=1), None)
    later = look(USTokenManager(), issued_at + timedelta(hours=7)).next
    assert later
    assert later.at >= issued_at + timedelta(hours=24) or later.exception
    assert gateway.stats()["token_requests"] == 1
