"""A canary key, secret and token through all that can happen: nothing shown, logged or written has any of them."""

from __future__ import annotations

import base64
import gc
import json
import os
import pickle
import time
import traceback
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import urlencode

import pytest
import requests
from builders import CANARIES, KEY, SECRET, forms, make_jwt, make_token
from running import Ran, raised, start
from running import tokencore as commanded

import tokencore
from tokencore import (
    Consequence,
    KISAuth,
    KISHttpxAuth,
    KRTokenManager,
    Note,
    Settings,
    TokenError,
    TokenManager,
    USTokenManager,
    foresee,
    look,
    make_plan,
    managers,
    overrides,
    tick,
)
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

# A JWT's beginning is packed in too many ways by chance; its first words are not.
FORMS = {"Canary": forms("Canary"), "eyJ": forms(make_jwt()[:16])}
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
    """The canaries in a text, also packed, quoted or escaped."""
    raw = text.encode(errors="surrogateescape")
    return [canary for canary in CANARIES if canary in text or any(form in raw for form in FORMS[canary])]


def files_but_tokens(place: Path) -> str:
    """All that is on disk there, core files too, names and contents, except the token files."""
    files = [path for path in place.rglob("*") if path.is_file() and "_api_token.json" not in path.name]
    return "\n".join(f"{path.name}\n{path.read_bytes().decode(errors='surrogateescape')}" for path in files)


@pytest.mark.parametrize("before", ["", "x", "xy"])
def test_the_search_finds_a_secret_in_every_dress(before: str) -> None:
    """In base64 at any place, in a URL, in JSON, in HTML, as hex and as UTF-16: else the other tests prove nothing."""
    text = f"{before}{SECRET} and more"
    raw = text.encode()
    dressed = [
        base64.b64encode(raw),
        base64.urlsafe_b64encode(raw),
        raw.hex().encode(),
        urlencode({"s": text}).encode(),
    ]
    dressed += [json.dumps({"s": text}).encode(), pickle.dumps(text), pickle.dumps(text, 0), text.encode("utf-16")]
    assert [one for one in dressed if not any(form in one for form in forms(SECRET))] == []
    assert [one for one in dressed if not leaks(one.decode("latin-1"))] == []


def test_logs_tracebacks_and_files_hold_no_secret_whatever_happens(canaries: Sandbox, isolated: Path) -> None:
    """Every failure of KIS, with all loggers at DEBUG and every exception printed with its traceback."""
    modes = ",".join(mode for mode in FAILURES if mode not in ("huge", "drip"))
    temporary = isolated / "tmp"
    temporary.mkdir()
    child = start(EVERYTHING, modes, canaries.url, TMPDIR=str(temporary))
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    assert "Traceback" in err
    assert "urllib3" in err
    assert canaries.stats()["granted_new"] >= 1
    assert leaks(out + err) == []
    assert leaks(files_but_tokens(isolated.parent)) == []


def test_commands_tell_no_secret_but_the_token_that_get_prints(canaries: Sandbox, command: Callable[..., Ran]) -> None:
    """No command but `get` tells a token, and none a key or secret, whatever it met."""
    told = [command("refresh", "us"), command("check", "--probe"), command("check", "--json")]
    for mode in ("bad-key", "garbage", "html", "half"):
        canaries.fail(mode, 1)
        time.sleep(0.1)
        told += [command("refresh", "us", "--force"), command("history", "--json"), command("tick")]
    told += [command("doctor"), command("plan"), command("tick"), command("export", "us", "--to", "kis-auth", "copies")]
    told += [command("get", "us", "--until", KEY), command("export", "us", "--to", KEY, SECRET), command(KEY, SECRET)]
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


def public_objects(gateway: Sandbox) -> list[object]:
    """Something of every class of the front door, after it has been used."""
    manager, now = USTokenManager(), datetime.now(UTC)
    manager.refresh(reason="look", by="me")
    time.sleep(0.1)
    found = [manager, KRTokenManager(), *managers(), KISAuth("us"), KISHttpxAuth("us"), Settings.load()]
    found += [make_plan(manager, now), look(manager, now), tick(manager, now), overrides()]
    found += [
        *foresee(manager, now),
        Consequence("same token", "told"),
        Note("look", "me"),
        manager.load_token(),
        manager.history(),
        manager.get_token_status(),
    ]
    for mode in ("limit", "bad-key", "down", "garbage"):
        gateway.fail(mode, 1)
        found.append(raised(lambda: manager.refresh(force=True, reason="try")))
        time.sleep(0.11)
    KISAuth("us").__call__(requests.Request("GET", f"{gateway.url}/uapi/x").prepare())
    return found


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
    found = reachable(public_objects(canaries))
    classes = {base for one in found for base in type(one).__mro__}
    public = {one for name in tokencore.__all__ if isinstance(one := getattr(tokencore, name), type)}
    assert {one for one in public if not issubclass(one, TokenError)} <= classes
    for one in found:
        shown = f"{one!r} {one} {getattr(one, '__dict__', '')}"
        assert leaks(shown) == [], type(one)
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            try:
                content = pickle.dumps(one, protocol)
            except TypeError as refused:
                content = str(refused).encode()
            assert leaks(content.decode("latin-1")) == [], type(one)


def with_locals(error: BaseException) -> str:
    """What a tool tells that prints the local variables of our frames, the error's own and those behind it."""
    told: list[str] = []
    chained: traceback.TracebackException | None
    chained = traceback.TracebackException.from_exception(error, capture_locals=True)
    while chained is not None:
        ours = [frame for frame in chained.stack if f"{os.sep}tokencore{os.sep}" in frame.filename]
        told += [f"{frame.name}: {frame.locals}" for frame in ours]
        chained = chained.__cause__ or (None if chained.__suppress_context__ else chained.__context__)
    return "\n".join(told)


def test_a_traceback_with_all_local_variables_has_no_secret(canaries: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """As rich, cgitb or an error tracker print it: no frame of ours that an error passes through holds one in clear."""
    manager, told = USTokenManager(), []
    for mode in (mode for mode in FAILURES if mode not in ("huge", "drip")):
        for work in (manager.get_valid_token, partial(manager.refresh, force=True)):
            for one in (manager, KRTokenManager()):
                one.delete_token()
            canaries.fail(mode, 1)
            try:
                work()
            except TokenError as error:
                told.append(with_locals(error))
            time.sleep(0.11)
    assert len(told) > len(FAILURES)
    assert leaks("".join(told)) == []
    for variable, value in (("KIS_APP_KEY", f"{KEY} x"), ("KIS_TIMEOUT", SECRET), ("KIS_ENVIRONMENT", KEY)):
        with monkeypatch.context() as wrong:
            wrong.setenv(variable, value)
            assert leaks(with_locals(raised(USTokenManager))) == []


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
        ran = commanded("check", **{"KIS_APP_KEY": "k", "KIS_APP_SECRET": "s", variable: value})
        assert ran.code == 2
        assert leaks(ran.err) == [], variable
