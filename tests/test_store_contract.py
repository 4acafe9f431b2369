"""What every store of tokens does, whichever medium it uses."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from builders import CANARIES, DAY, NOW, in_child, killed, make_market, make_token
from postgres import needs_postgres
from running import until

from tokencore.attempts import Attempt, Outcome
from tokencore.stores import open_document, open_store
from tokencore.stores.base import Document, Store
from tokencore.tokens import Token

Open = Callable[..., Store]

MARKETS = ("us", "kr")
SENT = Attempt(NOW, Outcome.SENT, reason="get us", credentials="0123abcd", pid=7)


@pytest.fixture(params=["files", pytest.param("fleet", marks=needs_postgres)])
def numbers(request: pytest.FixtureRequest, folder: Path) -> dict[str, Any]:
    """The settings that select the kind of store."""
    if request.param == "files":
        return {"token_dir": str(folder), "store": ""}
    numbers: dict[str, Any] = request.getfixturevalue("fleet").numbers(folder)
    return numbers


@pytest.fixture
def opened(numbers: dict[str, Any]) -> Open:
    """Open the store of a market, as another process would."""
    return lambda market="us": open_store(make_market(market, **numbers), lambda: MARKETS)


@pytest.fixture
def elsewhere(numbers: dict[str, Any], tmp_path: Path) -> Open:
    """Open the same store from another machine, if machines share it."""
    numbers = {**numbers, "token_dir": str(tmp_path / "elsewhere")} if numbers["store"] else numbers
    return lambda market="us": open_store(make_market(market, **numbers), lambda: MARKETS)


def save(store: Store, token: Token) -> Token:
    """Save a token under the lock and return it as read back."""
    with store.lock(wait=5):
        store.save(token)
    found = store.read()[0]
    assert found
    assert found.access_token == token.access_token
    return found


def text_of(store: Store) -> str | None:
    """The text of the token that the store holds, or None."""
    return token.access_token if (token := store.read()[0]) else None


def test_a_saved_token_is_read_by_every_market_of_the_key_and_shows_no_secret(opened: Open) -> None:
    """A store that was opened while empty and a market that was added later read the token too, and see its renewal."""
    store, before = opened(), opened("kr")
    found = (before.read(), before.newest(), before.attempts(), before.details()["cache_exists"])
    assert found == ((None, ""), None, [], False)
    token = save(store, given := make_token())
    given.rejected_at = NOW  # a later change of the object is not stored
    assert {text_of(one) for one in (before, opened("kr"), opened("hk"))} == {token.access_token}
    assert (opened().saved(token), store.unchanged(token)) == (True, True)
    newer = save(opened(), make_token(life=90_000))
    assert not store.unchanged(token)
    assert text_of(store) == newer.access_token
    assert (set(store.details()), store.details()["cache_exists"]) == ({"file", "permissions", "cache_exists"}, True)
    assert opened("hk").details()["cache_exists"], "the key's file, while the market has no view of it"
    shown = repr(store) + str(store.details()) + store.place + store.fingerprint + repr(vars(store))
    assert not any(canary in shown for canary in CANARIES)


def test_deleting_ends_with_the_last_market_and_clearing_with_one_call(opened: Open, elsewhere: Open) -> None:
    """The key's token stays until its last market is deleted, seen on every machine, and the record stays even then."""
    store, token = opened(), make_token()
    with store.lock(wait=5):
        store.finish(store.begin(SENT), SENT._replace(outcome=Outcome.ISSUED), token)
    for market, left in (("us", token.access_token), ("kr", None)):
        one, other = opened(market), elsewhere("kr")
        with one.lock(wait=5):
            assert [one.delete(), one.delete()] == [True, False]
        with other.lock(wait=5):
            assert [text_of(opened("kr")), text_of(other)] == [left] * 2
    save(store, make_token())
    with store.lock(wait=5):
        store.clear()
    assert {text_of(opened(market)) for market in MARKETS} == {None}
    assert [attempt.outcome for attempt in opened().attempts()] == [Outcome.ISSUED]


def test_an_attempt_is_recorded_before_its_outcome_and_completed_by_it(opened: Open) -> None:
    """A reader in between sees that a request was sent; afterwards it is one attempt, with its outcome and details."""
    store = opened()
    with store.lock(wait=5):
        fence = store.begin(SENT)
        assert opened("kr").attempts() == [SENT]
        assert store.depart(fence)
        done = SENT._replace(outcome=Outcome.ISSUED, at=NOW + timedelta(seconds=1), expires_at=NOW + DAY)
        store.finish(fence, done, make_token(now=NOW))
        refused = SENT._replace(outcome=Outcome.LIMIT, code="EGW00133", by="Kim", reason="장 시작 전")
        store.finish(store.begin(SENT), refused)
        store.note(imported := done._replace(at=NOW + timedelta(minutes=2), outcome=Outcome.IMPORTED))
    assert opened().attempts() == [done, refused, imported]
    assert text_of(store)


def test_a_request_that_left_late_is_dated_anew(opened: Open) -> None:
    """If connecting took a minute and the process then dies, KIS's minute counts from when the request left."""
    store, noted_at = opened(), datetime.now(UTC) - timedelta(minutes=1)
    with store.lock(wait=5):
        assert store.depart(store.begin(SENT._replace(at=noted_at)))
    (attempt,) = opened().attempts()
    assert (attempt.outcome, attempt.at > noted_at + timedelta(seconds=50)) == (Outcome.SENT, True)


def test_one_holds_the_lock_and_the_others_are_told(opened: Open, folder: Path) -> None:
    """No other thread or process gets a held lock, which ends with its holder; who finds what it wants gives up."""

    def try_it(**how: Any) -> bool:  # noqa: ANN401 - as `lock` takes it
        with opened("kr").lock(**how) as held:
            return held

    def hold_on() -> None:
        with opened().lock(wait=5):
            (folder / "held").touch()
            time.sleep(60)

    with opened().lock(wait=5) as held, ThreadPoolExecutor() as pool:
        assert (held, pool.submit(try_it, wait=0).result()) == (True, False)
    child = in_child(hold_on)
    until((folder / "held").exists)
    began = time.monotonic()
    assert not try_it(wait=30, give_up=lambda: True)
    assert time.monotonic() - began < 5
    killed(child)
    assert try_it(wait=5)


def test_a_document_is_shared_whole(opened: Open, numbers: dict[str, Any]) -> None:
    """The next process reads what was written under a document's lock, for one key or all; an empty one is `{}`."""
    settings: Any = SimpleNamespace(**numbers)
    for again in (partial(opened("kr").document, "approval"), partial(open_document, settings, "incidents")):
        document: Document = again()
        assert document.read() == {}
        with document.lock(wait=5):
            document.write({"name": "한글", "times": [1, 2]})
        assert again().read() == {"name": "한글", "times": [1, 2]}
