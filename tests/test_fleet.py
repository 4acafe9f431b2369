"""Machines that share a key through PostgreSQL: one request a day, whatever befalls them, the store and the network."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import time_machine
from builders import DAY, KEY, NOW, SECRET, ended, forms, in_child, make_token
from cryptography.fernet import Fernet
from fleets import MINUTE, Fleet, Machine, Relay, certificate
from postgres import PASSWORD, USER, needs_postgres
from running import asked, one_line, snapshot, start, tokencore, until

from tokencore import TokenStoreError
from tokencore.attempts import Attempt, Outcome
from tokencore.sandbox import Sandbox
from tokencore.stores import database, open_document
from tokencore.stores.encryption import Seal
from tokencore.stores.file_store import FileStore

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from running import Ran

    from tokencore.stores.base import Document
    from tokencore.tokens import Token

    Command = Callable[..., Ran]

SENT = Attempt(NOW, Outcome.SENT, reason="get us", credentials="0123abcd", pid=7)

pytestmark = needs_postgres


@pytest.fixture
def kis() -> Iterator[Sandbox]:
    """KIS with a minute of half a second, and a tenth of a second to issue."""
    with Sandbox(issue_interval=MINUTE, latency=0.1) as running:
        yield running


def machines(fleet: Fleet, folder: Path, kis: Sandbox, count: int, **numbers: Any) -> list[Machine]:  # noqa: ANN401 - fields of the settings
    """So many machines with nothing on them."""
    return [Machine(fleet, folder / f"machine-{number}", kis, **numbers) for number in range(count)]


def clean(kis: Sandbox, requests: int) -> None:
    """KIS was asked so often, refused nothing, and issued one token."""
    stats = kis.stats()
    assert (stats["token_requests"], stats["granted_new"], stats["refused"]) == (requests, 1, {})


@pytest.mark.parametrize("interval", [MINUTE, 0])
def test_eight_cold_machines_make_one_request(fleet: Fleet, tmp_path: Path, kis: Sandbox, interval: float) -> None:
    """Two processes on each; all get its token, each machine has it, also where no minute is kept between requests."""
    fleet_of = machines(fleet, tmp_path, kis, 8, issue_interval=interval)
    kis.set_rules(issue_interval=60)
    children = [machine.start() for machine in fleet_of for _ in range(2)]
    assert [ended(child) for child in children] == [0] * 16, list(tmp_path.glob("*/error"))
    assert {machine.got for machine in fleet_of} == {fleet_of[0].got} != {""}
    assert all(machine.store.saved(token) for machine in fleet_of if (token := fleet_of[0].store.read()[0]))
    clean(kis, 1)


def test_of_two_that_have_looked_one_begins_and_the_last_that_began_may_send(
    fleet: Fleet, tmp_path: Path, kis: Sandbox
) -> None:
    """Whose look is older than another's attempt looks again; whose attempt is older than another's sends nothing."""
    first, second = machines(fleet, tmp_path, kis, 2)
    with first.store.lock(wait=5), second.store.lock(wait=5):
        begun = first.store.begin(SENT)
        assert begun
        assert second.store.begin(SENT) is None
        assert first.store.depart(begun)
        fleet.server.sql("update tokencore_attempt set at = now() - interval '1 hour'")
        assert second.store.begin(SENT) is None
        assert second.store.begin(SENT)
        assert not first.store.depart(begun)


def test_a_fork_does_not_speak_on_its_parents_connection(fleet: Fleet, tmp_path: Path, kis: Sandbox) -> None:
    """A child that looks and ends while its parent is between two statements leaves it its connection."""
    first, second = machines(fleet, tmp_path, kis, 2)
    with first.store.lock(wait=5):
        assert ended(in_child(lambda: (look(second), first.store.attempts()))) == 0
        fence = first.store.begin(SENT)
        assert fence
        assert first.store.depart(fence)


class Fate(NamedTuple):
    """What befalls a machine at a point of its renewal, and how many requests that makes."""

    at: str
    fault: int  # a signal; 0: it loses the store
    requests: int


FATES = [
    Fate("begun", signal.SIGKILL, 1),
    Fate("departed", signal.SIGKILL, 1),
    Fate("answered", signal.SIGKILL, 2),
    Fate("begun", signal.SIGSTOP, 1),
    Fate("answered", signal.SIGSTOP, 2),
    Fate("begun", 0, 1),
    Fate("departed", 0, 2),
    Fate("answered", 0, 2),
]


def test_whatever_befalls_the_machine_that_renews_the_others_get_the_same_token(fleet: Fleet, tmp_path: Path) -> None:
    """Killed, stopped past its time, or cut off, before its request, amid it, or before its token is saved.

    A second request is made where nobody can know of the first one's answer, after KIS's minute; it brings the same
    token. One that was stopped takes the others' token when it goes on; nothing is refused.
    """
    with ThreadPoolExecutor(len(FATES)) as pool:
        list(pool.map(lambda number: outlive(fleet, tmp_path / str(number), FATES[number]), range(len(FATES))))


def outlive(fleet: Fleet, folder: Path, fate: Fate) -> None:
    """Three machines, one of which meets its fate."""
    with Sandbox(issue_interval=MINUTE) as kis, Relay(fleet.server.port) as relay:
        victim = Machine(fleet.behind(relay), folder / "victim", kis)
        child = victim.start(fate.at, fate.fault)
        if fate.fault:
            status = os.waitpid(child, os.WUNTRACED)[1]
            assert os.WIFSTOPPED(status) or os.WIFSIGNALED(status)
        else:
            until((victim.folder / "reached").exists)
            relay.freeze()
            (victim.folder / "go").touch()
        others = machines(fleet, folder, kis, 2)
        assert [ended(one) for one in [other.start() for other in others]] == [0, 0], fate
        if fate.fault == signal.SIGSTOP:
            os.kill(child, signal.SIGCONT)
        if fate.fault != signal.SIGKILL:
            code = ended(child)
            assert (code, victim.got) == ((0, others[0].got) if fate.fault or fate.at != "begun" else (1, "")), fate
        assert {other.got for other in others} == {others[0].got} != {""}
        clean(kis, fate.requests)


# --- what another machine does


def test_a_rejected_removed_or_imported_token_is_so_on_every_machine(
    fleet: Fleet, tmp_path: Path, kis: Sandbox
) -> None:
    """With the next look of each, at the latest; nobody brings back what a person took away."""
    first, second = machines(fleet, tmp_path, kis, 2)
    token = stored(first, make_token())
    assert look(second) == (token.access_token, None)
    token.rejected_at = datetime.now(UTC)
    stored(first, token)
    assert look(second)[1] is not None
    again = stored(second, make_token(text=token.access_token))  # proven to work again
    assert look(first) == (again.access_token, None)
    shorter = stored(second, make_token(life=3600))  # a person insists
    assert look(first) == (shorter.access_token, None)
    with first.store.lock(wait=5):
        assert first.store.delete()
    assert look(second) == ("", None)


def test_what_only_one_machine_has_is_offered_and_the_later_expiry_wins(
    fleet: Fleet, tmp_path: Path, kis: Sandbox
) -> None:
    """A machine that joins brings its token and its record; so does one whose store was away meanwhile.

    A server that takes over and is behind gets back what it has lost.
    """
    first, second = machines(fleet, tmp_path, kis, 2)
    alone = FileStore(first.market, lambda: ["us"])
    with alone.lock(wait=5):
        alone.finish(alone.begin(SENT), SENT._replace(outcome=Outcome.ISSUED), make_token(life=3600))
    assert look(first) == look(second) != ("", None)
    assert [one.outcome for one in second.store.attempts()] == ["issued"]
    before = fleet.server.sql("select version, fence, sealed from tokencore_key where key <> 'layout'").split("|")
    later = stored(first, make_token())
    with first.store.lock(wait=5):
        first.store.note(SENT._replace(at=NOW + DAY, outcome=Outcome.IMPORTED))
    fleet.server.sql(
        "update tokencore_key set version = {}, fence = {}, sealed = '{}' where fence > 0".format(*before),  # noqa: S608
        "delete from tokencore_attempt where fence > 1",
    )
    assert look(first) == look(second) == (later.access_token, None)
    assert [(one.outcome, bool(one.host)) for one in second.store.attempts()] == [("issued", True), ("imported", True)]
    assert not any(one.host for one in first.store.attempts())


@pytest.mark.parametrize("hours", [1, -1])
def test_the_limits_go_by_the_servers_clock(fleet: Fleet, tmp_path: Path, kis: Sandbox, hours: int) -> None:
    """A machine whose clock is an hour wrong knows how long ago another one's attempt was, and dates its own right."""
    first, second = machines(fleet, tmp_path, kis, 2, issue_interval=60)
    attempt(first, datetime.now(UTC))
    with time_machine.travel(datetime.now(UTC) + timedelta(hours=hours)):
        (seen,) = second.store.attempts()
        assert abs(datetime.now(UTC) - seen.at) < timedelta(minutes=1)
        attempt(second, datetime.now(UTC))
    assert all(abs(datetime.now(UTC) - one.at) < timedelta(minutes=1) for one in first.store.attempts())


def test_a_later_versions_words_are_understood_as_far_as_they_go(fleet: Fleet, tmp_path: Path, kis: Sandbox) -> None:
    """Two versions of tokencore at once: an unknown outcome is an attempt, an unknown field is passed over."""
    first, second = machines(fleet, tmp_path, kis, 2)
    token = stored(first, make_token())
    with first.store.lock(wait=5):
        first.store.note(SENT)
    fleet.server.sql('update tokencore_attempt set what = replace(what, \'"sent"\', \'"thawed", "colour": 3\')')
    seal = Seal([fleet.key])
    (sealed,) = fleet.server.sql("select sealed from tokencore_key where key <> 'layout'").split("|")
    content = seal.open(sealed, {"key_fingerprint": first.store.fingerprint})
    later = seal.close({**content, "colour": 3})
    fleet.server.sql(f"update tokencore_key set sealed = '{later}' where fence > 0")  # noqa: S608 - of our own making
    assert look(second) == (token.access_token, None)
    assert [one.outcome for one in second.store.attempts()] == [Outcome.SENT]


@pytest.mark.parametrize("at", ["infinity", "-infinity", "9999-12-31", "200000-01-01"])
def test_a_time_that_cannot_be_stops_nobody(fleet: Fleet, tmp_path: Path, kis: Sandbox, at: str) -> None:
    """The database role can write any time into an attempt or a lease; who reads it gets the token and the lock."""
    first, second = machines(fleet, tmp_path, kis, 2)
    token = stored(first, make_token())
    attempt(first, datetime.now(UTC))
    document = open_document(SimpleNamespace(**fleet.numbers(tmp_path / "third")), "incidents")  # type: ignore[arg-type]
    assert kept(document) == {}
    fleet.server.sql(f"update tokencore_attempt set at = '{at}'", f"update tokencore_key set leased_until = '{at}'")  # noqa: S608 - of our own making
    assert (look(second), second.store.attempts()) == ((token.access_token, None), [])
    assert kept(document) == {}


BOT = """
import time
from tokencore import TokenManager
manager = TokenManager("us")
while True:
    manager.get_valid_token()
    time.sleep(0.1)
"""


def test_a_machine_follows_what_the_others_do(fleet: Fleet, tmp_path: Path, kis: Sandbox) -> None:
    """By `tokencore follow`, where notifications come through and where a pooler swallows them, and by a bot itself.

    Another process takes over from a follower that is killed.
    """
    with Relay(fleet.server.port, notifies=False) as relay, contextlib.ExitStack() as running:
        first, listening, polling, bot = machines(fleet, tmp_path, kis, 4)
        token = first.get()
        own = {"KIS_APP_KEY": KEY, "KIS_APP_SECRET": SECRET, "KIS_BASE_URL": kis.url}

        def started(program: str, machine: Machine, of: Fleet = fleet) -> subprocess.Popen[str]:
            process = start(program, **own, **of.environment(machine.folder))
            running.callback(lambda: print(process.communicate()))
            running.callback(process.kill)
            return process

        follower = started(FOLLOW, listening)
        started(FOLLOW, polling, fleet.behind(relay))
        started(BOT, bot)
        until(lambda: all(here(one) == (token, None) for one in (listening, polling, bot)))
        started(FOLLOW, listening)  # stands by
        renewed = stored(first, make_token(life=90_000))
        until(lambda: all(here(one) == (renewed.access_token, None) for one in (listening, polling, bot)))
        follower.kill()
        renewed.rejected_at = datetime.now(UTC)
        stored(first, renewed)
        until(lambda: all(here(one)[1] is not None for one in (listening, polling, bot)))


OTHER = KEY[::-1]  # another key
FOLLOW = "from tokencore.cli import main; main(['follow'])"


def test_an_entry_that_cannot_be_decrypted_is_left_alone_and_the_others_followed(
    fleet: Fleet, tmp_path: Path, kis: Sandbox
) -> None:
    """A follower says so once, and keeps its connection; the key's files stay as they are."""
    first, second = (Machine(fleet, tmp_path / name, kis, key=key) for name, key in (("first", KEY), ("second", OTHER)))
    token, folder = first.get(), tmp_path / "following"
    own = {"KIS_APP_SECRET": SECRET, "KIS_MARKETS__HK__APP_KEY": OTHER, "KIS_MARKETS__HK__EXCHANGES": "SEHK"}
    files = [folder / f"key-{one.store.fingerprint}.json" for one in (first, second)]
    following = start(FOLLOW, KIS_APP_KEY=KEY, KIS_BASE_URL=kis.url, **own, **fleet.environment(folder))
    try:
        until(files[0].exists)
        damaged = "update tokencore_key set sealed = 'x', version = version + 1 where key ="
        fleet.server.sql(f"{damaged} '{first.store.name}'", f"notify tokencore, '{first.store.name}'")
        second.get()
        until(files[1].exists)
    finally:
        following.kill()
        said = following.communicate()[1]
    assert (said.count("cannot be decrypted"), said.count("goes on trying")) == (1, 0), said
    assert token in files[0].read_text()


def test_a_document_is_locked_for_all_machines_for_a_minute(fleet: Fleet, tmp_path: Path) -> None:
    """One machine at a time; who held it for longer than its lease changes nothing any more.

    Where the store cannot be used, a machine goes by what it has itself.
    """
    stores = {"first": fleet, "second": fleet, "third": fleet._replace(url=fleet.url.replace(PASSWORD, "wrong"))}
    three: list[Any] = [SimpleNamespace(**store.numbers(tmp_path / name)) for name, store in stores.items()]
    first, second, third = (open_document(settings, "incidents") for settings in three)
    with first.lock(wait=1) as held:
        assert held
        first.write({"incidents": [1]})
        with second.lock(wait=0) as taken:
            assert not taken
        fleet.server.sql("update tokencore_key set leased_until = now() where leased_until > now()")
        with second.lock(wait=1) as over:
            assert (over, second.read()) == (True, {"incidents": [1]})
            second.write({"incidents": [1, 2]})
            with pytest.raises(OSError, match="lock"):
                first.write({"incidents": []})
    assert first.read() == second.read() == {"incidents": [1, 2]}
    assert (kept(second), kept(third)) == ({"incidents": [1, 2]}, {})


def kept(document: Document) -> dict[str, object]:
    """What it has under its lock."""
    with document.lock(wait=1) as held:
        assert held
        document.write(document.read())
        return document.read()


def here(machine: Machine) -> tuple[str, datetime | None]:
    """The token in the machine's files, and since when it is known to be rejected."""
    token = FileStore(machine.market, tuple).read()[0]
    return (token.access_token, token.rejected_at) if token else ("", None)


# --- the store is away, slow, or not what it should be


def test_an_answer_of_the_store_that_is_lost_counts_as_no(
    fleet: Fleet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of `begin` and `depart`: nothing is sent. Of what follows the request: its token is handed out and offered.

    Nobody is told then that nothing was issued.
    """
    statements = {"fence + 1": 0, "at = clock": 0, "sealed = $1": 1, "at = $1": 1}
    with ThreadPoolExecutor(len(statements)) as pool:
        list(pool.map(lambda one: answer_lost(fleet, tmp_path / one, one, statements[one]), statements))
    until(lambda: "other machines get what KIS answered" in caplog.text)
    assert not any("other machines get" in one and "Nothing was" in one for one in caplog.messages)


def answer_lost(fleet: Fleet, folder: Path, statement: str, requests: int) -> None:
    """The connection breaks after the statement was carried out; so many requests are made."""
    with Sandbox(issue_interval=MINUTE) as kis, Relay(fleet.server.port) as relay:
        first = Machine(fleet.behind(relay), folder / "first", kis)
        assert look(first) == ("", None)  # the row is there
        relay.lose(statement.encode())
        token = ""
        with contextlib.suppress(TokenStoreError):
            token = first.get()
        assert (asked(kis), bool(token)) == (requests, bool(requests)), statement
        (second,) = machines(fleet, folder, kis, 1)
        if token:
            until(lambda: look(first)[0] == look(second)[0] == token)
        assert second.get() == (token or first.get()), statement
        clean(kis, 1)


def test_a_store_that_is_frozen_stops_nobody_with_a_valid_token(fleet: Fleet, tmp_path: Path, kis: Sandbox) -> None:
    """A command with a token needs neither store nor its packages; one without is refused, exit 7.

    `check` writes nothing. A rejection is noted here and reaches the others when the store is back; a removal would not
    last, and is refused.
    """
    first, second, third = machines(fleet, tmp_path, kis, 3)
    token = stored(first, make_token())
    assert look(second) == look(third) == (token.access_token, None)
    settings = {"KIS_APP_KEY": KEY, "KIS_APP_SECRET": SECRET, "KIS_BASE_URL": kis.url}
    own, places = {**settings, **fleet.environment(first.folder)}, (third.folder, tmp_path / "cold")
    token.rejected_at = datetime.now(UTC)
    fleet.server.freeze()
    try:
        with ThreadPoolExecutor() as pool:
            pool.submit(stored, second, token)
            refused = [
                pool.submit(tokencore, *what, **{**settings, **fleet.environment(place)})
                for what, place in zip((("delete", "us"), ("get", "us")), places, strict=True)
            ]
            before = snapshot(first.folder)
            assert tokencore("check", "us", **own).code == 0
            assert snapshot(first.folder) == before
            assert start(SERVED, **own).communicate()[0] == f"{token.access_token}\n[]\n"
            assert [one.result().code for one in refused] == [7, 7]
        assert "store (KIS_STORE) cannot be used: it does not answer" in one_line(refused[1].result())
    finally:
        fleet.server.thaw()
    until(lambda: all(look(one)[1] is not None for one in (second, third, first)))
    assert asked(kis) == 0


SERVED = (
    "import sys; from tokencore import TokenManager; print(TokenManager('us').get_valid_token());"
    "print([name for name in ('psycopg', 'cryptography') if name in sys.modules])"
)
ADMIN = "postgresql://admin:CanaryPassword@{host}"
BAD = {
    "no address": ({"KIS_STORE": "http://{host}/postgres"}, 2, "KIS_STORE"),
    "unknown option": ({"KIS_STORE": ADMIN + "/postgres?ssl_mode=require"}, 2, "KIS_STORE"),
    "bad number": ({"KIS_STORE": ADMIN + "x/postgres"}, 2, "KIS_STORE"),
    "no keys": ({"KIS_STORE_KEYS": ""}, 2, "KIS_STORE_KEYS is not set"),
    "keys alone": ({"KIS_STORE": ""}, 2, "KIS_STORE_KEYS is set without KIS_STORE"),
    "malformed key": ({"KIS_STORE_KEYS": "CanaryKey"}, 2, "KIS_STORE_KEYS is malformed"),
    "another key": ({"KIS_STORE_KEYS": "b" * 43 + "="}, 7, "cannot be decrypted"),
    "password": ({"KIS_STORE": "postgresql://admin:CanaryWrong@{host}/postgres"}, 7, "password"),
    "role": ({"KIS_STORE": "postgresql://nobody:CanaryPassword@{host}/postgres"}, 7, "password"),
    "database": ({"KIS_STORE": ADMIN + "/other"}, 7, "no such database"),
    "no tables": ({"KIS_STORE": ADMIN + "/template1"}, 7, "fleet init"),
    "no rights": ({"KIS_STORE": "postgresql://poor:CanaryPassword@{host}/postgres"}, 7, "may not use the tables"),
    "no encryption": ({"KIS_STORE": ADMIN + "/postgres?sslmode=require"}, 7, "sslmode"),
    "a standby": (
        {"KIS_STORE": ADMIN + "/postgres?options=-cdefault_transaction_read_only%3Don"},
        7,
        "takes no changes",
    ),
    "another version": ("update tokencore_key set sealed = '2' where key = 'layout'", 7, "another version"),
    "cut short": (
        "update tokencore_key set sealed = left(sealed, 200) where key <> 'layout'",
        7,
        "cannot be decrypted",
    ),
    "exchanged": ("update tokencore_key set sealed = '{other}' where key <> 'layout'", 7, "rows were exchanged"),
}


@pytest.mark.parametrize(("change", "code", "sign"), BAD.values(), ids=BAD)
def test_a_mistake_in_the_set_up_is_one_sentence_and_nothing_is_lost(
    fleet: Fleet, tmp_path: Path, kis: Sandbox, command: Command, change: dict[str, str] | str, code: int, sign: str
) -> None:
    """Whatever is wrong: the documented exit code, what to correct, no secret; nothing issued, nothing overwritten."""
    fleet.server.sql("drop role if exists poor", "create role poor login password 'CanaryPassword'")
    stored(Machine(fleet, tmp_path / "first", kis), make_token(life=400, age=200))  # it serves nobody any more
    settings = {"KIS_APP_KEY": KEY, "KIS_APP_SECRET": SECRET, "KIS_BASE_URL": kis.url}
    settings |= fleet.environment(tmp_path / "second")
    if isinstance(change, str):
        fleet.server.sql(change.format(other=Seal([fleet.key]).close({"key_fingerprint": "other"})))
    else:
        settings |= {name: text.format(host=f"127.0.0.1:{fleet.server.port}") for name, text in change.items()}
    os.environ |= settings
    before = fleet.server.sql("select version, sealed from tokencore_key")
    ran = command("get", "us")
    assert (ran.code, sign in one_line(ran), "Canary" in ran.err) == (code, True, False), ran.err
    assert (asked(kis), fleet.server.sql("select version, sealed from tokencore_key")) == (0, before)


def test_what_is_wrong_with_the_store_is_not_forgotten_when_the_last_try_is_cut_short() -> None:
    """A server that closes the first connection and lets the second one wait is said to close, not to hang."""

    def close_the_first() -> None:
        server.accept()[0].close()

    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        pool.submit(close_the_first)
        with pytest.raises(TokenStoreError, match="closed the connection"):
            database.Database(f"postgresql://app@127.0.0.1:{server.getsockname()[1]}/x", "here").open(1)


@pytest.mark.parametrize("package", ["psycopg", "cryptography"])
def test_without_the_extra_a_cold_machine_says_what_to_install(
    fleet: Fleet, tmp_path: Path, kis: Sandbox, package: str
) -> None:
    """Exit 2 and the command that brings the package, and nothing is issued; the help does not need it."""
    program = (
        f"import sys; sys.modules['{package}'] = None; from tokencore.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    settings = {"KIS_APP_KEY": KEY, "KIS_APP_SECRET": SECRET, "KIS_BASE_URL": kis.url, **fleet.environment(tmp_path)}
    process = start(program, "get", "us", **settings)
    assert "pip install 'tokencore[fleet]'" in process.communicate()[1]
    assert (process.returncode, asked(kis)) == (2, 0)
    process = start(program, "--help", **settings)
    assert ("follow" in process.communicate()[0], process.returncode) == (True, 0)


def test_a_certificate_of_somebody_else_ends_the_connection(fleet: Fleet, tmp_path: Path, kis: Sandbox) -> None:
    """With verify-full only the server is spoken to whose certificate the file vouches for."""
    place = certificate(fleet.server.folder)
    for path in (place, place.with_suffix(".key")):
        shutil.chown(path, USER) if USER else None
    (strange := tmp_path / "strange").mkdir()
    encrypted = ("ssl_cert_file = '" + str(place), "ssl_key_file = '" + str(place.with_suffix(".key")), "ssl = 'on")
    fleet.server.sql(*[f"alter system set {one}'" for one in encrypted], "select pg_reload_conf()")
    try:
        url = fleet.url.replace("127.0.0.1", "localhost") + "?sslmode=verify-full&sslrootcert="
        good, bad = (fleet._replace(url=f"{url}{path}") for path in (place, certificate(strange)))
        until(lambda: fleet.server.sql("show ssl") == "on")
        assert Machine(good, tmp_path / "good", kis).get()
        with pytest.raises(TokenStoreError, match="its certificate cannot be verified"):
            Machine(bad, tmp_path / "bad", kis).get()
    finally:
        fleet.server.sql("alter system reset all", "select pg_reload_conf()")
    assert asked(kis) == 1


# --- what lies in the store


def test_nothing_in_the_store_reveals_a_secret_and_the_keys_are_rotated(
    fleet: Fleet, tmp_path: Path, kis: Sandbox, command: Command
) -> None:
    """No form of key, secret or token is in a dump; after `fleet rotate` the newest key alone opens everything."""
    (first,) = machines(fleet, tmp_path, kis, 1)
    token = first.get()
    assert [one.outcome for one in first.store.attempts()] == ["issued"]  # it is published by then
    document = first.store.document("approval")
    with document.lock(wait=1):
        document.write({"approval_key": "CanaryApproval"})
    dump = fleet.server.sql("select * from tokencore_key", "select * from tokencore_attempt").encode()
    assert b"issued" in dump
    secrets = (KEY, SECRET, token, "CanaryApproval")
    assert [text for text in secrets if any(form in dump for form in forms(text))] == []
    newer = fleet._replace(key=Fernet.generate_key().decode())
    os.environ |= newer._replace(key=f"{newer.key},{fleet.key}").environment(tmp_path / "other")
    assert command("fleet", "rotate").code == 0
    assert Machine(newer, tmp_path / "new", kis).get() == token
    os.environ["KIS_STORE_KEYS"] = fleet.key
    ran = command("fleet", "rotate")
    assert (ran.code, "cannot be decrypted" in ran.err) == (7, True)


def test_the_printed_role_is_enough_and_may_no_more(
    fleet: Fleet, tmp_path: Path, kis: Sandbox, command: Command
) -> None:
    """`fleet init` twice is once; its SQL makes a role that renews, and can neither delete nor truncate.

    Where tokens are sealed already it prints no other key, and to that role it says who has to run it.
    """
    role = f"app{os.getpid()}"
    os.environ["KIS_STORE"] = fleet.url
    assert command("fleet", "init", "--role", role).code == 0
    ran = command("fleet", "init", "--role", role)
    assert (ran.code, "KIS_STORE_KEYS=" in ran.out) == (0, True)
    fleet.server.sql(ran.out, f"alter role {role} password 'CanaryPassword'")
    lesser = fleet._replace(url=fleet.server.url(role=role))
    assert Machine(lesser, tmp_path / "one", kis).get()
    again = command("fleet", "init")
    assert ("in use" in again.out, "KIS_STORE_KEYS=" in again.out) == (True, False)
    os.environ["KIS_STORE"] = lesser.url
    lacking = command("fleet", "init")
    assert (lacking.code, "tables cannot be made" in one_line(lacking)) == (7, True)
    for wish in ("delete from", "truncate", "drop table"):
        with pytest.raises(TokenStoreError, match="may not use"), database.Database(lesser.url, "x").open() as session:
            session.execute(f"{wish} tokencore_key")


def test_the_doctor_says_what_a_store_lacks(fleet: Fleet, tmp_path: Path, kis: Sandbox, command: Command) -> None:
    """Reach, encryption, role, clock, keys and follower: a line each, with the fix; a store away is a failure."""
    Machine(fleet, tmp_path / "first", kis).get()
    older = fleet._replace(key=f"{Fernet.generate_key().decode()},{fleet.key}")
    os.environ |= {"KIS_APP_KEY": KEY, "KIS_APP_SECRET": SECRET, "KIS_BASE_URL": kis.url}
    os.environ |= older.environment(tmp_path / "second")
    found = {one["name"]: one for one in json.loads(command("doctor", "--json").out)}
    states = {name: found[f"store {name}"]["state"] for name in ("encryption", "role", "clock", "keys", "follower")}
    assert (found["store"]["state"], states.pop("clock"), set(states.values())) == ("ok", "ok", {"warn"})
    assert "fleet rotate" in found["store keys"]["cure"]
    os.environ["KIS_STORE"] = fleet.url.replace(PASSWORD, "wrong")
    found = {one["name"]: one for one in json.loads(command("doctor", "--json").out)}
    assert (found["store"]["state"], "password" in found["store"]["detail"]) == ("fail", True)


# --- helpers


def look(machine: Machine) -> tuple[str, datetime | None]:
    """The machine's token after its next look into the store, and since when it is known to be rejected."""
    with machine.store.lock(wait=5):
        pass
    token = machine.store.read()[0]
    return (token.access_token, token.rejected_at) if token else ("", None)


def stored(machine: Machine, token: Token) -> Token:
    """Save it there."""
    with machine.store.lock(wait=5):
        machine.store.save(token)
    return token


def attempt(machine: Machine, at: datetime) -> None:
    """An attempt of that time, refused by KIS."""
    with machine.store.lock(wait=0):
        fence = machine.store.begin(SENT._replace(at=at))
        assert fence
        machine.store.finish(fence, SENT._replace(at=at, outcome=Outcome.LIMIT))
