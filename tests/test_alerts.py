"""Alerts: the cause of trouble, what people read of it, and that they hear of each incident as often as they should."""

from __future__ import annotations

import json
import logging
import stat
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any

import pytest
from builders import make_token
from hypothesis import given
from hypothesis import strategies as st
from prefect.settings import PREFECT_UI_URL, temporary_settings
from slack_endpoint import HOOK

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
    Telling,
    changing,
    met,
    new,
    next_telling,
    over,
    parse,
)
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
from tokencore.sandbox import APP_KEY, APP_SECRET

if TYPE_CHECKING:
    from slack_endpoint import SlackEndpoint

    from flows.alerts.causes import Cause
    from tokencore.tokens import Token

ROOT = Path(__file__).resolve().parent.parent
MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)
MONDAY = datetime(2026, 11, 22, 23, 20, tzinfo=UTC)  # 08:20 in Seoul, 40 minutes before KRX opens
NEW_YORK = datetime(2026, 11, 23, 14, 30, tzinfo=UTC)  # Monday's open there, 23:30 in Seoul
ANCHOR = datetime(2026, 11, 23, 7, 35, tzinfo=UTC)  # 16:35 in Seoul
NEED = ANCHOR + timedelta(hours=6)
LIMITED = "us+kr: Someone else issues with this key (minute limit, not 24-hour limit)"
DOWN, STORE = IssuerUnavailableError("KIS reported a fault of its own."), TokenStoreError("The disk is full.")
REFUSED = CredentialsError("KIS does not know the app key (EGW00103).")
gateway = pytest.mark.usefixtures("gateway")


def limit(cause: str = "minute", retry_at: datetime | None = None) -> IssuanceLimitError:
    """The error of that rule."""
    return IssuanceLimitError("KIS refused to issue (EGW00133). There is no token.", retry_at=retry_at, cause=cause)


def record(text: str, now: datetime = MONDAY) -> list[Attempt]:
    """Attempts as `issued 60, limit 0`: their outcome, and minutes before `now`."""
    words = [one.split() for one in text.split(", ") if one]
    return [Attempt(now - float(ago) * MINUTE, Outcome(outcome), credentials="x") for outcome, ago in words]


def state_of(now: datetime, token: Token | None = None, attempts: str | list[Attempt] = "") -> KeyState:
    """The state of the settings' only key with this token and record."""
    (key,) = Key.load(Settings.load())
    known = record(attempts, now) if isinstance(attempts, str) else attempts
    own = [one._replace(credentials=key.renewer.credentials) for one in known]
    ahead = outlook.look(token, token.issued_at if token else None, key.horizon(key.exchanges, now), key.market, now)
    return KeyState(key, now, token, "", own, ahead)


def report(error: Exception | None = None, at: datetime = MONDAY) -> None:
    """Report KIS's refusal out of the blue, or another error, of the only key, which has no token at that time."""
    alerts.report(Settings.load(), state_of(at, attempts=record("limit 0.1")), error or limit(), at)


def resolve(at: datetime, token: Token | None = None, attempts: str | list[Attempt] = "") -> None:
    """Report that the only key is well at that time."""
    alerts.resolved(Settings.load(), state_of(at, token, attempts), at)


def answers(message: dict[str, Any]) -> dict[str, str]:
    """The questions of a message with their answers."""
    lines = message["blocks"][2]["text"]["text"].replace("\n•", " •").splitlines()
    return {name.lstrip("*"): text for name, _, text in (line.partition(":* ") for line in lines)}


def test_the_texts_of_all_languages_say_the_same() -> None:
    """Korean has English's keys, each with the same facts in it, and no empty text; every cause has its texts."""

    def flat(texts: Any, before: str = "") -> dict[str, set[str]]:  # noqa: ANN401 - TOML
        found: dict[str, set[str]] = {}
        for name, text in texts.items():
            inner = flat(text, f"{before}{name}.") if isinstance(text, dict) else None
            found |= inner or {f"{before}{name}": {field for _, field, _, _ in Formatter().parse(text) if field}}
        return found

    english, korean = (flat(texts._texts) for texts in messages.LANGUAGES.values())  # noqa: SLF001 - as the file has them
    assert english == korean
    assert {key.split(".")[1] for key in english if key.startswith("cause.")} == set(causes.BY_NAME)


@pytest.mark.parametrize("cause", [causes.LIMIT, causes.FOREIGN_LIMIT, causes.CEILING, causes.RESTRICTED])
def test_the_title_of_a_limit_says_which_one_it_is(cause: Cause) -> None:
    """Who looks for the 24-hour limit finds it in the title of every alert of a limit, in either language."""
    assert "24-hour limit" in messages.LANGUAGES["en"](f"cause.{cause.name}.title")
    assert "24시간 한도" in messages.LANGUAGES["ko"](f"cause.{cause.name}.title")


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
    "a missing setting": (ConfigurationError("x"), "", causes.SETTINGS),
    "a need that is too long": (TokenUnavailableError("x"), "", causes.UNSERVED),
    "Prefect being silent": (causes.SilenceError("x"), "", causes.SILENT),
    "anything else": (RuntimeError("x"), "", causes.UNFORESEEN),
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
        *("no token · KRX opens in 40 min", "24-hour limit reached: no more tokens today (KIS_MAX_ISSUES_PER_DAY)"),
        *(NOTHING, "about 2026-11-23 20:40 KST", "run refresh_token with force"),
    ),
}


@pytest.mark.parametrize("page", PAGES.values(), ids=list(PAGES))
@gateway
def test_a_page_is_true_in_its_first_words_and_in_every_line(
    slack: SlackEndpoint, monkeypatch: pytest.MonkeyPatch, page: tuple[Any, ...]
) -> None:
    """Preview, title, what works, what is next and what to do follow from the key's state, the error and the time."""
    now, token, attempts, error, preview, title, works, following, do = page
    monkeypatch.setenv("KIS_ISSUE_INTERVAL", "60")
    alerts.report(Settings.load(), state_of(now, token, attempts), error, now)
    (sent,) = slack.told
    said = answers(sent)
    assert sent["text"].startswith(f"{preview} · us+kr: {title}. ")
    assert slack.headlines == [f"us+kr: {title}"]
    assert sent["blocks"][1]["text"]["text"].startswith(f"*{preview}*\n")
    assert (said["Still works"], said["Next attempt"][: len(following)]) == (works, following)
    assert do in said["To do"]


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
        assert answers(slack.told[0])["Sessions at risk"].startswith(
            " • KRX: 2026-11-23 09:00 KST, in 40 min • NASD, NYSE, AMEX: 2026-11-23 23:30 KST (Mon 09:30"
        )
        assert "EGW00133" in slack.told[0]["blocks"][1]["text"]["text"]
        link = "<https://prefect.example.com/runs/flow-run/0a1b|warm-up KRX 2026-11-23>"
        assert slack.told[0]["blocks"][3]["elements"][0]["text"] == f"Run: {link}"

    def test_one_incident_is_one_message_and_its_end_another(self, slack: SlackEndpoint) -> None:
        """Met again it is not told again; its end is told once, with its length; without an incident nothing is."""
        resolve(MONDAY)
        for _ in range(3):
            report()
        for minutes in (95, 120):
            resolve(MONDAY + minutes * MINUTE)
        assert slack.headlines == [LIMITED, LIMITED.replace(": ", ": solved: ", 1)]
        assert "It lasted 1 h 35 min, from 2026-11-23 08:20 KST." in json.dumps(slack.told[1])

    def test_one_recovery_is_one_message_whatever_happened_before(self, slack: SlackEndpoint) -> None:
        """KIS's limit, then KIS down, then a full disk: two alarms, as the disk takes a person, and one end."""
        for minutes, error in enumerate((limit(), DOWN, STORE)):
            report(error, MONDAY + minutes * MINUTE)
        resolve(MONDAY + HOUR)
        broken = "The token directory cannot be used"
        assert slack.headlines == [LIMITED, f"us+kr: {broken}", f"us+kr: solved: {broken}"]

    def test_a_refresh_that_ends_an_incident_is_one_message(self, slack: SlackEndpoint) -> None:
        """Slack hears who had which token refreshed, when, why, what works now, and what that solved."""
        report()
        state = state_of(MONDAY + HOUR, make_token(now=MONDAY + HOUR))
        alerts.announce(Settings.load(), state, "forced", by="Kim", why="it was revoked")
        alerts.resolved(Settings.load(), state, state.now)
        assert slack.headlines == [LIMITED, "us+kr: refreshed manually, with force"]
        said = answers(slack.told[1])
        assert said["Solved"] == f"{LIMITED.partition(': ')[2]} (1 h 00 min)"
        assert (said["Why"], said["Works now"]) == ("it was revoked", "the present token, until 2026-11-24 09:15 KST")
        assert "Kim asked for it, 2026-11-23 09:20 KST." in json.dumps(slack.told[1])

    def test_a_token_that_someone_else_issued_is_told_once_and_ends_their_limit(self, slack: SlackEndpoint) -> None:
        """One message instead of two, no reminder, and its end with our own next token."""
        report()
        token, foreign = make_token(age=3600, now=MONDAY), "us+kr: Someone else has issued a token with this key"
        for hours in (0, 1, 2):
            resolve(MONDAY + hours * HOUR, token, [Attempt(MONDAY, Outcome.SAME, expires_at=token.expires_at)])
        assert slack.headlines == [LIMITED, foreign]
        assert "issued at 2026-11-23 07:20 KST" in json.dumps(slack.told[1])
        resolve(MONDAY + 3 * HOUR)
        assert slack.headlines[2:] == [foreign.replace(": ", ": solved: ", 1)]

    def test_refused_credentials_are_not_over_while_the_token_serves(self, slack: SlackEndpoint) -> None:
        """A check that finds the present token in order does not call them solved; the next answer of KIS does."""
        token = make_token(now=MONDAY)
        alerts.report(Settings.load(), state_of(MONDAY, token, "bad_key 5"), REFUSED, MONDAY)
        for attempts, told in (("bad_key 5", 1), ("issued 0", 2)):
            resolve(MONDAY, token, attempts)
            assert len(slack.told) == told

    def test_a_page_calls_who_is_named(self, slack: SlackEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
        """SLACK_MENTION stands in what cannot wait, and nowhere else; the preview begins with the fact all the same."""
        monkeypatch.setenv("SLACK_MENTION", "<!channel> <@U024BE7LH>")
        for at in (MONDAY - 9 * HOUR, MONDAY):
            report(at=at)
        resolve(MONDAY)
        assert ["<!channel> <@U024BE7LH>" in json.dumps(one) for one in slack.told] == [False, True, False]
        assert slack.told[1]["text"].startswith("no token · KRX opens in 40 min · ")
        assert slack.told[1]["blocks"][1]["text"]["text"].startswith("<!channel> <@U024BE7LH> *no token · KRX opens")

    def test_alerts_are_korean_where_the_settings_say_so(
        self, slack: SlackEndpoint, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All but the error's own sentence is in the reader's language, spans and days as people write them."""
        monkeypatch.setenv("SLACK_LANGUAGE", "ko")
        report()
        resolve(MONDAY + 65 * MINUTE)
        assert slack.told[0]["text"].startswith("토큰 없음 · KRX 개장 40분 전 · us+kr: 다른 프로그램이 이 앱키로")
        there = "NASD, NYSE, AMEX: 2026-11-23 23:30 KST(현지 월 09:30), 15시간 10분 후"
        ended = "2026-11-23 08:20 KST부터 1시간 5분 동안 지속되었습니다."
        assert [text in json.dumps(slack.told, ensure_ascii=False) for text in (there, ended)] == [True, True]

    def test_trouble_that_came_to_no_key_denies_no_token(self, slack: SlackEndpoint) -> None:
        """Nobody has looked at the tokens of what is reported there: they serve until they expire, before and after."""
        alerts.report(Settings.load(), "KRX", ConfigurationError("A setting is wrong."), MONDAY)
        alerts.resolved(Settings.load(), "KRX", MONDAY + 5 * MINUTE)
        works = "cached tokens, until they expire"
        assert [answers(one).get("Still works") or answers(one)["Works now"] for one in slack.told] == [works, works]
        assert slack.told[0]["text"].startswith("KRX opens in 40 min · KRX: A setting is missing or wrong.")

    def test_a_dead_prefect_is_as_urgent_as_the_next_need(
        self, slack: SlackEndpoint, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Who looks after no token at all endangers the next need that has none, and people are called for it."""
        monkeypatch.setenv("SLACK_MENTION", "<!here>")
        for hours in (-9, -0.3):
            alerts.report(Settings.load(), "Prefect", causes.SilenceError("It is dead."), MONDAY + hours * HOUR)
        opened, escalated = slack.told
        assert "• KRX: 2026-11-23 09:00 KST" in json.dumps(opened, ensure_ascii=False)
        assert "<!here>" not in json.dumps(opened)
        assert "<!here> *KRX opens in 58 min*" in escalated["blocks"][1]["text"]["text"]

    def test_no_secret_is_sent_logged_or_kept(self, slack: SlackEndpoint, caplog: pytest.LogCaptureFixture) -> None:
        """Neither key, secret, token nor webhook is in a message, the log or the incidents, the owner's alone."""
        (key,) = Key.load(Settings.load())
        assert key.obtain(datetime.now(UTC) + HOUR, datetime.now(UTC))
        with caplog.at_level(logging.DEBUG):
            alerts.report(Settings.load(), key, CredentialsError("KIS denied it (EGW00003)."), datetime.now(UTC))
        written = Path("~/.tokencore/incidents.json").expanduser()
        everything = json.dumps(slack.told) + caplog.text + written.read_text()
        token = key.state(datetime.now(UTC)).token
        assert token
        assert "EGW00003" in everything
        assert not [one for one in (APP_KEY, APP_SECRET, token.access_token, HOOK) if one in everything]
        assert stat.S_IMODE(written.stat().st_mode) == 0o600

    def test_an_unusable_token_directory_is_told(
        self, slack: SlackEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where not even the incident can be kept, it is told anyway, and the error stays what it was."""
        (tmp_path / "file").write_text("no folder")
        monkeypatch.setenv("KIS_TOKEN_DIR", str(tmp_path / "file"))
        settings = Settings.load()
        assert alerts.report(settings, Key.load(settings)[0], STORE, MONDAY) is STORE
        assert slack.headlines == ["us+kr: The token directory cannot be used"]


@pytest.mark.parametrize("texts", messages.LANGUAGES.values(), ids=list(messages.LANGUAGES))
def test_every_alert_fits_slack_and_a_phone(texts: messages.Texts) -> None:
    """Headers keep below Slack's 150 characters, whatever the key is called, and paragraphs below 3000."""
    facts = messages.Facts("us+kr+hk+jp+cn+vn (paper)", MONDAY + 1000 * HOUR, None, True, [], ("", None), "")  # noqa: FBT003 - as it comes
    for cause in causes.CAUSES:
        told = Telling("reminded", CALM, page=False)
        message = messages.trouble(
            texts, facts, new("us", cause, MONDAY, MONDAY), told, "y" * 5000, ("next.planned", MONDAY)
        )
        header, happened, answered = message.blocks
        assert header["text"]["text"].endswith(texts(f"cause.{cause.name}.title"))
        assert max(len(block["text"]["text"]) for block in (happened, answered)) < 3000


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
    return [ANCHOR + n * HOUR for n in range(hours)]


def opened(known: list[Incident], cause: Cause, *, subject: str = "us", now: datetime = ANCHOR) -> Incident:
    """An incident that people were told of at `now`."""
    one, telling = met(known, subject, cause, None, now, NEED)
    assert telling
    assert telling.kind == "opened"
    one.heard(telling, now, None)
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
    "an outage is told once it is urgent": (causes.DOWN, NEED, 6, "3 opened 1, 4 reminded 1, 5 escalated 2"),
    "an outage that ends in the first half of the lead is not": (causes.DOWN, NEED, 3, ""),
    "a foreign token endangers nothing by itself": (causes.FOREIGN_TOKEN, None, 30, "0 opened 0"),
}


@pytest.mark.parametrize(("cause", "need", "hours", "expected"), STORIES.values(), ids=list(STORIES))
def test_people_hear_of_an_incident(cause: Cause, need: datetime | None, hours: int, expected: str) -> None:
    """As the hourly check meets it: the hour, what they are told, and the stage."""
    told = story(cause, need, hourly(hours))
    assert ", ".join(f"{(at - ANCHOR) // HOUR} {one.kind} {one.stage}" for at, one in told) == expected


def test_who_has_hours_is_not_called() -> None:
    """A page is an opening or an escalation with a need within hours, which was escalated or only a person can help."""
    late = NEED + 10 * HOUR  # half of the lead is gone eight hours before the need
    pages = [telling.page for _, telling in story(causes.CREDENTIALS, late, hourly(16)) if telling.kind != "reminded"]
    assert pages == [False, False, True]
    for cause, ahead, page in (causes.CREDENTIALS, NEAR, True), (causes.LIMIT, NEAR, False), (causes.LIMIT, ACT, True):
        assert story(cause, ANCHOR + ahead, hourly(1))[0][1].page == page


def test_the_next_need_is_escalated_anew() -> None:
    """When a session was lost and the next comes into danger, people hear of that one too."""
    one = new("us", causes.LIMIT, ANCHOR, ANCHOR)
    one.heard(Telling("opened", LAST_CALL, page=True), ANCHOR, None)
    known, later = [one], ANCHOR + timedelta(minutes=200)
    met(known, "us", causes.LIMIT, NEED, ANCHOR, NEED)
    told = met(known, "us", causes.LIMIT, NEED, later, later + timedelta(minutes=5))[1]
    assert told == Telling("escalated", HALF, page=True)


@given(
    lead=st.integers(1, 40 * 60),
    pauses=st.lists(st.integers(1, 60), min_size=1, max_size=120),
    cause=st.sampled_from(causes.CAUSES),
)
def test_whatever_the_times_nothing_is_told_twice(lead: int, pauses: list[int], cause: Cause) -> None:
    """One opening, each stage once and upwards, reminders never closer than the last telling allows.

    Runs that look at least hourly make the last call half an hour before the need, or at the opening.
    """
    need = ANCHOR + timedelta(minutes=lead)
    looks = [ANCHOR + timedelta(minutes=sum(pauses[:n])) for n in range(len(pauses) + 1)]
    told = story(cause, need, looks)
    assert [telling.kind for _, telling in told].count("opened") == bool(told)
    stages = [telling.stage for _, telling in told if telling.kind != "reminded"]
    assert stages == sorted(set(stages))
    for (before, _), (at, telling) in pairwise(told):
        assert telling.kind != "reminded" or at - before >= REMINDERS[0] - PUNCTUALITY
    if looks[-1] >= need - ACT:
        calls = [at for at, telling in told if telling.stage == LAST_CALL]
        assert calls
        assert calls[0] <= max(need - ACT, ANCHOR)


def test_one_outage_is_one_incident_whatever_kis_answers() -> None:
    """Another cause is news only where it now takes a person; the length counts from the first.

    Trouble that returns before its end was told never ended; after a week without it, it is new.
    """
    known: list[Incident] = []
    opened(known, causes.LIMIT)
    for cause in (causes.DOWN, causes.WAITING, causes.RESTRICTED):
        assert met(known, "us", cause, None, ANCHOR + HOUR / 2, NEED)[1] is None
    opened(known, causes.CREDENTIALS, now=ANCHOR + HOUR / 2)
    assert [(one.cause, one.opened_at) for one in known] == [("credentials", ANCHOR)]
    assert over(known, "us", ANCHOR + HOUR * 0.6, foreign=False, lasting=False)
    assert met(known, "us", causes.CREDENTIALS, None, ANCHOR + HOUR * 0.7, NEED)[1] is None
    assert [(one.opened_at, one.closed_at) for one in known] == [(ANCHOR, None)]
    assert opened(known, causes.CREDENTIALS, now=ANCHOR + HOUR + FORGOTTEN).opened_at == ANCHOR + HOUR + FORGOTTEN


def test_a_recovery_is_told_until_slack_has_it() -> None:
    """It stays closed, with the time of its end, until whoever told it forgets it; other subjects are left alone.

    What nobody was told of, as it was never urgent, ends without a word and leaves no entry.
    """
    known: list[Incident] = []
    for subject in ("us", "hk"):
        opened(known, causes.LIMIT, subject=subject)
    assert met(known, "kr", causes.DOWN, NEED, ANCHOR, ANCHOR + HOUR)[1] is None
    assert over(known, "kr", ANCHOR + HOUR, foreign=False, lasting=False) == []
    for hours in (1, 2):
        (ended,) = over(known, "us", ANCHOR + hours * HOUR, foreign=False, lasting=False)
        assert ended.closed_at == ANCHOR + HOUR
    assert [one.subject for one in known] == ["us", "hk"]


def test_the_document_of_version_0_1_is_read_and_kept(tmp_path: Path) -> None:
    """What was told then is not told again; what this version does not know stays for the other one."""
    at = ANCHOR.isoformat()
    told = {"subject": "us", "cause": "limit", "opened_at": at, "told_at": at, "claimed_at": at}
    (tmp_path / "incidents.json").write_text(json.dumps({"slack_from": at, "incidents": [told]}))
    with changing(open_document(str(tmp_path), "incidents"), wait=1) as known:
        assert met(known, "us", causes.LIMIT, None, ANCHOR + HOUR / 2, NEED)[1] is None
    kept = json.loads((tmp_path / "incidents.json").read_text())
    assert (kept["slack_from"], [one["subject"] for one in kept["incidents"]]) == (at, ["us"])


@pytest.mark.parametrize("content", [{}, {"incidents": 3}, {"incidents": [3, {"subject": "us"}]}])
def test_a_damaged_document_is_begun_anew(content: dict[str, Any]) -> None:
    """Whatever is in it, the trouble is told rather than kept."""
    assert met(parse(content), "us", causes.LIMIT, None, ANCHOR, NEED)[1]


def test_what_slack_accepted_is_noted_although_the_run_fails_then(tmp_path: Path) -> None:
    """The changes are written whatever ends the block; who finds others at it gives up in time and changes nothing."""
    document = open_document(str(tmp_path), "incidents")

    def fail_after_telling() -> None:
        with changing(document, wait=1) as known:
            opened(known, causes.LIMIT)
            with pytest.raises(Busy), changing(document, wait=0.05):
                pass
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_after_telling()
    assert [one.told_at for one in parse(document.read())] == [ANCHOR]
