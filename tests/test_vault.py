"""App secrets from the system's keyring: when it is asked, for what, and what is said where it does not serve."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import keyring
import pytest
import requests
from builders import KEY
from keyring.core import load_keyring
from running import asked, raised, start, tokencore

from tokencore import ConfigurationError, KISAuth, KRTokenManager, USTokenManager, sources
from tokencore.sandbox import APP_SECRET

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokencore.sandbox import Sandbox

OWN = "KIS_MARKETS__KR__APP_SECRET"
GET = "import sys; from tokencore.cli import main; code = main(['get', 'us']); print(*sys.modules, file=sys.stderr)"


@pytest.fixture(autouse=True)
def backend(gateway: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    """The tests' keyring, switched on, with no other source of the secret."""
    monkeypatch.delenv("KIS_APP_SECRET")
    monkeypatch.setenv("KIS_KEYRING", "kis")
    with using("keyring_in_file.Keyring"):
        yield gateway


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """Another keyring for a while."""
    before = keyring.get_keyring()
    keyring.set_keyring(load_keyring(name))
    yield
    keyring.set_keyring(before)


def keep(**secrets: str) -> None:
    """Put secrets into the keyring."""
    (Path.home() / "keyring.json").write_text(json.dumps({"kis": secrets}))


def questions() -> list[str]:
    """What the keyring was asked for."""
    log = Path.home() / "keyring.log"
    return log.read_text().splitlines() if log.exists() else []


def test_secret_that_no_other_source_gives_comes_from_the_keyring(gateway: Sandbox) -> None:
    """A renewal asks for it once, with the name that the variable would have."""
    keep(KIS_APP_SECRET=APP_SECRET)
    assert USTokenManager().get_valid_token()
    assert questions() == ["kis KIS_APP_SECRET"]
    assert asked(gateway) == 1


def test_cached_token_asks_no_keyring_and_imports_none(gateway: Sandbox) -> None:
    """Neither a manager, nor the command, nor a status: the app key alone says whose the token is."""
    token = cached_by_an_issue()
    before = questions()
    assert USTokenManager().get_valid_token() == KRTokenManager().get_valid_token() == token
    assert KRTokenManager().get_token_status()["valid"]
    out, modules = start(GET).communicate(timeout=30)
    assert out == token + "\n"
    assert not {"keyring", "tokencore.vault"} & set(modules.split())
    assert questions() == before
    assert asked(gateway) == 1


def cached_by_an_issue() -> str:
    """A token, issued with the keyring's secret."""
    keep(KIS_APP_SECRET=APP_SECRET)
    return USTokenManager().get_valid_token()


def test_other_sources_come_first_and_the_markets_own_before_the_common_one(
    gateway: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who gives the secret elsewhere asks no keyring; a market with a key of its own has its own secret there."""
    keep(KIS_APP_SECRET=APP_SECRET, **{OWN: "of-kr"})
    monkeypatch.setenv("KIS_MARKETS__KR__APP_KEY", KEY)
    assert USTokenManager().get_app_credentials()[1] == APP_SECRET
    assert KRTokenManager().get_app_credentials() == (KEY, "of-kr")
    monkeypatch.setenv("KIS_APP_SECRET", "given")
    assert KRTokenManager().get_app_credentials() == (KEY, "of-kr")
    count = len(questions())
    assert USTokenManager().get_app_credentials()[1] == "given"
    monkeypatch.setenv(OWN, "given-too")
    assert KRTokenManager().get_app_credentials()[1] == "given-too"
    assert len(questions()) == count
    assert asked(gateway) == 0


def test_origins_tell_what_the_keyring_gives() -> None:
    """For `doctor`: the secret's origin is the keyring, by its service."""
    keep(KIS_APP_SECRET=APP_SECRET)
    assert sources.origins()["KIS_APP_SECRET"] == "keyring kis"


def test_signer_asks_the_keyring_once() -> None:
    """The secret goes along with every request, and is asked for with the first."""
    cached_by_an_issue()
    auth, before = KISAuth("us"), len(questions())
    url = USTokenManager().get_api_url()
    signed = [requests.Request("GET", url, auth=auth).prepare().headers["appsecret"] for _ in range(3)]
    assert signed == [APP_SECRET] * 3
    assert len(questions()) == before + 1


def test_locked_keyring_is_one_sentence_and_the_cached_token_still_served(gateway: Sandbox) -> None:
    """Nothing is asked of KIS; the backend's own words are not repeated."""
    error = raised(USTokenManager().get_valid_token)
    assert isinstance(error, ConfigurationError)
    assert "KIS_KEYRING=kis), but it is locked" in str(error)
    assert "Canary" not in str(error)
    assert asked(gateway) == 0
    token = cached_by_an_issue()
    (Path.home() / "keyring.json").unlink()
    assert USTokenManager().get_valid_token() == token


def test_keyring_without_the_secret_says_how_to_put_it_there() -> None:
    """The sentence has the very command."""
    keep()
    assert "`keyring set kis KIS_APP_SECRET`" in str(raised(USTokenManager().get_valid_token))


def test_app_key_is_not_looked_for_in_the_keyring(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing key is said to be missing, and that the keyring keeps secrets only."""
    keep(KIS_APP_KEY=KEY, KIS_APP_SECRET=APP_SECRET)
    monkeypatch.delenv("KIS_APP_KEY")
    assert "keyring keeps its secret only" in str(raised(USTokenManager().get_valid_token))
    assert questions() == []


def test_machine_without_a_keyring_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """No backend, or not even the package: what is missing and what to do, exit 2."""
    with using("keyring.backends.fail.Keyring"):
        assert "this machine has none" in str(raised(USTokenManager().get_valid_token))
    monkeypatch.setitem(sys.modules, "keyring", None)
    assert "pip install 'tokencore[keyring]'" in str(raised(USTokenManager().get_valid_token))


def test_without_the_switch_no_keyring_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """KIS_KEYRING is the switch: otherwise a missing secret is a missing secret."""
    keep(KIS_APP_SECRET=APP_SECRET)
    monkeypatch.delenv("KIS_KEYRING")
    assert "KIS_APP_SECRET is not set" in str(raised(USTokenManager))
    assert questions() == []


def test_command_with_the_systems_keyring(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own finds the backend that the machine names; the token is on standard output."""
    keep(KIS_APP_SECRET=APP_SECRET)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    ran = tokencore("get", "us", PYTHON_KEYRING_BACKEND="keyring_in_file.Keyring")
    assert (ran.code, ran.err) == (0, "")
