"""The managers against a real gateway: which token is served, until when, and at what price."""

from __future__ import annotations

import json
import os
import stat
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from builders import KEY, SECRET, ended, in_child, make_token
from running import DAY, asked, cached, folder, issue_of, outcomes, raised

from tokencore import (
    BaseTokenManager,
    ConfigurationError,
    IssuanceLimitError,
    Key,
    KRTokenManager,
    Settings,
    TokenManager,
    TokenStoreError,
    TokenUnavailableError,
    USTokenManager,
)
from tokencore.stores.file_store import FileStore

if TYPE_CHECKING:
    from tokencore.sandbox import Sandbox

HOUR = 3600.0


def test_first_call_issues_once_and_every_manager_then_serves_the_same_token(gateway: Sandbox) -> None:
    """One request serves every market of the key, in this manager and in new ones."""
    token = USTokenManager().get_valid_token()
    assert {USTokenManager().get_valid_token(), KRTokenManager().get_valid_token()} == {token}
    assert TokenManager("kr").get_valid_token() == token
    assert asked(gateway) == 1
    assert outcomes() == ["issued"]


def test_paper_has_files_of_its_own_where_one_address_serves_both(
    gateway: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same app key for real and for paper is two keys: neither's token takes the place of the other's."""
    monkeypatch.setenv("KIS_MARKETS__TEST__ENVIRONMENT", "paper")
    monkeypatch.setenv("KIS_MARKETS__TEST__BASE_URL", gateway.url)
    USTokenManager().get_valid_token()
    TokenManager("test").get_valid_token()
    assert [TokenManager(market).get_token_status()["status"] for market in ("us", "kr", "test")] == ["VALID"] * 3
    assert [key.label for key in Key.load(Settings.load())] == ["us+kr", "test (paper)"]
    assert asked(gateway) == 2


@pytest.mark.usefixtures("gateway")
def test_files_have_the_contracts_names_fields_and_modes() -> None:
    """The directory is 0700, its files 0600, and a token file has the contract's fields with offsets in its times."""
    token = KRTokenManager().get_valid_token()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder().iterdir()}
    key = next(name for name in modes if name.endswith(".lock")).removesuffix(".lock")
    marks = {f"{market}_token_issued_at.dat" for market in ("us", "kr")}
    views = {f"{market}_api_token.json" for market in ("us", "kr")}
    assert set(modes) == {f"{key}.json", f"{key}.lock", f"{key}.jsonl", ".gitignore", *views, *marks}
    assert set(modes.values()) == {0o600}
    assert stat.S_IMODE(folder().stat().st_mode) == 0o700
    content = json.loads((folder() / "us_api_token.json").read_text())
    times = [datetime.fromisoformat(content.pop(name)) for name in ("expires_at", "cached_at", "issued_at")]
    assert all(at.utcoffset() is not None for at in times)
    assert content == {
        "access_token": token,
        "token_type": "Bearer",
        "environment": "real",
        "key_fingerprint": key.removeprefix("key-"),
    }
    assert abs(float((folder() / "us_token_issued_at.dat").read_text()) - time.time()) < 5


def test_markets_with_keys_of_their_own_have_tokens_of_their_own(
    gateway: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A market with another key issues for itself, inside the minute of the first one."""
    monkeypatch.setenv("KIS_MARKETS__KR__APP_KEY", KEY)
    monkeypatch.setenv("KIS_MARKETS__KR__APP_SECRET", SECRET)
    assert USTokenManager().get_valid_token() != KRTokenManager().get_valid_token()
    assert asked(gateway) == 2
    assert len(list(folder().glob("key-*.jsonl"))) == 2


def test_valid_token_is_served_when_nothing_else_is_left(gateway: Sandbox) -> None:
    """A cached token needs neither KIS, nor the record, nor the lock file."""
    token = cached()
    gateway.fail("down")
    for path in folder().glob("key-*"):
        path.unlink()
    assert USTokenManager().get_valid_token() == token.access_token
    assert asked(gateway) == 0
    assert not list(folder().glob("key-*"))


def test_another_processs_renewal_is_seen_within_a_second(gateway: Sandbox) -> None:
    """A manager that has a token in memory gives out another process's token less than a second after it was saved."""
    held, old, new = USTokenManager(), cached(DAY - 7 * HOUR), make_token()
    assert held.get_valid_token() == old.access_token
    assert ended(in_child(lambda: KRTokenManager().save_token(new))) == 0
    time.sleep(1)
    assert held.get_valid_token() == new.access_token
    assert asked(gateway) == 0


@pytest.mark.usefixtures("gateway")
def test_a_look_at_an_unchanged_file_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a second the token costs a `stat` and no more; when it ends, and whether it was rejected, is minded too."""
    monkeypatch.setattr("tokencore.manager.FRESH", 0.0)
    manager = USTokenManager()
    token = manager.get_valid_token()  # from KIS,
    manager.get_valid_token()  # and now from the file
    with monkeypatch.context() as looking:
        looking.setattr(FileStore, "read", lambda *_: pytest.fail("it was read"))
        assert manager.get_valid_token() == manager.token_at_hand() == token
        due = time.time() + DAY - 1800  # when renewals ahead begin
        looking.setattr(time, "time", lambda: due)
        with pytest.raises(pytest.fail.Exception):
            manager.get_valid_token()
    for refused in (lambda: KRTokenManager().report_rejected(token), manager.get_valid_token):
        assert isinstance(raised(refused), IssuanceLimitError)


def test_valid_until_within_the_present_life_asks_nothing(gateway: Sandbox) -> None:
    """A token that lasts to the asked time is served as it is; a time in the past means now."""
    token = cached(7 * HOUR)
    now = datetime.now(UTC)
    for ahead in (-HOUR, 0, HOUR, 7 * HOUR - 301):
        assert USTokenManager().get_valid_token(now + timedelta(seconds=ahead)) == token.access_token
    assert asked(gateway) == 0


def test_valid_until_beyond_the_present_life_renews(gateway: Sandbox) -> None:
    """The buffer before the expiry does not count: who asks for a time inside it gets a new token that lasts."""
    token = cached(7 * HOUR)
    close = datetime.now(UTC) + timedelta(seconds=7 * HOUR - 299)
    served = USTokenManager().get_valid_token(valid_until=close)
    assert served != token.access_token
    assert KRTokenManager().get_valid_token(valid_until=close) == served
    assert asked(gateway) == 1


def test_valid_until_that_no_token_reaches_costs_no_issuance(gateway: Sandbox) -> None:
    """What even a new token would not serve is refused without a request, and the present token goes on."""
    token = cached(17 * HOUR)
    error = raised(lambda: USTokenManager().get_valid_token(datetime.now(UTC) + timedelta(hours=25)))
    assert isinstance(error, TokenUnavailableError)
    assert "Nothing was issued" in str(error)
    assert USTokenManager().get_valid_token() == token.access_token
    assert asked(gateway) == 0


def test_valid_until_that_the_issued_token_does_not_reach_says_so_and_keeps_it(gateway: Sandbox) -> None:
    """Without a token to judge by, one is issued; it does not last, an error says so, the next call asks nothing."""
    far = datetime.now(UTC) + timedelta(hours=25)
    error = raised(lambda: USTokenManager().get_valid_token(valid_until=far))
    assert isinstance(error, TokenUnavailableError)
    assert "too early" in str(error)
    assert isinstance(raised(lambda: USTokenManager().get_valid_token(valid_until=far)), TokenUnavailableError)
    assert USTokenManager().get_valid_token()
    assert asked(gateway) == 1


def test_valid_until_within_six_hours_of_the_issue_is_refused_until_they_are_over(gateway: Sandbox) -> None:
    """KIS would hand back the present token, so nothing is asked and `retry_at` is six hours after the issue."""
    token = cached(23 * HOUR, age=HOUR)
    error = raised(lambda: USTokenManager().get_valid_token(datetime.now(UTC) + timedelta(hours=23)))
    assert isinstance(error, IssuanceLimitError)
    assert (error.cause, error.retry_at) == ("same_token", issue_of(token) + timedelta(hours=6))
    assert asked(gateway) == 0


class _Own(BaseTokenManager):
    """A manager whose address, credentials and prefix are its own."""

    def get_api_url(self) -> str:
        return os.environ["KIS_BASE_URL"]

    def get_app_credentials(self) -> tuple[str, str]:
        return KEY, SECRET

    def get_token_file_prefix(self) -> str:
        return "own_"


def test_subclass_states_only_what_is_its_own(gateway: Sandbox) -> None:
    """Three methods make a manager with its own key, files and limits beside the configured markets."""
    token = _Own().get_valid_token()
    assert json.loads((folder() / "own_api_token.json").read_text())["access_token"] == token
    assert token != USTokenManager().get_valid_token()
    assert _Own().get_token_status()["market"] == "own"
    assert asked(gateway) == 2


def test_base_manager_is_not_complete() -> None:
    """The base class, used as it is, says in one sentence what a subclass has to give."""
    with pytest.raises(
        NotImplementedError, match=r"has to give get_api_url.*get_token_file_prefix"
    ):
        BaseTokenManager()


def test_us_and_kr_state_only_what_is_theirs() -> None:
    """Beside their names they have no method of their own: all logic is the base's."""
    for own in (USTokenManager, KRTokenManager):
        assert {name for name in vars(own) if not name.startswith("__")} == set()


@pytest.mark.usefixtures("gateway")
def test_saved_token_is_loaded_for_every_market_and_judged_by_its_buffer() -> None:
    """`save_token`, `load_token` and `is_token_expired` agree: inside the buffer a token counts no longer."""
    token = cached(302)
    loaded = KRTokenManager().load_token()
    assert loaded is not None
    assert (loaded.access_token, loaded.expires_at) == (token.access_token, token.expires_at)
    assert not USTokenManager().is_token_expired()
    cached(300)
    assert USTokenManager().is_token_expired()
    assert USTokenManager().load_token() is not None


@pytest.mark.usefixtures("gateway")
def test_status_is_a_mapping_and_the_info_is_for_people() -> None:
    """The same facts for programs and, in aligned lines with both time zones, for people."""
    cached(25 * 60)
    status = USTokenManager().get_token_status()
    assert (status["status"], status["valid"]) == ("EXPIRING_SOON", True)
    assert 24 * 60 < status["remaining_seconds"] <= 25 * 60
    told = USTokenManager().get_token_info().splitlines()
    assert {line[:13].rstrip() for line in told} >= {"market", "status", "left", "file"}
    assert any("KST" in line and "local" in line for line in told)


@pytest.mark.usefixtures("gateway")
def test_directory_that_is_a_file_is_a_store_error_and_costs_no_request(gateway: Sandbox) -> None:
    """Where no lock can be had nothing is issued; saving and deleting say the same."""
    folder().write_text("not a folder")
    for work in (
        USTokenManager().get_valid_token,
        lambda: USTokenManager().save_token(make_token()),
        USTokenManager().delete_token,
    ):
        assert isinstance(raised(work), TokenStoreError)
    assert asked(gateway) == 0


def test_missing_credentials_and_unknown_markets_are_named() -> None:
    """The sentence says which variable is missing, or which markets there are."""
    assert "KIS_APP_KEY" in str(raised(USTokenManager().get_valid_token))
    error = raised(lambda: TokenManager("hk"))
    assert isinstance(error, ConfigurationError)
    assert "KIS_MARKETS__HK__EXCHANGES" in str(error)
