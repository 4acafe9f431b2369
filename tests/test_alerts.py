"""Alerts: the cause of trouble, what people read of it, and that they read it once."""

from __future__ import annotations

import json
import logging
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any, NamedTuple

import alert_samples
import pytest
from builders import make_token
from prefect.settings import PREFECT_UI_URL, temporary_settings
from slack_endpoint import HOOK

from flows import alerts
from flows.alerts import causes, incidents, messages
from flows.alerts.causes import Cause, as_met, cause_of
from flows.runs import clock
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
    outlook,
)
from tokencore.attempts import Attempt, Outcome
from tokencore.sandbox import APP_KEY, APP_SECRET

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from slack_endpoint import SlackEndpoint

    from tokencore.tokens import Token

MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)
MONDAY = datetime(2026, 11, 22, 23, 20, tzinfo=UTC)  # 08:20 in Seoul, 40 minutes before KRX opens
NEW_YORK = datetime(2026, 11, 23, 14, 30, tzinfo=UTC)  # Monday's open there, 23:30 in Seoul
LIMIT_SAID = "KIS refused to issue: one request a minute per app key (EGW00133). There is no token. To do: wait."
DOWN_SAID = "KIS reported a fault of its own (EGW00002). There is no token. To do: wait."
LIMITED = "us+kr: Someone else issues with this key (minute limit, not 24-hour limit)"


def limit(cause: str, retry_at: datetime | None = None, said: str = LIMIT_SAID) -> IssuanceLimitError:
    """The error of that rule."""
    return IssuanceLimitError(said, retry_at=retry_at, cause=cause)


def record(*outcomes: tuple[str, float], now: datetime = MONDAY) -> list[Attempt]:
    """Attempts by outcome, and minutes before `now`."""
    return [Attempt(now - minutes * MINUTE, Outcome(outcome), credentials="x") for outcome, minutes in outcomes]


def state_of(now: datetime, token: Token | None = None, attempts: Sequence[Attempt] = ()) -> KeyState:
    """The state of the settings' only key with this token and record."""
    (key,) = Key.load(Settings.load())
    own = [one._replace(credentials=key.renewer.credentials) for one in attempts]
    ahead = outlook.look(token, token.issued_at if token else None, key.horizon(key.exchanges, now), key.market, now)
    return KeyState(key, now, token, "", own, ahead)


def answers(message: Mapping[str, Any]) -> dict[str, str]:
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


CAUSES: list[tuple[str, Exception, list[Attempt], Cause]] = [
    ("KIS's refusal a minute after our request", limit("minute"), record(("issued", 1), ("limit", 0)), causes.LIMIT),
    ("KIS's refusal out of the blue", limit("minute"), record(("issued", 90), ("limit", 0)), causes.FOREIGN_LIMIT),
    ("KIS's refusal of the first request ever", limit("minute"), record(("limit", 0)), causes.FOREIGN_LIMIT),
    (
        "one refusal after the other, the first out of the blue",
        limit("minute"),
        record(("issued", 90), ("limit", 2), ("limit", 1), ("limit", 0)),
        causes.FOREIGN_LIMIT,
    ),
    (
        "KIS's refusal after a request that cannot have reached it",
        limit("minute"),
        record(("issued", 90), ("unreachable", 1), ("limit", 0)),
        causes.FOREIGN_LIMIT,
    ),
    ("a refusal after an import", limit("minute"), record(("imported", 1), ("limit", 0)), causes.FOREIGN_LIMIT),
    ("our own minute after a renewal", limit("minute"), record(("issued", 0)), causes.WAITING),
    ("our own minute after the same token", limit("minute"), record(("same", 0.5)), causes.WAITING),
    ("the pause after the same token", limit("backoff"), record(("same", 71 / 60)), causes.SAME),
    ("the minute after KIS was down", limit("minute"), record(("server_error", 0)), causes.DOWN),
    ("the pause after a dropped connection", limit("backoff"), record(("no_answer", 0)), causes.DOWN),
    ("the pause after a wrong secret", limit("backoff"), record(("bad_secret", 0)), causes.CREDENTIALS),
    ("the ceiling", limit("ceiling"), record(("issued", 60), ("issued", 0)), causes.CEILING),
    ("the six hours, without a token", limit("same_token"), record(("issued", 0)), causes.DEAD),
    ("a wrong key", CredentialsError("x"), record(("bad_key", 0)), causes.CREDENTIALS),
    ("KIS being down", IssuerUnavailableError("x"), record(("unreachable", 0)), causes.DOWN),
    ("403 after one issue", IssuerUnavailableError("x"), record(("issued", 60), ("refused", 0)), causes.DOWN),
    (
        "403 after two issues in a day",
        IssuerUnavailableError("x"),
        record(("issued", 700), ("issued", 60), ("refused", 0)),
        causes.RESTRICTED,
    ),
    (
        "403 after two issues, one of them yesterday",
        IssuerUnavailableError("x"),
        record(("issued", 1500), ("issued", 60), ("refused", 0)),
        causes.DOWN,
    ),
    (
        "the pause after that 403",
        limit("backoff"),
        record(("issued", 9), ("issued", 8), ("refused", 0)),
        causes.RESTRICTED,
    ),
    ("a full disk", TokenStoreError("x"), [], causes.STORE),
    ("a missing setting", ConfigurationError("x"), [], causes.SETTINGS),
    ("a need that is too long", TokenUnavailableError("x"), [], causes.UNSERVED),
    ("Prefect being silent", causes.SilenceError("x"), [], causes.SILENT),
    ("anything else", RuntimeError("x"), [], causes.UNFORESEEN),
]


@pytest.mark.parametrize(("error", "attempts", "expected"), [row[1:] for row in CAUSES], ids=[row[0] for row in CAUSES])
def test_the_cause_is_what_the_error_comes_from(error: Exception, attempts: list[Attempt], expected: Cause) -> None:
    """A pause after a failure is no cause of its own, and only KIS giving no token is worth another try by Prefect."""
    assert cause_of(error, attempts) is expected
    tried_again = isinstance(as_met(error, expected), IssuerUnavailableError)
    assert tried_again == (expected in (causes.DOWN, causes.RESTRICTED))


def test_a_dead_token_is_told_from_one_that_kis_returned() -> None:
    """Within the six hours nobody asks; who asked and got the dead one again knows more."""
    dead = make_token(age=3600, now=MONDAY, rejected=True)
    assert cause_of(limit("same_token"), record(("issued", 60)), dead) is causes.DEAD
    returned = record(("issued", 60), ("same", 0))
    assert cause_of(limit("same_token"), returned, dead) is causes.SAME_DEAD
    assert cause_of(TokenUnavailableError("x"), returned, dead) is causes.SAME_DEAD
    assert cause_of(limit("same_token"), record(("same", 0)), make_token(age=3600, now=MONDAY)) is causes.UNSERVED


class Page(NamedTuple):
    """What a person reads: the push preview's first words, title, what works, what is next, a part of what to do."""

    preview: str
    title: str
    works: str
    next: str
    do: str


NOTHING, NONE = "nothing: there is no valid token", "none automatically: a person has to act first"
RUNNING = NEW_YORK + timedelta(minutes=10)
DEAD = make_token(age=2 * 3600, now=NEW_YORK - HOUR, rejected=True)
PAGES: list[tuple[str, datetime, Token | None, list[Attempt], Exception, Page]] = [
    (
        "KIS down, 9 min to the open",
        NEW_YORK - 9 * MINUTE,
        None,
        record(("server_error", 0.1), now=NEW_YORK - 9 * MINUTE),
        IssuerUnavailableError(DOWN_SAID),
        Page(
            "no token · NASD opens in 9 min", "KIS gives no token", NOTHING, "about 2026-11-23 23:21 KST", "hold back"
        ),
    ),
    (
        "amid the session",
        RUNNING,
        None,
        record(("server_error", 0.1), now=RUNNING),
        IssuerUnavailableError(DOWN_SAID),
        Page(
            "no token · NASD open until 06:00 KST",
            "KIS gives no token",
            NOTHING,
            "about 2026-11-23 23:40",
            "KIS's notices",
        ),
    ),
    (
        "52 s after the last request",
        MONDAY,
        None,
        record(("issued", 52 / 60)),
        limit("minute", MONDAY + timedelta(seconds=8)),
        Page(
            "no token · KRX opens in 40 min",
            "No new token yet: the key's last request was less than a minute ago",
            NOTHING,
            "about 2026-11-23 08:20 KST",
            "Nothing, if the next attempt succeeds.",
        ),
    ),
    (
        "71 s after the same token came back",
        MONDAY,
        make_token(age=23 * 3600, now=MONDAY),
        record(("same", 71 / 60)),
        limit("backoff", MONDAY + 4 * MINUTE),
        Page(
            "token until 09:15 KST · KRX opens in 40 min",
            "KIS returned the present token again instead of a new one",
            "the present token, until 2026-11-23 09:15 KST",
            "about 2026-11-23 08:23 KST",
            "KIS's notices",
        ),
    ),
    (
        "a wrong key, and a token that serves on",
        MONDAY,
        make_token(age=20 * 3600, now=MONDAY),
        record(("bad_key", 5)),
        CredentialsError("KIS does not know the app key (EGW00103)."),
        Page(
            "token until 12:15 KST · KRX opens in 40 min",
            "KIS refuses the app key or its secret",
            "the present token, until 2026-11-23 12:15 KST",
            NONE,
            "Correct KIS_APP_KEY",
        ),
    ),
    (
        "a token killed two hours after its issue",
        NEW_YORK - HOUR,
        DEAD,
        record(("issued", 120), now=NEW_YORK - HOUR),
        limit("same_token", NEW_YORK + 3 * HOUR, "KIS rejects the token."),
        Page(
            "no token · NASD opens in 1 h 00 min",
            "KIS rejects the token, and issues no other yet",
            NOTHING,
            "about 2026-11-24 02:30 KST",
            "refresh_token with force",
        ),
    ),
    (
        "403 after two issues in a day",
        MONDAY,
        None,
        record(("issued", 700), ("issued", 60), ("refused", 0.1)),
        IssuerUnavailableError("KIS, or a proxy on the way, refused the request without a known reason (HTTP 403)."),
        Page(
            "no token · KRX opens in 40 min",
            "24-hour limit: KIS refuses the key after more than one token in a day",
            NOTHING,
            "about 2026-11-23 20:40 KST",
            "Ask KIS's support",
        ),
    ),
    (
        "the ceiling",
        MONDAY,
        None,
        record(("issued", 700), ("issued", 60)),
        limit("ceiling", MONDAY + 740 * MINUTE, "The 24-hour limit is reached."),
        Page(
            "no token · KRX opens in 40 min",
            "24-hour limit reached: no more tokens today (KIS_MAX_ISSUES_PER_DAY)",
            NOTHING,
            "about 2026-11-23 20:40 KST",
            "run refresh_token with force",
        ),
    ),
]


@pytest.mark.parametrize(
    ("now", "token", "attempts", "error", "page"), [row[1:] for row in PAGES], ids=[row[0] for row in PAGES]
)
@pytest.mark.usefixtures("gateway")
def test_a_page_is_true_in_its_first_words_and_in_every_line(
    slack: SlackEndpoint,
    monkeypatch: pytest.MonkeyPatch,
    now: datetime,
    token: Token | None,
    attempts: list[Attempt],
    error: Exception,
    page: Page,
) -> None:
    """Preview, title, what works, what is next and what to do follow from the key's state, the error and the time."""
    monkeypatch.setenv("KIS_ISSUE_INTERVAL", "60")
    alerts.report(Settings.load(), state_of(now, token, attempts), error, now)
    (sent,) = slack.told
    said = answers(sent)
    assert sent["text"].startswith(f"{page.preview} · us+kr: {page.title}. ")
    assert slack.headlines == [f"us+kr: {page.title}"]
    assert sent["blocks"][1]["text"]["text"].startswith(f"*{page.preview}*\n")
    assert said["Still works"] == page.works
    assert said["Next attempt"].startswith(page.next)
    assert page.do in said["To do"]


@pytest.fixture
def limited() -> KeyState:
    """The only key without a token at `MONDAY`, as KIS's refusal left it."""
    return state_of(MONDAY, attempts=record(("limit", 0.1)))


def report(state: KeyState, at: datetime = MONDAY, error: Exception | None = None) -> None:
    """Report KIS's refusal, or another error, of this key at that time."""
    later = state_of(at, state.token, state.attempts)
    alerts.report(Settings.load(), later, error or limit("minute"), at)


@pytest.mark.usefixtures("gateway")
class TestLife:
    """What is reported over time."""

    def test_an_alert_names_the_sessions_at_risk(self, slack: SlackEndpoint, limited: KeyState) -> None:
        """In KST, with the exchange's own time where it is abroad, the nearest first."""
        report(limited)
        risks = answers(slack.told[0])["Sessions at risk"]
        assert risks.startswith(
            " • KRX: 2026-11-23 09:00 KST, in 40 min • NASD, NYSE, AMEX: 2026-11-23 23:30 KST (Mon 09:30"
        )
        assert "EGW00133" in slack.told[0]["blocks"][1]["text"]["text"]

    def test_one_incident_is_one_message_and_its_end_another(self, slack: SlackEndpoint, limited: KeyState) -> None:
        """Met again it is not told again; its end is told once, with its length; without an incident nothing is."""
        alerts.resolved(Settings.load(), state_of(MONDAY), MONDAY)
        for _ in range(3):
            report(limited)
        for minutes in (95, 120):
            alerts.resolved(Settings.load(), state_of(MONDAY + minutes * MINUTE), MONDAY + minutes * MINUTE)
        assert slack.headlines == [LIMITED, LIMITED.replace(": ", ": solved: ", 1)]
        assert "It lasted 1 h 35 min, from 2026-11-23 08:20 KST." in json.dumps(slack.told[1])

    def test_one_recovery_is_one_message_whatever_happened_before(
        self, slack: SlackEndpoint, limited: KeyState
    ) -> None:
        """KIS's limit, then KIS down, then a full disk: two alarms, as the disk takes a person, and one end."""
        report(limited)
        report(limited, MONDAY + MINUTE, IssuerUnavailableError(DOWN_SAID))
        report(limited, MONDAY + 2 * MINUTE, TokenStoreError("The disk is full."))
        alerts.resolved(Settings.load(), state_of(MONDAY + HOUR), MONDAY + HOUR)
        assert slack.headlines == [
            LIMITED,
            "us+kr: The token directory cannot be used",
            "us+kr: solved: The token directory cannot be used",
        ]

    def test_a_refresh_that_ends_an_incident_is_one_message(self, slack: SlackEndpoint, limited: KeyState) -> None:
        """Slack hears who had which token refreshed, when, why, what works now, and what that solved."""
        report(limited)
        state = state_of(MONDAY + HOUR, make_token(now=MONDAY + HOUR))
        alerts.announce(Settings.load(), state, "forced", by="Kim", why="it was revoked")
        alerts.resolved(Settings.load(), state, state.now)
        assert slack.headlines == [LIMITED, "us+kr: refreshed manually, with force"]
        said = answers(slack.told[1])
        assert said["Solved"] == f"{LIMITED.partition(': ')[2]} (1 h 00 min)"
        assert (said["Why"], said["Works now"]) == ("it was revoked", "the present token, until 2026-11-24 09:15 KST")
        assert "Kim asked for it, 2026-11-23 09:20 KST." in json.dumps(slack.told[1])

    def test_refused_credentials_are_not_over_while_the_token_serves(self, slack: SlackEndpoint) -> None:
        """A check that finds the present token in order does not call them solved; the next answer of KIS does."""
        refused = state_of(MONDAY, make_token(now=MONDAY), record(("bad_key", 5)))
        report(refused, error=CredentialsError("KIS does not know the app key (EGW00103)."))
        alerts.resolved(Settings.load(), refused, MONDAY)
        assert len(slack.told) == 1
        alerts.resolved(Settings.load(), state_of(MONDAY, make_token(now=MONDAY), record(("issued", 0))), MONDAY)
        assert slack.headlines[1:] == ["us+kr: solved: KIS refuses the app key or its secret"]

    def test_a_token_that_someone_else_issued_is_told_once_and_ends_their_limit(
        self, slack: SlackEndpoint, limited: KeyState
    ) -> None:
        """One message instead of two, no reminder, and its end with our own next token."""
        report(limited)
        token = make_token(age=3600, now=MONDAY)
        answered = Attempt(MONDAY, Outcome.SAME, expires_at=token.expires_at)
        for hours in (0, 1, 2):
            state = state_of(MONDAY + hours * HOUR, token, [answered])
            alerts.resolved(Settings.load(), state, state.now)
        assert slack.headlines == [LIMITED, "us+kr: Someone else has issued a token with this key"]
        assert "issued at 2026-11-23 07:20 KST" in json.dumps(slack.told[1])
        alerts.resolved(Settings.load(), state_of(MONDAY + 3 * HOUR), MONDAY + 3 * HOUR)
        assert slack.headlines[2:] == ["us+kr: solved: Someone else has issued a token with this key"]

    def test_a_page_calls_who_is_named(
        self, slack: SlackEndpoint, limited: KeyState, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """SLACK_MENTION stands in what cannot wait, and nowhere else; the preview begins with the fact all the same."""
        monkeypatch.setenv("SLACK_MENTION", "<!channel> <@U024BE7LH>")
        for at in (MONDAY - 9 * HOUR, MONDAY):
            report(limited, at)
        alerts.resolved(Settings.load(), state_of(MONDAY), MONDAY)
        assert ["<!channel> <@U024BE7LH>" in json.dumps(one) for one in slack.told] == [False, True, False]
        assert slack.told[1]["text"].startswith("no token · KRX opens in 40 min · ")
        assert slack.told[1]["blocks"][1]["text"]["text"].startswith("<!channel> <@U024BE7LH> *no token · KRX opens")

    def test_alerts_are_korean_where_the_settings_say_so(
        self, slack: SlackEndpoint, limited: KeyState, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All but the error's own sentence is in the reader's language."""
        monkeypatch.setenv("SLACK_LANGUAGE", "ko")
        report(limited)
        alerts.resolved(Settings.load(), state_of(MONDAY + 65 * MINUTE), MONDAY + 65 * MINUTE)
        said = slack.told[0]["blocks"][2]["text"]["text"]
        assert slack.told[0]["text"].startswith("토큰 없음 · KRX 개장 40분 전 · us+kr: 다른 프로그램이 이 앱키로")
        assert said.startswith("*사용 가능:* 없음(유효한 접근토큰이 없습니다)\n*영향을 받는 거래 시간:*")
        assert "NASD, NYSE, AMEX: 2026-11-23 23:30 KST(현지 월 09:30), 15시간 10분 후" in said
        assert "2026-11-23 08:20 KST부터 1시간 5분 동안 지속되었습니다." in json.dumps(
            slack.told[1], ensure_ascii=False
        )


@pytest.mark.usefixtures("gateway")
def test_trouble_that_came_to_no_key_denies_no_token(slack: SlackEndpoint) -> None:
    """Nobody has looked at the tokens of what is reported there: they serve until they expire, before and after."""
    alerts.report(Settings.load(), "KRX", ConfigurationError("A setting is wrong."), MONDAY)
    alerts.resolved(Settings.load(), "KRX", MONDAY + 5 * MINUTE)
    works = "cached tokens, until they expire"
    assert [answers(one).get("Still works") or answers(one)["Works now"] for one in slack.told] == [works, works]
    assert slack.told[0]["text"].startswith("KRX opens in 40 min · KRX: A setting is missing or wrong.")


@pytest.mark.usefixtures("gateway")
def test_a_dead_prefect_is_as_urgent_as_the_next_need(slack: SlackEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who looks after no token at all endangers the next need that has none, and people are called for it."""
    monkeypatch.setenv("SLACK_MENTION", "<!here>")
    for hours in (-9, -0.3):
        now = MONDAY + hours * HOUR
        alerts.report(Settings.load(), "Prefect", causes.SilenceError("The server is dead."), now)
    opened, escalated = slack.told
    assert "• KRX: 2026-11-23 09:00 KST" in json.dumps(opened, ensure_ascii=False)
    assert "<!here>" not in json.dumps(opened)
    assert "<!here> *KRX opens in 58 min*" in escalated["blocks"][1]["text"]["text"]


@pytest.mark.usefixtures("gateway")
def test_an_alert_leads_to_its_run(slack: SlackEndpoint, limited: KeyState, monkeypatch: pytest.MonkeyPatch) -> None:
    """The link begins with PREFECT_UI_URL where people reach the page by another name than the flows do."""
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", "0a1b")
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__NAME", "warm-up KRX 2026-11-23")
    with temporary_settings({PREFECT_UI_URL: "https://prefect.example.com/"}):
        report(limited)
    link = "<https://prefect.example.com/runs/flow-run/0a1b|warm-up KRX 2026-11-23>"
    assert slack.told[0]["blocks"][3]["elements"][0]["text"] == f"Run: {link}"


@pytest.mark.usefixtures("gateway")
def test_no_secret_is_sent_logged_or_kept(slack: SlackEndpoint, caplog: pytest.LogCaptureFixture) -> None:
    """Neither key, secret, token nor webhook is in a message, a log line or the incidents, which are the owner's."""
    (key,) = Key.load(Settings.load())
    assert key.obtain(datetime.now(UTC) + HOUR, datetime.now(UTC))
    with caplog.at_level(logging.DEBUG):
        alerts.report(Settings.load(), key, CredentialsError("KIS denied access (EGW00003)."), datetime.now(UTC))
    written = Path("~/.tokencore/incidents.json").expanduser()
    everything = json.dumps(slack.told) + caplog.text + written.read_text()
    token = key.state(datetime.now(UTC)).token
    assert token
    assert "EGW00003" in everything
    assert not [one for one in (APP_KEY, APP_SECRET, token.access_token, HOOK) if one in everything]
    assert stat.S_IMODE(written.stat().st_mode) == 0o600


@pytest.mark.usefixtures("gateway")
def test_an_unusable_token_directory_is_told(
    slack: SlackEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where not even the incident can be kept, it is told anyway, and the error stays what it was."""
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("KIS_TOKEN_DIR", str(tmp_path / "file"))
    settings, error = Settings.load(), TokenStoreError("The token directory cannot be used: it is a file.")
    assert alerts.report(settings, Key.load(settings)[0], error, MONDAY) is error
    assert slack.headlines == ["us+kr: The token directory cannot be used"]


@pytest.mark.parametrize("texts", messages.LANGUAGES.values(), ids=list(messages.LANGUAGES))
@pytest.mark.parametrize("cause", causes.CAUSES, ids=lambda cause: cause.name)
def test_every_alert_fits_slack_and_a_phone(cause: Cause, texts: messages.Texts) -> None:
    """Headers keep below Slack's 150 characters, whatever the key is called, and paragraphs below 3000."""
    incident = incidents.new("us", cause, MONDAY, MONDAY)
    facts = messages.Facts("us+kr+hk+jp+cn+vn (paper)", MONDAY + 1000 * HOUR, None, True, [], ("", None), "")  # noqa: FBT003 - as it comes
    told = incidents.Telling("reminded", incidents.CALM, page=False)
    message = messages.trouble(texts, facts, incident, told, "y" * 5000, ("next.planned", MONDAY))
    header, happened, answered = message.blocks
    assert header["text"]["text"].endswith(texts(f"cause.{cause.name}.title"))
    assert max(len(block["text"]["text"]) for block in (happened, answered)) < 3000


def test_spans_and_days_are_written_as_people_write_them() -> None:
    """Hours and minutes, a minute at least; the day before the time."""
    english, korean = messages.LANGUAGES["en"], messages.LANGUAGES["ko"]
    assert [english.lasted(span) for span in (MINUTE / 60, 185 * MINUTE)] == ["1 min", "3 h 05 min"]
    assert [korean.lasted(span) for span in (185 * MINUTE, 2 * HOUR)] == ["3시간 5분", "2시간"]
    assert korean.weekday(MONDAY) == "일 23:20"
    assert clock(MONDAY) == "2026-11-23 08:20 KST"


def test_the_page_of_alerts_is_current() -> None:
    """What docs/alerts.md shows is what the code says today; `python tests/alert_samples.py` brings it up to date."""
    page = alert_samples.PAGE.read_text(encoding="utf-8")
    assert page == alert_samples.current(page)
