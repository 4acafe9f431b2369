"""Calls signed by KISAuth and KISHttpxAuth, and the websocket's approval key: one issue for all, no secret leaks."""

import asyncio
import json
import os
import pickle
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
from builders import CANARIES, KEY, SECRET, make_token
from running import asked, cached, folder, forked, limited, raised, until
from servers import Scripted

from tokencore import Key, KISAuth, KISHttpxAuth, KRTokenManager, Settings, TokenManager, USTokenManager, errors
from tokencore.attempts import as_line, parse
from tokencore.clients.auth import Signer
from tokencore.sandbox import APP_KEY, APP_SECRET, Sandbox

Send = Callable[..., list[str]]

# ruff: noqa: ANN401 - the signers, keywords and answers of both libraries
HOUR, OK = 3600.0, "MCA00000"
PRICE = "/uapi/domestic-stock/v1/quotations/inquire-price"
TR_ID = {"tr_id": "FHKST01010100"}
SECRET_HEADERS = {"authorization", "appkey", "appsecret"}
CLIENT: dict[str, Any] = {"trust_env": False, "follow_redirects": True, "verify": ssl.create_default_context()}
Answer = Scripted.Answer


def codes(answer: Any) -> list[str]:
    """Return KIS's codes in the caller's final answer and in the answers before it."""
    return [one.json().get("msg_cd") or one.json()["error_code"] for one in (answer, *answer.history)]


def by_requests(url: str, auth: Any = None, body: Any = None, **headers: str) -> list[str]:
    """Send with requests and return KIS's codes."""
    ask = requests.post if body else requests.get
    return codes(ask(url, auth=auth or KISAuth("us"), data=body, headers=headers, timeout=5))


def by_httpx(url: str, auth: Any = None, body: Any = None, **headers: str) -> list[str]:
    """Send with httpx's client and return KIS's codes."""
    with httpx.Client(auth=auth or KISHttpxAuth("us"), **CLIENT) as client:
        return codes(client.request("POST" if body else "GET", url, content=body, headers=headers))


def by_loop(url: str, auth: Any = None, body: Any = None, **headers: str) -> list[str]:
    """Send with httpx's asynchronous client and return KIS's codes."""

    async def drawn() -> Any:
        yield b"".join(body)

    async def send() -> list[str]:
        content = body if body is None or isinstance(body, bytes) else drawn()
        async with httpx.AsyncClient(auth=auth or KISHttpxAuth("us"), **CLIENT) as client:
            return codes(await client.request("POST" if body else "GET", url, content=content, headers=headers))

    return asyncio.run(send())


SIGNERS: dict[Any, Callable[[str], Any]] = {by_requests: KISAuth, by_httpx: KISHttpxAuth, by_loop: KISHttpxAuth}


@pytest.fixture(params=SIGNERS, ids=lambda one: one.__name__)
def send(request: pytest.FixtureRequest) -> Any:
    """Each way to send a signed request."""
    return request.param


@pytest.fixture
def kis(gateway: Sandbox) -> Iterator[Scripted]:
    """A KIS with a script; the settings point to it."""
    with Scripted(gateway) as server:
        os.environ["KIS_BASE_URL"] = server.url
        yield server


def bearer(server: Scripted) -> list[str]:
    """Return the tokens that the requests carried."""
    return [headers["authorization"].removeprefix("Bearer ") for headers, _ in server.seen]


def test_request_carries_token_key_secret_and_customer_type(kis: Scripted, send: Send) -> None:
    """A signed request has the four headers of KIS's business API; the caller's own customer type is kept."""
    send(kis.url)
    send(kis.url, custtype="B", appkey="mine")
    assert bearer(kis) == [USTokenManager().get_valid_token()] * 2
    carried = [[headers[name] for name in ("appkey", "appsecret", "custtype")] for headers, _ in kis.seen]
    assert carried == [[APP_KEY, APP_SECRET, "P"], [APP_KEY, APP_SECRET, "B"]]


def test_signer_goes_on_for_days(gateway: Sandbox, kis: Scripted, send: Send) -> None:
    """A signer sees another process's renewal, and sends a changed key with its own token to its own address only."""
    dead = Answer(500, "EGW00121")
    kis.script = [Answer(), Answer(), dead, Answer(), dead]
    auth, tokens = SIGNERS[send]("us"), [cached(17 * HOUR).access_token]
    send(kis.url, auth)
    tokens.append(cached(17.1 * HOUR).access_token)
    time.sleep(1)
    send(kis.url, auth)
    os.environ |= {"KIS_APP_KEY": KEY, "KIS_APP_SECRET": SECRET}
    send(kis.url, auth)
    assert bearer(kis) == [*tokens, tokens[-1], USTokenManager().get_valid_token()]
    assert [headers["appkey"] for headers, _ in kis.seen] == [APP_KEY] * 3 + [KEY]
    assert asked(gateway) == 1, "the new key's token is in the new key's file"
    os.environ |= {"KIS_APP_KEY": APP_KEY, "KIS_APP_SECRET": APP_SECRET, "KIS_BASE_URL": gateway.url}
    assert send(kis.url, auth) == ["EGW00121"]
    assert isinstance(raised(lambda: send(kis.url, auth)), errors.ConfigurationError)
    assert [headers["appsecret"] for headers, _ in kis.seen] == [APP_SECRET] * 3 + [SECRET] * 2
    assert send(gateway.url + PRICE, auth, **TR_ID) == [OK]


def test_default_port_of_an_address_may_be_left_out() -> None:
    """A base URL with its default port is the same as without it: httpx drops the port, `requests` keeps it."""
    for own in ("https://gw.example:443", "https://gw.example"):
        os.environ |= {"KIS_APP_KEY": KEY, "KIS_APP_SECRET": SECRET, "KIS_BASE_URL": own}
        TokenManager("us").save_token(make_token())
        text, signer = TokenManager("us").get_valid_token(), Signer("us", "P")
        for url in ("https://gw.example:443/", "https://gw.example/x"):
            assert signer.signature(url).token == text
        assert isinstance(raised(lambda: signer.signature("https://gw.example:444/")), errors.ConfigurationError)  # noqa: B023


CALLS: dict[str, tuple[Answer, list[str]]] = {
    "rejected": (Answer(500, "EGW00121"), [OK, "EGW00121"]),
    "expired, with success": (Answer(200, "EGW00123"), [OK, "EGW00123"]),
    "as plain text": (Answer(403, "EGW00123", "error_code", "text/plain"), [OK, "EGW00123"]),
    "as a page": (Answer(500, "EGW00121", "error_code", "text/html;charset=UTF-8"), [OK, "EGW00121"]),
    "another code of the kind": (Answer(500, "EGW00122"), ["EGW00122"]),
    "the call rate": (Answer(500, "EGW00201"), ["EGW00201"]),
}


@pytest.mark.parametrize(("answer", "expected"), CALLS.values(), ids=CALLS)
def test_dead_token_is_seen_by_its_code_alone_and_the_request_sent_once_more(
    gateway: Sandbox, kis: Scripted, send: Send, answer: Answer, expected: list[str]
) -> None:
    """The code decides, whatever the status and content type; the whole request is sent again with the new token."""
    kis.script = [answer, Answer()]
    old = cached(17 * HOUR).access_token
    assert send(kis.url, body=b'{"order": 1}') == expected
    tries = len(expected)
    assert bearer(kis) == [old, USTokenManager().get_valid_token()][:tries]
    assert [body for _, body in kis.seen] == [b'{"order": 1}'] * tries
    assert (asked(gateway), USTokenManager().get_valid_token() == old) == (tries - 1, tries == 1)


def test_request_is_sent_no_third_time_and_a_stream_no_second(gateway: Sandbox, kis: Scripted, send: Send) -> None:
    """KIS's second refusal goes to the caller; a used-up generator cannot be sent again, but the token is reported."""
    kis.script = [Answer(500, "EGW00123")]
    cached(17 * HOUR)
    assert send(kis.url, body=iter([b'{"order":', b" 1}"])) == ["EGW00123"]
    assert (kis.seen[0][1], asked(gateway)) == (b'{"order": 1}', 1)
    cached(17 * HOUR)
    assert send(kis.url) == ["EGW00123"] * 2


def test_young_rejected_token_has_no_successor_and_kiss_answer_is_handed_out(gateway: Sandbox, send: Send) -> None:
    """Within six hours KIS would repeat the dead token: there is no issue and no second try, and it is not served."""
    assert send(gateway.url + PRICE, **TR_ID) == [OK]
    gateway.kill_tokens()
    assert send(gateway.url + PRICE, **TR_ID) == ["EGW00121"]
    assert USTokenManager().is_token_expired()
    assert (asked(gateway), gateway.stats()["quotes_refused"]) == (1, {"EGW00121": 1})


def test_redirect_takes_no_secret_with_it(gateway: Sandbox, kis: Scripted, send: Send) -> None:
    """A redirect, which KIS never sends, carries no token, key or secret to its target, at the first or second try."""
    with Scripted(gateway) as elsewhere:
        kis.script = [there := Answer(302, location=elsewhere.url), Answer(500, "EGW00121"), there]
        cached(17 * HOUR)
        send(kis.url)
        send(kis.url)
    assert not any(set(headers) & SECRET_HEADERS for headers, _ in elsewhere.seen)
    assert [set(headers) >= SECRET_HEADERS for headers, _ in kis.seen] == [True] * 3


@pytest.mark.parametrize(
    "address",
    [
        *("http://localhost:{port}/uapi", "http://127.0.0.1:9/uapi", "https://127.0.0.1:{port}/uapi"),
        *("http://127.0.0.1:{port}@localhost:9/uapi", "http://openapi.koreainvestment.com:9443/uapi"),
    ],
)
def test_credentials_do_not_go_to_another_address(gateway: Sandbox, send: Send, address: str) -> None:
    """A host, port or scheme other than the base URL's is an error that names both; nothing is sent or issued."""
    with pytest.raises(errors.ConfigurationError, match=gateway.url):
        send(address.format(port=gateway.url.rpartition(":")[2]))
    assert asked(gateway) == 0


def test_what_httpx_shows_of_a_signed_request_has_no_secret(gateway: Sandbox) -> None:
    """A request's repr, headers and pickle hold no secret, only what is sent does; an unknown market fails at once."""
    os.environ |= {"KIS_APP_KEY": KEY, "KIS_APP_SECRET": SECRET}
    request = httpx.get(gateway.url + PRICE, auth=KISHttpxAuth("us"), headers=TR_ID, trust_env=False).request
    shown = f"{request!r} {request.headers!r} {dict(request.headers)} {pickle.dumps(request)!r}"
    assert not any(canary in shown for canary in CANARIES)
    assert pickle.loads(pickle.dumps(request)).headers["tr_id"] == TR_ID["tr_id"]  # noqa: S301 - pickled here
    assert KEY.encode() in dict(request.headers.raw)[b"appkey"]
    assert isinstance(raised(lambda: KISHttpxAuth("hk")), errors.ConfigurationError)


@pytest.mark.parametrize("present", [None, 17 * HOUR], ids=["without a token", "with one that KIS rejects"])
def test_loop_goes_on_while_a_renewal_waits_for_kis(gateway: Sandbox, present: float | None) -> None:
    """One call can be cancelled and fifty can wait for the same issue while everything else on the loop goes on."""
    if present:
        cached(present)
    gateway.set_rules(latency=1)

    async def work() -> None:
        async with httpx.AsyncClient(auth=KISHttpxAuth("us"), headers=TR_ID, trust_env=False) as calls:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(calls.get(gateway.url + PRICE), 0.1)
            waiting = asyncio.gather(*(calls.get(gateway.url + PRICE) for _ in range(50)))
            await asyncio.to_thread(until, lambda: asked(gateway) == 1)  # which takes a while on a busy machine
            for beat in range(5):
                await asyncio.sleep(0.05)
                assert (asked(gateway), gateway.stats()["quotes"], waiting.done()) == (1, 0, False), beat
            assert sum(one.name.startswith("AnyIO") for one in threading.enumerate()) <= 2  # and the cancelled call's
            assert {answer.json()["rt_cd"] for answer in await waiting} == {"0"}

    asyncio.run(work())
    assert asked(gateway) == 1


def test_without_httpx_the_name_says_what_to_install() -> None:
    """Without httpx, using `KISHttpxAuth` says what to install, and everything else works."""
    program = "import sys; sys.modules['httpx'] = None; from tokencore import *"
    program += "; import inspect, tokencore; inspect.getmembers(tokencore)"  # as `help` does
    program += "; print(KISAuth)"
    program += "; from tokencore import KISHttpxAuth"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "KISAuth" in ran.stdout
    assert "ImportError: KISHttpxAuth needs httpx: pip install 'httpx>=0.28' 'anyio>=4.1'\n" in ran.stderr
    with_it = subprocess.run([sys.executable, "-c", "from tokencore import *; KISHttpxAuth, sessions"], check=False)
    assert with_it.returncode == 0


def key_file() -> Path:
    """Return the approval key's file."""
    return next(folder().glob("key-*-approval.json"))


def test_many_processes_ask_for_one_approval_key_and_for_one_more_when_it_is_rejected(gateway: Sandbox) -> None:
    """Processes for us and kr, which share an app key, all get one approval key, and one more if it is rejected."""
    os.environ["KIS_ISSUE_INTERVAL"] = "0"  # so that no cool-down stops the others from asking
    dead: list[str] = [""]
    for count in (1, 2):
        keys = forked(6, lambda number: TokenManager(("us", "kr")[number % 2]).get_approval_key(dead[-1]))
        assert (len(set(keys)), len(keys[0]), gateway.stats()["approvals"], asked(gateway)) == (1, 36, count, 0), keys
        dead.append(keys[0])


def test_approval_key_has_a_private_file_and_a_day_and_follows_its_app_key(gateway: Sandbox) -> None:
    """An approval key has a private file, lasts a day, and follows a change of the app key; no token is issued."""
    key, now = Key.load(Settings.load())[0], datetime.now(UTC)
    assert key.state(now).approval_expires_at is None
    old = (us := USTokenManager()).get_approval_key()
    left = (key.state(now).approval_expires_at or now) - datetime.now(UTC)
    assert (timedelta(hours=23.9) < left < timedelta(hours=24), old in key_file().read_text()) == (True, True)
    assert stat.S_IMODE(key_file().stat().st_mode) == 0o600
    assert (us.history(), us.load_token()) == ([], None)
    os.environ |= {"KIS_APP_KEY": KEY, "KIS_APP_SECRET": SECRET}
    assert us.get_approval_key(old) == KRTokenManager().get_approval_key() != old
    assert gateway.stats()["approvals"] == 2


@pytest.mark.parametrize("hours", [12, 23.95, 24.5])
def test_approval_key_is_replaced_in_its_last_minutes_and_a_failure_costs_no_other(
    gateway: Sandbox, caplog: pytest.LogCaptureFixture, hours: float
) -> None:
    """If its replacement fails, an approval key serves with a warning until it expires; the next try waits a minute."""
    (us := USTokenManager()).get_approval_key()
    issued = datetime.now(UTC) - timedelta(hours=hours)
    key_file().write_text(json.dumps({"approval_key": "an-older-one", "issued_at": issued.isoformat()}))
    os.environ["KIS_ISSUE_INTERVAL"] = "60"
    gateway.answer("/oauth2/Approval", {}, 500)
    if hours < 24:
        assert us.get_approval_key() == "an-older-one"
    else:
        assert isinstance(raised(us.get_approval_key), errors.IssuerUnavailableError)
    assert ("goes on serving" in caplog.text) == (hours == 23.95)
    if hours > 12:
        cause, until = limited(lambda: KRTokenManager().get_approval_key("an-older-one"))
        assert (cause, until is not None and until > datetime.now(UTC) + timedelta(seconds=50)) == ("minute", True)


def test_rejected_approval_key_is_served_to_nobody_though_the_next_comes_after_the_minute(gateway: Sandbox) -> None:
    """A key that is rejected within a minute of its request is dead for all programs, not only for who reports it."""
    key = (us := USTokenManager()).get_approval_key()
    os.environ["KIS_ISSUE_INTERVAL"] = "60"
    assert limited(lambda: us.get_approval_key(key))[0] == "minute"
    assert limited(KRTokenManager().get_approval_key)[0] == "minute"
    assert (key in key_file().read_text(), gateway.stats()["approvals"]) == (False, 1)


def test_after_the_clock_was_set_back_an_approval_key_is_asked_for_again(gateway: Sandbox) -> None:
    """A request that seems to lie hours ahead does not forbid the next one until then."""
    key = (us := USTokenManager()).get_approval_key()
    content = json.loads(key_file().read_text())
    content["attempt"] = as_line(parse(content["attempt"])[0]._replace(at=datetime.now(UTC) + timedelta(hours=5)))
    key_file().write_text(json.dumps(content))
    os.environ["KIS_ISSUE_INTERVAL"] = "60"
    assert us.get_approval_key(key) != key
    assert gateway.stats()["approvals"] == 2


def test_credentials_that_kis_refused_are_not_tried_for_an_approval_key(gateway: Sandbox) -> None:
    """A wrong app secret costs one request for token and approval key together."""
    gateway.fail("bad-secret", 1)
    for work in (USTokenManager().get_valid_token, USTokenManager().get_approval_key):
        assert isinstance(raised(work), errors.CredentialsError)
    assert gateway.stats()["approvals"] == 0


def test_damaged_file_of_an_approval_key_costs_one_request(gateway: Sandbox) -> None:
    """A damaged file is a miss; where no attempt can be recorded, nothing is requested, and the error says so."""
    USTokenManager().get_approval_key()
    no_text = json.dumps({"approval_key": ["x"], "issued_at": datetime.now(UTC).isoformat()})
    damages = ("", "[]", '{"approval_key": "x", "issued_at": "soon"}', '{"attempt": [null, {}]}', no_text)
    for count, content in enumerate(damages, 2):
        key_file().write_text(content)
        assert USTokenManager().get_approval_key()
        assert gateway.stats()["approvals"] == count
    (path := key_file()).unlink()
    path.mkdir()
    assert f"none was made: {path}" in str(raised(USTokenManager().get_approval_key))
    assert gateway.stats()["approvals"] == len(damages) + 1
