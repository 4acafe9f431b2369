"""KISAuth and KISHttpxAuth: their headers, their one retry, where their secrets stay, and a loop that never waits."""

from __future__ import annotations

import asyncio
import io
import pickle
import ssl
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx
import pytest
import requests
from builders import CANARIES, KEY, SECRET
from running import asked, cached, raised
from servers import Scripted

from tokencore import ConfigurationError, IssuerUnavailableError, KISAuth, KISHttpxAuth, USTokenManager
from tokencore.sandbox import APP_KEY, APP_SECRET

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tokencore.sandbox import Sandbox

    Send = Callable[..., "Got"]

HOUR = 3600.0
PRICE = "/uapi/domestic-stock/v1/quotations/inquire-price"
TR_ID = {"tr_id": "FHKST01010100"}
SECRET_HEADERS = {"authorization", "appkey", "appsecret"}
Answer = Scripted.Answer
CLIENT: dict[str, Any] = {"trust_env": False, "follow_redirects": True, "verify": ssl.create_default_context()}


class Got(NamedTuple):
    """What the caller has in the end: status, KIS's code, and those of the answers before."""

    status: int
    code: str
    before: list[str]


def by_requests(url: str, auth: Any = None, **keywords: Any) -> Got:  # noqa: ANN401 - requests' own keywords
    """By requests."""
    method = "POST" if {"json", "data"} & set(keywords) else "GET"
    return got(requests.request(method, url, auth=auth or KISAuth("us"), timeout=5, **keywords))


def by_httpx(url: str, auth: Any = None, **keywords: Any) -> Got:  # noqa: ANN401 - httpx' own keywords
    """By httpx, from a thread."""
    keywords = {"content" if name == "data" else name: value for name, value in keywords.items()}
    method = "POST" if {"json", "content"} & set(keywords) else "GET"
    with httpx.Client(auth=auth or KISHttpxAuth("us"), **CLIENT) as client:
        return got(client.request(method, url, **keywords))


def by_loop(url: str, auth: Any = None, **keywords: Any) -> Got:  # noqa: ANN401 - httpx' own keywords
    """By httpx, from an event loop."""
    if "data" in keywords:
        keywords["content"] = drawn(keywords.pop("data"))
    method = "POST" if {"json", "content"} & set(keywords) else "GET"

    async def send() -> Got:
        async with httpx.AsyncClient(auth=auth or KISHttpxAuth("us"), **CLIENT) as client:
            return got(await client.request(method, url, **keywords))

    return asyncio.run(send())


async def drawn(pieces: Iterator[bytes]) -> Any:  # noqa: ANN401 - an async generator
    """The same pieces for an event loop."""
    for piece in pieces:
        yield piece


def got(answer: Any) -> Got:  # noqa: ANN401 - an answer of either library
    """What the caller has of an answer."""
    codes = [one.json().get("msg_cd") or one.json()["error_code"] for one in (answer, *answer.history)]
    return Got(answer.status_code, codes[0], codes[1:])


@pytest.fixture(params=[by_requests, by_httpx, by_loop], ids=lambda function: function.__name__)
def send(request: pytest.FixtureRequest) -> Send:
    """Each way to send a signed request."""
    found: Send = request.param
    return found


@pytest.fixture
def kis(gateway: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Scripted]]:
    """Starts a KIS with a script; the settings point to it."""
    with ExitStack() as running:

        def started(*answers: Answer) -> Scripted:
            server = running.enter_context(Scripted(gateway, *answers))
            monkeypatch.setenv("KIS_BASE_URL", server.url)
            return server

        yield started


def test_request_carries_token_key_secret_and_customer_type(kis: Callable[..., Scripted], send: Send) -> None:
    """The four headers of KIS's business API; a customer type that the caller set himself is left as it is."""
    server = kis()
    send(server.url)
    send(server.url, headers={"custtype": "B", "appkey": "mine"})
    (first, _), (second, _) = server.seen
    assert first["authorization"] == second["authorization"] == f"Bearer {USTokenManager().get_valid_token()}"
    assert (first["appkey"], first["appsecret"], first["custtype"]) == (APP_KEY, APP_SECRET, "P")
    assert (second["appkey"], second["appsecret"], second["custtype"]) == (APP_KEY, APP_SECRET, "B")


def test_renewal_elsewhere_is_seen_within_a_second(kis: Callable[..., Scripted], send: Send) -> None:
    """A signer that goes on for days signs with the present token, whoever renewed it."""
    server, auth = kis(), KISAuth("us") if send is by_requests else KISHttpxAuth("us")
    tokens = [cached(17 * HOUR)]
    send(server.url, auth)
    tokens.append(cached(20 * HOUR))
    time.sleep(1)
    send(server.url, auth)
    assert [seen["authorization"] for seen, _ in server.seen] == [f"Bearer {one.access_token}" for one in tokens]


@pytest.mark.parametrize(
    "dead",
    [
        Answer(500, "EGW00121"),
        Answer(200, "EGW00123"),
        Answer(401, "EGW00121", "error_code"),
        Answer(403, "EGW00123", "error_code", "text/plain"),
        Answer(500, "EGW00121", "error_code", "text/html;charset=UTF-8"),
        Answer(200, "EGW00121", kind="text/plain"),
        Answer(500, "EGW00123", kind="application/octet-stream"),
    ],
    ids=str,
)
def test_dead_token_is_seen_by_its_code_wherever_that_stands(
    gateway: Sandbox, kis: Callable[..., Scripted], send: Send, dead: Answer
) -> None:
    """Either shape, any status, any content type: the request is sent again, body and all, with the successor."""
    server = kis(dead, Answer())
    old = cached(17 * HOUR)
    assert send(server.url, json={"order": 1}) == Got(200, "MCA00000", [dead.code])
    (first, body), (second, again) = server.seen
    assert first["authorization"] == f"Bearer {old.access_token}"
    assert second["authorization"] == f"Bearer {USTokenManager().get_valid_token()}" != first["authorization"]
    assert body == again
    assert b'"order"' in body
    assert asked(gateway) == 1


def test_key_that_was_replaced_in_the_settings_is_sent_with_its_token(
    kis: Callable[..., Scripted], send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Set while the program runs, the new key and secret are used from the next renewal on, never beside the old."""
    server, auth = (
        kis(Answer(), Answer(500, "EGW00121"), Answer()),
        KISAuth("us") if send is by_requests else KISHttpxAuth("us"),
    )
    cached(17 * HOUR)
    send(server.url, auth)
    monkeypatch.setenv("KIS_APP_KEY", KEY)
    monkeypatch.setenv("KIS_APP_SECRET", SECRET)
    send(server.url, auth)
    assert [(seen["appkey"], seen["appsecret"]) for seen, _ in server.seen] == [(APP_KEY, APP_SECRET)] * 2 + [
        (KEY, SECRET)
    ]
    assert server.seen[2][0]["authorization"] == f"Bearer {USTokenManager().get_valid_token()}"


@pytest.mark.parametrize("code", ["EGW00201", "EGW00122", "EGW00002", "40310000"])
def test_other_refusals_say_nothing_about_the_token(
    gateway: Sandbox, kis: Callable[..., Scripted], send: Send, code: str
) -> None:
    """The call rate, a server fault, a refused order: one call, KIS's answer, and the token stays valid."""
    server = kis(Answer(500, code))
    old = cached(17 * HOUR)
    assert send(server.url) == Got(500, code, [])
    assert len(server.seen) == 1
    assert (asked(gateway), USTokenManager().get_valid_token()) == (0, old.access_token)


def test_second_rejection_is_the_callers(gateway: Sandbox, kis: Callable[..., Scripted], send: Send) -> None:
    """KIS rejects the successor too: its answer is handed out, without a third try."""
    server = kis(Answer(500, "EGW00121"))
    cached(17 * HOUR)
    assert send(server.url) == Got(500, "EGW00121", ["EGW00121"])
    assert (len(server.seen), asked(gateway)) == (2, 1)


def test_body_that_cannot_be_sent_again_is_not_but_the_token_is_reported(
    gateway: Sandbox, kis: Callable[..., Scripted], send: Send
) -> None:
    """A generator is used up by the first try: KIS's answer is handed out, and the next request has the successor."""
    server = kis(Answer(500, "EGW00123"), Answer())
    old = cached(17 * HOUR)
    assert send(server.url, data=iter([b'{"order":', b" 1}"])) == Got(500, "EGW00123", [])
    assert server.seen[0][1] == b'{"order": 1}'
    assert asked(gateway) == 1
    assert USTokenManager().get_valid_token() != old.access_token
    assert send(server.url).status == 200


def test_young_rejected_token_has_no_successor_and_kiss_answer_is_handed_out(gateway: Sandbox, send: Send) -> None:
    """Within six hours KIS would repeat the dead token: no request for one, no second try, and it is served no more."""
    assert send(gateway.url + PRICE, headers=TR_ID).status == 200
    gateway.kill_tokens()
    assert send(gateway.url + PRICE, headers=TR_ID).code == "EGW00121"
    assert USTokenManager().is_token_expired()
    assert (asked(gateway), gateway.stats()["quotes_refused"]) == (1, {"EGW00121": 1})


@pytest.mark.parametrize("before", [[], [Answer(500, "EGW00121")]], ids=["first try", "second try"])
def test_redirect_takes_no_secret_with_it(
    gateway: Sandbox, kis: Callable[..., Scripted], send: Send, before: list[Answer]
) -> None:
    """KIS never redirects; where it leads neither token, key nor secret arrives, whatever is answered there."""
    with Scripted(gateway, Answer(500, "EGW00121")) as elsewhere:
        first = kis(*before, Answer(302, location=elsewhere.url))
        cached(17 * HOUR)
        send(first.url)
    assert elsewhere.seen
    assert not any(set(headers) & SECRET_HEADERS for headers, _ in elsewhere.seen)
    assert len(first.seen) >= len(before) + 1
    assert set(first.seen[-1][0]) >= SECRET_HEADERS


@pytest.mark.parametrize(
    "address",
    [
        "http://localhost:{port}/uapi",
        "http://127.0.0.1:9/uapi",
        "https://127.0.0.1:{port}/uapi",
        "http://127.0.0.1:{port}@localhost:9/uapi",
        "http://openapi.koreainvestment.com:9443/uapi",
    ],
)
def test_credentials_do_not_go_to_another_address(gateway: Sandbox, send: Send, address: str) -> None:
    """Another host, port or scheme than the base URL's: a sentence that names both, and nothing is sent or issued."""
    port = gateway.url.rpartition(":")[2]
    error = raised(lambda: send(address.format(port=port)))
    assert isinstance(error, ConfigurationError)
    assert gateway.url in str(error)
    assert asked(gateway) == 0


def test_address_that_readers_understand_in_different_ways_is_not_signed(gateway: Sandbox) -> None:
    """To urlsplit this is KIS's address with a user's name before it; urllib3 would send the request to that name."""
    request = requests.Request("GET", gateway.url).prepare()
    request.url = gateway.url.replace("//", "//elsewhere.example\\@") + "/uapi"
    assert isinstance(raised(lambda: KISAuth("us")(request)), ConfigurationError)
    assert "appsecret" not in request.headers


def test_address_is_the_same_however_it_is_spelt(gateway: Sandbox, send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """Capital letters in the base URL and in the request's: the same scheme, host and port."""
    port = gateway.url.rpartition(":")[2]
    monkeypatch.setenv("KIS_BASE_URL", f"http://LocalHost:{port}")
    assert send(f"HTTP://LOCALHOST:{port}{PRICE}", headers=TR_ID).status == 200


def test_without_a_token_nothing_is_sent(gateway: Sandbox, send: Send) -> None:
    """Where no token can be had the package's error comes out of the call, before any business call."""
    gateway.fail("down")
    assert isinstance(raised(lambda: send(gateway.url + PRICE)), IssuerUnavailableError)
    assert gateway.stats()["quotes_refused"] == {}


def test_valid_token_is_used_at_once_while_kis_hangs(
    nowhere: Sandbox, kis: Callable[..., Scripted], send: Send
) -> None:
    """In the proactive window a renewal that gets no answer costs a caller less than a second."""
    server = kis()
    cached(900)
    nowhere.fail("hang")
    began = time.monotonic()
    assert send(server.url).status == 200
    assert time.monotonic() - began < 1.5  # with the time that a client takes to start
    assert asked(nowhere) == 1


@pytest.mark.parametrize("twin", [KISAuth, KISHttpxAuth])
def test_twin_that_has_signed_shows_no_secret(
    gateway: Sandbox, monkeypatch: pytest.MonkeyPatch, twin: type[KISAuth | KISHttpxAuth]
) -> None:
    """Neither its repr, nor its attributes, nor a pickle has one; and a misspelt market fails where it is written."""
    monkeypatch.setenv("KIS_APP_KEY", KEY)
    monkeypatch.setenv("KIS_APP_SECRET", SECRET)
    auth = twin("us")
    (by_requests if twin is KISAuth else by_httpx)(gateway.url + PRICE, auth, headers=TR_ID)
    shown = f"{auth!r} {vars(auth)}"
    assert not any(canary in shown for canary in CANARIES)
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(auth)
    assert isinstance(raised(lambda: twin("hk")), ConfigurationError)


def test_session_signs_every_request_and_keeps_the_first_answer(gateway: Sandbox) -> None:
    """`auth=` on a session, hooks of the caller: he sees the second try's answer, with the rejected one before it."""
    old, seen = cached(17 * HOUR), []
    with requests.Session() as session:
        session.auth = KISAuth("us", custtype="B")
        hooks = {"response": lambda response, **_: seen.append(response.status_code)}
        answer = session.get(gateway.url + PRICE, headers=TR_ID, timeout=5, hooks=hooks)
        again = session.get(gateway.url + PRICE, headers=TR_ID, timeout=5)
    assert got(answer) == Got(200, "MCA00000", ["EGW00121"])
    assert answer.request.headers["authorization"] != f"Bearer {old.access_token}"
    assert (answer.request.headers["custtype"], again.json()["rt_cd"], seen) == ("B", "0", [200])
    assert (asked(gateway), gateway.stats()["quotes"]) == (1, 2)


def test_file_is_sent_again_from_where_it_began(gateway: Sandbox, kis: Callable[..., Scripted]) -> None:
    """A body that can be wound back is, to where the caller had it."""
    server = kis(Answer(500, "EGW00121"), Answer())
    cached(17 * HOUR)
    body = io.BytesIO(b"not this: the order")
    body.seek(10)
    assert requests.post(server.url, data=body, auth=KISAuth("us"), timeout=5).status_code == 200
    assert [sent for _, sent in server.seen] == [b"the order", b"the order"]
    assert asked(gateway) == 1


def test_download_is_handed_out_unread(gateway: Sandbox, kis: Callable[..., Scripted]) -> None:
    """A streamed success that is neither text nor JSON stays the caller's to read, with either library."""
    server = kis(Answer(code="EGW00121", kind="application/zip"))
    cached(17 * HOUR)
    answer = requests.get(server.url, auth=KISAuth("us"), stream=True, timeout=5)
    assert next(answer.iter_content(5)) == b'{"rt_'
    with httpx.Client(auth=KISHttpxAuth("us"), **CLIENT) as client, client.stream("GET", server.url) as streamed:
        assert next(streamed.iter_raw(5)) == b'{"rt_'
    assert (len(server.seen), asked(gateway)) == (2, 0)


def test_threads_that_meet_a_dead_token_renew_it_once(gateway: Sandbox) -> None:
    """Sixteen threads with one signer: all their calls succeed, and one token is issued."""
    cached(17 * HOUR)
    gateway.set_rules(latency=0.2)
    signer, told = KISAuth("kr"), []
    barrier = threading.Barrier(16)

    def call() -> None:
        barrier.wait()
        told.append(requests.get(gateway.url + PRICE, auth=signer, headers=TR_ID, timeout=10).json()["rt_cd"])

    in_threads(call, 16)
    assert told == ["0"] * 16
    assert asked(gateway) == 1


def in_threads(work: Callable[[], object], count: int) -> None:
    """Run `work` in so many threads at once, to its end."""
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


async def beats(gateway: Sandbox) -> int:
    """How often the event loop came round while KIS was thinking about a token."""
    count = 0
    while gateway.stats()["quotes"] == 0:
        await asyncio.sleep(0.02)
        count += asked(gateway)
    return count


def calls_of(auth: KISHttpxAuth, gateway: Sandbox) -> httpx.AsyncClient:
    """A client for quote calls on a loop."""
    return httpx.AsyncClient(auth=auth, base_url=gateway.url, headers=TR_ID, trust_env=False)


@pytest.mark.parametrize("present", [None, 17 * HOUR], ids=["without a token", "with one that KIS rejects"])
def test_loop_goes_on_while_a_renewal_waits_for_kis(gateway: Sandbox, present: float | None) -> None:
    """Fifty calls wait for one slow issue, and everything else on the loop goes on."""
    if present:
        cached(present)
    gateway.set_rules(latency=0.6)
    auth = KISHttpxAuth("us")

    async def work() -> tuple[list[httpx.Response], int]:
        async with calls_of(auth, gateway) as calls:
            heart = asyncio.create_task(beats(gateway))
            answers = await asyncio.gather(*(calls.get(PRICE) for _ in range(50)))
            return answers, await heart

    answers, count = asyncio.run(work())
    assert {answer.json()["rt_cd"] for answer in answers} == {"0"}
    assert count >= 5
    assert asked(gateway) == 1


def test_cached_token_needs_no_thread_after_the_first_call(gateway: Sandbox) -> None:
    """Calls with a valid token start no thread, also where the file is looked at again."""
    cached(17 * HOUR)
    auth = KISHttpxAuth("us")
    by_httpx(gateway.url + PRICE, auth, headers=TR_ID)  # the first one may ask a keyring
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
        async with calls_of(auth, gateway) as calls:
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
        async with calls_of(auth, gateway) as calls:
            return (await calls.get(PRICE)).status_code

    in_threads(lambda: told.append(asyncio.run(call())), 4)
    told.append(by_httpx(gateway.url + PRICE, auth, headers=TR_ID).status)
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
    assert ran.stdout == "KISHttpxAuth needs httpx: pip install 'httpx>=0.28' 'anyio>=4.1'\n"
