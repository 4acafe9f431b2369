"""All markets of the settings, and who trades where."""

from __future__ import annotations

import pytest
from builders import KEY, SECRET
from running import raised

from tokencore import ConfigurationError, managers, trading


def names(*, one_per_key: bool = False) -> list[str]:
    """The markets that have a manager."""
    return [manager.market.name for manager in managers(one_per_key=one_per_key)]


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Credentials for all markets, and a third market."""
    monkeypatch.setenv("KIS_APP_KEY", KEY)
    monkeypatch.setenv("KIS_APP_SECRET", SECRET)
    monkeypatch.setenv("KIS_MARKETS__HK__EXCHANGES", "SEHK")
    return monkeypatch


@pytest.mark.usefixtures("common")
def test_every_market_has_a_manager_and_one_key_needs_one() -> None:
    """The settings' order, `us` and `kr` first; markets that share a key are one key."""
    assert names() == ["us", "kr", "hk"]
    assert names(one_per_key=True) == ["us"]


def test_each_key_has_one_manager(common: pytest.MonkeyPatch) -> None:
    """A key is an app key in an environment: another key, or the same in paper trading, counts by itself."""
    common.setenv("KIS_MARKETS__KR__APP_KEY", "another" + KEY)
    common.setenv("KIS_MARKETS__HK__ENVIRONMENT", "paper")
    assert names(one_per_key=True) == ["us", "kr", "hk"]
    common.setenv("KIS_MARKETS__HK__ENVIRONMENT", "real")
    assert names(one_per_key=True) == ["us", "kr"]


def test_market_without_credentials_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user of one market need not configure the other."""
    monkeypatch.setenv("KIS_MARKETS__KR__APP_KEY", KEY)
    monkeypatch.setenv("KIS_MARKETS__KR__APP_SECRET", SECRET)
    assert names() == names(one_per_key=True) == ["kr"]
    assert [manager.market.name for manager in trading("KRX")] == ["kr"]
    assert isinstance(raised(lambda: trading("NASD")), ConfigurationError)


def test_no_credentials_at_all_says_what_to_set() -> None:
    """The sentence names the variable."""
    error = raised(managers)
    assert isinstance(error, ConfigurationError)
    assert "KIS_APP_KEY" in str(error)


def test_a_key_without_its_secret_says_so_before_anything_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """No token is looked for when many managers are made, but half of the credentials is told then."""
    monkeypatch.setenv("KIS_MARKETS__KR__APP_KEY", KEY)
    error = raised(managers)
    assert isinstance(error, ConfigurationError)
    assert str(error).startswith("KIS_APP_SECRET is not set for the market 'kr'")


@pytest.mark.usefixtures("common")
@pytest.mark.parametrize("alias", ["NASD", "NAS", "XNAS", "NASDAQ", "nasd"])
def test_exchange_is_found_by_every_name(alias: str) -> None:
    """Order code, quote code, MIC and common name lead to the market that trades there."""
    assert [manager.market.name for manager in trading(alias)] == ["us"]


def test_exchange_of_two_markets_has_a_manager_for_each_key(common: pytest.MonkeyPatch) -> None:
    """Two markets with one key trade it: one manager. With two keys: two."""
    common.setenv("KIS_MARKETS__KR2__EXCHANGES", "KRX, NXT")
    assert len(trading("KRX")) == 1
    common.setenv("KIS_MARKETS__KR2__APP_KEY", "another" + KEY)
    assert [manager.market.name for manager in trading("KRX")] == ["kr", "kr2"]


def test_exchange_that_nobody_trades_is_refused_with_advice_that_works(common: pytest.MonkeyPatch) -> None:
    """The sentence has the variable to set; with it, the exchange is traded."""
    error = raised(lambda: trading("TKSE"))
    assert isinstance(error, ConfigurationError)
    variable, _, value = str(error).removesuffix(".").split()[-1].partition("=")
    common.setenv(variable, value)
    assert len(trading("TKSE")) == 1


@pytest.mark.usefixtures("common")
def test_unknown_exchange_and_malformed_settings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are for the user to correct."""
    assert "MARS" in str(raised(lambda: trading("MARS")))
    monkeypatch.setenv("KIS_TIMEOUT", "soon")
    assert "KIS_TIMEOUT" in str(raised(managers))
