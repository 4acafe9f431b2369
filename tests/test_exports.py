"""The copies for other clients: their form, which file may be written, and that they live and die with the token."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import pickletools
import re
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

import pytest
from builders import make_jwt, make_token
from running import asked, cached, on_disk, raised

from tokencore import ConfigurationError, Key, Settings, TokenManager
from tokencore.clients.exports import Exports
from tokencore.sandbox import APP_KEY, APP_SECRET
from tokencore.tokens import from_answer

if TYPE_CHECKING:
    from tokencore.sandbox import Sandbox
    from tokencore.tokens import Token

CLIENTS = ("mojito2", "python-kis", "kis-auth")
OTHER_KEY = "PSOtherKey" + "o" * 26
TODAY = f"KIS{datetime.now().astimezone():%Y%m%d}"


def held(folder: Path) -> str:
    """The one token in all the files of a folder, without looking into their forms."""
    contents = [path.read_bytes() for path in folder.iterdir()]
    text: bytes = min((text for content in contents for text in re.findall(rb"eyJ[\w.-]+", content)), key=len)
    assert all(text in content for content in contents)  # behind it a pickle goes on
    return text.decode()


def pickled(text: str, protocol: int = 4, **more: object) -> bytes:
    """What mojito2 writes by itself for a token."""
    return pickle.dumps({"access_token": text, "api_key": APP_KEY, "api_secret": APP_SECRET, **more}, protocol)


def issued_elsewhere(life: float = 90_000, key: str = APP_KEY) -> str:
    """A token that another program has just been issued with the key, and which lasts longer than a day."""
    return make_jwt(key, life=life)


def exports_of(market: str = "us") -> Exports:
    """The exports of the key of a market."""
    (key,) = [one for one in Key.load(Settings.load()) if market in [own.name for own in one.markets]]
    return Exports(key.markets, key.store)


@pytest.fixture
def copies(tmp_path: Path, nowhere: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that us copies its token to, for all three clients; KIS hands no token out twice."""
    nowhere.set_rules(same_token=0, issue_interval=0)
    made = tmp_path / "copies"
    made.mkdir()
    monkeypatch.setenv("KIS_HTS_ID", "me")
    monkeypatch.setenv("KIS_ISSUE_INTERVAL", "0")
    monkeypatch.setenv("KIS_MARKETS__US__EXPORTS", ",".join(f"{client}:{made}" for client in CLIENTS))
    return made


def test_mojito2s_file_is_plain_data_of_an_old_protocol(gateway: Sandbox) -> None:
    """The pickle names no class, says protocol 2, and has what mojito2 compares: key, secret, epoch of the expiry."""
    assert TokenManager("us").export("mojito2", "there") == [str(Path("there/token.dat").absolute())]
    content = Path("there/token.dat").read_bytes()
    codes = [(code.name, argument) for code, argument, _ in pickletools.genops(content)]
    assert codes[0] == ("PROTO", 2)
    assert {"GLOBAL", "REDUCE", "INST", "BUILD"} & {name for name, _ in codes} == set()
    values = [argument for _, argument in codes]
    assert {APP_KEY, APP_SECRET, int(on_disk().expires_at.timestamp()), on_disk().access_token} <= set(values)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (Path("there"), Path("there/token.dat"))] == [0o700, 0o600]
    assert asked(gateway) == 1


def test_python_kis_file_is_what_tokenp_answers(gateway: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name has the environment, the HTS id and a digest; its expiry is in KST; the app secret is not in it."""
    assert "KIS_HTS_ID" in str(raised(lambda: TokenManager("us").export("python-kis", "there")))
    monkeypatch.setenv("KIS_HTS_ID", "me")
    (path,) = map(Path, TokenManager("us").export("python-kis", "there"))
    content = json.loads(path.read_text())
    assert re.fullmatch(r"token_real_me_[0-9a-f]{40}\.json", path.name)
    assert sorted(content) == ["access_token", "access_token_token_expired", "expires_in", "token_type"]
    expiry = datetime.fromisoformat(content["access_token_token_expired"] + "+09:00")
    assert timedelta(0) <= on_disk().expires_at - expiry < timedelta(seconds=1)
    assert 86_000 < content["expires_in"] <= 86_400
    assert asked(gateway) == 1


@pytest.mark.usefixtures("gateway")
@pytest.mark.parametrize("zone", ["Asia/Seoul", "America/New_York", "Pacific/Kiritimati"])
def test_samples_files_speak_the_readers_time(zone: str) -> None:
    """The names are today's and tomorrow's, and the expiry a time, in the zone of the machine, wherever it stands."""
    cached(left=80_000)
    before = datetime.now(ZoneInfo(zone))
    program = "from tokencore import TokenManager; TokenManager('us').export('kis-auth', 'there')"
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "TZ": zone}, check=True)
    names = sorted(path.name for path in Path("there").glob("[!.]*"))
    days = (before, datetime.now(ZoneInfo(zone)))
    assert names in [[f"KIS{day + timedelta(days=n):%Y%m%d}" for n in (0, 1)] for day in days]
    lines = Path("there", names[0]).read_text().splitlines()
    expiry = f"{on_disk().expires_at.astimezone(ZoneInfo(zone)):%Y-%m-%d %H:%M:%S}"
    assert lines == [f"token: {on_disk().access_token}", f"valid-date: {expiry}"]


def test_every_way_to_a_new_token_reaches_the_copies(copies: Path) -> None:
    """A renewal, `save_token`, an import and a renewal of another market of the key: the copies follow, mode 0600."""
    us, kr = TokenManager("us"), TokenManager("kr")
    us.get_valid_token()
    seen = [held(copies)]
    us.refresh(force=True)
    seen.append(held(copies))
    us.save_token(make_token(90_000, text=issued_elsewhere(90_000)))
    seen.append(held(copies))
    us.adopt(make_token(95_000, text=issued_elsewhere(95_000)))
    seen.append(held(copies))
    kr.refresh(force=True)
    seen.append(held(copies))
    assert seen[-1] == on_disk().access_token == kr.get_valid_token()
    assert len(set(seen)) == 5
    assert [stat.S_IMODE(path.stat().st_mode) for path in copies.iterdir()] == [0o600] * 4


@pytest.mark.parametrize("death", ["deleted", "rejected", "revoked"])
def test_copies_die_with_the_token(death: str, copies: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A token that is deleted, rejected by KIS or revoked is out of the other clients' hands, and the log says so."""
    us = TokenManager("us")
    text = us.get_valid_token()
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
    copies: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A missing folder and a file that is none of ours are logged and kept for the doctor; the rest goes on."""
    foreign = copies / "token.dat"
    foreign.write_text("somebody's notes")
    monkeypatch.setenv("KIS_MARKETS__US__EXPORTS", f"kis-auth:{copies}/missing,mojito2:{copies},kis-auth:{copies}")
    text = TokenManager("us").get_valid_token()
    assert foreign.read_text() == "somebody's notes"
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2
    failed = exports_of().failures()
    assert list(failed) == [f"kis-auth:{copies}/missing", f"mojito2:{copies}"]
    assert (
        "cannot be written, and the token is untouched: No such file or directory"
        in failed[f"kis-auth:{copies}/missing"]
    )
    assert "holds no token of this key" in failed[f"mojito2:{copies}"]
    foreign.unlink()
    (copies / "missing").mkdir()
    exports_of().sync(on_disk())
    assert exports_of().failures() == {}
    (copies / "missing" / TODAY).rename(copies / "another")
    for path in (copies / "missing").iterdir():
        path.unlink()
    (copies / "missing").rmdir()
    assert held(copies) == text


def foreign_files(path: Path) -> dict[str, Any]:
    """What another program may have in the place of a client's file, each with what makes it."""
    text = issued_elsewhere(key=OTHER_KEY)
    return {
        "another key's token": lambda: path.write_text(f"token: {text}\n"),
        "another key's pickle": lambda: path.write_bytes(pickled(text)),
        "both keys": lambda: path.write_text(f"token: {text}\nold: {issued_elsewhere()}\n"),
        "notes": lambda: path.write_text(f"my key is {APP_KEY}"),
        "a pickle of nothing": lambda: path.write_bytes(pickle.dumps([1, 2])),
        "a broken pickle": lambda: path.write_bytes(b"\x80\x04\x95\xff\xff\xff"),
        "a large file": lambda: path.write_text(issued_elsewhere() + " " * 70_000),
        "a folder": path.mkdir,
        "a link": lambda: path.symlink_to("/etc/hostname"),
        "a FIFO": lambda: os.mkfifo(path),
    }


@pytest.mark.parametrize("name", foreign_files(Path()))
@pytest.mark.parametrize("client", ["mojito2", "kis-auth"])
def test_file_that_holds_no_token_of_the_key_is_never_touched(
    nowhere: Sandbox, tmp_path: Path, name: str, client: str
) -> None:
    """Another key's token, notes, damage, what is no file: left as it is, with a sentence that says so."""
    path = tmp_path / ("token.dat" if client == "mojito2" else TODAY)
    foreign_files(path)[name]()
    before = path.lstat()
    error = raised(lambda: TokenManager("us").export(client, str(tmp_path)))
    assert isinstance(error, ConfigurationError)
    assert f"{path} holds no token of this key" in str(error)
    assert (path.lstat().st_ino, path.lstat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not list(tmp_path.glob(".*.tmp"))
    assert asked(nowhere) == 0


@pytest.mark.parametrize("protocol", range(2, 6))
def test_what_a_client_wrote_by_itself_makes_room(nowhere: Sandbox, copies: Path, protocol: int) -> None:
    """An expired token of the key, in each client's own form, and an empty file are written over."""
    old = make_jwt(APP_KEY, life=-60)
    (copies / "token.dat").write_bytes(pickled(old, protocol))
    (copies / TODAY).write_text("" if protocol % 2 else f"token: {old}\nvalid-date: 2026-01-01 00:00:00\n")
    TokenManager("us").get_valid_token()
    assert held(copies) == on_disk().access_token
    (python_kis,) = copies.glob("token_*.json")
    python_kis.write_text("{half")  # its name has the key's digest
    exports_of().sync(on_disk())
    assert held(copies) == on_disk().access_token
    assert asked(nowhere) == 1


@pytest.mark.parametrize("client", CLIENTS)
def test_newer_token_of_another_client_is_adopted_instead_of_written_over(
    nowhere: Sandbox, copies: Path, client: str
) -> None:
    """A client renewed by itself: its token, which lasts longer, stays, becomes the key's, and nothing is issued."""
    TokenManager("us").save_token(make_token(age=17 * 3_600))
    theirs = _as_written_by(client, issued_elsewhere(), copies)
    exports_of().sync(on_disk())
    assert theirs in _file_of(client, copies).read_bytes().decode("latin-1")
    found = exports_of().found(datetime.now(UTC))
    assert found is not None
    assert (found.access_token, found.expires_at > on_disk().expires_at) == (theirs, True)
    TokenManager("us").report_rejected(on_disk().access_token)  # KIS let the one before die
    assert TokenManager("kr").get_valid_token() == theirs == held(copies)
    assert asked(nowhere) == 0


def _file_of(client: str, folder: Path) -> Path:
    return next(folder.glob({"mojito2": "token.dat", "python-kis": "token_*.json", "kis-auth": TODAY}[client]))


def _as_written_by(client: str, text: str, folder: Path) -> str:
    token: Token = from_answer({"access_token": text}, datetime.now(UTC))
    content = {
        "mojito2": pickled(text, timestamp=int(token.expires_at.timestamp())),
        "python-kis": json.dumps({"access_token": text, "token_type": "Bearer", "expires_in": 90_000}).encode(),
        "kis-auth": f"token: {text}\nvalid-date: {token.expires_at:%Y-%m-%d %H:%M:%S}\n".encode(),
    }
    path = _file_of(client, folder)
    path.unlink()
    path.write_bytes(content[client])
    return text


def test_token_is_not_adopted_where_it_is_dead_ours_or_another_keys(nowhere: Sandbox, copies: Path) -> None:
    """The one that KIS rejected, an expired one, one that ends sooner, another key's and our own are not found."""
    us = TokenManager("us")
    text = us.get_valid_token()
    other = copies / "token.dat"
    assert exports_of().found(datetime.now(UTC)) is None
    for theirs in (text, make_jwt(APP_KEY, life=-60), make_jwt(APP_KEY, life=600), issued_elsewhere(key=OTHER_KEY)):
        other.write_bytes(pickled(theirs))
        assert exports_of().found(datetime.now(UTC)) is None
    raised(lambda: us.report_rejected(text))
    other.write_bytes(pickled(text, 5))
    assert exports_of().found(datetime.now(UTC)) is None
    assert exports_of().found(datetime.now(UTC) + timedelta(days=3)) is None
    assert asked(nowhere) == 1
    longer = issued_elsewhere()  # than we take it to live, as KIS's answer said less, or our clock is slow
    us.save_token(make_token(80_000, text=longer, rejected=True))
    other.write_bytes(pickled(longer, 5))
    assert exports_of().found(datetime.now(UTC)) is None


class Evil:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("unpickled",)


def test_nothing_is_ever_unpickled(nowhere: Sandbox, copies: Path) -> None:
    """A pickle that acts when it is loaded does not, whoever looks for a token in it or writes beside it."""
    (copies / "token.dat").write_bytes(pickle.dumps([Evil(), issued_elsewhere(), APP_KEY]))
    assert exports_of().found(datetime.now(UTC)) is not None
    with contextlib.suppress(ConfigurationError):
        TokenManager("us").export("mojito2", str(copies))
    assert not Path("unpickled").exists()
    assert asked(nowhere) <= 1


def test_mojito2s_copy_in_the_token_directory_is_off_by_default(
    nowhere: Sandbox, monkeypatch: pytest.MonkeyPatch, isolated: Path
) -> None:
    """`us_krs_token.dat` holds the app secret: it is there only when the market's setting names mojito2."""
    krs = isolated / ".tokencore" / "us_krs_token.dat"
    text = TokenManager("us").get_valid_token()
    assert not krs.exists()
    monkeypatch.setenv("KIS_MARKETS__US__EXPORTS", '["mojito2"]')
    TokenManager("us").save_token(on_disk())
    assert text.encode() in krs.read_bytes()
    assert asked(nowhere) == 1


def test_samples_files_of_past_days_are_cleared_away(copies: Path) -> None:
    """A copy of ours for an earlier day goes, as even an expired token reveals the app key; what others wrote stays."""
    others = copies / "KIS20200102"
    others.write_text(f"token: {make_jwt(APP_KEY, life=600)}\n")
    renew = "from tokencore import TokenManager; TokenManager('us').refresh(force=True)"
    for zone in ("Pacific/Midway", "Pacific/Kiritimati"):  # it is always a later day there
        subprocess.run([sys.executable, "-c", renew], env={**os.environ, "TZ": zone}, check=True)
    day = datetime.now(ZoneInfo("Pacific/Midway"))
    assert others.exists()
    assert not (copies / f"KIS{day:%Y%m%d}").exists()


def test_token_that_names_no_key_is_copied_too(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should KIS change its tokens' form, what was written before is known by its digest, and nothing else is."""
    monkeypatch.setenv("KIS_MARKETS__US__EXPORTS", f"kis-auth:{copies}")
    for text in ("opaque-1", "opaque-2"):
        TokenManager("us").save_token(make_token(text=text))
        assert {path.read_text().split()[1] for path in copies.iterdir()} == {text}
    for path in copies.iterdir():
        path.write_text("token: opaque-3\n")
    TokenManager("us").save_token(make_token(text="opaque-4"))
    assert {path.read_text().split()[1] for path in copies.iterdir()} == {"opaque-3"}


def test_copies_that_the_previous_version_wrote_go_on(copies: Path, isolated: Path) -> None:
    """Its list of digests is not read: a copy with the present token is taken over and goes with it."""
    text = TokenManager("us").get_valid_token()
    document = next((isolated / ".tokencore").glob("key-*-exports.json"))
    document.unlink()
    exports_of().sync(on_disk())
    assert held(copies) == text
    TokenManager("us").revoke()
    assert list(copies.iterdir()) == []


def test_hourly_check_adopts_what_another_client_has_issued_and_writes_what_is_missing(
    copies: Path, nowhere: Sandbox
) -> None:
    """A token that lasts longer than the present one, which serves, becomes the key's and goes into every copy."""
    cached(17 * 3_600)
    theirs = _as_written_by("mojito2", issued_elsewhere(), copies)
    next(copies.glob("token_*.json")).unlink()
    (key,) = Key.load(Settings.load())
    key.sync_exports()
    assert on_disk().access_token == theirs == held(copies)
    assert len(list(copies.iterdir())) == 4
    assert [attempt.outcome for attempt in TokenManager("us").history()] == ["imported"]
    assert asked(nowhere) == 0


def test_mistake_in_the_client_is_named(nowhere: Sandbox) -> None:
    """An unknown client is refused with the known ones, before anything is issued."""
    assert "mojito2, python-kis, kis-auth" in str(raised(lambda: TokenManager("us").export("pykis", "there")))
    assert (asked(nowhere), Path("there").exists()) == (0, False)
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(exports_of())
