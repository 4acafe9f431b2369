"""Other clients: the copies that they read, and they themselves with the code of docs/bots.md.

A warm token goes in, and no issue request comes out. mojito2 and python-kis are the real packages, from exact pins,
each in a virtual environment beside the one that runs the tests; it is built once, as that takes long. The official
sample is read by `clients/kis_auth.py`. `make test` starts a few processes of each, `make clients` as many as a big
bot has.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import pickletools
import re
import shutil
import subprocess
import sys
import venv
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

import pytest
from builders import make_jwt, make_token
from filelock import FileLock
from running import asked, cached, on_disk, raised, snapshot

from tokencore import ConfigurationError, Key, Settings, TokenManager
from tokencore.clients.exports import Exports
from tokencore.sandbox import APP_KEY, APP_SECRET

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokencore.sandbox import Sandbox

OTHER_KEY = "PSOtherKey" + "o" * 26
TWO_DAYS = 2 * 86_400


CLIENTS = ("mojito2", "python-kis", "kis-auth")


def name_of(client: str) -> str:
    """What the client's file is called today."""
    today = f"KIS{datetime.now().astimezone():%Y%m%d}"
    return {"mojito2": "token.dat", "python-kis": "token_*.json", "kis-auth": today}[client]


def held(folder: Path) -> str:
    """The one token in all the files of a folder, without looking into their forms."""
    contents = [path.read_bytes() for path in folder.iterdir()]
    text: bytes = min((text for content in contents for text in re.findall(rb"eyJ[\w.-]+", content)), key=len)
    assert all(text in content for content in contents)  # behind it a pickle goes on
    return text.decode()


def pickled(text: str, protocol: int = 4) -> bytes:
    """What mojito2 writes by itself for a token."""
    return pickle.dumps({"access_token": text, "api_key": APP_KEY, "api_secret": APP_SECRET}, protocol)


def longer(key: str = APP_KEY) -> str:
    """A token that another program has just been issued with the key, and which lasts longer than ours."""
    return make_jwt(key, life=TWO_DAYS)


def exports() -> Exports:
    """The exports of the key."""
    (key,) = Key.load(Settings.load())
    return Exports(key.markets, key.store)


def found() -> str | None:
    """The token of the key that another client has, and that outlasts ours."""
    token = exports().found(datetime.now(UTC))
    return token.access_token if token else None


def in_zone(zone: str, work: str) -> None:
    """Call a method of the manager of us in a process that stands elsewhere."""
    program = f"from tokencore import TokenManager; TokenManager('us').{work}"
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "TZ": zone}, check=True)


@pytest.fixture
def copies(tmp_path: Path, nowhere: Sandbox) -> Path:
    """A folder that us copies its token to, for all three clients; KIS hands no token out twice."""
    nowhere.set_rules(same_token=0, issue_interval=0)
    (made := tmp_path / "copies").mkdir()
    wanted = ",".join(f"{client}:{made}" for client in CLIENTS)
    os.environ |= {"KIS_HTS_ID": "me", "KIS_ISSUE_INTERVAL": "0", "KIS_MARKETS__US__EXPORTS": wanted}
    return made


@pytest.mark.usefixtures("nowhere")
def test_mojito2s_file_is_plain_data_of_an_old_protocol_and_off_by_default() -> None:
    """The pickle names no class, and has what mojito2 compares: key, secret, epoch of the expiry.

    With the secret in it, it stands beside the tokens only where the market's setting names mojito2.
    """
    krs = Path.home() / ".tokencore" / "us_krs_token.dat"
    TokenManager("us").get_valid_token()
    assert not krs.exists()
    os.environ["KIS_MARKETS__US__EXPORTS"] = '["mojito2"]'
    TokenManager("us").save_token(token := on_disk())
    codes = [(code.name, value) for code, value, _ in pickletools.genops(krs.read_bytes())]
    assert codes[0] == ("PROTO", 2)
    assert not {"GLOBAL", "REDUCE", "INST", "BUILD"} & {name for name, _ in codes}
    values = {APP_KEY, APP_SECRET, int(token.expires_at.timestamp()), token.access_token}
    assert values <= {value for _, value in codes}


def test_python_kis_file_is_what_tokenp_answers(gateway: Sandbox) -> None:
    """Its name has the environment, the HTS id and a digest; its expiry is in KST; the app secret is not in it.

    Without that id, and for an unknown client, there is a sentence before anything is issued.
    """
    export = TokenManager("us").export
    assert "KIS_HTS_ID" in str(raised(lambda: export("python-kis", "there")))
    assert "mojito2, python-kis, kis-auth" in str(raised(lambda: export("pykis", "there")))
    assert (asked(gateway), Path("there").exists()) == (0, False)
    os.environ["KIS_HTS_ID"] = "me"
    (path,) = map(Path, TokenManager("us").export("python-kis", "there"))
    assert re.fullmatch(r"token_real_me_[0-9a-f]{40}\.json", path.name)
    content = json.loads(path.read_text())
    assert sorted(content) == ["access_token", "access_token_token_expired", "expires_in", "token_type"]
    expiry = datetime.fromisoformat(content["access_token_token_expired"] + "+09:00")
    assert timedelta(0) <= on_disk().expires_at - expiry < timedelta(seconds=1)
    assert 86_000 < content["expires_in"] <= 86_400


@pytest.mark.usefixtures("gateway")
@pytest.mark.parametrize("zone", ["America/New_York", "Pacific/Kiritimati"])
def test_samples_files_speak_the_readers_time(zone: str) -> None:
    """The names are today's and tomorrow's, and the expiry a time, in the zone of the machine, wherever it stands."""
    cached(left=80_000)
    before = datetime.now(ZoneInfo(zone))
    in_zone(zone, "export('kis-auth', 'there')")
    names = sorted(path.name for path in Path("there").glob("[!.]*"))
    days = (before, datetime.now(ZoneInfo(zone)))
    assert names in [[f"KIS{day + timedelta(days=n):%Y%m%d}" for n in (0, 1)] for day in days]
    expiry = f"{on_disk().expires_at.astimezone(ZoneInfo(zone)):%Y-%m-%d %H:%M:%S}"
    assert Path("there", names[0]).read_text() == f"token: {on_disk().access_token}\nvalid-date: {expiry}\n"


def test_every_way_to_a_new_token_reaches_the_copies(copies: Path) -> None:
    """A renewal, `save_token`, an import and a renewal of another market of the key: the copies follow."""
    us, kr, seen = TokenManager("us"), TokenManager("kr"), []
    ways: list[Callable[[], object]] = [
        us.get_valid_token,
        lambda: us.refresh(force=True),
        lambda: us.save_token(make_token(TWO_DAYS)),
        lambda: us.adopt(make_token(TWO_DAYS + 600)),
        lambda: kr.refresh(force=True),
    ]
    for way in ways:
        way()
        seen.append(held(copies))
    assert seen[-1] == on_disk().access_token == kr.get_valid_token()
    assert (len(set(seen)), len(list(copies.iterdir()))) == (5, 4)


@pytest.mark.parametrize("death", ["deleted", "rejected", "revoked"])
def test_copies_die_with_the_token(death: str, copies: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A token that is deleted, rejected by KIS or revoked is out of the other clients' hands, and the log says so.

    A list of copies that the previous version kept is not needed for it.
    """
    us = TokenManager("us")
    text = us.get_valid_token()
    next(Path.home().glob(".tokencore/key-*-exports.json")).unlink()
    exports().sync(on_disk())
    assert held(copies) == text
    if death == "revoked":
        us.revoke()
    elif death == "rejected":
        assert "six hours" in str(raised(lambda: us.report_rejected(text)))
    else:
        us.delete_token()
        assert held(copies) == text  # kr has the key's token: it lives
        TokenManager("kr").delete_token()
    assert list(copies.iterdir()) == []
    assert sum("Removed the copy" in message for message in caplog.messages) == 4


def test_what_fails_harms_neither_the_token_nor_the_other_copies(
    copies: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A missing folder and a file that is none of ours are logged and kept for the doctor; the rest goes on."""
    foreign, missing = copies / "token.dat", copies.with_name("missing")
    foreign.write_text("somebody's notes")
    os.environ["KIS_MARKETS__US__EXPORTS"] = f"kis-auth:{missing},mojito2:{copies},kis-auth:{copies}"
    text = TokenManager("us").get_valid_token()
    assert (foreign.read_text(), text in (copies / name_of("kis-auth")).read_text()) == ("somebody's notes", True)
    assert [record.levelname for record in caplog.records] == ["ERROR"] * 2
    failed = exports().failures()
    assert list(failed) == [f"kis-auth:{missing}", f"mojito2:{copies}"]
    assert "cannot be written, and the token is untouched: No such file or directory" in failed[f"kis-auth:{missing}"]
    assert "holds no token of this key" in failed[f"mojito2:{copies}"]
    foreign.unlink()
    missing.mkdir()
    exports().sync(on_disk())
    assert exports().failures() == {}
    assert held(copies) == held(missing) == text


FOREIGN: dict[str, Callable[[Path], object]] = {
    "another key's token": lambda path: path.write_text(f"token: {longer(OTHER_KEY)}\n"),
    "another key's pickle": lambda path: path.write_bytes(pickled(longer(OTHER_KEY))),
    "both keys": lambda path: path.write_text(f"token: {longer(OTHER_KEY)}\nold: {longer()}\n"),
    "notes": lambda path: path.write_text(f"my key is {APP_KEY}"),
    "a pickle of nothing": lambda path: path.write_bytes(pickle.dumps([1, 2])),
    "a broken pickle": lambda path: path.write_bytes(b"\x80\x04\x95\xff\xff\xff"),
    "a large file": lambda path: path.write_text(longer() + " " * 70_000),
    "a folder": lambda path: path.mkdir(),
    "a link": lambda path: path.symlink_to("/etc/hostname"),
    "a FIFO": os.mkfifo,
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("client", ["mojito2", "kis-auth"])
def test_file_that_holds_no_token_of_the_key_is_never_touched(
    nowhere: Sandbox, tmp_path: Path, name: str, client: str
) -> None:
    """Another key's token, notes, damage, what is no file: left as it is, with a sentence that says so."""
    FOREIGN[name](path := tmp_path / name_of(client))
    before = snapshot(path)
    error = raised(lambda: TokenManager("us").export(client, str(tmp_path)))
    assert (type(error), f"{path} holds no token of this key" in str(error)) == (ConfigurationError, True)
    assert (snapshot(path), list(tmp_path.glob(".*.tmp")), asked(nowhere)) == (before, [], 0)


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("times", [{"life": -60}, {"exp": None}], ids=["expired", "of unknown expiry"])
def test_what_a_client_wrote_by_itself_makes_room(
    nowhere: Sandbox, copies: Path, protocol: int, times: dict[str, Any]
) -> None:
    """A token of the key that is dead or tells no expiry, in each client's own form, and an empty file are replaced."""
    old = make_jwt(APP_KEY, **times)
    (copies / "token.dat").write_bytes(pickled(old, protocol))
    (copies / name_of("kis-auth")).write_text(
        "" if protocol % 2 else f"token: {old}\nvalid-date: 2026-01-01 00:00:00\n"
    )
    TokenManager("us").get_valid_token()
    assert held(copies) == on_disk().access_token
    file_of("python-kis", copies).write_text("{half")  # its name has the key's digest
    exports().sync(on_disk())
    assert held(copies) == on_disk().access_token
    assert (exports().failures(), asked(nowhere)) == ({}, 1)


def file_of(client: str, folder: Path) -> Path:
    """The file that the client has there."""
    return next(folder.glob(name_of(client)))


def as_written_by(client: str, text: str, folder: Path) -> str:
    """Let a client put a token of its own, as it writes one, in the place of its copy."""
    content = {
        "mojito2": pickled(text),
        "python-kis": json.dumps({"access_token": text, "token_type": "Bearer", "expires_in": TWO_DAYS}).encode(),
        "kis-auth": f"token: {text}\nvalid-date: 2099-01-01 00:00:00\n".encode(),
    }
    (path := file_of(client, folder)).unlink()
    path.write_bytes(content[client])
    return text


@pytest.mark.parametrize("hourly", [False, True], ids=["when KIS rejects ours", "at the hourly check"])
@pytest.mark.parametrize("client", CLIENTS)
def test_newer_token_of_another_client_is_adopted_instead_of_written_over(
    nowhere: Sandbox, copies: Path, client: str, *, hourly: bool
) -> None:
    """A client renewed by itself: its token stays, becomes the key's, and goes into every copy; nothing is issued."""
    cached(17 * 3_600)
    theirs = as_written_by(client, longer(), copies)
    exports().sync(on_disk())
    assert theirs in file_of(client, copies).read_bytes().decode("latin-1")
    assert found() == theirs
    next(path for path in copies.iterdir() if theirs not in path.read_bytes().decode("latin-1")).unlink()
    if hourly:
        Key.load(Settings.load())[0].sync_exports()
    else:
        TokenManager("us").report_rejected(on_disk().access_token)
    assert TokenManager("kr").get_valid_token() == theirs == held(copies)
    assert len(list(copies.iterdir())) == 4
    assert [attempt.outcome for attempt in TokenManager("us").history()] == ["imported"]
    assert asked(nowhere) == 0


NOT_ADOPTED: dict[str, Callable[[str], str]] = {
    "our own": lambda ours: ours,
    "expired": lambda _: make_jwt(APP_KEY, life=-60),
    "shorter": lambda _: make_jwt(APP_KEY, life=600),
    "of unknown expiry": lambda _: make_jwt(APP_KEY, exp=None),
    "another key's": lambda _: longer(OTHER_KEY),
}


class Evil:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize("name", NOT_ADOPTED)
def test_token_is_not_adopted_where_it_is_dead_ours_or_another_keys(copies: Path, name: str) -> None:
    """It is passed over: a longer one behind it is found. Nothing that acts when it is unpickled does."""
    ours, theirs = TokenManager("us").get_valid_token(), longer()
    passed = NOT_ADOPTED[name](ours)
    (copies / "token.dat").write_bytes(pickled(passed))
    assert found() is None
    (copies / "token.dat").write_bytes(pickle.dumps([Evil(), passed, theirs]))
    assert found() == theirs
    exports().sync(on_disk())
    assert not Path("unpickled").exists()


def test_rejected_token_is_not_adopted_though_it_seems_to_last_longer(copies: Path) -> None:
    """Longer than we take it to live: KIS's answer said less, or our clock is slow."""
    TokenManager("us").get_valid_token()
    (copies / "token.dat").write_bytes(pickled(theirs := longer(), 5))
    TokenManager("us").save_token(make_token(80_000, text=theirs, rejected=True))
    assert found() is None


def test_samples_files_of_past_days_are_cleared_away(copies: Path) -> None:
    """A copy of ours for an earlier day goes, as even an expired token reveals the app key; what others wrote stays."""
    others = copies / "KIS20200102"
    others.write_text(f"token: {make_jwt(APP_KEY, life=600)}\n")
    for zone in ("Pacific/Midway", "Pacific/Kiritimati"):  # it is always a later day there
        in_zone(zone, "refresh(force=True)")
    assert others.exists()
    assert not (copies / f"KIS{datetime.now(ZoneInfo('Pacific/Midway')):%Y%m%d}").exists()


# --- the clients themselves

PINS = Path(__file__).with_name("clients")
DOCS = Path(__file__).resolve().parent.parent / "docs" / "bots.md"
BLOCKS = [(match[1], match[2]) for match in re.finditer(r"```([\w -]+)\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)]
THOROUGH = "TOKENCORE_CLIENTS" in os.environ  # `make clients`
PROCESSES = 32 if THOROUGH else 3
QUOTES = {"mojito2": (1, 1), "python-kis": (6, 1), "kis-auth": (1, 1)}  # calls that the code makes at its start, later
# The libraries know KIS's hosts only, so each is pointed to the gateway where it keeps them; the sample has a setting.
POINTED = {
    "mojito2": "import mojito\n"
    "mojito.KoreaInvestment.set_base_url = lambda self, mock: setattr(self, 'base_url', os.environ['KIS_BASE_URL'])\n",
    "python-kis": "import pykis.kis\npykis.kis.REAL_DOMAIN = os.environ['KIS_BASE_URL']\n",
    "kis-auth": "",
}


def blocks(language: str) -> list[str]:
    """The code of the document's blocks of a language."""
    return [code for name, code in BLOCKS if name.split()[-1] == language]


def interpreter_with(client: str) -> Path | None:
    """The Python of an environment with `client`, built if need be; None where its packages cannot be had."""
    pins = PINS / f"{client}.txt"
    if not pins.exists():
        return Path(sys.executable)
    home = Path(sys.prefix, "clients", f"{client}-{hashlib.sha256(pins.read_bytes()).hexdigest()[:12]}")
    python, complete = home / "bin" / "python", home / "complete"
    home.parent.mkdir(exist_ok=True)
    with FileLock(home.with_suffix(".lock")):
        if not complete.exists():
            shutil.rmtree(home, ignore_errors=True)
            venv.create(home, symlinks=True)
            pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "-r"]
            if subprocess.run([*pip, str(pins)], check=False, capture_output=not THOROUGH).returncode:
                return None
            complete.touch()
    return python


@pytest.fixture(scope="session")
def pythons() -> dict[str, Path | None]:
    """The interpreters of all clients, built side by side."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(QUOTES, pool.map(interpreter_with, QUOTES), strict=True))


class Bots:
    """Processes that run the document's code for a client: the first block, and after each `swap` the second."""

    def __init__(self, client: str, python: Path, count: int) -> None:
        """Start so many, all at once."""
        first, later = (f"{code}\nprint('quoted', flush=True)\n" for code in blocks(client))
        program = f"import os, sys\n{POINTED[client]}{first}\nfor _ in sys.stdin:\n    exec({later!r})\n"
        # Whatever would go out to KIS's own hosts meets a closed door.
        env = {**os.environ, "PYTHONPATH": str(PINS), "HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
        command, pipe = [str(python), "-c", program], subprocess.PIPE
        self._started = [
            subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True, bufsize=1) for _ in range(count)
        ]

    def quoted(self) -> int:
        """How many of them have got their quotes."""
        return sum(one.stdout is not None and one.stdout.readline() == "quoted\n" for one in self._started)

    def swap(self) -> None:
        """Let them take over the new token."""
        for one in self._started:
            print("swap", file=one.stdin)

    def end(self) -> None:
        """Let them end by themselves."""
        for one in self._started:
            one.communicate(timeout=60)


@pytest.fixture
def python(client: str, gateway: Sandbox, pythons: dict[str, Path | None]) -> Path:
    """The client's Python; the folders of all clients at their defaults, and the settings that export there."""
    if not (found := pythons[client]):
        assert not THOROUGH
        pytest.skip(f"{client} cannot be installed here; `make clients` says why")
    os.environ |= {"KIS_HTS_ID": "me", "KIS_MARKETS__US__EXPORTS": f"mojito2:{Path.cwd()},python-kis,kis-auth"}
    config = Path.home() / "KIS" / "config"
    for made in (config, Path.home() / ".pykis" / "cache"):
        made.mkdir(parents=True)
    (config / "kis_devlp.yaml").write_text(f"prod: {gateway.url}\nmy_app: {APP_KEY}\nmy_sec: {APP_SECRET}\n")
    return found


@pytest.mark.parametrize("client", QUOTES)
def test_client_uses_the_token_and_issues_none(client: str, nowhere: Sandbox, python: Path) -> None:
    """Every process takes the warm token for its quotes, and the next one after a renewal, without an issue request."""
    nowhere.set_rules(same_token=0, issue_interval=0)
    os.environ["KIS_ISSUE_INTERVAL"] = "0"
    first = TokenManager("us").get_valid_token()
    bots = Bots(client, python, PROCESSES)
    assert bots.quoted() == PROCESSES
    assert (asked(nowhere), nowhere.stats()["quotes"]) == (1, PROCESSES * QUOTES[client][0])
    nowhere.kill_tokens()
    assert TokenManager("us").refresh(force=True)
    assert on_disk().access_token != first
    bots.swap()
    assert bots.quoted() == PROCESSES
    bots.end()
    stats = nowhere.stats()
    assert (asked(nowhere), stats["quotes"], stats["quotes_refused"]) == (2, PROCESSES * sum(QUOTES[client]), {})


@pytest.mark.parametrize("client", QUOTES)
def test_without_the_file_a_client_issues_and_its_token_is_taken_over(
    client: str, gateway: Sandbox, python: Path
) -> None:
    """The counter-proof: without a copy the same code sends one request; its token is then the key's, for no other."""
    bots = Bots(client, python, 1)
    assert bots.quoted() == 1
    bots.end()
    assert asked(gateway) == 1
    token = TokenManager("us").get_valid_token()
    assert TokenManager("kr").get_valid_token() == token == on_disk().access_token
    assert asked(gateway) == 1


PROGRAMS = [
    *([sys.executable, "-c", code] for code in blocks("requests")),
    *(["/bin/sh", "-euc", code] for code in blocks("sh")),
    *(["node", "-e", code] for code in blocks("js")),
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda one: Path(one[0]).name)
def test_code_that_needs_no_client_runs(program: list[str], gateway: Sandbox, tmp_path: Path) -> None:
    """The document's code for plain requests gets its quote, and its commands run; Node's where there is Node."""
    if not shutil.which(program[0]):
        pytest.skip(f"there is no {program[0]} here")
    command = tmp_path / "bin" / "tokencore"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tokencore "$@"\n')
    command.chmod(0o755)
    os.environ |= {"PATH": f"{command.parent}:{os.environ['PATH']}", "KIS_HTS_ID": "me"}
    ran = subprocess.run(program, capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert asked(gateway) == 1
