"""Nothing that another user can change is used, and nothing that tokencore makes is open to one, whatever the umask."""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from builders import ended, in_child, make_jwt
from other_users import STRANGER, by_a_stranger, give_away, needs_root, public
from running import Ran, asked, one_line, tokencore

from tokencore import TokenStoreError, USTokenManager, open_document
from tokencore.sandbox import APP_KEY

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokencore.sandbox import Sandbox

    Command = Callable[..., Ran]

__all__ = ["public"]  # a fixture
VIEW = "us_api_token.json"


@pytest.fixture
def place(gateway: Sandbox, public: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A token directory with a token, where other users come by; KIS has been asked once."""
    folder = public / "mine" / "tokens"
    folder.parent.mkdir(0o755)
    monkeypatch.setenv("KIS_TOKEN_DIR", str(folder))
    assert (command("get", "us").code, command("get", "us", "--approval-key").code, asked(gateway)) == (0, 0, 1)
    return folder


def key_file(folder: Path, ending: str = ".json") -> Path:
    """The key's own file with that ending: its token, record or lock."""
    return next(path for path in folder.glob(f"key-*{ending}") if path.name.count("-") == 1)


def plant(folder: Path) -> None:
    """A stranger puts a token in the place of ours, through a directory that everybody may change for a while."""
    path = key_file(folder)
    own = path.read_text(encoding="utf-8")
    folder.chmod(0o777)
    by_a_stranger(f"rm {path.name}; umask 022; printf %s {shlex.quote(own)} > {path.name}", folder)
    folder.chmod(0o700)


ANYONE: dict[str, Callable[[Path], None]] = {
    "directory open to all": lambda folder: folder.chmod(0o777),
    "directory open to its group": lambda folder: folder.chmod(0o770),
    "directory like /tmp": lambda folder: folder.chmod(0o1777),
    "directory above open to all": lambda folder: folder.parent.chmod(0o777),
    "token open to all": lambda folder: key_file(folder).chmod(0o666),
    "token open to its group": lambda folder: key_file(folder).chmod(0o620),
}
STRANGERS: dict[str, Callable[[Path], None]] = {
    "directory of another user": give_away,
    "directory above of another user": lambda folder: give_away(folder.parent),
    "token of another user": lambda folder: give_away(key_file(folder)),
    "token planted by another user": plant,
}
DOORS = [pytest.param(door, id=name) for name, door in ANYONE.items()]
DOORS += [pytest.param(door, id=name, marks=needs_root) for name, door in STRANGERS.items()]


def advice(sentence: str) -> list[str]:
    """The command that the sentence tells to run."""
    return shlex.split(sentence.partition("`")[2].partition("`")[0])


@pytest.mark.parametrize("open_door", DOORS)
def test_what_another_user_can_change_is_refused_until_that_is_over(
    place: Path, open_door: Callable[[Path], None], gateway: Sandbox, command: Command
) -> None:
    """Every command and the library: exit 7 and a sentence, no request; what it says to run makes it work again.

    A textfile of metrics is written all the same, and says that the market cannot be read.
    """
    open_door(place)
    ran = command("get", "us")
    assert (ran.code, "nothing was issued" in one_line(ran)) == (7, True)
    manager = USTokenManager()
    for work in (manager.get_valid_token, manager.load_token, manager.refresh, manager.get_token_status):
        with pytest.raises(TokenStoreError, match=r"chmod go-w|chown"):
            work()
    for line in ("check us", "tick", "delete us", "refresh us --force", "doctor"):
        assert (line, command(*line.split()).code) == (line, 7)
    assert shlex.join(advice(ran.err)) in " ".join(command("doctor").out.split())
    assert command("metrics", "--textfile", "out.prom").code == 0
    assert 'kis_market_readable{market="us"} 0.0' in Path("out.prom").read_text(encoding="utf-8")
    subprocess.run(advice(ran.err), check=True)
    assert (command("get", "us").code, asked(gateway)) == (0, 1)


@pytest.mark.parametrize("name", [".jsonl", ".lock", "-approval.json", "-exports.json", VIEW, "us_token_issued_at.dat"])
@pytest.mark.parametrize(
    "open_door", [pytest.param(give_away, marks=needs_root), lambda path: path.chmod(0o666)], ids=["another's", "open"]
)
def test_no_change_builds_on_a_file_of_another_user(
    place: Path, name: str, open_door: Callable[[Path], None], gateway: Sandbox, command: Command
) -> None:
    """A cached token is served, but nothing is issued or deleted, and the doctor says which file it is.

    No approval key is served from such a file. What is not read anyway harms nothing.
    """
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


@needs_root
def test_a_planted_token_never_reaches_a_program_that_runs(place: Path) -> None:
    """A manager with a token in memory: an opened file changes nothing for it, a planted one is refused."""
    manager = USTokenManager()
    token = manager.get_valid_token()
    key_file(place).chmod(0o666)
    manager._fresh_until = 0.0  # noqa: SLF001 - a second later
    assert manager.get_valid_token() == token
    plant(place)
    manager._fresh_until = 0.0  # noqa: SLF001
    with pytest.raises(TokenStoreError, match="belongs to another user"):
        manager.get_valid_token()


def test_what_others_can_only_read_is_used(place: Path, gateway: Sandbox, command: Command) -> None:
    """Modes that other tools leave, and a folder above that is sticky or open to the owner's own group: served."""
    key_file(place).chmod(0o644)
    place.parent.chmod(0o1777)
    assert command("get", "us").code == 0
    place.parent.chmod(0o775)
    place.chmod(0o755)
    assert (command("get", "us").code, asked(gateway)) == (0, 1)


@needs_root
def test_files_of_root_are_trusted_and_those_of_a_user_not_by_root(place: Path) -> None:
    """A user gets what root has put there for all; who runs as root over a user's directory believes nothing in it."""
    key_file(place).chmod(0o644)
    place.chmod(0o755)
    token = USTokenManager().get_valid_token()

    def as_a_user() -> None:
        os.setgid(STRANGER)
        os.setuid(STRANGER)
        assert USTokenManager().get_valid_token() == token

    assert ended(in_child(as_a_user)) == 0
    for path in (place, *place.iterdir()):
        give_away(path)
    with pytest.raises(TokenStoreError, match=f"another user.*uid {STRANGER}"):
        USTokenManager().get_valid_token()


# --- what tokencore makes


@pytest.mark.usefixtures("gateway")
def test_nothing_that_is_made_is_open_to_others(tmp_path: Path) -> None:
    """With umask 000: the directory, the missing ones above it, every file, the copies and their folders, incidents."""
    tmp_path.chmod(0o755)
    tokens, copies = tmp_path / "a" / "b" / "tokens", tmp_path / "c" / "d" / "copies"
    lines = ["get us", "get us --approval-key", "refresh us --force", f"export us --to kis-auth {copies}"]
    lines += [f"export us --to mojito2 {copies}/deeper"]
    before = os.umask(0)
    try:
        for line in lines:
            assert tokencore(*line.split(), KIS_TOKEN_DIR=str(tokens)).code == 0, line
        document = open_document(str(tmp_path / "e" / "f"), "incidents")
        with document.lock(wait=1):
            document.write({"a": 1})
    finally:
        os.umask(before)
    made = [path for top in ("a", "c", "e") for path in (tmp_path / top, *(tmp_path / top).rglob("*"))]
    modes = {str(path): stat.S_IMODE(path.stat().st_mode) for path in made}
    assert len(modes) > 20
    assert {path: oct(mode) for path, mode in modes.items() if mode & 0o077} == {}


@pytest.mark.usefixtures("gateway")
def test_folders_of_our_own_hide_from_git_and_others_do_not(tmp_path: Path) -> None:
    """Inside somebody's repository: new folders for tokens and copies ignore themselves, its own are left alone."""
    repository = tmp_path / "repository"
    bot, tokens = repository / "bot", str(repository / "tokens")
    bot.mkdir(parents=True)
    (bot / "main.py").touch()
    subprocess.run(["/usr/bin/env", "git", "init", "--quiet", "."], cwd=repository, check=True)
    for line in ("get us", "get us --approval-key", f"export us --to kis-auth {repository}/copies"):
        assert tokencore(*line.split(), KIS_TOKEN_DIR=tokens).code == 0
    assert shown_by_git(repository) == {"bot/main.py"}
    assert tokencore("export", "us", "--to", "mojito2", str(bot), KIS_TOKEN_DIR=tokens).code == 0
    assert shown_by_git(repository) == {"bot/main.py", "bot/token.dat"}
    assert tokencore("get", "us", KIS_TOKEN_DIR=str(bot)).code == 0
    assert "bot/main.py" in shown_by_git(repository)


def shown_by_git(repository: Path) -> set[str]:
    """The files that git would add."""
    command = ["/usr/bin/env", "git", "status", "--porcelain", "-uall"]
    done = subprocess.run(command, cwd=repository, check=True, capture_output=True, text=True)
    return {line[3:] for line in done.stdout.splitlines()}


# --- the folders of other clients


@pytest.fixture
def copies(gateway: Sandbox, public: Path) -> Path:  # noqa: ARG001 - for the settings; the fixture
    """The folder of another client."""
    folder = public / "copies"
    folder.mkdir(0o755)
    return folder


@pytest.mark.parametrize("configured", [True, False], ids=["setting", "command"])
@pytest.mark.parametrize(
    "open_door",
    [
        lambda folder: folder.chmod(0o777),
        lambda folder: folder.parent.chmod(0o777),
        pytest.param(give_away, marks=needs_root),
    ],
    ids=["open", "above", "another's"],
)
def test_no_secret_goes_into_a_folder_that_another_user_can_exchange(
    open_door: Callable[[Path], None], copies: Path, gateway: Sandbox, *, configured: bool
) -> None:
    """mojito2's file holds the app secret: it is not written, the sentence has the command, and nothing was issued."""
    open_door(copies)
    if configured:
        ran = tokencore("get", "us", KIS_MARKETS__US__EXPORTS=f"mojito2:{copies}")
    else:
        ran = tokencore("export", "us", "--to", "mojito2", str(copies))
    assert (ran.code, asked(gateway)) == ((0, 1) if configured else (7, 0))
    assert "cannot be written" in ran.err
    assert "find out why, then run `ch" in ran.err
    assert list(copies.iterdir()) == []


@pytest.mark.parametrize("mode", [0o775, 0o1777], ids=["own group", "like /tmp"])
def test_a_folder_that_only_its_owner_can_exchange_gets_its_copy(mode: int, copies: Path) -> None:
    """Modes of folders that other clients make under the usual umasks."""
    copies.chmod(mode)
    assert tokencore("export", "us", "--to", "mojito2", str(copies)).code == 0


@needs_root
@pytest.mark.parametrize(
    ("spoil", "adopted"),
    [(lambda path: path.chmod(0o664), True), (lambda path: path.chmod(0o666), False), (give_away, False)],
    ids=["own group", "open", "another's"],
)
def test_no_token_of_another_user_is_adopted(
    spoil: Callable[[Path], None], copies: Path, gateway: Sandbox, *, adopted: bool
) -> None:
    """Another client's file that somebody else can have written brings no token, however long that seems to last."""
    text = make_jwt(APP_KEY, life=90_000)
    path = copies / f"KIS{datetime.now().astimezone():%Y%m%d}"
    path.write_text(f"token: {text}\nvalid-date: 2099-01-01 00:00:00\n", encoding="utf-8")
    spoil(path)
    ran = tokencore("get", "us", KIS_MARKETS__US__EXPORTS=f"kis-auth:{copies}")
    assert (ran.code, ran.out == f"{text}\n", asked(gateway)) == (0, adopted, 0 if adopted else 1)
