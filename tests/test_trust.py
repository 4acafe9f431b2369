"""Another user of the machine, a cloned repository or what a person types can do tokencore no harm.

Files that another user can change are not used, and no file that tokencore makes is open to others under any umask.
"""

import os
import shlex
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from builders import KEY, ended, fill_disk, in_child, make_jwt
from hypothesis import example, given
from hypothesis import strategies as st
from running import Command, asked, one_line
from servers import Wire
from test_settings import NAMELESS as STRANGER
from test_settings import as_root, dotenv, give_away

from tokencore import ConfigurationError, Key, Settings, TokenManager, TokenStoreError, USTokenManager, open_document
from tokencore.sandbox import APP_KEY, APP_SECRET, Sandbox
from tokencore.stores.permissions import make_private

Door = Callable[[Path], None]

NASTY = "\x1b[2J\x1b]0;x\x07\u202ekcats\u2066\u200f\u2028next\x85\x9b31m\r\nlast\u200b"
VIEW = "us_api_token.json"


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder outside this user's private ones, which other users may enter but not write."""
    with tempfile.TemporaryDirectory(prefix="tokencore-test-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def place(gateway: Sandbox, public: Path, command: Command) -> Path:
    """A token directory with a token, in a folder that other users may enter; KIS has been asked once."""
    folder = public / "mine" / "tokens"
    folder.parent.mkdir(0o755)
    os.environ["KIS_TOKEN_DIR"] = str(folder)
    assert (command("get", "us").code, command("get", "us", "--approval-key").code, asked(gateway)) == (0, 0, 1)
    return folder


@pytest.fixture
def copies(public: Path) -> Path:
    """The folder of another client's files."""
    (public / "copies").mkdir(0o755)
    return public / "copies"


def key_file(folder: Path) -> Path:
    """The key's own file."""
    return next(path for path in folder.glob("key-*.json") if path.name.count("-") == 1)


def plant(folder: Path) -> None:
    """Have a stranger replace our token file, through a directory that is open to everybody for a while."""
    path = key_file(folder)
    program = f"rm {path.name}; umask 022; printf %s {shlex.quote(path.read_text())} > {path.name}"
    folder.chmod(0o777)
    command = ["/bin/sh", "-c", program]
    subprocess.run(command, cwd=folder, user=STRANGER, group=STRANGER, extra_groups=[], env={}, check=True)
    folder.chmod(0o700)


def mode(bits: int, of: Callable[[Path], Path] = Path) -> Door:
    """Return a function that gives a folder, or what `of` finds from it, this mode."""
    return lambda path: of(path).chmod(bits)


def rows(doors: Mapping[str, object]) -> list[Any]:
    """The names as parameters; those about another user need root, who alone can give files away."""
    return [pytest.param(name, marks=as_root if "another user" in name else ()) for name in doors]


# --- the token directory

DOORS = {
    "directory open to all": mode(0o777),
    "directory open to its group": mode(0o770),
    "directory like /tmp": mode(0o1777),
    "directory above open to all": mode(0o777, lambda folder: folder.parent),
    "token open to all": mode(0o666, key_file),
    "token open to its group": mode(0o620, key_file),
    "directory of another user": give_away,
    "directory above of another user": lambda folder: give_away(folder.parent),
    "token of another user": lambda folder: give_away(key_file(folder)),
    "token planted by another user": plant,
}


@pytest.mark.parametrize("door", rows(DOORS))
def test_what_another_user_can_change_is_refused_until_that_is_over(
    place: Path, door: str, gateway: Sandbox, command: Command
) -> None:
    """Commands send nothing and are exit 7 with the repair; metrics are written, and a token in memory serves on."""
    manager = USTokenManager()
    token = manager.get_valid_token()
    DOORS[door](place)
    manager._fresh_until = 0.0  # noqa: SLF001 - a second later
    assert manager.get_valid_token() == token
    ran = command("get", "us")
    assert (ran.code, "nothing was issued" in one_line(ran)) == (7, True)
    with pytest.raises(TokenStoreError, match=r"chmod go-w|chown"):
        USTokenManager().get_valid_token()
    if "directory" in door:
        with pytest.raises(TokenStoreError), open_document(Settings.load(), "incidents").lock(wait=1):
            pass
    advice = shlex.split(ran.err.split("`")[1])
    for line in ("check us", "tick", "delete us", "refresh us --force", *["history us"] * ("directory" in door)):
        assert (line, command(*line.split()).code) == (line, 7)
    assert shlex.join(advice) in " ".join(command("doctor").out.split())
    assert command("metrics", "--textfile", "out.prom").code == 0
    assert 'kis_market_readable{market="us"} 0.0' in Path("out.prom").read_text()
    subprocess.run(advice, check=True)
    assert (command("get", "us").code, asked(gateway)) == (0, 1)


@as_root
@pytest.mark.usefixtures("gateway")
def test_nothing_is_made_in_a_folder_of_another_user(public: Path, command: Command) -> None:
    """A refused `sudo tokencore get us` leaves no folder of root's, which would lock out the user of that home."""
    give_away(public)
    ran = command("get", "us", KIS_TOKEN_DIR=str(public / "tokens"))
    assert (ran.code, f"not {os.geteuid()})" in one_line(ran), list(public.iterdir())) == (7, True, [])


@pytest.mark.parametrize("name", [".jsonl", ".lock", "-approval.json", "-exports.json", VIEW, "us_token_issued_at.dat"])
@pytest.mark.parametrize("open_door", [pytest.param(give_away, marks=as_root), mode(0o666)], ids=["another's", "open"])
def test_no_change_builds_on_a_file_of_another_user(
    place: Path, name: str, open_door: Door, gateway: Sandbox, command: Command
) -> None:
    """A cached token is served, but nothing is issued or deleted; a file that is never read does no harm."""
    place.parent.chmod(0o775)
    key_file(place).chmod(0o644)
    for harmless in (place / f"{VIEW}.aside", place / ".key-0.json.tmp"):
        harmless.touch()
        harmless.chmod(0o666)
    assert command("refresh", "us").code == 4
    path = place / name if name.startswith("us_") else Path(str(key_file(place)).replace(".json", name))
    path.touch()
    open_door(path)
    assert command("get", "us").code == 0
    for line in ("refresh us --force", "delete us", "doctor", *(["get us --approval-key"] * ("approval" in name))):
        ran = command(*line.split())
        assert (line, ran.code, path.name in "".join((ran.out + ran.err).split())) == (line, 7, True)
    assert asked(gateway) == 1


@pytest.mark.parametrize("bits", [0o777, 0o1777, 0o770])
def test_an_open_directory_is_closed_by_the_first_command_while_it_is_empty(
    bits: int, gateway: Sandbox, command: Command
) -> None:
    """A fresh volume that is open to all, has no token and nothing planted; reading leaves it so."""
    folder = Path.home() / ".tokencore"
    folder.mkdir()
    folder.chmod(bits)
    for line, code in (("check", 3), ("get us --no-renew", 3), ("history", 0), ("plan", 0)):
        assert (line, command(*line.split()).code, list(folder.iterdir())) == (line, code, [])
    Path.home().chmod(0o777)
    assert (command("get", "us").code, command("check").code) == (7, 7)
    Path.home().chmod(0o700)
    assert (command("get", "us").code, folder.stat().st_mode & 0o7777, asked(gateway)) == (0, 0o700, 1)


@pytest.mark.usefixtures("gateway")
def test_a_directory_that_cannot_be_looked_into_is_unusable_and_not_empty(tmp_path: Path, command: Command) -> None:
    """Even commands that only read call it unusable and end with 7; `metrics` reports the markets as unreadable."""
    (tmp_path / "file").write_text("")
    os.environ["KIS_TOKEN_DIR"] = str(tmp_path / "file" / "tokens")
    for line in ("get us --no-renew", "check --json", "history", "plan", "tick", "delete us"):
        ran = command(*line.split())
        assert (line, ran.code, "The token directory cannot be used: " in ran.err) == (line, 7, True)
    assert 'kis_market_readable{market="us"} 0.0' in command("metrics").out
    assert command("doctor").code == 7


# --- what tokencore makes


def test_nothing_that_is_made_is_open_to_others(tmp_path: Path, gateway: Sandbox, command: Command) -> None:
    """Under umask 000 all files, copies and new folders are closed to others, and hidden from any git repository."""
    tmp_path.chmod(0o755)
    gateway.set_rules(issue_interval=0)
    top = tmp_path / "top"
    os.environ |= {"KIS_TOKEN_DIR": str(top / "b" / "tokens"), "KIS_ISSUE_INTERVAL": "0"}
    lines = ["get us", "get us --approval-key", "refresh us --force", f"export us --to kis-auth {top}/c/d"]
    before = os.umask(0)
    try:
        for line in (*lines, f"export us --to mojito2 {top}/c/d/deeper"):
            assert command(*line.split()).code == 0, line
        os.environ["KIS_TOKEN_DIR"] = str(top / "e" / "f")
        document = open_document(Settings.load(), "incidents")
        with document.lock(wait=1):
            document.write({"a": 1})
    finally:
        os.umask(before)
    modes = {str(path): stat.S_IMODE(path.stat().st_mode) for path in (top, *top.rglob("*"))}
    assert len(modes) > 20
    assert {path: oct(mode) for path, mode in modes.items() if mode & 0o077} == {}
    assert {str(path.parent.relative_to(top)) for path in top.rglob(".gitignore")} >= {"b/tokens", "c/d"}


def test_a_folder_made_on_a_full_disk_hides_itself_from_git_later(tmp_path: Path) -> None:
    """An empty `.gitignore` would stay, and tokens saved once there is room would show up in the repository around."""
    folder = str(tmp_path / "tokens")

    def full() -> None:
        fill_disk()
        make_private(folder)

    assert ended(in_child(full)) == 0
    make_private(folder)
    assert Path(folder, ".gitignore").read_text(encoding="ascii") == "*\n"


# --- the folders of other clients

FOLDERS: dict[str, tuple[Door, bool]] = {  # how each is opened, and whether it is refused
    "open to all": (mode(0o777), True),
    "of another user": (give_away, True),
    "open to its own group, as the usual umasks leave it": (mode(0o775), False),
    "like /tmp": (mode(0o1777), False),
    "folder above open to all": (mode(0o777, lambda folder: folder.parent), True),
}


@pytest.mark.parametrize("door", rows(FOLDERS))
def test_no_secret_goes_into_a_folder_that_another_user_can_exchange(
    door: str, copies: Path, gateway: Sandbox, command: Command, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the command, which issues nothing, nor a setting writes mojito2's file, as that holds the app secret."""
    open_door, refused = FOLDERS[door]
    open_door(copies)
    ran = command("export", "us", "--to", "mojito2", str(copies))
    assert (ran.code, asked(gateway)) == ((7, 0) if refused else (0, 1))
    assert command("get", "us", KIS_MARKETS__US__EXPORTS=f"mojito2:{copies}").code == 0
    for said in (ran.err, caplog.text):
        assert ([*copies.iterdir()] == [], "find out why, then run `ch" in said) == (refused, refused)


@pytest.mark.parametrize("door", rows(FOLDERS)[:3])
def test_no_token_of_another_user_is_adopted(door: str, copies: Path, gateway: Sandbox, command: Command) -> None:
    """A token in a file that others, beyond its group, can have written is not adopted, however long it lasts."""
    open_door, refused = FOLDERS[door]
    text, now = make_jwt(APP_KEY, life=90_000), datetime.now().astimezone()
    for day in (now, now + timedelta(days=1)):  # in case midnight passes
        path = copies / f"KIS{day:%Y%m%d}"
        path.write_text(f"token: {text}\nvalid-date: 2099-01-01 00:00:00\n")
        open_door(path)
    os.environ["KIS_MARKETS__US__EXPORTS"] = f"kis-auth:{copies}"
    ran = command("get", "us")
    assert (ran.code, ran.out == f"{text}\n", asked(gateway)) == (0, not refused, int(refused))


def test_the_doctor_sends_no_password_where_dotenv_says(command: Command) -> None:
    """The doctor sends there only `.env`'s own password, not the environment's or the one `make up` generated."""
    password = Path.home() / ".tokencore" / "prefect" / "password"
    password.parent.mkdir(parents=True, mode=0o700)
    password.write_text("admin:Canary")
    password.chmod(0o600)
    os.environ |= {"KIS_APP_KEY": APP_KEY, "KIS_APP_SECRET": APP_SECRET}
    with Wire() as thief:
        dotenv(PREFECT_API_URL=f"{thief.url}/api")
        command("doctor", PREFECT_API_AUTH_STRING="admin:Canary", PREFECT_SERVER_API_PORT="1")
        command("doctor")
        assert {b"Authorization" in one for one in thief.requests} == {False}
        dotenv(PREFECT_API_URL=f"{thief.url}/api", PREFECT_API_AUTH_STRING="admin:Canary")
        command("doctor")
        assert b"Authorization: Basic" in thief.requests[-1]


def test_the_doctor_sends_no_password_to_who_listens_in_place_of_a_stopped_server(command: Command) -> None:
    """What `make up` generated is sent to the server's port only while supervisord, which holds the port, is alive."""
    home = Path.home() / ".tokencore" / "prefect"
    home.mkdir(parents=True, mode=0o700)
    (home / "password").touch(0o600)
    (home / "password").write_text("admin:Canary")
    (home / "supervisord.conf").touch(0o600)
    with Wire() as neighbour:
        settings = {"KIS_APP_KEY": APP_KEY, "KIS_APP_SECRET": APP_SECRET}
        settings["PREFECT_SERVER_API_PORT"] = neighbour.url.rpartition(":")[2]
        command("doctor", **settings)
        with socket.socket(socket.AF_UNIX) as supervisord:
            supervisord.bind(str(home / "sock"))
            supervisord.listen()
            command("doctor", **settings)
        assert [b"Authorization" in one for one in neighbour.requests] == [False, True]


# --- what people type


@example(reason=NASTY, by="word " * 100)
@given(reason=st.text(max_size=300), by=st.text(max_size=300))
def test_a_note_is_one_short_printable_line(reason: str, by: str) -> None:
    """Whatever is typed is cut to its length, or refused if any part of it looks like a key."""
    for words in ((f"{reason} for {KEY}", by), (reason, f"{by} for {KEY}")):
        with pytest.raises(ConfigurationError):
            Key.note(*words)
    try:
        kept = Key.note(reason, by)
    except ConfigurationError:
        return
    assert "".join(kept).isprintable()
    assert (len(kept[0]) <= 80, len(kept[1]) <= 40) == (True, True)
    assert kept == Key.note(*kept)


@pytest.mark.usefixtures("gateway")
def test_a_command_keeps_and_repeats_nothing_raw(command: Command) -> None:
    """The record and the messages have what is typed without escape sequences and control characters."""
    assert command("refresh", "us", "--reason", NASTY, "--by", f"김민지{NASTY}").code == 0
    attempt = TokenManager("us").history()[-1]
    assert (attempt.reason, attempt.by) == ("]0;x kcats next last", "김민지 ]0;x kcats next last")
    assert command("history").out.replace("\n", "").isprintable()
    pasted = ("refresh", "us", "--by", f"for {KEY}")
    for wrong in (("refresh", "us", NASTY), (NASTY,), ("get", NASTY), ("export", "us", "--to", NASTY, "x"), pasted):
        said = command(*wrong)
        assert (said.code, KEY in said.err, said.err[:-1].isprintable()) == (2, False, True)
    said = command("get", "us", KIS_TOKEN_DIR="/proc/\x1b[2J\u202ex")
    assert (said.code, "/proc/ x" in said.err, said.err[:-1].isprintable()) == (7, True, True)
