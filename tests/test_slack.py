"""Slack as a bot and as a webhook: what is sent, what a refusal is called, and that no run waits or fails for it."""

from __future__ import annotations

import json
import logging
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from slack_endpoint import CHANNEL, HOOK, SlackEndpoint

from flows import alerts
from flows.alerts import messages
from flows.alerts.slack import Receipt, sender
from tokencore import Key, Settings, TokenError, TokenUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokencore.sandbox import Sandbox

pytestmark = pytest.mark.usefixtures("gateway")
MONDAY = datetime(2026, 11, 22, 23, 20, tzinfo=UTC)  # 08:20 in Seoul, 40 minutes before KRX opens
EVENING = datetime(2026, 11, 22, 14, 30, tzinfo=UTC)  # nine hours before KRX's need
BOT = "xoxb-canary-of-the-bot"
WORDS = {"solved: ": "solved", "still, after": "reminded"}


@pytest.fixture
def bot(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlackEndpoint]:
    """Slack's API for a bot, where the settings say so."""
    monkeypatch.setenv("SLACK_BOT_TOKEN", BOT)
    monkeypatch.setenv("SLACK_CHANNEL", "#tokens")
    with SlackEndpoint() as running:
        monkeypatch.setattr(alerts.slack, "API", running.url)
        yield running


def report(error: Exception, at: datetime = MONDAY) -> None:
    """Report trouble of the only key."""
    settings = Settings.load()
    alerts.report(settings, Key.load(settings)[0].state(at), error, at)


def resolve(at: datetime = MONDAY) -> None:
    """Report that the only key is well."""
    settings = Settings.load()
    alerts.resolved(settings, Key.load(settings)[0].state(at), at)


def refusal(gateway: Sandbox, mode: str = "limit") -> TokenError:
    """The error of a refresh that met this failure of KIS."""
    gateway.fail(mode, 1)
    with pytest.raises(TokenError) as caught:
        Key.load(Settings.load())[0].refresh(force=True, reason="a test", by="")
    return caught.value


def kind(message: dict[str, Any]) -> str:
    """Which part of an incident's life a message is about."""
    icon, headline = message["blocks"][0]["text"]["text"].split(" ", 1)
    found = next((name for part, name in WORDS.items() if part in headline), "opened")
    return "escalated" if icon == ":rotating_light:" else found


def test_a_bot_speaks_in_its_channel_and_goes_on_in_the_thread(
    gateway: Sandbox, bot: SlackEndpoint, slack: SlackEndpoint
) -> None:
    """Reminder, escalation and end answer the opening; only what calls people shows in the channel too.

    It speaks alone where a webhook is set as well, which cannot answer in threads.
    """
    error = refusal(gateway)
    for hours in (0, 1, 4.75, 8.7):  # from the evening before: KRX's need starts at 08:30
        report(error, EVENING + timedelta(hours=hours))
    resolve(EVENING + timedelta(hours=9))
    assert [(kind(one), one.get("thread_ts"), one.get("reply_broadcast"), one["channel"]) for one in bot.told] == [
        ("opened", None, None, "#tokens"),
        ("reminded", "1.0", False, CHANNEL),
        ("escalated", "1.0", False, CHANNEL),
        ("escalated", "1.0", True, CHANNEL),
        ("solved", "1.0", False, CHANNEL),
    ]
    assert ({authorization for _, authorization in bot.requests}, slack.requests) == ({f"Bearer {BOT}"}, [])


def test_a_thread_that_is_gone_does_not_swallow_what_follows(
    gateway: Sandbox, bot: SlackEndpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """Where Slack refuses the thread, the channel gets the message, and what follows goes under that.

    Another refusal of the API is named, without the bot's token, and the next run sends the message.
    """
    error = refusal(gateway)
    caplog.set_level(logging.DEBUG)
    report(error)
    bot.bot_answers = [{"ok": False, "error": "thread_not_found"}]
    report(error, MONDAY + timedelta(hours=1))
    bot.bot_answers = [{"ok": False, "error": "is_archived"}] * 2  # in the thread, and beside it
    for hours in (2, 3):
        resolve(MONDAY + timedelta(hours=hours))
    assert "Slack did not accept the message (is_archived): the channel is archived" in caplog.text
    threads = [("#tokens", None), ("#tokens", None), (CHANNEL, "2.0")]
    assert [(one["channel"], one.get("thread_ts")) for one in bot.told] == threads
    assert BOT not in caplog.text


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_slack_is_asked_once_more(gateway: Sandbox, slack: SlackEndpoint, status: int) -> None:
    """A rate limit (after its Retry-After) or a fault of Slack's own is retried by slack_sdk."""
    slack.answers, slack.retry_after = [status], 0
    report(refusal(gateway))
    assert (len(slack.requests), len(slack.told)) == (2, 1)


REFUSALS = {
    "channel_is_archived": (410, "channel_is_archived", "unarchive it"),
    "invalid_blocks": (400, "invalid_blocks", "fault of tokencore's"),
    "no_service": (404, "no_service", "make a new webhook"),
    "action_prohibited": (403, "action_prohibited", "ask who administers Slack"),
    "HTTP 404": (404, "<html>", "make a new webhook"),
    "HTTP 418": (418, "teapot", "the next run sends the message"),
}


@pytest.mark.parametrize("named", REFUSALS)
def test_a_refusal_of_the_webhook_is_named_with_what_to_do(
    gateway: Sandbox, slack: SlackEndpoint, caplog: pytest.LogCaptureFixture, named: str
) -> None:
    """Slack's own word stands in the log, HTTP's status where it says anything else; the next run sends the message."""
    error, (status, word, fix) = refusal(gateway), REFUSALS[named]
    slack.answers = [(status, word)]
    for minutes in (0, 5, 10):
        report(error, MONDAY + timedelta(minutes=minutes))
    assert f"Slack did not accept the message ({named}): " in caplog.text
    assert fix in caplog.text
    assert len(slack.told) == 1


def test_a_silent_slack_delays_a_run_by_three_seconds_at_most(
    gateway: Sandbox, slack: SlackEndpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """A Slack that takes the request and never answers; a second alert waits no longer for the first.

    The log has how long the run waited; the clock allows a busy machine more, and still far less than Slack's time-out.
    """
    slack.answers = [0, 0, 0, 0]
    error = refusal(gateway)
    for _ in range(2):
        begun = time.monotonic()
        report(error)
        assert time.monotonic() - begun < 8
    assert "Slack has not answered within 3 s; the run goes on." in caplog.text
    assert slack.told == []


def test_slack_being_away_is_logged_without_its_address(
    gateway: Sandbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With Slack's port closed, the log has the trouble and that Slack missed it, but not the webhook's address."""
    monkeypatch.setenv("SLACK_WEBHOOK_URL", "http://127.0.0.1:1" + HOOK)
    with caplog.at_level(logging.DEBUG):
        report(refusal(gateway))
    assert "Someone else issues with this key" in caplog.text
    assert "Slack did not accept the message (URLError): check this machine's network" in caplog.text
    assert "canary-of" not in caplog.text


def test_without_slack_alerts_are_logged_once(gateway: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    """Without Slack settings the log has the incident and its end, once each."""
    caplog.set_level(logging.INFO)
    error = refusal(gateway)
    for _ in range(2):
        report(error)
    for _ in range(2):
        resolve()
    told = [record.getMessage() for record in caplog.records if "us+kr: " in record.getMessage()]
    assert ["solved" in line for line in told] == [False, True]


def test_runs_at_the_same_moment_tell_once(gateway: Sandbox, slack: SlackEndpoint) -> None:
    """Of ten runs that meet the same trouble together, one tells."""
    error = refusal(gateway)
    runs = [threading.Thread(target=report, args=(error,)) for _ in range(10)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(slack.told) == 1


def test_a_recovery_that_slack_did_not_accept_is_told_later(gateway: Sandbox, slack: SlackEndpoint) -> None:
    """It keeps the length that it had when the trouble ended."""
    report(refusal(gateway))
    slack.answers = [404]
    for minutes in (30, 90, 150):
        resolve(MONDAY + timedelta(minutes=minutes))
    assert len(slack.told) == 2
    assert "It lasted 30 min" in json.dumps(slack.told[1])


def test_foreign_words_act_on_nothing(slack: SlackEndpoint, caplog: pytest.LogCaptureFixture) -> None:
    """Slack's special characters are escaped; what turns text around or clears a terminal is gone, in the log too."""
    report(TokenUnavailableError("<!channel> R&D <http://x|y> \x1b[2J\u202edcba."))
    sent = json.dumps(slack.told[0], ensure_ascii=False)
    assert "&lt;!channel&gt; R&amp;D" in sent
    assert "<!channel>" not in sent
    assert not [sign for sign in "\x1b\u202e" if sign in sent + caplog.text]


def test_a_sender_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that is none is a refusal with what to do; without settings there is no sender."""
    assert sender(Settings.load()) is None
    monkeypatch.setenv("SLACK_WEBHOOK_URL", "hooks.slack.com/services/Canary")
    send = sender(Settings.load())
    assert send
    facts = messages.Facts("x", MONDAY, until=None, reached=False, risks=[], run=("", None), mention="")
    message = messages.test(messages.LANGUAGES["en"], facts)
    assert send(message) == Receipt("ValueError")
    assert "SLACK_WEBHOOK_URL" in send(message).fix
