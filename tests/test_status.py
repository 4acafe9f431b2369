"""What people and programs see of a market: on terminals wide and narrow, of a thousand markets, at any moment."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from builders import make_token
from running import Ran, cached, folder, tokencore

from tokencore import Key, Settings, TokenManager, USTokenManager
from tokencore.attempts import Attempt, Outcome
from tokencore.calendars import sessions
from tokencore.reports import status

if TYPE_CHECKING:
    from collections.abc import Callable

    Command = Callable[..., Ran]

MANY = 100  # markets: as a thousand, but in a test that runs on every machine


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
def test_check_on_a_terminal_is_aligned_coloured_and_says_one_time(
    terminal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status in colour, one column under the other, and until when the token serves: five minutes before its expiry."""
    monkeypatch.setenv("KIS_MARKETS__KR__APP_KEY", "PSanother")
    monkeypatch.setenv("KIS_MARKETS__KR__APP_SECRET", "secret")
    token = make_token(50_000)
    USTokenManager().save_token(token)
    shown = terminal(140, "check")
    assert "\x1b[32mVALID\x1b[0m" in shown
    assert "\x1b[31mNO_TOKEN\x1b[0m" in shown
    head, us, kr, *_ = plain(shown)
    assert re.search(r"serves until \(KST\).*local \(E[SD]T\).*left.*next need", head)
    assert us.index("VALID") == kr.index("NO_TOKEN") == head.index("status")
    kst, local = re.findall(r"\d{4}-\d\d-\d\d \d\d:\d\d", us)[:2]
    hours = (datetime.fromisoformat(kst) - datetime.fromisoformat(local)).total_seconds() / 3600
    assert hours in (13, 14)
    assert kst == f"{token.expires_at + timedelta(hours=9, minutes=-5):%Y-%m-%d %H:%M}"
    assert "13 h 4" in us
    assert f"{token.expires_at + timedelta(hours=9):%H:%M}" not in USTokenManager().get_token_info()


@pytest.mark.usefixtures("gateway")
def test_check_says_mode_length_and_when_it_was_cached(command: Command) -> None:
    """As the old check script did; a file that others may read is said to be so, with the command that closes it."""
    token = cached(20_000)
    path = folder() / "us_api_token.json"
    assert re.search(
        rf"^us: {path}, mode 0600, cached \d{{4}}-\d\d-\d\d \d\d:\d\d KST, {len(token.access_token)} characters$",
        command("check").out,
        re.MULTILINE,
    )
    path.chmod(0o644)
    assert f"mode 0644 (others may use it: chmod 600 {path})" in command("check").out
    assert json.loads(command("check", "--json").out)[0]["permissions"] == "0644"


@pytest.mark.usefixtures("gateway")
def test_check_fits_a_terminal_of_80_columns_whole(terminal: Callable[..., str]) -> None:
    """Nothing is cut on the most common terminal: what does not fit beside stands below; NO_COLOR is respected."""
    cached(20_000)
    lines = plain(terminal(80, "check"))
    assert re.match(r"us +VALID +\d{4}-\d\d-\d\d \d\d:\d\d +\d{4}-\d\d-\d\d \d\d:\d\d +5 h \d\d min", lines[1])
    assert any(line.startswith("kr: next need ") for line in lines)
    narrow = terminal(50, "check", NO_COLOR="1")
    assert "…" not in "".join([*lines, narrow])
    assert not re.search(r"\x1b\[3\dm", narrow)


@pytest.mark.usefixtures("gateway")
def test_a_zone_that_cannot_be_is_no_reason_to_fail() -> None:
    """`TZ=UTC+25`: local times are UTC then, in every table."""
    cached(20_000)
    for line in ("check", "plan", "history"):
        ran = tokencore(line, TZ="UTC+25")
        assert (ran.code, ran.err) == (0, "")
    assert "local (UTC)" in tokencore("check", TZ="UTC+25").out


@pytest.mark.usefixtures("gateway")
def test_any_reason_can_be_shown_on_any_terminal() -> None:
    """Markup, line breaks, escape sequences and bytes of another encoding are text like any other.

    An encoding that lacks a character costs that character, not the answer; JSON stays valid and whole.
    """
    reasons = ["[/red] [bold]", r"back\[slash]", "줄\n바꿈", "\x1b[31mred", "\udcff", "길" * 200, "수동 refresh"]
    store = TokenManager("us")._store  # noqa: SLF001 - as renewals write it
    cached(50_000)
    for reason in reasons:
        store.note(Attempt(datetime.now(UTC), Outcome.LIMIT, reason=reason))
    for encoding, shown in (("utf-8", "수동 refresh"), ("ascii", "?? refresh")):
        ran = tokencore("history", PYTHONIOENCODING=encoding)
        assert (ran.code, ran.err, "\x1b" in ran.out) == (0, "", False)
        assert (shown in ran.out, "[/red] [bold]" in ran.out, r"back\[slash]" in ran.out) == (True, True, True)
        found = json.loads(tokencore("history", "--json", PYTHONIOENCODING=encoding).out)
        assert (len(found), found[-1]["reason"]) == (len(reasons), "수동 refresh")


STATES: dict[str, Callable[[], object]] = {
    "nothing at all": lambda: None,
    "a fresh token": lambda: TokenManager("us").get_valid_token(),
    "a token about to expire": lambda: cached(1_000),
    "an expired token": lambda: cached(-100, age=86_400),
    "a rejected token": lambda: TokenManager("us").save_token(make_token(age=28_800, rejected=True)),
    "one market without its file": lambda: (cached(), TokenManager("kr").delete_token()),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.usefixtures("gateway")
def test_every_report_says_the_same(state: str, command: Command) -> None:
    """In every state `check`, a manager's own status and the key's state agree, fact by fact."""
    STATES[state]()
    listed = json.loads(command("check", "--json").out)
    now = datetime.now(UTC)
    (key,) = Key.load(Settings.load())
    seen = key.state(now)
    for market, one in zip(key.markets, listed, strict=True):
        own = {**TokenManager(market.name).get_token_status()}
        assert abs(own.pop("remaining_seconds") - one["remaining_seconds"]) < 60
        assert abs(own.pop("remaining_hours") - one["remaining_hours"]) < 0.1
        del own["cooldown_until"]  # half a second, which may have passed
        assert {name: one[name] for name in own} == own
        assert one["expires_at"] == (seen.token.expires_at.isoformat() if seen.token else None)
        assert (one["status"], one["issues_last_24h"]) == (seen.status, seen.issues_last_24h)
        assert one["next_need"]["end"] == next(
            need[1].isoformat() for need in sessions.needs(market.exchanges, now, now + timedelta(days=15))
        )


@pytest.mark.parametrize("keys", ["one key", "a key each"])
def test_many_markets_are_read_once_a_key_and_the_calendars_once(keys: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Needs are computed once for all markets with the same exchanges, and the status costs a market microseconds."""
    for n in range(MANY):
        own = f"KIS_MARKETS__M{n}__"
        monkeypatch.setenv(f"{own}EXCHANGES", "NASD")
        monkeypatch.setenv(f"{own}APP_KEY", f"PSkey{n}" if keys == "a key each" else "PSkey")
        monkeypatch.setenv(f"{own}APP_SECRET", "secret")
    settings, now = Settings.load(), datetime.now(UTC)
    folder().mkdir(0o700)
    for key in Key.load(settings):
        key.store.save(make_token(50_000))
    asked: list[object] = []
    monkeypatch.setattr(status, "next_need", lambda market, _: asked.append(market))
    began = time.process_time()
    seen = status.look(settings.able_markets(), now)
    assert time.process_time() - began < 1, f"of {MANY}: a thousand take less than that on a quiet core"
    assert [one.status["status"] for one in seen] == ["VALID"] * MANY
    assert len(asked) == 1
    assert len({one.token for one in seen if one.token}) == (MANY if keys == "a key each" else 1)
