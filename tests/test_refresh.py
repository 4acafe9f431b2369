"""A person's refresh: when it asks for confirmation, how it ends, and who hears of it."""

import json
import os
import re
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from builders import KEY, SECRET, make_jwt
from flow_runs import end_of, only_key, paused, refreshed
from prefect import State
from prefect.settings import PREFECT_API_URL, temporary_settings
from running import Opens, asked, cached
from servers import SlackEndpoint

from flows import artifacts, refresh_token
from flows.refresh_token import Request
from flows.runs import View
from tokencore import IssuanceLimitError, Key, Settings, attempts
from tokencore.sandbox import APP_KEY, APP_SECRET, Sandbox

RENEW, LEAVE = "renew now", "leave the token as it is"
BROUGHT_NONE, ASKED = "us+kr: a manual refresh brought no new token", "Kim asked for it"
LASTING = 17 * 3600.0  # seconds left of a token that KIS would replace


def renewed(*, force: bool = False) -> State:
    """Return the end of a refresh outside a Prefect run, where nobody can be asked."""
    return refresh_token.renew(only_key(), Request("us", force, "a test", "Kim"), datetime.now(UTC))[0]


@pytest.fixture
def attentive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a run that waits for a person look for the answer often, and not for long."""
    monkeypatch.setattr("flows.refresh_token.POLL", 0.2)
    monkeypatch.setattr("flows.refresh_token.CONFIRM_WITHIN", timedelta(seconds=20))  # a test that fails is not to hang


def test_a_first_token_needs_no_confirmation_although_prefect_is_away(gateway: Sandbox, slack: SlackEndpoint) -> None:
    """Where no token can be lost nobody is asked; the record keeps who asked and why, and Slack is told."""
    asked_for = Request("us", force=False, reason="a first\ttoken \x1b[2J", operator="Kim \u202eMinji")
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}):
        state = refresh_token.refresh(Settings.load(), asked_for, datetime.now(UTC))
    assert end_of(state) == ("COMPLETED", "Renewed")
    attempt = only_key().state(datetime.now(UTC)).attempts[-1]
    assert (attempt.by, attempt.reason) == ("Kim Minji", "a first token")
    assert (slack.headlines, asked(gateway)) == (["us+kr: refreshed manually"], 1)


def test_a_forced_refresh_says_what_became_of_it(nowhere: Sandbox, slack: SlackEndpoint) -> None:
    """While KIS is down the refresh is Failed, with why and what serves, and Slack names who asked; then Renewed."""
    cached(left=LASTING)
    nowhere.fail("down")
    failed = renewed(force=True)
    assert end_of(failed) == ("FAILED", "Failed")
    assert "The present token serves until" in str(failed.message)
    assert BROUGHT_NONE in slack.headlines
    assert ASKED in json.dumps(slack.messages[-1])
    nowhere.clear()
    time.sleep(0.6)  # the gateway's minute
    assert end_of(renewed(force=True)) == ("COMPLETED", "Renewed")
    assert slack.headlines[-1] == "us+kr: refreshed manually, with force"


def test_an_unneeded_refresh_that_kis_limits_is_a_note_and_no_incident(nowhere: Sandbox, slack: SlackEndpoint) -> None:
    """If the plan renews in time, the refresh is Declined with a note, and so is one that KIS's minute stops."""
    cached(left=LASTING)
    os.environ["KIS_ISSUE_INTERVAL"] = "60"
    nowhere.fail("limit", 1)
    first, again = renewed(force=True), renewed(force=True)
    assert end_of(first) == end_of(again) == ("COMPLETED", "Declined")
    assert "EGW00133" in str(first.message)
    assert re.match(r"KIS gave no new token at .* KST: KIS allows .* a minute \(EGW00133\)\. ", str(again.message))
    assert (slack.headlines, ASKED in json.dumps(slack.messages), asked(nowhere)) == ([BROUGHT_NONE], True, 1)
    view = View(only_key(), only_key().state(datetime.now(UTC)), IssuanceLimitError(str(first.message), retry_at=None))
    assert artifacts.to_do(view) == ""


def test_a_refresh_that_kis_limits_is_an_incident_where_no_token_serves(
    gateway: Sandbox, slack: SlackEndpoint, opens: Opens
) -> None:
    """Without a token to go on with, the refresh is Failed, and the alert, its only message, names the person."""
    exchange = opens(timedelta(minutes=40))
    gateway.fail("limit", 1)
    assert end_of(renewed()) == ("FAILED", "Failed")
    assert slack.headlines == ["us+kr: Someone else issues with this key (minute limit, not 24-hour limit)"]
    assert slack.messages[0]["text"].startswith(f"no token · {exchange} opens in 40 min · ")
    assert ASKED in slack.messages[0]["text"]


@pytest.mark.parametrize("field", ["reason", "operator"])
@pytest.mark.parametrize("text", [KEY, make_jwt(), make_jwt()[:36], SECRET], ids=["key", "token", "its part", "secret"])
def test_a_secret_in_the_form_is_declined(gateway: Sandbox, slack: SlackEndpoint, field: str, text: str) -> None:
    """Even with the form's own check switched off, a secret gets a sentence that does not repeat it, and no request."""
    given: dict[str, Any] = {"reason": "", "operator": "", field: f"see {text}"}
    state = refresh_token.refresh(Settings.load(), Request("us", force=True, **given), datetime.now(UTC))
    assert end_of(state) == ("COMPLETED", "Declined")
    assert "contains a word of 36 characters or more" in str(state.message)
    assert text not in str(state.message)
    assert (slack.messages, asked(gateway)) == ([], 0)


def test_the_form_checks_its_texts_as_tokencore_does() -> None:
    """The form has the same rule and the same lengths, and all its fields but the market are optional."""
    form = refresh_token.refresh_token.parameters
    rules = [(form.properties[name]["maxLength"], form.properties[name]["pattern"]) for name in ("reason", "operator")]
    assert form.required == ["market"]
    assert rules == [(length, Key.SHORT_WORDS) for length in (attempts.REASON_LENGTH, attempts.BY_LENGTH)]


def test_the_form_lists_the_configured_markets() -> None:
    """The form lists the markets with credentials; without any, all of the settings; if they are malformed, two."""
    for settings, listed in (
        ({"KIS_MARKETS__HK__EXCHANGES": "SEHK"}, ("us", "kr", "hk")),
        ({"KIS_MARKETS__HK__APP_KEY": APP_KEY, "KIS_MARKETS__HK__APP_SECRET": APP_SECRET}, ("hk",)),
        ({"KIS_TIMEOUT": "soon"}, ("us", "kr")),
    ):
        os.environ |= settings
        assert refresh_token.configured() == listed


@pytest.mark.usefixtures("prefect_home", "attentive")
class TestQuestions:
    """Runs on a Prefect server that wait for a person's answer."""

    def test_the_same_token_again_is_asked_for_only_where_a_person_confirms(self, gateway: Sandbox) -> None:
        """Within six hours, or an hour with force, the run asks; no means Declined, yes means that KIS is asked."""
        cached(left=23 * 3600)
        for force, decision, end in (False, LEAVE, "Declined"), (False, RENEW, "Renewed"), (True, LEAVE, "Declined"):
            with paused(force=force) as waiting:
                assert "KIS returns the present token until" in waiting.question
                assert end_of(waiting.answer(decision)) == ("COMPLETED", end)
        assert asked(gateway) == 1

    def test_a_second_token_inside_a_session_is_confirmed_with_both_consequences(
        self, gateway: Sandbox, slack: SlackEndpoint, opens: Opens
    ) -> None:
        """The question names what serves, the second issuance and the running session, and Slack hears the result."""
        exchange = opens(timedelta(minutes=-5))
        cached(left=LASTING)
        with paused(reason="점검 뒤") as waiting:
            for said in ("us+kr: the token serves", "It would be token number 2", f"{exchange}: tokens are in use"):
                assert f"- {said}" in waiting.question
            assert end_of(waiting.answer(RENEW)) == ("COMPLETED", "Renewed")
        assert only_key().state(datetime.now(UTC)).attempts[-1].reason == "점검 뒤"
        assert (slack.headlines, asked(gateway)) == (["us+kr: refreshed manually"], 1)

    def test_without_an_answer_a_refresh_is_declined(self, gateway: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
        """A run whose question nobody answers in time ends as Declined and sends KIS no request."""
        monkeypatch.setattr("flows.refresh_token.CONFIRM_WITHIN", timedelta(seconds=0.5))
        cached(left=23 * 3600)
        state = refreshed()
        assert end_of(state) == ("COMPLETED", "Declined")
        assert re.match(r"Nobody confirmed within .* the token serves until ", str(state.message))
        assert asked(gateway) == 0

    def test_what_changed_while_a_refresh_waited_is_seen(self, gateway: Sandbox, opens: Opens) -> None:
        """If a session has begun, the refresh is Declined and names it; if a token has come, it is AlreadyValid."""
        exchange = opens(timedelta(minutes=30, seconds=5))  # a token is needed from half an hour before the open
        cached(left=LASTING)
        with paused() as waiting:
            assert exchange not in waiting.question
            time.sleep(5)
            state = waiting.answer(RENEW)
        assert end_of(state) == ("COMPLETED", "Declined")
        assert f"While it waited, this came up: {exchange}: tokens are in use" in str(state.message)
        with paused() as waiting:
            cached()
            assert end_of(waiting.answer(RENEW)) == ("COMPLETED", "AlreadyValid")
        assert asked(gateway) == 0
