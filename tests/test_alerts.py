"""Alerts: why there is trouble, what people read of it, how often, and that no run waits or fails for Slack."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from builders import make_token
from hypothesis import given
from hypothesis import strategies as st
from prefect.settings import PREFECT_UI_URL, temporary_settings
from servers import CHANNEL, HOOK, SlackEndpoint

from flows import alerts
from flows.alerts import causes, messages
from flows.alerts.causes import as_met, cause_of
from flows.alerts.incidents import (
    ACT,
    CALM,
    FORGOTTEN,
    HALF,
    LAST_CALL,
    NEAR,
    PUNCTUALITY,
    REMINDERS,
    Busy,
    Incident,
    Notification,
    changing,
    due,
    met,
    new,
    over,
    parse,
)
from flows.stack import deployments
from tokencore import (
    ConfigurationError,
    CredentialsError,
    IssuanceLimitError,
    IssuerUnavailableError,
    Key,
    KeyState,
    Settings,
    TokenStoreError,
    TokenUnavailableError,
    open_document,
    outlook,
)
from tokencore.attempts import Attempt, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flows.alerts.causes import Cause
    from tokencore.tokens import Token

MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)
MONDAY = datetime(2026, 11, 22, 23, 20, tzinfo=UTC)  # 08:20 in Seoul, 40 minutes before KRX opens
EVENING = datetime(2026, 11, 22, 14, 30, tzinfo=UTC)  # nine hours before KRX's need
NEW_YORK = datetime(2026, 11, 23, 14, 30, tzinfo=UTC)  # Monday's open there, 23:30 in Seoul
ANCHOR = datetime(2026, 11, 23, 7, 35, tzinfo=UTC)  # 16:35 in Seoul
NEED = ANCHOR + timedelta(hours=6)
FOREIGN = "us+kr: Someone else has issued a token with this key"
LIMITED = "us+kr: Someone else issues with this key (minute limit, not 24-hour limit)"
DOWN, STORE = IssuerUnavailableError("KIS reported a fault of its own."), TokenStoreError("The disk is full.")
REFUSED = CredentialsError("KIS does not know the app key (EGW00103).")
SETTING = ConfigurationError("KIS_TIMEOUT cannot be used: it is no number.")
BOT = "xoxb-canary-of-the-bot"
gateway = pytest.mark.usefixtures("gateway")


def limit(cause: str = "minute", retry_at: datetime | None = None) -> IssuanceLimitError:
    """The error of that rule."""
    return IssuanceLimitError("KIS refused to issue (EGW00133). There is no token.", retry_at=retry_at, cause=cause)


def record(text: str, now: datetime = MONDAY) -> list[Attempt]:
    """Attempts as `issued 60, limit 0`: their outcome, and minutes before `now`."""
    words = [one.split() for one in text.split(", ") if one]
    return [Attempt(now - float(ago) * MINUTE, Outcome(outcome), "EGW0", credentials="x") for outcome, ago in words]


def state_of(now: datetime, token: Token | None = None, attempts: str | list[Attempt] = "") -> KeyState:
    """The state of the settings' only key with this token and record."""
    (key,) = Key.load(Settings.load())
    key.market.settings.issue_interval = 60  # whatever this process's gateway has
    known = record(attempts, now) if isinstance(attempts, str) else attempts
    own = [one._replace(credentials=key.renewer.credentials) for one in known]
    ahead = outlook.look(token, token.issued_at if token else None, key.horizon(key.exchanges, now), key.market, now)
    return KeyState(key, now, token, "", own, ahead)


def report(error: Exception | None = None, at: datetime = MONDAY, attempts: str = "limit 0.1", **settings: Any) -> None:  # noqa: ANN401 - as the settings have them
    """Report KIS's refusal out of the blue, or another error, of the only key, which has no token at that time."""
    own = Settings.load().model_copy(update=settings)
    alerts.report(own, state_of(at, attempts=attempts), error or limit(), at)


def resolve(
    at: datetime = MONDAY,
    token: Token | None = None,
    attempts: str | list[Attempt] = "",
    **settings: Any,  # noqa: ANN401 - as above
) -> None:
    """Report that the only key is well at that time."""
    alerts.resolved(Settings.load().model_copy(update=settings), state_of(at, token, attempts), at)


def answers(message: dict[str, Any]) -> dict[str, str]:
    """The questions of a message with their answers."""
    lines = message["blocks"][2]["text"]["text"].replace("\n•", " •").splitlines()
    return {name.lstrip("*"): text for name, _, text in (line.partition(":* ") for line in lines)}


def test_the_texts_of_all_languages_say_the_same() -> None:
    """Korean has English's keys, each with the same facts in it; only what happened it says in its own way.

    Who looks for the 24-hour limit finds it in the title of every alert of a limit, in either language.
    """
    english, korean = (
        {key: {field for _, field, _, _ in Formatter().parse(text) if field} for key, text in texts.items()}
        for texts in messages.LANGUAGES.values()
    )
    assert {k: v for k, v in english.items() if "happened." not in k} == {
        k: v for k, v in korean.items() if "happened." not in k
    }
    assert {key.split(".")[1] for key in english if key.startswith("cause.")} == set(causes.BY_NAME)
    for cause in (causes.LIMIT, causes.FOREIGN_LIMIT, causes.CEILING, causes.RESTRICTED):
        assert "24-hour limit" in messages.LANGUAGES["en"][f"cause.{cause.name}.title"]
        assert "24시간 한도" in messages.LANGUAGES["ko"][f"cause.{cause.name}.title"]


CAUSES: dict[str, tuple[Exception, str, Cause]] = {
    "KIS's refusal a minute after our request": (limit(), "issued 1, limit 0", causes.LIMIT),
    "KIS's refusal out of the blue": (limit(), "issued 90, limit 0", causes.FOREIGN_LIMIT),
    "KIS's refusal of the first request ever": (limit(), "limit 0", causes.FOREIGN_LIMIT),
    "refusals, the first out of the blue": (limit(), "issued 90, limit 2, limit 1, limit 0", causes.FOREIGN_LIMIT),
    "a refusal after a request that never left": (limit(), "unreachable 1, limit 0", causes.FOREIGN_LIMIT),
    "a refusal after an import": (limit(), "imported 1, limit 0", causes.FOREIGN_LIMIT),
    "our own minute after a renewal": (limit(), "issued 0", causes.WAITING),
    "our own minute after the same token": (limit(), "same 0.5", causes.WAITING),
    "the pause after the same token": (limit("backoff"), "same 1.2", causes.SAME),
    "the minute after KIS was down": (limit(), "server_error 0", causes.DOWN),
    "the pause after a dropped connection": (limit("backoff"), "no_answer 0", causes.DOWN),
    "the pause after a wrong secret": (limit("backoff"), "bad_secret 0", causes.CREDENTIALS),
    "the ceiling": (limit("ceiling"), "issued 60, issued 0", causes.CEILING),
    "the six hours, without a token": (limit("same_token"), "issued 0", causes.DEAD),
    "a wrong key": (REFUSED, "bad_key 0", causes.CREDENTIALS),
    "KIS being down": (DOWN, "unreachable 0", causes.DOWN),
    "403 after one issue": (DOWN, "issued 60, refused 0", causes.DOWN),
    "403 after two issues in a day": (DOWN, "issued 700, issued 60, refused 0", causes.RESTRICTED),
    "403 after two issues, one of them yesterday": (DOWN, "issued 1500, issued 60, refused 0", causes.DOWN),
    "the pause after that 403": (limit("backoff"), "issued 9, issued 8, refused 0", causes.RESTRICTED),
    "a full disk": (STORE, "", causes.STORE),
    "a missing setting": (SETTING, "", causes.SETTINGS),
    "a need that is too long": (TokenUnavailableError("No token lasts until then."), "", causes.UNSERVED),
    "Prefect being silent": (causes.SilenceError("It does not answer."), "", causes.SILENT),
    "anything else": (RuntimeError("Unexpected KeyError at a.py:3; its text is withheld."), "", causes.UNFORESEEN),
}


@pytest.mark.parametrize(("error", "attempts", "expected"), CAUSES.values(), ids=list(CAUSES))
def test_the_cause_is_what_the_error_comes_from(error: Exception, attempts: str, expected: Cause) -> None:
    """A pause after a failure is no cause of its own, and only KIS giving no token is worth another try by Prefect."""
    assert cause_of(error, record(attempts)) is expected
    tried_again = isinstance(as_met(error, expected), IssuerUnavailableError)
    assert tried_again == (expected in (causes.DOWN, causes.RESTRICTED))


def test_a_dead_token_is_told_from_one_that_kis_returned() -> None:
    """Within the six hours nobody asks; who asked and got the dead one again knows more."""
    dead, returned = make_token(age=3600, now=MONDAY, rejected=True), record("issued 60, same 0")
    assert cause_of(limit("same_token"), record("issued 60"), dead) is causes.DEAD
    assert cause_of(limit("same_token"), returned, dead) is causes.SAME_DEAD
    assert cause_of(TokenUnavailableError("x"), returned, dead) is causes.SAME_DEAD
    assert cause_of(limit("same_token"), record("same 0"), make_token(age=3600, now=MONDAY)) is causes.UNSERVED


NOTHING, NONE = "nothing: there is no valid token", "none automatically: a person has to act first"
DEAD = make_token(age=2 * 3600, now=NEW_YORK - HOUR, rejected=True)
# When, the token's age in hours, the record, the error; preview, title, what works, what is next, a part of what to do.
PAGES: dict[str, tuple[datetime, Token | None, str, Exception, str, str, str, str, str]] = {
    "KIS down, 9 min to the open": (
        *(NEW_YORK - 9 * MINUTE, None, "server_error 0.1", DOWN),
        *("no token · NASD opens in 9 min", "KIS gives no token", NOTHING, "about 2026-11-23 23:21 KST", "hold back"),
    ),
    "KIS down amid the session": (
        *(NEW_YORK + 10 * MINUTE, None, "server_error 0.1", DOWN),
        *("no token · NASD open until 06:00 KST", "KIS gives no token", NOTHING, "about 2026-11-23 23:40", "notices"),
    ),
    "52 s after the last request": (
        *(MONDAY, None, "issued 0.87", limit(retry_at=MONDAY + 8 * MINUTE / 60)),
        *("no token · KRX opens in 40 min", "No new token yet: the key's last request was less than a minute ago"),
        *(NOTHING, "about 2026-11-23 08:20 KST", "Nothing, if the next attempt succeeds."),
    ),
    "71 s after the same token came back": (
        *(MONDAY, make_token(age=23 * 3600, now=MONDAY), "same 1.19", limit("backoff", MONDAY + 4 * MINUTE)),
        *("token until 09:15 KST · KRX opens in 40 min", "KIS returned the present token again instead of a new one"),
        *("the present token, until 2026-11-23 09:15 KST", "about 2026-11-23 08:23 KST", "KIS's notices"),
    ),
    "a wrong key, and a token that serves on": (
        *(MONDAY, make_token(age=20 * 3600, now=MONDAY), "bad_key 5", REFUSED),
        *("token until 12:15 KST · KRX opens in 40 min", "KIS refuses the app key or its secret"),
        *("the present token, until 2026-11-23 12:15 KST", NONE, "Correct KIS_APP_KEY"),
    ),
    "a token killed two hours after its issue": (
        *(NEW_YORK - HOUR, DEAD, "issued 120", limit("same_token", NEW_YORK + 3 * HOUR)),
        *("no token · NASD opens in 1 h 00 min", "KIS rejects the token, and issues no other yet"),
        *(NOTHING, "about 2026-11-24 02:30 KST", "refresh_token with force"),
    ),
    "403 after two issues in a day": (
        *(MONDAY, None, "issued 700, issued 60, refused 0.1", DOWN),
        *("no token · KRX opens in 40 min", "24-hour limit: KIS refuses the key after more than one token in a day"),
        *(NOTHING, "about 2026-11-23 20:40 KST", "Ask KIS's support"),
    ),
    "the ceiling": (
        *(MONDAY, None, "issued 700, issued 60", limit("ceiling", MONDAY + 740 * MINUTE)),
        *("no token · KRX opens in 40 min", "24-hour limit reached: no new token for now (KIS_MAX_ISSUES_PER_DAY)"),
        *(NOTHING, "about 2026-11-23 20:40 KST", "Run refresh_token with force now"),
    ),
    "another program refused us, 9 min to the open": (
        *(NEW_YORK - 9 * MINUTE, None, "limit 0.1", limit()),
        *("no token · NASD opens in 9 min", "Someone else issues with this key (minute limit, not 24-hour limit)"),
        *(NOTHING, "about 2026-11-23 23:2", "hold back the orders"),
    ),
}


@pytest.mark.parametrize("page", PAGES.values(), ids=list(PAGES))
@gateway
def test_a_page_is_true_in_its_first_words_and_in_every_line(slack: SlackEndpoint, page: tuple[Any, ...]) -> None:
    """Preview, title, what works, what is next and what to do follow from the key's state, the error and the time."""
    now, token, attempts, error, preview, title, works, following, do = page
    alerts.report(Settings.load(), state_of(now, token, attempts), error, now)
    (sent,) = slack.messages
    said = answers(sent)
    assert sent["text"].startswith(f"{preview} · us+kr: {title}. ")
    assert slack.headlines == [f"us+kr: {title}"]
    assert sent["blocks"][1]["text"]["text"].startswith(f"*{preview}*\n")
    assert (said["Still works"], said["Next attempt"][: len(following)]) == (works, following)
    assert do in said["To do"]


def english(text: str) -> list[str]:
    """The English sentences in a Korean text: three words in a row that are no command, link or name of a run."""
    return re.findall(r"[A-Za-z']+(?: [A-Za-z']+){2,}", re.sub(r"`[^`]*`|<[^>]*>|:[a-z_]+:|\*", "|", text))


@gateway
def test_no_korean_alert_has_an_english_sentence(slack: SlackEndpoint) -> None:
    """Whatever the cause and KIS's answer, opened, repeated, ended, of a refresh, a test or Prefect itself."""
    settings = Settings.load().model_copy(update={"slack_language": "ko", "slack_mention": "<!here>"})
    texts, file = messages.LANGUAGES["ko"], Path("~/.tokencore/incidents.json").expanduser()
    for error, attempts, cause in CAUSES.values():
        at, state = MONDAY + 2 * HOUR, state_of(MONDAY, attempts=attempts)
        alerts.report(settings, state, error, MONDAY)
        alerts.report(settings, state_of(at, attempts=attempts), error, at)
        alerts.announce(settings, state, "failed", by="", why="", error=error)
        alerts.resolved(settings, state_of(at, make_token(now=at)), at)
        assert texts[f"cause.{cause.name}.title"] in json.dumps(slack.messages, ensure_ascii=False)
        file.unlink(missing_ok=True)
    for who in ("KRX", "Prefect", "check_tokens", "refresh_token us"):
        alerts.report(settings, who, SETTING, MONDAY)
    token = make_token(age=3600, now=MONDAY)
    resolve(MONDAY, token, [Attempt(MONDAY, Outcome.SAME, expires_at=token.expires_at)], slack_language="ko")
    for kind in ("renewed", "forced", "same"):
        alerts.announce(settings, state_of(MONDAY, token), kind, by="", why="")
    alerts.slack.send(settings, messages.test(texts, "<!here>", MONDAY))
    assert len(slack.messages) >= 4 * len(CAUSES)
    seen = [json.dumps(one, ensure_ascii=False) for one in slack.messages]
    named = [one for one in causes.CAUSES if one is not causes.FOREIGN_TOKEN]  # whose text has a time instead
    seen += [messages.happened(texts, cause, "It is so.", (one, "EGW0")) for one in Outcome for cause in named]
    actions = [one.actions[0] for one in deployments.automations("ko", uuid4()).values()]
    seen += [f"{one.subject} | {one.body}" for one in actions if one.type == "send-notification"]
    assert {text: english(text) for text in seen if english(text)} == {}


@gateway
class TestMessages:
    """What is reported over time."""

    def test_an_alert_names_the_sessions_at_risk_and_leads_to_its_run(
        self, slack: SlackEndpoint, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In KST, with the exchange's own time where it is abroad, the nearest first; the link by PREFECT_UI_URL."""
        monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", "0a1b")
        monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__NAME", "warm-up KRX 2026-11-23")
        with temporary_settings({PREFECT_UI_URL: "https://prefect.example.com/"}):
            report()
        assert answers(slack.messages[0])["Sessions at risk"].startswith(
            " • KRX: 2026-11-23 09:00 KST, in 40 min • NASD, NYSE, AMEX: 2026-11-23 23:30 KST (Mon 09:30"
        )
        assert "EGW00133" in slack.messages[0]["blocks"][1]["text"]["text"]
        link = "<https://prefect.example.com/runs/flow-run/0a1b|warm-up KRX 2026-11-23>"
        assert slack.messages[0]["blocks"][3]["elements"][0]["text"] == f"Run: {link}"

    def test_one_incident_is_one_message_and_its_end_another(
        self, slack: SlackEndpoint, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Met again, by ten runs at once, it is not reported again; its end is, once, with its length when it ended.

        That is what Slack gets where it does not accept the first message of it; without Slack the log has the same.
        """
        caplog.set_level(logging.INFO)
        resolve()
        runs = [threading.Thread(target=report) for _ in range(10)]
        for run in runs:
            run.start()
        for run in runs:
            run.join()
        slack.answers = [404]
        for minutes in (95, 120, 150):
            resolve(MONDAY + minutes * MINUTE)
        assert slack.headlines == [LIMITED, LIMITED.replace(": ", ": solved: ", 1)]
        assert "It lasted 1 h 35 min, from 2026-11-23 08:20 KST." in json.dumps(slack.messages[1])
        caplog.clear()
        for _ in range(2):
            report(slack_webhook_url="")
        for _ in range(2):
            resolve(slack_webhook_url="")
        logged = [line for line in caplog.messages if "us+kr: " in line]
        assert (["solved" in line for line in logged], len(slack.messages)) == ([False, True], 2)

    def test_one_recovery_is_one_message_whatever_happened_before(self, slack: SlackEndpoint) -> None:
        """KIS's limit, then KIS down, then a full disk: two alarms, as the disk takes a person, and one end.

        That of a refresh says who had which token refreshed, when, why, what works now, and what that solved.
        """
        for minutes, error in enumerate((limit(), DOWN, STORE)):
            report(error, MONDAY + minutes * MINUTE)
        state = state_of(MONDAY + HOUR, make_token(now=MONDAY + HOUR))
        alerts.announce(Settings.load(), state, "forced", by="Kim", why="it was revoked")
        alerts.resolved(Settings.load(), state, state.now)
        broken = "The token directory cannot be used"
        assert slack.headlines == [LIMITED, f"us+kr: {broken}", "us+kr: refreshed manually, with force"]
        said = answers(slack.messages[2])
        assert said["Solved"] == f"{broken} (1 h 00 min)"
        assert (said["Why"], said["Works now"]) == ("it was revoked", "the present token, until 2026-11-24 09:15 KST")
        assert "Kim asked for it, 2026-11-23 09:20 KST." in json.dumps(slack.messages[2])

    def test_a_token_that_someone_else_issued_is_reported_once_and_ends_their_limit(self, slack: SlackEndpoint) -> None:
        """One message instead of two, no reminder, and its end with our own next token."""
        report()
        token = make_token(age=3600, now=MONDAY)
        for hours in (0, 1, 2):
            resolve(MONDAY + hours * HOUR, token, [Attempt(MONDAY, Outcome.SAME, expires_at=token.expires_at)])
        assert slack.headlines == [LIMITED, FOREIGN]
        assert "issued at 2026-11-23 07:20 KST" in json.dumps(slack.messages[1])
        resolve(MONDAY + 3 * HOUR)
        assert slack.headlines[2:] == [FOREIGN.replace(": ", ": solved: ", 1)]

    def test_refused_credentials_are_not_over_while_the_token_serves(self, slack: SlackEndpoint) -> None:
        """A check that finds the present token in order does not call them solved; the next answer of KIS does."""
        token = make_token(now=MONDAY)
        alerts.report(Settings.load(), state_of(MONDAY, token, "bad_key 5"), REFUSED, MONDAY)
        for attempts, sent in (("bad_key 5", 1), ("issued 0", 2)):
            resolve(MONDAY, token, attempts)
            assert len(slack.messages) == sent

    def test_a_page_calls_who_is_named(self, slack: SlackEndpoint) -> None:
        """SLACK_MENTION stands in what cannot wait, and nowhere else; the preview begins with the fact anyway."""
        mention: dict[str, Any] = {"slack_mention": "<!channel> <@U024BE7LH>"}
        for at in (EVENING, MONDAY):
            report(at=at, **mention)
        resolve(MONDAY, **mention)
        assert ["<!channel> <@U024BE7LH>" in json.dumps(one) for one in slack.messages] == [False, True, False]
        assert slack.messages[1]["text"].startswith("no token · KRX opens in 40 min · ")
        assert slack.messages[1]["blocks"][1]["text"]["text"].startswith(
            "<!channel> <@U024BE7LH> *no token · KRX opens"
        )

    def test_a_korean_alert_has_the_same_facts(self, slack: SlackEndpoint) -> None:
        """KIS's code, spans and days as people write them, and the setting that is wrong by its name."""
        report(slack_language="ko")
        resolve(MONDAY + 65 * MINUTE, slack_language="ko")
        report(SETTING, slack_language="ko")
        assert slack.messages[0]["text"].startswith("토큰 없음 · KRX 개장 40분 전 · us+kr: 다른 프로그램이 이 앱키로")
        seen = json.dumps(slack.messages, ensure_ascii=False)
        there = "NASD, NYSE, AMEX: 2026-11-23 23:30 KST(현지 월 09:30), 15시간 10분 후"
        ended = "2026-11-23 08:20 KST부터 1시간 5분 동안 지속되었습니다."
        facts = (there, ended, "1분당 1회 제한(EGW0).", "설정을 사용할 수 없습니다. KIS_TIMEOUT")
        assert [text in seen for text in facts] == [True] * 4

    def test_trouble_that_came_to_no_key_denies_no_token(self, slack: SlackEndpoint) -> None:
        """Nobody has looked at the tokens of what is reported there: they serve until they expire, before and after."""
        alerts.report(Settings.load(), "KRX", SETTING, MONDAY)
        alerts.resolved(Settings.load(), "KRX", MONDAY + 5 * MINUTE)
        works = "cached tokens, until they expire"
        assert [answers(one).get("Still works") or answers(one)["Works now"] for one in slack.messages] == [
            works,
            works,
        ]
        assert slack.messages[0]["text"].startswith("KRX opens in 40 min · KRX: A setting is missing or wrong.")

    def test_a_dead_prefect_is_as_urgent_as_the_next_need(self, slack: SlackEndpoint) -> None:
        """Who looks after no token at all endangers the next need that has none, and people are called for it."""
        settings = Settings.load().model_copy(update={"slack_mention": "<!here>"})
        for hours in (-9, -0.3):
            alerts.report(settings, "Prefect", causes.SilenceError("It is dead."), MONDAY + hours * HOUR)
        opened, escalated = slack.messages
        assert "• KRX: 2026-11-23 09:00 KST" in json.dumps(opened, ensure_ascii=False)
        assert "<!here>" not in json.dumps(opened)
        assert "<!here> *KRX opens in 58 min*" in escalated["blocks"][1]["text"]["text"]

    def test_an_unusable_token_directory_is_reported(
        self, slack: SlackEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where not even the incident can be kept, it is reported anyway, and the error stays what it was."""
        (tmp_path / "file").write_text("no folder")
        monkeypatch.setenv("KIS_TOKEN_DIR", str(tmp_path / "file"))
        settings = Settings.load()
        assert alerts.report(settings, Key.load(settings)[0], STORE, MONDAY) is STORE
        assert slack.headlines == ["us+kr: The token directory cannot be used"]

    def test_foreign_words_act_on_nothing(self, slack: SlackEndpoint, caplog: pytest.LogCaptureFixture) -> None:
        """Slack's own signs are escaped; what turns text around or clears a terminal is gone, in the log too."""
        report(TokenUnavailableError("<!channel> R&D <http://x|y> \x1b[2J\u202edcba."))
        sent = json.dumps(slack.messages[0], ensure_ascii=False)
        assert ("&lt;!channel&gt; R&amp;D" in sent, "<!channel>" in sent) == (True, False)
        assert not [sign for sign in "\x1b\u202e" if sign in sent + caplog.text]


@pytest.mark.parametrize("texts", messages.LANGUAGES.values(), ids=list(messages.LANGUAGES))
def test_every_alert_fits_slack_and_a_phone(texts: messages.Texts) -> None:
    """Headers keep below Slack's 150 characters, whatever the key is called, and paragraphs below 3000."""
    facts = messages.Facts("us+kr+hk+jp+cn+vn (paper)", MONDAY + 1000 * HOUR, reached=True)
    for cause in causes.CAUSES:
        message = messages.trouble(
            *(texts, facts, new("us", cause, MONDAY, MONDAY), Notification("reminded", CALM, page=False)),
            *("y" * 5000, ("next.planned", MONDAY)),
        )
        header, happened, answered = message.blocks
        assert header["text"]["text"].endswith(texts[f"cause.{cause.name}.title"])
        assert max(len(block["text"]["text"]) for block in (happened, answered)) < 3000


@pytest.fixture
def bot(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlackEndpoint]:
    """Slack's API for a bot."""
    with SlackEndpoint() as running:
        monkeypatch.setattr(alerts.slack, "API", running.url)
        monkeypatch.setenv("SLACK_BOT_TOKEN", BOT)
        monkeypatch.setenv("SLACK_CHANNEL", "#tokens")
        yield running


KINDS = {":warning:": "opened", ":hourglass_flowing_sand:": "reminded", ":rotating_light:": "escalated"}
REFUSALS = {
    "channel_is_archived": (410, "channel_is_archived", "unarchive it"),
    "invalid_blocks": (400, "invalid_blocks", "fault of tokencore's"),
    "no_service": (404, "no_service", "make a new webhook"),
    "action_prohibited": (403, "action_prohibited", "ask who administers Slack"),
    "HTTP 404": (404, "<html>", "make a new webhook"),
    "HTTP 418": (418, "teapot", "the next run sends the message"),
}


@gateway
class TestSlack:
    """The ways to Slack."""

    def test_a_bot_speaks_in_its_channel_and_goes_on_in_the_thread(
        self, bot: SlackEndpoint, slack: SlackEndpoint
    ) -> None:
        """Reminder, escalation and end answer the opening; only what calls people shows in the channel too.

        It speaks alone where a webhook is set as well, which cannot answer in threads.
        """
        for hours in (0, 1, 4.75, 8.7):  # from the evening before: KRX's need starts at 08:30
            report(at=EVENING + hours * HOUR)
        resolve(EVENING + 9 * HOUR)
        seen = [(one["blocks"][0]["text"]["text"].split()[0], one) for one in bot.messages]
        assert [
            (KINDS.get(icon, "solved"), one.get("thread_ts"), one.get("reply_broadcast"), one["channel"])
            for icon, one in seen
        ] == [
            ("opened", None, None, "#tokens"),
            ("reminded", "1.0", False, CHANNEL),
            ("escalated", "1.0", False, CHANNEL),
            ("escalated", "1.0", True, CHANNEL),
            ("solved", "1.0", False, CHANNEL),
        ]
        assert ({authorization for _, authorization in bot.asked}, slack.asked) == ({f"Bearer {BOT}"}, [])

    def test_a_thread_that_is_gone_does_not_swallow_what_follows(
        self, bot: SlackEndpoint, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Where Slack refuses the thread, the channel gets the message, and what follows goes under that.

        Another refusal of the API is named, without the bot's token, and the next run sends the message.
        """
        caplog.set_level(logging.DEBUG)
        report()
        bot.bot_answers = [{"ok": False, "error": "thread_not_found"}]
        report(at=MONDAY + HOUR)
        bot.bot_answers = [{"ok": False, "error": "is_archived"}] * 2  # in the thread, and beside it
        for hours in (2, 3):
            resolve(MONDAY + hours * HOUR)
        assert "Slack did not accept the message (is_archived): the channel is archived" in caplog.text
        threads = [("#tokens", None), ("#tokens", None), (CHANNEL, "2.0")]
        assert [(one["channel"], one.get("thread_ts")) for one in bot.messages] == threads
        assert BOT not in caplog.text

    @pytest.mark.parametrize("status", [429, 500, 503])
    def test_a_busy_slack_is_asked_once_more(self, slack: SlackEndpoint, status: int) -> None:
        """A rate limit (after its Retry-After) or a fault of Slack's own is retried by slack_sdk."""
        slack.answers, slack.retry_after = [status], 0
        report()
        assert (len(slack.asked), len(slack.messages)) == (2, 1)

    @pytest.mark.parametrize("named", REFUSALS)
    def test_a_refusal_of_the_webhook_is_named_with_what_to_do(
        self, slack: SlackEndpoint, caplog: pytest.LogCaptureFixture, named: str
    ) -> None:
        """Slack's own word is in the log, HTTP's status where it says anything else; the next run sends the message."""
        status, word, fix = REFUSALS[named]
        slack.answers = [(status, word)]
        for minutes in (0, 5, 10):
            report(at=MONDAY + minutes * MINUTE)
        assert f"Slack did not accept the message ({named}): " in caplog.text
        assert fix in caplog.text
        assert len(slack.messages) == 1

    def test_a_silent_slack_delays_a_run_by_three_seconds_at_most(
        self, slack: SlackEndpoint, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A Slack that takes the request and never answers; a second alert waits no longer for the first.

        The log has how long the run waited; the clock allows a busy machine more, and still far less than Slack's
        time-out.
        """
        slack.answers = [0, 0, 0, 0]
        for _ in range(2):
            begun = time.monotonic()
            report()
            assert time.monotonic() - begun < 8
        assert "Slack has not answered within 3 s; the run goes on." in caplog.text
        assert slack.messages == []

    @pytest.mark.parametrize(
        ("url", "named"), [("http://127.0.0.1:1" + HOOK, "URLError"), ("hooks.slack.com/canary-of", "ValueError")]
    )
    def test_slack_being_away_is_logged_without_its_address(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, url: str, named: str
    ) -> None:
        """With Slack's port closed, or an address that is none, the log has the trouble, what to do and no address."""
        monkeypatch.setenv("SLACK_WEBHOOK_URL", url)
        with caplog.at_level(logging.DEBUG):
            report()
        assert "Someone else issues with this key" in caplog.text
        assert f"Slack did not accept the message ({named}): {alerts.slack.FIXES[named]}" in caplog.text
        assert "canary-of" not in caplog.text


def story(cause: Cause, need: datetime | None, looks: list[datetime]) -> list[tuple[datetime, Notification]]:
    """The messages about an incident by runs that look at these times, each knowing of the next."""
    known: list[Incident] = []
    found = []
    for now, later in zip(looks, [*looks[1:], looks[-1] + HOUR], strict=True):
        one, sent = met(known, "us", cause, need, now, later)
        if sent:
            found.append((now, sent))
            one.notified(sent, now, None)
            assert due(one, cause, now, later) is None
    return found


def hourly(hours: int) -> list[datetime]:
    """The hourly looks from the anchor on."""
    return [ANCHOR + n * HOUR for n in range(hours)]


def opened(known: list[Incident], cause: Cause, *, subject: str = "us", now: datetime = ANCHOR) -> Incident:
    """An incident that was reported at `now`."""
    one, sent = met(known, subject, cause, None, now, NEED)
    assert sent
    assert sent.kind == "opened"
    one.notified(sent, now, None)
    return one


STORIES: dict[str, tuple[Cause, datetime | None, int, str]] = {
    "six hours before the need: half of the lead, the last look before half an hour, and reminders between": (
        *(causes.CREDENTIALS, NEED, 9),
        "0 opened 0, 1 reminded 0, 3 escalated 1, 5 escalated 2, 8 reminded 2",
    ),
    "without a need: reminders after 1, 3, 6, 12 and 24 hours, then daily": (
        *(causes.SETTINGS, None, 96),
        "0 opened 0, " + ", ".join(f"{at} reminded 0" for at in (1, 4, 10, 22, 46, 70, 94)),
    ),
    "an outage is reported once it is urgent": (causes.DOWN, NEED, 6, "3 opened 1, 4 reminded 1, 5 escalated 2"),
    "an outage that ends in the first half of the lead is not": (causes.DOWN, NEED, 3, ""),
    "a foreign token endangers nothing by itself": (causes.FOREIGN_TOKEN, None, 30, "0 opened 0"),
}


@pytest.mark.parametrize(("cause", "need", "hours", "expected"), STORIES.values(), ids=list(STORIES))
def test_people_hear_of_an_incident(cause: Cause, need: datetime | None, hours: int, expected: str) -> None:
    """As the hourly check meets it: the hour, the kind of message, and the stage."""
    found = story(cause, need, hourly(hours))
    assert ", ".join(f"{(at - ANCHOR) // HOUR} {one.kind} {one.stage}" for at, one in found) == expected


def test_who_has_hours_is_not_called() -> None:
    """A page is an opening or an escalation with a need within hours, which was escalated or only a person can help."""
    late = NEED + 10 * HOUR  # half of the lead is gone eight hours before the need
    pages = [sent.page for _, sent in story(causes.CREDENTIALS, late, hourly(16)) if sent.kind != "reminded"]
    assert pages == [False, False, True]
    for cause, ahead, page in (causes.CREDENTIALS, NEAR, True), (causes.LIMIT, NEAR, False), (causes.LIMIT, ACT, True):
        assert story(cause, ANCHOR + ahead, hourly(1))[0][1].page == page


def test_the_next_need_is_escalated_anew() -> None:
    """When a session was lost and the next comes into danger, people hear of that one too."""
    one = new("us", causes.LIMIT, ANCHOR, ANCHOR)
    one.notified(Notification("opened", LAST_CALL, page=True), ANCHOR, None)
    known, later = [one], ANCHOR + timedelta(minutes=200)
    met(known, "us", causes.LIMIT, NEED, ANCHOR, NEED)
    found = met(known, "us", causes.LIMIT, NEED, later, later + timedelta(minutes=5))[1]
    assert found == Notification("escalated", HALF, page=True)


@given(
    lead=st.integers(1, 40 * 60),
    pauses=st.lists(st.integers(1, 60), min_size=1, max_size=120),
    cause=st.sampled_from(causes.CAUSES),
)
def test_whatever_the_times_nothing_is_reported_twice(lead: int, pauses: list[int], cause: Cause) -> None:
    """One opening, each stage once and upwards, reminders never closer than they may be.

    Runs that look at least hourly make the last call half an hour before the need, or at the opening.
    """
    need = ANCHOR + timedelta(minutes=lead)
    looks = [ANCHOR + timedelta(minutes=sum(pauses[:n])) for n in range(len(pauses) + 1)]
    found = story(cause, need, looks)
    assert [sent.kind for _, sent in found].count("opened") == bool(found)
    stages = [sent.stage for _, sent in found if sent.kind != "reminded"]
    assert stages == sorted(set(stages))
    for (before, _), (at, sent) in pairwise(found):
        assert sent.kind != "reminded" or at - before >= REMINDERS[0] - PUNCTUALITY
    if looks[-1] >= need - ACT:
        calls = [at for at, sent in found if sent.stage == LAST_CALL]
        assert calls
        assert calls[0] <= max(need - ACT, ANCHOR)


def test_one_outage_is_one_incident_whatever_kis_answers() -> None:
    """Another cause is news only where it now takes a person; the length counts from the first.

    Trouble that returns before its end was reported never ended; after a week without it, it is new. What was never
    urgent enough to be reported ends without a word, and leaves no entry.
    """
    known: list[Incident] = []
    opened(known, causes.LIMIT)
    assert met(known, "kr", causes.DOWN, NEED, ANCHOR, ANCHOR + HOUR)[1] is None
    assert over(known, "kr", ANCHOR + HOUR / 3, foreign=False, lasting=False) == []
    for cause in (causes.DOWN, causes.WAITING, causes.RESTRICTED):
        assert met(known, "us", cause, None, ANCHOR + HOUR / 2, NEED)[1] is None
    opened(known, causes.CREDENTIALS, now=ANCHOR + HOUR / 2)
    assert [(one.cause, one.opened_at) for one in known] == [("credentials", ANCHOR)]
    assert over(known, "us", ANCHOR + HOUR * 0.6, foreign=False, lasting=False)
    assert met(known, "us", causes.CREDENTIALS, None, ANCHOR + HOUR * 0.7, NEED)[1] is None
    assert [(one.opened_at, one.closed_at) for one in known] == [(ANCHOR, None)]
    assert opened(known, causes.CREDENTIALS, now=ANCHOR + HOUR + FORGOTTEN).opened_at == ANCHOR + HOUR + FORGOTTEN


@pytest.mark.parametrize("content", [{}, {"incidents": 3}, {"incidents": [3, {"subject": "us"}]}])
def test_a_damaged_document_is_begun_anew(content: dict[str, Any]) -> None:
    """Whatever is in it, the trouble is reported rather than kept."""
    assert met(parse(content), "us", causes.LIMIT, None, ANCHOR, NEED)[1]


def test_what_slack_accepted_is_noted_although_the_run_fails_then() -> None:
    """The changes are written whatever ends the block; who finds others at it gives up in time and changes nothing."""
    document = open_document(Settings.load(), "incidents")

    def fail() -> None:
        with changing(document, wait=1) as known:
            opened(known, causes.LIMIT)
            with pytest.raises(Busy), changing(document, wait=0.05):
                pass
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [one.notified_at for one in parse(document.read())] == [ANCHOR]
