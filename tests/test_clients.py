"""Other clients: the copies of the token that they read, and the clients themselves with the code of docs/bots.md.

mojito2 and python-kis are the real packages with exact pins, each in its own virtual environment, built once inside
the one that runs the tests; `make clients` starts more processes. The official sample is not published as a package.
"""

import contextlib
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
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from builders import make_jwt, make_token
from filelock import FileLock
from running import Ran, asked, cached, folder, on_disk, raised, snapshot

from tokencore import ConfigurationError, Key, Settings, TokenManager
from tokencore.clients.exports import Exports
from tokencore.sandbox import APP_KEY, APP_SECRET, Sandbox
from tokencore.tokens import from_text, jwt_claims

OTHER_KEY = "PSOtherKey" + "o" * 26
TWO_DAYS = 2 * 86_400
pytestmark = pytest.mark.usefixtures("gateway")


def name_of(client: str) -> str:
    """Return today's name of the client's file; python-kis looks for the SHA-1 of "pykis", HTS id, key and secret."""
    today, digest = f"KIS{datetime.now().astimezone():%Y%m%d}", "c8006c84dca926a62d8b7dde58e23d5aa0899324"
    return {"mojito2": "token.dat", "python-kis": f"token_real_me_{digest}.json", "kis-auth": today}[client]


def held(folder: Path) -> str:
    """Return the one token that all files of a folder hold, whatever their format."""
    contents = [path.read_bytes() for path in folder.iterdir()]
    text: bytes = min((text for content in contents for text in re.findall(rb"eyJ[\w.-]+", content)), key=len)
    assert all(text in content for content in contents)  # in a pickle, more word characters follow
    return text.decode()


def pickled(text: str, protocol: int = 4) -> bytes:
    """Return what mojito2 itself writes for a token."""
    return pickle.dumps({"access_token": text, "api_key": APP_KEY, "api_secret": APP_SECRET}, protocol)


def longer(key: str = APP_KEY) -> str:
    """Return a token of the key that another program has just been issued, and that lasts longer than ours."""
    return make_jwt(key, life=TWO_DAYS)


def exports() -> Exports:
    """Return the exports of the only key."""
    (key,) = Key.load(Settings.load())
    return Exports(key.markets, key.store)


def found() -> str:
    """Return the key's token that another client has, if it outlasts ours, or an empty string."""
    token = exports().found(datetime.now(UTC))
    return token.access_token if token else ""


@pytest.fixture
def copies(tmp_path: Path, nowhere: Sandbox) -> Path:
    """A folder to which us copies its token for all three clients; KIS issues a new token each time."""
    nowhere.set_rules(same_token=0, issue_interval=0)
    (made := tmp_path / "copies").mkdir()
    wanted = ",".join(f"{client}:{made}" for client in ("mojito2", "python-kis", "kis-auth"))
    os.environ |= {"KIS_HTS_ID": "me", "KIS_ISSUE_INTERVAL": "0", "KIS_MARKETS__US__EXPORTS": wanted}
    return made


def test_mojito2s_file_is_plain_data_and_off_by_default(nowhere: Sandbox) -> None:
    """mojito2's file, which holds the app secret, is written only where a setting asks; wrong exports issue nothing."""
    export, krs = (us := TokenManager("us")).export, Path.home() / ".tokencore" / "us_krs_token.dat"
    assert "KIS_HTS_ID" in str(raised(lambda: export("python-kis", "there")))
    assert "mojito2, python-kis, kis-auth" in str(raised(lambda: export("pykis", "there")))
    assert (asked(nowhere), Path("there").exists()) == (0, False)
    us.get_valid_token()
    assert not krs.exists()
    os.environ["KIS_MARKETS__US__EXPORTS"] = '["mojito2"]'
    TokenManager("us").save_token(on_disk())
    codes = {code.name for code, _, _ in pickletools.genops(krs.read_bytes())}
    assert not {"GLOBAL", "STACK_GLOBAL", "REDUCE", "INST", "BUILD"} & codes


def test_export_prints_the_paths_and_says_which_file_holds_the_secret(command: Callable[..., Ran]) -> None:
    """Standard output has the paths only; standard error says that mojito2's file also holds the app secret."""
    for client, told in (("mojito2", "tokencore: that file holds the app secret"), ("kis-auth", "")):
        ran = command("export", "us", "--to", client, f"for-{client}")
        assert (ran.code, ran.err.partition(" too")[0]) == (0, told)
        there = Path(f"for-{client}").resolve().glob("[!.]*")
        assert sorted(ran.out.split()) == sorted(map(str, there))


def test_export_needs_no_lock_where_there_can_be_none(nowhere: Sandbox) -> None:
    """Beside a token directory that is mounted read-only, a bot still gets its copy of a valid token."""
    text = TokenManager("us").get_valid_token()
    (lock,) = folder().glob("key-*.lock")
    lock.unlink()
    lock.mkdir()
    Path("there").mkdir()
    TokenManager("us").export("kis-auth", "there")
    assert held(Path("there")) == text
    assert asked(nowhere) == 1


def test_export_from_a_folder_that_is_gone_asks_for_an_absolute_path(command: Callable[..., Ran]) -> None:
    """If the current folder has been removed, a relative folder is a sentence and exit 2, not an unexpected error."""
    (gone := Path("gone").absolute()).mkdir()
    with contextlib.chdir(gone):
        gone.rmdir()
        ran = command("export", "us", "--to", "kis-auth", "there")
    assert (ran.code, ran.out, "there is relative" in ran.err, "absolute path" in ran.err) == (2, "", True, True)


@pytest.mark.parametrize("zone", ["America/New_York", "Pacific/Kiritimati"])
def test_samples_files_speak_the_readers_time(zone: str) -> None:
    """The sample's files are named for today and tomorrow and give the expiry, all in the machine's time zone."""
    cached(left=80_000)
    before = datetime.now(ZoneInfo(zone))
    program = "from tokencore import TokenManager; TokenManager('us').export('kis-auth', 'there')"
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "TZ": zone}, check=True)
    names = sorted(path.name for path in Path("there").glob("[!.]*"))
    days = (before, datetime.now(ZoneInfo(zone)))
    assert names in [[f"KIS{day + timedelta(days=n):%Y%m%d}" for n in (0, 1)] for day in days]
    expiry = f"{on_disk().expires_at.astimezone(ZoneInfo(zone)):%Y-%m-%d %H:%M:%S}"
    assert Path("there", names[0]).read_text() == f"token: {on_disk().access_token}\nvalid-date: {expiry}\n"


@pytest.mark.parametrize("death", ["deleted", "rejected", "revoked"])
def test_copies_die_with_the_token(death: str, copies: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once a token is deleted, rejected or revoked, its copies are removed from all clients, and the log says so."""
    text = (us := TokenManager("us")).get_valid_token()
    next(Path.home().glob(".tokencore/key-*-exports.json")).unlink()
    exports().sync(on_disk())
    if death == "revoked":
        us.revoke()
    elif death == "rejected":
        raised(lambda: us.report_rejected(text))
    else:
        us.delete_token()
        assert held(copies) == text  # the key's token is still there for kr
        TokenManager("kr").delete_token()
    assert list(copies.iterdir()) == []
    assert sum("Removed the copy" in message for message in caplog.messages) == 4


def test_what_fails_harms_neither_the_token_nor_the_other_copies(
    copies: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A missing folder or a foreign file is logged and kept for the doctor; the token and other copies are written."""
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
    assert (exports().failures(), held(copies), held(missing)) == ({}, text, text)
    for number in range(2):  # the second lasts as long as the first
        TokenManager("us").save_token(from_text(make_jwt(APP_KEY, exp=2**32, number=number))[0])
        assert held(copies) == on_disk().access_token


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
    """Another key's token, notes, a damaged file or anything but a file is left as it is, and an error says so."""
    put(path := tmp_path / name_of(client))
    before = snapshot(path)
    error = raised(lambda: TokenManager("us").export(client, str(tmp_path)))
    assert (type(error), f"{path} holds no token of this key" in str(error)) == (ConfigurationError, True)
    assert (snapshot(path), list(tmp_path.glob(".*.tmp")), asked(nowhere)) == (before, [], 0)


WRITTEN: dict[str, Callable[[str], bytes]] = {
    "mojito2": pickled,
    "python-kis": lambda text: json.dumps({"access_token": text, "expires_in": TWO_DAYS}).encode(),
    "kis-auth": lambda text: f"token: {text}\nvalid-date: 2099-01-01 00:00:00\n".encode(),
}


@pytest.mark.parametrize("hourly", [False, True], ids=["when KIS rejects ours", "at the hourly check"])
@pytest.mark.parametrize("client", WRITTEN)
def test_newer_token_of_another_client_is_adopted_instead_of_written_over(
    nowhere: Sandbox, copies: Path, client: str, *, hourly: bool
) -> None:
    """If a client has renewed by itself, its token becomes the key's and goes into every copy; nothing is issued."""
    cached(17 * 3_600)
    (path := copies / name_of(client)).write_bytes(WRITTEN[client](theirs := longer()))
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


@pytest.mark.parametrize("client", WRITTEN)
def test_the_first_export_takes_over_the_clients_own_token(nowhere: Sandbox, tmp_path: Path, client: str) -> None:
    """Who moves from another client to tokencore issues nothing: the token in its file becomes the key's."""
    os.environ["KIS_HTS_ID"] = "me"
    for theirs in (make_jwt(APP_KEY, life=7_200), longer()):  # first there is none, then a shorter one
        (path := tmp_path / name_of(client)).write_bytes(WRITTEN[client](theirs))
        assert str(path) in TokenManager("us").export(client, str(tmp_path))
        assert theirs == TokenManager("kr").get_valid_token()
        assert theirs.encode() in path.read_bytes()
    assert asked(nowhere) == 0


def test_our_own_copy_of_an_earlier_token_is_no_other_clients(copies: Path) -> None:
    """A shorter token imported by force also replaces the longer one in our copies, and is not replaced by it again."""
    TokenManager("us").get_valid_token()
    shorter = make_token(80_000, text=make_jwt(APP_KEY, life=80_000))
    assert TokenManager("us").adopt(shorter, force=True, proven=True)
    Key.load(Settings.load())[0].sync_exports()
    assert on_disk().access_token == shorter.access_token == held(copies)


NOT_ADOPTED: dict[str, tuple[int, Callable[[str], str]]] = {
    "our own": (2, lambda ours: ours),
    "expired": (3, lambda _: make_jwt(APP_KEY, life=-60)),
    "shorter": (4, lambda _: make_jwt(APP_KEY, life=600)),
    "of unknown expiry": (5, lambda _: make_jwt(APP_KEY, exp=None)),
    "another key's": (5, lambda _: longer(OTHER_KEY)),
}


@pytest.mark.parametrize(("protocol", "passed"), NOT_ADOPTED.values(), ids=NOT_ADOPTED)
def test_token_is_not_adopted_where_it_is_dead_ours_or_another_keys(
    copies: Path, protocol: int, passed: Callable[[str], str]
) -> None:
    """A useless token of the key is overwritten, a longer one is found until KIS rejects it, and nothing unpickled."""
    other, theirs = passed(ours := TokenManager("us").get_valid_token()), longer()
    (copies / "token.dat").write_bytes(pickled(other, protocol))
    (copies / name_of("kis-auth")).write_text("")
    assert not found()
    exports().sync(on_disk())
    foreign = jwt_claims(other)["jti"] != APP_KEY
    kept = [path.name for path in copies.iterdir() if ours.encode() not in path.read_bytes()]
    assert (kept, bool(exports().failures())) == (["token.dat"] * foreign, foreign)
    evil = b"cos\nmkdir\n(V" + b"unpickled\ntRV" + other.encode() + b"\nV" + theirs.encode() + b"\n."
    (copies / "token.dat").write_bytes(b"\x80\x02" + evil)
    assert found() == theirs
    exports().sync(on_disk())
    assert not Path("unpickled").exists()
    TokenManager("us").save_token(make_token(80_000, text=theirs, rejected=True))
    assert not found()


PINS = Path(__file__).with_name("clients")
DOCS = Path(__file__).resolve().parent.parent / "docs" / "bots.md"
THOROUGH = "TOKENCORE_CLIENTS" in os.environ  # `make clients`
PROCESSES = 32 if THOROUGH else 1
# The libraries have KIS's hosts built in, so these lines replace them with the gateway's address.
POINTED = {
    "mojito2": "import mojito\n"
    "mojito.KoreaInvestment.set_base_url = lambda self, mock: setattr(self, 'base_url', os.environ['KIS_BASE_URL'])\n",
    "python-kis": "import pykis.kis\npykis.kis.REAL_DOMAIN = os.environ['KIS_BASE_URL']\n",
}


def blocks(language: str) -> list[str]:
    """Return the code of the document's blocks in that language."""
    return re.findall(rf"```(?:\w+ )?{language}\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)


def interpreter_with(client: str) -> Path | None:
    """Return the Python of an environment with `client`, built if needed, or None if that cannot be installed."""
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


def bots(client: str, python: Path, count: int) -> list[subprocess.Popen[str]]:
    """Start `count` processes that run the document's first block, then its second per line; KIS is blocked."""
    first, later = (f"{code}\nprint('quoted', flush=True)\n" for code in blocks(client))
    program = f"import os, sys\n{POINTED[client]}{first}\nfor _ in sys.stdin:\n    exec({later!r})\n"
    env = {**os.environ, "HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
    command, pipe = [str(python), "-c", program], subprocess.PIPE
    return [subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True) for _ in range(count)]


def quoted(started: list[subprocess.Popen[str]]) -> bool:
    """Return whether each process has got its quote."""
    return all(one.stdout and one.stdout.readline() == "quoted\n" for one in started)


@pytest.mark.parametrize("client", POINTED)
def test_client_and_tokencore_use_each_others_token(client: str, nowhere: Sandbox) -> None:
    """A client without a copy issues, and we adopt its token; with a copy it never issues, at its start or later."""
    if not (python := interpreter_with(client)):
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
    assert TokenManager("kr").refresh(force=True)
    started += bots(client, python, PROCESSES)
    print("take over", file=started[0].stdin, flush=True)
    assert quoted(started)
    assert (asked(nowhere), nowhere.stats()["quotes_refused"]) == (2, {})
    for one in started:
        one.communicate(timeout=60)


@pytest.mark.parametrize(
    "program",
    [
        *([sys.executable, "-c", code] for code in blocks("requests")),
        *(["/bin/sh", "-euc", code] for code in blocks("sh")),
        *(["node", "-e", code] for code in blocks("js")),
    ],
    ids=lambda one: Path(one[0]).name,
)
def test_code_that_needs_no_client_runs(program: list[str], gateway: Sandbox, tmp_path: Path) -> None:
    """The document's code for plain requests gets its quote, and its commands run; so does Node's if Node is there."""
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
