"""The flows on a real Prefect server, with the sandbox for KIS and a Slack on loopback.

How runs end, what people are told of them, and what is kept of them.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import os
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from zoneinfo import ZoneInfo

import pytest
from builders import KEY, SECRET, forms, make_jwt
from flow_runs import paused, planned_runs, refreshed, requests_to, run, told
from prefect import State, flow
from prefect.artifacts import Artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.sorting import FlowRunSort
from prefect.flow_engine import run_flow
from prefect.logging import get_run_logger
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_HOME,
    PREFECT_SERVER_DATABASE_CONNECTION_URL,
)
from prefect.states import Scheduled
from running import cached
from slack_endpoint import SlackEndpoint

from flows import planned
from flows.board import PLAN, REFUSED, TOKENS
from flows.check_tokens import check_tokens
from flows.runs import KST
from flows.stack.deployments import TRIES
from flows.warm_up import warm_up
from tokencore import TokenManager, next_attempt, overrides, sessions
from tokencore.sandbox import APP_KEY, APP_SECRET

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tokencore.sandbox import Sandbox

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("prefect_home")
HOOK = "/services/T000/B000/canary-of-the-webhook"
MINUTES_40 = timedelta(minutes=40)
LEAKS = {"flow_run.parameters", "flow_run_state.message", "log.message"}  # where `leak` gets its secret


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlackEndpoint]:
    """Slack behind a webhook."""
    with SlackEndpoint() as running:
        monkeypatch.setenv("SLACK_WEBHOOK_URL", running.url + HOOK)
        yield running


@pytest.fixture
def opens(gateway: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Callable[[timedelta], str]:
    """Make an exchange open so long from now, for an hour, and be all that the markets trade; its code."""
    assert gateway.url

    def arrange(ahead: timedelta) -> str:
        now = datetime.now(UTC)
        for code in ("KRX", "NASD"):  # never both are near midnight
            zone = ZoneInfo(sessions.exchange(code).zone)
            first, last = (now + ahead).astimezone(zone), (now + ahead + timedelta(hours=1)).astimezone(zone)
            if first.date() == last.date() == (now - timedelta(hours=2)).astimezone(zone).date():  # runs are late too
                break
        monkeypatch.setenv(f"KIS_EXCHANGES__{code}__HOURS__{first:%Y-%m-%d}", f"{first:%H:%M:%S}-{last:%H:%M:%S}")
        monkeypatch.setenv("KIS_MARKETS__US__EXCHANGES", code)
        monkeypatch.setenv("KIS_MARKETS__KR__EXCHANGES", code)
        return code

    return arrange


def warmed(exchange: str, due: datetime | None = None) -> State:
    """The final state of a warm-up."""
    return run(warm_up, due, exchange=exchange)


def test_a_day_without_a_session_is_market_closed(gateway: Sandbox) -> None:
    """The scheduled day decides, in the exchange's zone, and the holiday is named; KIS is not asked."""
    state = warmed("SEHK", due=datetime(2025, 10, 29, 0, 50, tzinfo=UTC))
    assert told(state) == ("COMPLETED", "MarketClosed")
    assert state.message == "SEHK closed: Chung Yeung Festival"
    assert requests_to(gateway) == 0


def test_the_first_warm_up_renews_and_the_next_finds_it_warm(
    gateway: Sandbox, opens: Callable[[timedelta], str]
) -> None:
    """One request makes the token; a token that lasts is left alone. The run says until when."""
    exchange = opens(MINUTES_40)
    first, second = warmed(exchange), warmed(exchange)
    assert told(first) == ("COMPLETED", "Renewed")
    assert told(second) == ("COMPLETED", "Warm")
    assert second.message
    assert second.message.startswith("us+kr: the token serves until ")
    assert requests_to(gateway) == 1


def test_a_run_is_named_after_its_exchange_and_day(opens: Callable[[timedelta], str]) -> None:
    """The day is the exchange's own."""
    exchange = opens(MINUTES_40)
    state = warmed(exchange)
    day = datetime.now(ZoneInfo(sessions.exchange(exchange).zone)).date()
    with get_client(sync_client=True) as client:
        made = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)
    assert state.is_completed()
    assert made[0].name == f"warm-up {exchange} {day}"


def test_a_token_that_ends_a_moment_before_its_need_is_warm(
    gateway: Sandbox, opens: Callable[[timedelta], str]
) -> None:
    """The token of the daily anchor lasts to the second, and KIS's clock is not ours: that costs no issuance."""
    exchange = opens(MINUTES_40)
    day = datetime.now(ZoneInfo(sessions.exchange(exchange).zone)).date()
    need = sessions.need(exchange, day, overrides())
    assert need
    left = (need[1] - datetime.now(UTC)).total_seconds()
    gateway.set_rules(token_life=left + TokenManager("us").market.buffer - 15)
    TokenManager("us").get_valid_token()
    assert told(warmed(exchange)) == ("COMPLETED", "Warm")
    assert requests_to(gateway) == 1


def test_a_stale_run_is_skipped_where_the_token_is_valid(gateway: Sandbox, opens: Callable[[timedelta], str]) -> None:
    """A run from before the open that comes after it does nothing; one that a person starts then finds it warm."""
    exchange = opens(timedelta(minutes=-5))
    TokenManager("us").get_valid_token()
    assert told(warmed(exchange)) == ("COMPLETED", "Warm")
    assert told(warmed(exchange, due=datetime.now(UTC) - MINUTES_40)) == ("COMPLETED", "SkippedLate")
    assert requests_to(gateway) == 1


def test_a_stale_run_still_renews_where_there_is_no_token(gateway: Sandbox, opens: Callable[[timedelta], str]) -> None:
    """While the session is open, late is better than never."""
    exchange = opens(timedelta(minutes=-5))
    assert told(warmed(exchange, due=datetime.now(UTC) - MINUTES_40)) == ("COMPLETED", "Renewed")
    assert requests_to(gateway) == 1


def test_a_run_whose_session_is_over_is_skipped(gateway: Sandbox, opens: Callable[[timedelta], str]) -> None:
    """After the close nothing is asked of KIS, token or not."""
    exchange = opens(timedelta(minutes=-61))
    assert told(warmed(exchange, due=datetime.now(UTC) - timedelta(minutes=101))) == ("COMPLETED", "SkippedLate")
    assert told(warmed(opens(MINUTES_40), due=datetime(2025, 10, 28, 23, 20, tzinfo=UTC))) == (
        "COMPLETED",
        "SkippedLate",
    )
    assert requests_to(gateway) == 0


def test_a_refused_warm_up_fails_with_a_sentence_and_is_told_until_it_is_solved(
    gateway: Sandbox, endpoint: SlackEndpoint, opens: Callable[[timedelta], str]
) -> None:
    """A wrong key fails at once, without another try; Slack hears of it once, and once of the end."""
    exchange = opens(MINUTES_40)
    gateway.fail("bad-key")
    failed = warmed(exchange)
    assert told(failed) == ("FAILED", "Failed")
    assert failed.message
    assert failed.message.startswith("KIS does not know the app key (EGW00103). There is no token.")
    assert told(warmed(exchange)) == ("FAILED", "Failed")
    assert requests_to(gateway) == 1
    assert endpoint.headlines == ["us+kr: KIS refuses the app key or its secret"]
    gateway.clear()
    time.sleep(0.6)  # the gateway's minute
    assert told(refreshed("us", force=True)) == ("COMPLETED", "Renewed")
    assert "us+kr: solved: KIS refuses the app key or its secret" in endpoint.headlines[1:]


def test_the_issuance_limit_fails_a_warm_up_and_is_told(
    gateway: Sandbox, endpoint: SlackEndpoint, opens: Callable[[timedelta], str]
) -> None:
    """Refused twice with the minute between, it is no third time; one message, and one when a run succeeds."""
    exchange = opens(MINUTES_40)
    gateway.fail("limit")
    assert told(warmed(exchange)) == ("FAILED", "Failed")
    assert requests_to(gateway) == 2
    gateway.clear()
    time.sleep(0.6)
    assert told(warmed(exchange)) == ("COMPLETED", "Renewed")
    assert endpoint.headlines == [
        "us+kr: Someone else issues with this key: KIS's limit refused us",
        "us+kr: solved: Someone else issues with this key: KIS's limit refused us",
    ]
    assert f"{exchange}: " in endpoint.told[0]["blocks"][2]["text"]["text"]


def test_kis_being_down_is_tried_again_after_the_cool_down(
    gateway: Sandbox, endpoint: SlackEndpoint, opens: Callable[[timedelta], str]
) -> None:
    """Prefect tries again five seconds after the cool-down, and the run ends Renewed; Slack heard of both."""
    exchange = opens(MINUTES_40)
    gateway.fail("server-error", 1)
    begun = time.monotonic()
    assert told(warmed(exchange)) == ("COMPLETED", "Renewed")
    assert time.monotonic() - begun > 5.5
    assert requests_to(gateway) == 2
    assert endpoint.headlines == ["us+kr: KIS gives no token", "us+kr: solved: KIS gives no token"]
    assert "then every few minutes" in endpoint.told[0]["blocks"][2]["text"]["text"]


def test_ten_warm_ups_in_one_minute_make_one_request(gateway: Sandbox, opens: Callable[[timedelta], str]) -> None:
    """Runs of one key that start together all complete, on one issuance."""
    exchange = opens(MINUTES_40)
    gateway.set_rules(latency=0.3)
    with ThreadPoolExecutor(10) as pool:
        contexts = [contextvars.copy_context() for _ in range(10)]
        states = list(pool.map(lambda context: context.run(warmed, exchange), contexts))
    assert {state.type.value for state in states} == {"COMPLETED"}
    assert {state.name for state in states} <= {"Renewed", "Warm"}
    assert requests_to(gateway) == 1


def test_slack_being_silent_changes_no_result(
    gateway: Sandbox, endpoint: SlackEndpoint, opens: Callable[[timedelta], str]
) -> None:
    """The run ends as it would without Slack, a few seconds later at most."""
    exchange = opens(MINUTES_40)
    endpoint.answers = [0, 0, 0]
    gateway.fail("bad-secret", 1)
    begun = time.monotonic()
    assert told(warmed(exchange)) == ("FAILED", "Failed")
    assert time.monotonic() - begun < 8
    assert endpoint.requests


def test_an_exchange_that_nobody_trades_fails_with_what_to_do(
    gateway: Sandbox, endpoint: SlackEndpoint, opens: Callable[[timedelta], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sentence names the setting, and Slack says to pause the deployment."""
    exchange = opens(MINUTES_40)
    for market in ("US", "KR"):
        monkeypatch.setenv(f"KIS_MARKETS__{market}__EXCHANGES", "SEHK")
    state = warmed(exchange)
    assert told(state) == ("FAILED", "Failed")
    assert state.message
    assert state.message.startswith(f"No market of your settings trades {exchange}; add it")
    assert "Pause the deployment" in endpoint.told[0]["blocks"][2]["text"]["text"]
    assert requests_to(gateway) == 0


def test_an_unforeseen_error_fails_without_its_text(
    gateway: Sandbox, endpoint: SlackEndpoint, opens: Callable[[timedelta], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the error's kind and place are told, to Prefect and to Slack."""

    def broken(_exchange: str) -> None:
        raise LookupError(APP_SECRET)

    monkeypatch.setattr("flows.warm_up.trading", broken)
    state = warmed(opens(MINUTES_40))
    assert told(state) == ("FAILED", "Failed")
    assert state.message
    assert state.message.startswith("Unexpected LookupError at test_flows.py:")
    assert endpoint.headlines
    assert requests_to(gateway) == 0


def checked(due: datetime | None = None) -> State:
    """The final state of a check."""
    return run(check_tokens, due)


def table() -> list[dict[str, Any]]:
    """The table of tokens as published last."""
    found = Artifact.get(TOKENS)
    rows: list[dict[str, Any]] = json.loads(found.data)  # type: ignore[union-attr, arg-type]
    return rows


def test_a_check_renews_what_is_due_and_then_finds_it_valid(
    gateway: Sandbox, opens: Callable[[timedelta], str]
) -> None:
    """It follows the rule, says when the next renewal is, and publishes a row for each market."""
    opens(MINUTES_40)
    first = checked()
    assert told(first) == ("COMPLETED", "Renewed")
    second = checked()
    assert told(second) == ("COMPLETED", "AlreadyValid")
    assert second.message
    assert "next renewal" in second.message
    assert [(row["market"], row["status"], row["need covered"], row["issued in 24 h"]) for row in table()] == [
        ("us", "VALID", "yes", 1),
        ("kr", "VALID", "yes", 1),
    ]
    assert requests_to(gateway) == 1


def test_a_check_without_a_need_issues_nothing(gateway: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Days before the next session there is no token, and that is no failure."""
    today = datetime.now(UTC).date()
    days = ",".join(str(today + timedelta(days=n)) for n in range(-1, 5))
    monkeypatch.setenv("KIS_EXCHANGES__KRX__CLOSED", days)
    monkeypatch.setenv("KIS_MARKETS__US__EXCHANGES", "KRX")
    state = checked()
    assert told(state) == ("COMPLETED", "Completed")
    assert "no valid token; next renewal" in str(state.message)
    assert requests_to(gateway) == 0


def test_one_keys_trouble_does_not_stop_the_others(
    gateway: Sandbox, endpoint: SlackEndpoint, opens: Callable[[timedelta], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check with two keys fails for the one that is refused and renews the other."""
    opens(MINUTES_40)
    monkeypatch.setenv("KIS_MARKETS__KR__APP_KEY", "another-key")
    gateway.fail("bad-secret", 1)
    state = checked()
    assert told(state) == ("FAILED", "Failed")
    assert requests_to(gateway) == 2
    assert sorted(row["status"] for row in table()) == ["NO_TOKEN", "VALID"]
    broken = next(row["market"] for row in table() if row["status"] == "NO_TOKEN")
    assert str(state.message).startswith(f"{broken}: KIS refused the app secret (EGW00105).")
    assert endpoint.headlines == [f"{broken}: KIS refuses the app key or its secret"]


def test_a_renewal_that_nobody_will_try_is_not_promised(gateway: Sandbox, opens: Callable[[timedelta], str]) -> None:
    """After refused credentials the table and the state name no next renewal, but say who has to act."""
    opens(MINUTES_40)
    checked()
    cached(left=3 * 3600)
    time.sleep(0.6)  # the gateway's minute
    gateway.fail("bad-key", 1)
    refreshed("us", force=True)
    state = checked()
    assert "next renewal" not in str(state.message)
    assert REFUSED in str(state.message)
    assert {(row["next renewal (KST)"], row["why then"]) for row in table()} == {("-", REFUSED)}
    plan = str(Artifact.get(PLAN).data)  # type: ignore[union-attr]
    assert f"{REFUSED}." in plan
    assert "| next renewal |" not in plan


def test_of_checks_that_were_missed_one_catches_up(opens: Callable[[timedelta], str]) -> None:
    """After a down-time the runs that are left over find that a later one has done their work."""
    opens(MINUTES_40)
    checked()
    assert told(checked(due=datetime.now(UTC) - timedelta(hours=3))) == ("COMPLETED", "SkippedLate")


def test_without_credentials_a_check_fails_with_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence says what to set."""
    monkeypatch.delenv("KIS_APP_KEY", raising=False)
    state = checked()
    assert told(state) == ("FAILED", "Failed")
    assert str(state.message).startswith("KIS_APP_KEY is not set")


@pytest.fixture
def attentive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that waits for a person looks for the answer often."""
    monkeypatch.setattr("flows.refresh_token.LOOK", 0.2)
    monkeypatch.setattr("flows.refresh_token.PATIENCE", timedelta(seconds=20))  # a test that fails is not to hang


def test_a_first_token_needs_no_confirmation_and_is_told_with_who_and_why(
    gateway: Sandbox, endpoint: SlackEndpoint
) -> None:
    """Where a refresh harms nothing it is done at once; the record and Slack know by whom and why."""
    assert told(refreshed("us", reason="a first token", operator="Kim Minji")) == ("COMPLETED", "Renewed")
    attempt = TokenManager("kr").history()[-1]
    assert (attempt.by, attempt.reason) == ("Kim Minji", "a first token")
    assert endpoint.headlines == ["us+kr: refreshed by hand"]
    assert "Kim Minji asked for it" in json.dumps(endpoint.told)
    assert requests_to(gateway) == 1


@pytest.mark.usefixtures("attentive")
def test_the_same_token_again_is_asked_for_only_where_a_person_confirms(gateway: Sandbox) -> None:
    """Within six hours the run waits with the sentence; no means Declined, yes means KIS is asked."""
    cached(left=23 * 3600)
    for decision, end in (("leave the token as it is", "Declined"), ("renew now", "Renewed")):
        with paused("us") as waiting:
            assert "KIS would hand back the present token, as it does until" in waiting.question
            assert requests_to(gateway) == 0
            assert told(waiting.answer(decision)) == ("COMPLETED", end)
    assert requests_to(gateway) == 1


@pytest.mark.usefixtures("attentive")
def test_a_second_token_inside_a_session_is_confirmed_with_both_consequences(
    gateway: Sandbox, endpoint: SlackEndpoint, opens: Callable[[timedelta], str]
) -> None:
    """The person reads of the second issuance and of the session, and Slack of the result."""
    exchange = opens(timedelta(minutes=-5))
    cached(left=17 * 3600)
    with paused("us", reason="점검 뒤") as waiting:
        question = waiting.question
        assert question.startswith(
            "**Renew the token of us+kr all the same?**\n\n- It would be token number 2 of this key"
        )
        assert f"- {exchange}: tokens are in use until " in question
        assert told(waiting.answer("renew now")) == ("COMPLETED", "Renewed")
    assert TokenManager("us").history()[-1].reason == "점검 뒤"
    assert endpoint.headlines == ["us+kr: refreshed by hand"]
    assert requests_to(gateway) == 1


@pytest.mark.usefixtures("attentive")
def test_without_an_answer_a_refresh_is_declined(gateway: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question that nobody answers in time ends as Declined, and nothing was asked of KIS."""
    monkeypatch.setattr("flows.refresh_token.PATIENCE", timedelta(seconds=0.5))
    cached(left=23 * 3600)
    state = refreshed("us")
    assert told(state) == ("COMPLETED", "Declined")
    assert str(state.message).startswith("Nobody confirmed within ")
    assert "the token serves until" in str(state.message)
    assert requests_to(gateway) == 0


@pytest.mark.usefixtures("attentive")
def test_what_changed_while_a_refresh_waited_is_seen(gateway: Sandbox, opens: Callable[[timedelta], str]) -> None:
    """A token that came meanwhile makes it AlreadyValid; a session that began makes it Declined, with its name."""
    cached(left=17 * 3600)
    with paused("us") as waiting:
        exchange = opens(timedelta(minutes=-5))
        state = waiting.answer("renew now")
    assert told(state) == ("COMPLETED", "Declined")
    assert f"While it waited, this came up: {exchange}: tokens are in use" in str(state.message)
    with paused("us") as waiting:
        cached()
        assert told(waiting.answer("renew now")) == ("COMPLETED", "AlreadyValid")
    assert requests_to(gateway) == 0


# Prefect keeps parameters in clear, so these are not the credentials that the scan below looks for.
SECRET_TEXTS = {"key": KEY, "token": make_jwt(), "part of a token": make_jwt()[:36], "secret": SECRET}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"force": True, "reason": " "}, "Force needs a reason"),
        ({"operator": ""}, "Who asks? Give your name as operator"),
        *(({"reason": f"see {text}"}, "The reason holds a word of 36 characters") for text in SECRET_TEXTS.values()),
        ({"operator": KEY}, "The name holds a word of 36 characters"),
    ],
    ids=["force without a reason", "no operator", *SECRET_TEXTS, "key as operator"],
)
def test_an_incomplete_or_careless_form_is_declined(
    gateway: Sandbox, endpoint: SlackEndpoint, given: dict[str, Any], said: str
) -> None:
    """Also where the form's own check was switched off: a sentence that repeats nothing, and no request."""
    state = refreshed("us", **given)
    assert told(state) == ("COMPLETED", "Declined")
    assert str(state.message).startswith(said)
    assert not [text for text in SECRET_TEXTS.values() if text in str(state.message)]
    assert not endpoint.told
    assert requests_to(gateway) == 0


def test_a_forced_refresh_says_what_became_of_it(gateway: Sandbox, endpoint: SlackEndpoint) -> None:
    """With a reason nobody is asked: Renewed; AlreadyValid where KIS hands the token back; Failed with the reason."""
    assert told(refreshed("us", force=True)) == ("COMPLETED", "Renewed")
    time.sleep(0.6)  # the gateway's minute
    assert told(refreshed("kr", force=True)) == ("COMPLETED", "AlreadyValid")
    assert endpoint.headlines == [
        "us+kr: refreshed by hand, with force",
        "us+kr: a refresh by hand brought the same token",
    ]
    time.sleep(0.6)
    gateway.fail("down", 1)
    failed = refreshed("us", force=True, operator="Kim Minji")
    assert told(failed) == ("FAILED", "Failed")
    assert endpoint.headlines[-1] == "us+kr: a refresh by hand brought no new token"
    assert "Kim Minji asked for it" in json.dumps(endpoint.told[-1])
    assert "The present token goes on serving" in str(failed.message)
    assert requests_to(gateway) == 3


def test_a_refresh_is_declined_within_the_minute_without_an_alert(
    gateway: Sandbox, endpoint: SlackEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even force passes KIS's minute; our own is no incident, KIS's refusal of it is one."""
    refreshed("us")
    with monkeypatch.context() as patient:
        patient.setenv("KIS_ISSUE_INTERVAL", "60")
        assert told(refreshed("us", force=True)) == ("COMPLETED", "Declined")
    assert requests_to(gateway) == 1
    assert endpoint.headlines == ["us+kr: refreshed by hand"]
    time.sleep(1.1)  # two minutes of the gateway: what it refuses then is not our doing
    gateway.fail("limit", 1)
    assert told(refreshed("us", force=True)) == ("COMPLETED", "Declined")
    assert endpoint.headlines[1:] == [
        "us+kr: Someone else issues with this key: KIS's limit refused us",
        "us+kr: a refresh by hand brought no new token",
    ]


@flow
def leak(secret: str) -> None:
    """What no flow of ours does: a secret as a parameter, in a log line and in an exception."""
    get_run_logger().info("a line with %s", secret)
    raise ValueError(secret)


def found(database: Path, text: str) -> set[str]:
    """The tables and columns in which the text stands."""
    places = set()
    with sqlite3.connect(f"file:{database}?mode=ro", timeout=60, uri=True) as connection:
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            columns = [row[1] for row in connection.execute(f"PRAGMA table_info('{name}')")]
            for column in columns:
                query = f"SELECT 1 FROM '{name}' WHERE instr(CAST(\"{column}\" AS TEXT), ?) LIMIT 1"  # noqa: S608 - its own names
                if connection.execute(query, (text,)).fetchone():
                    places.add(f"{name}.{column}")
    return places


def leaked(database: Path, secret: str) -> set[str]:
    """Where a leak stands once its lines are written, which is done behind a run; it leaks until then.

    A busy server refuses lines now and then, and Prefect drops those for good.
    """
    give_up = time.monotonic() + 120
    while not (places := found(database, secret)) >= LEAKS and time.monotonic() < give_up:
        leak(secret, return_state=True)
        time.sleep(3)
    return places


def contents(folder: Path) -> Iterator[bytes]:
    """All files of a server that runs: some go while they are looked at."""
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            yield path.read_bytes()


@pytest.mark.usefixtures("attentive")
def test_no_secret_gets_into_prefect(
    gateway: Sandbox,
    endpoint: SlackEndpoint,
    opens: Callable[[timedelta], str],
    prefect_home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After all flows renewed, were refused, waited, failed and met a bug, Prefect and Slack have no secret.

    What a person pastes into the form is in the run's parameters, which are the person's doing, and nowhere else.
    """
    exchange = opens(MINUTES_40)
    for mode in ("limit", "bad-key", "html", "garbage"):
        gateway.fail(mode, 1)
        refreshed("us", force=True, reason="canary run")
        time.sleep(0.6)
    warmed(exchange)
    checked()
    with paused("us") as waiting:
        waiting.answer("renew now")
    token = TokenManager("us").get_valid_token()

    def broken(_exchange: str) -> None:
        raise LookupError(f"{APP_KEY} {APP_SECRET} {token} {HOOK}")

    monkeypatch.setattr("flows.warm_up.trading", broken)
    assert warmed(exchange).is_failed()
    pasted = make_jwt(life=77_000)
    assert told(refreshed("us", reason=f"look at {pasted}")) == ("COMPLETED", "Declined")
    database = Path(str(PREFECT_SERVER_DATABASE_CONNECTION_URL.value()).partition("///")[2])
    assert leaked(database, "planted-canary-0f1e2d3c") >= LEAKS
    assert "flow_run.parameters" in found(database, "canary run")
    assert "flow_run_input.value" in found(database, "renew now")
    assert found(database, pasted[-40:]) == {"flow_run.parameters"}
    assert pasted not in json.dumps(endpoint.told)
    secrets = {"key": APP_KEY, "secret": APP_SECRET, "token": token, "webhook": "canary-of-the-webhook"}
    assert {name: found(database, secret[-40:]) for name, secret in secrets.items()} == {
        name: set() for name in secrets
    }
    assert endpoint.told
    everything = b"\n".join([json.dumps(endpoint.told).encode(), *contents(prefect_home)])
    assert not [(name, form) for name, secret in secrets.items() for form in forms(secret[-40:]) if form in everything]


def prefect(*arguments: str, tries: int = 1) -> str:
    """Prefect's command against our server, with nobody to answer a question; what it printed."""
    environment = os.environ | {
        "PREFECT_API_URL": str(PREFECT_API_URL.value()),
        "PREFECT_HOME": str(PREFECT_HOME.value()),
    }
    command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
    for _ in range(tries):
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240, check=False
        )
        if not done.returncode:
            break
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_everything_deploys_and_a_worker_runs_it(gateway: Sandbox, opens: Callable[[timedelta], str]) -> None:
    """`deploy --all` asks nothing, nor when it is repeated; a worker completes a warm-up in a process of its own."""
    exchange = opens(MINUTES_40)
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="tokens", type="process"))
        for _ in range(2):
            prefect("deploy", "--all", "--prefect-file", str(ROOT / "prefect.yaml"), tries=TRIES)
        deployments = client.read_deployments()
        assert len(deployments) == len(sessions.EXCHANGES) + 2
        assert all(len(deployment.schedules) <= 1 for deployment in deployments)
        made = client.create_flow_run_from_deployment(
            next(deployment.id for deployment in deployments if deployment.name == exchange)
        )
        prefect("worker", "start", "--pool", "tokens", "--run-once")
        state = client.read_flow_run(made.id).state
        assert state
        assert told(state) == ("COMPLETED", "Renewed")
        check = next(deployment.id for deployment in deployments if deployment.name == "check_tokens")
        client.create_flow_run_from_deployment(check)
        prefect("worker", "start", "--pool", "tokens", "--run-once")
    assert requests_to(gateway) == 1
    ((markets, moments),) = planned_runs().items()
    assert (markets, len(moments)) == ("us+kr", 1)
    assert moments[0] == next_attempt(TokenManager("us"), datetime.now(UTC))


def test_the_next_renewal_is_a_scheduled_run_that_moves_and_goes() -> None:
    """One run per key stands at the planned moment: kept while the plan stays, moved with it, gone without it."""
    soon, later = (datetime.now(UTC).replace(microsecond=0) + timedelta(hours=hours) for hours in (2, 3))
    with get_client(sync_client=True) as client:
        client.create_deployment(client.create_flow(check_tokens), "check_tokens")
    for _ in range(2):
        planned.keep({"us+kr": soon, "hk": soon})
        assert planned_runs() == {"us+kr": [soon], "hk": [soon]}
    planned.keep({"us+kr": later, "hk": None})
    assert planned_runs() == {"us+kr": [later]}
    planned.keep({"us+kr": soon})
    assert planned_runs() == {"us+kr": [soon]}
    planned.keep({"us+kr": None})
    assert planned_runs() == {}


def scheduled_names(*tags: str) -> list[str]:
    """The names of the runs with these tags that are to come, in the order of time."""
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(sort=FlowRunSort.EXPECTED_START_TIME_ASC)
    return [one.name for one in found if set(tags) <= set(one.tags) and one.state and one.state.is_scheduled()]


def test_coming_runs_have_the_names_that_they_will_have() -> None:
    """What a schedule made is called after what it will do and when, a run of somebody else's flow as Prefect likes."""
    noon = datetime(2098, 6, 3, 12, 20, tzinfo=UTC)  # a Tuesday in New York, 21:20 in Korea
    with get_client(sync_client=True) as client:
        for tags, parameters in (
            (["warm-up", "NASD"], {"exchange": "NASD"}),
            (["check"], {}),
            (["theirs"], {"exchange": "NASD"}),
        ):
            client.create_flow_run(
                warm_up,
                name="quick-fox",
                parameters=parameters,
                tags=["auto-scheduled", *tags],
                state=Scheduled(scheduled_time=noon),
            )
    for _ in range(2):
        planned.name_ahead()
        assert scheduled_names("auto-scheduled", "warm-up") == ["warm-up NASD 2098-06-03"]
        assert scheduled_names("auto-scheduled", "check") == ["check-tokens 2098-06-03 12:20 UTC"]
        assert scheduled_names("auto-scheduled", "theirs") == ["quick-fox"]


def test_a_planned_renewal_keeps_its_name(opens: Callable[[timedelta], str]) -> None:
    """Who saw it coming finds it again after it ran."""
    opens(MINUTES_40)
    with get_client(sync_client=True) as client:
        made = client.create_flow_run(
            check_tokens, name="renew us+kr", tags=[planned.TAG], state=Scheduled(scheduled_time=datetime.now(UTC))
        )
        state = cast("State", run_flow(check_tokens, flow_run=made, return_type="state"))
        assert told(state) == ("COMPLETED", "Renewed")
        assert client.read_flow_run(made.id).name == "renew us+kr"


@pytest.mark.usefixtures("gateway")
def test_a_refresh_by_hand_is_in_the_table_at_once() -> None:
    """Nobody has to wait for the next check to see the new token."""
    assert told(refreshed("us")) == ("COMPLETED", "Renewed")
    held = TokenManager("us").newest_token()
    assert held
    (shown,) = {row["valid until (KST)"] for row in table()}
    assert shown == f"{held.expires_at.astimezone(KST):%m-%d %H:%M}"


@pytest.mark.usefixtures("gateway")
def test_a_table_that_cannot_be_published_fails_no_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """The token is there, and the run says so."""

    def broken(**_: object) -> None:
        raise OSError("the server is away")

    monkeypatch.setattr("flows.board.create_table_artifact", broken)
    assert told(refreshed("us")) == ("COMPLETED", "Renewed")


def test_a_renewal_that_is_about_to_start_is_not_taken_back() -> None:
    """A planned run whose moment has come stays, whatever the plan says now: it finds out for itself what to do."""
    past = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=1)
    with get_client(sync_client=True) as client:
        client.create_deployment(client.create_flow(check_tokens), "check_tokens")
        planned.keep({"late": past})
        planned.keep({"late": None})
        assert planned_runs() == {"late": [past]}
        for one in client.read_flow_runs():
            if planned.TAG in one.tags:
                client.delete_flow_run(one.id)


def test_a_refused_refresh_without_a_token_is_a_failure(gateway: Sandbox) -> None:
    """Where no token serves, a limit that forbids a refresh is no `Declined`: there is nothing to go on with."""
    gateway.fail("limit")
    assert told(refreshed("us")) == ("FAILED", "Failed")
