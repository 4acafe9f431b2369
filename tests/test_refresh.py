"""A person's refresh: what is asked first, what becomes of it, and who hears of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from builders import KEY, SECRET, make_jwt
from flow_runs import paused, refreshed, told
from running import asked, cached

from flows import artifacts, refresh_token
from flows.refresh_token import Request
from tokencore import Key, Settings, attempts
from tokencore.sandbox import APP_KEY, APP_SECRET

if TYPE_CHECKING:
    from collections.abc import Callable

    from prefect import State
    from slack_endpoint import SlackEndpoint

    from tokencore.sandbox import Sandbox

    Opens = Callable[[timedelta], str]

RENEW = "renew now"


def only_key() -> Key:
    """The key of all markets."""
    (key,) = Key.load(Settings.load())
    return key


def renewed(*, force: bool = False, reason: str = "a test", operator: str = "Kim") -> State:
    """The end of a refresh without a Prefect run: nobody can be asked there."""
    return refresh_token.renew(only_key(), Request("us", force, reason, operator), datetime.now(UTC))


@pytest.fixture
def attentive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that waits for a person looks for the answer often, and not for long."""
    monkeypatch.setattr("flows.refresh_token.POLL", 0.2)
    monkeypatch.setattr("flows.refresh_token.CONFIRM_WITHIN", timedelta(seconds=20))  # a test that fails is not to hang


def test_a_first_token_needs_no_confirmation_and_is_told_with_who_and_why(
    gateway: Sandbox, slack: SlackEndpoint
) -> None:
    """Where no valid token can be lost nobody is asked; the record and Slack know by whom and why."""
    assert told(renewed(reason="a first\ttoken \x1b[2J", operator="Kim \u202eMinji")) == ("COMPLETED", "Renewed")
    attempt = only_key().state(datetime.now(UTC)).attempts[-1]
    assert (attempt.by, attempt.reason) == ("Kim Minji", "a first token")
    assert slack.headlines == ["us+kr: refreshed manually"]
    assert asked(gateway) == 1


def test_without_a_token_nobody_is_asked_shortly_before_an_open(gateway: Sandbox, opens: Opens) -> None:
    """Also where the last one was issued today and died: the danger is to have none."""
    opens(timedelta(minutes=43))
    token = cached(left=17 * 3600)
    only_key().reject(token, datetime.now(UTC))
    assert told(renewed()) == ("COMPLETED", "Renewed")
    assert asked(gateway) == 1


def test_a_forced_refresh_says_what_became_of_it(gateway: Sandbox, slack: SlackEndpoint) -> None:
    """AlreadyValid where KIS returns the token; Failed with the reason, and told with who asked."""
    cached(left=17 * 3600)
    assert told(renewed(force=True)) == ("COMPLETED", "Renewed")
    gateway.clear()
    time.sleep(0.6)  # the gateway's minute
    gateway.fail("down", 1)
    state, asked_for = only_key().state(datetime.now(UTC)), Request("us", force=True, reason="", operator="Kim")
    failed = refresh_token.unrenewed(Settings.load(), state, _error(state.key), asked_for)
    assert told(failed) == ("FAILED", "Failed")
    assert "The present token serves until" in str(failed.message)
    assert slack.headlines == [
        "us+kr: refreshed manually, with force",
        "us+kr: a manual refresh brought no new token",
    ]
    assert "Kim asked for it" in json.dumps(slack.told[-1])


def _error(key: Key) -> Exception:
    try:
        key.refresh(force=True, reason="a test", by="")
    except Exception as error:  # noqa: BLE001 - it is what the flow is given
        return error
    raise AssertionError("it was renewed")


def test_an_unneeded_refresh_that_kis_limits_is_a_note_and_no_incident(gateway: Sandbox, slack: SlackEndpoint) -> None:
    """The token lasts and the plan renews in time: Declined, one note that names the person, nothing at risk."""
    cached(left=17 * 3600)
    gateway.fail("limit", 1)
    state = renewed(force=True)
    assert told(state) == ("COMPLETED", "Declined")
    assert "EGW00133" in str(state.message)
    assert slack.headlines == ["us+kr: a manual refresh brought no new token"]
    assert "Kim asked for it" in json.dumps(slack.told)


def test_a_refresh_that_kis_limits_is_an_incident_where_no_token_serves(
    gateway: Sandbox, slack: SlackEndpoint, opens: Opens
) -> None:
    """There is nothing to go on with: Failed, and an alert with the session at risk."""
    exchange = opens(timedelta(minutes=40))
    gateway.fail("limit", 1)
    assert told(renewed()) == ("FAILED", "Failed")
    assert slack.headlines[0] == "us+kr: Someone else issues with this key (minute limit, not 24-hour limit)"
    assert slack.told[0]["text"].startswith(f"no token · {exchange} opens in 40 min · ")


def test_our_own_minute_declines_without_a_word_to_slack(
    gateway: Sandbox, slack: SlackEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even force passes KIS's minute; nothing was asked, so nobody else hears of it."""
    cached(left=17 * 3600)
    monkeypatch.setenv("KIS_ISSUE_INTERVAL", "60")
    gateway.fail("limit", 1)
    renewed(force=True)
    assert told(renewed(force=True)) == ("COMPLETED", "Declined")
    assert asked(gateway) == 1
    assert len(slack.told) == 1


# Prefect keeps parameters in clear, so these are not the credentials that the scan of its database looks for.
SECRET_TEXTS = {"key": KEY, "token": make_jwt(), "part of a token": make_jwt()[:36], "secret": SECRET}


@pytest.mark.parametrize("field", ["reason", "operator"])
@pytest.mark.parametrize("text", SECRET_TEXTS.values(), ids=list(SECRET_TEXTS))
def test_a_secret_in_the_form_is_declined(gateway: Sandbox, slack: SlackEndpoint, field: str, text: str) -> None:
    """Also where the form's own check was switched off: a sentence that repeats nothing, and no request."""
    given: dict[str, Any] = {"reason": "", "operator": "", field: f"see {text}"}
    state = refresh_token.refresh(Settings.load(), Request("us", force=True, **given), datetime.now(UTC))
    assert told(state) == ("COMPLETED", "Declined")
    assert "contains a word of 36 characters or more" in str(state.message)
    assert text not in str(state.message)
    assert (slack.told, asked(gateway)) == ([], 0)


def test_the_form_checks_its_texts_as_tokencore_does() -> None:
    """The same rule, and lengths that lose nothing; all but the market is optional."""
    fields = refresh_token.refresh_token.parameters.properties
    assert refresh_token.refresh_token.parameters.required == ["market"]
    assert refresh_token.SHORT_WORDS == attempts.SHORT_WORDS
    assert fields["reason"]["maxLength"] == attempts.REASON_LENGTH
    assert fields["operator"]["maxLength"] == attempts.BY_LENGTH


def test_the_form_lists_the_configured_markets() -> None:
    """Those with credentials where there are any, else those that the settings name, else `us` and `kr`."""
    program = "from flows.refresh_token import refresh_token as r; print(*r.parameters.properties['market']['enum'])"

    def listed(**more: str) -> str:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("KIS_")} | more
        command = [sys.executable, "-c", program]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    hong_kong = {"KIS_MARKETS__HK__EXCHANGES": "SEHK"}
    credentials = {"KIS_MARKETS__HK__APP_KEY": APP_KEY, "KIS_MARKETS__HK__APP_SECRET": APP_SECRET}
    assert listed(**hong_kong, **credentials) == "hk"
    assert listed(**hong_kong) == "us kr hk"
    assert listed(KIS_TIMEOUT="soon") == "us kr"


@pytest.mark.usefixtures("prefect_home", "attentive")
class TestQuestions:
    """Runs on a Prefect server that wait for a person."""

    def test_the_same_token_again_is_asked_for_only_where_a_person_confirms(self, gateway: Sandbox) -> None:
        """Within six hours the run waits with the sentence; no means Declined, yes means KIS is asked."""
        cached(left=23 * 3600)
        for decision, end in (("leave the token as it is", "Declined"), (RENEW, "Renewed")):
            with paused() as waiting:
                assert "KIS returns the present token until" in waiting.question
                assert asked(gateway) == 0
                assert told(waiting.answer(decision)) == ("COMPLETED", end)
        assert asked(gateway) == 1

    def test_a_second_token_inside_a_session_is_confirmed_with_both_consequences(
        self, gateway: Sandbox, slack: SlackEndpoint, opens: Opens
    ) -> None:
        """The person reads what serves, of the second issuance and of the session, and Slack of the result."""
        exchange = opens(timedelta(minutes=-5))
        cached(left=17 * 3600)
        with paused(reason="점검 뒤") as waiting:
            question = waiting.question
            assert question.startswith("**Renew the token of us+kr anyway?**\n\n- us+kr: the token serves until ")
            assert "- It would be token number 2 of this key" in question
            assert f"- {exchange}: tokens are in use until " in question
            assert told(waiting.answer(RENEW)) == ("COMPLETED", "Renewed")
        assert only_key().state(datetime.now(UTC)).attempts[-1].reason == "점검 뒤"
        assert slack.headlines == ["us+kr: refreshed manually"]
        assert asked(gateway) == 1

    def test_a_second_forced_refresh_within_an_hour_is_confirmed_too(self, gateway: Sandbox) -> None:
        """A scheduler that misfires six times costs one request; the question names the harm."""
        assert told(refreshed(force=True)) == ("COMPLETED", "Renewed")
        time.sleep(0.6)  # the gateway's minute
        with paused(force=True) as waiting:
            assert "KIS returns the present token until" in waiting.question
            assert told(waiting.answer("leave the token as it is")) == ("COMPLETED", "Declined")
        assert asked(gateway) == 1

    def test_without_an_answer_a_refresh_is_declined(self, gateway: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
        """A question that nobody answers in time ends as Declined, and nothing was asked of KIS."""
        monkeypatch.setattr("flows.refresh_token.CONFIRM_WITHIN", timedelta(seconds=0.5))
        cached(left=23 * 3600)
        state = refreshed()
        assert told(state) == ("COMPLETED", "Declined")
        assert str(state.message).startswith("Nobody confirmed within ")
        assert "the token serves until" in str(state.message)
        assert asked(gateway) == 0

    def test_what_changed_while_a_refresh_waited_is_seen(self, gateway: Sandbox, opens: Opens) -> None:
        """A session that began makes it Declined, with its name; a token that came meanwhile AlreadyValid."""
        exchange = opens(timedelta(minutes=30, seconds=5))  # a token is needed from half an hour before on
        cached(left=17 * 3600)
        with paused() as waiting:
            assert exchange not in waiting.question
            time.sleep(5)
            state = waiting.answer(RENEW)
        assert told(state) == ("COMPLETED", "Declined")
        assert f"While it waited, this came up: {exchange}: tokens are in use" in str(state.message)
        with paused() as waiting:
            cached()
            assert told(waiting.answer(RENEW)) == ("COMPLETED", "AlreadyValid")
        assert asked(gateway) == 0

    @pytest.mark.usefixtures("gateway")
    def test_a_table_that_cannot_be_published_fails_no_refresh(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The token is there, and the run says so."""

        def broken(**_: object) -> None:
            raise OSError("the server is away")

        monkeypatch.setattr(artifacts, "create_table_artifact", broken)
        assert told(refreshed()) == ("COMPLETED", "Renewed")
