"""The flows: how runs end, what they publish and what they schedule, with the sandbox as KIS and a real Prefect."""

import contextlib
import json
import logging
import os
import re
import sqlite3
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast
from zoneinfo import ZoneInfo

import pytest
import time_machine
from builders import ended, fill_disk, forms, in_child, make_jwt, make_token
from flow_runs import end_of, only_key, paused, planned_runs, refreshed, run, state_of
from prefect import State
from prefect.artifacts import Artifact
from prefect.client.orchestration import get_client
from prefect.exceptions import FailedRun
from prefect.settings import PREFECT_SERVER_DATABASE_CONNECTION_URL
from running import Opens, asked, cached, record
from servers import HOOK, SlackEndpoint

from flows import alerts, artifacts, check_tokens, runs, upcoming, warm_up
from flows.runs import Done, UnforeseenError, View, harmless, retry_delays, safe_errors
from tokencore import Key, Settings, errors, sessions
from tokencore.attempts import Attempt, Outcome
from tokencore.sandbox import APP_KEY, APP_SECRET, Sandbox

Step = Callable[..., Done]

BAD = errors.CredentialsError("KIS refuses the app secret. Correct it.")
CANARY = "canary-0123456789"
HOUR, SOON = timedelta(hours=1), timedelta(minutes=40)
KST = ZoneInfo("Asia/Seoul")
MONDAY = datetime(2026, 11, 22, 23, 20, tzinfo=UTC)  # 08:20 in Seoul, 40 minutes before KRX opens
BUSY = ("/uapi/", {"rt_cd": "1", "msg_cd": "EGW00201", "msg1": "too many"}, 500)
DEAD = "us+kr: KIS rejects the token, and issues no other yet"
pytestmark = pytest.mark.usefixtures("gateway")


def now() -> datetime:
    """Return the present moment."""
    return datetime.now(UTC)


def kept(until: datetime | None = None, again_in: float | None = None) -> Done:
    """Run a warm-up's step for the only key."""
    return warm_up.ensure.fn(only_key(), until or now() + SOON + HOUR, again_in)


def checked(at: datetime | None = None, again_in: float | None = None) -> Done:
    """Run a check's step for the only key."""
    return check_tokens.advance.fn(only_key(), again_in, at)


def followed(at: datetime | None = None) -> State:
    """Check the only key and return the final state."""
    try:
        return check_tokens.ended({only_key(): checked(at)})
    except errors.TokenError as error:
        return check_tokens.ended({only_key(): error})


def visited(exchange: str, due: datetime, at: datetime | None = None) -> State:
    """Run a warm-up's visit outside Prefect and return the final state."""
    return alerts.guarded(exchange, lambda settings, _: warm_up.visit(settings, exchange, due, at or due))


BROKEN = {
    "a value": ({"KIS_ISSUE_INTERVAL": "often"}, "", "KIS_ISSUE_INTERVAL cannot be used"),
    "a name": ({}, "issue_intervall = 60\n", "Unknown setting KIS_ISSUE_INTERVALL"),
    "the file": ({}, "no TOML", "~/.tokencore/config.toml"),
}


@pytest.mark.parametrize("named", BROKEN)
def test_settings_that_cannot_be_used_are_reported_and_so_is_their_correction(
    named: str, slack: SlackEndpoint, tmp_path: Path
) -> None:
    """A mistake in them stops all runs; Slack hears of it by those that can be read, as of a secrets folder."""
    os.environ["KIS_SECRETS_DIR"] = str(tmp_path)
    (tmp_path / "SLACK_WEBHOOK_URL").write_text(os.environ.pop("SLACK_WEBHOOK_URL"))
    file, (variables, text, said) = Path.home() / ".tokencore" / "config.toml", BROKEN[named]
    file.parent.mkdir(mode=0o700, exist_ok=True)
    file.write_text(text)
    os.environ |= variables
    state = visited("KRX", MONDAY)
    assert (end_of(state), said in str(state.message)) == (("FAILED", "Failed"), True)
    assert slack.headlines == ["KRX: A setting is missing or wrong"]
    file.unlink()
    for name in variables:
        del os.environ[name]
    visited("KRX", MONDAY)
    assert slack.headlines[1:2] == ["KRX: solved: A setting is missing or wrong"]


def quotes(gateway: Sandbox) -> int:
    """Return how many quote calls KIS has got."""
    stats = gateway.stats()
    return int(stats["quotes"] + sum(stats["quotes_refused"].values()))


def test_a_foreign_text_reaches_neither_prefect_nor_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """An unforeseen error shows its type and place, a harmless one its type; their texts and causes never appear."""
    with pytest.raises(UnforeseenError, match=r"^Unexpected LookupError at test_flows\.py:\d+") as error, safe_errors():
        raise LookupError(CANARY) from KeyError(CANARY)
    with harmless("The table could not be published"):
        raise OSError(CANARY)
    assert "The table could not be published: OSError." in caplog.text
    assert CANARY not in caplog.text + "".join(traceback.format_exception(error.value))


def test_a_failed_runs_log_ends_with_its_sentence() -> None:
    """A failed run's log ends with its sentence, not with Prefect's traceback, which names no file of the user's."""
    for name, error in ("prefect.flow_runs", FailedRun("KIS is down.")), ("prefect.task_runs", BAD):
        line = logging.LogRecord(name, logging.ERROR, "", 1, "It ended: %r", (error,), (type(error), error, None))
        assert logging.getLogger(name).filter(line)
        assert (line.getMessage(), line.exc_info) == (str(error), None)


def test_prefect_never_tries_again_inside_the_cool_down() -> None:
    """Pauses follow the rule plus 5 s, so that they outlast the cool-down; those that end too late are left out."""
    assert retry_delays(60, timedelta(minutes=24)) == [70] * 3 + [305] * 4
    assert [retry_delays(60, timedelta(seconds=span)) for span in (-60, 69, 70)] == [[], [], [70]]
    assert retry_delays(0.6, HOUR) == [pytest.approx(5.65)] * 3 + [8] * 17


def test_a_run_that_has_nothing_to_do_says_why(gateway: Sandbox, opens: Opens) -> None:
    """A run without work names the scheduled day's holiday, in the exchange's zone, or says that it came too late."""
    closed = visited("SEHK", datetime(2025, 10, 29, 0, 50, tzinfo=UTC))
    friday = datetime(2026, 11, 26, 23, 20, tzinfo=UTC)  # 08:20 in Seoul
    exchange = opens(timedelta(minutes=-5))
    kept()
    late = visited("KRX", friday, friday + 8 * HOUR), visited(exchange, now() - SOON, now())
    missed = check_tokens.check(Settings.load(), now() - 3 * HOUR, now())
    assert (closed.name, closed.message) == ("MarketClosed", "SEHK closed: Chung Yeung Festival")
    assert [end_of(state) for state in (*late, missed)] == [("COMPLETED", "SkippedLate")] * 3
    assert (asked(gateway), quotes(gateway)) == (1, 0)


def test_a_wrong_setting_fails(slack: SlackEndpoint, opens: Opens) -> None:
    """With an untraded exchange, or malformed settings, runs fail and Slack says what to do, of settings only once."""
    exchange = opens(SOON)
    os.environ |= {"KIS_MARKETS__US__EXCHANGES": "SEHK", "KIS_MARKETS__KR__EXCHANGES": "SEHK"}
    untraded = visited(exchange, now())
    os.environ["KIS_TIMEOUT"] = "soon"
    malformed = [visited(code, now()) for code in ("SHAA", "SZAA")]  # both open at the same time
    assert str(untraded.message).startswith(f"No market of your settings trades {exchange}; add it")
    assert [str(one.message).partition(":")[0] for one in malformed] == ["KIS_TIMEOUT cannot be used"] * 2
    assert [end_of(one) for one in (untraded, *malformed)] == [("FAILED", "Failed")] * 3
    assert ["Pause the deployment" in one["blocks"][2]["text"]["text"] for one in slack.messages] == [True, True]
    del os.environ["KIS_TIMEOUT"]
    alerts.resolved(Settings.load(), alerts.ALL_KEYS, now())
    assert slack.headlines[2:] == ["check_tokens: solved: A setting is missing or wrong"]


def test_a_token_that_kis_has_killed_is_renewed_or_an_alert(gateway: Sandbox, slack: SlackEndpoint) -> None:
    """A token that a quote call finds dead is no longer served; after six hours it is replaced in the same run."""
    cached(left=23 * 3600)  # the sandbox rejects it like a dead token, as it did not issue it
    with pytest.raises(errors.IssuanceLimitError, match="A new one can be issued from"):
        kept()
    assert (only_key().state(now()).status, slack.headlines, asked(gateway)) == ("REJECTED", [DEAD], 0)
    cached(left=17 * 3600)
    done = kept()
    assert (done.renewed, done.state.status, asked(gateway), quotes(gateway)) == (True, "VALID", 1, 2)


def test_a_quote_that_says_nothing_changes_nothing_and_is_said(gateway: Sandbox, opens: Opens) -> None:
    """An answer that proves nothing about the token ends the run as Warm, and the state's message says so."""
    exchange = opens(SOON)
    cached()  # a token that the sandbox does not know
    gateway.answer(*BUSY)
    state = warm_up.ended(exchange, now(), {only_key(): kept()})
    assert (end_of(state), only_key().state(now()).status) == (("COMPLETED", "Warm"), "VALID")
    assert "KIS did not say whether it accepts the token (HTTP 500: EGW00201" in str(state.message)


@pytest.mark.parametrize("step", [kept, checked, None])
def test_a_refused_key_is_told_early(gateway: Sandbox, slack: SlackEndpoint, opens: Opens, step: Step | None) -> None:
    """If a quote call or a person's refresh is refused hours before the renewal, one alert is sent and no run fails."""
    opens(timedelta(minutes=20))  # a need that runs makes this a day with a session, just before midnight in Korea too
    kept()
    os.environ["KIS_APP_SECRET"] = "wrong" * 36
    if step is None:
        time.sleep(0.6)  # the gateway's cool-down
        with pytest.raises(errors.CredentialsError):
            only_key().refresh(force=True, reason="", by="")
        os.environ["KIS_PROVE_TOKENS"] = "false"
    key, before, _ = only_key(), (asked(gateway), quotes(gateway)), (step or checked)()
    (view,) = runs.views([key], {key: (done := (step or checked)())})
    assert artifacts.caption([view]).startswith("us, kr VALID: KIS refuse")
    assert end_of(check_tokens.ended({key: done})) == ("COMPLETED", "AlreadyValid")
    assert slack.headlines == ["us+kr: KIS refuses the app key or its secret"]
    assert (asked(gateway), quotes(gateway)) == (before[0], before[1] + 2 * bool(step))


def test_a_check_brings_a_lost_copy_back(gateway: Sandbox, opens: Opens) -> None:
    """Each check writes the token's missing copies for other clients, even if it renews nothing."""
    opens(SOON)
    os.environ["KIS_MARKETS__US__EXPORTS"] = "mojito2"
    kept()
    (copy := Path("~/.tokencore/us_krs_token.dat").expanduser()).unlink()
    assert (checked().renewed, copy.exists(), asked(gateway)) == (False, True, 1)


def test_a_token_is_proved_only_on_a_day_with_a_session(gateway: Sandbox) -> None:
    """No quote call is made on the evening before a session; from midnight in Korea each check makes one."""
    with (key := only_key()).store.lock(wait=1):
        key.store.save(make_token(now=MONDAY - 14 * HOUR))  # Sunday 18:20
    gateway.answer(*BUSY)
    for hours, calls in ((13, 0), (8, 1)):  # Sunday 19:20, Monday 00:20
        assert followed(MONDAY - hours * HOUR).name == "AlreadyValid"
        assert quotes(gateway) == calls


@pytest.mark.usefixtures("prefect_home")
@pytest.mark.parametrize("step", [kept, checked])
def test_a_token_that_only_a_run_has_is_none(gateway: Sandbox, slack: SlackEndpoint, opens: Opens, step: Step) -> None:
    """If the disk takes no token, the run fails; table and alert say that there is none, the table cause and fix."""
    opens(SOON)

    def work() -> None:
        fill_disk(500)  # enough for the record's first line
        with pytest.raises(errors.TokenStoreError, match="only this process has it") as caught:
            step()
        views = runs.views([only_key()], {only_key(): caught.value})
        assert artifacts.caption(views).startswith("us, kr NO_TOKEN: KIS issued a token that could not be saved")
        assert "**To do (us+kr):** Fix the token directory's permissions or free space" in artifacts.table(views)

    assert (ended(in_child(work)), asked(gateway)) == (0, 1)
    assert slack.messages[0]["text"].startswith("no token · ")


NEW, OLD = make_token(now=MONDAY), make_token(age=19 * 3600, now=MONDAY)
KILLED = make_token(age=2 * 3600, now=MONDAY, rejected=True)
LIMIT = errors.IssuanceLimitError("The 24-hour limit is reached: 2 of 2. Wait.", retry_at=None, cause="ceiling")
REACHED = "The 24-hour limit is reached: 2 of 2; next attempt 2026-11-23 17:20 KST"
FAULT = "a fault at KIS (EGW0) at 2026-11-23 08:19 KST; next attempt 2026-11-23 08:20 KST"
UNPROVEN = "KIS rejects the token; next attempt 2026-11-23 12:20 KST"
FORCE, CORRECT = "Run refresh_token with force", "Correct KIS_APP_KEY"
# On Monday at 08:20 KST: the token, the record, the run's error; the status, whether NASD's session is covered, the
# problem or next renewal, what to do.
TABLE: dict[str, tuple[Any, str, Exception | None, str, str, str, str]] = {
    "all is well": (NEW, "issued 5", None, "VALID", "yes", "11-24 07:25, 23 h 5 min after", "nothing"),
    "our limit: KIS was not asked": (None, "issued 900, issued 600", LIMIT, "NO_TOKEN", "no", REACHED, FORCE),
    "KIS down as a session nears": (None, "server_error 1", None, "NO_TOKEN", "no", FAULT, "Look at KIS's notices"),
    "a dead token": (KILLED, "issued 120", None, "REJECTED", "by next renewal, to 11-24 06:00", UNPROVEN, FORCE),
    "a quote call met it": (OLD, "issued 1140", BAD, "VALID", "no", "KIS refuses the app secret", CORRECT),
    "refused credentials": (OLD, "bad_key 5", None, "VALID", "no", "KIS refused the credentials", CORRECT),
}


@pytest.mark.parametrize("case", TABLE)
def test_the_table_says_how_a_market_is_and_what_to_do(case: str) -> None:
    """The last of the table's five columns has the next renewal or the problem, and the caption says the same."""
    token, past, error, status, covered, coming, fix = TABLE[case]
    view = View(only_key(), state_of(MONDAY, token, past), error)
    us, kr = artifacts.rows_of(view)
    assert (us[1], us[3][: len(covered)], us[4][: len(coming)], kr[4]) == (status, covered, coming, us[4])
    assert us[2].startswith("11-2" if status == "VALID" else "none")
    said = " until 2026-11-24 08:15 KST" if fix == "nothing" else f": {us[4]}"
    assert artifacts.caption([view]) == f"us, kr {status}{said}"
    assert f"**To do{' (us+kr)' * (fix != 'nothing')}:** {fix}" in artifacts.table([view])


def test_what_cannot_be_read_comes_first_and_acts_on_nothing() -> None:
    """A key that cannot be read comes first, and Markdown in its error has no effect."""
    odd = errors.TokenStoreError("- It | cannot `be` used: no space. Fix it.")
    views = [View(only_key(), state_of(MONDAY)), View(only_key(), None, odd)]
    said = "us, kr UNREADABLE: It / cannot 'be' used: no space; us, kr NO_TOKEN: "
    assert artifacts.caption(artifacts.worst_first(views)).startswith(said)


def test_a_check_says_what_comes_next_and_promises_no_vain_renewal() -> None:
    """While the need is covered, no trouble fails a check; after refused credentials it says that a person must act."""
    limited = Done(state_of(MONDAY, NEW), renewed=False, trouble=LIMIT)
    refused = Done(state_of(MONDAY, OLD, "bad_key 5"), renewed=False)
    states = [check_tokens.ended({only_key(): done}) for done in (limited, refused)]
    assert [end_of(state) for state in states] == [("COMPLETED", "AlreadyValid")] * 2
    assert "; The 24-hour limit is reached: 2 of 2. Wait; next renewal 2026-" in str(states[0].message)
    assert str(states[1].message).endswith(f"; {artifacts.REFUSED}.")
    plan = artifacts.described([View(only_key(), refused.state)])
    assert (f"{artifacts.REFUSED}." in plan, "| next renewal |" in plan) == (True, False)


KILL = "maintenance"
# On a Wednesday night in KST: what runs, how it ends, and when the rule next has something to do.
NIGHT = (
    *(("05 16:05", "check", "Renewed", "06 07:25:00"), ("05 16:35", "check", "AlreadyValid", "06 07:25:00")),
    *(("05 20:30", KILL, "", ""), ("05 21:05", "check", "Failed", "05 22:05:32")),
    *(("05 22:05:32", "check", "Renewed", "06 21:55:00"), ("05 22:50", "NASD", "Warm", "06 21:55:00")),
    *(("06 08:20", "KRX", "Warm", "06 21:55:00"), ("06 09:05", "check", "AlreadyValid", "06 21:55:00")),
)


def test_a_night_of_maintenance(gateway: Sandbox, slack: SlackEndpoint) -> None:
    """A token killed in the night is replaced before the open, with two requests to KIS and two messages in all."""
    os.environ |= {"KIS_MARKETS__US__EXCHANGES": "NASD", "KIS_ISSUE_INTERVAL": "60"}
    gateway.set_rules(issue_interval=60)
    for clock, what, end, planned in NIGHT:
        at = datetime.fromisoformat(f"2025-03-{clock}+09:00")
        with time_machine.travel(at + timedelta(seconds=1)):
            if what == KILL:
                gateway.kill_tokens()
                continue
            need = sessions.need(what, runs.local_date(what, at)) if what != "check" else None
            state = warm_up.ended(what, need[1], {only_key(): kept(need[1])}) if need else followed()
            coming = only_key().state(now()).next_attempt
            assert (state.name, coming and f"{coming.astimezone(KST):%d %H:%M:%S}") == (end, planned)
    requests = [f"{datetime.fromtimestamp(one['at'], KST):%d %H:%M}" for one in gateway.stats()["requests"]]
    assert (requests, slack.headlines) == (["05 16:05", "05 22:05"], [DEAD, DEAD.replace(": ", ": solved: ", 1)])


def leak_places(database: Path, text: str) -> set[str]:
    """Return the database's tables that contain the text."""
    with sqlite3.connect(f"file:{database}?mode=ro", timeout=60, uri=True) as connection:
        return {line.split('"')[1] for line in connection.iterdump() if text in line and line.startswith("INSERT")}


def contents(folder: Path) -> Iterator[bytes]:
    """Yield the contents of all files of a running server; some vanish meanwhile."""
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            yield path.read_bytes()


def latest(key: str) -> str:
    """Return what an artifact shows."""
    found = cast("Artifact | None", Artifact.get(key))
    return str(found.data) if found else ""


def table() -> dict[str, str]:
    """Return each market's published status, from our own table or from the first installation's on this server."""
    own = min(key.fingerprint[:8] for key in Key.load(Settings.load()))
    shown = latest(f"tokens-{own}") or latest(artifacts.TOKENS)
    return dict(re.findall(r"^\| (\w+) \| ([A-Z_]+) \|", shown, re.MULTILINE))


def counted(work: Callable[[], object]) -> Counter[str]:
    """Count the calls into our packages, in all threads."""
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
    """The deployment of check_tokens, without which no renewal is scheduled, and no planned runs yet."""
    with get_client(sync_client=True) as client:
        for one in client.read_flow_runs():
            if upcoming.TAG in one.tags:
                client.delete_flow_run(one.id)
        client.create_deployment(client.create_flow(check_tokens.check_tokens), "check_tokens")


@pytest.mark.usefixtures("prefect_home", "deployed")
class TestRuns:
    """Complete runs on a Prefect server."""

    def test_a_warm_up_renews_publishes_and_leaves_the_next_renewal(self, gateway: Sandbox, opens: Opens) -> None:
        """The first run ends Renewed, the next Warm; both publish, and are named by the exchange's own date."""
        exchange, states = opens(SOON), []
        calls = counted(lambda: states.append(run(warm_up.warm_up, exchange=exchange)))
        assert 0 < calls.total() <= 2500, calls.most_common(20)
        state, down = only_key().state(now()), errors.IssuerUnavailableError("KIS is down.")
        calls = counted(lambda: alerts.report(Settings.load(), state, down, now()))
        assert 0 < calls.total() <= 400, calls.most_common(20)
        artifacts.publish([View(only_key(), None, errors.TokenStoreError("From before another process renewed."))])
        states.append(run(warm_up.warm_up, exchange=exchange))
        assert [end_of(state) for state in states] == [("COMPLETED", "Renewed"), ("COMPLETED", "Warm")]
        assert quotes(gateway) == 1
        assert str(states[1].message).startswith("us+kr: the token serves until ")
        assert (asked(gateway), table()) == (1, {"us": "VALID", "kr": "VALID"})
        assert "data:image/svg+xml" in latest(artifacts.PLAN)
        assert planned_runs() == {"us+kr": [only_key().state(now()).next_attempt]}
        named = [one.name for one in get_client(sync_client=True).read_flow_runs()]
        assert named.count(f"warm-up {exchange} {runs.local_date(exchange, now())}") == 2

    def test_kis_being_down_is_tried_again(self, gateway: Sandbox, slack: SlackEndpoint, opens: Opens) -> None:
        """Prefect retries five seconds after the cool-down and the run ends Renewed; Slack hears of trouble and end."""
        exchange = opens(SOON)
        gateway.fail("server-error", 1)
        begun = time.monotonic()
        assert end_of(run(warm_up.warm_up, exchange=exchange)) == ("COMPLETED", "Renewed")
        assert (time.monotonic() - begun > 5.5, asked(gateway)) == (True, 2)
        assert slack.headlines == ["us+kr: KIS gives no token", "us+kr: solved: KIS gives no token"]
        assert "then every few minutes" in slack.messages[0]["blocks"][2]["text"]["text"]

    @pytest.mark.parametrize("step", [kept, checked])
    def test_the_table_has_the_trouble_while_its_run_goes_on(self, gateway: Sandbox, opens: Opens, step: Step) -> None:
        """A run can retry for most of an hour, so its trouble is in the table at once and not only at its end."""
        opens(SOON)
        gateway.fail("down")
        artifacts.publish([View(only_key(), None, errors.TokenStoreError("An older table."))])
        with pytest.raises(errors.IssuerUnavailableError):
            step(again_in=65)
        assert table() == dict.fromkeys(("us", "kr"), "NO_TOKEN")

    def test_a_late_check_is_skipped_unless_a_person_retries_it(self, gateway: Sandbox, opens: Opens) -> None:
        """A check that was due three hours ago leaves the work to a later one; with Retry on its page it checks now."""
        opens(SOON)
        assert run(check_tokens.check_tokens, ago=3 * HOUR).name == "SkippedLate"
        os.environ["PREFECT__RUNTIME__FLOW_RUN__RUN_COUNT"] = "2"
        assert (run(check_tokens.check_tokens, ago=3 * HOUR).name, asked(gateway)) == ("Renewed", 1)

    def test_one_keys_trouble_stops_no_other(self, gateway: Sandbox, slack: SlackEndpoint, opens: Opens) -> None:
        """A check of two keys fails for the refused one, but renews the other and schedules its next renewal."""
        opens(SOON)
        os.environ["KIS_MARKETS__KR__APP_KEY"] = "another-key-" * 3
        gateway.fail("bad-secret", 1)
        state = run(check_tokens.check_tokens, name="renew us", tags=[upcoming.TAG])
        assert "renew us" in [one.name for one in get_client(sync_client=True).read_flow_runs()]
        (broken, _), (other, _) = found = sorted(table().items(), key=lambda one: one[1])
        assert [status for _, status in found] == ["NO_TOKEN", "VALID"]
        assert (end_of(state), asked(gateway)) == (("FAILED", "Failed"), 2)
        assert str(state.message).startswith(f"{broken}: KIS refused the app secret (EGW00105).")
        assert slack.headlines == [f"{broken}: KIS refuses the app key or its secret"]
        assert list(planned_runs()) == [other]

    def test_the_next_renewal_is_a_scheduled_run_that_moves_and_goes(self) -> None:
        """Each key has one scheduled run, which stays while the plan does, moves with it and goes without one."""
        soon, later, past = (now().replace(microsecond=0) + hours * HOUR for hours in (2, 3, -1))
        for tag, at, planned in (
            *(("1a", soon, [soon]), ("1a", soon, [soon]), ("2b", soon, [soon, soon])),
            *(("1a", later, [soon, later]), ("2b", None, [later]), ("1a", None, [])),
            *(("1a", past, [past]), ("1a", None, [past])),
        ):
            upcoming.keep(("us+kr", f"key {tag}", at))
            assert sorted(planned_runs().get("us+kr", []), key=str) == planned

    def test_runs_that_move_the_plan_at_once_leave_one_scheduled_run(self) -> None:
        """If several runs remove the same outdated renewal at the same moment, none fails, and one new one is left."""
        start = now().replace(microsecond=0)
        with ThreadPoolExecutor(4) as pool:
            for hours in range(1, 6):
                at = start + hours * HOUR
                list(pool.map(lambda at: upcoming.keep(("us+kr", "key 1a", at)), [at] * 4))
                assert planned_runs() == {"us+kr": [at]}

    def test_real_and_paper_of_one_app_key_never_meet(self, gateway: Sandbox) -> None:
        """At one address real and paper share a fingerprint, but each has its own state and planned renewal."""
        os.environ |= {"KIS_MARKETS__KR__ENVIRONMENT": "paper", "KIS_MARKETS__KR__BASE_URL": gateway.url}
        keys = Key.load(Settings.load())
        with keys[1].store.lock(wait=1):
            keys[1].store.save(make_token())
        artifacts.update(keys, {key: Done(key.state(now()), renewed=False) for key in keys})
        assert table() == {"us": "NO_TOKEN", "kr": "VALID"}
        assert sorted(planned_runs()) == ["kr (paper)", "us"]

    def test_a_locked_keyring_hides_no_table(self) -> None:
        """With one key's keyring locked, all keys are shown; the plan lacks those whose secret KIS may have refused."""
        os.environ |= {"KIS_MARKETS__KR__APP_KEY": "another-key-" * 3, "KIS_MARKETS__KR__APP_SECRET": APP_SECRET}
        os.environ |= {"KIS_KEYRING": "kis", "PYTHON_KEYRING_BACKEND": "keyring.backends.null.Keyring"}
        del os.environ["KIS_APP_SECRET"]
        for planned in (["us", "kr"], ["kr"]):
            artifacts.publish(views := runs.views(Key.load(Settings.load()), {}))
            assert table() == {"us": "NO_TOKEN", "kr": "NO_TOKEN"}
            assert re.findall(r"^## (\w+), key", artifacts.described(views), re.MULTILINE) == planned
            record(Attempt(now(), Outcome.BAD_SECRET, "EGW00105", credentials="refused"))

    def test_two_installations_on_one_server_overwrite_no_table(self) -> None:
        """The first installation uses the names `tokens` and `plan`, one with another key always names of its own."""
        artifacts.publish(runs.views([only_key()], {}))
        first = latest(artifacts.TOKENS)
        os.environ["KIS_APP_KEY"] = "another-key-" * 3
        for _ in range(2):
            artifacts.publish(runs.views([only_key()], {}))
            assert latest(f"tokens-{only_key().fingerprint[:8]}")
            assert latest(artifacts.TOKENS) == first

    def test_no_secret_gets_into_prefect(
        self, gateway: Sandbox, slack: SlackEndpoint, opens: Opens, prefect_home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After flows that renewed, were refused, waited, failed or met a bug, Prefect and Slack hold no secret."""
        monkeypatch.setattr("flows.refresh_token.POLL", 0.2)
        exchange = opens(SOON)
        for mode in ("bad-key", "garbage"):
            gateway.fail(mode, 1)
            refreshed("us", force=True)
            time.sleep(0.6)  # the gateway's cool-down
        run(check_tokens.check_tokens)
        with paused() as waiting:
            waiting.answer("renew now")
        token, pasted = only_key().state(now()).token, make_jwt(life=77_000)
        assert token
        secrets = [APP_KEY, APP_SECRET, token.access_token, HOOK]
        assert end_of(refreshed("us", reason=f"look at {pasted}")) == ("COMPLETED", "Declined")
        monkeypatch.setattr("flows.warm_up.local_date", lambda *_: dict[str, str]()[" ".join(secrets)])
        database = Path(str(PREFECT_SERVER_DATABASE_CONNECTION_URL.value()).partition("///")[2])
        wanted, give_up = {"flow_run_state", "log"}, time.monotonic() + 120
        # Logs are written in the background, and a busy server drops some: repeat the run until its line is found.
        while not leak_places(database, "Unexpected KeyError at test_flows.py:") >= wanted:
            assert time.monotonic() < give_up
            run(warm_up.warm_up, exchange=exchange)
            time.sleep(3)
        assert leak_places(database, pasted[-40:]) == {"flow_run"}
        told, written = json.dumps(slack.messages), Path("~/.tokencore/incidents.json").expanduser()
        everything = b"\n".join([told.encode(), written.read_bytes(), *contents(prefect_home)])
        assert pasted not in told
        assert [form for secret in secrets for form in forms(secret[-40:]) if form in everything] == []
