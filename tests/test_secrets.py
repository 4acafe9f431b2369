"""No log, output, repr, pickle, file or traceback has a key, a secret or a token, whatever happens.

Error trackers collect the local variables of every frame that an error passed. Every public function, method and
property is looked at, as the front door names them, so that a new one is covered from its first day; it needs
arguments in `ARGUMENTS` if it takes any.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import gc
import inspect
import json
import logging
import os
import pickle
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import httpcore
import httpx
import pytest
import requests
from builders import CANARIES, KEY, SECRET, ended, forms, in_child, make_jwt, make_token
from running import Ran, raised
from servers import Wire
from stepping import FULL

import tokencore
from tokencore import (
    BaseTokenManager,
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
from tokencore.renewer import Renewer
from tokencore.sandbox.rules import FAILURES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tokencore.sandbox import Sandbox

    Place = Callable[[str], dict[str, str]]

Call = Callable[[], object]
# A JWT's beginning is packed in too many ways by chance; its first words are not.
FORMS = {"Canary": forms("Canary"), "eyJ": forms(make_jwt()[:16])}
MODES = [mode for mode in FAILURES if mode not in ("huge", "drip")]


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
    """All that is on disk there, names and contents, except the token files."""
    files = [path for path in place.rglob("*") if path.is_file() and not path.name.endswith("_api_token.json")]
    others = [path for path in files if not path.match("key-????????????????.json")]
    return "\n".join(f"{path.name}\n{path.read_bytes().decode(errors='surrogateescape')}" for path in others)


NOW = datetime.now(UTC)
LATER = NOW + timedelta(hours=30)
PROCESSES = 16
TROUBLES = ["KIS refuses", "KIS is unreachable", "the directory is unusable"]
TROUBLES += ["the secret is missing", "the secret is malformed"]
ARGUMENTS: dict[str, Any] = dict.fromkeys(("access_token", "rejected"), make_jwt()) | {"token": make_token()}
ARGUMENTS |= {"now": NOW, "until": LATER, "valid_until": LATER, "force": True, "by": "me", "reason": "try"}
ARGUMENTS |= {"market": "us", "name": "us", "exchange": "NASD", "codes": ["NASD"], "names": ["KIS_APP_SECRET"]}
ARGUMENTS |= {"client": "python-kis", "folder": "copies", "plans": [], "token_dir": "/proc/nothing"}
LIBRARIES = (httpx, httpcore, asyncio, threading, concurrent.futures)  # through which the caller's own request goes
CALLER = (os.path.dirname(__file__), *(str(library.__file__).removesuffix("__init__.py") for library in LIBRARIES))


class _Own(BaseTokenManager):
    """A manager of the user's own, whose credentials come from anywhere."""

    def get_api_url(self) -> str:
        return str(Settings.load().base_url)

    def get_app_credentials(self) -> tuple[str, str]:
        return KEY, SECRET

    def get_token_file_prefix(self) -> str:
        return "us_"


def state() -> tokencore.KeyState:
    """How the first key is."""
    return Key.load(Settings.load())[0].state(NOW)


MAKERS: dict[str, Call] = {
    "BaseTokenManager": _Own,
    "USTokenManager": USTokenManager,
    "Key": lambda: state().key,
    "KeyState": state,
    "Settings": Settings.load,
}  # the other classes are signers, errors, and managers with the same methods


def public_names(cls: type) -> list[str]:
    """What a program may use of a class: methods and properties of this package."""
    known = {name: getattr(one, "fget", getattr(one, "__func__", one)) for name, one in inspect.getmembers_static(cls)}
    return [
        name
        for name, one in known.items()
        if inspect.isfunction(one) and not name.startswith("_") and one.__module__.startswith(("tokencore", __name__))
    ]


def arguments(work: Callable[..., object]) -> dict[str, Any]:
    """A value for every parameter, those with a default too where one is known."""
    given: dict[str, Any] = {}
    for name, parameter in inspect.signature(work).parameters.items():
        if name == "token" and "Token" not in str(parameter.annotation):
            given[name] = make_jwt()
        elif name == "settings":
            given[name] = Settings.load()
        elif name == "state":
            given[name] = state()
        elif name in ARGUMENTS:
            given[name] = ARGUMENTS[name]
        else:
            known = parameter.default is not parameter.empty or parameter.kind in (2, 4)  # `*` and `**`
            assert known, f"{work.__qualname__} has a new parameter: give {name} a value in ARGUMENTS"
    return given


def use(make: Call, name: str) -> object:
    """Use a name of what `make` makes; a method is called."""
    found = getattr(make(), name)
    return found(**arguments(found)) if inspect.isroutine(found) else found


def signed(auth: type[KISAuth | KISHttpxAuth]) -> object:
    """A request that is signed; those of httpx go to their end."""
    url, signer = f"{Settings.load().base_url}/uapi/x", auth("us")
    if isinstance(signer, KISAuth):
        return signer(requests.Request("GET", url).prepare())
    return httpx.Client(auth=signer, trust_env=False).get(url)


async def signed_on_a_loop() -> None:
    """The same on an event loop."""
    url, signer = f"{Settings.load().base_url}/uapi/x", KISHttpxAuth("us")
    async with httpx.AsyncClient(auth=signer, trust_env=False) as client:
        await client.get(url)


def everything() -> dict[str, Call]:
    """Every use that a program can make of the front door."""
    found: dict[str, Call] = {name: partial(signed, getattr(tokencore, name)) for name in ("KISAuth", "KISHttpxAuth")}
    found["KISHttpxAuth on a loop"] = lambda: asyncio.run(signed_on_a_loop())
    found["a key as who asks"] = partial(Key.note, "me", KEY)
    found["a secret as a reason"] = lambda: USTokenManager().refresh(reason=SECRET)
    for name in tokencore.__all__:
        public = getattr(tokencore, name)
        if inspect.isfunction(public):
            found[name] = lambda public=public: public(**arguments(public))  # type: ignore[misc]
        elif inspect.isclass(public) and name not in found and not issubclass(public, (Exception, TokenManager)):
            found |= {f"{name}.{one}": partial(use, MAKERS[name], one) for one in public_names(public)}
    return found | {f"USTokenManager.{one}": partial(use, USTokenManager, one) for one in public_names(USTokenManager)}


def carried(error: BaseException, seen: frozenset[int] = frozenset()) -> Iterator[str]:
    """What an error tracker finds: the variables of all frames but the caller's, of the errors behind it as well."""
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
    """The variables and words that have a canary."""
    return [shown for shown in (*carried(error), str(error)) if any(canary in shown for canary in CANARIES)]


def caught(call: Call) -> BaseException | None:
    """The error that the call ends with."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - whatever it is
        return error
    return None


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


def test_logs_tracebacks_and_files_hold_no_secret_whatever_happens(
    canaries: Sandbox, isolated: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every public name and failures of KIS, with all loggers at DEBUG and a traceback of every error."""
    caplog.set_level(logging.DEBUG)
    calls, errors = everything(), list[BaseException | None]()
    for mode in MODES if FULL else MODES[::3]:
        canaries.fail(mode, 1)
        for name in ("get_valid_token", "refresh"):
            errors.append(caught(calls[f"USTokenManager.{name}"]))
            time.sleep(0.11)
    canaries.clear()
    errors += [caught(call) for call in calls.values()]
    time.sleep(0.11)
    TokenManager("us").refresh(force=True)
    canaries.fail("dead-token")
    errors += [caught(calls[f"USTokenManager.{name}"]) for name in ("probe", "revoke", "delete_token")]
    shown = "".join(line for error in errors if error for line in traceback.format_exception(error))
    assert ("Traceback" in shown, "urllib3" in caplog.text, canaries.stats()["granted_new"] >= 1) == (True,) * 3
    assert leaks(shown + caplog.text + "".join(str(record.args) for record in caplog.records)) == []
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
    manager = USTokenManager()
    manager.refresh(reason="look", by="me")
    time.sleep(0.1)
    (key,) = Key.load(Settings.load())
    state = key.state(datetime.now(UTC))
    yield from (manager, TokenManager("us"), KRTokenManager(), key, state, key.tick(state), state.plan(), make_token())
    yield from (state.warnings(), manager.history(), manager.get_token_status(), manager.get_token_info())
    yield from (KISAuth("us"), KISHttpxAuth("us"), gather(), Settings.load(), key.prove(make_token()))
    yield from (
        draw_plans([state.plan()]),
        open_document(Settings.load(), "x"),
        key.store,
        key.store.document("approval"),
    )
    yield from (Renewer(key.markets, key.store), ApprovalKeys(key.market, key.store, key.renewer))
    yield Gateway(gateway.url, (KEY, SECRET), timeout=1)
    for mode in ("limit", "bad-key", "down", "garbage"):
        gateway.fail(mode, 1)
        yield raised(lambda: manager.refresh(force=True, reason="try"))
        time.sleep(0.11)


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


# --- what an error carries


@pytest.fixture
def meet(quick: Sandbox) -> Iterator[Place]:
    """The settings with which a call meets a failure."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        closed: int = taken.getsockname()[1]
    with Wire() as refusing:
        refusing.answer(403, {"error_code": "EGW00103", "error_description": f"no such key {KEY}"})
        urls = {"KIS refuses": refusing.url, "KIS is unreachable": f"http://127.0.0.1:{closed}"}
        secrets = {"the secret is missing": "", "the secret is malformed": f"{SECRET} x"}
        same = {"KIS_APP_KEY": KEY, "KIS_HTS_ID": "me", "KIS_MARKETS__US__EXPORTS": "mojito2"}
        same["PYTHON_KEYRING_BACKEND"] = "keyring.backends.null.Keyring"  # one that has nothing
        yield lambda failure: {
            "KIS_APP_SECRET": secrets.get(failure, SECRET),
            "KIS_BASE_URL": urls.get(failure, quick.url),
            "KIS_KEYRING": "kis" if failure == "the secret is missing" else "",
            **same,
        }


@pytest.mark.parametrize("has_token", [False, True], ids=["no token", "a valid token"])
@pytest.mark.parametrize("failure", TROUBLES)
def test_no_error_of_a_public_name_carries_a_secret(
    failure: str, meet: Place, tmp_path: Path, *, has_token: bool
) -> None:
    """Whatever fails, no frame of tokencore and of the libraries it uses has a secret in it, and no error behind it.

    Some processes share the work, as they wait for KIS; each use has a directory of its own.
    """
    settings, calls = meet(failure), everything()
    state()  # what is imported and computed once is known to every process

    def work(names: list[str]) -> None:
        for name in names:
            place = tmp_path / name
            os.environ.update(settings | {"KIS_TOKEN_DIR": str(place), "KIS_APP_SECRET": SECRET})
            place.mkdir(0o700)
            if has_token:
                TokenManager("us").save_token(make_token(life=80_000, age=70_000))
            os.environ.update(settings | {"KIS_TOKEN_DIR": str(place)})
            (place / "file").touch()
            place.chmod(0o777 if "directory" in failure else 0o700)
            error = caught(calls[name])
            (tmp_path / f"{name}.json").write_text(json.dumps([repr(error), leaking(error)] if error else ["", []]))

    children = [in_child(partial(work, list(calls)[first::PROCESSES])) for first in range(PROCESSES)]
    assert {ended(child) for child in children} == {0}
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in calls}
    failed = {name for name, (error, _) in found.items() if error}
    assert {name: told for name, (_, told) in found.items() if told} == {}
    expected = {
        "USTokenManager.refresh",
        "USTokenManager.get_approval_key",
        "Key.obtain",
        "Key.refresh",
        "a key as who asks",
    }
    if not has_token:
        expected |= {"BaseTokenManager.get_valid_token", "KISAuth", "KISHttpxAuth", "KISHttpxAuth on a loop"}
    assert expected <= failed


@pytest.mark.parametrize("name", ["get_valid_token", "refresh", "revoke", "probe", "get_approval_key"])
def test_an_interrupt_amid_a_request_carries_no_secret(name: str, canaries: Sandbox) -> None:
    """Ctrl-C while KIS is thinking passes the frames of requests and urllib3, which hold body and headers."""
    assert canaries.url
    taken: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:

        def interrupt() -> None:
            taken.append(silent.accept()[0])
            taken[0].recv(1)
            signal.setitimer(signal.ITIMER_REAL, 0.1)

        os.environ["KIS_BASE_URL"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
        os.environ["KIS_TIMEOUT"] = "10"
        manager = USTokenManager()
        if name in ("revoke", "probe"):
            manager.save_token(make_token())
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        thread = threading.Thread(target=interrupt, daemon=True)
        thread.start()
        with pytest.raises(KeyboardInterrupt) as met:
            getattr(manager, name)()
        thread.join()
        signal.signal(signal.SIGALRM, before)
        taken[0].close()
    assert len(met.traceback) > 10, "it was amid the request"
    assert leaking(met.value) == []
