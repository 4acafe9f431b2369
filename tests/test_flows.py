"""The flows: how runs end, what they publish and leave for later; the sandbox is KIS, Prefect is real where it runs."""

from __future__ import annotations

import contextlib
import json
import resource
import sqlite3
import sys
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from builders import ended, forms, in_child, make_jwt, make_token
from flow_runs import paused, planned_runs, refreshed, run, told
from hypothesis import given
from hypothesis import strategies as st
from prefect import State, flow
from prefect.artifacts import Artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.sorting import FlowRunSort
from prefect.flow_engine import run_flow
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_SERVER_DATABASE_CONNECTION_URL
from prefect.states import Scheduled
from running import asked, cached
from slack_endpoint import HOOK

from flows import alerts, artifacts, check_tokens, runs, upcoming, warm_up
from flows.runs import Done, UnforeseenError, failures, harmless, retry_delays, safe_errors
from tokencore import (
    CredentialsError,
    IssuanceLimitError,
    IssuerUnavailableError,
    Key,
    KeyState,
    Settings,
    TokenError,
    TokenStoreError,
)
from tokencore.policy import retry_delay
from tokencore.sandbox import APP_KEY, APP_SECRET

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from slack_endpoint import SlackEndpoint

    from tokencore.sandbox import Sandbox

    Opens = Callable[[timedelta], str]

CANARY = "canary-0123456789"
HOUR, SOON = timedelta(hours=1), timedelta(minutes=40)
SATURDAY = datetime(2026, 11, 28, 3, tzinfo=UTC)  # noon in Seoul, nothing is open


def only_key() -> Key:
    """The key of all markets."""
    (key,) = Key.load(Settings.load())
    return key


def now() -> datetime:
    """The present moment."""
    return datetime.now(UTC)


def kept(until: datetime | None = None) -> Done:
    """What a warm-up's step makes of the only key."""
    return warm_up.keep(only_key(), until or now() + SOON + HOUR, now())


def visited(exchange: str, due: datetime, at: datetime | None = None) -> State:
    """The end of a warm-up that comes to no key."""
    return warm_up.visit(Settings.load(), exchange, due, at or due)


def quotes(gateway: Sandbox) -> int:
    """How many quote calls KIS has seen."""
    stats = gateway.stats()
    count: int = stats["quotes"] + sum(stats["quotes_refused"].values())
    return count


class TestErrors:
    """What may leave a run."""

    def test_an_unforeseen_error_leaves_without_its_text(self) -> None:
        """Neither the message nor the traceback has the text of the error or of those behind it."""

        def fail() -> None:
            raise LookupError(CANARY) from KeyError(CANARY)

        with (
            pytest.raises(UnforeseenError, match=r"^Unexpected LookupError at test_flows\.py:\d+; ") as caught,
            safe_errors(),
        ):
            fail()
        assert CANARY not in "".join(traceback.format_exception(caught.value))

    def test_a_token_error_leaves_without_the_errors_behind_it(self) -> None:
        """Its own text is made for people; the error of a library that it was raised from is not."""

        def fail() -> None:
            raise IssuerUnavailableError("KIS cannot be reached.") from OSError(CANARY)

        with pytest.raises(TokenError, match="KIS cannot be reached") as caught, safe_errors():
            fail()
        assert CANARY not in "".join(traceback.format_exception(caught.value))

    def test_what_is_harmless_is_logged_by_its_kind(self, caplog: pytest.LogCaptureFixture) -> None:
        """Nothing is raised, and the log does not have the error's text."""
        with harmless("The table could not be published"):
            raise OSError(CANARY)
        assert "The table could not be published: OSError." in caplog.text
        assert CANARY not in caplog.text

    @pytest.mark.usefixtures("gateway")
    def test_a_failure_names_its_key_where_there_are_several(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With one key, the sentence is enough."""
        monkeypatch.setenv("KIS_MARKETS__KR__APP_KEY", "another-key")
        us, kr = Key.load(Settings.load())
        down = IssuerUnavailableError("KIS is down.")
        assert failures({us: down}) == "KIS is down."
        assert failures({us: down, kr: "fine"}) == "us: KIS is down."
        assert failures({us: "fine"}) == ""


class TestRetries:
    """When Prefect tries again."""

    @given(interval=st.floats(0, 3600), minutes=st.integers(0, 600))
    def test_prefect_never_tries_again_inside_the_cool_down(self, interval: float, minutes: int) -> None:
        """Every pause outlasts the issue interval by 5 s, all of them end within the span, and there are few."""
        delays = retry_delays(interval, timedelta(minutes=minutes))
        assert all(delay >= interval + 5 for delay in delays)
        assert sum(delays) <= minutes * 60
        assert len(delays) <= 20

    def test_the_pauses_follow_the_renewal_rule(self) -> None:
        """With KIS's minute: 65 s three times, then 5 min, and 5 s more each; none without time before the open."""
        rule = [retry_delay(failed).total_seconds() + 5 for failed in range(1, 8)]
        assert retry_delays(60, timedelta(minutes=24)) == rule
        assert retry_delays(60, timedelta(0)) == retry_delays(60, timedelta(minutes=-5)) == []


class TestWarmUp:
    """The step of a warm-up, and the runs that come to no key."""

    def test_warm_ups_of_the_same_minute_make_one_request(self, gateway: Sandbox) -> None:
        """Ten runs of one key that start together all have its token, on one issuance."""
        gateway.set_rules(latency=0.3)
        with ThreadPoolExecutor(10) as pool:
            done = list(pool.map(lambda _: kept(), range(10)))
        assert {one.state.status for one in done} == {"VALID"}
        assert asked(gateway) == 1

    @pytest.mark.usefixtures("gateway")
    def test_a_day_without_a_session_is_market_closed(self) -> None:
        """The scheduled day decides, in the exchange's zone, and the holiday is named."""
        state = visited("SEHK", due=datetime(2025, 10, 29, 0, 50, tzinfo=UTC))
        assert told(state) == ("COMPLETED", "MarketClosed")
        assert state.message == "SEHK closed: Chung Yeung Festival"

    @pytest.mark.usefixtures("gateway")
    def test_a_run_whose_session_is_over_is_skipped(self) -> None:
        """After the close nothing is asked of KIS, token or not."""
        due = datetime(2026, 11, 26, 23, 20, tzinfo=UTC)  # Friday's KRX
        assert told(visited("KRX", due, due + 8 * HOUR)) == ("COMPLETED", "SkippedLate")

    def test_a_stale_run_is_skipped_only_where_the_token_is_valid(self, gateway: Sandbox, opens: Opens) -> None:
        """A run from before the open that comes after it does nothing where the token lasts; KIS is not asked."""
        exchange, due = opens(timedelta(minutes=-5)), now() - SOON
        kept()
        assert told(visited(exchange, due, now())) == ("COMPLETED", "SkippedLate")
        assert (asked(gateway), quotes(gateway)) == (1, 0)

    def test_a_token_is_issued_once_then_proved_by_one_quote_call(self, gateway: Sandbox) -> None:
        """The first step issues, the next one asks KIS whether it accepts the token, and no more."""
        first, second = kept(), kept()
        assert (first.renewed, second.renewed, second.remark) == (True, False, "")
        assert (asked(gateway), quotes(gateway)) == (1, 1)

    def test_proving_can_be_switched_off(self, gateway: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
        """With KIS_PROVE_TOKENS=false no quote call is made."""
        monkeypatch.setenv("KIS_PROVE_TOKENS", "false")
        kept()
        kept()
        assert quotes(gateway) == 0

    def test_a_token_that_kis_has_killed_is_renewed_where_six_hours_are_over(
        self, gateway: Sandbox, slack: SlackEndpoint
    ) -> None:
        """The quote call finds it dead; it is marked for all processes and replaced in the same run: no alert."""
        cached(left=17 * 3600)  # the sandbox refuses a token that it has not issued, as KIS does a dead one
        done = kept()
        assert done.renewed
        assert done.state.status == "VALID"
        assert (asked(gateway), quotes(gateway), slack.told) == (1, 1, [])

    def test_a_token_that_kis_killed_within_six_hours_is_an_alert(self, gateway: Sandbox, slack: SlackEndpoint) -> None:
        """Nobody gets it any more; the error says when a new one is possible, and KIS is not asked for one."""
        cached(left=23 * 3600)
        with pytest.raises(IssuanceLimitError, match="A new one can be issued from") as caught:
            kept()
        assert caught.value.cause == "same_token"
        assert only_key().state(now()).status == "REJECTED"
        assert slack.headlines == ["us+kr: KIS rejects the token, and issues no other yet"]
        assert slack.told[0]["text"].startswith("no token · ")
        assert asked(gateway) == 0

    def test_a_quote_that_says_nothing_changes_nothing_and_is_said(self, gateway: Sandbox, opens: Opens) -> None:
        """Too many calls, or KIS being down, proves nothing about the token: it is warm, and the state says so."""
        exchange = opens(SOON)
        cached()  # the sandbox knows no such token
        gateway.answer("/uapi/", {"rt_cd": "1", "msg_cd": "EGW00201", "msg1": "too many"}, 500)
        done = kept()
        day = warm_up.trading_day(exchange, runs.local_date(exchange, now() + SOON), Settings.load())
        assert day
        state = warm_up.ended(day, {done.state.key: done})
        assert told(state) == ("COMPLETED", "Warm")
        assert "KIS did not say whether it accepts the token (HTTP 500: EGW00201" in str(state.message)
        assert done.state.status == "VALID"

    def test_a_token_that_ends_a_moment_before_its_need_lasts(self, gateway: Sandbox) -> None:
        """The token of the daily anchor lasts to the second, and KIS's clock is not ours: that costs no issuance."""
        token = kept().state.token
        assert token
        until = token.expires_at - timedelta(seconds=300 - 15)
        assert not kept(until).renewed
        with pytest.raises(IssuanceLimitError):
            kept(until + timedelta(minutes=1))
        assert asked(gateway) == 1

    def test_refused_credentials_end_a_warm_up_at_once_and_are_told(
        self, gateway: Sandbox, slack: SlackEndpoint
    ) -> None:
        """The error is KIS's sentence; the next step asks KIS no more and tells nobody again."""
        gateway.fail("bad-key")
        for _ in range(2):
            with pytest.raises(CredentialsError, match=r"EGW00103.*There is no token"):
                kept()
        assert asked(gateway) == 1
        assert slack.headlines == ["us+kr: KIS refuses the app key or its secret"]

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

    def test_a_key_without_a_need_is_left_alone(self, gateway: Sandbox) -> None:
        """On a Saturday there is no token, and that is no failure; neither tokenP nor a quote is asked."""
        done = check_tokens.follow(only_key(), SATURDAY)
        state = check_tokens.ended({done.state.key: done})
        assert told(state) == ("COMPLETED", "Completed")
        assert str(state.message).startswith("us+kr: no valid token; next renewal 2026-11-29 16:35 KST, renews daily")
        assert (asked(gateway), quotes(gateway)) == (0, 0)

    def test_a_token_is_proved_only_on_a_day_with_a_session(self, gateway: Sandbox) -> None:
        """On the evening before a session nobody asks; from midnight in Korea every check does, once."""
        token = make_token(now=SATURDAY + 30 * HOUR)  # Sunday 18:00
        key = only_key()
        with key.store.lock(wait=1):
            key.store.save(token)
        gateway.answer("/uapi/", {"rt_cd": "1", "msg_cd": "EGW00201"}, 500)
        for hours, calls in ((30.5, 0), (36.5, 1)):  # Sunday 18:30, Monday 00:30
            assert not check_tokens.follow(only_key(), SATURDAY + hours * HOUR).renewed
            assert quotes(gateway) == calls

    def test_a_due_renewal_happens_and_the_next_is_announced(self, gateway: Sandbox, opens: Opens) -> None:
        """It follows the rule and says when the next renewal is and why."""
        opens(SOON)
        done = check_tokens.follow(only_key(), now())
        state = check_tokens.ended({done.state.key: done})
        assert told(state) == ("COMPLETED", "Renewed")
        assert "the token serves until" in str(state.message)
        again = check_tokens.follow(only_key(), now())
        assert told(check_tokens.ended({again.state.key: again})) == ("COMPLETED", "AlreadyValid")
        assert asked(gateway) == 1

    def test_a_token_killed_in_the_night_is_told_and_renewed_before_the_open(
        self, gateway: Sandbox, slack: SlackEndpoint, opens: Opens
    ) -> None:
        """Killed two hours after its issue it is Failed with when; once KIS may issue, the next check renews."""
        opens(SOON)
        cached(left=22 * 3600)
        with pytest.raises(
            IssuanceLimitError, match=r"KIS has rejected the token since .*, and issues another only from"
        ):
            check_tokens.follow(only_key(), now())
        assert slack.headlines == ["us+kr: KIS rejects the token, and issues no other yet"]
        assert only_key().state(now()).next_attempt is not None
        cached(left=17 * 3600)
        assert check_tokens.follow(only_key(), now()).renewed
        assert slack.headlines[1:] == ["us+kr: solved: KIS rejects the token, and issues no other yet"]
        assert (asked(gateway), quotes(gateway)) == (1, 2)

    def test_trouble_while_the_need_is_covered_fails_no_check(self, gateway: Sandbox, opens: Opens) -> None:
        """A refused renewal is in the state's message where the present token lasts through the need."""
        opens(timedelta(hours=-2))  # over; the next one is far away
        done = check_tokens.follow(only_key(), now())
        assert asked(gateway) == 0
        limited = done._replace(remark="KIS refused to issue (EGW00133).", state=kept().state)
        state = check_tokens.ended({only_key(): limited})
        assert told(state) == ("COMPLETED", "AlreadyValid")
        assert "; KIS refused to issue (EGW00133); " in str(state.message)

    @pytest.mark.usefixtures("gateway")
    def test_of_checks_that_were_missed_one_catches_up(self) -> None:
        """After a down-time the runs that are left over find that a later one has done their work."""
        state = check_tokens.check(Settings.load(), now() - 3 * HOUR, now())
        assert told(state) == ("COMPLETED", "SkippedLate")


class TestArtifacts:
    """The table of tokens."""

    def rows(self, state: KeyState | str) -> list[dict[str, str]]:
        """The rows of the only key in this state."""
        return artifacts.rows_of(only_key(), state)

    @pytest.mark.usefixtures("gateway")
    def test_five_columns_say_how_a_market_is(self) -> None:
        """Market, status, until, session covered, and the next renewal with its reason; no bare sign for Markdown."""
        cached()
        us, kr = self.rows(only_key().state(now()))
        assert list(us) == ["market", "status", "until", "session covered", "next renewal or problem"]
        assert (us["market"], kr["market"], us["status"]) == ("us", "kr", "VALID")
        assert us["until"].endswith(" KST")
        assert us["session covered"].startswith(("yes, until ", "no: it needs one until "))
        assert us["next renewal or problem"].startswith("next renewal 20")
        assert not [value for value in us.values() if value[0] in "-*#>|"]

    @pytest.mark.usefixtures("gateway")
    def test_the_caption_says_the_worst_first(self) -> None:
        """A token that serves on beside refused credentials is a problem, and comes before what is well."""
        well = artifacts._row("us", "VALID", "x", "yes", "next renewal 2026-11-23")  # noqa: SLF001 - rows as they are
        refused = well | {"market": "kr", "next renewal or problem": artifacts.REFUSED}
        broken = self.rows("The token directory cannot be used: | no | space `left`.")[1] | {"market": "hk"}
        assert artifacts.caption([well, refused, broken]) == (
            "hk UNREADABLE: The token directory cannot be used: / no / space 'left'., "
            "kr VALID: KIS refused the credentials, us VALID"
        )

    def test_a_renewal_that_nobody_will_try_is_not_promised(self, gateway: Sandbox) -> None:
        """After refused credentials table, plan and message name no next renewal, but say who has to act."""
        cached(left=3 * 3600)
        gateway.fail("bad-key", 1)
        with pytest.raises(CredentialsError):
            only_key().refresh(force=True, reason="a test", by="")
        state = only_key().state(now())
        assert {row["next renewal or problem"] for row in self.rows(state)} == {artifacts.REFUSED}
        plan = artifacts.described([state])
        assert f"{artifacts.REFUSED}." in plan
        assert "| next renewal |" not in plan
        assert check_tokens.progress(Done(state, renewed=False)).endswith(artifacts.REFUSED)


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


def contents(folder: Path) -> Iterator[bytes]:
    """All files of a server that runs: some go while they are looked at."""
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            yield path.read_bytes()


def scheduled_names(*tags: str) -> list[str]:
    """The names of the runs with these tags that are to come, in the order of time."""
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(sort=FlowRunSort.EXPECTED_START_TIME_ASC)
    return [one.name for one in found if set(tags) <= set(one.tags) and one.state and one.state.is_scheduled()]


def warmed(exchange: str, due: datetime | None = None) -> State:
    """The final state of a warm-up."""
    return run(warm_up.warm_up, due, exchange=exchange)


def published(name: str) -> str:
    """The content of an artifact as published last: the first installation's on this server, or ours."""
    own = min(key.fingerprint[:8] for key in Key.load(Settings.load()))
    found = Artifact.get(f"{name}-{own}") or Artifact.get(name)
    return str(cast("Artifact", found).data)


def table() -> list[dict[str, str]]:
    """The rows of the table of tokens."""
    rows: list[dict[str, str]] = json.loads(published(artifacts.TOKENS))
    return rows


@pytest.fixture
def deployed() -> None:
    """The deployment of check_tokens, without which nothing is left for later; nothing is planned yet."""
    with get_client(sync_client=True) as client:
        for one in client.read_flow_runs():
            if upcoming.TAG in one.tags:
                client.delete_flow_run(one.id)
        client.create_deployment(client.create_flow(check_tokens.check_tokens), "check_tokens")


@pytest.mark.usefixtures("prefect_home")
class TestRuns:
    """Whole runs on a Prefect server."""

    @pytest.mark.usefixtures("deployed")
    def test_a_warm_up_renews_publishes_and_leaves_the_next_renewal(self, gateway: Sandbox, opens: Opens) -> None:
        """Renewed, then Warm on the same token; the run is named after the exchange's own day."""
        exchange = opens(SOON)
        states = [warmed(exchange), warmed(exchange)]
        assert [told(state) for state in states] == [("COMPLETED", "Renewed"), ("COMPLETED", "Warm")]
        assert str(states[1].message).startswith("us+kr: the token serves until ")
        assert asked(gateway) == 1
        assert [(row["market"], row["status"]) for row in table()] == [("us", "VALID"), ("kr", "VALID")]
        assert "data:image/svg+xml" in published(artifacts.PLAN)
        assert planned_runs() == {"us+kr": [only_key().state(now()).next_attempt]}
        with get_client(sync_client=True) as client:
            names = [one.name for one in client.read_flow_runs()]
        assert names.count(f"warm-up {exchange} {runs.local_date(exchange, now())}") == 2

    def test_a_renewing_warm_up_reads_everything_once(self, slack: SlackEndpoint, opens: Opens) -> None:
        """At most 2,500 calls into our packages with its artifacts, and at most 400 for an alert."""
        exchange = opens(SOON)
        folders = tuple(
            str(Path(package.__file__).parent) for package in (runs, sys.modules["tokencore"]) if package.__file__
        )
        calls: Counter[str] = Counter()

        def count(frame: Any, event: str, _: object) -> None:  # noqa: ANN401 - the interpreter's
            if event == "call" and frame.f_code.co_filename.startswith(folders):
                calls[frame.f_code.co_name] += 1

        def counted(work: Callable[[], object]) -> int:
            calls.clear()
            threading.setprofile(count)
            sys.setprofile(count)
            try:
                work()
            finally:
                sys.setprofile(None)
                threading.setprofile(None)
            return calls.total()

        assert 0 < counted(lambda: warmed(exchange)) <= 2500, calls.most_common(20)
        settings, state, error = (
            Settings.load(),
            only_key().state(now()),
            CredentialsError("KIS refused the app secret."),
        )
        assert 0 < counted(lambda: alerts.report(settings, state, error, now())) <= 400, calls.most_common(20)
        assert slack.headlines == ["us+kr: KIS refuses the app key or its secret"]

    def test_kis_being_down_is_tried_again_after_the_cool_down(
        self, gateway: Sandbox, slack: SlackEndpoint, opens: Opens
    ) -> None:
        """Prefect tries again five seconds after the cool-down, and the run ends Renewed; Slack heard of both."""
        exchange = opens(SOON)
        gateway.fail("server-error", 1)
        begun = time.monotonic()
        assert told(warmed(exchange)) == ("COMPLETED", "Renewed")
        assert time.monotonic() - begun > 5.5
        assert asked(gateway) == 2
        assert slack.headlines == ["us+kr: KIS gives no token", "us+kr: solved: KIS gives no token"]
        assert "then every few minutes" in slack.told[0]["blocks"][2]["text"]["text"]

    def test_an_exchange_that_nobody_trades_fails_with_what_to_do(
        self, gateway: Sandbox, slack: SlackEndpoint, opens: Opens, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The sentence names the setting, and Slack says to pause the deployment."""
        exchange = opens(SOON)
        for market in ("US", "KR"):
            monkeypatch.setenv(f"KIS_MARKETS__{market}__EXCHANGES", "SEHK")
        state = warmed(exchange)
        assert told(state) == ("FAILED", "Failed")
        assert str(state.message).startswith(f"No market of your settings trades {exchange}; add it")
        assert "Pause the deployment" in slack.told[0]["blocks"][2]["text"]["text"]
        assert asked(gateway) == 0

    def test_malformed_settings_fail_a_run_with_the_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The sentence says what to correct, although nobody knows where Slack is."""
        monkeypatch.setenv("KIS_TIMEOUT", "soon")
        state = run(check_tokens.check_tokens)
        assert told(state) == ("FAILED", "Failed")
        assert str(state.message).startswith("KIS_TIMEOUT cannot be used")

    @pytest.mark.usefixtures("deployed")
    def test_one_keys_trouble_does_not_stop_the_others(
        self, gateway: Sandbox, slack: SlackEndpoint, opens: Opens, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A check with two keys fails for the one that is refused, renews the other and leaves its next renewal."""
        opens(SOON)
        monkeypatch.setenv("KIS_MARKETS__KR__APP_KEY", "another-key-" * 3)
        gateway.fail("bad-secret", 1)
        state = run(check_tokens.check_tokens)
        assert told(state) == ("FAILED", "Failed")
        assert asked(gateway) == 2
        broken = next(row["market"] for row in table() if row["status"] == "NO_TOKEN")
        assert sorted(row["status"] for row in table()) == ["NO_TOKEN", "VALID"]
        assert str(state.message).startswith(f"{broken}: KIS refused the app secret (EGW00105).")
        assert slack.headlines == [f"{broken}: KIS refuses the app key or its secret"]
        assert list(planned_runs()) == ["us" if broken == "kr" else "kr"]

    @pytest.mark.usefixtures("deployed")
    def test_the_next_renewal_is_a_scheduled_run_that_moves_and_goes(self) -> None:
        """One run per key stands at its moment: kept while the plan stays, moved with it, gone without it.

        Another installation's is left alone; one of version 0.1, which named no key, is replaced.
        """
        soon, later = (now().replace(microsecond=0) + hours * HOUR for hours in (2, 3))
        ours, theirs = upcoming.Wanted("us+kr", "key 1a", soon), upcoming.Wanted("us+kr", "key 2b", soon)
        upcoming.keep([upcoming.Wanted("us+kr", "old", later)])
        for _ in range(2):
            upcoming.keep([ours])
            assert planned_runs() == {"us+kr": [soon]}
        upcoming.keep([theirs])
        assert planned_runs() == {"us+kr": [soon, soon]}
        upcoming.keep([ours._replace(at=later)])
        assert sorted(planned_runs()["us+kr"], key=str) == [soon, later]
        for one in (ours, theirs):
            upcoming.keep([one._replace(at=None)])
        assert planned_runs() == {}

    @pytest.mark.usefixtures("deployed")
    def test_a_renewal_that_is_about_to_start_is_not_taken_back(self) -> None:
        """A planned run whose moment has come stays, whatever the plan says now: it finds out what there is to do."""
        late = upcoming.Wanted("late", "key 3c", now().replace(microsecond=0) - timedelta(minutes=1))
        for wanted in (late, late._replace(at=None)):
            upcoming.keep([wanted])
            assert planned_runs() == {"late": [late.at]}

    def test_coming_runs_have_the_names_that_they_will_have(self) -> None:
        """Named after what they will do and when; a run of somebody else's flow keeps Prefect's words."""
        noon = datetime(2098, 6, 3, 12, 20, tzinfo=UTC)  # a Tuesday in New York, 21:20 in Korea
        with get_client(sync_client=True) as client:
            for tag, parameters in ("warm-up", {"exchange": "NASD"}), ("check", {}), ("theirs", {"exchange": "NASD"}):
                client.create_flow_run(
                    warm_up.warm_up,
                    name="quick-fox",
                    parameters=parameters,
                    tags=["auto-scheduled", tag],
                    state=Scheduled(scheduled_time=noon),
                )
        for _ in range(2):
            upcoming.name_ahead()
            assert scheduled_names("auto-scheduled", "warm-up") == ["warm-up NASD 2098-06-03"]
            assert scheduled_names("auto-scheduled", "check") == ["check-tokens 2098-06-03 12:20 UTC"]
            assert scheduled_names("auto-scheduled", "theirs") == ["quick-fox"]

    def test_a_planned_renewal_keeps_its_name(self, opens: Opens) -> None:
        """Who saw it coming finds it again after it ran."""
        opens(SOON)
        with get_client(sync_client=True) as client:
            made = client.create_flow_run(
                check_tokens.check_tokens,
                name="renew us+kr",
                tags=[upcoming.TAG],
                state=Scheduled(scheduled_time=now()),
            )
            state = cast("State", run_flow(check_tokens.check_tokens, flow_run=made, return_type="state"))
            assert told(state) == ("COMPLETED", "Renewed")
            assert client.read_flow_run(made.id).name == "renew us+kr"

    def test_two_installations_on_one_server_overwrite_no_table(
        self, gateway: Sandbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first one has the names `tokens` and `plan`; another key's installation has its own, every time."""
        refreshed("us")
        first, place = table(), cast("Artifact", Artifact.get(artifacts.TOKENS)).data
        monkeypatch.setenv("KIS_APP_KEY", "another-key-" * 3)
        monkeypatch.setenv("KIS_TOKEN_DIR", str(Path.home() / "other"))
        refreshed("us")
        assert Artifact.get(f"tokens-{only_key().fingerprint[:8]}")
        assert cast("Artifact", Artifact.get(artifacts.TOKENS)).data == place
        assert {row["status"] for row in first} == {"VALID"}
        assert asked(gateway) == 2

    def test_no_secret_gets_into_prefect(
        self, gateway: Sandbox, slack: SlackEndpoint, opens: Opens, prefect_home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After all flows renewed, were refused, waited, failed and met a bug, Prefect and Slack have no secret.

        What a person pastes into the form is in the run's parameters, which are the person's doing, and nowhere else.
        """
        monkeypatch.setattr("flows.refresh_token.POLL", 0.2)
        exchange = opens(SOON)
        for mode in ("limit", "bad-key", "html", "garbage"):
            gateway.fail(mode, 1)
            refreshed("us", force=True, reason="canary run")
            time.sleep(0.6)
        warmed(exchange)
        run(check_tokens.check_tokens)
        with paused() as waiting:
            waiting.answer("renew now")
        token = only_key().state(now()).token
        assert token
        secrets = {"key": APP_KEY, "secret": APP_SECRET, "token": token.access_token, "webhook": HOOK}

        def broken(*_: object) -> None:
            raise LookupError(" ".join(secrets.values()))

        monkeypatch.setattr("flows.warm_up.trading_day", broken)
        state = warmed(exchange)
        assert str(state.message).startswith("Unexpected LookupError at test_flows.py:")
        pasted = make_jwt(life=77_000)
        assert told(refreshed("us", reason=f"look at {pasted}")) == ("COMPLETED", "Declined")
        database = Path(str(PREFECT_SERVER_DATABASE_CONNECTION_URL.value()).partition("///")[2])
        wanted, give_up = {"flow_run.parameters", "flow_run_state.message", "log.message"}, time.monotonic() + 120
        # Lines are written behind a run, and a busy server drops some: it leaks until all places are found.
        while not leak_places(database, "planted-canary-0f1e2d3c") >= wanted and time.monotonic() < give_up:
            leak("planted-canary-0f1e2d3c", return_state=True)
            time.sleep(3)
        assert leak_places(database, "planted-canary-0f1e2d3c") >= wanted
        assert "flow_run.parameters" in leak_places(database, "canary run")
        assert leak_places(database, pasted[-40:]) == {"flow_run.parameters"}
        everything = b"\n".join([json.dumps(slack.told).encode(), *contents(prefect_home)])
        assert pasted.encode() not in json.dumps(slack.told).encode()
        for secret in secrets.values():
            assert leak_places(database, secret[-40:]) == set()
            assert not [form for form in forms(secret[-40:]) if form in everything]
