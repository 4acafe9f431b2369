"""Other clients: the copies that they read, and they themselves with the code of docs/bots.md.

mojito2 and python-kis are the real packages, from exact pins, each in a virtual environment that is built once beside
the one that runs the tests; `make clients` starts more processes. The official sample is published without a package.
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


@pytest.fixture
def copies(tmp_path: Path, nowhere: Sandbox) -> Path:
    """A folder that us copies its token to, for all three clients; KIS hands no token out twice."""
    nowhere.set_rules(same_token=0, issue_interval=0)
    (made := tmp_path / "copies").mkdir()
    wanted = ",".join(f"{client}:{made}" for client in CLIENTS)
    os.environ |= {"KIS_HTS_ID": "me", "KIS_ISSUE_INTERVAL": "0", "KIS_MARKETS__US__EXPORTS": wanted}
    return made


@pytest.mark.usefixtures("nowhere")
def test_mojito2s_file_is_plain_data_and_off_by_default() -> None:
    """With the secret in it, it stands beside the tokens only where the market's setting names mojito2."""
    krs = Path.home() / ".tokencore" / "us_krs_token.dat"
    TokenManager("us").get_valid_token()
    assert not krs.exists()
    os.environ["KIS_MARKETS__US__EXPORTS"] = '["mojito2"]'
    TokenManager("us").save_token(on_disk())
    codes = {code.name for code, _, _ in pickletools.genops(krs.read_bytes())}
    assert not {"GLOBAL", "STACK_GLOBAL", "REDUCE", "INST", "BUILD"} & codes


def test_file_that_cannot_be_named_costs_no_issue(gateway: Sandbox) -> None:
    """An unknown client, python-kis without the HTS id: a sentence. Python-kis' file holds what tokenP answers."""
    export = TokenManager("us").export
    assert "KIS_HTS_ID" in str(raised(lambda: export("python-kis", "there")))
    assert "mojito2, python-kis, kis-auth" in str(raised(lambda: export("pykis", "there")))
    assert (asked(gateway), Path("there").exists()) == (0, False)
    os.environ["KIS_HTS_ID"] = "me"
    (path,) = map(Path, TokenManager("us").export("python-kis", "there"))
    assert re.fullmatch(r"token_real_me_[0-9a-f]{40}\.json", path.name)
    content = json.loads(path.read_text())
    assert sorted(content) == ["access_token", "access_token_token_expired", "expires_in", "token_type"]


@pytest.mark.usefixtures("gateway")
@pytest.mark.parametrize("zone", ["America/New_York", "Pacific/Kiritimati"])
def test_samples_files_speak_the_readers_time(zone: str) -> None:
    """The names are today's and tomorrow's, and the expiry a time, in the zone of the machine, wherever it stands."""
    cached(left=80_000)
    before = datetime.now(ZoneInfo(zone))
    program = "from tokencore import TokenManager; TokenManager('us').export('kis-auth', 'there')"
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "TZ": zone}, check=True)
    names = sorted(path.name for path in Path("there").glob("[!.]*"))
    days = (before, datetime.now(ZoneInfo(zone)))
    assert names in [[f"KIS{day + timedelta(days=n):%Y%m%d}" for n in (0, 1)] for day in days]
    expiry = f"{on_disk().expires_at.astimezone(ZoneInfo(zone)):%Y-%m-%d %H:%M:%S}"
    assert Path("there", names[0]).read_text() == f"token: {on_disk().access_token}\nvalid-date: {expiry}\n"


def test_every_way_to_a_new_token_reaches_the_copies(copies: Path) -> None:
    """A renewal, an import and a renewal of another market of the key: the copies follow."""
    us, kr = TokenManager("us"), TokenManager("kr")
    for way in (us.get_valid_token, lambda: us.adopt(make_token(TWO_DAYS)), lambda: kr.refresh(force=True)):
        before = us.load_token()
        way()
        assert held(copies) == on_disk().access_token != (before and before.access_token)
    assert len(list(copies.iterdir())) == 4


@pytest.mark.parametrize("death", ["deleted", "rejected", "revoked"])
def test_copies_die_with_the_token(death: str, copies: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A token that is deleted, rejected by KIS or revoked is out of the other clients' hands, and the log says so.

    The list of the copies that were written is not needed for it.
    """
    text = (us := TokenManager("us")).get_valid_token()
    next(Path.home().glob(".tokencore/key-*-exports.json")).unlink()
    exports().sync(on_disk())
    if death == "revoked":
        us.revoke()
    elif death == "rejected":
        raised(lambda: us.report_rejected(text))
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
    assert caplog.text.count("is not up to date") == 2
    failed = exports().failures()
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
    "a broken pickle": lambda path: path.write_bytes(b"\x80\x04\x95\xff\xff\xff"),
    "a large file": lambda path: path.write_text(longer() + " " * 70_000),
    "a link": lambda path: path.symlink_to("/etc/hostname"),
    "a FIFO": os.mkfifo,
}


@pytest.mark.parametrize("client", ["mojito2", "kis-auth"])
@pytest.mark.parametrize("put", FOREIGN.values(), ids=FOREIGN)
def test_file_that_holds_no_token_of_the_key_is_never_touched(
    nowhere: Sandbox, tmp_path: Path, put: Callable[[Path], object], client: str
) -> None:
    """Another key's token, notes, damage, what is no file: left as it is, with a sentence that says so."""
    put(path := tmp_path / name_of(client))
    before = snapshot(path)
    error = raised(lambda: TokenManager("us").export(client, str(tmp_path)))
    assert (type(error), f"{path} holds no token of this key" in str(error)) == (ConfigurationError, True)
    assert (snapshot(path), list(tmp_path.glob(".*.tmp")), asked(nowhere)) == (before, [], 0)


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("times", [{"life": -60}, {"exp": None}], ids=["expired", "of unknown expiry"])
def test_what_a_client_wrote_by_itself_makes_room(copies: Path, protocol: int, times: dict[str, Any]) -> None:
    """A token of the key that is dead or tells no expiry, in each client's own form, and an empty file are replaced."""
    old = make_jwt(APP_KEY, **times)
    (copies / "token.dat").write_bytes(pickled(old, protocol))
    content = "" if protocol % 2 else f"token: {old}\nvalid-date: 2026-01-01 00:00:00\n"
    (copies / name_of("kis-auth")).write_text(content)
    text = TokenManager("us").get_valid_token()
    assert held(copies) == text


def as_written_by(client: str, text: str, folder: Path) -> Path:
    """Let a client put a token of its own, as it writes one, in the place of its copy; the file."""
    content = {
        "mojito2": pickled(text),
        "python-kis": json.dumps({"access_token": text, "token_type": "Bearer", "expires_in": TWO_DAYS}).encode(),
        "kis-auth": f"token: {text}\nvalid-date: 2099-01-01 00:00:00\n".encode(),
    }
    (path := next(folder.glob(name_of(client)))).unlink()
    path.write_bytes(content[client])
    return path


@pytest.mark.parametrize("hourly", [False, True], ids=["when KIS rejects ours", "at the hourly check"])
@pytest.mark.parametrize("client", CLIENTS)
def test_newer_token_of_another_client_is_adopted_instead_of_written_over(
    nowhere: Sandbox, copies: Path, client: str, *, hourly: bool
) -> None:
    """A client renewed by itself: its token stays, becomes the key's, and goes into every copy; nothing is issued."""
    cached(17 * 3_600)
    path = as_written_by(client, theirs := longer(), copies)
    exports().sync(on_disk())
    assert theirs.encode() in path.read_bytes()
    assert found() == theirs
    next(other for other in copies.iterdir() if other != path).unlink()
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


@pytest.mark.parametrize("passed", NOT_ADOPTED.values(), ids=NOT_ADOPTED)
def test_token_is_not_adopted_where_it_is_dead_ours_or_another_keys(copies: Path, passed: Callable[[str], str]) -> None:
    """It is passed over: a longer one behind it is found, until KIS rejects that. Nothing acts by being unpickled."""
    other, theirs = passed(TokenManager("us").get_valid_token()), longer()
    (copies / "token.dat").write_bytes(pickled(other))
    assert found() is None
    evil = b"cos\nmkdir\n(V" + b"unpickled\ntRV" + other.encode() + b"\nV" + theirs.encode() + b"\n."
    (copies / "token.dat").write_bytes(b"\x80\x02" + evil)
    assert found() == theirs
    exports().sync(on_disk())
    assert not Path("unpickled").exists()
    TokenManager("us").save_token(make_token(80_000, text=theirs, rejected=True))
    assert found() is None


PINS = Path(__file__).with_name("clients")
DOCS = Path(__file__).resolve().parent.parent / "docs" / "bots.md"
THOROUGH = "TOKENCORE_CLIENTS" in os.environ  # `make clients`
PROCESSES = 32 if THOROUGH else 2
# The libraries know KIS's hosts only, so each is pointed to the gateway where it keeps them.
POINTED = {
    "mojito2": "import mojito\n"
    "mojito.KoreaInvestment.set_base_url = lambda self, mock: setattr(self, 'base_url', os.environ['KIS_BASE_URL'])\n",
    "python-kis": "import pykis.kis\npykis.kis.REAL_DOMAIN = os.environ['KIS_BASE_URL']\n",
}


def blocks(language: str) -> list[str]:
    """The code of the document's blocks of a language."""
    return re.findall(rf"```(?:\w+ )?{language}\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)


def interpreter_with(client: str) -> Path | None:
    """The Python of an environment with `client`, built if need be; None where its packages cannot be had."""
    pins = PINS / f"{client}.txt"
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
        return dict(zip(POINTED, pool.map(interpreter_with, POINTED), strict=True))


def bots(client: str, python: Path, count: int) -> list[subprocess.Popen[str]]:
    """So many processes that run the document's code: the first block, and the second after each line that they get.

    Whatever would go out to KIS's own hosts meets a closed door.
    """
    first, later = (f"{code}\nprint('quoted', flush=True)\n" for code in blocks(client))
    program = f"import os, sys\n{POINTED[client]}{first}\nfor _ in sys.stdin:\n    exec({later!r})\n"
    env = {**os.environ, "HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
    command, pipe = [str(python), "-c", program], subprocess.PIPE
    return [subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True) for _ in range(count)]


def quoted(started: list[subprocess.Popen[str]]) -> bool:
    """Whether all of them have got their quotes."""
    return all(one.stdout is not None and one.stdout.readline() == "quoted\n" for one in started)


@pytest.mark.parametrize("client", POINTED)
def test_client_and_tokencore_use_each_others_token(
    client: str, nowhere: Sandbox, pythons: dict[str, Path | None]
) -> None:
    """A client without a copy issues, and its token is the key's; with one it issues none, at its start and later."""
    if not (python := pythons[client]):
        assert not THOROUGH
        pytest.skip(f"{client} cannot be installed here; `make clients` says why")
    nowhere.set_rules(same_token=0, issue_interval=0)
    exported = f"mojito2:{Path.cwd()},python-kis"
    os.environ |= {"KIS_HTS_ID": "me", "KIS_ISSUE_INTERVAL": "0", "KIS_MARKETS__US__EXPORTS": exported}
    (Path.home() / ".pykis" / "cache").mkdir(parents=True)
    started = bots(client, python, 1)
    assert quoted(started)
    theirs = TokenManager("us").get_valid_token()
    assert TokenManager("kr").get_valid_token() == theirs == on_disk().access_token
    assert asked(nowhere) == 1
    nowhere.kill_tokens()
    assert TokenManager("us").refresh(force=True)
    started += bots(client, python, PROCESSES)
    print("take over", file=started[0].stdin, flush=True)
    assert quoted(started)
    assert (asked(nowhere), nowhere.stats()["quotes_refused"]) == (2, {})
    for one in started:
        one.communicate(timeout=60)


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
