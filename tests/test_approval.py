"""The websocket's approval key: one request for everyone, a document of its own, and what serves while KIS is down."""

from __future__ import annotations

import json
import logging
import shutil
import stat
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from builders import KEY, SECRET
from running import asked, at_a_barrier, cached, folder, raised

from tokencore import (
    CredentialsError,
    IssuanceLimitError,
    IssuerUnavailableError,
    Key,
    KRTokenManager,
    Settings,
    TokenStoreError,
    USTokenManager,
)
from tokencore.clients.approval import approval_expiry

if TYPE_CHECKING:
    from pathlib import Path

    from tokencore.sandbox import Sandbox

PROCESSES = 8
WANT_A_KEY = """
import sys
from tokencore import TokenManager

manager = TokenManager(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
print(manager.get_approval_key())
"""
HOURS = timedelta(hours=1)


def approvals(gateway: Sandbox) -> int:
    """How many approval keys KIS has given."""
    count: int = gateway.stats()["approvals"]
    return count


def file() -> Path:
    """The approval key's file."""
    return next(folder().glob("key-*-approval.json"))


def aged(hours: float) -> str:
    """A key that version 0.1 wrote so long ago, in the place of the present one."""
    USTokenManager().get_approval_key()
    content = json.loads(file().read_text())
    issued = datetime.now(UTC) - hours * HOURS
    times = {"issued_at": issued.isoformat(), "expires_at": (issued + 24 * HOURS).isoformat()}
    own = {name: content[name] for name in ("environment", "key_fingerprint")}
    file().write_text(json.dumps({"approval_key": "an-older-one", **times, **own}))
    return "an-older-one"


def test_start_of_many_processes_makes_one_request(gateway: Sandbox) -> None:
    """Half for us and half for kr, which have one app key: all of them get the same approval key, and no token."""
    cached(20_000)
    _, ends = at_a_barrier(WANT_A_KEY, [("us", "kr")[n % 2 :][:1] for n in range(PROCESSES)])
    assert [one.code for one in ends] == [0] * PROCESSES, ends[0].err
    assert len({one.out for one in ends}) == 1
    assert (approvals(gateway), asked(gateway)) == (1, 0)


def test_key_is_shared_in_a_private_file_that_names_no_app_key(gateway: Sandbox) -> None:
    """Every market of the app key reads one file, 0600, with the day that the key lives; nothing else is touched."""
    (store,) = [key.store for key in Key.load(Settings.load())]
    assert approval_expiry(store) is None
    key = USTokenManager().get_approval_key()
    assert KRTokenManager().get_approval_key() == key
    content = json.loads(file().read_text())
    issued, expires = (datetime.fromisoformat(content[name]) for name in ("issued_at", "expires_at"))
    assert (content["approval_key"], expires - issued) == (key, 24 * HOURS)
    assert approval_expiry(store) == expires
    assert stat.S_IMODE(file().stat().st_mode) == 0o600
    assert not list(folder().glob("*_api_token.json"))
    assert USTokenManager().history() == []
    assert approvals(gateway) == 1


def test_another_app_key_has_another_approval_key(gateway: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A market with credentials of its own asks for itself."""
    monkeypatch.setenv("KIS_MARKETS__KR__APP_KEY", KEY)
    monkeypatch.setenv("KIS_MARKETS__KR__APP_SECRET", SECRET)
    assert USTokenManager().get_approval_key() != KRTokenManager().get_approval_key()
    assert approvals(gateway) == 2


@pytest.mark.parametrize(("hours", "kept"), [(12, True), (23.95, False), (24.5, False)])
def test_key_is_replaced_when_it_is_about_to_expire(gateway: Sandbox, *, hours: float, kept: bool) -> None:
    """One that the previous version left is used without a request; in the buffer, and past its day, it is replaced."""
    old = aged(hours)
    assert (USTokenManager().get_approval_key() == old) == kept
    assert approvals(gateway) == (1 if kept else 2)


def test_key_in_its_last_minutes_serves_while_kis_is_down(gateway: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    """The present key is handed out with a warning, whatever fails; without one there is the error."""
    old = aged(23.95)
    gateway.__exit__()
    assert USTokenManager().get_approval_key() == old
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "goes on serving" in caplog.text
    assert isinstance(raised(lambda: USTokenManager().get_approval_key(old)), IssuerUnavailableError)


def test_rejected_key_is_replaced_once_for_all(gateway: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reports the dead key first gets a new one, the others get that too; a second report waits for the minute."""
    monkeypatch.setenv("KIS_ISSUE_INTERVAL", "0")
    dead = USTokenManager().get_approval_key()
    new = USTokenManager().get_approval_key(dead)
    assert KRTokenManager().get_approval_key(dead) == new != dead
    monkeypatch.setenv("KIS_ISSUE_INTERVAL", "60")
    error = raised(lambda: USTokenManager().get_approval_key(new))
    assert isinstance(error, IssuanceLimitError)
    assert error.retry_at is not None
    assert error.retry_at > datetime.now(UTC) + timedelta(seconds=50)
    assert approvals(gateway) == 2


def test_failed_request_is_not_repeated_within_the_minute(gateway: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a key, the second call within the minute makes no request and says when the next one is made."""
    monkeypatch.setenv("KIS_ISSUE_INTERVAL", "60")
    monkeypatch.setenv("KIS_BASE_URL", f"{gateway.url}/nowhere")
    assert isinstance(raised(USTokenManager().get_approval_key), IssuerUnavailableError)
    error = raised(KRTokenManager().get_approval_key)
    assert isinstance(error, IssuanceLimitError)
    assert "The next is made from" in str(error)


def test_refused_credentials_are_not_tried_again_until_they_have_worked(
    monkeypatch: pytest.MonkeyPatch, gateway: Sandbox
) -> None:
    """A wrong secret is one request, for the token and the approval key together; `refresh` is the way back."""
    gateway.fail("bad-secret", 1)
    assert isinstance(raised(USTokenManager().get_valid_token), CredentialsError)
    assert isinstance(raised(USTokenManager().get_approval_key), CredentialsError)
    assert approvals(gateway) == 0
    monkeypatch.setenv("KIS_ISSUE_INTERVAL", "0")
    gateway.set_rules(issue_interval=0)
    USTokenManager().refresh()
    assert USTokenManager().get_approval_key()
    assert approvals(gateway) == 1


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"approval_key": "x", "issued_at": "soon"}', '{"attempts": 5}', '{"attempts": [null, {}]}'],
)
def test_damaged_file_is_a_miss(gateway: Sandbox, content: str) -> None:
    """What cannot be read costs one request."""
    USTokenManager().get_approval_key()
    file().write_text(content)
    assert USTokenManager().get_approval_key()
    assert approvals(gateway) == 2


def test_request_that_cannot_be_recorded_is_not_made(gateway: Sandbox) -> None:
    """Where the document or the whole directory cannot be written nothing is asked, and the error says so."""
    USTokenManager().get_approval_key()
    file().unlink()
    (place := next(folder().glob("key-*-approval.lock")).with_suffix(".json")).mkdir()
    error = raised(USTokenManager().get_approval_key)
    assert isinstance(error, TokenStoreError)
    assert f"none was made: {place}" in str(error)
    shutil.rmtree(folder())
    folder().write_text("")
    assert isinstance(raised(USTokenManager().get_approval_key), TokenStoreError)
    assert approvals(gateway) == 1
