"""Alerts: what people are told, once, whatever state Slack and the token directory are in."""

from __future__ import annotations

import json
import logging
import stat
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests
from prefect.settings import PREFECT_UI_URL, temporary_settings
from slack_endpoint import CHANNEL, SlackEndpoint

from flows import alerts, causes, courier, slack
from flows.incidents import CLAIM
from flows.runs import clock
from flows.stack import trial
from tokencore import (
    ConfigurationError,
    TokenError,
    TokenManager,
    TokenStoreError,
    TokenUnavailableError,
    USTokenManager,
    issuance,
)
from tokencore.sandbox import APP_KEY, APP_SECRET

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokencore.sandbox import Sandbox

MONDAY = datetime(2026, 11, 22, 23, 20, tzinfo=UTC)  # 08:20 in Seoul, 40 minutes before KRX opens
EVENING = datetime(2026, 11, 22, 14, 30, tzinfo=UTC)  # nine hours before KRX's need
HOOK = "/services/T000/B000/canary-of-the-webhook"
BOT = "xoxb-canary-of-the-bot"
LIMITED = "us+kr: Someone else issues with this key: KIS's limit refused us"


@pytest.fixture
def endpoint(gateway: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlackEndpoint]:
    """Slack behind a webhook, beside a gateway for `us` and `kr` with one key."""
    assert gateway.url
    with SlackEndpoint() as running:
        monkeypatch.setenv("SLACK_WEBHOOK_URL", running.url + HOOK)
        yield running


@pytest.fixture
def bot(gateway: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlackEndpoint]:
    """Slack's API for a bot, beside that gateway."""
    assert gateway.url
    monkeypatch.setenv("SLACK_BOT_TOKEN", BOT)
    monkeypatch.setenv("SLACK_CHANNEL", "#tokens")
    with SlackEndpoint() as running:
        monkeypatch.setattr(slack, "API", running.url)
        yield running


def kind(message: dict[str, Any]) -> str:
    """Which chapter of an incident's life a message tells, by its headline."""
    words = {"solved: ": "solved", "still, after": "reminded", "a lasting token": "escalated"}
    return next((name for part, name in words.items() if part in message["blocks"][0]["text"]["text"]), "opened")


def refused(gateway: Sandbox, mode: str = "limit") -> tuple[TokenManager, TokenError]:
    """A manager whose renewal met that failure of KIS, and the error."""
    manager = USTokenManager()
    gateway.fail(mode, 1)
    with pytest.raises(TokenError) as caught:
        manager.refresh(force=True)
    return manager, caught.value


def issued_elsewhere(gateway: Sandbox) -> None:
    """A program that shares nothing with us issues with our key."""
    asked = {"grant_type": "client_credentials", "appkey": APP_KEY, "appsecret": APP_SECRET}
    assert requests.post(f"{gateway.url}/oauth2/tokenP", json=asked, timeout=5).ok


def text_of(message: dict[str, object]) -> str:
    """All of a message's texts."""
    return json.dumps(message, ensure_ascii=False)


def test_an_alert_answers_an_operators_questions(gateway: Sandbox, endpoint: SlackEndpoint) -> None:
    """A refused renewal without a token tells what happened, what works, what is at risk, what is next, and a cure."""
    alerts.report(*refused(gateway), MONDAY)
    assert endpoint.headlines == [LIMITED]
    told = endpoint.told[0]["blocks"][2]["text"]["text"]
    assert "EGW00133" in endpoint.told[0]["blocks"][1]["text"]["text"]
    assert told.splitlines()[0] == "*Still works:* nothing: there is no valid token"
    assert "• KRX: 2026-11-23 09:00 KST, in 40 min\n• NASD, NYSE, AMEX: 2026-11-23 23:30 KST (Mon 09:30 there)" in told
    assert "*Next attempt:* about 2026-11-23 08:20 KST" in told  # half a second later: the gateway's minute
    assert "*To do:* Find the other program" in told
    assert endpoint.told[0]["text"].startswith(LIMITED)


def test_an_alert_says_until_when_the_present_token_works(gateway: Sandbox, endpoint: SlackEndpoint) -> None:
    """With a token that serves, the alert names its end, and only sessions beyond it are at risk."""
    manager = USTokenManager()
    manager.get_valid_token()
    time.sleep(0.6)  # the gateway's minute
    now = datetime.now(UTC)
    alerts.report(*refused(gateway), now)
    token = manager.newest_token()
    assert token
    end = clock(token.expires_at - timedelta(seconds=300))
    assert f"*Still works:* the present token, until {end}" in text_of(endpoint.told[0])


def test_one_incident_is_one_message(gateway: Sandbox, endpoint: SlackEndpoint) -> None:
    """The same trouble, met again by later runs and by runs of the key's other market, is not told again."""
    manager, error = refused(gateway)
    for who in (manager, manager, TokenManager("kr")):
        alerts.report(who, error, MONDAY)
    assert endpoint.headlines == [LIMITED]


def test_runs_at_the_same_moment_tell_once(gateway: Sandbox, endpoint: SlackEndpoint) -> None:
    """Of ten runs that meet the same trouble together, one tells."""
    manager, error = refused(gateway)
    runs = [threading.Thread(target=alerts.report, args=(manager, error, MONDAY)) for _ in range(10)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert endpoint.headlines == [LIMITED]


def test_a_recovery_is_one_message_with_its_length(gateway: Sandbox, endpoint: SlackEndpoint) -> None:
    """The end of an incident is told once, with how long it lasted; without an incident nothing is told."""
    manager, error = refused(gateway)
    alerts.all_clear(manager, MONDAY)
    alerts.report(manager, error, MONDAY)
    for minutes in (95, 120):
        alerts.all_clear(manager, MONDAY + timedelta(minutes=minutes))
    assert endpoint.headlines == [LIMITED, LIMITED.replace(": ", ": solved: ", 1)]
    assert "It lasted 1 h 35 min, from 2026-11-23 08:20 KST." in text_of(endpoint.told[1])


def test_the_end_of_trouble_that_came_to_no_key_denies_no_token(gateway: Sandbox, endpoint: SlackEndpoint) -> None:
    """Nobody has looked at the tokens of what is solved there: they serve until they expire."""
    assert gateway.url
    alerts.report("KRX", ConfigurationError("A setting is wrong."), MONDAY)
    alerts.all_clear("KRX", MONDAY + timedelta(minutes=5))
    for message, label in zip(endpoint.told, ("Still works", "Works now"), strict=True):
        assert f"*{label}:* cached tokens, until they expire" in text_of(message)


def test_a_refresh_by_hand_is_announced(gateway: Sandbox, endpoint: SlackEndpoint) -> None:
    """Slack hears who had which token refreshed, when, why, and what works now."""
    assert gateway.url
    alerts.announce(USTokenManager(), "forced", who="Kim", why="it was revoked", now=MONDAY)
    told = text_of(endpoint.told[0])
    assert endpoint.headlines == ["us+kr: refreshed by hand, with force"]
    assert "Kim asked for it, 2026-11-23 08:20 KST." in told
    assert "*Why:* it was revoked" in told


def test_refused_credentials_are_not_over_while_the_token_serves(gateway: Sandbox, endpoint: SlackEndpoint) -> None:
    """A check that finds the present token in order does not call them solved; the next answer of KIS does."""
    manager = USTokenManager()
    manager.get_valid_token()
    time.sleep(0.6)  # the gateway's minute
    alerts.report(*refused(gateway, "bad-key"), datetime.now(UTC))
    alerts.all_clear(manager, datetime.now(UTC))
    assert [kind(message) for message in endpoint.told] == ["opened"]
    time.sleep(0.6)
    manager.refresh(force=True)
    alerts.all_clear(manager, datetime.now(UTC))
    assert [kind(message) for message in endpoint.told] == ["opened", "solved"]


def test_trouble_that_returns_is_a_new_incident(gateway: Sandbox, endpoint: SlackEndpoint) -> None:
    """After its recovery the same trouble is told again."""
    manager, error = refused(gateway)
    for _ in range(2):
        alerts.report(manager, error, MONDAY)
        alerts.all_clear(manager, MONDAY)
    assert len(endpoint.told) == 4


def test_causes_are_incidents_of_their_own(gateway: Sandbox, endpoint: SlackEndpoint) -> None:
    """Another cause on the same key is told, and a recovery ends both."""
    manager, error = refused(gateway)
    alerts.report(manager, error, MONDAY)
    alerts.report(manager, TokenStoreError("The disk is full."), MONDAY)
    alerts.all_clear(manager, MONDAY)
    assert len(endpoint.told) == 4
    assert sum("solved" in headline for headline in endpoint.headlines) == 2


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_slack_is_asked_once_more(gateway: Sandbox, endpoint: SlackEndpoint, status: int) -> None:
    """A rate limit (after its Retry-After) or a fault of Slack's own is retried by slack_sdk."""
    endpoint.answers = [status]
    alerts.report(*refused(gateway), MONDAY)
    assert len(endpoint.requests) == 2
    assert endpoint.headlines == [LIMITED]


def test_what_slack_did_not_take_is_told_by_the_next_run(gateway: Sandbox, endpoint: SlackEndpoint) -> None:
    """A message that Slack refused is sent by a later run, and then no more."""
    manager, error = refused(gateway)
    endpoint.answers = [404]
    for minutes in (0, 5, 10):
        alerts.report(manager, error, MONDAY + timedelta(minutes=minutes))
    assert endpoint.headlines == [LIMITED]


def test_a_recovery_that_slack_did_not_take_is_told_later(gateway: Sandbox, endpoint: SlackEndpoint) -> None:
    """It keeps the length that it had when the trouble ended."""
    manager, error = refused(gateway)
    alerts.report(manager, error, MONDAY)
    endpoint.answers = [404]
    for minutes in (30, 90, 150):
        alerts.all_clear(manager, MONDAY + timedelta(minutes=minutes))
    assert len(endpoint.told) == 2
    assert "It lasted 30 min" in text_of(endpoint.told[1])


def test_a_silent_slack_holds_nobody_up(
    gateway: Sandbox, endpoint: SlackEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Slack that takes the request and never answers costs a run its patience, and no more."""
    monkeypatch.setattr(courier, "PATIENCE", 0.3)
    endpoint.answers = [0]
    manager, error = refused(gateway)
    begun = time.monotonic()
    alerts.report(manager, error, MONDAY)
    assert time.monotonic() - begun < slack.TIMEOUT  # of the first try; to load slack_sdk takes a busy machine a second


def test_slack_being_away_is_logged_without_its_address(
    gateway: Sandbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With Slack's port closed, the log has the trouble and that Slack missed it, but not the webhook's address."""
    monkeypatch.setenv("SLACK_WEBHOOK_URL", "http://127.0.0.1:1" + HOOK)
    with caplog.at_level(logging.DEBUG):
        alerts.report(*refused(gateway), MONDAY)
    assert LIMITED in caplog.text
    assert "Slack did not take the message (URLError)" in caplog.text
    assert "canary-of" not in caplog.text


def test_without_slack_alerts_are_logged_once(gateway: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    """Without Slack settings the log has the incident and its end, once each."""
    caplog.set_level(logging.INFO)
    manager, error = refused(gateway)
    for _ in range(2):
        alerts.report(manager, error, MONDAY)
    for _ in range(2):
        alerts.all_clear(manager, MONDAY)
    told = [record.getMessage() for record in caplog.records if "us+kr: " in record.getMessage()]
    assert [LIMITED in line for line in told] == [True, False]
    assert "solved" in told[1]


def test_a_bot_speaks_in_its_channel(gateway: Sandbox, bot: SlackEndpoint, caplog: pytest.LogCaptureFixture) -> None:
    """A bot's token and channel serve as well; what Slack's API refuses is logged by its word, without the token."""
    manager, error = refused(gateway)
    bot.bot_answers = [{"ok": False, "error": "channel_not_found"}]
    with caplog.at_level(logging.DEBUG):
        for at in (MONDAY, MONDAY + CLAIM):
            alerts.report(manager, error, at)
    assert "Slack did not take the message (channel_not_found)" in caplog.text
    assert bot.requests == [("/chat.postMessage", f"Bearer {BOT}")] * 2
    assert [told["channel"] for told in bot.told] == ["#tokens"]
    assert BOT not in caplog.text


def test_a_bot_goes_on_in_the_thread_of_the_opening(gateway: Sandbox, bot: SlackEndpoint) -> None:
    """Escalation, reminder and end answer the opening; only what calls people shows in the channel too."""
    manager, error = refused(gateway)
    for hours in (0, 1, 4.75, 8.7):  # from the evening before: KRX's need starts at 08:30
        alerts.report(manager, error, EVENING + timedelta(hours=hours))
    alerts.all_clear(manager, EVENING + timedelta(hours=9))
    told = [(kind(one), one.get("thread_ts"), one.get("reply_broadcast"), one["channel"]) for one in bot.told]
    assert told == [
        ("opened", None, None, "#tokens"),
        ("reminded", "1.0", False, CHANNEL),
        ("escalated", "1.0", False, CHANNEL),
        ("escalated", "1.0", True, CHANNEL),
        ("solved", "1.0", False, CHANNEL),
    ]


def test_a_thread_that_is_gone_does_not_swallow_what_follows(gateway: Sandbox, bot: SlackEndpoint) -> None:
    """Where Slack refuses the thread, the channel gets the message, and what follows goes under that."""
    manager, error = refused(gateway)
    alerts.report(manager, error, MONDAY)
    bot.bot_answers = [{"ok": False, "error": "thread_not_found"}]
    alerts.report(manager, error, MONDAY + timedelta(hours=1))
    alerts.all_clear(manager, MONDAY + timedelta(hours=2))
    told = [(one["channel"], one.get("thread_ts")) for one in bot.told]
    assert told == [("#tokens", None), ("#tokens", None), (CHANNEL, "2.0")]


def test_a_bot_that_slack_asks_to_wait_waits(gateway: Sandbox, bot: SlackEndpoint) -> None:
    """Slack's API says it like a webhook does."""
    manager, error = refused(gateway)
    bot.answers, bot.retry_after = [429], 300
    for minutes in (0, 4, 5):
        alerts.report(manager, error, MONDAY + timedelta(minutes=minutes))
    assert len(bot.requests) == 2
    assert len(bot.told) == 1


def test_where_both_ways_are_set_the_bot_speaks(gateway: Sandbox, endpoint: SlackEndpoint, bot: SlackEndpoint) -> None:
    """It can answer in threads, which a webhook cannot."""
    alerts.report(*refused(gateway), MONDAY)
    assert len(bot.told) == 1
    assert not endpoint.requests


def test_a_page_calls_who_is_named(gateway: Sandbox, endpoint: SlackEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLACK_MENTION stands in what cannot wait, and nowhere else; without it nobody is called."""
    manager, error = refused(gateway)
    alerts.report(manager, error, MONDAY)
    assert "<!" not in text_of(endpoint.told[0])
    alerts.all_clear(manager, MONDAY)
    monkeypatch.setenv("SLACK_MENTION", "<!channel> <@U024BE7LH>")
    alerts.report(manager, error, EVENING)
    alerts.report(manager, error, MONDAY)
    alerts.all_clear(manager, MONDAY)
    assert ["<!channel> <@U024BE7LH>" in text_of(one) for one in endpoint.told[2:]] == [False, True, False]
    assert endpoint.told[3]["blocks"][1]["text"]["text"].startswith("<!channel> <@U024BE7LH> KIS refused")
    assert endpoint.told[3]["text"].startswith("<!channel>")


def test_alerts_are_korean_where_the_settings_say_so(
    gateway: Sandbox, endpoint: SlackEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but KIS's and tokencore's own sentence is in the reader's language."""
    monkeypatch.setenv("SLACK_LANGUAGE", "ko")
    manager, error = refused(gateway)
    alerts.report(manager, error, MONDAY)
    alerts.all_clear(manager, MONDAY + timedelta(minutes=65))
    told = endpoint.told[0]["blocks"][2]["text"]["text"]
    assert endpoint.headlines[0] == "us+kr: 다른 프로그램이 이 앱키로 접근토큰 발급 중: KIS 발급 제한으로 거절됨"
    assert told.startswith("*사용 가능:* 없음(유효한 접근토큰이 없습니다)\n*영향을 받는 거래 시간:*")
    assert "NASD, NYSE, AMEX: 2026-11-23 23:30 KST(현지 월 09:30), 15시간 10분 후" in told
    assert "2026-11-23 08:20 KST부터 1시간 5분 동안 지속되었습니다." in text_of(endpoint.told[1])


def test_slacks_retry_after_is_obeyed_by_all_runs(gateway: Sandbox, endpoint: SlackEndpoint) -> None:
    """Longer than a run waits, it is left to later ones, and until then nobody asks Slack for anything."""
    manager, error = refused(gateway)
    endpoint.answers, endpoint.retry_after = [429], 600  # a run waits five seconds
    for minutes in (0, 5, 9):
        alerts.report(manager, error, MONDAY + timedelta(minutes=minutes))
    alerts.report("KRX", ConfigurationError("No market trades it."), MONDAY + timedelta(minutes=9))
    assert len(endpoint.requests) == 1
    alerts.report(manager, error, MONDAY + timedelta(minutes=10))
    assert endpoint.headlines == [LIMITED]


def test_a_token_that_someone_else_issued_is_told_although_nothing_failed(
    gateway: Sandbox, endpoint: SlackEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KIS answers with a token of unknown issue: one message, no reminder, and its end with our own next token."""
    monkeypatch.setattr(issuance, "FOREIGN_AGE", timedelta(seconds=1))  # the gateway's clock cannot be set
    monkeypatch.setattr(causes, "CLOCKS", timedelta(seconds=1))
    issued_elsewhere(gateway)
    time.sleep(1.1)
    manager, now = USTokenManager(), datetime.now(UTC)
    manager.get_valid_token()
    alerts.foreign(manager, now)
    for hours in (1, 2):
        alerts.all_clear(manager, now + timedelta(hours=hours))
    assert endpoint.headlines == ["us+kr: Someone else has issued a token with this key"]
    assert "issued at 20" in text_of(endpoint.told[0])
    gateway.set_rules(same_token=0)
    time.sleep(0.6)  # the gateway's minute
    manager.refresh(force=True)
    alerts.all_clear(manager, now + timedelta(hours=3))
    assert endpoint.headlines[1:] == ["us+kr: solved: Someone else has issued a token with this key"]


def test_a_test_message_says_whether_slack_took_it(
    endpoint: SlackEndpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It goes the way of alerts, is plainly a test and calls nobody; a refusal comes with its cure."""
    monkeypatch.setenv("SLACK_MENTION", "<!channel>")
    assert trial.send() == 0
    assert "Slack took the test message, by the webhook" in capsys.readouterr().out
    endpoint.answers = [404]
    assert trial.send() == 1
    assert "(HTTP 404). Correct SLACK_WEBHOOK_URL" in capsys.readouterr().out
    monkeypatch.setenv("SLACK_WEBHOOK_URL", "hooks.slack.com/services/Canary")
    assert trial.send() == 1
    assert "Correct SLACK_WEBHOOK_URL: it is no address" in capsys.readouterr().out
    (told,) = endpoint.told
    assert told["text"].startswith("Test message of the token keeper.")
    assert "&lt;!channel&gt;" in text_of(told)
    assert "<!channel>" not in text_of(told)


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({}, "SLACK_WEBHOOK_URL"),
        ({"SLACK_BOT_TOKEN": BOT}, "SLACK_CHANNEL"),
        ({"SLACK_CHANNEL": "#x"}, "SLACK_BOT_TOKEN"),
    ],
    ids=["nothing", "a bot without a channel", "a channel without a bot"],
)
def test_a_test_message_names_the_setting_that_is_missing(
    given: dict[str, str], missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a bot is no way to Slack."""
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=f"^Nothing was sent: set {missing}"):
        trial.send()


def test_trouble_of_all_markets_is_as_urgent_as_the_next_need(
    gateway: Sandbox, endpoint: SlackEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who looks after no token at all endangers the next need that has none, and is called for it."""
    assert gateway.url
    monkeypatch.setenv("SLACK_MENTION", "<!here>")
    for hours in (0, 8.6):
        alerts.report("all markets", causes.SilenceError("The server is dead."), EVENING + timedelta(hours=hours))
    opened, escalated = endpoint.told
    assert "• KRX: 2026-11-23 09:00 KST" in text_of(opened)
    assert "<!here>" not in text_of(opened)
    assert "<!here> The server is dead." in text_of(escalated)
    assert "all markets: a lasting token is needed in 24 min" in endpoint.headlines[1]


def test_an_alert_leads_to_its_run(gateway: Sandbox, endpoint: SlackEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """The link begins with PREFECT_UI_URL where people reach the page by another name than the flows do."""
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", "0a1b")
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__NAME", "warm-up KRX 2026-11-23")
    with temporary_settings({PREFECT_UI_URL: "https://prefect.example.com/"}):
        alerts.report(*refused(gateway), MONDAY)
    link = "<https://prefect.example.com/runs/flow-run/0a1b|warm-up KRX 2026-11-23>"
    assert endpoint.told[0]["blocks"][3]["elements"][0]["text"] == f"Run: {link}"


def test_no_secret_is_sent_or_logged(
    gateway: Sandbox, endpoint: SlackEndpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither key, secret, token nor webhook is in a message, a log line or the file of incidents."""
    manager = USTokenManager()
    token = manager.get_valid_token()
    time.sleep(0.6)
    with caplog.at_level(logging.DEBUG):
        alerts.report(*refused(gateway), MONDAY)
    written = Path("~/.tokencore/incidents.json").expanduser().read_text()
    everything = text_of(endpoint.told[0]) + caplog.text + written
    assert "EGW00133" in everything
    assert not [secret for secret in (APP_KEY, APP_SECRET, token, HOOK) if secret in everything]


def test_foreign_words_cannot_call_a_channel(gateway: Sandbox, endpoint: SlackEndpoint) -> None:
    """Slack's three special characters are escaped in every text."""
    assert gateway.url
    alerts.report(USTokenManager(), TokenUnavailableError("<!channel> R&D <http://x|y>."), MONDAY)
    assert "&lt;!channel&gt; R&amp;D" in text_of(endpoint.told[0])
    assert "<!channel>" not in text_of(endpoint.told[0])


def test_incidents_are_the_owners_alone(gateway: Sandbox) -> None:
    """The file is 0600, whatever the umask, and no draft is left beside it."""
    alerts.report(*refused(gateway), MONDAY)
    folder = Path("~/.tokencore").expanduser()
    assert stat.S_IMODE((folder / "incidents.json").stat().st_mode) == 0o600
    assert sorted(path.name for path in folder.glob("incidents*")) == ["incidents.json", "incidents.lock"]


def test_an_unusable_token_directory_is_told(
    gateway: Sandbox, endpoint: SlackEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where not even the incident can be kept, it is told all the same."""
    assert gateway.url
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("KIS_TOKEN_DIR", str(tmp_path / "file"))
    alerts.report(USTokenManager(), TokenStoreError("The token directory cannot be used: it is a file."), MONDAY)
    assert endpoint.headlines == ["us+kr: The token directory cannot be used"]


def test_malformed_settings_break_no_run(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """An alert that cannot be made is logged by the kind of its error and raises nothing."""
    monkeypatch.setenv("KIS_TIMEOUT", "soon")
    alerts.report("KRX", ConfigurationError("KIS_TIMEOUT cannot be used."), MONDAY)
    assert "An alert could not be made: ConfigurationError." in caplog.text
