"""KISHttpxAuth in httpx: an event loop that never waits, and a signature that nothing but the wire has."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import httpx
import pytest
from builders import CANARIES, KEY, SECRET
from running import asked, cached

from tokencore import KISHttpxAuth

if TYPE_CHECKING:
    from tokencore.sandbox import Sandbox

HOUR = 3600.0
PRICE = "/uapi/domestic-stock/v1/quotations/inquire-price"
TR_ID = {"tr_id": "FHKST01010100"}


def client(auth: KISHttpxAuth, gateway: Sandbox) -> httpx.AsyncClient:
    """A client for quote calls."""
    return httpx.AsyncClient(auth=auth, base_url=gateway.url, headers=TR_ID, trust_env=False)


async def beats(gateway: Sandbox) -> int:
    """How often the event loop came round while KIS was thinking about a token."""
    count = 0
    while gateway.stats()["quotes"] == 0:
        await asyncio.sleep(0.02)
        count += asked(gateway)
    return count


@pytest.mark.parametrize("present", [None, 17 * HOUR], ids=["without a token", "with one that KIS rejects"])
def test_loop_goes_on_while_a_renewal_waits_for_kis(gateway: Sandbox, present: float | None) -> None:
    """Fifty calls wait for one slow issue, and everything else on the loop goes on."""
    if present:
        cached(present)
    gateway.set_rules(latency=0.6)
    auth = KISHttpxAuth("us")

    async def work() -> tuple[list[httpx.Response], int]:
        async with client(auth, gateway) as calls:
            heart = asyncio.create_task(beats(gateway))
            answers = await asyncio.gather(*(calls.get(PRICE) for _ in range(50)))
            return answers, await heart

    answers, count = asyncio.run(work())
    assert {answer.json()["rt_cd"] for answer in answers} == {"0"}
    assert count >= 5
    assert asked(gateway) == 1


def test_cached_token_needs_no_thread(gateway: Sandbox) -> None:
    """Calls with a valid token start no thread, also where the file is looked at again."""
    cached(17 * HOUR)
    auth = KISHttpxAuth("us")
    known: list[set[threading.Thread]] = []

    async def work() -> None:
        transport = httpx.MockTransport(lambda _: httpx.Response(200))
        async with httpx.AsyncClient(auth=auth, transport=transport) as calls:
            for _ in range(2):
                await calls.get(gateway.url)
                await asyncio.sleep(1)
                known.append(set(threading.enumerate()))

    before = set(threading.enumerate())
    asyncio.run(work())
    assert len(known) == 2
    assert all(threads <= before for threads in known)


def test_waiting_call_can_be_given_up(gateway: Sandbox) -> None:
    """A time limit of the caller ends the wait at once; the renewal goes on, and the next call has its token."""
    gateway.set_rules(latency=1.2)
    auth = KISHttpxAuth("us")

    async def work() -> tuple[float, httpx.Response]:
        async with client(auth, gateway) as calls:
            began = time.monotonic()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(calls.get(PRICE), 0.1)
            took = time.monotonic() - began
            return took, await calls.get(PRICE)

    took, answer = asyncio.run(work())
    assert took < 1
    assert answer.status_code == 200
    assert asked(gateway) == 1


def test_one_object_serves_several_loops_and_threads(gateway: Sandbox) -> None:
    """Four loops in four threads, and then a plain client, with the same object."""
    auth, told = KISHttpxAuth("us"), []

    async def call() -> int:
        async with client(auth, gateway) as calls:
            return (await calls.get(PRICE)).status_code

    threads = [threading.Thread(target=lambda: told.append(asyncio.run(call()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told.append(httpx.get(gateway.url + PRICE, auth=auth, headers=TR_ID, trust_env=False).status_code)
    assert told == [200] * 5
    assert asked(gateway) == 1


def test_signed_request_shows_and_pickles_no_secret(gateway: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an event hook, a log or an error report sees of a request has no secret: only what is sent has them."""
    monkeypatch.setenv("KIS_APP_KEY", KEY)
    monkeypatch.setenv("KIS_APP_SECRET", SECRET)
    answer = httpx.get(gateway.url + PRICE, auth=KISHttpxAuth("us"), headers=TR_ID, trust_env=False)
    request = answer.request
    assert answer.status_code == 200
    shown = f"{request!r} {request.headers!r} {dict(request.headers)} {pickle.dumps(request)!r}"
    assert not any(canary in shown for canary in CANARIES)
    assert pickle.loads(pickle.dumps(request)).headers["tr_id"] == "FHKST01010100"  # noqa: S301 - our own
    assert KEY.encode() in dict(request.headers.raw)[b"appkey"]


def test_without_httpx_the_name_says_what_to_install() -> None:
    """Who has no httpx gets a sentence instead of a missing module, and everything else works."""
    program = (
        "import sys; sys.modules['httpx'] = None\n"
        "import tokencore; tokencore.KISAuth\n"
        "try: tokencore.KISHttpxAuth\n"
        "except ImportError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == "KISHttpxAuth needs httpx: pip install 'tokencore[httpx]'\n"
