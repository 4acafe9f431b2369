"""KISAuth in requests: sessions, hooks, files and threads."""

from __future__ import annotations

import io
import threading
from typing import TYPE_CHECKING, Any

import requests
from running import asked, cached, raised
from scripted import Scripted

from tokencore import ConfigurationError, KISAuth

if TYPE_CHECKING:
    import pytest

    from tokencore.sandbox import Sandbox

HOUR = 3600.0
PRICE = "/uapi/domestic-stock/v1/quotations/inquire-price"
TR_ID = {"tr_id": "FHKST01010100"}


def price(gateway: Sandbox, **keywords: Any) -> requests.Response:  # noqa: ANN401 - requests' own keywords
    """A quote call, signed."""
    return requests.get(gateway.url + PRICE, auth=KISAuth("kr"), headers=TR_ID, timeout=5, **keywords)


def test_business_call_succeeds_alone_and_in_a_session(gateway: Sandbox) -> None:
    """`auth=` on one request, or on a session for all of them; a firm says so once."""
    assert price(gateway).json()["rt_cd"] == "0"
    with requests.Session() as session:
        session.auth = KISAuth("us", custtype="B")
        for _ in range(2):
            answer = session.get(gateway.url + PRICE, headers=TR_ID, timeout=5)
            assert answer.json()["rt_cd"] == "0"
            assert answer.request.headers["custtype"] == "B"
    assert (gateway.stats()["quotes"], asked(gateway)) == (3, 1)


def test_rejected_token_is_renewed_and_the_request_repeated_once(gateway: Sandbox) -> None:
    """KIS no longer knows the token: the caller gets the second try's answer, with the first one in its history."""
    old = cached(17 * HOUR)
    seen: list[int] = []
    answer = price(gateway, hooks={"response": lambda response, **_: seen.append(response.status_code)})
    assert (answer.status_code, answer.json()["rt_cd"]) == (200, "0")
    assert [first.json()["msg_cd"] for first in answer.history] == ["EGW00121"]
    assert answer.request.headers["authorization"] != f"Bearer {old.access_token}"
    assert seen == [200]
    assert (asked(gateway), gateway.stats()["quotes"]) == (1, 1)
    assert price(gateway).json()["rt_cd"] == "0"
    assert asked(gateway) == 1


def test_file_is_sent_again_from_where_it_began(gateway: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that can be wound back is, to where the caller had it."""
    with Scripted(gateway, Scripted.Answer(500, "EGW00121"), Scripted.Answer()) as kis:
        monkeypatch.setenv("KIS_BASE_URL", kis.url)
        cached(17 * HOUR)
        body = io.BytesIO(b"not this: the order")
        body.seek(10)
        assert requests.post(kis.url, data=body, auth=KISAuth("us"), timeout=5).status_code == 200
    assert [sent for _, sent in kis.seen] == [b"the order", b"the order"]


def test_answer_that_is_no_json_is_not_read(gateway: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A streamed download is handed out unread."""
    with Scripted(gateway, Scripted.Answer(code="EGW00121", kind="text/csv")) as kis:
        monkeypatch.setenv("KIS_BASE_URL", kis.url)
        cached(17 * HOUR)
        answer = requests.get(kis.url, auth=KISAuth("us"), stream=True, timeout=5)
        assert next(answer.iter_content(5)) == b'{"rt_'
    assert len(kis.seen) == 1
    assert asked(gateway) == 0


def test_threads_that_meet_a_dead_token_renew_it_once(gateway: Sandbox) -> None:
    """Sixteen threads with one signer: all their calls succeed, and one token is issued."""
    cached(17 * HOUR)
    gateway.set_rules(latency=0.2)
    signer, told = KISAuth("kr"), []
    barrier = threading.Barrier(16)

    def call() -> None:
        barrier.wait()
        told.append(requests.get(gateway.url + PRICE, auth=signer, headers=TR_ID, timeout=10).json()["rt_cd"])

    threads = [threading.Thread(target=call) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == ["0"] * 16
    assert asked(gateway) == 1


def test_prepared_address_that_readers_understand_in_different_ways_is_not_signed(gateway: Sandbox) -> None:
    """To urlsplit this is KIS's address with a user's name before it; urllib3 would send the request to that name."""
    request = requests.Request("GET", gateway.url).prepare()
    request.url = gateway.url.replace("//", "//elsewhere.example\\@") + "/uapi"
    assert isinstance(raised(lambda: KISAuth("us")(request)), ConfigurationError)
    assert "appsecret" not in request.headers
