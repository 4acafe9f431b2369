"""The copies for other clients: their form, who may have which file, and that they live and die with the token."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import pickle
import pickletools
import re
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

import pytest
from builders import make_jwt, make_token
from running import asked, cached, on_disk, one_line, tokencore

from flows.check_tokens import follow
from tokencore import ConfigurationError, TokenManager, exports
from tokencore.sandbox import APP_KEY, APP_SECRET

if TYPE_CHECKING:
    from collections.abc import Callable

    from running import Ran

    from tokencore.sandbox import Sandbox

CLIENTS = ("mojito2", "python-kis", "kis-auth")
OTHER_KEY = "PSOtherKey" + "o" * 26


def held(folder: Path) -> str:
    """The one token in all the files of a folder, without looking into their forms."""
    contents = [path.read_bytes() for path in folder.iterdir()]
    text: bytes = min((text for content in contents for text in re.findall(rb"eyJ[\w.-]+", content)), key=len)
    assert all(text in content for content in contents)  # behind it a pickle goes on
    return text.decode()


def modes(folder: Path) -> set[int]:
    """The modes of all files of a folder."""
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


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


def test_mojito2s_file_is_plain_data_of_an_old_protocol(gateway: Sandbox, command: Callable[..., Ran]) -> None:
    """The pickle names no class, says protocol 2, and has what mojito2 compares: key, secret, epoch of the expiry."""
    ran = command("export", "us", "--to", "mojito2", "there")
    content = Path("there/token.dat").read_bytes()
    codes = [(code.name, argument) for code, argument, _ in pickletools.genops(content)]
    assert codes[0] == ("PROTO", 2)
    assert {"GLOBAL", "REDUCE", "INST", "BUILD"} & {name for name, _ in codes} == set()
    values = [argument for _, argument in codes]
    assert {APP_KEY, APP_SECRET, int(on_disk().expires_at.timestamp()), on_disk().access_token} <= set(values)
    assert ran.out == f"{Path('there/token.dat').absolute()}\n"
    assert "app secret" in ran.err
    assert modes(Path("there")) == {0o600}
    assert asked(gateway) == 1


def test_a_folder_without_a_name_is_not_the_working_directory(gateway: Sandbox, command: Callable[..., Ran]) -> None:
    """A shell's unset variable is an empty argument: no app secret is written to wherever the shell stands."""
    ran = command("export", "us", "--to", "mojito2", "")
    assert (ran.code, ran.out) == (2, "")
    assert "DIR is empty" in ran.err
    assert not Path("token.dat").exists()
    assert asked(gateway) == 0


def test_python_kis_file_is_what_tokenp_answers(gateway: Sandbox, command: Callable[..., Ran]) -> None:
    """Its name has the environment, the HTS id and a digest; its expiry is in KST; the app secret is not in it."""
    assert tokencore("export", "us", "--to", "python-kis", "there", KIS_HTS_ID="me").code == 0
    (path,) = Path("there").iterdir()
    content = json.loads(path.read_text())
    assert re.fullmatch(r"token_real_me_[0-9a-f]{40}\.json", path.name)
    assert sorted(content) == ["access_token", "access_token_token_expired", "expires_in", "token_type"]
    expiry = datetime.fromisoformat(content["access_token_token_expired"] + "+09:00")
    assert timedelta(0) <= on_disk().expires_at - expiry < timedelta(seconds=1)
    assert 86_000 < content["expires_in"] <= 86_400
    assert asked(gateway) == 1
    refused = command("export", "us", "--to", "python-kis", "there")
    assert refused.code == 2
    assert "KIS_HTS_ID is not set" in one_line(refused)


@pytest.mark.usefixtures("gateway")
@pytest.mark.parametrize("zone", ["Asia/Seoul", "America/New_York", "Pacific/Kiritimati"])
def test_the_samples_files_speak_the_readers_time(zone: str) -> None:
    """The names are today's and tomorrow's, and the expiry a time, in the zone of the machine, wherever it stands."""
    cached(left=80_000)
    before = datetime.now(ZoneInfo(zone))
    assert tokencore("export", "us", "--to", "kis-auth", "there", TZ=zone).code == 0
    names = sorted(path.name for path in Path("there").iterdir())
    days = (before, datetime.now(ZoneInfo(zone)))
    assert names in [[f"KIS{day + timedelta(days=n):%Y%m%d}" for n in (0, 1)] for day in days]
    lines = Path("there", names[0]).read_text().splitlines()
    assert lines[0] == f"token: {on_disk().access_token}"
    assert lines[1] == f"valid-date: {on_disk().expires_at.astimezone(ZoneInfo(zone)):%Y-%m-%d %H:%M:%S}"
    assert len(lines) == 2


def test_every_way_to_a_new_token_reaches_the_copies(copies: Path, command: Callable[..., Ran]) -> None:
    """A renewal, `save_token`, `import` and a renewal of another market of the key: the copies follow, of mode 0600."""
    us, kr = TokenManager("us"), TokenManager("kr")
    us.get_valid_token()
    seen = [held(copies)]
    us.refresh(force=True)
    seen.append(held(copies))
    us.save_token(make_token(90_000, text=make_jwt(APP_KEY, life=90_000)))
    seen.append(held(copies))
    kr.refresh(force=True)
    seen.append(held(copies))
    assert seen[-1] == on_disk().access_token == kr.get_valid_token()
    assert len(set(seen)) == 4
    assert modes(copies) == {0o600}
    assert len(list(copies.iterdir())) == 4
    assert command("delete", "us").code == 0
    assert command("delete", "kr").code == 0


@pytest.mark.parametrize("death", ["deleted", "rejected", "revoked"])
def test_the_copies_die_with_the_token(death: str, copies: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A token that is deleted, rejected by KIS or revoked is out of the other clients' hands, and the log says so."""
    us = TokenManager("us")
    text = us.get_valid_token()
    assert held(copies) == text
    if death == "deleted":
        us.delete_token()
    elif death == "revoked":
        us.revoke()
    else:
        with pytest.raises(Exception, match="six hours"):
            us.report_rejected(text)
    assert list(copies.iterdir()) == []
    assert sum("Removed the copy for" in message for message in caplog.messages) == 4


def test_a_copy_of_another_market_with_the_key_stays(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where us and kr copy to the same place, deleting the token file of one leaves the copy to the other."""
    monkeypatch.setenv("KIS_MARKETS__KR__EXPORTS", f"kis-auth:{copies}")
    TokenManager("us").get_valid_token()
    TokenManager("us").delete_token()
    TokenManager("kr").copy_token()
    assert {path.name[:3] for path in copies.iterdir()} == {"KIS"}
    assert held(copies) == on_disk("kr").access_token


def test_what_fails_harms_neither_the_token_nor_the_other_copies(
    copies: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A missing folder and a file that is none of ours are told in the log; the renewal and the rest go on."""
    foreign = copies / "token.dat"
    foreign.write_text("somebody's notes")
    exports = f"kis-auth:{copies}/missing,mojito2:{copies},kis-auth:{copies}"
    monkeypatch.setenv("KIS_MARKETS__US__EXPORTS", exports)
    text = TokenManager("us").get_valid_token()
    assert foreign.read_text() == "somebody's notes"
    foreign.unlink()
    assert held(copies) == text
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2
    assert "missing cannot be written: No such file or directory" in caplog.text
    assert "is not this key's" in caplog.text


def test_a_key_takes_no_file_of_another(gateway: Sandbox, command: Callable[..., Ran], tmp_path: Path) -> None:
    """The `jti` of the token in the file tells whose it is: another key's stays, and a sentence says why."""
    folder = tmp_path / "shared"
    folder.mkdir()
    for name in ("token.dat", f"KIS{datetime.now().astimezone():%Y%m%d}"):
        (folder / name).write_text(f"token: {make_jwt(OTHER_KEY)}\n")
    for client in ("mojito2", "kis-auth"):
        ran = command("export", "us", "--to", client, str(folder))
        assert ran.code == 2
        assert "is not this key's" in one_line(ran)
    assert len(list(folder.iterdir())) == 2
    assert held(folder)
    assert asked(gateway) == 1


def test_real_and_paper_share_no_file(
    gateway: Sandbox, copies: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where two environments ask for one place, the first market has it, the other is told so; by hand too."""
    for name, value in (("APP_KEY", OTHER_KEY), ("ENVIRONMENT", "paper"), ("BASE_URL", gateway.url)):
        monkeypatch.setenv(f"KIS_MARKETS__TEST__{name}", value)
    monkeypatch.setenv("KIS_MARKETS__TEST__EXPORTS", f"kis-auth:{copies}/../copies,python-kis:{copies}")
    monkeypatch.setenv("KIS_MARKETS__US__EXPORTS", f"kis-auth:{copies}")
    TokenManager("test").get_valid_token()
    assert [path.name[:14] for path in copies.iterdir()] == ["token_virtual_"]
    assert "its file cannot hold both" in caplog.text
    ran = tokencore("export", "test", "--to", "kis-auth", str(copies))
    assert ran.code == 2
    assert "its file cannot hold both" in one_line(ran)


PAPER = {  # the same app key, for another environment
    "a market at the same address": {"KIS_MARKETS__TEST__ENVIRONMENT": "paper", "KIS_MARKETS__TEST__BASE_URL": "{ip}"},
    "a market at another address": {"KIS_MARKETS__TEST__ENVIRONMENT": "paper", "KIS_MARKETS__TEST__BASE_URL": "{name}"},
    "settings and a token directory of its own": {
        "KIS_ENVIRONMENT": "paper",
        "KIS_BASE_URL": "{name}",
        "KIS_MARKETS__TEST__EXCHANGES": "KRX",
        "KIS_TOKEN_DIR": "~/paper",
    },
}


@pytest.mark.parametrize("paper", PAPER)
def test_paper_takes_no_file_of_real_with_the_same_key(
    paper: str, nowhere: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A hand-made export of the key for paper leaves the real one's files; those go on through renewals and links."""
    nowhere.set_rules(same_token=0, issue_interval=0)
    monkeypatch.setenv("KIS_ISSUE_INTERVAL", "0")
    bot, alias = tmp_path / "bot", tmp_path / "alias"
    alias.symlink_to(bot)
    places = {"mojito2": bot, "kis-auth": alias}
    us = TokenManager("us")
    for client in places:
        us.export(client, str(bot))
    real = {path: path.read_bytes() for path in bot.iterdir()}
    host = {"ip": nowhere.url, "name": nowhere.url.replace("127.0.0.1", "localhost")}
    settings = {name: value.format(**host) for name, value in PAPER[paper].items()}
    for client, folder in places.items():
        ran = tokencore("export", "test", "--to", client, str(folder), **settings)
        assert ran.code == 2
        assert "is not this key's" in one_line(ran)
    assert tokencore("delete", "test", **settings).code == 0
    assert {path: path.read_bytes() for path in bot.iterdir()} == real
    us.refresh(force=True)
    for client, folder in places.items():
        TokenManager("kr").export(client, str(folder))  # a market of the same key and environment
    assert held(bot) == on_disk().access_token


@pytest.mark.parametrize("client", ["mojito2", "kis-auth"])
def test_of_two_first_exports_at_once_one_is_written(
    client: str, nowhere: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Real and paper have different locks, and on a slow disk meet in the empty folder: one writes, one is refused."""
    for name, value in PAPER["a market at another address"].items():
        monkeypatch.setenv(name, value.format(name=nowhere.url.replace("127.0.0.1", "localhost")))
    tokens = {market: TokenManager(market).get_valid_token() for market in ("us", "test")}
    sync, bot = os.fsync, tmp_path / "bot"

    def slow(descriptor: int) -> None:
        time.sleep(0.1)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)

    def export(market: str) -> str | None:
        with contextlib.suppress(ConfigurationError):
            TokenManager(market).export(client, str(bot))
            return tokens[market]
        return None

    with ThreadPoolExecutor() as pool:
        written = [text for text in pool.map(export, tokens) if text]
    assert len(written) == 1
    assert all(written[0].encode() in path.read_bytes() for path in bot.iterdir())


def test_a_folder_that_another_process_holds_ends_the_export(
    gateway: Sandbox, command: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who cannot be alone in the folder writes nothing there and says so; afterwards all is as before."""
    monkeypatch.setattr(exports, "WAIT", 0.1)
    export = ("export", "us", "--to", "mojito2", "there")
    Path("there").mkdir()
    descriptor = os.open("there", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    ran = command(*export)
    assert ran.code == 7
    assert "Another process has held" in one_line(ran)
    assert list(Path("there").iterdir()) == []
    os.close(descriptor)
    assert command(*export).code == 0
    assert asked(gateway) == 1


def test_a_bot_that_locks_its_folder_for_its_life_gets_every_renewal(
    copies: Path, command: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`flock -n DIR bot` keeps a second bot away, but not the next token, nor the removal of one that is deleted."""
    monkeypatch.setattr(exports, "WAIT", 0)
    assert command("refresh", "us").code == 0
    descriptor = os.open(copies, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    first = held(copies)
    assert command("refresh", "us", "--force").code == 0
    assert held(copies) == on_disk().access_token != first
    assert command("delete", "us").code == 0
    assert list(copies.iterdir()) == []
    os.close(descriptor)


def test_paper_removes_no_copy_of_real_with_the_same_key(
    copies: Path, nowhere: Sandbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A setting that sends paper's copies to where real's lie by hand neither overwrites nor removes them."""
    monkeypatch.delenv("KIS_MARKETS__US__EXPORTS")
    TokenManager("us").export("kis-auth", str(copies))
    for name, value in (("ENVIRONMENT", "paper"), ("BASE_URL", nowhere.url), ("EXPORTS", f"kis-auth:{copies}")):
        monkeypatch.setenv(f"KIS_MARKETS__TEST__{name}", value)
    TokenManager("test").refresh()
    assert "is not this key's" in caplog.text
    TokenManager("test").delete_token()
    assert held(copies) == on_disk().access_token


@pytest.mark.parametrize(
    ("protocol", "mode", "code"),
    [
        pytest.param(4, 0o600, 0, id="written over our file by mojito2"),
        pytest.param(2, 0o644, 0, id="open to others, as tokencore makes none"),
        pytest.param(2, 0o600, 2, id="as another set-up of tokencore would write it"),
    ],
)
@pytest.mark.usefixtures("gateway")
def test_what_a_client_wrote_by_itself_is_taken_over(
    protocol: int, mode: int, code: int, command: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that mojito2 asked for itself makes room, unless the key serves another environment in the settings."""
    file, export = Path("token.dat"), ("export", "us", "--to", "mojito2", ".")
    file.write_bytes(pickle.dumps({"access_token": make_jwt(APP_KEY), "api_key": APP_KEY}, protocol=protocol))
    file.chmod(mode)
    theirs = file.read_bytes()
    with monkeypatch.context() as both:
        both.setenv("KIS_MARKETS__TEST__ENVIRONMENT", "paper")
        assert command(*export).code == 2
    assert file.read_bytes() == theirs
    assert command(*export).code == code
    assert (on_disk().access_token.encode() in file.read_bytes()) == (code == 0)


@pytest.mark.usefixtures("gateway")
@pytest.mark.parametrize("damage", [b"\xff\xfe", b"{}", b""])
def test_without_the_memory_of_exports_a_file_is_left_once(damage: bytes, command: Callable[..., Ran]) -> None:
    """A damaged list of what was written ends in the sentence; when the file is removed, all is as before."""
    export = ("export", "us", "--to", "mojito2", ".")
    assert command(*export).code == 0
    (memory,) = (Path.home() / ".tokencore").glob("key-*-exports.txt")
    memory.write_bytes(damage)
    assert "remove the file" in one_line(command(*export))
    Path("token.dat").unlink()
    assert [command(*export).code for _ in range(2)] == [0, 0]
    assert stat.S_IMODE(memory.stat().st_mode) == 0o600


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


def test_the_samples_files_of_past_days_are_cleared_away(copies: Path) -> None:
    """A file that this key's token left under an earlier day goes, as it tells the app key; another key's stays."""
    old, others = copies / "KIS20200101", copies / "KIS20200102"
    old.write_text(f"token: {make_jwt(APP_KEY)}\n")
    others.write_text(f"token: {make_jwt(OTHER_KEY)}\n")
    TokenManager("us").get_valid_token()
    assert not old.exists()
    assert others.exists()


def test_a_token_that_names_no_key_is_copied_too(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should KIS change its tokens' form, the copies of the one before are known by their text."""
    monkeypatch.setenv("KIS_MARKETS__US__EXPORTS", f"kis-auth:{copies}")
    for text in ("opaque-1", "opaque-2"):
        TokenManager("us").save_token(make_token(text=text))
        assert {path.read_text().split()[1] for path in copies.iterdir()} == {text}


@pytest.mark.usefixtures("gateway")
@pytest.mark.parametrize("value", ["nobody:/tmp", "mojito2:bot"])
def test_a_mistake_in_the_setting_is_told(value: str, command: Callable[..., Ran]) -> None:
    """An unknown client and a folder that depends on the working directory are refused by the setting's name."""
    ran = tokencore("plan", KIS_MARKETS__US__EXPORTS=value)
    assert ran.code == 2
    assert "KIS_MARKETS__US__EXPORTS cannot be used" in one_line(ran)
    assert command("check").code == 3


def test_the_hourly_check_mends_a_copy(copies: Path, nowhere: Sandbox) -> None:
    """What was removed, or could not be written, is there again after it, without a renewal."""
    us = TokenManager("us")
    us.get_valid_token()
    (copies / "token.dat").unlink()
    follow(us, datetime.now(UTC))
    assert held(copies) == on_disk().access_token
    assert len(list(copies.iterdir())) == 4
    assert asked(nowhere) == 1
