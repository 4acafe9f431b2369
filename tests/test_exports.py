"""The copies for other clients: their form, which file may be written, and that they live and die with the token."""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

import pytest
from builders import make_jwt, make_token
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
