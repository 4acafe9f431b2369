"""No log, output, repr, pickle, file or traceback has a key, a secret or a token, whatever happens.

The tests call every function, method and property of `tokencore.__all__`, so that a new one is covered from its first
day; a new parameter needs a value in `ARGUMENTS`.
"""

import asyncio
import base64
import concurrent.futures
import gc
import inspect
import logging
import os
import pickle
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpcore
import httpx
import pytest
import requests
from builders import CANARIES, KEY, SECRET, OwnManager, forms, make_jwt, make_token
from running import Command, forked
from servers import Wire
from stepping import FULL

import tokencore
from tokencore import Key, KISAuth, KISHttpxAuth, Settings, TokenError, TokenManager, USTokenManager
from tokencore.clients.approval import ApprovalKeys
from tokencore.kis.gateway import Gateway
from tokencore.sandbox import Sandbox
from tokencore.sandbox.rules import FAILURES

Call = Callable[[], object]
# The packed forms of "eyJ" also occur by chance; those of a JWT's first 16 characters do not.
FORMS = {"Canary": forms("Canary"), "eyJ": forms(make_jwt()[:16])}
MODES = [mode for mode in FAILURES if mode not in ("huge", "drip")]
PROCESSES = 16
PAUSE = 0.11  # seconds: the gateway's minute is over
LIBRARIES = (httpx, httpcore, asyncio, threading, concurrent.futures)  # whose frames belong to the caller's own request
CALLER = (os.path.dirname(__file__), *(str(library.__file__).removesuffix("__init__.py") for library in LIBRARIES))


@pytest.fixture
def canaries(quick: Sandbox) -> Sandbox:
    """The gateway, with settings whose credentials are easy to search for."""
    os.environ |= {"KIS_APP_KEY": KEY, "KIS_APP_SECRET": SECRET}
    return quick


def leaks(text: str) -> list[str]:
    """The canaries that a text contains, also in encoded, quoted or escaped form."""
    raw = text.encode(errors="surrogateescape")
    return [canary for canary in CANARIES if canary in text or any(form in raw for form in FORMS[canary])]


def state() -> tokencore.KeyState:
    """The present state of the first key."""
    return Key.load(Settings.load())[0].state(datetime.now(UTC))


ARGUMENTS: dict[str, Any] = dict.fromkeys(("access_token", "rejected"), make_jwt()) | {"token": make_token()}
ARGUMENTS |= {"now": datetime.now(UTC), "force": True, "by": "me", "reason": "try", "market": "us", "name": "us"}
ARGUMENTS |= dict.fromkeys(("until", "valid_until"), datetime.now(UTC) + timedelta(hours=30))
ARGUMENTS |= {"exchange": "NASD", "codes": ["NASD"], "names": ["KIS_APP_SECRET"], "client": "python-kis"}
ARGUMENTS |= {"folder": "copies", "plans": [], "token_dir": "/proc/nothing"}


MAKERS: dict[str, Call] = {
    "BaseTokenManager": lambda: OwnManager("us_"),
    "USTokenManager": USTokenManager,
    "Key": lambda: state().key,
    "KeyState": state,
    "Settings": Settings.load,
}  # the other classes are signers, errors, and managers with the same methods


def public_names(cls: type) -> list[str]:
    """The names that a program may use of a class: methods and properties that this package defines."""
    known = {name: getattr(one, "fget", getattr(one, "__func__", one)) for name, one in inspect.getmembers_static(cls)}
    ours = {name for name, one in known.items() if inspect.isfunction(one) and "tokencore" in one.__module__}
    return [name for name in ours if not name.startswith("_")]


def used(work: Any) -> object:  # noqa: ANN401 - a property's value is done already
    """Call `work` with a value for every parameter that is required or has one in `ARGUMENTS`."""
    if not inspect.isroutine(work):
        return work
    known = ARGUMENTS | {"settings": Settings.load(), "state": state()}
    known |= {"token": make_jwt()} if "(token: str" in str(inspect.signature(work)).replace("'", "") else {}
    given = inspect.signature(work).parameters.values()
    needed = [one.name for one in given if one.name in known or (one.default is one.empty and one.kind not in (2, 4))]
    return work(**{name: known[name] for name in needed})  # KeyError: give a new parameter a value in ARGUMENTS


def signed(auth: type[KISAuth | KISHttpxAuth]) -> object:
    """Return a signed request, or for httpx, whose signer works while sending, the answer to one."""
    url, signer = f"{Settings.load().base_url}/uapi/x", auth("us")
    if isinstance(signer, KISAuth):
        return signer(requests.Request("GET", url).prepare())
    return httpx.Client(auth=signer, trust_env=False).get(url)


async def signed_on_a_loop() -> None:
    """Send a request that is signed on an event loop."""
    url, signer = f"{Settings.load().base_url}/uapi/x", KISHttpxAuth("us")
    async with httpx.AsyncClient(auth=signer, trust_env=False) as client:
        await client.get(url)


def everything() -> dict[str, Call]:
    """Return every use that a program can make of the public names, by name."""
    found: dict[str, Call] = {
        **{name: partial(signed, getattr(tokencore, name)) for name in ("KISAuth", "KISHttpxAuth")},
        "KISHttpxAuth on a loop": lambda: asyncio.run(signed_on_a_loop()),
        "a key as who asks": partial(Key.note, "me", KEY),
        "a secret as a reason": lambda: USTokenManager().refresh(reason=SECRET),
    }
    for name in tokencore.__all__:
        public = getattr(tokencore, name)
        if inspect.isfunction(public):
            found[name] = partial(used, public)
        elif inspect.isclass(public) and name not in found and not issubclass(public, (Exception, TokenManager)):
            found |= uses(name, public)
    return found | uses("USTokenManager", USTokenManager)


def uses(name: str, cls: type) -> dict[str, Call]:
    """Return the use of each method and property of a class, each on an object of its own."""
    return {f"{name}.{one}": lambda one=one: used(getattr(MAKERS[name](), one)) for one in public_names(cls)}  # type: ignore[misc]


def carried(error: BaseException, seen: frozenset[int] = frozenset()) -> Iterator[str]:
    """Yield what an error tracker finds: variables of all frames except the caller's, also of the chained errors."""
    step = error.__traceback__
    while step:
        if not step.tb_frame.f_code.co_filename.startswith(CALLER):
            for name, value in step.tb_frame.f_locals.items():
                inside = value if isinstance(value, (list, tuple, set)) else getattr(value, "__dict__", {})
                yield f"{step.tb_frame.f_code.co_qualname}: {name} = {value!r} {value} {inside!r}"
        step = step.tb_next
    for behind in (error.__cause__, error.__context__):
        if behind is not None and id(behind) not in seen:
            yield f"{behind!r} {vars(behind)}"
            yield from carried(behind, seen | {id(behind)})


def leaking(error: BaseException) -> list[str]:
    """The variables and messages of an error that contain a canary."""
    return [shown for shown in (*carried(error), str(error)) if any(canary in shown for canary in CANARIES)]


def outcome(call: Call) -> object:
    """Return what the call returns, or the error that it raises."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001 - whatever it is
        return error


def test_the_search_finds_a_secret_in_every_dress() -> None:
    """A secret is found in base64 at any offset, in a URL, as hex and as UTF-16, or the other tests prove nothing."""
    for text in (f"{before}{SECRET} and more" for before in ("", "x", "xy")):
        raw = text.encode()
        dressed = [base64.b64encode(raw), base64.urlsafe_b64encode(raw), raw.hex().encode(), text.encode("utf-16")]
        dressed += [urlencode({"s": text}).encode(), pickle.dumps(text, 0)]
        assert [one for one in dressed if not leaks(one.decode("latin-1"))] == []


def test_logs_tracebacks_files_and_objects_hold_no_secret_whatever_happens(
    canaries: Sandbox, isolated: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """None of these shows a secret, for every public name and KIS's failures, with all loggers at DEBUG."""
    caplog.set_level(logging.DEBUG)
    calls, met = everything(), list[object]()
    for mode in MODES if FULL else MODES[::3]:
        canaries.fail(mode, 1)
        for name in ("get_valid_token", "refresh"):
            met.append(outcome(calls[f"USTokenManager.{name}"]))
            time.sleep(PAUSE)
    canaries.clear()
    met += [outcome(call) for call in (*calls.values(), *MAKERS.values())]
    time.sleep(PAUSE)
    canaries.set_rules(same_token=0)  # one of the calls may have revoked the present token
    TokenManager("us").refresh(force=True)
    canaries.fail("dead-token")
    met += [outcome(calls[name]) for name in ("Key.prove", "USTokenManager.revoke", "USTokenManager.delete_token")]
    errors = [one for one in met if isinstance(one, BaseException)]
    shown = "".join(line for error in errors for line in traceback.format_exception(error))
    assert ("Traceback" in shown, "urllib3" in caplog.text, canaries.stats()["granted_new"] >= 1) == (True,) * 3
    assert leaks(shown + caplog.text + "".join(str(record.args) for record in caplog.records)) == []
    files = [path for path in isolated.parent.rglob("*") if path.is_file() and not path.match("*_api_token.json")]
    for path in files:
        token = path.match("key-????????????????.json")
        assert leaks(f"{path} {'' if token else path.read_bytes().decode(errors='surrogateescape')}") == []
    key = state().key
    met += [KISAuth("us"), KISHttpxAuth("us"), tokencore.KRTokenManager(), key.renewer]
    met += [Gateway(canaries.url, (KEY, SECRET), timeout=1), ApprovalKeys(key.market, key.store, key.renewer)]
    keep_their_secrets(met)


def keep_their_secrets(roots: list[object]) -> None:
    """Check that no object of ours that the roots lead to shows a secret; every public class must be among them."""
    found, waiting = {}, list(roots)
    while waiting:
        one = waiting.pop()
        ours = type(one).__module__.startswith("tokencore")
        if id(one) not in found and not isinstance(one, type) and (ours or isinstance(one, dict | list | tuple | set)):
            found[id(one)] = one
            waiting += gc.get_referents(one)
    objects = [one for one in found.values() if type(one).__module__.startswith("tokencore")]
    public = {one for name in tokencore.__all__ if isinstance(one := getattr(tokencore, name), type)}
    known = {base for one in objects for base in type(one).__mro__}
    assert {one for one in public if not issubclass(one, TokenError)} <= known
    for one in objects:
        assert leaks(f"{one!r} {one} {getattr(one, '__dict__', '')}") == [], type(one)
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            packed = outcome(partial(pickle.dumps, one, protocol))
            assert leaks(packed.decode("latin-1") if isinstance(packed, bytes) else str(packed)) == [], type(one)


def test_commands_tell_no_secret_but_the_token_that_get_prints(canaries: Sandbox, command: Command) -> None:
    """Whatever a command meets, it shows no key or secret, and only `get` shows a token."""
    told = [command("refresh", "us")]
    for mode in ("bad-key", "garbage", "html", "half"):
        canaries.fail(mode, 1)
        time.sleep(0.1)
        told += [command("refresh", "us", "--force", "--yes"), command("tick")]
    lines = ["check --probe", "check --json", "metrics", "history --json", "doctor", "plan", f"get us --until {KEY}"]
    lines += ["export us --to kis-auth copies", f"export us --to {KEY} {SECRET}", f"{KEY} {SECRET}", "history"]
    told += [command(*line.split()) for line in lines]
    got = command("get", "us")
    told += [command("delete", "us", "--revoke", "--yes"), command("check")]
    assert (got.out[:3], leaks(got.err), leaks(repr(told))) == ("eyJ", [], [])


# --- what an error carries

FIRST = {"BaseTokenManager.get_valid_token", "KISAuth", "KISHttpxAuth", "KISHttpxAuth on a loop"}
ALWAYS = {"USTokenManager.refresh", "USTokenManager.get_approval_key", "Key.obtain", "Key.refresh", "a key as who asks"}
TROUBLES = ("KIS refuses", "KIS is unreachable", "unusable directory", "missing secret", "malformed secret")


@pytest.fixture
def meet(quick: Sandbox) -> Iterator[dict[str, dict[str, str]]]:
    """The settings with which a call meets each failure."""
    with Wire() as closed:
        pass
    with Wire() as refusing:
        refusing.answer(403, {"error_code": "EGW00103", "error_description": f"no such key {KEY}"})
        own: list[dict[str, str]] = [{"KIS_BASE_URL": refusing.url}, {"KIS_BASE_URL": closed.url}, {}]
        own += [{"KIS_APP_SECRET": "", "KIS_KEYRING": "kis"}, {"KIS_APP_SECRET": f"{SECRET} x"}]
        same = {"KIS_APP_KEY": KEY, "KIS_APP_SECRET": SECRET, "KIS_BASE_URL": quick.url, "KIS_HTS_ID": "me"}
        same |= {"KIS_MARKETS__US__EXPORTS": "mojito2", "PYTHON_KEYRING_BACKEND": "keyring.backends.null.Keyring"}
        yield {failure: same | settings for failure, settings in zip(TROUBLES, own, strict=True)}


@pytest.mark.parametrize("fails_too", [FIRST, set()], ids=["no token", "a valid token"])
@pytest.mark.parametrize("failure", TROUBLES)
def test_no_error_of_a_public_name_carries_a_secret(
    failure: str, fails_too: set[str], meet: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """Whatever fails, neither a frame of tokencore or its libraries nor a chained error holds a secret."""
    settings, calls = meet[failure], everything()
    state()  # imports and computes once what every process then inherits

    def work(first: int) -> dict[str, list[str] | None]:
        errors: dict[str, list[str] | None] = {}
        for name in list(calls)[first::PROCESSES]:
            (place := tmp_path / name).mkdir(0o700)
            os.environ.update(settings | {"KIS_TOKEN_DIR": str(place), "KIS_APP_SECRET": SECRET})
            if not fails_too:
                TokenManager("us").save_token(make_token(life=80_000, age=70_000))
            os.environ.update(settings)
            (place / "file").touch()
            place.chmod(0o777 if "directory" in failure else 0o700)
            met = outcome(calls[name])
            errors[name] = leaking(met) if isinstance(met, BaseException) else None
        return errors

    # Most of the work is waiting for KIS.
    found = {name: told for errors in forked(PROCESSES, work) for name, told in errors.items()}
    assert [told for told in found.values() if told] == []
    assert ALWAYS | fails_too <= {name for name, told in found.items() if told is not None}


@pytest.mark.parametrize("name", ["get_valid_token", "revoke", "prove", "get_approval_key"])
def test_an_interrupt_amid_a_request_carries_no_secret(name: str, canaries: Sandbox) -> None:
    """Ctrl-C before KIS has answered passes through frames of requests and urllib3, which hold body and headers."""
    assert canaries.url
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores SIGINT
    with socket.create_server(("127.0.0.1", 0)) as silent:

        def interrupt() -> None:
            with silent.accept()[0] as asked:
                asked.recv(1)
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                time.sleep(0.3)  # KIS has not yet answered

        os.environ |= {"KIS_BASE_URL": f"http://127.0.0.1:{silent.getsockname()[1]}", "KIS_TIMEOUT": "10"}
        manager, key = USTokenManager(), Key.load(Settings.load())[0]
        if name == "revoke":
            manager.save_token(make_token())
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt) as met:
            key.prove(make_token()) if name == "prove" else getattr(manager, name)()
        thread.join()
    assert len(met.traceback) > 10, "it was amid the request"
    assert leaking(met.value) == []
