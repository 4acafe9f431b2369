"""Alerts: what people are told, once, whatever state Slack and the token directory are in."""

from __future__ import annotations

import json
import logging
import stat
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from slack_endpoint import SlackEndpoint

from flows import alerts, causes, slack
from flows.causes import BY_NAME, Cause, as_met, cause_of
from flows.incidents import CLAIM, Incidents
from flows.messages import Message, next_check
from flows.runs import clock
from tokencore import (
    ConfigurationError,
    CredentialsError,
    IssuanceLimitError,
    IssuerUnavailableError,
    TokenError,
    TokenManager,
    TokenStoreError,
    TokenUnavailableError,
    USTokenManager,
)
from tokencore.sandbox import APP_KEY, APP_SECRET

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokencore.sandbox import Sandbox

MONDAY = datetime(2026, 11, 22, 23, 20, tzinfo=UTC)  # 08:20 in Seoul, 40 minutes before KRX opens
HOOK = "/services/T000/B000/canary-of-the-webhook"
BOT = "xoxb-canary-of-the-bot"
LIMITED = "us+kr: KIS's issuance limit refused a token"


class Attempt(NamedTuple):
    """A line of the record, as far as causes are read from it."""

    outcome: str


@pytest.fixture
def endpoint(gateway: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlackEndpoint]:
    """Slack behind a webhook, beside a gateway for `us` and `kr` with one key."""
    assert gateway.url
    with SlackEndpoint() as running:
        monkeypatch.setenv("SLACK_WEBHOOK_URL", running.url + HOOK)
        yield running


def refused(gateway: Sandbox, mode: str = "limit") -> tuple[TokenManager, TokenError]:
    """A manager whose renewal met that failure of KIS, and the error."""
    manager = USTokenManager()
    gateway.fail(mode, 1)
    with pytest.raises(TokenError) as caught:
        manager.refresh(force=True)
    return manager, caught.value


def limit(cause: str) -> IssuanceLimitError:
    """The error of that rule."""
    return IssuanceLimitError("A limit forbids it.", retry_at=None, cause=cause)


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


def test_a_refresh_by_hand_is_announced(gateway: Sandbox, endpoint: SlackEndpoint) -> None:
    """Slack hears who had which token refreshed, when, why, and what works now."""
    assert gateway.url
    alerts.announce(USTokenManager(), "forced", who="Kim", why="it was revoked", now=MONDAY)
    told = text_of(endpoint.told[0])
    assert endpoint.headlines == ["us+kr: refreshed by hand, with force"]
    assert "Kim asked for it, 2026-11-23 08:20 KST." in told
    assert "*Why:* it was revoked" in told


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
    monkeypatch.setattr(alerts, "PATIENCE", 0.3)
    endpoint.answers = [0]
    manager, error = refused(gateway)
    begun = time.monotonic()
    alerts.report(manager, error, MONDAY)
    assert time.monotonic() - begun < 1.5


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
    told = [record.getMessage() for record in caplog.records if record.name == "flows"]
    assert [LIMITED in line for line in told] == [True, False]
    assert "solved" in told[1]


def test_a_bot_speaks_in_its_channel(
    gateway: Sandbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A bot's token and channel serve as well; what Slack's API refuses is logged by its word, without the token."""
    monkeypatch.setenv("SLACK_BOT_TOKEN", BOT)
    monkeypatch.setenv("SLACK_CHANNEL", "#tokens")
    manager, error = refused(gateway)
    with SlackEndpoint() as slack_api, caplog.at_level(logging.DEBUG):
        monkeypatch.setattr(slack, "API", slack_api.url)
        slack_api.bot_answer = {"ok": False, "error": "channel_not_found"}
        alerts.report(manager, error, MONDAY)
        assert "Slack did not take the message (channel_not_found)" in caplog.text
        slack_api.bot_answer = {"ok": True}
        alerts.report(manager, error, MONDAY + CLAIM)
    assert slack_api.requests == [("/chat.postMessage", f"Bearer {BOT}")] * 2
    assert slack_api.told[-1]["channel"] == "#tokens"
    assert BOT not in caplog.text


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


def test_what_a_killed_run_had_set_out_to_tell_is_told_by_another(tmp_path: Path) -> None:
    """A claim keeps others from telling for a minute, not for ever."""
    incidents = Incidents(tmp_path)
    assert incidents.open("us", "limit", MONDAY)
    assert not incidents.open("us", "limit", MONDAY + CLAIM / 2)
    assert incidents.open("us", "limit", MONDAY + CLAIM)


def test_trouble_that_returns_before_its_end_was_told_never_ended(tmp_path: Path) -> None:
    """Then there is nothing new to tell, and the length counts from the first time."""
    incidents = Incidents(tmp_path)
    incidents.open("us", "limit", MONDAY)
    incidents.opening_told("us", "limit")
    assert incidents.close("us", MONDAY + CLAIM)
    assert not incidents.open("us", "limit", MONDAY + 2 * CLAIM)
    (over,) = incidents.close("us", MONDAY + 3 * CLAIM)
    assert over.opened_at == MONDAY
    assert over.closed_at == MONDAY + 3 * CLAIM


@pytest.mark.parametrize("content", ["", "{", "[1]", '[{"subject": "us"}]', "\x00\xff"])
def test_a_damaged_file_of_incidents_is_begun_anew(tmp_path: Path, content: str) -> None:
    """Whatever stands in the file, the trouble is told rather than kept."""
    (tmp_path / "incidents.json").write_text(content, "latin-1")
    assert Incidents(tmp_path).open("us", "limit", MONDAY)
    assert not Incidents(tmp_path).open("us", "limit", MONDAY)


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


CAUSES: list[tuple[str, Exception, list[str], Cause]] = [
    ("KIS's own refusal", limit("minute"), ["issued", "limit"], causes.LIMIT),
    ("our own minute after a renewal", limit("minute"), ["issued"], causes.WAITING),
    ("the minute after KIS was down", limit("minute"), ["server_error"], causes.DOWN),
    ("the pause after a dropped connection", limit("backoff"), ["no_answer"], causes.DOWN),
    ("the pause after a wrong secret", limit("backoff"), ["bad_secret"], causes.CREDENTIALS),
    ("the ceiling", limit("ceiling"), ["issued", "issued"], causes.CEILING),
    ("the six hours", limit("same_token"), ["issued"], causes.DEAD),
    ("a wrong key", CredentialsError("x"), ["bad_key"], causes.CREDENTIALS),
    ("KIS being down", IssuerUnavailableError("x"), ["unreachable"], causes.DOWN),
    ("a full disk", TokenStoreError("x"), [], causes.STORE),
    ("a missing setting", ConfigurationError("x"), [], causes.SETTINGS),
    ("a need that is too long", TokenUnavailableError("x"), [], causes.UNSERVED),
    ("anything else", RuntimeError("x"), [], causes.UNFORESEEN),
]


@pytest.mark.parametrize(("error", "outcomes", "expected"), [row[1:] for row in CAUSES], ids=[row[0] for row in CAUSES])
def test_the_cause_is_what_the_error_comes_from(error: Exception, outcomes: list[str], expected: Cause) -> None:
    """A pause after a failure is no cause of its own, and only KIS being down is worth another try by Prefect."""
    attempts = [Attempt(outcome) for outcome in outcomes]
    assert cause_of(error, attempts) is expected
    assert isinstance(as_met(error, attempts), IssuerUnavailableError) == (expected is causes.DOWN)


@pytest.mark.parametrize("cause", BY_NAME.values(), ids=list(BY_NAME))
def test_every_alert_fits_slack_and_a_phone(cause: Cause) -> None:
    """Headers keep below Slack's 150 characters, whatever the key is called, and paragraphs below 3000."""
    message = Message(
        ":x:", f"{'us+kr+hk+jp+cn+vn (paper)'}: solved: {cause.title}", "y" * 5000, [("To do", cause.cure)], ("", None)
    )
    header, happened, answers = message.blocks
    assert header["text"]["text"].endswith(cause.title)
    assert max(len(block["text"]["text"]) for block in (happened, answers)) < 3000


def test_the_next_check_is_the_next_hours_fifth_minute() -> None:
    """As check_tokens is scheduled."""
    assert next_check(MONDAY) == datetime(2026, 11, 23, 0, 5, tzinfo=UTC)
    assert next_check(MONDAY.replace(minute=4)) == MONDAY.replace(minute=5)
    assert next_check(MONDAY.replace(minute=5)) == datetime(2026, 11, 23, 0, 5, tzinfo=UTC)
