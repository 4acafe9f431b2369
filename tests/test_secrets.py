"""A canary key, secret and token through all that can happen: nothing shown, logged or written has any of them."""

from __future__ import annotations

import pickle
import time
from typing import TYPE_CHECKING

import pytest
from builders import CANARIES, KEY, SECRET, make_token
from running import Ran, folder, start, tokencore

from tokencore import KISAuth, Settings, TokenManager, USTokenManager, look
from tokencore.cache import Cache
from tokencore.issuer import Issuer
from tokencore.keeper import Keeper
from tokencore.lock import KeyLock
from tokencore.market import Market
from tokencore.sandbox_rules import FAILURES
from tokencore.sources import gather

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tokencore.sandbox import Sandbox

EVERYTHING = """
import logging, sys, time, traceback
from datetime import UTC, datetime, timedelta

logging.basicConfig(level=logging.DEBUG, stream=sys.stderr, format="%(name)s %(message)s %(args)s")

import requests
from tokencore import KISAuth, TokenManager, managers, tick

FAILURES = sys.argv[1].split(",")
URL = sys.argv[2]

def attempt(work):
    try:
        print(repr(work()) if work.__name__ != "get_valid_token" else len(work()))
    except Exception:
        traceback.print_exc()
    time.sleep(0.11)

def control(path, **body):
    requests.post(f"{URL}/sandbox/{path}", json=body, timeout=5).raise_for_status()

us = TokenManager("us")
for mode in FAILURES:
    control("fail", mode=mode, count=1)
    attempt(us.get_valid_token)
    attempt(lambda: us.refresh(force=True, reason="try"))
control("clear")
attempt(us.get_valid_token)
attempt(lambda: us.get_valid_token(datetime.now(UTC) + timedelta(days=3)))
attempt(lambda: requests.get(f"{URL}/uapi/x", auth=KISAuth("us"), timeout=5).status_code)
attempt(us.probe)
attempt(us.load_token)
attempt(us.get_token_status)
attempt(us.get_token_info)
attempt(us.history)
attempt(lambda: [tick(manager, datetime.now(UTC)) for manager in managers()])
control("fail", mode="dead-token")
attempt(us.probe)
attempt(lambda: us.report_rejected(us.load_token().access_token))
attempt(us.revoke)
attempt(us.delete_token)
"""


@pytest.fixture
def canaries(quick: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """The gateway, asked with credentials that are easy to find."""
    monkeypatch.setenv("KIS_APP_KEY", KEY)
    monkeypatch.setenv("KIS_APP_SECRET", SECRET)
    return quick


def leaks(text: str) -> list[str]:
    """The canaries in a text."""
    return [canary for canary in CANARIES if canary in text]


def files_but_tokens(home: Path) -> str:
    """All that is on disk, names and contents, except the token files."""
    files = [path for path in home.rglob("*") if path.is_file() and "_api_token.json" not in path.name]
    return "\n".join(f"{path.name}\n{path.read_bytes().decode(errors='replace')}" for path in files)


def test_logs_tracebacks_and_files_hold_no_secret_whatever_happens(canaries: Sandbox, isolated: Path) -> None:
    """Every failure of KIS, with all loggers at DEBUG and every exception printed with its traceback."""
    modes = ",".join(mode for mode in FAILURES if mode not in ("huge", "drip"))
    child = start(EVERYTHING, modes, canaries.url)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    assert "Traceback" in err
    assert "urllib3" in err
    assert canaries.stats()["granted_new"] >= 1
    assert leaks(out + err) == []
    assert leaks(files_but_tokens(isolated)) == []
    assert leaks(files_but_tokens(folder())) == []


def test_commands_tell_no_secret_but_the_token_that_get_prints(canaries: Sandbox, command: Callable[..., Ran]) -> None:
    """No command but `get` tells a token, and none a key or secret, whatever it met."""
    told = [command("refresh", "us"), command("check", "--probe"), command("check", "--json")]
    for mode in ("bad-key", "garbage", "html", "half"):
        canaries.fail(mode, 1)
        time.sleep(0.1)
        told += [command("refresh", "us", "--force"), command("history", "--json"), command("tick")]
    got = command("get", "us")
    told += [command("delete", "us", "--revoke"), command("get", "us"), command("check"), command("history")]
    assert got.out.startswith("eyJ")
    assert leaks(got.err) == []
    assert leaks(repr(told)) == []


def objects(gateway: Sandbox) -> list[object]:
    """Everything that knows a key, a secret or a token."""
    manager = USTokenManager()
    market = manager.market
    cache = Cache(market.token_dir, market.base_url, market.environment, KEY, ["us_"])
    return [
        manager,
        KISAuth("us"),
        market,
        cache,
        Keeper(market, cache, (KEY, SECRET), gateway.url),
        Issuer(gateway.url, KEY, SECRET, timeout=1),
        make_token(),
        gather(),
        Settings.load(),
        KeyLock(market.token_dir, "0" * 16),
        Market("kr", gather().values),
    ]


def test_no_repr_shows_a_secret(canaries: Sandbox) -> None:
    """What a debugger, `vars`, an assertion or an f-string shows of our objects has no secret, alone or in a list."""
    manager = USTokenManager()
    manager.get_valid_token()
    found = [manager, *objects(canaries)]
    assert leaks(repr(found) + "".join(f"{one} {one!r} {getattr(one, '__dict__', '')}" for one in found)) == []


def test_nothing_that_knows_a_secret_is_pickled_with_it(canaries: Sandbox) -> None:
    """A pickle, such as a task queue or a result store makes, either is refused or has no secret in it."""
    for one in objects(canaries):
        try:
            content = pickle.dumps(one)
        except TypeError as refused:
            content = str(refused).encode()
        assert leaks(content.decode("latin-1")) == [], type(one)


def test_outlook_of_the_rule_shows_no_token(canaries: Sandbox) -> None:
    """A decision can be logged as it is."""
    TokenManager("us").save_token(make_token())
    outlook = look(USTokenManager(), make_token().expires_at)
    assert outlook.token is not None
    assert leaks(repr(outlook)) == []
    assert canaries.stats()["token_requests"] == 0


def test_usage_errors_do_not_repeat_a_secret_that_was_typed_by_mistake() -> None:
    """A key given as a setting of the wrong kind is not shown in the sentence about it."""
    for variable in ("KIS_ENVIRONMENT", "KIS_BASE_URL", "KIS_TIMEOUT", "KIS_MARKETS__US__BASE_URL", "KIS_APP_KEY"):
        value = KEY + " " + SECRET if variable == "KIS_APP_KEY" else KEY
        ran = tokencore("check", **{"KIS_APP_KEY": "k", "KIS_APP_SECRET": "s", variable: value})
        assert ran.code == 2
        assert leaks(ran.err) == [], variable
