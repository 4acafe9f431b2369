"""The managers against the sandbox: which token they serve, until when and to how many, and how they renew it."""

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
import requests
import time_machine
from builders import KEY, SECRET, OwnManager, ended, fill_disk, in_child, make_token
from running import DAY, asked, cached, folder, forked, limited, on_disk, outcomes, raised, record, start, until

from tokencore import (
    BaseTokenManager,
    ConfigurationError,
    IssuanceLimitError,
    IssuerUnavailableError,
    Key,
    KRTokenManager,
    Settings,
    TokenError,
    TokenManager,
    TokenStoreError,
    TokenUnavailableError,
    USTokenManager,
    sessions,
)
from tokencore.attempts import Attempt, Outcome
from tokencore.sandbox import APP_KEY, APP_SECRET, Sandbox
from tokencore.stores.file_store import FileStore
from tokencore.tokens import jwt_claims

HOUR = 3600.0
LAST_MINUTES = 25 * 60.0  # seconds left: inside the proactive window, before the buffer


def test_first_call_issues_once_and_every_manager_of_the_key_then_serves_the_same_token(gateway: Sandbox) -> None:
    """One request serves every market of the key; a market with another key issues its own, even inside that minute."""
    token = USTokenManager().get_valid_token()
    assert {one.get_valid_token() for one in (USTokenManager(), KRTokenManager(), TokenManager("kr"))} == {token}
    assert (asked(gateway), outcomes()) == (1, ["issued"])
    os.environ["KIS_MARKETS__KR__APP_KEY"] = KEY
    os.environ["KIS_MARKETS__KR__APP_SECRET"] = SECRET
    assert KRTokenManager().get_valid_token() != token == USTokenManager().get_valid_token()
    assert (asked(gateway), len(list(folder().glob("key-*.jsonl")))) == (2, 2)


@pytest.mark.usefixtures("gateway")
def test_a_look_at_an_unchanged_file_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look, once a second, costs one `stat`; the approaching expiry and a rejection are noticed all the same."""
    monkeypatch.setattr("tokencore.manager.FRESH", 0.0)
    manager = USTokenManager()
    token = manager.get_valid_token()  # from KIS,
    manager.get_valid_token()  # and now from the file
    with monkeypatch.context() as looking:
        looking.setattr(FileStore, "read", lambda *_: pytest.fail("it was read"))
        assert manager.get_valid_token() == manager.token_at_hand() == token
        due = time.time() + DAY - 1800  # when renewals ahead begin
        looking.setattr(time, "time", lambda: due)
        with pytest.raises(pytest.fail.Exception):
            manager.get_valid_token()
    for refused in (lambda: KRTokenManager().report_rejected(token), manager.get_valid_token):
        assert limited(refused)[0] == "same_token"


ENDS: dict[str, tuple[float, float | None, int, tuple[type[TokenError], str] | None]] = {
    # hours that the token has left, hours for which a token is asked, requests, error
    "in the past": (7, -1, 0, None),
    "before the buffer": (7, 7 - 310 / HOUR, 0, None),
    "inside the buffer": (7, 7 - 299 / HOUR, 1, None),
    "longer than any token": (17, 25, 0, (TokenUnavailableError, "The present token serves until")),
    "for ever": (17, 24 * 365 * 7970, 0, (TokenUnavailableError, "The present token serves until")),
    "in KIS's six hours": (23, 23, 0, (IssuanceLimitError, "six hours after its issue")),
    "without a zone": (23, None, 0, (ConfigurationError, "time zone")),
    "no token to judge by": (0, 25, 1, (TokenUnavailableError, "earlier than was asked")),
}


@pytest.mark.parametrize("case", ENDS)
def test_valid_until_renews_only_what_does_not_last(gateway: Sandbox, case: str) -> None:
    """A token that lasts to `valid_until` and the buffer is served; an end out of reach costs one request at most."""
    left, ahead, issues, error = ENDS[case]
    token, now = cached(left * HOUR) if left else None, datetime.now(UTC)
    wanted = now.replace(tzinfo=None) if ahead is None else now + timedelta(hours=ahead)
    if error:
        first, _ = (raised(lambda: USTokenManager().get_valid_token(valid_until=wanted)) for _ in range(2))
        assert (type(first), error[1] in str(first)) == (error[0], True)
    else:
        served = {manager.get_valid_token(wanted) for manager in (USTokenManager(), KRTokenManager())}
        assert (len(served), token is not None and token.access_token in served) == (1, not issues)
    assert USTokenManager().get_valid_token() == on_disk().access_token
    assert asked(gateway) == issues


def test_subclass_states_only_what_is_its_own(gateway: Sandbox) -> None:
    """Three methods make a manager with its own key, files and limits, for no plain http address except loopback."""
    token = OwnManager().get_valid_token()
    assert json.loads((folder() / "own_api_token.json").read_text())["access_token"] == token
    assert OwnManager().get_token_status()["market"] == "own"
    assert OwnManager("second_", " ").get_valid_token() == token != USTokenManager().get_valid_token()
    assert asked(gateway) == 2
    assert "https" in str(raised(lambda: OwnManager(url="http://192.0.2.1:9443")))
    with pytest.raises(NotImplementedError, match=r"has to give get_api_url.*get_token_file_prefix"):
        BaseTokenManager()


@pytest.mark.parametrize("environment", ["real", "paper"])
def test_a_subclass_that_gives_only_the_name_of_its_files_has_the_markets_key_and_environment(
    gateway: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: str
) -> None:
    """It shares the market's token, also where a .env gives all of this, or the market has its own environment."""
    monkeypatch.chdir(tmp_path)
    given = {name: os.environ.pop(name) for name in ("KIS_APP_KEY", "KIS_APP_SECRET", "KIS_BASE_URL")}
    given |= {"KIS_MARKETS__US__ENVIRONMENT": environment, "KIS_MARKETS__US__BASE_URL": given["KIS_BASE_URL"]}
    Path(".env").write_text("".join(f"{name}={value}\n" for name, value in given.items()))
    renamed, elsewhere = (
        type("Own", (USTokenManager,), {"get_token_file_prefix": lambda _, name=name: name})
        for name in ("renamed_", "../")
    )
    assert renamed().get_valid_token() == USTokenManager().get_valid_token()
    status = renamed().get_token_status()
    assert (status["market"], status["environment"], asked(gateway)) == ("renamed", environment, 1)
    assert (folder() / "renamed_api_token.json").exists()
    assert "not a market's name" in str(raised(elsewhere))


@pytest.mark.parametrize("forgotten", ["get_api_url", "get_app_credentials", "get_token_file_prefix"])
@pytest.mark.usefixtures("gateway")
def test_what_a_subclass_forgot_to_return_is_said_in_a_sentence(forgotten: str) -> None:
    """Nothing in place of a value, as of a variable that is not set, is an error of the settings."""
    incomplete = type("Incomplete", (OwnManager,), {forgotten: lambda _: None})
    assert isinstance(raised(incomplete), ConfigurationError)


def test_manager_that_was_made_without_credentials_finds_those_given_since(gateway: Sandbox) -> None:
    """In a notebook, the manager that asked for a key works once it is set, without being made again."""
    secret = os.environ.pop("KIS_APP_SECRET")
    manager = USTokenManager()
    assert "KIS_APP_SECRET is not set" in str(raised(manager.get_valid_token))
    os.environ["KIS_APP_SECRET"] = secret
    assert (manager.get_valid_token(), asked(gateway)) == (on_disk().access_token, 1)


def in_threads(count: int, work: Callable[[int], object]) -> list[object]:
    """Return what `work` returns in each of `count` threads that begin at the same moment."""
    barrier = threading.Barrier(count)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda number: (barrier.wait(), work(number))[1], range(count)))


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize("crowd", [forked, in_threads])
@pytest.mark.parametrize("left", [0, LAST_MINUTES], ids=["without a token", "about to expire"])
def test_a_crowd_makes_one_request_and_nobody_sits_out_the_minute(
    slow: Sandbox,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    crowd: Callable[..., list[tuple[str, str]]],
    left: float,
) -> None:
    """Callers for us and for kr, some sharing a manager, all get the new token, or the old one while it serves."""
    monkeypatch.setattr("tokencore.manager.PATIENCE", 30)  # a child ends without waiting for its thread
    known, began = {cached(left).access_token} if left else set(), time.monotonic()
    managers = [USTokenManager(), KRTokenManager(), *(TokenManager(("us", "kr")[n % 2]) for n in range(30))]
    served = set(crowd(32, lambda number: (managers[number % 29].get_valid_token(), caplog.text)))
    assert time.monotonic() - began < 50
    assert served <= {(token, "") for token in (*known, on_disk().access_token)}
    assert (asked(slow), on_disk().access_token in known) == (1, False)


def test_processes_that_start_inside_a_foreign_minute_wait_it_out_and_ask_once_more(gateway: Sandbox) -> None:
    """Another program has just issued: one request is refused, and one more, a cool-down later, serves them all."""
    gateway.set_rules(issue_interval=60)
    os.environ["KIS_ISSUE_INTERVAL"] = "1"
    body = {"grant_type": "client_credentials", "appkey": APP_KEY, "appsecret": APP_SECRET}
    assert requests.post(f"{gateway.url}/oauth2/tokenP", json=body, timeout=5).status_code == 200

    def end_the_minute_after_a_refusal() -> None:
        until(lambda: asked(gateway) == 2)
        gateway.set_rules(issue_interval=0)

    with ThreadPoolExecutor() as pool:
        pool.submit(end_the_minute_after_a_refusal)
        served = forked(3, lambda _: USTokenManager().get_valid_token())
    assert served == [on_disk().access_token] * 3
    assert [request["outcome"] for request in gateway.stats()["requests"]] == ["new", "EGW00133", "same"]


def test_child_forked_while_a_thread_renews_waits_for_it_and_gets_its_token(slow: Sandbox) -> None:
    """A fork in the middle of a renewal inherits neither gate nor lock: the child is served by the same request."""
    manager = USTokenManager()
    with ThreadPoolExecutor() as pool:
        renewing = pool.submit(manager.get_valid_token)
        until(lambda: asked(slow) == 1)
        served = forked(1, lambda _: (manager.get_valid_token(), KRTokenManager().get_valid_token()))
        assert served == [(renewing.result(),) * 2]
    assert asked(slow) == 1


def test_concurrent_ticks_make_one_request_and_none_of_them_reports_trouble(slow: Sandbox) -> None:
    """Schedulers fire in the same second: one renews, the others see that another was quicker."""
    key = Key.load(Settings.load())[0]
    state = key.state(datetime(2025, 11, 24, 8, 15, tzinfo=UTC))
    decisions = forked(8, lambda _: tuple(map(str, key.tick(state)[:2])))
    assert sorted(decisions) == [("False", "None")] * 7 + [("True", "None")]
    assert asked(slow) == 1


@pytest.mark.parametrize("what", ["rule", "refresh", "warm-up"])
def test_a_token_for_others_is_not_asked_for_while_it_cannot_be_saved(gateway: Sandbox, what: str) -> None:
    """On a full disk neither flows nor a refresh ask KIS; a program that needs a token now still gets one."""
    manager = TokenManager("us")

    def work() -> None:
        fill_disk()
        key = Key.load(Settings.load())[0]
        soon = datetime.now(UTC) + timedelta(hours=1)
        ways: dict[str, Callable[[], object]] = {
            "rule": partial(key.renewer.renew_due, None, "rule"),
            "refresh": partial(manager.refresh, force=True),
            "warm-up": partial(key.obtain, soon, soon),
        }
        with pytest.raises(TokenStoreError, match="Nothing was issued"):
            ways[what]()
        assert (asked(gateway), key.state(datetime.now(UTC)).cooldown_until) == (0, None)
        assert manager.get_valid_token()

    assert ended(in_child(work)) == 0
    assert asked(gateway) == 1


@pytest.mark.parametrize("outcome", [Outcome.LIMIT, Outcome.UNREACHABLE])
def test_after_the_clock_was_set_back_a_pause_ends_once_it_has_passed(gateway: Sandbox, outcome: Outcome) -> None:
    """An attempt in the future counts as made when the next renewal meets it, not anew at each later one."""
    os.environ["KIS_ISSUE_INTERVAL"] = "1"
    record(Attempt(datetime.now(UTC) + timedelta(hours=5), outcome))
    key = Key.load(Settings.load())[0]
    with pytest.raises(IssuanceLimitError):
        key.renewer.renew_due(None, "rule")
    time.sleep(1.2)
    assert key.renewer.renew_due(None, "rule")
    assert asked(gateway) == 1


@pytest.mark.usefixtures("gateway")
def test_a_token_that_was_lost_is_fetched_at_once_while_kis_returns_it() -> None:
    """With an issue an hour ago on record but no file, a renewal is due at once; the one after it counts from that."""
    now = datetime.now(UTC).replace(microsecond=0)
    record(Attempt(now - timedelta(hours=20), Outcome.SAME), Attempt(now - timedelta(hours=1), Outcome.ISSUED))
    state = Key.load(Settings.load())[0].state(now)
    planned, following = state.plan().renewals[:2]
    assert planned == state.outlook.next
    assert (planned.at, "the token is lost" in planned.reason) == (now, True)
    TokenManager("us").save_token(make_token(age=3600, now=now))
    assert Key.load(Settings.load())[0].state(now).plan().renewals[0].at == following.at


def test_who_waited_while_kis_could_not_be_reached_shares_that_finding(gateway: Sandbox) -> None:
    """Of several threads that want a token, one tries to connect; the others share its error and do not try in turn."""
    managers = [USTokenManager() for _ in range(4)]
    gateway.__exit__()
    with ThreadPoolExecutor(len(managers)) as pool:
        errors = list(pool.map(lambda manager: raised(manager.get_valid_token), managers))
    assert {type(error) for error in errors} == {IssuerUnavailableError}
    assert outcomes() == ["unreachable"]


@pytest.mark.usefixtures("gateway")
def test_who_waits_for_another_process_needs_nothing_but_its_token() -> None:
    """A caller that waits for the lock's holder reads no setting that only a request needs, and takes its token."""
    store, token = Key.load(Settings.load())[0].store, make_token()
    os.environ["KIS_ISSUE_INTERVAL"] = "soon"
    with ThreadPoolExecutor() as pool:
        with store.lock(wait=5):
            waiting = pool.submit(USTokenManager().get_valid_token)
            time.sleep(0.3)
            assert not waiting.done()
            store.save(token)
        assert waiting.result(5) == token.access_token
    assert "KIS_ISSUE_INTERVAL" in str(raised(lambda: KRTokenManager().refresh(force=True)))


def test_a_key_that_is_replaced_while_a_thread_waits_for_the_lock_gets_no_token_of_the_other(gateway: Sandbox) -> None:
    """Each renewal stays with the key with which it began, and its copies for other clients too."""
    os.environ["KIS_MARKETS__US__EXPORTS"] = "mojito2"
    manager, store = USTokenManager(), Key.load(Settings.load())[0].store
    with ThreadPoolExecutor() as pool, store.lock(wait=5):
        waiting = pool.submit(manager.get_valid_token)
        until(lambda: "_renewer" in vars(manager))
        os.environ |= {"KIS_APP_KEY": KEY, "KIS_APP_SECRET": SECRET}
        pool.submit(manager.get_valid_token).result(10)
    waiting.result(10)
    owners = {store.fingerprint: APP_KEY, Key.load(Settings.load())[0].fingerprint: KEY}
    found = {
        path.name[4:20]: json.loads(path.read_text("utf-8")) for path in folder().glob("key-????????????????.json")
    }
    assert {name: jwt_claims(content["access_token"])["jti"] for name, content in found.items()} == owners
    assert asked(gateway) == 2


def test_rejected_token_is_dead_in_every_file_of_its_key_and_gives_way_to_a_newer_one_in_a_view(
    gateway: Sandbox,
) -> None:
    """A report counts even from a market without a file, and a newer token even from an earlier version's view."""
    new, view = cached(17 * HOUR), folder() / "us_api_token.json"
    content = view.read_bytes()
    old = cached(16 * HOUR)
    view.write_bytes(content)
    reported = f"Bearer {old.access_token}\n"  # as it stands in a header
    assert USTokenManager().report_rejected(reported) == new.access_token == on_disk().access_token
    young = cached(23 * HOUR)
    USTokenManager().delete_token()
    assert limited(lambda: USTokenManager().report_rejected(young.access_token))[0] == "same_token"
    assert on_disk("kr").rejected_at is not None
    assert asked(gateway) == 0


def test_a_dead_token_that_another_process_got_meanwhile_is_no_refresh(gateway: Sandbox) -> None:
    """A refresh that waited for the lock says when another token is possible if KIS has rejected the one that came."""
    cached(16 * HOUR)
    store = FileStore(USTokenManager().market, lambda: ["us", "kr"])
    with ThreadPoolExecutor() as pool:
        with store.lock(wait=5):
            refreshing = pool.submit(USTokenManager().refresh)
            time.sleep(0.5)  # it has seen the old token, and waits
            store.save(make_token(age=60, rejected=True))
        assert limited(refreshing.result)[0] == "same_token"
    assert asked(gateway) == 0


def test_what_a_full_disk_did_not_take_is_saved_when_it_has_room(quick: Sandbox) -> None:
    """The only process that has the token saves it within a minute, so that no other process has to issue one."""

    def hold_it_until_there_is_room() -> None:
        fill_disk()
        manager = USTokenManager()
        token = manager.get_valid_token()
        assert not list(folder().glob("key-*.json"))
        assert Key.load(Settings.load())[0].state(datetime.now(UTC)).token is None  # no other process has it
        fill_disk(-1)
        until(lambda: manager.get_valid_token() == token and bool(list(folder().glob("key-*.json"))))

    assert ended(in_child(hold_it_until_there_is_room)) == 0
    assert KRTokenManager().get_valid_token() == on_disk().access_token
    assert asked(quick) == 1


def test_token_that_could_not_be_saved_is_renewed_ahead_too(quick: Sandbox) -> None:
    """On a full disk, a token's successor is fetched in its last half hour, and not only after it has expired."""

    def hold_it() -> None:
        os.environ["KIS_ISSUE_INTERVAL"] = "60"
        assert not USTokenManager().delete_token()  # the directory and the lock are there
        fill_disk()
        manager, old = USTokenManager(), make_token(age=DAY - LAST_MINUTES)
        assert isinstance(raised(lambda: manager.save_token(old)), TokenStoreError)
        until(lambda: manager.get_valid_token() != old.access_token)

    assert ended(in_child(hold_it)) == 0
    assert asked(quick) == 1


@pytest.mark.parametrize("gone", [False, True], ids=["a file is in its place", "its drive is not mounted"])
def test_token_in_memory_is_served_while_the_directory_cannot_be_used(
    gateway: Sandbox, tmp_path: Path, caplog: pytest.LogCaptureFixture, *, gone: bool
) -> None:
    """A running program goes on with one warning, until KIS rejects the token; a new program cannot start."""
    os.environ["KIS_TOKEN_DIR"] = str(place := tmp_path / "drive" / "tokens")
    token = (running := USTokenManager()).get_valid_token()
    aside = (broken := place.parent if gone else place).rename(tmp_path / "aside")
    broken.symlink_to("nowhere") if gone else broken.write_text("")
    for _ in range(2):
        running._fresh_until = 0.0  # noqa: SLF001 - a second later
        assert running.get_valid_token() == token
    assert [message.partition(".")[0] for message in caplog.messages] == ["The token in memory still serves"]
    refused = (USTokenManager().get_valid_token, lambda: running.report_rejected(token), running.get_valid_token)
    assert [type(raised(work)) for work in refused] == [TokenStoreError] * 3
    assert ("No such file or directory" in str(raised(refused[0]))) is gone
    broken.unlink()
    aside.rename(broken)
    assert (running.get_valid_token(), asked(gateway)) == (token, 1)


@pytest.mark.parametrize("how", ["until the close", "rejected"])
def test_thread_that_read_the_old_token_before_gives_nobody_else_that(
    gateway: Sandbox, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A caller gets the token that was renewed for it, though a slower thread remembers the earlier one meanwhile."""
    old, manager = cached(DAY / 2), USTokenManager()
    later = datetime.now(UTC) + timedelta(hours=20)

    def slower(_: object) -> bool:
        manager._remember(old)  # noqa: SLF001 - as another thread does
        return True

    monkeypatch.setattr(manager._store, "saved", slower)  # noqa: SLF001 - called when the new token is remembered
    if how == "rejected":
        assert manager.report_rejected(old.access_token) != old.access_token
    else:
        assert manager.get_valid_token(valid_until=later) != old.access_token
    assert asked(gateway) == 1


def test_token_that_expires_while_the_machine_sleeps_is_not_served_when_it_wakes(nowhere: Sandbox) -> None:
    """The clock that runs on decides; after it is set back too, the next call looks at the file."""
    token = cached().access_token
    manager = USTokenManager()
    assert manager.get_valid_token() == token
    with time_machine.travel(datetime.now(UTC) + timedelta(hours=25)):
        assert manager.get_valid_token() != token
    assert (manager.get_valid_token(), asked(nowhere)) == (on_disk().access_token, 1)


@pytest.mark.parametrize(("minutes", "issues"), [(15, 0), (40, 1)], ids=["served to its end", "longer than the token"])
def test_session_that_the_present_token_serves_to_its_end_is_free_of_swaps(
    nowhere: Sandbox, minutes: int, issues: int
) -> None:
    """With 25 minutes left, a renewal waits for the end of a need that the token covers, and not for a longer one."""
    now = datetime.now(UTC)
    local = {code: now.astimezone(ZoneInfo(sessions.exchange(code).zone)) for code in ("KRX", "NASD")}
    code = next(code for code in local if 3 <= local[code].hour < 23)  # true of one of them at any time of day
    close = local[code] + timedelta(minutes=minutes) - sessions.exchange(code).pad
    hours = f"{close - timedelta(hours=1):%H:%M}-{close:%H:%M}"
    os.environ["KIS_MARKETS__US__EXCHANGES"] = code
    os.environ[f"KIS_EXCHANGES__{code}__HOURS__{close:%Y-%m-%d}"] = hours
    token = cached(LAST_MINUTES)
    assert (USTokenManager().get_valid_token() != token.access_token) == issues
    assert asked(nowhere) == issues


def test_renewal_ahead_keeps_nobody_waiting_for_kis(nowhere: Sandbox) -> None:
    """While KIS is slow to answer one request, eight threads go on with the old token; then they get the new one."""
    nowhere.set_rules(latency=2)
    token, shared = cached(LAST_MINUTES), USTokenManager()
    with ThreadPoolExecutor(8) as pool:
        served = set(pool.map(lambda _: shared.get_valid_token(), range(80)))
    assert served == {token.access_token}
    until(lambda: shared.get_valid_token() != token.access_token)
    assert asked(nowhere) == 1


ONE_SHOT = "from tokencore import cli, manager as it; it.PATIENCE, it.BEGIN = 0, 60; exit(cli.main(['get', 'us']))"


def test_a_command_that_ends_before_its_renewal_has_begun_lets_it_ask(nowhere: Sandbox) -> None:
    """`get` prints the present token, and gives its background thread time to send the request, not to be answered."""
    nowhere.set_rules(latency=30)
    token = cached(LAST_MINUTES)
    with start(ONE_SHOT) as process:
        out, err = process.communicate(timeout=25)
    assert (process.returncode, out, err) == (0, f"{token.access_token}\n", "")
    until(lambda: asked(nowhere) == 1)


@pytest.mark.parametrize("trouble", ["KIS_MARKETS__US__EXCHANGE", "The token directory cannot be used"])
def test_what_forbids_a_renewal_ahead_is_told_once_and_the_token_served_on(
    nowhere: Sandbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    """A misspelt setting or a lock that cannot be taken draws one warning in a cool-down, not one at every call."""
    monkeypatch.setattr("tokencore.manager.FRESH", 0.0)
    monkeypatch.setattr("tokencore.manager.AHEAD_PAUSE", 0.0)
    os.environ["KIS_ISSUE_INTERVAL"] = "60"
    token, shared = cached(LAST_MINUTES), USTokenManager()
    if trouble.startswith("KIS"):
        os.environ[trouble] = "NASD"
    else:
        lock = next(folder().glob("*.lock"))
        lock.unlink()
        lock.mkdir()
    assert {shared.get_valid_token() for _ in range(20)} == {token.access_token}
    assert [trouble in line.getMessage() for line in caplog.records if line.levelno >= logging.WARNING] == [True]
    assert asked(nowhere) == 0
