"""What signing costs: a request with `KISAuth` or `KISHttpxAuth` compared to one with a plain header; token cached.

Run `python benchmarks/auth.py`. Nothing is sent, and KIS is not asked: a made-up token is stored in a temporary token
directory. For requests, a signed request is prepared; for httpx, it goes through a client to a transport that takes
its headers, as the real one does, and answers at once. The variants take turns, call by call. Each is reported by its
10th percentile: other work on the machine can only add to it.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout need not be installed

import httpx
import requests

from tokencore import KISAuth, KISHttpxAuth, TokenManager
from tokencore.tokens import Token

if TYPE_CHECKING:
    from collections.abc import Callable

    Call = Callable[[], int]  # returns the nanoseconds that the call took

CALLS = 10_000
TARGET = 2.0  # microseconds over a plain header
URL = "https://openapi.koreainvestment.com:9443/uapi/domestic-stock/v1/quotations/inquire-price"
HEADERS = {"tr_id": "FHKST01010100"}
KIND, ANSWER = {"content-type": "application/json; charset=utf-8"}, b'{"rt_cd": "0", "msg_cd": "MCA00000"}'
PARAMS = {"FID_COND_MRKT_DIV_CODE": "J", "FID_INPUT_ISCD": "005930"}


def main() -> int:
    """Measure, print a line for each client, and say whether KISAuth is within its target."""
    with tempfile.TemporaryDirectory() as folder:
        text = _settle(folder)
        costs = {
            "KISAuth, requests": _beside(_prepared(_plain(text)), _prepared(KISAuth("kr"))),
            "KISHttpxAuth, httpx.Client": _beside(_sent(_plain(text)), _sent(KISHttpxAuth("kr"))),
            "KISHttpxAuth, httpx.AsyncClient": _beside(_awaited(_plain(text)), _awaited(KISHttpxAuth("kr"))),
        }
    print(f"{'a request, in microseconds':<34}{'plain header':>14}{'signed':>10}{'over it':>10}")
    for name, (plain, signed, over) in costs.items():
        print(f"{name:<34}{plain:>14.2f}{signed:>10.2f}{over:>10.2f}")
    within = costs["KISAuth, requests"][2] < TARGET
    print(f"KISAuth costs less than {TARGET:g} microseconds over a plain header: {'yes' if within else 'NO'}")
    return 0 if within else 1


def _settle(folder: str) -> str:
    """Set up the settings and a cached token of a market; return the token's text."""
    for name in [name for name in os.environ if name.startswith("KIS_")]:
        del os.environ[name]
    os.environ |= {"KIS_TOKEN_DIR": folder, "KIS_APP_KEY": "PS" + "k" * 34, "KIS_APP_SECRET": "s" * 180}
    now = datetime.now(UTC)
    TokenManager("kr").save_token(Token("t" * 350, now + timedelta(hours=20), now - timedelta(hours=4)))
    return TokenManager("kr").get_valid_token()


def _plain(text: str) -> Callable[..., object]:
    """Sign as one would without tokencore: a header with a token that never changes."""
    value = f"Bearer {text}"

    def sign(request: Any) -> Any:  # noqa: ANN401 - a request of either library
        request.headers["authorization"] = value
        return request

    return sign


def _prepared(auth: Any) -> Call:  # noqa: ANN401 - what the library takes
    def call() -> int:
        began = perf_counter_ns()
        requests.Request("GET", URL, headers=HEADERS, params=PARAMS, auth=auth).prepare()
        return perf_counter_ns() - began

    return call


def _sent(auth: Any) -> Call:  # noqa: ANN401 - what the library takes
    client = httpx.Client(auth=auth, transport=httpx.MockTransport(_took), trust_env=False)

    def call() -> int:
        request = client.build_request("GET", URL, headers=HEADERS, params=PARAMS)
        began = perf_counter_ns()
        client.send(request)
        return perf_counter_ns() - began

    return call


def _awaited(auth: Any) -> Call:  # noqa: ANN401 - what the library takes
    loop = asyncio.new_event_loop()
    client = httpx.AsyncClient(auth=auth, transport=httpx.MockTransport(_took), trust_env=False)

    async def call() -> int:
        request = client.build_request("GET", URL, headers=HEADERS, params=PARAMS)
        began = perf_counter_ns()
        await client.send(request)
        return perf_counter_ns() - began

    return lambda: loop.run_until_complete(call())


def _took(request: httpx.Request) -> httpx.Response:
    assert any(name.lower() == b"authorization" for name, _ in request.headers.raw)
    return httpx.Response(200, headers=KIND, content=ANSWER)


def _beside(plain: Call, signed: Call) -> tuple[float, float, float]:
    """Return the microseconds of a request with each, and how much more the second takes."""
    pairs = [(plain(), signed()) for _ in range(CALLS)]
    first, second = (sorted(times)[CALLS // 10] / 1000 for times in zip(*pairs, strict=True))
    return first, second, second - first


if __name__ == "__main__":
    sys.exit(main())
