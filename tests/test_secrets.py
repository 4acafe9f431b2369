"""A canary key, secret and token through all that can happen: nothing shown, logged or written has any of them."""

from __future__ import annotations

import base64
import gc
import json
import pickle
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from urllib.parse import urlencode

import pytest
import requests
from builders import CANARIES, KEY, SECRET, forms, make_jwt, make_token
from running import Ran, raised, start
from stepping import FULL

import tokencore
from tokencore import (
    Key,
    KISAuth,
    KISHttpxAuth,
    KRTokenManager,
    Settings,
    TokenError,
    TokenManager,
    USTokenManager,
    draw_plans,
    open_document,
)
from tokencore.clients.approval import ApprovalKeys
from tokencore.config.sources import gather
from tokencore.kis.gateway import Gateway
from tokencore.manager import make_renewer
from tokencore.sandbox.rules import FAILURES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tokencore.sandbox import Sandbox

# A JWT's beginning is packed in too many ways by chance; its first words are not.
FORMS = {"Canary": forms("Canary"), "eyJ": forms(make_jwt()[:16])}
QUICK_FAILURES = [mode for mode in FAILURES if mode not in ("huge", "drip")]
EVERYTHING = """
import logging, sys, time, traceback
from datetime import UTC, datetime, timedelta

logging.basicConfig(level=logging.DEBUG, stream=sys.stderr, format="%(name)s %(message)s %(args)s")

import requests
from tokencore import Key, KISAuth, Settings, TokenManager

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

def decide():
    states = [key.state(datetime.now(UTC)) for key in Key.load(Settings.load())]
    return [(state, state.key.tick(state), state.key.prove(state.token), state.plan()) for state in states]

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
attempt(decide)
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
    """The canaries in a text, also packed, quoted or escaped."""
    raw = text.encode(errors="surrogateescape")
    return [canary for canary in CANARIES if canary in text or any(form in raw for form in FORMS[canary])]


def files_but_tokens(place: Path) -> str:
    """All that is on disk there, core files too, names and contents, except the token files."""
    files = [path for path in place.rglob("*") if path.is_file()]
    holders = [
        path for path in files if path.name.endswith("_api_token.json") or path.match("key-????????????????.json")
    ]
    others = [path for path in files if path not in holders]
    return "\n".join(f"{path.name}\n{path.read_bytes().decode(errors='surrogateescape')}" for path in others)


@pytest.mark.parametrize("before", ["", "x", "xy"])
def test_the_search_finds_a_secret_in_every_dress(before: str) -> None:
    """In base64 at any place, in a URL, in JSON, in HTML, as hex and as UTF-16: else the other tests prove nothing."""
    text = f"{before}{SECRET} and more"
    raw = text.encode()
    dressed = [base64.b64encode(raw), base64.urlsafe_b64encode(raw), raw.hex().encode()]
    dressed += [urlencode({"s": text}).encode(), json.dumps({"s": text}).encode()]
    dressed += [pickle.dumps(text), pickle.dumps(text, 0), text.encode("utf-16")]
    assert [one for one in dressed if not any(form in one for form in forms(SECRET))] == []
    assert [one for one in dressed if not leaks(one.decode("latin-1"))] == []


def test_logs_tracebacks_and_files_hold_no_secret_whatever_happens(canaries: Sandbox, isolated: Path) -> None:
    """Failures of KIS, with all loggers at DEBUG and every exception printed with its traceback."""
    modes = QUICK_FAILURES if FULL else QUICK_FAILURES[::3]
    temporary = isolated / "tmp"
    temporary.mkdir()
    child = start(EVERYTHING, ",".join(modes), canaries.url, TMPDIR=str(temporary))
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    assert "Traceback" in err
    assert "urllib3" in err
    assert canaries.stats()["granted_new"] >= 1
    assert leaks(out + err) == []
    assert leaks(files_but_tokens(isolated.parent)) == []


def test_commands_tell_no_secret_but_the_token_that_get_prints(canaries: Sandbox, command: Callable[..., Ran]) -> None:
    """No command but `get` tells a token, and none a key or secret, whatever it met."""
    told = [command("refresh", "us"), command("check", "--probe"), command("check", "--json"), command("metrics")]
    for mode in ("bad-key", "garbage", "html", "half"):
        canaries.fail(mode, 1)
        time.sleep(0.1)
        told += [command("refresh", "us", "--force", "--yes"), command("history", "--json"), command("tick")]
    told += [command("doctor"), command("plan"), command("tick"), command("export", "us", "--to", "kis-auth", "copies")]
    told += [command("get", "us", "--until", KEY), command("export", "us", "--to", KEY, SECRET), command(KEY, SECRET)]
    got = command("get", "us")
    told += [command("delete", "us", "--revoke", "--yes"), command("check"), command("history")]
    assert got.out.startswith("eyJ")
    assert leaks(got.err) == []
    assert leaks(repr(told)) == []


def objects(gateway: Sandbox) -> Iterator[object]:
    """Something of every class that knows a key, a secret or a token, after it has been used."""
    manager, now = USTokenManager(), datetime.now(UTC)
    manager.refresh(reason="look", by="me")
    time.sleep(0.1)
    (key,) = Key.load(Settings.load())
    state = key.state(now)
    yield from (
        manager,
        TokenManager("us"),
        KRTokenManager(),
        manager.market,
        key,
        state,
        key.tick(state),
        state.plan(),
    )
    yield from (key.store, key.store.document("approval"), make_renewer(key.markets, key.store), state.warnings())
    yield from (KISAuth("us"), KISHttpxAuth("us"), gather(), Settings.load(), make_token(), manager.history())
    yield from (Gateway(gateway.url, (KEY, SECRET), timeout=1), manager.get_token_status(), manager.load_token())
    yield from (ApprovalKeys(key.market, key.store, key.renewer), key.prove(make_token()), open_document("/", "x"))
    yield draw_plans([state.plan()])
    for mode in ("limit", "bad-key", "down", "garbage"):
        gateway.fail(mode, 1)
        yield raised(lambda: manager.refresh(force=True, reason="try"))
        time.sleep(0.11)
    KISAuth("us").__call__(requests.Request("GET", f"{gateway.url}/uapi/x").prepare())


def reachable(roots: list[object]) -> list[object]:
    """The objects of this package that the roots lead to, by whichever attribute, list or mapping."""
    found, waiting = {}, list(roots)
    while waiting:
        one = waiting.pop()
        ours = type(one).__module__.startswith("tokencore")
        if id(one) in found or isinstance(one, type) or not (ours or isinstance(one, dict | list | tuple | set)):
            continue
        found[id(one)] = one
        waiting += gc.get_referents(one)
    return [one for one in found.values() if type(one).__module__.startswith("tokencore")]


def test_every_public_class_and_all_that_it_leads_to_keeps_its_secrets(canaries: Sandbox) -> None:
    """No repr, text or pickle of any object of ours that the front door leads to has a secret in it."""
    roots = list(objects(canaries))
    assert leaks(f"{roots} {roots!r}") == []
    found = reachable(roots)
    classes = {base for one in found for base in type(one).__mro__}
    public = {one for name in tokencore.__all__ if isinstance(one := getattr(tokencore, name), type)}
    assert {one for one in public if not issubclass(one, TokenError)} <= classes
    for one in found:
        assert leaks(f"{one!r} {one} {getattr(one, '__dict__', '')}") == [], type(one)
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            try:
                content = pickle.dumps(one, protocol)
            except (TypeError, AttributeError, pickle.PicklingError) as refused:
                content = str(refused).encode()
            assert leaks(content.decode("latin-1")) == [], type(one)
