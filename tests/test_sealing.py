"""No error brings a key, a secret or a token along in the local variables of the frames that it passed.

Error trackers collect them. Every public function, method and property is looked at, as the front door names them, so
that a new one is covered from its first day; it needs arguments in `ARGUMENTS` if it takes any.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import json
import os
import signal
import socket
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import httpcore
import httpx
import pytest
import requests
from builders import CANARIES, KEY, SECRET, ended, in_child, make_jwt, make_token
from running import until
from servers import Wire

import tokencore
from tokencore import (
    BaseTokenManager,
    ConfigurationError,
    Key,
    KISAuth,
    KISHttpxAuth,
    Settings,
    TokenManager,
    USTokenManager,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tokencore.sandbox import Sandbox

    Place = Callable[[str], dict[str, str]]

NOW = datetime.now(UTC)
PROCESSES = 6
FAILURES = ("KIS refuses", "KIS is unreachable", "the directory is unusable", "the secret is missing")
ARGUMENTS: dict[str, Any] = {
    "access_token": make_jwt(),
    "by": "me",
    "client": "python-kis",
    "codes": ["NASD"],
    "exchange": "NASD",
    "folder": "copies",
    "force": True,
    "market": "us",
    "name": "us",
    "names": ["KIS_APP_SECRET"],
    "now": NOW,
    "plans": [],
    "reason": "try",
    "rejected": make_jwt(),
    "token": make_token(),
    "token_dir": "/proc/nothing",
    "until": NOW + timedelta(hours=30),
    "valid_until": NOW + timedelta(hours=30),
}
LIBRARIES = (httpx, httpcore, asyncio, threading, concurrent.futures)  # through which the caller's own request goes
CALLER = (__file__, *(str(library.__file__).removesuffix("__init__.py") for library in LIBRARIES))
Call = Callable[[], object]


class Own(BaseTokenManager):
    """A manager of the user's own, whose credentials come from anywhere."""

    def get_api_url(self) -> str:
        """The address of the settings."""
        return str(Settings.load().base_url)

    def get_app_credentials(self) -> tuple[str, str]:
        """Such as a vault's."""
        return KEY, SECRET

    def get_token_file_prefix(self) -> str:
        """That of us."""
        return "us_"


def state() -> tokencore.KeyState:
    """How the first key is."""
    return Key.load(Settings.load())[0].state(NOW)


MAKERS: dict[str, Call] = {
    "BaseTokenManager": Own,
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


def leaks(error: BaseException) -> list[str]:
    """The variables that have a canary."""
    return [shown for shown in (*carried(error), str(error)) if any(canary in shown for canary in CANARIES)]


def caught(call: Call) -> BaseException | None:
    """The error that the call ends with."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - whatever it is
        return error
    return None


@pytest.fixture
def meet(quick: Sandbox, tmp_path: Path) -> Iterator[Place]:
    """The settings with which a call meets a failure in a directory of its own."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        closed: int = taken.getsockname()[1]
    with Wire() as refusing:
        refusing.answer(403, {"error_code": "EGW00103", "error_description": f"no such key {KEY}"})
        urls = {"KIS refuses": refusing.url, "KIS is unreachable": f"http://127.0.0.1:{closed}"}
        yield lambda failure: {
            "KIS_APP_KEY": KEY,
            "KIS_APP_SECRET": "" if failure == "the secret is missing" else SECRET,
            "KIS_BASE_URL": urls.get(failure, quick.url),
            "KIS_HTS_ID": "me",
            "KIS_KEYRING": "kis" if failure == "the secret is missing" else "",
            "KIS_MARKETS__US__EXPORTS": "mojito2",
            "KIS_TOKEN_DIR": str(tmp_path / "tokens"),
            "PYTHON_KEYRING_BACKEND": "keyring.backends.null.Keyring",  # one that has nothing
        }


@pytest.mark.parametrize("has_token", [False, True], ids=["no token", "a valid token"])
@pytest.mark.parametrize("failure", FAILURES)
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
            (tmp_path / f"{name}.json").write_text(json.dumps([repr(error), leaks(error)] if error else ["", []]))

    children = [in_child(partial(work, list(calls)[first::PROCESSES])) for first in range(PROCESSES)]
    assert {ended(child) for child in children} == {0}
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in calls}
    failed = {name for name, (error, _) in found.items() if error}
    assert {name: told for name, (_, told) in found.items() if told} == {}
    expected = {"USTokenManager.refresh", "USTokenManager.get_approval_key", "Key.obtain", "Key.refresh"}
    if not has_token:
        expected |= {"BaseTokenManager.get_valid_token", "KISAuth", "KISHttpxAuth", "KISHttpxAuth on a loop"}
    assert expected <= failed


@pytest.mark.parametrize("name", ["get_valid_token", "refresh", "revoke", "probe", "get_approval_key"])
def test_an_interrupt_amid_a_request_carries_no_secret(
    name: str, quick: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while KIS is thinking passes the frames of requests and urllib3, which hold body and headers."""
    assert quick.url
    with Wire() as slow:
        slow.drip = b"HTTP/1.1 200 OK\r\n" + b"x" * 100
        own = {"KIS_APP_KEY": KEY, "KIS_APP_SECRET": SECRET, "KIS_BASE_URL": slow.url, "KIS_TIMEOUT": "10"}
        for variable, value in own.items():
            monkeypatch.setenv(variable, value)
        manager = USTokenManager()
        if name in ("revoke", "probe"):
            manager.save_token(make_token())
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            threading.Thread(
                target=lambda: (until(lambda: bool(slow.requests)), signal.setitimer(signal.ITIMER_REAL, 0.2))
            ).start()
            with pytest.raises(KeyboardInterrupt) as met:
                getattr(manager, name)()
        finally:
            signal.signal(signal.SIGALRM, before)
        slow.drip = b""
    assert len(met.traceback) > 10, "it was amid the request"
    assert leaks(met.value) == []


@pytest.mark.parametrize("variable", ["KIS_APP_KEY", "KIS_TIMEOUT", "KIS_ENVIRONMENT", "KIS_MARKETS__US__APP_SECRET"])
def test_no_error_of_the_settings_carries_a_secret(variable: str, meet: Place) -> None:
    """Each way to read malformed settings; the other ones hold the secrets."""

    def work() -> None:
        os.environ.update(meet("KIS refuses") | {variable: f"{SECRET} x"})
        makers: list[Call] = [*MAKERS.values(), Settings, partial(KISAuth, "us"), partial(KISHttpxAuth, "us")]
        found = {str(make): leaks(error) for make in makers if (error := caught(make))}
        assert len(found) >= 5
        assert {name: leaking for name, leaking in found.items() if leaking} == {}

    assert ended(in_child(work)) == 0


@pytest.mark.usefixtures("gateway")
def test_a_key_in_place_of_a_reason_is_not_carried_either() -> None:
    """What looks like a key is refused, and what was typed stays with the caller."""
    for call in (partial(Key.note, KEY, "me"), partial(USTokenManager().refresh, reason=SECRET)):
        error = caught(call)
        assert isinstance(error, ConfigurationError)
        assert leaks(error) == []


@pytest.mark.usefixtures("gateway")
def test_an_error_of_any_kind_keeps_its_place_and_what_the_caller_was_handling() -> None:
    """Not only our own errors are emptied; the lines that they passed stay, for a report."""

    class Broken(Own):
        def get_app_credentials(self) -> tuple[str, str]:
            raise RuntimeError("no vault") from ValueError(SECRET)

    with pytest.raises(RuntimeError) as met:
        fall_back(Broken)
    assert isinstance(met.value.__context__, ValueError)
    assert met.value.__cause__ is None
    assert met.traceback[-1].name == "get_app_credentials"
    assert leaks(met.value) == []


def fall_back(work: Call) -> object:
    """Do something else after an error."""
    try:
        return int("nothing")
    except ValueError:
        return work()
