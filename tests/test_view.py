"""What people see: on terminals wide and narrow, without colours, in other encodings."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from builders import make_token
from running import Ran, cached, folder, tokencore

from tokencore import USTokenManager

if TYPE_CHECKING:
    from collections.abc import Callable

    Command = Callable[..., Ran]


@pytest.fixture
def terminal() -> Callable[..., str]:
    """Run a command on a terminal of so many columns; what it shows, with its escape sequences."""
    pty = pytest.importorskip("pty")
    import fcntl
    import termios

    def show(columns: int, *arguments: str, **settings: str) -> str:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        env: dict[str, str] = {**os.environ, "TERM": "xterm-256color", "TZ": "America/New_York", **settings}
        env.pop("COLUMNS", None)  # which speaks of the terminal that the tests were started from
        shown = b""
        with subprocess.Popen(
            [sys.executable, "-m", "tokencore", *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=env
        ):
            os.close(theirs)
            while piece := _read(ours):
                shown += piece
        os.close(ours)
        return shown.decode()

    return show


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # how Linux tells that the other side has closed
        return b""


def plain(shown: str) -> list[str]:
    """The lines without their colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines()


@pytest.mark.usefixtures("gateway")
def test_check_on_a_terminal_is_aligned_and_coloured(terminal: Callable[..., str]) -> None:
    """Status in colour, one column under the other, times in KST and local, and what is left of the life."""
    token = make_token(50_000)
    USTokenManager().save_token(token)
    (folder() / "kr_api_token.json").unlink()
    shown = terminal(140, "check")
    assert "\x1b[32mVALID\x1b[0m" in shown
    assert "\x1b[31mNO_TOKEN\x1b[0m" in shown
    lines = plain(shown)
    assert len(lines) == 3, shown
    head, us, kr = lines
    assert re.search(r"\(KST\).*local \(E[SD]T\).*left.*next need", head)
    assert us.index("VALID") == kr.index("NO_TOKEN") == head.index("status")
    kst, local = re.findall(r"\d{4}-\d\d-\d\d \d\d:\d\d", us)[:2]
    hours = (datetime.fromisoformat(kst) - datetime.fromisoformat(local)).total_seconds() / 3600
    assert hours in (13, 14)
    assert kst == f"{token.expires_at + timedelta(hours=9):%Y-%m-%d %H:%M}"
    assert "13 h 5" in us


@pytest.mark.usefixtures("gateway")
def test_check_fits_a_terminal_of_80_columns_whole(terminal: Callable[..., str]) -> None:
    """Nothing is cut on the most common terminal: what does not fit beside is told below."""
    cached(20_000)
    lines = plain(terminal(80, "check"))
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    assert re.match(r"us +VALID +\d{4}-\d\d-\d\d \d\d:\d\d +\d{4}-\d\d-\d\d \d\d:\d\d +5 h \d\d min", lines[1])
    assert any(line.startswith("kr: next need ") for line in lines)
    assert "…" not in terminal(50, "check")


@pytest.mark.usefixtures("gateway")
def test_no_color_is_respected_and_a_pipe_gets_none(terminal: Callable[..., str], command: Command) -> None:
    """With NO_COLOR, or without a terminal, no colour is written."""
    cached(20_000)
    assert not re.search(r"\x1b\[3\dm", terminal(120, "check", NO_COLOR="1"))
    assert "\x1b" not in command("check").out


@pytest.mark.parametrize("reason", ["[/red] [bold]", r"back\[slash]", "줄\n바꿈", "\x1b[31mred", "\udcff", "길" * 200])
@pytest.mark.usefixtures("quick")
def test_any_reason_can_be_recorded_and_shown(command: Command, reason: str) -> None:
    """Markup, line breaks, escape sequences and bytes of another encoding are text like any other."""
    cached(50_000)
    assert command("refresh", "us", "--reason", reason).code == 0
    ran = command("history")
    assert (ran.code, ran.err) == (0, "")
    assert "\x1b" not in ran.out
    assert len(json.loads(command("history", "--json").out)) == 1


@pytest.mark.usefixtures("quick")
def test_terminal_without_korean_shows_the_rest(command: Command) -> None:
    """An encoding that lacks a character costs that character, not the answer; JSON stays valid and whole."""
    cached(50_000)
    command("refresh", "us", "--reason", "수동 refresh")
    ran = tokencore("history", PYTHONIOENCODING="ascii")
    assert (ran.code, ran.err) == (0, "")
    assert "?? refresh" in ran.out
    ran = tokencore("history", "--json", PYTHONIOENCODING="ascii")
    assert json.loads(ran.out)[0]["reason"] == "수동 refresh"
