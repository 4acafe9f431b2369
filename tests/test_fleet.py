"""Machines that share a key through PostgreSQL: one request a day, whatever befalls them, the store and the network."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import time_machine
from builders import DAY, KEY, NOW, SECRET, ended, forms, in_child, make_token
from cryptography.fernet import Fernet
from fleets import MINUTE, Fleet, Machine, Relay
from postgres import PASSWORD, needs_postgres, own
from running import asked, one_line, snapshot, start, tokencore, until

from tokencore import TokenStoreError
from tokencore.attempts import Attempt, Outcome
from tokencore.sandbox import Sandbox
from tokencore.stores import database, open_document
from tokencore.stores.encryption import Seal
from tokencore.stores.file_store import FileStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from running import Ran

    from tokencore.stores.base import Document
    from tokencore.tokens import Token

    Command = Callable[..., Ran]

SENT = Attempt(NOW, Outcome.SENT, reason="get us", credentials="0123abcd", pid=7)
OTHER = KEY[::-1]  # another key

pytestmark = needs_postgres


class Field(NamedTuple):
    """An empty fleet, KIS with a minute of half a second and a tenth of a second to issue, and a folder."""

    fleet: Fleet
    kis: Sandbox
    folder: Path

    def machine(self, name: str, fleet: Fleet | None = None, **numbers: Any) -> Machine:  # noqa: ANN401 - fields of the settings
        """A machine with nothing on it; of another fleet, where one is given."""
        return Machine(fleet or self.fleet, self.folder / name, self.kis, **numbers)

    def machines(self, count: int, **numbers: Any) -> list[Machine]:  # noqa: ANN401 - the same
        """So many of them."""
        return [self.machine(f"machine-{number}", **numbers) for number in range(count)]

    def sql(self, *statements: str) -> str:
        """What the statements print."""
        return self.fleet.server.sql(*statements)


@pytest.fixture
def field(fleet: Fleet, tmp_path: Path) -> Iterator[Field]:
    """Where the tests play."""
    with Sandbox(issue_interval=MINUTE, latency=0.1) as kis:
        yield Field(fleet, kis, tmp_path)


def clean(kis: Sandbox, requests: int) -> None:
    """KIS was asked so often, refused nothing, and issued one token."""
    stats = kis.stats()
    assert (stats["token_requests"], stats["granted_new"], stats["refused"]) == (requests, 1, {})


@pytest.mark.parametrize("interval", [MINUTE, 0])
def test_eight_cold_machines_make_one_request(field: Field, interval: float) -> None:
    """Two processes on each; all get its token, each machine has it, also where no minute is kept between requests."""
    fleet_of = field.machines(8, issue_interval=interval)
    field.kis.set_rules(issue_interval=60)
    children = [machine.start() for machine in fleet_of for _ in range(2)]
    assert [ended(child) for child in children] == [0] * 16
    assert {machine.got for machine in fleet_of} == {here(machine)[0] for machine in fleet_of} == {fleet_of[0].got}
    clean(field.kis, 1)


def test_of_two_that_have_looked_one_begins_and_the_last_that_began_may_send(field: Field) -> None:
    """Whose look is older than another's attempt looks again; whose attempt is older than another's sends nothing.

    A child that is forked amid it, looks and ends leaves its parent the connection.
    """
    first, second, third = field.machines(3)
    with first.store.lock(wait=5), second.store.lock(wait=5):
        assert ended(in_child(lambda: (look(third), first.store.attempts()))) == 0
        begun = first.store.begin(SENT)
        assert begun
        assert second.store.begin(SENT) is None
        assert first.store.depart(begun)
        field.sql("update tokencore_attempt set at = now() - interval '1 hour'")
        assert second.store.begin(SENT) is None
        assert second.store.begin(SENT)
        assert not first.store.depart(begun)


FATES = [  # where, by which signal (0: it loses the store), and how many requests that makes
    ("begun", signal.SIGKILL, 1),
    ("departed", signal.SIGKILL, 1),
    ("answered", signal.SIGKILL, 2),
    ("begun", signal.SIGSTOP, 1),
    ("answered", signal.SIGSTOP, 2),
    ("begun", 0, 1),
    ("departed", 0, 2),
    ("answered", 0, 2),
]


def test_whatever_befalls_the_machine_that_renews_the_others_get_the_same_token(field: Field) -> None:
    """Killed, stopped past its time, or cut off, before its request, amid it, or before its token is saved.

    A second request is made where nobody can know of the first one's answer, after KIS's minute; it brings the same
    token. One that was stopped takes the others' token when it goes on; nothing is refused.
    """
    with ThreadPoolExecutor(len(FATES)) as pool:
        list(pool.map(lambda fate: outlive(field.fleet, field.folder / f"{fate[1]}-{fate[0]}", *fate), FATES))


def outlive(fleet: Fleet, folder: Path, at: str, fault: int, requests: int) -> None:
    """Three machines, one of which meets its fate."""
    with Sandbox(issue_interval=MINUTE) as kis, Relay(fleet.server.port) as relay:
        victim, *others = (
            Machine(fleet.behind(relay) if name == "victim" else fleet, folder / name, kis)
            for name in ("victim", "one", "two")
        )
        child = victim.start(at, fault)
        if fault:
            status = os.waitpid(child, os.WUNTRACED)[1]
            assert os.WIFSTOPPED(status) or os.WIFSIGNALED(status)
        else:
            until((victim.folder / "reached").exists)
            relay.open.clear()
            (victim.folder / "go").touch()
        assert [ended(one) for one in [other.start() for other in others]] == [0, 0], folder
        if fault == signal.SIGSTOP:
            os.kill(child, signal.SIGCONT)
        if fault != signal.SIGKILL:
            code = ended(child)
            assert (code, victim.got) == ((0, others[0].got) if fault or at != "begun" else (1, "")), folder
        assert {other.got for other in others} == {others[0].got} != {""}
        clean(kis, requests)


def test_a_rejected_removed_or_imported_token_is_so_on_every_machine(field: Field) -> None:
    """With the next look of each, at the latest; nobody brings back what a person took away."""
    first, second = field.machines(2)
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


def test_what_only_one_machine_has_is_offered_and_the_later_expiry_wins(field: Field) -> None:
    """A machine that joins brings its token and its record; so does one whose store was away meanwhile.

    A server that takes over and is behind gets back what it has lost.
    """
    first, second = field.machines(2)
    alone = FileStore(first.market, lambda: ["us"])
    with alone.lock(wait=5):
        alone.finish(alone.begin(SENT), SENT._replace(outcome=Outcome.ISSUED), make_token(life=3600))
    assert look(first) == look(second) != ("", None)
    assert [one.outcome for one in second.store.attempts()] == ["issued"]
    before = field.sql("select version, fence, sealed from tokencore_key where key <> 'layout'").split("|")
    later = stored(first, make_token())
    with first.store.lock(wait=5):
        first.store.note(SENT._replace(at=NOW + DAY, outcome=Outcome.IMPORTED))
    field.sql(
        "update tokencore_key set version = {}, fence = {}, sealed = '{}' where fence > 0".format(*before),  # noqa: S608
        "delete from tokencore_attempt where fence > 1",
    )
    assert look(first) == look(second) == (later.access_token, None)
    assert [(one.outcome, bool(one.host)) for one in second.store.attempts()] == [("issued", True), ("imported", True)]
    assert not any(one.host for one in first.store.attempts())


@pytest.mark.parametrize("hours", [1, -1])
def test_the_limits_go_by_the_servers_clock(field: Field, hours: int) -> None:
    """A machine whose clock is an hour wrong knows how long ago another one's attempt was, and dates its own right."""
    first, second = field.machines(2, issue_interval=60)
    attempt(first)
    with time_machine.travel(datetime.now(UTC) + timedelta(hours=hours)):
        (seen,) = second.store.attempts()
        assert abs(datetime.now(UTC) - seen.at) < timedelta(minutes=1)
        attempt(second)
    assert all(abs(datetime.now(UTC) - one.at) < timedelta(minutes=1) for one in first.store.attempts())


def test_what_a_later_version_or_nobody_writes_stops_no_machine(field: Field) -> None:
    """An unknown outcome is an attempt, an unknown field is passed over; a time that cannot be counts for nothing."""
    first, second, third = field.machines(3)
    token, document = stored(first, make_token()), opened(field.fleet, field.folder / "fourth")
    with first.store.lock(wait=5):
        first.store.note(SENT)
    field.sql('update tokencore_attempt set what = replace(what, \'"sent"\', \'"thawed", "colour": 3\')')
    assert look(second) == (token.access_token, None)
    assert [one.outcome for one in second.store.attempts()] == [Outcome.SENT]
    assert kept(document) == {}
    field.sql("update tokencore_attempt set at = 'infinity'", "update tokencore_key set leased_until = '9999-1-1'")
    assert (look(third), third.store.attempts()) == ((token.access_token, None), [])
    assert kept(document) == {}


BOT = "import time; from tokencore import TokenManager; manager = TokenManager('us')\n"
BOT += "while True: manager.get_valid_token(); time.sleep(0.1)"
FOLLOW = "from tokencore.cli import main; main(['follow'])"


def test_a_machine_follows_what_the_others_do(field: Field) -> None:
    """By `tokencore follow`, where notifications come through and where a pooler swallows them, and by a bot itself.

    Another process takes over from a follower that is killed. An entry that cannot be decrypted is said once and left
    alone, and the others are followed.
    """
    with Relay(field.fleet.server.port, notifies=False) as relay, contextlib.ExitStack() as running:
        first, listening, bot = field.machines(3)
        polling = field.machine("polling", field.fleet.behind(relay))
        following = (listening, polling, bot)
        other = field.machine("other", key=OTHER)

        def started(program: str, machine: Machine) -> subprocess.Popen[str]:
            more = {"KIS_MARKETS__HK__APP_KEY": OTHER, "KIS_MARKETS__HK__EXCHANGES": "SEHK"}
            process = start(program, **machine.environment, **more)
            running.callback(process.communicate)
            running.callback(process.kill)
            return process

        follower, *_ = (started(FOLLOW, listening), started(FOLLOW, polling), started(BOT, bot))
        token = first.get()
        until(lambda: all(here(one) == (token, None) for one in following))
        successor = started(FOLLOW, listening)
        renewed = stored(first, make_token(life=90_000))
        until(lambda: all(here(one) == (renewed.access_token, None) for one in following))
        follower.kill()
        renewed.rejected_at = datetime.now(UTC)
        stored(first, renewed)
        until(lambda: all(here(one)[1] is not None for one in following))
        damaged = "update tokencore_key set sealed = 'x', version = version + 1 where key ="
        field.sql(f"{damaged} '{first.store.name}'", f"notify tokencore, '{first.store.name}'")
        stored(other, make_token())
        until((listening.folder / f"key-{other.store.fingerprint}.json").exists)
        successor.kill()
        said = successor.communicate()[1]
    assert (said.count("cannot be decrypted"), said.count("goes on trying")) == (1, 0), said
    assert here(listening)[0] == renewed.access_token


def test_a_document_is_locked_for_all_machines_for_a_minute(field: Field) -> None:
    """One machine at a time; who held it for longer than its lease changes nothing any more.

    Where the store cannot be used, a machine goes by what it has itself.
    """
    first, second = (opened(field.fleet, field.folder / name) for name in ("first", "second"))
    away = field.fleet._replace(url=field.fleet.url.replace(PASSWORD, "wrong"))
    with first.lock(wait=1) as held:
        assert held
        first.write({"incidents": [1]})
        with second.lock(wait=0) as taken:
            assert not taken
        field.sql("update tokencore_key set leased_until = now() where leased_until > now()")
        with second.lock(wait=1) as over:
            assert (over, second.read()) == (True, {"incidents": [1]})
            second.write({"incidents": [1, 2]})
            with pytest.raises(OSError, match="lock"):
                first.write({"incidents": []})
    assert first.read() == second.read() == kept(second) == {"incidents": [1, 2]}
    assert kept(opened(away, field.folder / "third")) == {}


def test_an_answer_of_the_store_that_is_lost_counts_as_no(field: Field, caplog: pytest.LogCaptureFixture) -> None:
    """Of `begin` and `depart`: nothing is sent. Of what follows the request: its token is handed out and offered.

    Nobody is told then that nothing was issued.
    """
    statements = {"fence + 1": 0, "at = clock": 0, "excluded.sealed": 1, "at = $1": 1}
    with ThreadPoolExecutor(len(statements)) as pool:
        list(pool.map(lambda one: answer_lost(field.fleet, field.folder / one, one, statements[one]), statements))
    until(lambda: "other machines get what KIS answered" in caplog.text)
    assert not any("other machines get" in one and "Nothing was" in one for one in caplog.messages)


def answer_lost(fleet: Fleet, folder: Path, statement: str, requests: int) -> None:
    """The connection breaks after the statement was carried out; so many requests are made."""
    with Sandbox(issue_interval=MINUTE) as kis, Relay(fleet.server.port) as relay:
        first, second = Machine(fleet.behind(relay), folder / "first", kis), Machine(fleet, folder / "second", kis)
        assert look(first) == ("", None)  # the row is there
        relay.lose = statement.encode()
        token = ""
        with contextlib.suppress(TokenStoreError):
            token = first.get()
        assert (asked(kis), bool(token)) == (requests, bool(requests)), statement
        if token:
            until(lambda: look(first)[0] == look(second)[0] == token)
        assert second.get() == (token or first.get()), statement
        clean(kis, 1)


SERVED = (
    "import sys; from tokencore import TokenManager; print(TokenManager('us').get_valid_token());"
    "print([name for name in ('psycopg', 'cryptography') if name in sys.modules])"
)


def test_a_store_that_is_frozen_stops_nobody_with_a_valid_token(field: Field) -> None:
    """A command with a token needs neither store nor its packages; one without is refused, exit 7.

    `check` writes nothing. A rejection is noted here and reaches the others when the store is back; a removal would not
    last, and is refused.
    """
    first, second, third, cold = field.machines(4)
    token = stored(first, make_token())
    assert look(second) == look(third) == (token.access_token, None)
    token.rejected_at = datetime.now(UTC)
    field.fleet.server.send(signal.SIGSTOP)
    try:
        with ThreadPoolExecutor() as pool:
            pool.submit(stored, second, token)
            removal, get = (
                pool.submit(partial(tokencore, what, "us", **machine.environment))
                for what, machine in (("delete", third), ("get", cold))
            )
            before = snapshot(first.folder)
            assert tokencore("check", "us", **first.environment).code == 0
            assert snapshot(first.folder) == before
            assert start(SERVED, **first.environment).communicate()[0] == f"{token.access_token}\n[]\n"
            assert (removal.result().code, get.result().code) == (7, 7)
        assert "store (KIS_STORE) cannot be used: it does not answer" in one_line(get.result())
    finally:
        field.fleet.server.send(signal.SIGCONT)
    until(lambda: all(look(one)[1] is not None for one in (second, third, first)))
    assert asked(field.kis) == 0


ADMIN = "postgresql://admin:CanaryPassword@{host}/"
READ_ONLY = ADMIN + "postgres?options=-cdefault_transaction_read_only%3Don"
BAD = {  # the address of the store, a setting and its text, or a change in it; the exit code, and what is said
    "no address": ("http://{host}/postgres", 2, "KIS_STORE"),
    "unknown option": (ADMIN + "postgres?ssl_mode=require", 2, "KIS_STORE"),
    "bad number": ("postgresql://admin:CanaryPassword@{host}x/postgres", 2, "KIS_STORE"),
    "no keys": ("KIS_STORE_KEYS=", 2, "KIS_STORE_KEYS is not set"),
    "keys alone": ("KIS_STORE=", 2, "KIS_STORE_KEYS is set without KIS_STORE"),
    "malformed key": ("KIS_STORE_KEYS=CanaryKey", 2, "KIS_STORE_KEYS is malformed"),
    "another key": ("KIS_STORE_KEYS=" + "b" * 43 + "=", 7, "cannot be decrypted"),
    "password": ("postgresql://admin:CanaryWrong@{host}/postgres", 7, "password"),
    "database": (ADMIN + "other", 7, "no such database"),
    "no tables": (ADMIN + "template1", 7, "fleet init"),
    "no rights": ("postgresql://poor:CanaryPassword@{host}/postgres", 7, "may not use the tables"),
    "no encryption": (ADMIN + "postgres?sslmode=require", 7, "sslmode"),
    "a standby": (READ_ONLY, 7, "takes no changes"),
    "another version": ("update tokencore_key set sealed = '2' where key = 'layout'", 7, "another version"),
    "cut short": ("update tokencore_key set sealed = left(sealed, 200) where key <> 'layout'", 7, "decrypted"),
    "exchanged": ("update tokencore_key set sealed = '{other}' where key <> 'layout'", 7, "rows were exchanged"),
}


@pytest.mark.parametrize(("change", "code", "sign"), BAD.values(), ids=BAD)
def test_a_mistake_in_the_set_up_is_one_sentence_and_nothing_is_lost(
    field: Field, command: Command, change: str, code: int, sign: str
) -> None:
    """Whatever is wrong: the documented exit code, what to correct, no secret; nothing issued, nothing overwritten."""
    field.sql("drop role if exists poor", "create role poor login password 'CanaryPassword'")
    stored(field.machine("first"), make_token(life=400, age=200))  # it serves nobody any more
    os.environ |= field.machine("second").environment
    other = Seal([field.fleet.key]).close({"key_fingerprint": "other"})
    change = change.format(host=f"127.0.0.1:{field.fleet.server.port}", other=other)
    if change.startswith("update"):
        field.sql(change)
    else:
        name, _, text = change.partition("=") if change.startswith("KIS_") else ("KIS_STORE", "", change)
        os.environ[name] = text
    before = field.sql("select version, sealed from tokencore_key")
    ran = command("get", "us")
    assert (ran.code, sign in one_line(ran), "Canary" in ran.err) == (code, True, False), ran.err
    assert (asked(field.kis), field.sql("select version, sealed from tokencore_key")) == (0, before)


@pytest.mark.parametrize("package", ["psycopg", "cryptography"])
def test_without_the_extra_a_cold_machine_says_what_to_install(field: Field, package: str) -> None:
    """Exit 2 and the command that brings the package, and nothing is issued; the help does not need it."""
    program = f"import sys; sys.modules['{package}'] = None; from tokencore.cli import main; sys.exit(main())"
    cold = field.machine("cold").environment
    get, helped = start(program, "get", "us", **cold), start(program, "--help", **cold)
    assert "pip install 'tokencore[fleet]'" in get.communicate()[1]
    assert "follow" in helped.communicate()[0]
    assert (get.returncode, helped.returncode, asked(field.kis)) == (2, 0, 0)


def test_a_certificate_of_somebody_else_ends_the_connection(field: Field) -> None:
    """With verify-full only the server is spoken to whose certificate the file vouches for."""
    how = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=localhost -addext"
    places = [folder / "server.crt" for folder in (field.fleet.server.folder, field.folder)]
    for place in places:
        files = ["subjectAltName=DNS:localhost", "-out", f"{place}", "-keyout", f"{place.with_suffix('.key')}"]
        subprocess.run([*how.split(), *files], check=True, capture_output=True)
    certificate, key = places[0], places[0].with_suffix(".key")
    own(certificate, key)
    encrypted = (f"ssl_cert_file = '{certificate}'", f"ssl_key_file = '{key}'", "ssl = on")
    field.sql(*[f"alter system set {one}" for one in encrypted], "select pg_reload_conf()")
    try:
        url = field.fleet.url.replace("127.0.0.1", "localhost") + "?sslmode=verify-full&sslrootcert="
        good, bad = (field.machine(place.parent.name, field.fleet._replace(url=f"{url}{place}")) for place in places)
        until(lambda: field.sql("show ssl") == "on")
        assert good.get()
        with pytest.raises(TokenStoreError, match="its certificate cannot be verified"):
            bad.get()
    finally:
        field.sql("alter system reset all", "select pg_reload_conf()")
    assert asked(field.kis) == 1


def test_nothing_in_the_store_reveals_a_secret_and_the_keys_are_rotated(field: Field, command: Command) -> None:
    """No form of key, secret or token is in a dump; after `fleet rotate` the newest key alone opens everything."""
    first, older = field.machine("first"), field.fleet.key
    token, document = first.get(), opened(field.fleet, first.folder)
    assert [one.outcome for one in first.store.attempts()] == ["issued"]  # it is published by then
    with document.lock(wait=1):
        document.write({"operator": "CanaryName"})
    dump = field.sql("select * from tokencore_key", "select * from tokencore_attempt").encode()
    assert b"issued" in dump
    assert [text for text in (KEY, SECRET, token, "CanaryName") if any(form in dump for form in forms(text))] == []
    newer = field.fleet._replace(key=Fernet.generate_key().decode())
    os.environ |= {**first.environment, "KIS_STORE_KEYS": f"{newer.key},{older}"}
    assert command("fleet", "rotate").code == 0
    assert field.machine("new", newer).get() == token
    os.environ["KIS_STORE_KEYS"] = older
    ran = command("fleet", "rotate")
    assert (ran.code, "cannot be decrypted" in ran.err) == (7, True)


def test_the_printed_role_is_enough_and_may_no_more(field: Field, command: Command) -> None:
    """`fleet init` twice is once; its SQL makes a role that renews, and can neither delete nor truncate.

    Where tokens are sealed already it prints no other key, and to that role it says who has to run it.
    """
    role = f"app{os.getpid()}"
    os.environ["KIS_STORE"] = field.fleet.url
    ran = [command("fleet", "init", "--role", role) for _ in range(2)][1]
    assert (ran.code, "KIS_STORE_KEYS=" in ran.out) == (0, True)
    field.sql(ran.out, f"alter role {role} password 'CanaryPassword'")
    lesser = field.fleet._replace(url=field.fleet.server.url(role=role))
    assert field.machine("one", lesser).get()
    again = command("fleet", "init")
    assert ("in use" in again.out, "KIS_STORE_KEYS=" in again.out) == (True, False)
    os.environ["KIS_STORE"] = lesser.url
    lacking = command("fleet", "init")
    assert (lacking.code, "tables cannot be made" in one_line(lacking)) == (7, True)
    for wish in ("delete from", "truncate", "drop table"):
        with pytest.raises(TokenStoreError, match="may not use"), database.Database(lesser.url, "x") as session:
            session.execute(f"{wish} tokencore_key")


def test_the_doctor_says_what_a_store_lacks(field: Field, command: Command) -> None:
    """Reach, encryption, role, clock, keys and follower: a line each, with the fix; a store away is a failure."""
    field.machine("first").get()
    os.environ |= field.machine("second").environment
    os.environ["KIS_STORE_KEYS"] = f"{Fernet.generate_key().decode()},{field.fleet.key}"
    found = {one["name"]: one for one in json.loads(command("doctor", "--json").out)}
    states = {name: found[f"store {name}"]["state"] for name in ("encryption", "role", "clock", "keys", "follower")}
    assert (found["store"]["state"], states.pop("clock"), set(states.values())) == ("ok", "ok", {"warn"})
    assert "fleet rotate" in found["store keys"]["cure"]
    os.environ["KIS_STORE"] = field.fleet.url.replace(PASSWORD, "wrong")
    found = {one["name"]: one for one in json.loads(command("doctor", "--json").out)}
    assert (found["store"]["state"], "password" in found["store"]["detail"]) == ("fail", True)


def look(machine: Machine) -> tuple[str, datetime | None]:
    """The machine's token after its next look into the store, and since when it is known to be rejected."""
    with machine.store.lock(wait=5):
        pass
    return told(machine.store.read()[0])


def here(machine: Machine) -> tuple[str, datetime | None]:
    """The same of the token in the machine's files."""
    return told(FileStore(machine.market, tuple).read()[0])


def told(token: Token | None) -> tuple[str, datetime | None]:
    """The token's text, and since when it is known to be rejected."""
    return (token.access_token, token.rejected_at) if token else ("", None)


def stored(machine: Machine, token: Token) -> Token:
    """Save it there."""
    with machine.store.lock(wait=5):
        machine.store.save(token)
    return token


def attempt(machine: Machine) -> None:
    """An attempt of now, refused by KIS."""
    sent = SENT._replace(at=datetime.now(UTC))
    with machine.store.lock(wait=0):
        fence = machine.store.begin(sent)
        assert fence
        machine.store.finish(fence, sent._replace(outcome=Outcome.LIMIT))


def opened(fleet: Fleet, folder: Path) -> Document:
    """The incidents of a machine with that token directory."""
    settings: Any = SimpleNamespace(**fleet.numbers(folder))
    return open_document(settings, "incidents")


def kept(document: Document) -> dict[str, object]:
    """What it has under its lock."""
    with document.lock(wait=1) as held:
        assert held
        document.write(document.read())
        return document.read()
