"""Machines that share a key through PostgreSQL: one request a day, whatever happens to them, store or network."""

# ruff: noqa: S311 - random faults, not secrets

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import certifi
import pytest
import time_machine
from builders import DAY, KEY, NOW, SECRET, ended, forms, in_child, make_token
from cryptography.fernet import Fernet
from fleets import MINUTE, POINTS, TIMEOUT, Fleet, Machine, Relay
from postgres import PASSWORD, Postgres, needs_postgres
from running import Command, asked, one_line, snapshot, start, tokencore, until
from servers import SlackEndpoint, Wire
from stepping import FULL

from flows import alerts
from flows.stack import watchdog
from tokencore import CredentialsError, Key, Settings, TokenManager, TokenStoreError, TokenUnavailableError
from tokencore.attempts import Attempt, Outcome
from tokencore.sandbox import Sandbox
from tokencore.stores import database, open_document
from tokencore.stores.encryption import Seal
from tokencore.stores.file_store import FileStore
from tokencore.stores.fleet import Fleet as Reached
from tokencore.stores.shared_store import alone

SENT = Attempt(NOW, Outcome.SENT, reason="get us", credentials="0123abcd", pid=7)
OTHER = KEY[::-1]  # another app key

pytestmark = needs_postgres


class Field(NamedTuple):
    """An empty fleet, a KIS with a half-second cool-down that takes a tenth of a second to issue, and a folder."""

    fleet: Fleet
    kis: Sandbox
    folder: Path

    def machine(self, name: str, fleet: Fleet | None = None, **numbers: Any) -> Machine:  # noqa: ANN401 - fields of the settings
        """Return a machine without a token, in this fleet or the given one."""
        return Machine(fleet or self.fleet, self.folder / name, self.kis, **numbers)

    def machines(self, count: int, **numbers: Any) -> list[Machine]:  # noqa: ANN401 - the same
        """Return that many machines."""
        return [self.machine(f"machine-{number}", **numbers) for number in range(count)]

    def sql(self, *statements: str) -> str:
        """Return what the statements print."""
        return self.fleet.server.sql(*statements)


@pytest.fixture
def field(fleet: Fleet, tmp_path: Path) -> Iterator[Field]:
    """The fleet, KIS and folder of a test."""
    with Sandbox(issue_interval=MINUTE, latency=0.1) as kis:
        yield Field(fleet, kis, tmp_path)


def clean(kis: Sandbox, requests: int) -> None:
    """Assert that KIS got that many requests, refused none and issued one token."""
    stats = kis.stats()
    assert (stats["token_requests"], stats["granted_new"], stats["refused"]) == (requests, 1, {})


@pytest.mark.parametrize("interval", [MINUTE, 0])
def test_eight_cold_machines_make_one_request(field: Field, interval: float) -> None:
    """Two processes on each of eight machines get the token of one request, even if the cool-down is 0."""
    machines = field.machines(8, issue_interval=interval, timeout=10)
    field.kis.set_rules(issue_interval=60)
    assert [ended(child) for child in [machine.start() for machine in machines * 2]] == [0] * 16
    assert {machine.got for machine in machines} == {machine.has for machine in machines} == {machines[0].got}
    clean(field.kis, 1)


def test_of_two_that_have_looked_one_begins_and_the_last_that_began_may_send(field: Field) -> None:
    """Another machine's attempt makes any earlier look or attempt void; a forked child harms no connection."""
    first, second, third = field.machines(3)
    with first.store.lock(wait=5), second.store.lock(wait=5):
        assert ended(in_child(lambda: (third.look(), first.store.attempts()))) == 0
        begun = first.store.begin(SENT)
        assert begun
        assert second.store.begin(SENT) is None
        assert first.store.depart(begun)
        field.sql("update tokencore_attempt set at = now() - interval '1 hour'")
        assert second.store.begin(SENT) is None
        assert second.store.begin(SENT)
        assert not first.store.depart(begun)


REQUESTS = {signal.SIGKILL: (1, 1, 2), signal.SIGSTOP: (1, 0, 2), 0: (1, 2, 2)}  # by the fault's point; 0: not tried
FATES = [(at, fault, one) for fault, counts in REQUESTS.items() for at, one in zip(POINTS, counts, strict=True) if one]


def test_whatever_befalls_the_machine_that_renews_the_others_get_the_same_token(field: Field) -> None:
    """If the machine is killed, stopped or cut off, only an answer that nobody can know costs a second request."""
    with ThreadPoolExecutor(len(FATES)) as pool:
        list(pool.map(lambda fate: outlive(field.fleet, field.folder / f"{fate[1]}-{fate[0]}", *fate), FATES))


def outlive(fleet: Fleet, folder: Path, at: str, fault: int, requests: int) -> None:
    """Let one of three machines meet the fault at that point; if it was only stopped, it takes the others' token."""
    with Sandbox(issue_interval=MINUTE) as kis, Relay(fleet.server.port) as relay:
        # Two seconds for an answer: on a busy machine KIS could be later than one, and would be asked once more.
        victim = Machine(fleet.behind(relay), folder / "victim", kis, timeout=2 * TIMEOUT)
        others = [Machine(fleet, folder / name, kis, timeout=2 * TIMEOUT) for name in ("one", "two")]
        child = victim.start(at, fault or signal.SIGSTOP)
        os.waitpid(child, os.WUNTRACED)
        if not fault:
            relay.open.clear()
            os.kill(child, signal.SIGCONT)
        assert [ended(one) for one in [other.start() for other in others]] == [0, 0], folder
        if fault == signal.SIGSTOP:
            os.kill(child, signal.SIGCONT)
        if fault != signal.SIGKILL:
            code = ended(child)
            assert (code, victim.got) == ((0, others[0].got) if fault or at != "begun" else (1, "")), folder
        assert {other.got for other in others} == {others[0].got} != {""}
        clean(kis, requests)


def test_a_rejected_removed_or_imported_token_is_so_on_every_machine(field: Field) -> None:
    """Each machine follows a rejection, removal or import at its next look at the latest; none undoes a removal."""
    first, second = field.machines(2)
    token = first.save(make_token())
    assert second.look() == token
    first.save(make_token(text=token, rejected=True))
    assert second.look() == "rejected"
    assert second.save(make_token(text=token)) == first.look()  # it was proven to work again
    assert second.save(make_token(life=3600)) == first.look()  # shorter, but a person insists
    with first.store.lock(wait=5):
        assert first.store.delete()
    os.environ |= second.environment
    with pytest.raises(TokenUnavailableError, match="deleted"):  # the machine learns of it on the way
        TokenManager("us").export("kis-auth", str(folder := field.folder / "copy"))
    assert (second.look(), folder.exists()) == ("", False)


def test_a_rejection_that_comes_late_does_not_remove_the_new_token(field: Field) -> None:
    """A token that another machine got after this one looked into the store is kept when this one reports the old."""
    first, second = field.machines(2)
    old = first.save(make_token(life=3600))
    with second.store.lock(wait=5):
        new = first.save(make_token())
        second.store.save(make_token(text=old, life=3600, rejected=True))
    assert first.look() == second.look() == new


def test_a_token_revoked_while_the_store_is_away_is_dead_at_once_here_and_later_for_all(field: Field) -> None:
    """The command ends with 7 and says that KIS has revoked it; this machine stops serving it, then all others do."""
    with Relay(field.fleet.server.port) as relay:
        first, second = Machine(field.fleet.behind(relay), field.folder / "first", field.kis), field.machine("second")
        token = first.get()
        assert second.look() == token
        relay.open.clear()
        ran = tokencore("delete", "us", "--revoke", "--yes", **first.environment)
        assert (ran.code, "KIS has revoked the token" in one_line(ran), first.has) == (7, True, "rejected")
        relay.open.set()
        until(lambda: first.look() == second.look() == "rejected")


def test_a_command_that_finds_the_fleets_token_brings_its_copies_up_to_date(field: Field) -> None:
    """What another machine has issued is in other clients' files here once a command here has asked for it."""
    first, second = field.machines(2)
    token = first.get()
    ran = tokencore("get", "us", KIS_MARKETS__US__EXPORTS="mojito2", **second.environment)
    assert ran.out == f"{token}\n"
    assert token.encode() in (second.folder / "us_krs_token.dat").read_bytes()


def test_a_removal_that_others_keep_overtaking_is_an_error(field: Field) -> None:
    """If other machines change the row before each try to remove its token, the command does not claim success."""
    store = field.machine("one").store
    overtaken = patch.object(database.Database, "put", return_value=False)
    with store.lock(wait=5), overtaken, pytest.raises(TokenStoreError, match="too often"):
        store.clear()


def test_what_only_one_machine_has_is_offered_and_the_later_expiry_wins(field: Field, command: Command) -> None:
    """A joining machine brings its token and record, and a server restored to an older state gets back what it lost."""
    first, second = field.machines(2)
    alone = FileStore(first.market, lambda: ["us"])
    with alone.lock(wait=5):
        alone.finish(alone.begin(SENT), SENT._replace(outcome=Outcome.ISSUED), token := make_token(life=3600))
    issued = int(token.issued_at.timestamp()) if token.issued_at else 0
    assert first.look() == second.look() != ""
    assert [(one.folder / "us_token_issued_at.dat").read_text() for one in (first, second)] == [f"{issued}\n"] * 2
    assert [one.outcome for one in second.store.attempts()] == ["issued"]
    hosts = []
    for machine in (first, second):
        os.environ |= machine.environment
        hosts += [one["host"] for one in json.loads(command("history", "--json").out)]
    assert (len(hosts), len(set(hosts)), hosts[0].partition(":")[0]) == (2, 1, socket.gethostname()[:50])
    before = field.sql("select version, fence, sealed from tokencore_key where key <> 'layout'").split("|")
    later = first.save(make_token())
    with first.store.lock(wait=5):
        first.store.note(SENT._replace(at=NOW + DAY, outcome=Outcome.IMPORTED))
    field.sql(
        "update tokencore_key set version = {}, fence = {}, sealed = '{}' where fence > 0".format(*before),  # noqa: S608
        "delete from tokencore_attempt where fence > 1",
    )
    assert first.look() == second.look() == later
    assert [(one.outcome, bool(one.host)) for one in second.store.attempts()] == [("issued", True), ("imported", True)]
    assert not any(one.host for one in first.store.attempts())


def test_an_outcome_that_could_not_be_published_is_recorded_also_after_anothers_attempt(field: Field) -> None:
    """The fleet's record gets the outcome that only the machine knew, in its place before another machine's attempt."""
    first, second = field.machines(2)
    sent = SENT._replace(at=datetime.now(UTC))
    for machine in (first, second):
        with machine.store.lock(wait=0), patch.object(machine.store, "_in_flight", lambda _: False):
            assert machine.store.begin(sent)
    FileStore(first.market, tuple).record.complete(sent, sent._replace(outcome=Outcome.ISSUED))
    first.look()
    assert [one.outcome for one in second.store.attempts()] == ["issued", "sent"]


@pytest.mark.parametrize("hours", [1, -1])
def test_the_limits_go_by_the_servers_clock(field: Field, hours: int) -> None:
    """A machine whose clock is an hour off knows the age of others' attempts, and records its own at the right time."""
    first, second = field.machines(2, issue_interval=60)
    moments = [datetime.now(UTC), datetime.now(UTC) + timedelta(hours=hours)]
    for machine, now in zip((first, second), moments, strict=True):
        with time_machine.travel(now), machine.store.lock(wait=0):
            assert all(abs(datetime.now(UTC) - one.at) < timedelta(minutes=1) for one in machine.store.attempts())
            sent = SENT._replace(at=datetime.now(UTC))
            machine.store.finish(machine.store.begin(sent) or (0, DAY, sent), sent._replace(outcome=Outcome.LIMIT))
    seen = first.store.attempts()
    assert [abs(datetime.now(UTC) - one.at) < timedelta(minutes=1) for one in seen] == [True, True]


BOT = "import time; from tokencore import TokenManager; manager = TokenManager('us')\n"
BOT += "while True: manager.get_valid_token(); time.sleep(0.1)"
FOLLOW = "from tokencore.cli import main; main(['follow'])"


def test_what_a_machine_had_before_its_fleet_is_offered_by_its_follower(field: Field) -> None:
    """A follower puts its machine's token into a store without the key's row, and the next machine issues nothing."""
    first, second = field.machines(2)
    alone = FileStore(first.market, lambda: ["us"])
    with alone.lock(wait=5):
        alone.save(token := make_token())
    with start(FOLLOW, **first.environment) as process:
        try:
            until(lambda: field.sql("select count(*) from tokencore_key where key <> 'layout'") == "1")
        finally:
            process.kill()
    assert (second.get(), field.kis.stats()["token_requests"]) == (token.access_token, 0)


def test_a_machine_follows_what_the_others_do(field: Field) -> None:
    """Changes reach a listener, its copy for another client, a poller and a bot; a damaged row is left alone."""
    with Relay(field.fleet.server.port, notifies=False) as relay, contextlib.ExitStack() as running:
        first, listening, bot = field.machines(3)
        polling = field.machine("polling", field.fleet.behind(relay))

        def started(program: str, machine: Machine) -> subprocess.Popen[str]:
            more = {"KIS_MARKETS__HK__APP_KEY": OTHER, "KIS_MARKETS__HK__EXCHANGES": "SEHK"}
            more["KIS_MARKETS__US__EXPORTS"] = f"kis-auth:{machine.folder}"
            process = start(program, **machine.environment, **more)
            running.callback(process.communicate)
            running.callback(process.kill)
            return process

        def all_have(what: str) -> None:
            until(lambda: {one.has for one in (listening, polling, bot)} == {what})

        follower, *_ = (started(FOLLOW, listening), started(FOLLOW, polling), started(BOT, bot))
        all_have(first.get())
        successor = started(FOLLOW, listening)
        all_have(token := first.save(make_token(life=90_000)))
        until(lambda: {token in one.read_text() for one in listening.folder.glob("KIS2*")} == {True})
        follower.kill()
        first.save(make_token(text=token, rejected=True))
        all_have("rejected")
        until(lambda: not list(listening.folder.glob("KIS2*")))
        damaged = "update tokencore_key set sealed = 'x', version = version + 1 where key ="
        field.sql(f"{damaged} '{first.store.name}'", f"notify tokencore, '{first.store.name}'")
        other = field.machine("other", key=OTHER)
        other.save(make_token())
        until((listening.folder / f"key-{other.store.fingerprint}.json").exists)
        successor.kill()
        said = successor.communicate()[1]
    assert (said.count("cannot be decrypted"), said.count("keeps trying")) == (1, 0), said
    assert listening.has == "rejected"


def test_a_follower_that_cannot_have_its_lock_says_so(field: Field, command: Command) -> None:
    """`follow` exits 7 and names the path if something else is where its lock should be."""
    os.environ |= field.machine("one").environment
    reached = Reached.of(Settings.load())
    os.mkdir(reached.follower_lock(reached.rows()))
    ran = command("follow")
    assert (ran.code, "token directory cannot be used" in ran.err) == (7, True)


def test_each_trouble_with_the_store_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """An entry that cannot be decrypted, which lasts, hides no later outage from the log."""
    for what in ("no key opens it", "it does not answer", "no key opens it"):
        alone(TokenStoreError(f"The store: {what}."))
    assert [what.partition(".")[0] for what in caplog.messages] == [
        "The store: no key opens it",
        "The store: it does not answer",
    ]


def test_machines_that_meet_the_same_trouble_alert_once(field: Field, slack: SlackEndpoint) -> None:
    """Three machines at once, twice, send one alert and one message of its end; one without the store sends its own."""
    three, now = [], datetime.now(UTC)
    away = field.fleet._replace(url=field.fleet.url.replace(PASSWORD, "wrong"))
    for machine in (*field.machines(3), field.machine("cut off", away)):
        os.environ |= machine.environment
        three.append(Settings.load())
    cut_off = three.pop()
    (field.folder / "machine-0" / "incidents.json").mkdir()  # its copy cannot be written
    trouble = CredentialsError("KIS does not know the app key (EGW00103).")
    with ThreadPoolExecutor(3) as pool:
        for _ in range(2):
            list(pool.map(lambda settings: alerts.report(settings, "KRX", trouble, now), three))
            assert len(slack.messages) == 1
        list(pool.map(lambda settings: alerts.resolved(settings, "KRX", now), three))
    assert (len(slack.messages), "KRX" in slack.headlines[0]) == (2, True)
    first, second, third = (open_document(settings, "incidents") for settings in three)
    with first.lock(wait=1), second.lock(wait=0) as taken:
        assert not taken
        field.sql("update tokencore_key set leased_until = now()")  # as after a minute, if its machine died
        with third.lock(wait=1) as over:
            assert over
            with pytest.raises(OSError, match="lock"):
                first.write({})
    for _ in range(2):
        alerts.report(cut_off, "KRX", trouble, now)
    assert len(slack.messages) == 3
    os.environ["KIS_STORE_KEYS"] = "malformed"
    for _ in range(2):
        alerts.report(Settings.load(), "NASD", trouble, now)
    assert len(slack.messages) == 4


def test_trouble_that_began_or_ended_without_the_store_is_known_when_it_is_back(
    field: Field, slack: SlackEndpoint
) -> None:
    """An outage's own alert is followed by the message of its end, and what ended in the outage is not ended again."""
    trouble, now = TokenStoreError("The fleet's store (KIS_STORE) cannot be used."), datetime.now(UTC)
    os.environ |= field.machine("one").environment
    here = Settings.load()
    os.environ["KIS_STORE"] = field.fleet.url.replace(PASSWORD, "wrong")
    away = Settings.load()
    for settings in (here, here, away):
        alerts.report(settings, "SEHK", trouble, now)
    alerts.resolved(away, "SEHK", now)
    alerts.report(away, "KRX", trouble, now)
    assert len(slack.messages) == 3
    alerts.report(here, "NASD", trouble, now)  # the next run, which knows of the trouble with KRX from then on
    alerts.report(here, "KRX", trouble, now)
    for who in ("SEHK", "KRX", "KRX"):
        alerts.resolved(here, who, now)
    assert [": solved: " in one for one in slack.headlines] == [False, True, False, False, True]
    assert [one["subject"] for one in open_document(here, "incidents").read()["incidents"]] == ["NASD"]
    os.environ |= field.machine("two").environment
    soon, later, sent = now + timedelta(minutes=1), now + timedelta(hours=3), len(slack.messages)
    for settings, at in ((Settings.load(), soon), (away, later), (here, later)):  # the reminder is sent once
        alerts.report(settings, "NASD", trouble, at)
    assert len(slack.messages) == sent + 1


def test_trouble_belongs_to_its_key_whatever_machines_call_it(field: Field, slack: SlackEndpoint) -> None:
    """Machines that name one key differently alert once; where another key has the same name, it alerts by itself."""
    trouble, sent, now = CredentialsError("KIS does not know the app key (EGW00103)."), [], datetime.now(UTC)
    for name, market, own in (("a", "", KEY), ("b", "", OTHER), ("c", "MARKETS__HK__", KEY)):
        os.environ |= field.machine(name, key=own).environment
        for one in ("APP_KEY", "APP_SECRET"):
            os.environ[f"KIS_{market}{one}"] = os.environ.pop(f"KIS_{one}")
        (key,) = Key.load(settings := Settings.load())
        if own == OTHER:  # that this one is well does not mean that the first one is
            alerts.resolved(settings, key.state(now), now)
        alerts.report(settings, key.state(now), trouble, now)
        sent.append((key.label, len(slack.messages)))
    assert sent == [("us+kr", 1), ("us+kr", 2), ("hk", 2)]


def test_a_corrected_app_key_ends_the_trouble_of_the_wrong_one(field: Field, slack: SlackEndpoint) -> None:
    """It ends when the machine that last met it is in order with another key, not when another machine is."""
    trouble, now = CredentialsError("KIS does not know the app key (EGW00103)."), datetime.now(UTC)
    made = {name: field.machine(name).environment for name in ("a", "b")}
    for name, own in (("a", KEY), ("b", OTHER), ("a", OTHER)):
        os.environ |= made[name] | {"KIS_APP_KEY": own}
        (key,) = Key.load(settings := Settings.load())
        if own == KEY:
            alerts.report(settings, key.state(now), trouble, now)
        else:
            alerts.resolved(settings, key.state(now), now)
        assert len(slack.messages) == (2 if (name, own) == ("a", OTHER) else 1)
    assert ": solved: " in slack.headlines[1]


def test_a_machine_that_reaches_prefect_ends_no_alert_of_one_that_does_not(
    field: Field, slack: SlackEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If Prefect's server refuses one machine's password, its watchdog alerts once, whatever another machine sees."""
    machines = {name: field.machine(name).environment for name in ("a", "b")}
    well = [{"state_name": "AlreadyValid", "end_time": datetime.now(UTC).isoformat()}]
    with Wire() as server:
        for name, status in (("a", 401), ("b", 200), ("a", 401)):
            monkeypatch.setattr("platform.node", lambda name=name: name)
            server.answer(status, well)
            os.environ |= machines[name] | {
                "PREFECT_API_URL": f"{server.url}/api",
                "PREFECT_API_AUTH_STRING": "a:Canary",
            }
            assert watchdog.watch(patience=0) == (status != 200)
        assert all(b"Basic YTpDYW5hcnk=" in request for request in server.requests)
    assert slack.headlines == ["Prefect (a): Prefect does not look after the tokens"]


LOST = {"fence + 1": 0, "at = clock": 0, "excluded.sealed": 1, "at = $1": 1}  # statements, and requests to KIS


def test_an_answer_of_the_store_that_is_lost_counts_as_no(field: Field, caplog: pytest.LogCaptureFixture) -> None:
    """If an answer is lost before the request, nothing is sent; later, the token is handed out and offered again."""
    with ThreadPoolExecutor(len(LOST)) as pool:
        list(pool.map(lambda one: answer_lost(field.fleet, field.folder / one, one, LOST[one]), LOST))
    until(lambda: "other machines get what KIS answered" in caplog.text)
    assert not any("other machines get" in one and "Nothing was" in one for one in caplog.messages)


def answer_lost(fleet: Fleet, folder: Path, statement: str, requests: int) -> None:
    """Break the connection after the statement was executed."""
    with Sandbox(issue_interval=MINUTE) as kis, Relay(fleet.server.port) as relay:
        first, second = Machine(fleet.behind(relay), folder / "first", kis), Machine(fleet, folder / "second", kis)
        assert first.look() == ""  # this makes the row
        relay.lose, token = statement.encode(), ""
        with contextlib.suppress(TokenStoreError):
            token = first.get()
        assert (asked(kis), bool(token)) == (requests, bool(requests)), statement
        if token:
            until(lambda: first.look() == second.look() == token)
        assert second.get() == (token or first.get()), statement
        clean(kis, 1)


def test_a_machine_without_files_knows_what_its_fleet_has(field: Field, command: Command) -> None:
    """`check` and `get --no-renew` have the fleet's token, and `refresh` declines to renew one of a few seconds ago."""
    token = field.machine("first").save(make_token())
    os.environ |= field.machine("second").environment
    ran = command("check", "us")
    assert (ran.code, "but the store has the token" in ran.out) == (0, True)
    assert command("get", "us", "--no-renew").out == f"{token}\n"
    ran = command("refresh", "us")
    assert (ran.code, "KIS returns the same token" in ran.err, asked(field.kis)) == (4, True, 0)


SERVED = (
    "import sys; from tokencore import TokenManager; print(TokenManager('us').get_valid_token());"
    "print([name for name in ('psycopg', 'cryptography') if name in sys.modules])"
)


def test_a_store_that_is_frozen_stops_nobody_with_a_valid_token(field: Field) -> None:
    """A valid token needs no store, what does need it exits 7 (a removal too), and a rejection is passed on later."""
    first, second, third, cold = field.machines(4)
    token = first.save(make_token())
    assert second.look() == third.look() == token
    field.fleet.server.send(signal.SIGSTOP)
    try:
        with ThreadPoolExecutor() as pool:
            pool.submit(second.save, make_token(text=token, rejected=True))
            removal = pool.submit(lambda: tokencore("delete", "us", **third.environment))
            get = pool.submit(lambda: tokencore("get", "us", **cold.environment))
            before = snapshot(first.folder)
            assert (tokencore("check", "us", **first.environment).code, snapshot(first.folder)) == (0, before)
            assert start(SERVED, **first.environment).communicate()[0] == f"{token}\n[]\n"
            assert (removal.result().code, get.result().code) == (7, 7)
        assert "store (KIS_STORE) cannot be used: it does not answer" in one_line(get.result())
    finally:
        field.fleet.server.send(signal.SIGCONT)
    until(lambda: {one.look() for one in (second, third, first)} == {"rejected"})
    assert asked(field.kis) == 0


ADMIN = "postgresql://admin:CanaryPassword@{host}/"
BAD = {  # the store's address, a setting with its value, or a change of the store; the exit code, a part of the error
    "no address": ("http://{host}/postgres", 2, "KIS_STORE"),
    "unknown option": (ADMIN + "postgres?ssl_mode=require", 2, "KIS_STORE"),
    "bad number": ("postgresql://admin:CanaryPassword@{host}x/postgres", 2, "KIS_STORE"),
    "no keys": ("KIS_STORE_KEYS=", 2, "KIS_STORE_KEYS is not set"),
    "keys alone": ("KIS_STORE=", 2, "KIS_STORE_KEYS is set without KIS_STORE"),
    "malformed key": ("KIS_STORE_KEYS=CanaryKey", 2, "KIS_STORE_KEYS is malformed"),
    "no comma": ("KIS_STORE_KEYS={key};" + "b" * 43 + "=", 2, "KIS_STORE_KEYS is malformed"),
    "another key": ("KIS_STORE_KEYS=" + "b" * 43 + "=", 7, "cannot be decrypted"),
    "password": ("postgresql://admin:CanaryWrong@{host}/postgres", 7, "password"),
    "database": (ADMIN + "other", 7, "no such database"),
    "database with a telling name": (ADMIN + "password-certificate", 7, "no such database"),
    "no tables": (ADMIN + "template1", 7, "fleet init"),
    "no rights": ("postgresql://poor:CanaryPassword@{host}/postgres", 7, "may not use the tables"),
    "no login": ("postgresql://barred:CanaryPassword@{host}/postgres", 7, "may not connect"),
    "certificate": (ADMIN + "postgres?sslmode=verify-ca&sslrootcert={roots}", 7, "its certificate cannot be verified"),
    "a standby": (ADMIN + "postgres?options=-cdefault_transaction_read_only%3Don", 7, "it is read-only"),
    "another version": ("update tokencore_key set sealed = '2' where key = 'layout'", 7, "another version"),
    "cut short": ("update tokencore_key set sealed = left(sealed, 200) where key <> 'layout'", 7, "decrypted"),
    "exchanged": ("update tokencore_key set sealed = '{other}' where key <> 'layout'", 7, "rows were swapped"),
}


@pytest.mark.parametrize(("change", "code", "sign"), BAD.values(), ids=BAD)
def test_a_mistake_in_the_set_up_is_one_sentence_and_nothing_is_lost(
    field: Field, command: Command, change: str, code: int, sign: str
) -> None:
    """Each mistake gets its documented exit code and a cure, without a secret; nothing is issued or overwritten."""
    for role, right in (("poor", "login"), ("barred", "nologin")):
        field.sql(f"drop role if exists {role}", f"create role {role} {right} password 'CanaryPassword'")
    field.machine("first").save(make_token(life=400, age=200))  # too close to its expiry to serve
    os.environ |= field.machine("second").environment
    other, host = Seal([field.fleet.key]).close({"key_fingerprint": "other"}), f"127.0.0.1:{field.fleet.server.port}"
    change = change.format(host=host, other=other, roots=certifi.where(), key=field.fleet.key)
    if change.startswith("update"):
        field.sql(change)
    else:
        name, _, text = change.partition("=") if change.startswith("KIS_") else ("KIS_STORE", "", change)
        os.environ[name] = text
    before = field.sql("select version, sealed from tokencore_key")
    ran = command("get", "us")
    assert (ran.code, sign in one_line(ran), "Canary" in ran.err) == (code, True, False), ran.err
    assert (command("refresh", "us").code, sign in one_line(command("refresh", "us"))) == (code, True)
    assert (asked(field.kis), field.sql("select version, sealed from tokencore_key")) == (0, before)


def test_a_lost_connection_is_not_blamed_on_its_encryption(field: Field) -> None:
    """A server or network that ends a TLS connection is named as the cause, so that another try is made."""
    with Relay(field.fleet.server.port) as relay:
        session = database.Database(field.fleet._replace(url=field.fleet.server.url()).behind(relay).url, "x")
        relay.lose = b"\x17\x03\x03"  # the start of a TLS record with data
        with pytest.raises(TokenStoreError, match="closed the connection"):
            session.read(["x"])


@pytest.mark.parametrize("package", ["psycopg", "cryptography"])
def test_without_the_extra_a_cold_machine_says_what_to_install(field: Field, package: str) -> None:
    """Without the package, it exits 2 with the command that installs it, and issues nothing; the help still works."""
    program = f"import sys; sys.modules['{package}'] = None; from tokencore.cli import main; sys.exit(main())"
    cold = field.machine("cold").environment
    get, helped = start(program, "get", "us", **cold), start(program, "--help", **cold)
    assert "pip install 'tokencore[fleet]'" in get.communicate()[1]
    assert "follow" in helped.communicate()[0]
    assert (get.returncode, helped.returncode, asked(field.kis)) == (2, 0, 0)


def test_nothing_in_the_store_reveals_a_secret_and_the_keys_are_rotated(field: Field, command: Command) -> None:
    """No secret is in a dump in any form; after a rotation the newest key alone decrypts all, over verified TLS."""
    first, server, older = field.machine("first"), field.fleet.server, field.fleet.key
    token = first.get()
    assert [one.outcome for one in first.store.attempts()] == ["issued"]  # by now it is in the store
    os.environ |= first.environment
    with (document := open_document(Settings.load(), "incidents")).lock(wait=1):
        document.write({"operator": "CanaryName"})
    dump = field.sql("select * from tokencore_key", "select * from tokencore_attempt").encode()
    assert b"issued" in dump
    assert [text for text in (KEY, SECRET, token, "CanaryName") if any(form in dump for form in forms(text))] == []
    url = server.url().replace("127.0.0.1", "localhost") + f"?sslmode=verify-full&sslrootcert={server.certificate}"
    newer = field.fleet._replace(url=url, key=Fernet.generate_key().decode())
    os.environ["KIS_STORE_KEYS"] = f"{newer.key},{older}"
    assert command("fleet", "rotate").code == 0
    assert field.machine("new", newer).get() == token
    os.environ["KIS_STORE_KEYS"] = older
    ran = command("fleet", "rotate")
    assert (ran.code, "cannot be decrypted" in ran.err) == (7, True)


def test_the_printed_role_is_enough_and_may_no_more(field: Field, command: Command) -> None:
    """`fleet init` may run twice, and prints no key once there are tokens; its role can renew, and no more."""
    role = f"app{os.getpid()}"
    os.environ["KIS_STORE"] = field.fleet.url
    assert command("fleet", "init", "--role", "x SUPERUSER; --").code == 2
    ran = [command("fleet", "init", "--role", role) for _ in range(2)][1]
    assert (ran.code, "KIS_STORE_KEYS=" in ran.out) == (0, True)
    assert 'CREATE ROLE "user" LOGIN' in command("fleet", "init", "--role", "user").out  # a word of SQL
    field.sql(ran.out, f"alter role {role} password 'CanaryPassword'")
    lesser = field.fleet._replace(url=field.fleet.server.url(role=role))
    assert field.machine("one", lesser).get()
    again = command("fleet", "init")
    assert ("in use" in again.out, "KIS_STORE_KEYS=" in again.out) == (True, False)
    os.environ["KIS_STORE"] = lesser.url
    lacking = command("fleet", "init")
    assert (lacking.code, "tables cannot be created" in one_line(lacking)) == (7, True)
    for wish in ("delete from", "truncate", "drop table"):
        with pytest.raises(TokenStoreError, match="may not use"), database.Database(lesser.url, "x") as session:
            session.execute(f"{wish} tokencore_key")


def test_the_doctor_says_what_a_store_lacks(field: Field, command: Command) -> None:
    """Reach, encryption, role, clock, keys and follower get a line each, with a fix, and looking makes no folder."""
    field.machine("first").get()
    os.environ |= field.machine("second").environment | {"KIS_TOKEN_DIR": str(field.folder / "none")}
    os.environ["KIS_STORE_KEYS"] = f"{Fernet.generate_key().decode()},{field.fleet.key}"
    found = {one["name"]: one for one in json.loads(command("doctor", "--json").out)}
    states = {name: found[f"store {name}"]["state"] for name in ("encryption", "role", "clock", "keys", "follower")}
    assert (found["store"]["state"], states.pop("clock"), set(states.values())) == ("ok", "ok", {"warn"})
    assert ("fleet rotate" in found["store keys"]["cure"], (field.folder / "none").exists()) == (True, False)
    field.sql("drop role if exists reader", f"create role reader login password '{PASSWORD}'")
    field.sql("grant select on tokencore_key, tokencore_attempt to reader")
    standby = f"{field.fleet.url}&options=-cdefault_transaction_read_only%3Don"
    reader, wrong = (field.fleet.url.replace(*one) for one in (("admin", "reader"), (PASSWORD, "wrong")))
    for address, sign in ((reader, "may not use the tables"), (standby, "it is read-only"), (wrong, "password")):
        os.environ["KIS_STORE"] = address
        found = {one["name"]: one for one in json.loads(command("doctor", "--json").out)}
        assert (found["store"]["state"], sign in found["store"]["detail"]) == ("fail", True)


@pytest.mark.skipif(not FULL, reason="takes minutes: make torture")
def test_whatever_chance_does_there_is_one_token_and_no_refusal(tmp_path: Path) -> None:
    """Each of 200 rounds of random kills, stops, server crashes and freezes costs KIS one token without a refusal."""
    with Postgres("max_connections=16") as server:
        fleet = Fleet.made(server)
        for first in range(0, 200, 8):
            seeds = range(first, first + 8)
            with ThreadPoolExecutor(9) as pool:
                trouble = pool.submit(befall, server, random.Random(first))
                list(pool.map(lambda seed: play(fleet, tmp_path / str(seed), random.Random(seed)), seeds))
                trouble.result()


def befall(server: Postgres, chance: random.Random) -> None:
    """Do to the server what a round brings: nothing, a crash, or a freeze."""
    time.sleep(chance.uniform(0, 1.5))
    match chance.choice(("nothing", "crash", "freeze")):
        case "crash":
            server.stop(signal.SIGQUIT)
            time.sleep(chance.uniform(0, 2))
            server.start()
        case "freeze":
            server.send(signal.SIGSTOP)
            time.sleep(chance.uniform(0.2, 4))
            server.send(signal.SIGCONT)


def play(fleet: Fleet, folder: Path, chance: random.Random) -> None:
    """Play a round: two programs on each of four machines want a first token, and in the end all have the same one."""
    with Sandbox(issue_interval=1, latency=chance.uniform(0, 0.4)) as kis:
        key = f"{folder.name:X<36}"  # a round's KIS may reuse an earlier one's port
        machines = [Machine(fleet, folder / str(number), kis, key=key, issue_interval=1) for number in range(4)]
        with ThreadPoolExecutor(8) as pool:
            seeds = [chance.random() for _ in range(8)]
            list(pool.map(lambda n: live(machines[n % 4], random.Random(seeds[n])), range(8)))
        while {ended(machine.start()) for machine in machines} != {0}:  # while the store is down, they fail
            pass
        stats = kis.stats()
        assert len({machine.got for machine in machines}) == 1
        assert (stats["granted_new"], stats["refused"]) == (1, {}), folder.name  # the seed


def live(machine: Machine, chance: random.Random) -> None:
    """Run a program that may be killed, or stopped for a second at most, as it may hold the right to send."""
    time.sleep(chance.uniform(0, 0.3))
    child = machine.start()
    if fate := chance.choice((0, 0, 0, signal.SIGKILL, signal.SIGSTOP)):
        time.sleep(chance.uniform(0, 1))
        os.kill(child, fate)
    while os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1]):
        time.sleep(chance.uniform(0.1, 1))
        os.kill(child, signal.SIGCONT)
