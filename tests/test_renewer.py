"""Renewal under the key's lock, against a real gateway: what is asked of KIS, and what a failure leaves behind."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

import pytest
from builders import ended, fill_disk, in_child
from running import (
    asked,
    cached,
    folder,
    limited,
    on_disk,
    outcomes,
    raised,
    start,
    until,
)

from tokencore import (
    IssuerUnavailableError,
    Key,
    KRTokenManager,
    Settings,
    USTokenManager,
    sessions,
)

if TYPE_CHECKING:
    from tokencore.sandbox import Sandbox

HOUR = 3600.0
LAST_MINUTES = 25 * 60.0  # seconds left: inside the proactive window, before the buffer


def test_who_waited_while_kis_could_not_be_reached_shares_that_finding(gateway: Sandbox) -> None:
    """Of threads that want a token at once one tries to connect; the others hear of it instead of trying in turn."""
    managers = [USTokenManager() for _ in range(4)]
    gateway.__exit__()
    with ThreadPoolExecutor(len(managers)) as pool:
        errors = list(pool.map(lambda manager: raised(manager.get_valid_token), managers))
    assert {type(error) for error in errors} == {IssuerUnavailableError}
    assert outcomes() == ["unreachable"]


def test_rejected_token_gives_way_to_a_newer_one_in_a_markets_view(gateway: Sandbox) -> None:
    """An earlier version has renewed and written the views alone: the report finds its token, without a request.

    Without a file of its own a market's report reaches the key's other files.
    """
    new = cached(17 * HOUR)
    content = (folder() / "us_api_token.json").read_bytes()
    old = cached(16 * HOUR)
    (folder() / "us_api_token.json").write_bytes(content)
    assert USTokenManager().get_valid_token() == old.access_token
    assert USTokenManager().report_rejected(old.access_token) == new.access_token
    assert on_disk().access_token == new.access_token
    young = cached(23 * HOUR)
    USTokenManager().delete_token()
    assert limited(lambda: USTokenManager().report_rejected(young.access_token))[0] == "same_token"
    assert on_disk("kr").rejected_at is not None
    assert asked(gateway) == 0


def test_token_that_kis_did_not_revoke_is_served_on(gateway: Sandbox) -> None:
    """Nothing is deleted before KIS has said yes."""
    token = cached()
    gateway.__exit__()
    assert isinstance(raised(USTokenManager().revoke), IssuerUnavailableError)
    assert USTokenManager().get_valid_token() == token.access_token


def test_what_a_full_disk_did_not_take_is_saved_when_it_has_room(quick: Sandbox) -> None:
    """The process that alone has a token saves it within a minute, so that no other one issues for want of it."""

    def hold_it_until_there_is_room() -> None:
        fill_disk()
        manager = USTokenManager()
        token = manager.get_valid_token()
        assert not list(folder().glob("key-*.json"))
        assert Key.load(Settings.load())[0].state(datetime.now(UTC)).token is None  # no other process has it
        fill_disk(-1)
        until(lambda: manager.get_valid_token() == token and bool(list(folder().glob("key-*.json"))))

    assert ended(in_child(hold_it_until_there_is_room)) == 0
    assert KRTokenManager().get_valid_token() == on_disk().access_token
    assert asked(quick) == 1


@pytest.mark.parametrize(("minutes", "issues"), [(15, 0), (40, 1)], ids=["served to its end", "longer than the token"])
def test_session_that_the_present_token_serves_to_its_end_is_free_of_swaps(
    nowhere: Sandbox, minutes: int, issues: int
) -> None:
    """With 25 minutes left a renewal waits for the end of a need that is over before; a longer one wants it now."""
    now = datetime.now(UTC)
    local = {code: now.astimezone(ZoneInfo(sessions.exchange(code).zone)) for code in ("KRX", "NASD")}
    code = next(code for code in local if 3 <= local[code].hour < 23)  # at any time of the day one of them is
    close = local[code] + timedelta(minutes=minutes) - sessions.exchange(code).pad
    hours = f"{close - timedelta(hours=1):%H:%M}-{close:%H:%M}"
    os.environ["KIS_MARKETS__US__EXCHANGES"] = code
    os.environ[f"KIS_EXCHANGES__{code}__HOURS__{close:%Y-%m-%d}"] = hours
    token = cached(LAST_MINUTES)
    assert (USTokenManager().get_valid_token() != token.access_token) == issues
    assert asked(nowhere) == issues


def test_renewal_ahead_keeps_nobody_waiting_for_kis(nowhere: Sandbox) -> None:
    """While KIS thinks, eight threads go on with the old token, and one of them asks; then all have the new one."""
    nowhere.set_rules(latency=2)
    token, shared = cached(LAST_MINUTES), USTokenManager()
    with ThreadPoolExecutor(8) as pool:
        served = set(pool.map(lambda _: shared.get_valid_token(), range(80)))
    assert served == {token.access_token}
    until(lambda: shared.get_valid_token() != token.access_token)
    assert asked(nowhere) == 1


ONE_SHOT_ON_A_BUSY_MACHINE = """
import sys, time
from tokencore import cli, manager

class Busy:
    def find_spec(self, name, *_):
        if name == "requests":
            time.sleep(1)

sys.meta_path.insert(0, Busy())
manager.PATIENCE, manager.BEGIN = 0, 60
sys.exit(cli.main(["get", "us"]))
"""


def test_a_command_that_ends_before_its_renewal_has_begun_lets_it_ask(nowhere: Sandbox) -> None:
    """It prints the present token, then gives the thread beside it time to send its request, not to get the answer."""
    nowhere.set_rules(latency=30)
    token = cached(LAST_MINUTES)
    with start(ONE_SHOT_ON_A_BUSY_MACHINE) as process:
        out, err = process.communicate(timeout=25)
    assert (process.returncode, out, err) == (0, f"{token.access_token}\n", "")
    until(lambda: asked(nowhere) == 1)


@pytest.mark.parametrize("trouble", ["KIS_MARKETS__US__EXCHANGE", "The token directory cannot be used"])
def test_what_forbids_a_renewal_ahead_is_told_once_and_the_token_served_on(
    nowhere: Sandbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    """A misspelt setting, or a lock that cannot be had: one warning in a cool-down, not one at every call."""
    monkeypatch.setattr("tokencore.manager.FRESH", 0.0)
    monkeypatch.setattr("tokencore.manager.AHEAD_PAUSE", 0.0)
    os.environ["KIS_ISSUE_INTERVAL"] = "60"
    token, shared = cached(LAST_MINUTES), USTokenManager()
    if trouble.startswith("KIS"):
        os.environ[trouble] = "NASD"
    else:
        lock = next(folder().glob("*.lock"))
        lock.unlink()
        lock.mkdir()
    assert {shared.get_valid_token() for _ in range(20)} == {token.access_token}
    assert [trouble in line.getMessage() for line in caplog.records if line.levelno >= logging.WARNING] == [True]
    assert asked(nowhere) == 0
