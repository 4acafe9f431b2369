"""The commands beside `get`: what they answer, what they leave alone, and their exit codes."""

from __future__ import annotations

import getpass
import json
import re
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from builders import KEY, SECRET
from running import Ran, asked, cached, folder, one_line, snapshot

from tokencore import view
from tokencore.commands import ROOMS, completion, parser

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokencore.sandbox import Sandbox

    Command = Callable[..., Ran]

CHECK_FIELDS: dict[str, tuple[type, ...]] = {
    "market": (str,),
    "status": (str,),
    "valid": (bool,),
    "expires_at": (str,),
    "remaining_seconds": (int,),
    "remaining_hours": (float,),
    "buffer_seconds": (int, float),
    "proactive_refresh_seconds": (int, float),
    "cache_exists": (bool,),
    "environment": (str,),
    "issued_at": (str,),
    "cached_at": (str,),
    "file": (str,),
    "permissions": (str,),
    "cooldown_until": (str,),
    "issues_last_24h": (int,),
    "next_need": (dict,),
    "covers_next_need": (bool,),
}
NEVER_NULL = {
    "market",
    "status",
    "valid",
    "remaining_seconds",
    "remaining_hours",
    "cache_exists",
    "environment",
    "file",
}


def test_refresh_renews_or_declines_with_4(quick: Sandbox, command: Command) -> None:
    """A young token: declined with 4 and the time from which it is possible. An old one: renewed, exit 0."""
    cached(86_000)
    ran = command("refresh", "us")
    assert ran.code == 4
    assert re.search(r"from \d{4}-\d\d-\d\d \d\d:\d\d:\d\d KST", one_line(ran))
    assert asked(quick) == 0
    old = cached(50_000)
    ran = command("refresh", "us", "--reason", "수동 갱신", "--by", "김민지")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("Renewed.\n")
    assert command("get", "kr").out != old.access_token + "\n"
    assert "김민지  수동 갱신" in command("history").out


def test_refresh_keeps_the_login_of_who_asked(quick: Sandbox, command: Command) -> None:
    """Without `--by` the record has the name of whoever is logged in; nothing else leaves one."""
    assert command("refresh", "us").code == 0
    assert command("get", "us").code == 0
    assert [line["by"] for line in json.loads(command("history", "--json").out)] == [getpass.getuser()]
    assert asked(quick) == 1


@pytest.mark.parametrize("option", ["--reason", "--by"])
def test_refresh_keeps_no_key_that_was_pasted_by_mistake(quick: Sandbox, command: Command, option: str) -> None:
    """A word as long as a key is refused with 2, before KIS is asked, and not repeated."""
    ran = command("refresh", "us", option, f"for {KEY}")
    assert ran.code == 2
    assert "holds a word of 36 characters or more" in one_line(ran)
    assert KEY not in ran.err
    assert asked(quick) == 0


def test_forced_refresh_passes_the_ceiling_and_says_when_nothing_changed(
    quick: Sandbox, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the ceiling: 4 without force, 0 with it; KIS's same token is told as such."""
    monkeypatch.setenv("KIS_MAX_ISSUES_PER_DAY", "1")
    assert command("get", "us").code == 0
    cached(50_000)
    time.sleep(0.1)
    ran = command("refresh", "us")
    assert ran.code == 4
    assert "KIS_MAX_ISSUES_PER_DAY" in one_line(ran)
    assert "--force" in ran.err
    ran = command("refresh", "us", "--force")
    assert (ran.code, ran.out.splitlines()[0]) == (0, "Renewed.")
    time.sleep(0.1)
    ran = command("refresh", "us", "--force")
    assert ran.code == 0
    assert "handed back the present token" in ran.out
    assert asked(quick) == 3


def test_delete_removes_one_markets_file_and_keeps_the_record(gateway: Sandbox, command: Command) -> None:
    """The token file goes, the record and the issue mark stay; a second delete says that there was nothing."""
    command("get", "us")
    store = folder()
    record = next(store.glob("key-*.jsonl")).read_bytes()
    assert command("delete", "us") == Ran(0, "Deleted.\n", "")
    assert not (store / "us_api_token.json").exists()
    assert (store / "kr_api_token.json").exists()
    assert (store / "us_token_issued_at.dat").exists()
    assert next(store.glob("key-*.jsonl")).read_bytes() == record
    ran = command("delete", "us")
    assert (ran.code, "no token file" in ran.out) == (0, True)
    assert gateway.stats()["revokes"] == 0


def test_delete_revoke_makes_kis_forget_the_token_for_every_market(gateway: Sandbox, command: Command) -> None:
    """KIS is asked once; the other market of the key no longer serves the dead token."""
    command("get", "us")
    ran = command("delete", "us", "--revoke")
    assert (ran.code, ran.err) == (0, "")
    assert gateway.stats()["revokes"] == 1
    assert command("check", "kr").code == 3
    assert json.loads(command("check", "kr", "--json").out)[0]["status"] == "REJECTED"


def test_delete_revoke_that_fails_deletes_nothing(gateway: Sandbox, command: Command) -> None:
    """KIS unreachable: exit 6, and the token is still served."""
    token = command("get", "us").out
    gateway.__exit__()
    ran = command("delete", "us", "--revoke")
    assert ran.code == 6
    assert one_line(ran)
    assert command("get", "us").out == token


def test_history_tells_every_attempt_of_every_key(
    quick: Sandbox, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table for people, JSON for programs; attempts of markets with one key appear once, with both names."""
    monkeypatch.setenv("KIS_MARKETS__HK__EXCHANGES", "SEHK")
    monkeypatch.setenv("KIS_MARKETS__HK__APP_KEY", KEY)
    monkeypatch.setenv("KIS_MARKETS__HK__APP_SECRET", SECRET)
    quick.fail("limit", 1)
    assert command("get", "us").code == 0
    assert command("get", "hk").code == 0
    lines = json.loads(command("history", "--json").out)
    told = [(line["markets"], line["outcome"], line["code"]) for line in lines]
    assert told == [
        (["us", "kr"], "limit", "EGW00133"),
        (["us", "kr"], "issued", None),
        (["hk"], "issued", None),
    ]
    assert set(lines[0]) == {"markets", "at", "outcome", "code", "expires_at", "reason", "by"}
    assert datetime.fromisoformat(lines[1]["expires_at"]) > datetime.now(UTC)
    table = command("history", "kr").out.splitlines()
    assert len(table) == 3
    assert "EGW00133" in table[1]
    assert "us+kr" in table[2]


@pytest.mark.usefixtures("gateway")
def test_history_without_attempts_says_so(command: Command) -> None:
    """Nothing recorded is a sentence for people and an empty list for programs."""
    assert command("history").out == "No attempt has been recorded.\n"
    assert json.loads(command("history", "us", "--json").out) == []


@pytest.mark.usefixtures("slow")
def test_check_json_has_exactly_the_contracts_fields_and_types(command: Command) -> None:
    """One object for every market, in the settings' order; every field has its type, with a token or without."""
    empty = json.loads(command("check", "--json").out)
    command("get", "us")
    ran = command("check", "--json")
    full = json.loads(ran.out)
    assert (ran.code, ran.err) == (0, "")
    assert [one["market"] for one in full] == ["us", "kr"]
    for one in full:
        assert list(one) == list(CHECK_FIELDS)
        assert all(type(one[name]) in types for name, types in CHECK_FIELDS.items()), one
    for one in empty:
        assert list(one) == list(CHECK_FIELDS)
        assert all(one[name] is None or type(one[name]) in types for name, types in CHECK_FIELDS.items())
        assert all(one[name] is not None for name in NEVER_NULL)
        assert (one["status"], one["valid"], one["cache_exists"]) == ("NO_TOKEN", False, False)
        assert (one["remaining_seconds"], one["remaining_hours"], one["issues_last_24h"]) == (0, 0, 0)


@pytest.mark.usefixtures("slow")
def test_check_json_tells_facts(command: Command) -> None:
    """Times are ISO 8601 with offset, file and mode are real, cool-down and count come from the record."""
    command("get", "us")
    one = json.loads(command("check", "us", "--json").out)[0]
    times = {name: datetime.fromisoformat(one[name]) for name in ("expires_at", "issued_at", "cooldown_until")}
    assert all(at.utcoffset() is not None for at in times.values())
    assert times["expires_at"] - times["issued_at"] == timedelta(days=1)
    assert one["remaining_hours"] == pytest.approx(one["remaining_seconds"] / 3600, abs=0.01)
    assert (one["file"], one["permissions"]) == (str(folder() / "us_api_token.json"), "0600")
    assert (one["issues_last_24h"], one["buffer_seconds"], one["proactive_refresh_seconds"]) == (1, 300, 1800)
    start_of_need, end_of_need = (datetime.fromisoformat(one["next_need"][edge]) for edge in ("start", "end"))
    assert start_of_need < end_of_need
    assert end_of_need > datetime.now(UTC)
    assert one["covers_next_need"] is (end_of_need < times["expires_at"] - timedelta(seconds=270))


@pytest.mark.parametrize(
    ("left", "status", "code"),
    [(20_000, "VALID", 0), (1_700, "EXPIRING_SOON", 0), (290, "EXPIRED", 3), (-5_000, "EXPIRED", 3)],
)
@pytest.mark.usefixtures("gateway")
def test_check_words_and_exit_codes(command: Command, left: float, status: str, code: int) -> None:
    """Exit 0 only while every asked market is valid; what remains is never negative."""
    cached(left)
    ran = command("check", "--json")
    one = json.loads(ran.out)[0]
    assert (ran.code, one["status"], one["valid"]) == (code, status, code == 0)
    assert one["remaining_seconds"] >= 0
    assert one["remaining_hours"] >= 0
    assert command("check").code == code


@pytest.mark.usefixtures("gateway")
def test_check_of_an_unreadable_file_says_so(command: Command) -> None:
    """What stands at the path is no token of this key: UNREADABLE, exit 3; the other market is judged by itself."""
    cached(20_000)
    (folder() / "us_api_token.json").write_text("{")
    one = json.loads(command("check", "us", "--json").out)[0]
    assert (one["status"], one["valid"], one["cache_exists"], one["expires_at"]) == ("UNREADABLE", False, True, None)
    assert (command("check", "us").code, command("check", "kr").code, command("check").code) == (3, 0, 3)


@pytest.mark.parametrize("arguments", [("check",), ("check", "--json"), ("check", "--probe"), ("history",), ("tick",)])
def test_commands_that_only_read_change_no_file(gateway: Sandbox, command: Command, arguments: tuple[str, ...]) -> None:
    """Neither contents, nor times, nor modes of the directory and its files change, and KIS is asked for no token."""
    command("get", "us")
    before = snapshot(Path.home())
    assert command(*arguments).code == 0
    assert snapshot(Path.home()) == before
    assert asked(gateway) == 1


@pytest.mark.usefixtures("gateway")
def test_check_creates_nothing_where_nothing_is(command: Command) -> None:
    """Without a token directory `check` reports exit 3 and makes none."""
    assert command("check").code == 3
    assert command("check", "--json").code == 3
    assert not folder().exists()


def test_probe_proves_each_valid_token_with_one_call(
    gateway: Sandbox, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accepted: 0. Dead at KIS: 3. KIS gone: 6. Nothing is issued, and the proof has a field of its own."""
    command("get", "us")
    ran = command("check", "--probe")
    assert (ran.code, ran.out.count("KIS accepts the token")) == (0, 2)
    assert gateway.stats()["quotes"] == 2
    gateway.kill_tokens()
    ran = command("check", "us", "--probe", "--json")
    one = json.loads(ran.out)[0]
    assert (ran.code, one["probe"]["accepted"], one["status"]) == (3, False, "VALID")
    assert "EGW00121" in one["probe"]["told"]
    monkeypatch.setenv("KIS_TIMEOUT", "1")
    gateway.__exit__()
    ran = command("check", "kr", "--probe")
    assert ran.code == 6
    assert "not known" in ran.out
    assert asked(gateway) == 1


def test_probe_without_a_valid_token_asks_nothing(gateway: Sandbox, command: Command) -> None:
    """What has expired needs no proof."""
    cached(100)
    assert command("check", "--probe").code == 3
    assert gateway.stats()["quotes_refused"] == {}


@pytest.mark.usefixtures("nowhere")
def test_tick_without_exchanges_renews_in_the_proactive_window(quick: Sandbox, command: Command) -> None:
    """The plain rule: nothing to do early, a renewal with 25 minutes left, and one line says what was done."""
    cached(20_000)
    ran = command("tick")
    assert (ran.code, ran.out.startswith("us+kr: nothing due; next ")) == (0, True)
    old = cached(1_500)
    ran = command("tick")
    assert (ran.code, ran.err, ran.out.startswith("us+kr: renewed; next ")) == (0, "", True)
    assert command("get", "us").out != old.access_token + "\n"
    assert asked(quick) == 1


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize(("mode", "code", "then"), [("limit", 4, 4), ("bad-key", 5, 5), ("down", 6, 4)])
def test_tick_that_cannot_renew_says_why_and_keeps_its_pause(
    gateway: Sandbox, command: Command, monkeypatch: pytest.MonkeyPatch, mode: str, code: int, then: int
) -> None:
    """A due renewal that fails is told with its market and code; the next tick leaves KIS alone and says why."""
    monkeypatch.setenv("KIS_ISSUE_INTERVAL", "60")
    cached(1_500)
    gateway.fail(mode)
    ran = command("tick")
    assert ran.code == code
    assert ran.out.startswith("us+kr: due, but not renewed; ")
    assert re.fullmatch(r"tokencore: us: [^\n]+\n", ran.err)
    assert command("tick").code == then
    assert asked(gateway) == 1


@pytest.mark.usefixtures("nowhere")
def test_tick_gives_every_key_its_turn(gateway: Sandbox, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key in trouble does not stop another one; the trouble is the exit code."""
    monkeypatch.setenv("KIS_MARKETS__KR__APP_KEY", KEY)
    monkeypatch.setenv("KIS_MARKETS__KR__APP_SECRET", SECRET)
    gateway.fail("down", 1)
    ran = command("tick")
    assert ran.code == 6
    assert "us: due, but not renewed" in ran.out
    assert "kr: renewed" in ran.out


def test_a_command_loads_its_own_room_only() -> None:
    """The parser made for one command knows it as the whole one does; `check --json` pays for no other's imports."""
    whole = completion.commands(parser())
    assert [name for names in ROOMS.values() for name in names] == list(whole)
    for name, one in whole.items():
        assert completion.commands(parser(name))[name].format_help() == one.format_help()
    program = "import sys; from tokencore.commands import parser; parser('check'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"rich", "http.server", "requests", "tokencore.plan", "tokencore.sandbox"} & set(loaded)


def test_nothing_promises_a_renewal_with_refused_credentials(quick: Sandbox, command: Command) -> None:
    """The plan, as lines and as data, and a tick say that a person has to act, not when the next renewal would be."""
    cached(23 * 3600)
    assert json.loads(command("plan", "--json").out)[0]["renewals"]
    quick.fail("bad-key", 1)
    assert command("refresh", "us", "--force", "--reason", "a test").code == 5
    assert json.loads(command("plan", "--json").out)[0]["renewals"] == []
    for name in ("plan", "tick"):
        told = " ".join(command(name).out.split())
        assert view.REFUSED in told
        assert "next renewal" not in told
    assert "no renewal until a person acts" in command("plan", "--svg", "-").out
    assert asked(quick) == 1
