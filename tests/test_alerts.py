"""Alerts: the cause they name, what people read and how often, and that no run waits long or fails because of Slack."""

import json
import logging
import os
import re
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from string import Formatter
from typing import Any
from uuid import uuid4

import pytest
from builders import make_token
from flow_runs import attempted, state_of
from hypothesis import given
from hypothesis import strategies as st
from prefect.settings import PREFECT_UI_URL, temporary_settings
from pydantic import SecretStr
from servers import CHANNEL, HOOK, SlackEndpoint

from flows import alerts
from flows.alerts import causes, incidents, messages
from flows.alerts.causes import Cause
from flows.alerts.incidents import ACT, LAST_CALL, NEAR, PUNCTUALITY, REMINDERS, Incident, Notification, met, over
from flows.stack import deployments
from tokencore import Key, Settings, errors, open_document
from tokencore.attempts import Attempt, Outcome
from tokencore.tokens import Token

MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)
MONDAY = datetime(2026, 11, 22, 23, 20, tzinfo=UTC)  # 08:20 in Seoul, 40 minutes before KRX opens
EVENING = datetime(2026, 11, 22, 14, 30, tzinfo=UTC)  # nine hours before KRX's need
ANCHOR = datetime(2026, 11, 23, 7, 35, tzinfo=UTC)  # 16:35 in Seoul
NEED = ANCHOR + 6 * HOUR
ENGLISH, KOREAN = messages.LANGUAGES["en"], messages.LANGUAGES["ko"]
LIMITED = "us+kr: Someone else issues with this key (minute limit, not 24-hour limit)"
FOREIGN, BROKEN = (f"us+kr: {ENGLISH[f'cause.{name}.title']}" for name in ("foreign-token", "store"))
DOWN = errors.IssuerUnavailableError("KIS reported a fault of its own.")
STORE = errors.TokenStoreError("The disk is full.")
REFUSED = errors.CredentialsError("KIS does not know the app key (EGW00103).")
SETTING = errors.ConfigurationError("KIS_TIMEOUT cannot be used: it is no number.")
BOT = "xoxb-canary-of-the-bot"
pytestmark = pytest.mark.usefixtures("gateway")


def limit(cause: str = "minute", wait: float = 0) -> errors.IssuanceLimitError:
    """Return the limit error of that cause, with `retry_at` in `wait` minutes, if any."""
    retry_at = MONDAY + wait * MINUTE if wait else None
    return errors.IssuanceLimitError("KIS refused (EGW00133). There is no token.", retry_at=retry_at, cause=cause)


def report(error: Exception | None = None, at: datetime = MONDAY, past: str = "limit 0.1", **own: Any) -> None:  # noqa: ANN401 - settings, and the token
    """Report an error of the only key at that time: by default, KIS's refusal without a recent request of ours."""
    state = state_of(at, own.pop("token", None), past)
    alerts.report(Settings.load().model_copy(update={"issue_interval": 60, **own}), state, error or limit(), at)


def resolve(at: datetime = MONDAY, past: Sequence[Attempt] = (), token: Token | None = None, **own: Any) -> None:  # noqa: ANN401 - as above
    """Report that the only key is in order at that time."""
    alerts.resolved(Settings.load().model_copy(update=own), state_of(at, token, past), at)


def answers(message: dict[str, Any]) -> dict[str, str]:
    """Return a message's labelled lines: each label with its text."""
    lines = message["blocks"][2]["text"]["text"].replace("\n•", " •").splitlines()
    return {name.lstrip("*"): text for name, _, text in (line.partition(":* ") for line in lines)}


def seen(message: object) -> str:
    """Return everything that Slack received, as text."""
    return json.dumps(message, ensure_ascii=False)


def test_the_texts_of_all_languages_say_the_same() -> None:
    """English and Korean have the same keys and facts; titles fit Slack's header, and limits name the 24-hour one."""
    english, korean = (
        {k: {one[1] for one in Formatter().parse(text)} - {None} for k, text in texts.items() if "happened." not in k}
        for texts in (ENGLISH, KOREAN)
    )
    assert english == korean
    assert {key.split(".")[1] for key in ENGLISH if key.startswith("cause.")} == set(causes.BY_NAME)
    for texts, limited in (ENGLISH, "24-hour limit"), (KOREAN, "24시간 한도"):
        titles = {name: texts[f"cause.{name}.title"] for name in causes.BY_NAME}
        longest = texts("head.reminded", gone=texts.lasted(1000 * HOUR), title=max(titles.values(), key=len))
        assert len(f":hourglass_flowing_sand: us+kr+hk+jp+cn+vn (paper): {longest}") < 150
        limits = ("limit", "foreign-limit", "ceiling", "restricted")
        assert [name for name in limits if limited not in titles[name]] == []


DEAD, LIVING = (make_token(age=2 * 3600, now=MONDAY, rejected=rejected) for rejected in (True, False))
OLD, OLDER = (make_token(age=hours * 3600, now=MONDAY) for hours in (20, 23))
# The error, the record and the token; then the expected cause.
CAUSES: dict[str, tuple[Exception, str, Token | None, str]] = {
    "KIS's refusal a minute after our request": (limit(), "issued 1, limit 0", None, "limit"),
    "KIS's refusal out of the blue": (limit(), "limit 0", None, "foreign-limit"),
    "refusals, the first out of the blue": (limit(), "issued 90, limit 2, limit 1, limit 0", None, "foreign-limit"),
    "a refusal after a request that never left": (limit(), "unreachable 1, limit 0", None, "foreign-limit"),
    "a refusal after an import": (limit(), "imported 1, limit 0", None, "foreign-limit"),
    "our own minute after a renewal": (limit(wait=0.13), "issued 0.87", None, "cool-down"),
    "our own minute after the same token": (limit(), "same 0.5", None, "cool-down"),
    "the pause after the same token": (limit("backoff", 4), "same 1.19", OLDER, "same"),
    "the minute after KIS was down": (limit(), "server_error 0", None, "kis-down"),
    "the pause after a dropped connection": (limit("backoff"), "no_answer 0", None, "kis-down"),
    "the pause after a wrong secret": (limit("backoff"), "bad_secret 0", None, "credentials"),
    "the ceiling": (limit("ceiling", 740), "issued 700, issued 60", None, "ceiling"),
    "the six hours of a dead token": (limit("same_token", 240), "issued 120", DEAD, "dead"),
    "the dead token again": (limit("same_token"), "issued 60, same 0", DEAD, "same-dead"),
    "no token that lasts, as the dead one came": (errors.TokenUnavailableError("x"), "same 0", DEAD, "same-dead"),
    "the six hours of a token that serves": (limit("same_token"), "same 0", LIVING, "unserved"),
    "a wrong key": (REFUSED, "bad_key 5", OLD, "credentials"),
    "a right key from an address that KIS does not allow": (REFUSED, "denied 5", OLD, "denied"),
    "the pause after that": (limit("backoff"), "denied 5", OLD, "denied"),
    "KIS being down": (DOWN, "unreachable 0", None, "kis-down"),
    "403 after two issues in a day": (DOWN, "issued 700, issued 60, refused 0", None, "restricted"),
    "403 after two issues, one of them yesterday": (DOWN, "issued 1500, issued 60, refused 0", None, "kis-down"),
    "the pause after that 403": (limit("backoff"), "issued 9, issued 8, refused 0", None, "restricted"),
    "a full disk": (STORE, "", None, "store"),
    "a missing setting": (SETTING, "", None, "settings"),
    "a need that is too long": (errors.TokenUnavailableError("No token lasts until then."), "", None, "unserved"),
    "Prefect being silent": (causes.SilenceError("It does not answer."), "", None, "silent"),
    "anything else": (RuntimeError("Unexpected KeyError at a.py:3; its text is withheld."), "", None, "unforeseen"),
}


@pytest.mark.parametrize("case", CAUSES)
def test_the_cause_is_what_the_error_comes_from(case: str) -> None:
    """A pause after a failure has the failure's cause; Prefect retries only when KIS is down or restricts the key."""
    error, past, token, expected = CAUSES[case]
    cause = causes.cause_of(error, state_of(MONDAY, token, past))
    tried_again = isinstance(causes.as_met(error, cause), errors.IssuerUnavailableError)
    assert (cause.name, tried_again) == (expected, expected in ("kis-down", "restricted"))


NOBODY = "none automatically: a person has to act first"
# Preview of the message: the time (KST) and the case above that lead to it; the next attempt, part of what to do.
PAGES: dict[str, tuple[str, str, str, str]] = {
    "no token · NASD opens in 9 min": ("23:21", "KIS being down", "23:22", "otherwise hold back the orders"),
    "no token · NASD open until 06:00 KST": ("23:40", "the minute after KIS was down", "23:41", "KIS's notices"),
    "no token · NASD opens in 8 min": ("23:22", "KIS's refusal out of the blue", "23:2", "hold back the orders"),
    "no token · KRX opens in 40 min": ("08:20", "our own minute after a renewal", "08:20", "Nothing, if the next"),
    "token until 09:15 KST · KRX opens in 40 min": ("08:20", "the pause after the same token", "08:23", "notices"),
    "token until 12:15 KST · KRX opens in 40 min": ("08:20", "a wrong key", NOBODY, "Correct KIS_APP_KEY"),
    "no token · KRX opens in 39 min": ("08:21", "the six hours of a dead token", "12:20", "refresh_token with force"),
    "no token · KRX opens in 38 min": ("08:22", "403 after two issues in a day", "20:42", "Ask KIS's support"),
    "no token · KRX opens in 37 min": ("08:23", "the ceiling", "20:43", "Run refresh_token with force now"),
}


@pytest.mark.parametrize("preview", PAGES)
def test_a_page_is_true_in_its_first_words_and_in_every_line(slack: SlackEndpoint, preview: str) -> None:
    """Preview, title, what still works, the next attempt and what to do fit the key's state, the error and the time."""
    clock, case, following, fix = PAGES[preview]
    error, past, token, cause = CAUSES[case]
    report(error, datetime.fromisoformat(f"2026-11-23T{clock}+09:00").astimezone(UTC), past, token=token)
    (sent,) = slack.messages
    said, title = answers(sent), f"us+kr: {ENGLISH[f'cause.{cause}.title']}"
    assert sent["text"].startswith(f"{preview} · {title}. ")
    assert slack.headlines == [title]
    assert sent["blocks"][1]["text"]["text"].startswith(f"*{preview}*\n")
    serves = f"the present token, until 2026-11-23 {preview[12:17]} KST"
    assert said["Still works"] == (serves if preview.startswith("token") else "nothing: there is no valid token")
    assert said["Next attempt"].startswith(following if following is NOBODY else f"about 2026-11-23 {following}")
    assert (fix in said["To do"], len(sent["blocks"])) == (True, 3)  # no link, as there is no run


def test_no_korean_alert_has_an_english_sentence(slack: SlackEndpoint) -> None:
    """No Korean alert or text has an English sentence, whatever the cause, KIS's answer, and the key or run."""
    for error, past, token, _ in CAUSES.values():
        report(error, MONDAY, past, token=token, slack_language="ko")
        Path("~/.tokencore/incidents.json").expanduser().unlink(missing_ok=True)
    alerts.report(Settings.load().model_copy(update={"slack_language": "ko"}), "KRX", SETTING, MONDAY)
    named = [one for one in causes.CAUSES if one is not causes.FOREIGN_TOKEN]  # whose text takes a time instead
    texts = [seen(slack.messages), *KOREAN.values()]
    assert [one.name for one in named if KOREAN[f"cause.{one.name}.title"] not in texts[0]] == []
    texts += [messages.happened(KOREAN, cause, "It is so.", (one, "EGW0")) for one in Outcome for cause in named]
    actions = [one.actions[0] for one in deployments.automations("ko", uuid4()).values()]
    texts += [f"{one.subject} | {one.body}" for one in actions if one.type == "send-notification"]
    plain = [re.sub(r"`[^`]*`|<[^>]*>|:[a-z_]+:|\{\w+\}|\*", "|", text) for text in texts]  # no code, link or icon
    assert [text for text in plain if re.search(r"[A-Za-z']+(?: [A-Za-z']+){2,}", text)] == []  # three words in a row


IN_KOREAN = {
    "the six hours of a dead token": "2026-11-23 12:20 KST부터 받을 수 있습니다.",
    "the ceiling": "2026-11-23 20:40 KST부터 다시 발급할 수 있습니다.",
    "the dead token again": "KIS가 거절한 접근토큰을 다시 반환했습니다.",
}


@pytest.mark.parametrize("case", IN_KOREAN)
def test_a_korean_alert_says_what_happened_and_when_a_limit_ends(slack: SlackEndpoint, case: str) -> None:
    """It says from when on KIS, or the own ceiling, allows a new token, and that the rejected one came back."""
    error, past, token, _ = CAUSES[case]
    report(error, MONDAY, past, token=token, slack_language="ko")
    assert IN_KOREAN[case] in seen(slack.messages)


class TestMessages:
    """The messages about trouble as it develops."""

    def test_a_korean_alert_has_all_facts(self, slack: SlackEndpoint) -> None:
        """It has KIS's code, the sessions at risk (nearest first, with local times), durations, setting and link."""
        os.environ |= {"PREFECT__RUNTIME__FLOW_RUN__ID": "0a1b", "PREFECT__RUNTIME__FLOW_RUN__NAME": "warm-up KRX"}
        with temporary_settings({PREFECT_UI_URL: "https://prefect.example.com/"}):
            report(slack_language="ko")
        resolve(MONDAY + 65 * MINUTE, slack_language="ko")
        report(SETTING, slack_language="ko")
        facts = (
            "토큰 없음 · KRX 개장 40분 전 · us+kr: 다른 프로그램이 이 앱키로",
            "1분당 1회 제한(EGW0).",
            "KRX: 2026-11-23 09:00 KST, 40분 후\\n• NASD, NYSE, AMEX: 2026-11-23 23:30 KST(현지 월 09:30), 15시간",
            "2026-11-23 08:20 KST부터 1시간 5분 동안",
            "설정을 사용할 수 없습니다. KIS_TIMEOUT",
        )
        assert [fact for fact in facts if fact not in seen(slack.messages)] == []
        assert "<https://prefect.example.com/runs/flow-run/0a1b|warm-up KRX>" in seen(slack.messages[0]["blocks"][3])

    def test_one_incident_is_one_message(self, slack: SlackEndpoint, caplog: pytest.LogCaptureFixture) -> None:
        """Ten runs that meet an incident at once report it once; its end is reported once, with how long it lasted."""
        caplog.set_level(logging.INFO)
        resolve()
        runs = [threading.Thread(target=report) for _ in range(10)]
        for act in (threading.Thread.start, threading.Thread.join):
            for run in runs:
                act(run)
        slack.answers = [404]
        for minutes in (95, 120, 150):
            resolve(MONDAY + minutes * MINUTE)
        assert slack.headlines == [LIMITED, LIMITED.replace(": ", ": solved: ", 1)]
        assert "It lasted 1 h 35 min, from 2026-11-23 08:20 KST." in seen(slack.messages[1])
        caplog.clear()
        for again in (report, report, resolve, resolve):
            again(slack_webhook_url="")
        logged = [line for line in caplog.messages if "us+kr: " in line]
        assert (["solved" in line for line in logged], len(slack.messages)) == ([False, True], 2)

    def test_one_recovery_is_one_message_whatever_happened_before(self, slack: SlackEndpoint) -> None:
        """KIS's limit, then KIS down, then a full disk are two alerts, as only the disk needs a person, and one end."""
        for minutes, error in enumerate((limit(), DOWN, STORE)):
            report(error, MONDAY + minutes * MINUTE)
        state = state_of(MONDAY + HOUR, make_token(now=MONDAY + HOUR))
        alerts.announce(state, "forced", by="Kim", why="it was revoked")
        alerts.resolved(Settings.load(), state, state.now)
        assert slack.headlines == [LIMITED, BROKEN, "us+kr: refreshed manually, with force"]
        said = answers(slack.messages[2])
        assert said["Solved"] == f"{BROKEN[7:]} (1 h 00 min)"
        assert (said["Why"], said["Works now"]) == ("it was revoked", "the present token, until 2026-11-24 09:15 KST")
        assert "Kim asked for it, 2026-11-23 09:20 KST." in seen(slack.messages[2])

    def test_a_token_that_someone_else_issued_is_reported_once_and_ends_their_limit(self, slack: SlackEndpoint) -> None:
        """One message reports a foreign token and ends the limit, without reminders; our own next token ends it."""
        report()
        token = make_token(age=3600, now=MONDAY)
        for hours in (0, 1, 2):
            resolve(MONDAY + hours * HOUR, [Attempt(MONDAY, Outcome.SAME, expires_at=token.expires_at)], token)
        resolve(MONDAY + 3 * HOUR)
        assert slack.headlines == [LIMITED, FOREIGN, FOREIGN.replace(": ", ": solved: ", 1)]
        assert "issued at 2026-11-23 07:20 KST" in seen(slack.messages[1])

    def test_refused_credentials_are_not_over_while_the_token_serves(self, slack: SlackEndpoint) -> None:
        """A check that finds the present token in order does not report the refusal solved; KIS's next issue does."""
        report(REFUSED, past="bad_key 5", token=LIVING)
        for past, sent in (("bad_key 5", 1), ("issued 0", 2)):
            resolve(MONDAY, attempted(past, MONDAY), LIVING)
            assert len(slack.messages) == sent

    def test_a_corrected_app_key_ends_the_incident(self, slack: SlackEndpoint) -> None:
        """A market's trouble ends once it is in order with another app key, as people correct a wrong one."""
        report(REFUSED, past="bad_key 5")
        os.environ["KIS_APP_KEY"] = "another-key-" * 3
        resolve()
        assert (len(slack.messages), "solved" in slack.headlines[-1]) == (2, True)

    def test_a_page_calls_who_is_named(self, slack: SlackEndpoint) -> None:
        """SLACK_MENTION is only in messages that cannot wait, and the preview still begins with the fact."""
        mention: dict[str, Any] = {"slack_mention": "<!channel> <@U024BE7LH>"}
        for at in (EVENING, MONDAY):
            report(at=at, **mention)
        resolve(MONDAY, **mention)
        settings = Settings.load().model_copy(update=mention)
        for at in (EVENING, MONDAY - HOUR / 3):
            alerts.report(settings, "Prefect", causes.SilenceError("It is dead."), at)
        called = [mention["slack_mention"] in seen(one) for one in slack.messages]
        assert called == [False, True, False, False, True]
        assert slack.messages[1]["blocks"][1]["text"]["text"].startswith("<!channel> <@U024BE7LH> *no token · KRX")
        assert "• KRX: 2026-11-23 09:00 KST, in 1 h 00 min" in seen(slack.messages[4])

    def test_trouble_that_came_to_no_key_denies_no_token(self, slack: SlackEndpoint) -> None:
        """Where no token was looked at, the alert and its end say that cached tokens serve until they expire."""
        alerts.report(Settings.load(), "KRX", SETTING, MONDAY)
        alerts.resolved(Settings.load(), "KRX", MONDAY + 5 * MINUTE)
        before, after = map(answers, slack.messages)
        assert before["Still works"] == after["Works now"] == "cached tokens, until they expire"
        assert slack.messages[0]["text"].startswith("KRX opens in 40 min · KRX: A setting is missing or wrong.")

    def test_a_broken_folder(self, slack: SlackEndpoint) -> None:
        """An incident is reported even if it cannot be stored, and also if the stored incidents are damaged."""
        (home := Path("~/.tokencore").expanduser()).mkdir(mode=0o700)
        (home / "incidents.json").write_text('{"incidents": [3, {"subject": "us"}]}')
        report(STORE)
        os.environ["KIS_TOKEN_DIR"] = str(home / "incidents.json")  # no folder
        settings = Settings.load()
        assert alerts.report(settings, Key.load(settings)[0], STORE, MONDAY) is STORE
        assert slack.headlines == [BROKEN, BROKEN]

    def test_foreign_words_act_on_nothing(self, slack: SlackEndpoint, caplog: pytest.LogCaptureFixture) -> None:
        """Slack's markup is escaped, characters that reverse text or clear a terminal are removed, long text is cut."""
        report(errors.TokenUnavailableError("<!channel> R&D <http://x|y> \x1b[2J\u202edcba" + "&" * 5000))
        sent = seen(slack.messages[0])
        assert ("&lt;!channel&gt; R&amp;D" in sent, "<!channel>" in sent) == (True, False)
        assert not [sign for sign in "\x1b\u202e" if sign in sent + caplog.text]
        assert len(slack.messages[0]["blocks"][1]["text"]["text"]) < 3000


# Slack's status and word, or 0 and a webhook address where nobody answers; what the log says to do about it.
REFUSALS: dict[str, tuple[int, str, str]] = {
    "channel_is_archived": (410, "channel_is_archived", "unarchive it"),
    "invalid_blocks": (400, "invalid_blocks", "bug in tokencore"),
    "HTTP 404": (404, "<html>", "make a new webhook"),
    "HTTP 418": (418, "teapot", "alerts are sent again"),
    "URLError": (0, "http://127.0.0.1:1" + HOOK, "this machine's network"),
    "SlackRequestError": (0, "ftp://hooks.slack.com/canary-of", "it is not an address"),
    "InvalidURL": (0, "http://127.0.0.1:9/canary of", "it is not an address"),
    "ValueError": (0, "hooks.slack.com/canary-of", "it is not an address"),
}


def test_a_bot_speaks_in_its_channel_and_goes_on_in_the_thread(
    slack: SlackEndpoint, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bot's later messages go to the thread; those that call people, or that it refuses, show in the channel."""
    monkeypatch.setattr(alerts.slack, "API", slack.url)
    os.environ |= {"SLACK_BOT_TOKEN": BOT, "SLACK_CHANNEL": "#tokens"}
    caplog.set_level(logging.DEBUG)
    for hours, refused in (0, ""), (1, "thread_not_found"), (4.75, ""), (8.7, ""), (8.8, ""):
        slack.bot_answers = [{"ok": False, "error": refused}] * bool(refused)
        report(at=EVENING + hours * HOUR)  # on the evening before; KRX's need starts at 08:30
    slack.bot_answers = [{"ok": False, "error": "is_archived"}] * 2  # in the thread and in the channel
    for hours in (9, 10):
        resolve(EVENING + hours * HOUR)
    assert "Slack did not accept the message (is_archived): the channel is archived" in caplog.text
    icons = [one["blocks"][0]["text"]["text"].split()[0].strip(":") for one in slack.messages]
    assert icons == ["warning", "hourglass_flowing_sand", *["rotating_light"] * 2, "white_check_mark"]
    levels = [line.levelname for line in caplog.records if line.message.startswith("us+kr: ")]
    assert levels == ["ERROR", "WARNING", "ERROR", "ERROR", "INFO", "INFO"]  # the last twice, as Slack refused it
    assert [(one["channel"], one.get("thread_ts"), one.get("reply_broadcast")) for one in slack.messages] == [
        *[("#tokens", None, None)] * 2,
        *((CHANNEL, "2.0", broadcast) for broadcast in (False, True, False)),
    ]
    assert set(slack.asked) == {("/chat.postMessage", f"Bearer {BOT}")}  # not the webhook, although it is set
    assert BOT not in caplog.text


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_slack_is_asked_once_more(slack: SlackEndpoint, status: int) -> None:
    """A rate limit (after its Retry-After) or a server error of Slack's is retried once."""
    slack.answers, slack.retry_after = [status], 0
    report()
    assert (len(slack.asked), len(slack.messages)) == (2, 1)


@pytest.mark.parametrize("named", REFUSALS)
def test_what_the_webhook_refuses_is_named_with_what_to_do(
    slack: SlackEndpoint, caplog: pytest.LogCaptureFixture, named: str
) -> None:
    """The log has Slack's word, the HTTP status or the error, never the address; the next run sends the alert."""
    caplog.set_level(logging.DEBUG)
    status, word, fix = REFUSALS[named]
    slack.answers = [(status, word)] * bool(status)
    own: dict[str, Any] = {} if status else {"slack_webhook_url": SecretStr(word)}
    report(**own)
    for minutes in (5, 10):
        report(at=MONDAY + minutes * MINUTE)
    assert re.search(rf"Slack did not accept the message \({named}\): .*{fix}", caplog.text)
    assert "canary-of" not in caplog.text
    assert len(slack.messages) == 1


def test_a_silent_slack_delays_no_run_for_long(slack: SlackEndpoint, caplog: pytest.LogCaptureFixture) -> None:
    """A Slack that never answers costs an alert a few seconds, and a second alert no more than that."""
    slack.answers = [0, 0, 0, 0]
    for _ in range(2):
        begun = time.monotonic()
        report()
        assert time.monotonic() - begun < 8
    assert "Slack has not answered within 3 s; the run goes on." in caplog.text
    assert slack.messages == []


def test_a_run_that_cannot_send_because_others_are_sending_says_so(
    slack: SlackEndpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """A run waits a little for others that hold the incidents, then goes on, without blaming Slack."""
    with open_document(Settings.load(), "incidents").lock(wait=1):
        report()
    assert "Other runs are sending alerts; the next run reports what is still wrong." in caplog.messages
    assert ("Slack has not answered" in caplog.text, slack.asked) == (False, [])


def test_what_slack_took_before_an_error_is_noted(slack: SlackEndpoint) -> None:
    """If the work on incidents fails midway, its changes so far are stored, so that no sent message is sent again."""

    def fail_midway(known: list[Incident]) -> None:
        known.clear()
        raise RuntimeError

    report()
    alerts._hold(Settings.load(), fail_midway)  # noqa: SLF001 - where an error cannot be brought about otherwise
    report()
    assert len(slack.messages) == 2, "the incident was forgotten, so it is new"


def story(cause: Cause, need: datetime | None, looks: list[datetime]) -> list[tuple[datetime, Notification]]:
    """Return the messages of an incident that runs meet at `looks`; after `need` has begun, it is the next day's."""
    known: list[Incident] = []
    found = []
    for now, later in zip(looks, [*looks[1:], looks[-1] + HOUR], strict=True):
        coming = need + (24 * HOUR if now >= need else timedelta(0)) if need else None
        one, sent = met(known, "us", cause, coming, now, later)
        if sent:
            found.append((now, sent))
            one.notified(sent, now, None)
            assert incidents.due(one, cause, now, later) is None
    return found


# Cause, start of the need, hours that it lasts; each message's hour, kind and stage, with `!` if it calls people.
STORIES: dict[str, tuple[Cause, datetime | None, int, str]] = {
    "half of the lead of six hours, the last look before half an hour, and the next day's need anew": (
        *(causes.CREDENTIALS, NEED, 20),
        "0 opened 0, 1 reminded 0, 3 escalated 1!, 5 escalated 2!, 8 reminded 0, 14 reminded 0, 18 escalated 1",
    ),
    "who has hours is not called": (
        *(causes.CREDENTIALS, NEED + 10 * HOUR, 16),
        "0 opened 0, 1 reminded 0, 4 reminded 0, 8 escalated 1, 14 reminded 1, 15 escalated 2!",
    ),
    "without a need: reminders after 1, 3, 6, 12 and 24 hours, then daily": (
        *(causes.SETTINGS, None, 96),
        "0 opened 0, " + ", ".join(f"{at} reminded 0" for at in (1, 4, 10, 22, 46, 70, 94)),
    ),
    "an outage is reported once it is urgent": (causes.DOWN, NEED, 6, "3 opened 1!, 4 reminded 1, 5 escalated 2!"),
    "a foreign token endangers nothing by itself": (causes.FOREIGN_TOKEN, None, 30, "0 opened 0"),
    "what only a person can end calls with a need within hours": (causes.CREDENTIALS, ANCHOR + NEAR, 1, "0 opened 0!"),
    "what may end by itself does not": (causes.LIMIT, ANCHOR + NEAR, 1, "0 opened 0"),
    "before it is the last call": (causes.LIMIT, ANCHOR + ACT, 1, "0 opened 2!"),
}


@pytest.mark.parametrize(("cause", "need", "hours", "expected"), STORIES.values(), ids=list(STORIES))
def test_people_hear_of_an_incident(cause: Cause, need: datetime | None, hours: int, expected: str) -> None:
    """An incident that the hourly check keeps meeting is opened, repeated and escalated at the table's hours."""
    found = story(cause, need, [ANCHOR + n * HOUR for n in range(hours)])
    said = [f"{(at - ANCHOR) // HOUR} {one.kind} {one.stage}{'!' * one.page}" for at, one in found]
    assert ", ".join(said) == expected


@given(
    lead=st.integers(1, 40 * 60),
    pauses=st.lists(st.integers(1, 60), min_size=1, max_size=120),
    cause=st.sampled_from(causes.CAUSES),
)
def test_whatever_the_times_nothing_is_reported_twice(lead: int, pauses: list[int], cause: Cause) -> None:
    """There is one opening, each stage comes once and in order, and reminders keep their least distance."""
    need = ANCHOR + lead * MINUTE
    looks = [at for n in range(len(pauses) + 1) if (at := ANCHOR + sum(pauses[:n]) * MINUTE) < need]
    found = story(cause, need, looks)
    assert [sent.kind for _, sent in found].count("opened") == bool(found)
    stages = [sent.stage for _, sent in found if sent.kind != "reminded"]
    assert stages == sorted(set(stages))
    for (before, _), (at, sent) in pairwise(found):
        assert sent.kind != "reminded" or at - before >= REMINDERS[0] - PUNCTUALITY
    if looks[-1] >= need - ACT:
        assert next(at for at, sent in found if sent.stage == LAST_CALL) <= max(need - ACT, ANCHOR)


# Hours after the start; the subject, the trouble or `over`; the message, or the incident that has ended.
OUTAGE = """
0 us limit opened, 0 kr kis-down -, 0.3 kr over -, 0.5 us kis-down -, 0.5 us cool-down -, 0.5 us restricted -,
0.5 us credentials opened, 0.6 us over credentials, 0.7 us credentials -, 0.8 us over credentials, 0.9 us kis-down -,
168.9 us kis-down opened
"""


def test_one_outage_is_one_incident_whatever_kis_answers() -> None:
    """A new cause is reported only if it needs a person; trouble that returns never ended; after a week it is new."""
    known: list[Incident] = []
    for hours, subject, what, expected in (one.split() for one in OUTAGE.split(",")):
        now = ANCHOR + float(hours) * HOUR
        if what == "over":
            ended = over(known, subject, "", now, foreign=False, lasting=False)
            assert [(one.cause, one.opened_at) for one in ended] == ([(expected, ANCHOR)] if expected != "-" else [])
            continue
        one, sent = met(known, subject, causes.BY_NAME[what], None if subject == "us" else NEED, now, now + HOUR)
        assert (sent.kind if sent else "-") == expected
        if sent:
            one.notified(sent, now, None)
    assert [(one.subject, one.closed_at) for one in known] == [("us", None)]
