"""A key: its markets, what is known of it at one moment, and the renewal rule applied to it."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from builders import make_token
from running import raised, record

from tokencore import ConfigurationError, Key, Settings
from tokencore.attempts import Attempt, Outcome

if TYPE_CHECKING:
    from tokencore.sandbox import Sandbox

HOUR = 3600.0
DUE = datetime(2024, 11, 19, 8, 15, tzinfo=UTC)  # a Tuesday, 17:15 KST: after the anchor of us and kr


@pytest.fixture
def key(gateway: Sandbox) -> Key:
    """The key of us and kr, as a run of a flow loads it."""
    assert gateway.url
    (found,) = Key.load(Settings.load())
    assert repr(found) == "Key('us+kr')"
    return found


def save(key: Key, life: float = 24 * HOUR, age: float = 0, *, now: datetime = DUE) -> None:
    """Save a token of the key that was issued `age` seconds before `now`."""
    with key.store.lock(wait=5):
        key.store.save(make_token(life, age=age, now=now))


@pytest.mark.usefixtures("gateway")
def test_markets_with_one_key_are_one_key() -> None:
    """They share a label and the exchanges; another app key, or another environment, is a key of its own."""
    os.environ["KIS_MARKETS__HK__EXCHANGES"] = "SEHK"
    os.environ["KIS_MARKETS__JP__APP_KEY"] = "another-key"
    os.environ["KIS_MARKETS__JP__EXCHANGES"] = "TKSE"
    os.environ["KIS_MARKETS__TRIAL__ENVIRONMENT"] = "paper"
    keys = {key.label: key.exchanges for key in Key.load(Settings.load())}
    assert keys == {"us+kr+hk": ["NASD", "NYSE", "AMEX", "KRX", "SEHK"], "jp": ["TKSE"], "trial (paper)": []}


@pytest.mark.usefixtures("gateway")
def test_a_key_is_found_by_any_name_of_an_exchange_it_trades() -> None:
    """Order code, quote code and MIC mean the same; what nobody trades, or no key at all, is said with what to set."""
    for name in ("NASD", "NAS", "XNAS", "nasdaq"):
        assert [key.label for key in Key.trading(Settings.load(), name)] == ["us+kr"]
    error = raised(lambda: Key.trading(Settings.load(), "SEHK"))
    assert isinstance(error, ConfigurationError)
    assert "KIS_MARKETS__HKS__EXCHANGES=SEHK" in str(error)
    del os.environ["KIS_APP_KEY"]
    assert "KIS_APP_KEY" in str(raised(lambda: Key.load(Settings.load())))


def test_a_state_says_all_that_is_known_at_one_moment(key: Key) -> None:
    """Without a token a renewal is due now; one that lasts covers the coming need until the next daily renewal."""
    state = key.state(DUE)
    assert state.served == "us+kr: no valid token"
    assert (state.token, state.problem, state.serves_until, state.covered) == (None, "", None, False)
    assert state.outlook.next is not None
    assert state.outlook.next.at == DUE
    save(key)
    state = key.state(DUE)
    assert state.serves_until == DUE + timedelta(hours=24, minutes=-5)
    assert state.served == "us+kr: the token serves until 2024-11-20 17:10 KST"
    assert state.covered
    assert [state.lasts(DUE + timedelta(hours=hours)) for hours in (20, 24)] == [True, False]
    assert state.outlook.next is not None
    assert state.outlook.next.exception is None
    assert state.next_attempt == state.outlook.next.at
    assert (state.refused, state.cooldown_until, state.issues_last_24h, state.foreign_issue) == (False, None, 0, None)


def test_a_state_knows_a_token_that_another_program_issued(key: Key) -> None:
    """KIS returned it to us although no request of ours is from its time; our own, or an imported one, is none."""
    save(key, age=2 * HOUR)
    issued_at = DUE - timedelta(hours=2)
    assert key.state(DUE).foreign_issue is None
    record(Attempt(DUE, Outcome.SAME, expires_at=DUE + timedelta(hours=22)))
    assert key.state(DUE).foreign_issue == issued_at
    record(Attempt(issued_at, Outcome.NO_ANSWER))
    assert key.state(DUE).foreign_issue is None


def test_warnings_name_what_a_refresh_would_cost_and_only_where_something_can_be_lost(key: Key) -> None:
    """The same token within six hours, a second issue in 24 hours, a swap inside a session; nothing without a token."""
    inside = datetime(2024, 11, 19, 2, 0, tzinfo=UTC)  # 11:00 KST, KRX is open
    assert key.state(inside).warnings() == []
    save(key, age=HOUR, now=inside)
    assert [one.kind for one in key.state(inside).warnings()] == ["same token"]
    save(key, age=12 * HOUR, now=inside)
    warnings = {one.kind: one.message for one in key.state(inside).warnings()}
    assert list(warnings) == ["another issue", "inside a session"]
    assert "token number 2" in warnings["another issue"]
    assert "KRX" in warnings["inside a session"]
    save(key, 24 * HOUR, 25 * HOUR, now=inside)
    assert key.state(inside).warnings() == []
