"""The flows: how runs end, what they publish and leave for later; the sandbox is KIS, Prefect is real where it runs."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import resource
import sqlite3
import stat
import sys
import threading
import time
import traceback
from collections import Counter
from datetime import UTC, datetime, timedelta
from datetime import time as clock_time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from zoneinfo import ZoneInfo

import pytest
import time_machine
from builders import ended, fill_disk, forms, in_child, make_jwt, make_token
from flow_runs import end_of, only_key, paused, planned_runs, refreshed, run
from hypothesis import given
from hypothesis import strategies as st
from prefect import State, flow
from prefect.artifacts import Artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import FailedRun
from prefect.flow_engine import run_flow
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_SERVER_DATABASE_CONNECTION_URL
from prefect.states import Scheduled
from running import asked, cached, record
from servers import HOOK

from flows import alerts, artifacts, check_tokens, refresh_token, runs, upcoming, warm_up
from flows.runs import Done, UnforeseenError, View, failures, harmless, retry_delays, safe_errors
from tokencore import (
    CredentialsError,
    IssuanceLimitError,
    IssuerUnavailableError,
    Key,
    Settings,
    TokenError,
    TokenStoreError,
    sessions,
)
from tokencore.attempts import Attempt, Outcome
from tokencore.policy import retry_delay
from tokencore.sandbox import APP_KEY, APP_SECRET

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from servers import SlackEndpoint

    from tokencore.sandbox import Sandbox

    Opens = Callable[[timedelta], str]

CANARY = "canary-0123456789"
HOUR, SOON = timedelta(hours=1), timedelta(minutes=40)
KST = ZoneInfo("Asia/Seoul")
SATURDAY = datetime(2026, 11, 28, 3, tzinfo=UTC)  # noon in Seoul, nothing is open
BUSY = ("/uapi/", {"rt_cd": "1", "msg_cd": "EGW00201", "msg1": "too many"}, 500)
DEAD = "us+kr: KIS rejects the token, and issues no other yet"
gateway_only = pytest.mark.usefixtures("gateway")


def now() -> datetime:
    """The present moment."""
    return datetime.now(UTC)


def kept(until: datetime | None = None) -> Done:
    """What a warm-up's step makes of the only key."""
    return warm_up.ensure.fn(only_key(), until or now() + SOON + HOUR)


def followed(at: datetime | None = None) -> State:
    """The end of a check of the only key."""
    return check_tokens.ended({only_key(): check_tokens.advance.fn(only_key(), now=at)})


def visited(exchange: str, due: datetime, at: datetime | None = None) -> State:
    """The end of a warm-up that comes to no key."""
    return alerts.guarded(exchange, lambda settings, _: warm_up.visit(settings, exchange, due, at or due))


def quotes(gateway: Sandbox) -> int:
    """How many quote calls KIS has seen."""
    stats = gateway.stats()
    return int(stats["quotes"] + sum(stats["quotes_refused"].values()))


class TestErrors:
    """What may leave a run."""

    @pytest.mark.parametrize(
        ("error", "said"),
        [
            (LookupError(CANARY), r"^Unexpected LookupError at test_flows\.py:\d+; its text is withheld\.$"),
            (IssuerUnavailableError("KIS cannot be reached."), r"^KIS cannot be reached\.$"),
        ],
        ids=["an unforeseen one by its kind and place", "tokencore's by its own words, which are made for people"],
    )
    def test_an_error_leaves_without_a_foreign_text(self, error: Exception, said: str) -> None:
        """Neither the message nor the traceback has the text of a foreign error or of those behind any."""

        def fail() -> None:
            raise error from KeyError(CANARY)

        with pytest.raises((UnforeseenError, TokenError), match=said) as caught, safe_errors():
            fail()
        assert CANARY not in "".join(traceback.format_exception(caught.value))

    def test_what_is_harmless_is_logged_by_its_kind(self, caplog: pytest.LogCaptureFixture) -> None:
        """Nothing is raised, and the log does not have the error's text."""
        with harmless("The table could not be published"):
            raise OSError(CANARY)
        assert "The table could not be published: OSError." in caplog.text
        assert CANARY not in caplog.text

    @pytest.mark.parametrize("error", [IssuerUnavailableError("KIS is down."), FailedRun("KIS is down.")])
    def test_a_failed_runs_log_ends_with_its_sentence(self, error: Exception) -> None:
        """Not with Prefect's traceback, which follows it, and names none of the user's files."""
        for name in ("prefect.flow_runs", "prefect.task_runs"):
            line = logging.LogRecord(name, logging.ERROR, "", 1, "It ended: %r", (error,), (type(error), error, None))
            assert logging.getLogger(name).filter(line)
            assert (line.getMessage(), line.exc_info) == ("KIS is down.", None)

    @gateway_only
    def test_a_failure_names_its_key_where_there_are_several(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With one key, the sentence is enough."""
        monkeypatch.setenv("KIS_MARKETS__KR__APP_KEY", "another-key")
        us, kr = Key.load(Settings.load())
        down = IssuerUnavailableError("KIS is down.")
        said = [failures(results) for results in ({us: down}, {us: down, kr: "fine"}, {us: "fine"})]
        assert said == ["KIS is down.", "us: KIS is down.", ""]

    @given(interval=st.floats(0, 3600), minutes=st.integers(-5, 600))
    def test_prefect_never_tries_again_inside_the_cool_down(self, interval: float, minutes: int) -> None:
        """Every pause outlasts the issue interval by 5 s, all end within the span, and they follow the rule."""
        delays = retry_delays(interval, timedelta(minutes=minutes))
        assert all(delay >= interval + 5 for delay in delays)
        assert sum(delays) <= max(minutes, 0) * 60
        assert len(delays) <= 20
        rule = [retry_delay(failed).total_seconds() + 5 for failed in range(1, 8)]
        assert retry_delays(60, timedelta(minutes=24)) == rule


class TestWarmUp:
    """The step of a warm-up, and the runs that come to no key."""

    @gateway_only
    def test_a_run_that_has_nothing_to_do_says_why(self) -> None:
        """The scheduled day decides, in the exchange's zone, and the holiday is named; a session can be over."""
        closed = visited("SEHK", due=datetime(2025, 10, 29, 0, 50, tzinfo=UTC))
        assert (end_of(closed), closed.message) == (("COMPLETED", "MarketClosed"), "SEHK closed: Chung Yeung Festival")
        friday = datetime(2026, 11, 26, 23, 20, tzinfo=UTC)  # of KRX
        assert end_of(visited("KRX", friday, friday + 8 * HOUR)) == ("COMPLETED", "SkippedLate")

    def test_a_stale_run_is_skipped_only_where_the_token_is_valid(self, gateway: Sandbox, opens: Opens) -> None:
        """A run from before the open that comes after it does nothing where the token lasts; KIS is not asked."""
        exchange, due = opens(timedelta(minutes=-5)), now() - SOON
        kept()
        assert end_of(visited(exchange, due, now())) == ("COMPLETED", "SkippedLate")
        assert (asked(gateway), quotes(gateway)) == (1, 0)

    def test_an_exchange_that_nobody_trades_fails_with_what_to_do(
        self, gateway: Sandbox, slack: SlackEndpoint, opens: Opens, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The sentence names the setting, and Slack says to pause the deployment.

        So does that of malformed settings, with which nobody knows where Slack is.
        """
        exchange = opens(SOON)
        for market in ("US", "KR"):
            monkeypatch.setenv(f"KIS_MARKETS__{market}__EXCHANGES", "SEHK")
        state = visited(exchange, now())
        assert end_of(state) == ("FAILED", "Failed")
        assert str(state.message).startswith(f"No market of your settings trades {exchange}; add it")
        assert "Pause the deployment" in slack.messages[0]["blocks"][2]["text"]["text"]
        monkeypatch.setenv("KIS_TIMEOUT", "soon")
        state = visited("KRX", now())
        assert (end_of(state), str(state.message)[:26]) == (("FAILED", "Failed"), "KIS_TIMEOUT cannot be used")
        assert (asked(gateway), len(slack.messages)) == (0, 1)

    @pytest.mark.parametrize(("prove", "calls"), [("true", 1), ("false", 0)])
    def test_a_token_is_issued_once_then_proved_by_one_quote_call(
        self, gateway: Sandbox, monkeypatch: pytest.MonkeyPatch, prove: str, calls: int
    ) -> None:
        """The first step issues, the next one asks KIS whether it accepts the token, unless KIS_PROVE_TOKENS=false."""
        monkeypatch.setenv("KIS_PROVE_TOKENS", prove)
        assert [(one.renewed, one.remark) for one in (kept(), kept())] == [(True, ""), (False, "")]
        assert (asked(gateway), quotes(gateway)) == (1, calls)

    def test_a_token_that_kis_has_killed_is_renewed_or_an_alert(self, gateway: Sandbox, slack: SlackEndpoint) -> None:
        """The quote call finds it dead, so nobody gets it any more; after six hours it is replaced in the same run.

        Before, the error says when a new one is possible, and KIS is not asked for one.
        """
        cached(left=23 * 3600)  # the sandbox refuses a token that it has not issued, as KIS does a dead one
        with pytest.raises(IssuanceLimitError, match="A new one can be issued from") as caught:
            kept()
        assert (caught.value.cause, only_key().state(now()).status) == ("same_token", "REJECTED")
        assert (slack.headlines, slack.messages[0]["text"][:11], asked(gateway)) == ([DEAD], "no token · ", 0)
        view = View(only_key(), only_key().state(now()))
        assert artifacts.caption([view]).startswith("us, kr REJECTED: KIS rejects the token; next attempt 20")
        assert "**To do (us+kr):** Run refresh_token with force" in artifacts.table([view])
        cached(left=17 * 3600)
        done = kept()
        assert (done.renewed, done.state.status, asked(gateway), quotes(gateway)) == (True, "VALID", 1, 2)

    def test_a_quote_that_says_nothing_changes_nothing_and_is_said(self, gateway: Sandbox, opens: Opens) -> None:
        """Too many calls, or KIS being down, proves nothing about the token: it is warm, and the state says so."""
        exchange = opens(SOON)
        cached()  # the sandbox knows no such token
        gateway.answer(*BUSY)
        done = kept()
        state = warm_up.ended(exchange, now(), {done.state.key: done})
        assert (end_of(state), done.state.status) == (("COMPLETED", "Warm"), "VALID")
        assert "KIS did not say whether it accepts the token (HTTP 500: EGW00201" in str(state.message)

    @pytest.mark.parametrize("step", ["warm-up", "check"])
    def test_a_wrong_secret_is_told_while_the_token_still_serves(
        self, gateway: Sandbox, slack: SlackEndpoint, opens: Opens, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        """The quote call meets it hours before the renewal would: an alert and the table's problem; no run fails."""
        opens(SOON)
        kept()
        monkeypatch.setenv("KIS_APP_SECRET", "wrong" * 36)
        key = only_key()
        done = warm_up.ensure.fn(key, now() + SOON) if step == "warm-up" else check_tokens.advance.fn(key)
        assert slack.headlines == ["us+kr: KIS refuses the app key or its secret"]
        (view,) = runs.views([key], {key: done})
        assert artifacts.caption([view]) == "us, kr VALID: KIS refuses the app secret in a quote call (EGW00105)"
        assert "**To do (us+kr):** Correct KIS_APP_KEY" in artifacts.table([view])
        assert asked(gateway) == 1

    def test_a_refusal_of_the_key_outside_of_the_flows_is_told_by_the_next_check(
        self, gateway: Sandbox, slack: SlackEndpoint, opens: Opens, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A person's refresh met it while the token serves on: one alert, long before a renewal is due, no request."""
        opens(SOON)
        kept()
        gateway.fail("bad-secret", count=1)
        time.sleep(0.6)  # the gateway's minute
        with pytest.raises(CredentialsError):
            only_key().refresh(force=True, reason="", by="")
        monkeypatch.setenv("KIS_PROVE_TOKENS", "false")
        asked_before = asked(gateway)
        states = [followed(), followed()]
        assert [end_of(state) for state in states] == [("COMPLETED", "AlreadyValid")] * 2
        assert "KIS refused these credentials" in str(states[0].message)
        assert slack.headlines == ["us+kr: KIS refuses the app key or its secret"]
        assert asked(gateway) == asked_before

    def test_a_token_that_ends_a_moment_before_its_need_lasts(self, gateway: Sandbox) -> None:
        """The token of the daily anchor lasts to the second, and KIS's clock is not ours: that costs no issuance."""
        token = kept().state.token
        assert token
        until = token.expires_at - timedelta(seconds=300 - 15)
        assert not kept(until).renewed
        with pytest.raises(IssuanceLimitError):
            kept(until + timedelta(minutes=1))
        assert asked(gateway) == 1

    def test_a_token_that_reaches_no_file_fails_the_warm_up(self, gateway: Sandbox) -> None:
        """On a full disk it does not say that the token is warm: no other process would find it."""

        def warm_up_on_a_full_disk() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))  # a line of the record fits, a token file does not
            with pytest.raises(TokenStoreError, match="only this process has it"):
                kept()

        assert ended(in_child(warm_up_on_a_full_disk)) == 0
        assert asked(gateway) == 1


class TestCheck:
    """The step of a check, and what it says."""

    def test_a_token_is_proved_only_on_a_day_with_a_session(self, gateway: Sandbox) -> None:
        """On the evening before a session nobody asks; from midnight in Korea every check does, once."""
        key = only_key()
        with key.store.lock(wait=1):
            key.store.save(make_token(now=SATURDAY + 30 * HOUR))  # Sunday 18:00
        gateway.answer(*BUSY)
        for hours, calls in ((30.5, 0), (36.5, 1)):  # Sunday 18:30, Monday 00:30
            assert followed(SATURDAY + hours * HOUR).name == "AlreadyValid"
            assert quotes(gateway) == calls

    def test_trouble_while_the_need_is_covered_fails_no_check(self, gateway: Sandbox, opens: Opens) -> None:
        """A refused renewal is in the state's message where the present token lasts through the need."""
        opens(timedelta(hours=-2))  # over; the next one is far away
        assert (followed().type.value, asked(gateway)) == ("COMPLETED", 0)
        limited = Done(kept().state, renewed=False, trouble=TokenError("KIS refused to issue (EGW00133)."))
        state = check_tokens.ended({only_key(): limited})
        assert end_of(state) == ("COMPLETED", "AlreadyValid")
        assert "; KIS refused to issue (EGW00133); " in str(state.message)

    @gateway_only
    def test_of_checks_that_were_missed_one_catches_up(self) -> None:
        """After a down-time the runs that are left over find that a later one has done their work."""
        assert end_of(check_tokens.check(Settings.load(), now() - 3 * HOUR, now())) == ("COMPLETED", "SkippedLate")


class TestTable:
    """The table of tokens."""

    @gateway_only
    def test_five_columns_say_how_a_market_is(self) -> None:
        """Market, status, until, session covered, and the next renewal; nothing to do, nothing Markdown acts on."""
        cached()
        view = View(only_key(), only_key().state(now()))
        shown, caption = artifacts.table([view]), artifacts.caption([view])
        assert shown.startswith(
            "**To do:** nothing.\n\n| market | status | until (KST) | session covered | next renewal"
        )
        us, kr = artifacts.rows_of(view)
        assert (us[:2], kr[:2]) == (["us", "VALID"], ["kr", "VALID"])
        assert re.fullmatch(r"\d\d-\d\d \d\d:\d\d", us[2])
        assert us[3].startswith(("yes, to ", "by next renewal, to "))
        assert re.match(r"\d\d-\d\d \d\d:\d\d", us[4])
        assert re.fullmatch(r"us, kr VALID until 20\d\d-\d\d-\d\d \d\d:\d\d KST", caption)

    def test_a_limit_that_forbids_the_renewal_is_the_problem_and_names_the_next_attempt(
        self, gateway: Sandbox, opens: Opens
    ) -> None:
        """Nothing is asked of KIS then, so the record has no failure; row and caption say the same."""
        opens(SOON)
        record(*[Attempt(now() - age * HOUR, Outcome.ISSUED, expires_at=now() + (24 - age) * HOUR) for age in (20, 10)])
        with pytest.raises(IssuanceLimitError) as caught:
            check_tokens.advance.fn(only_key())
        view = View(only_key(), only_key().state(now()), caught.value)
        (said,) = {row[-1] for row in artifacts.rows_of(view)}
        assert re.match(r"The 24-hour limit is reached: .*; next attempt 20\d\d-.* KST$", said)
        assert artifacts.caption([view]) == f"us, kr NO_TOKEN: {said}"
        assert asked(gateway) == 0

    def test_a_renewal_that_failed_is_said_once_for_all_markets(self, gateway: Sandbox, opens: Opens) -> None:
        """Table, caption and message say when it failed, why, when it is tried again, and what a person has to do."""
        opens(SOON)
        gateway.fail("down")
        with pytest.raises(IssuerUnavailableError):
            check_tokens.advance.fn(only_key())
        view = View(only_key(), state := only_key().state(now()))
        (said,) = {row[-1] for row in artifacts.rows_of(view)}
        assert re.match(r"a fault of KIS's \(EGW00002\) at .* KST; next attempt .* KST$", said)
        assert artifacts.caption([view]) == f"us, kr NO_TOKEN: {said}"
        assert "**To do (us+kr):** Look at KIS's notices of maintenance" in artifacts.table([view])  # a session is near
        assert "; a fault of KIS's (EGW00002) at 20" in check_tokens.progress(Done(state, renewed=False))

    @pytest.mark.usefixtures("gateway", "prefect_home")
    def test_a_token_that_only_a_run_has_is_no_token(self, slack: SlackEndpoint, opens: Opens) -> None:
        """With a full disk the check fails; table and alert count on nothing, and the table has the cause and the fix.

        So it has of a store that cannot be read; whatever is in an error, Markdown acts on none of it.
        """
        opens(SOON)

        def checked() -> None:
            fill_disk()
            with pytest.raises(TokenStoreError, match="only this process has it") as caught:
                check_tokens.advance.fn(only_key())
            (view,) = runs.views([only_key()], {only_key(): caught.value})
            assert {row[1] for row in artifacts.rows_of(view)} == {"NO_TOKEN"}
            assert artifacts.caption([view]).startswith("us, kr NO_TOKEN: KIS issued a token that could not be saved")
            assert "**To do (us+kr):** Fix its permissions or free space" in artifacts.table([view])

        assert ended(in_child(checked)) == 0
        assert slack.messages[0]["text"].startswith("no token · ")
        well = View(only_key(), only_key().state(now()))
        broken = View(only_key(), None, TokenStoreError("- It | cannot `be` used: no space. Fix it."))
        said = "us, kr UNREADABLE: It / cannot 'be' used: no space; us, kr NO_TOKEN: "
        assert artifacts.caption(artifacts.worst_first([well, broken])).startswith(said)

    def test_a_renewal_that_is_going_to_fail_covers_no_session(self, opens: Opens) -> None:
        """Where a quote call has met a wrong secret, "by next renewal" would be untrue."""
        opens(timedelta(hours=2))
        cached(left=70 * 60)
        view = View(only_key(), only_key().state(now()))
        refused = view._replace(trouble=CredentialsError("KIS refuses the app secret."))
        assert [artifacts.rows_of(one)[0][3].partition(" to ")[0] for one in (view, refused)] == [
            "by next renewal,",
            "no, needed",
        ]

    def test_a_renewal_that_nobody_will_try_is_not_promised(self, gateway: Sandbox) -> None:
        """After refused credentials table, plan and message name no next renewal, but say who has to act.

        A token that serves on beside them is a problem, and comes before what is well.
        """
        cached(left=3 * 3600)
        gateway.fail("bad-key", 1)
        with pytest.raises(CredentialsError):
            only_key().refresh(force=True, reason="a test", by="")
        view = View(only_key(), state := only_key().state(now()))
        plan = artifacts.described([state])
        assert {row[-1] for row in artifacts.rows_of(view)} == {"KIS refused the credentials"}
        assert artifacts.caption([view]) == "us, kr VALID: KIS refused the credentials"
        assert "**To do (us+kr):** Correct KIS_APP_KEY" in artifacts.table([view])
        assert (f"{artifacts.REFUSED}." in plan, "| next renewal |" in plan) == (True, False)
        assert check_tokens.progress(Done(state, renewed=False)).endswith(artifacts.REFUSED)


class Played(NamedTuple):
    """What some days were: runs with their ends, checks by theirs, requests to KIS, headlines in Slack; in KST."""

    runs: str
    checks: dict[str, int]
    requests: str
    messages: list[str]


WARM_UPS = {"KRX": (clock_time(8, 20), KST), "NASD": (clock_time(8, 50), ZoneInfo("America/New_York"))}  # on weekdays
MANUAL, KILL = "manually", "maintenance"
WEEKS: dict[str, tuple[datetime, int, tuple[datetime, str] | None, Played]] = {
    "summer: New York closed on the Fourth, a manual refresh on Wednesday": (
        *(datetime(2025, 6, 29, 16, tzinfo=KST), 7, (datetime(2025, 7, 2, 12, tzinfo=KST), MANUAL)),
        Played(
            "Sun 16:35 renewal Renewed, Mon 08:20 KRX Warm, Mon 16:35 renewal Renewed, Mon 21:50 NASD Warm, "
            "Tue 08:20 KRX Warm, Tue 16:35 renewal Renewed, Tue 21:50 NASD Warm, Wed 08:20 KRX Warm, "
            "Wed 12:00 manually Renewed, Wed 21:50 NASD Warm, Thu 07:25 renewal Renewed, Thu 08:20 KRX Warm, "
            "Thu 21:50 NASD Warm, Fri 07:25 renewal Renewed, Fri 08:20 KRX Warm, Fri 21:50 NASD MarketClosed",
            {"AlreadyValid": 135, "Completed": 33},
            "Sun 16:35, Mon 16:35, Tue 16:35, Wed 12:00, Thu 07:25, Fri 07:25",
            ["us+kr: refreshed manually, with force"],
        ),
    ),
    "maintenance kills the token in the evening": (
        *(datetime(2025, 3, 5, 16, tzinfo=KST), 1, (datetime(2025, 3, 5, 20, 30, tzinfo=KST), KILL)),
        Played(
            "Wed 16:05 check Renewed, Wed 22:05 renewal Renewed, Wed 22:50 NASD Warm, Thu 08:20 KRX Warm",
            {"Renewed": 1, "AlreadyValid": 21, "Failed": 1, "Completed": 1},
            "Wed 16:05, Wed 22:05",
            [DEAD, DEAD.replace(": ", ": solved: ", 1)],
        ),
    ),
}


def calendar(begin: datetime, days: int) -> Iterator[tuple[datetime, str]]:
    """What the schedules of prefect.yaml start in these days, at which instant."""
    for day in (begin.date() + timedelta(days=n) for n in range(days + 1)):
        yield from ((datetime.combine(day, clock_time(hour, 5), KST), "check") for hour in range(24))
        if day.weekday() < 5:
            yield from ((datetime.combine(day, at, zone), name) for name, (at, zone) in WARM_UPS.items())


def step(gateway: Sandbox, what: str, at: datetime) -> State | None:
    """The end of one run, without Prefect."""
    if what == KILL:
        gateway.kill_tokens()
        return None
    key = only_key()
    if what == MANUAL:
        return refresh_token.renew(key, refresh_token.Request("us", force=True, reason="", operator="Kim"), at)[0]
    if what not in WARM_UPS:
        try:
            return followed(at)
        except TokenError as error:
            return check_tokens.ended({key: error})
    need = sessions.need(what, runs.local_date(what, at))
    return warm_up.ended(what, need[1], {key: kept(need[1])}) if need else visited(what, at)


@pytest.mark.parametrize(("begin", "days", "extra", "expected"), WEEKS.values(), ids=list(WEEKS))
def test_a_week_goes_as_the_rule_says(
    gateway: Sandbox,
    slack: SlackEndpoint,
    monkeypatch: pytest.MonkeyPatch,
    begin: datetime,
    days: int,
    extra: tuple[datetime, str] | None,
    expected: Played,
) -> None:
    """Every run of the days at its instant, its end, every request to KIS and every message are those of the table."""
    monkeypatch.setenv("KIS_MARKETS__US__EXCHANGES", "NASD")
    monkeypatch.setenv("KIS_ISSUE_INTERVAL", "60")
    gateway.set_rules(issue_interval=60)
    fixed = [*calendar(begin, days), *([extra] if extra else [])]
    fixed = sorted((at.astimezone(UTC), what) for at, what in fixed if begin <= at < begin + timedelta(days=days))
    done, checks, planned = [], Counter[str](), None
    while fixed:
        at, what = min([fixed[0], *([(planned, "renewal")] if planned else [])])
        fixed = fixed[what != "renewal" :]
        with time_machine.travel(at + timedelta(seconds=1)):
            state = step(gateway, what, now())
            planned = only_key().state(now()).next_attempt
        if state and what == "check":
            checks[str(state.name)] += 1
        if state and (what != "check" or state.name == "Renewed"):
            done.append(f"{at.astimezone(KST):%a %H:%M} {what} {state.name}")
    requests = [f"{datetime.fromtimestamp(one['at'], KST):%a %H:%M}" for one in gateway.stats()["requests"]]
    assert Played(", ".join(done), dict(checks), ", ".join(requests), slack.headlines) == expected


def leak_places(database: Path, text: str) -> set[str]:
    """The tables and columns in which the text stands."""
    places = set()
    with sqlite3.connect(f"file:{database}?mode=ro", timeout=60, uri=True) as connection:
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            for column in [row[1] for row in connection.execute(f"PRAGMA table_info('{name}')")]:
                query = f"SELECT 1 FROM '{name}' WHERE instr(CAST(\"{column}\" AS TEXT), ?) LIMIT 1"  # noqa: S608 - its own names
                if connection.execute(query, (text,)).fetchone():
                    places.add(f"{name}.{column}")
    return places


@flow
def leak(secret: str) -> None:
    """What no flow of ours does: a secret as a parameter, in a log line and in an exception."""
    get_run_logger().info("a line with %s", secret)
    raise ValueError(secret)


@flow
def publish() -> None:
    """Publish the table and the plan as a run of ours does."""
    artifacts.publish(runs.views([only_key()], {}))


def contents(folder: Path) -> Iterator[bytes]:
    """All files of a server that runs: some go while they are looked at."""
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            yield path.read_bytes()


def names(*tags: str) -> list[str]:
    """The names of the runs with these tags, in the order of time."""
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(sort=FlowRunSort.EXPECTED_START_TIME_ASC)
    return [one.name for one in found if set(tags) <= set(one.tags)]


def table() -> dict[str, str]:
    """Every market's status as published last: in the first installation's table on this server, or in our own."""
    own = min(key.fingerprint[:8] for key in Key.load(Settings.load()))
    found = Artifact.get(f"tokens-{own}") or Artifact.get(artifacts.TOKENS)
    return dict(re.findall(r"^\| (\w+) \| ([A-Z_]+) \|", str(cast("Artifact", found).data), re.MULTILINE))


def counted(work: Callable[[], object]) -> Counter[str]:
    """The calls into our packages, of all threads."""
    folders = tuple(str(Path(str(package.__file__)).parent) for package in (runs, sys.modules["tokencore"]))
    calls: Counter[str] = Counter()

    def count(frame: Any, event: str, _: object) -> None:  # noqa: ANN401 - the interpreter's
        if event == "call" and frame.f_code.co_filename.startswith(folders):
            calls[frame.f_code.co_name] += 1

    threading.setprofile(count)
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return calls


@pytest.fixture
def deployed() -> None:
    """The deployment of check_tokens, without which nothing is left for later; nothing is planned yet."""
    with get_client(sync_client=True) as client:
        for one in client.read_flow_runs():
            if upcoming.TAG in one.tags:
                client.delete_flow_run(one.id)
        client.create_deployment(client.create_flow(check_tokens.check_tokens), "check_tokens")


@pytest.mark.usefixtures("prefect_home", "deployed")
class TestRuns:
    """Whole runs on a Prefect server."""

    def test_a_warm_up_renews_publishes_and_leaves_the_next_renewal(self, gateway: Sandbox, opens: Opens) -> None:
        """Renewed, then Warm on the same token; the run is named after the exchange's own day.

        The one that renews reads everything once: at most 2,500 calls into our packages, with its artifacts; an alert
        takes 400.
        """
        exchange, states = opens(SOON), []
        calls = counted(lambda: states.append(run(warm_up.warm_up, exchange=exchange)))
        assert 0 < calls.total() <= 2500, calls.most_common(20)
        state, down = only_key().state(now()), IssuerUnavailableError("KIS is down.")
        calls = counted(lambda: alerts.report(Settings.load(), state, down, now()))
        assert 0 < calls.total() <= 400, calls.most_common(20)
        states.append(run(warm_up.warm_up, exchange=exchange))
        assert [end_of(state) for state in states] == [("COMPLETED", "Renewed"), ("COMPLETED", "Warm")]
        assert str(states[1].message).startswith("us+kr: the token serves until ")
        assert asked(gateway) == 1
        assert table() == {"us": "VALID", "kr": "VALID"}
        assert "data:image/svg+xml" in str(cast("Artifact", Artifact.get(artifacts.PLAN)).data)
        assert planned_runs() == {"us+kr": [only_key().state(now()).next_attempt]}
        assert names().count(f"warm-up {exchange} {runs.local_date(exchange, now())}") == 2

    def test_kis_being_down_is_tried_again_after_the_cool_down(
        self, gateway: Sandbox, slack: SlackEndpoint, opens: Opens
    ) -> None:
        """Prefect tries again five seconds after the cool-down, and the run ends Renewed; Slack heard of both."""
        exchange = opens(SOON)
        gateway.fail("server-error", 1)
        begun = time.monotonic()
        assert end_of(run(warm_up.warm_up, exchange=exchange)) == ("COMPLETED", "Renewed")
        assert time.monotonic() - begun > 5.5
        assert asked(gateway) == 2
        assert slack.headlines == ["us+kr: KIS gives no token", "us+kr: solved: KIS gives no token"]
        assert "then every few minutes" in slack.messages[0]["blocks"][2]["text"]["text"]

    @pytest.mark.filterwarnings("ignore:Artifact creation outside")  # of Prefect's, which a step has in a run only
    @pytest.mark.parametrize("step", ["warm-up", "check"])
    def test_the_table_has_the_trouble_while_its_run_goes_on(self, gateway: Sandbox, opens: Opens, step: str) -> None:
        """Until the end of a run, which tries for most of an hour, an older table would say that all is well."""
        opens(SOON)
        gateway.fail("down")
        artifacts.publish([View(only_key(), None, TokenStoreError("An older table."))])
        with pytest.raises(IssuerUnavailableError):
            _ = check_tokens.advance.fn(only_key(), 65) if step == "check" else warm_up.ensure.fn(only_key(), now(), 65)
        assert table() == dict.fromkeys(("us", "kr"), "NO_TOKEN")

    def test_one_keys_trouble_does_not_stop_the_others(
        self, gateway: Sandbox, slack: SlackEndpoint, opens: Opens, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A check with two keys fails for the one that is refused, renews the other and leaves its next renewal.

        As a planned renewal it keeps its name: who saw it coming finds it again.
        """
        opens(SOON)
        monkeypatch.setenv("KIS_MARKETS__KR__APP_KEY", "another-key-" * 3)
        gateway.fail("bad-secret", 1)
        due: State[Any] = Scheduled(scheduled_time=now())
        with get_client(sync_client=True) as client:
            made = client.create_flow_run(check_tokens.check_tokens, name="renew us", tags=[upcoming.TAG], state=due)
            state = cast("State", run_flow(check_tokens.check_tokens, flow_run=made, return_type="state"))
        assert (end_of(state), asked(gateway), names(upcoming.TAG)[0]) == (("FAILED", "Failed"), 2, "renew us")
        broken, other = sorted(table(), key=table().__getitem__)
        assert (table()[broken], table()[other]) == ("NO_TOKEN", "VALID")
        assert str(state.message).startswith(f"{broken}: KIS refused the app secret (EGW00105).")
        assert slack.headlines == [f"{broken}: KIS refuses the app key or its secret"]
        assert list(planned_runs()) == [other]

    def test_the_next_renewal_is_a_scheduled_run_that_moves_and_goes(self) -> None:
        """One run per key stands at its moment: kept while the plan stays, moved with it, gone without it.

        Another installation's is left alone. One whose moment has come stays, whatever the plan says now: it finds out
        what there is to do.
        """
        soon, later = (now().replace(microsecond=0) + hours * HOUR for hours in (2, 3))
        ours, theirs = upcoming.Wanted("us+kr", "key 1a", soon), upcoming.Wanted("us+kr", "key 2b", soon)
        for wanted, planned in (
            *((ours, [soon]), (ours, [soon]), (theirs, [soon, soon])),
            *((ours._replace(at=later), [soon, later]), (theirs._replace(at=None), [later])),
            *((ours._replace(at=None), []), (ours._replace(at=soon - 3 * HOUR), [soon - 3 * HOUR])),
            (ours._replace(at=None), [soon - 3 * HOUR]),
        ):
            upcoming.keep([wanted])
            assert sorted(planned_runs().get("us+kr", []), key=str) == planned

    def test_coming_runs_have_the_names_that_they_will_have(self) -> None:
        """Named after what they will do and when; a run of somebody else's flow keeps Prefect's words."""
        noon: State[Any] = Scheduled(scheduled_time=datetime(2098, 6, 3, 12, 20, tzinfo=UTC))  # a Tuesday in New York
        expected = {
            "warm-up": "warm-up NASD 2098-06-03",
            "check": "check-tokens 2098-06-03 12:20 UTC",
            "x": "a-fox",
        }
        with get_client(sync_client=True) as client:
            for tag in expected:
                of = {"parameters": {} if tag == "check" else {"exchange": "NASD"}, "tags": ["auto-scheduled", tag]}
                client.create_flow_run(warm_up.warm_up, name="a-fox", state=noon, **of)  # type: ignore[arg-type]
        for _ in range(2):
            upcoming.name_ahead()
            assert {tag: names("auto-scheduled", tag) for tag in expected} == {k: [v] for k, v in expected.items()}

    @pytest.mark.usefixtures("gateway")
    def test_two_installations_on_one_server_overwrite_no_table(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The first one has the names `tokens` and `plan`; another key's installation has its own, every time."""
        publish()
        first = cast("Artifact", Artifact.get(artifacts.TOKENS)).data
        monkeypatch.setenv("KIS_APP_KEY", "another-key-" * 3)
        for _ in range(2):
            publish()
            assert Artifact.get(f"tokens-{only_key().fingerprint[:8]}")
            assert cast("Artifact", Artifact.get(artifacts.TOKENS)).data == first

    def test_no_secret_gets_into_prefect(
        self, gateway: Sandbox, slack: SlackEndpoint, opens: Opens, prefect_home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After all flows renewed, were refused, waited, failed and met a bug, Prefect, Slack and incidents have none.

        What a person pastes into the form is in the run's parameters, which are the person's doing, and nowhere else.
        """
        monkeypatch.setattr("flows.refresh_token.POLL", 0.2)
        exchange = opens(SOON)
        for mode in ("bad-key", "garbage"):
            gateway.fail(mode, 1)
            refreshed("us", force=True, reason="canary run")
            time.sleep(0.6)  # the gateway's minute
        run(check_tokens.check_tokens)
        with paused() as waiting:
            waiting.answer("renew now")
        token = only_key().state(now()).token
        assert token
        secrets = {"key": APP_KEY, "secret": APP_SECRET, "token": token.access_token, "webhook": HOOK}

        def broken(*_: object) -> None:
            raise LookupError(" ".join(secrets.values()))

        monkeypatch.setattr("flows.warm_up.local_date", broken)
        state = run(warm_up.warm_up, exchange=exchange)
        assert str(state.message).startswith("Unexpected LookupError at test_flows.py:")
        pasted = make_jwt(life=77_000)
        assert end_of(refreshed("us", reason=f"look at {pasted}")) == ("COMPLETED", "Declined")
        database = Path(str(PREFECT_SERVER_DATABASE_CONNECTION_URL.value()).partition("///")[2])
        wanted, give_up = {"flow_run.parameters", "flow_run_state.message", "log.message"}, time.monotonic() + 120
        # Lines are written behind a run, and a busy server drops some: it leaks until all places are found.
        while not leak_places(database, "planted-canary-0f1e2d3c") >= wanted:
            assert time.monotonic() < give_up
            leak("planted-canary-0f1e2d3c", return_state=True)
            time.sleep(3)
        assert "flow_run.parameters" in leak_places(database, "canary run")
        assert leak_places(database, pasted[-40:]) == {"flow_run.parameters"}
        written = Path("~/.tokencore/incidents.json").expanduser()
        assert stat.S_IMODE(written.stat().st_mode) == 0o600
        everything = b"\n".join([json.dumps(slack.messages).encode(), written.read_bytes(), *contents(prefect_home)])
        assert pasted.encode() not in json.dumps(slack.messages).encode()
        for secret in secrets.values():
            assert leak_places(database, secret[-40:]) == set()
            assert not [form for form in forms(secret[-40:]) if form in everything]
