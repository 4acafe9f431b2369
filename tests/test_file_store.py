"""The files of a key: the key's own one is the truth, the markets' are its views, and the record outlives both."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import resource
import stat
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from builders import KEY, NOW, ended, in_child, make_jwt, make_market, make_token

from tokencore.attempts import Attempt, Outcome
from tokencore.stores import open_store
from tokencore.stores.file_store import FileStore

if TYPE_CHECKING:
    from pathlib import Path

    from tokencore.tokens import Token

SENT = Attempt(NOW, Outcome.SENT, credentials="0123abcd", pid=7)


def open_files(folder: Path, market: str = "us", *siblings: str, **settings: object) -> FileStore:
    """The store of a market whose key these markets share."""
    made = make_market(market, token_dir=folder, **settings)
    store = open_store(made, lambda: siblings or (market,))
    assert isinstance(store, FileStore)
    return store


def put(path: Path, token: Token, **fields: object) -> None:
    """Write a token file as an earlier version or a person does."""
    content = {"access_token": token.access_token, "expires_at": token.expires_at.isoformat(), **fields}
    path.write_text(json.dumps(content), encoding="utf-8")
    path.chmod(0o600)


def save(store: FileStore, token: Token) -> None:
    """Save it as the holder of the lock."""
    with store.lock(wait=5):
        store.save(token)


def text_of(store: FileStore) -> str | None:
    """The text of the token that the store gives."""
    token = store.read()[0]
    return token.access_token if token else None


def test_files_have_the_contracts_names_and_modes(folder: Path) -> None:
    """0600 whatever the umask, in a folder of 0700 that hides itself from git."""
    before = os.umask(0)
    try:
        store = open_files(folder, "us", "us", "kr")
        with store.lock(wait=5):
            store.finish(store.begin(SENT), SENT._replace(outcome=Outcome.ISSUED), make_token())
    finally:
        os.umask(before)
    key = f"key-{store.fingerprint}"
    names = {f"{key}.json", f"{key}.lock", f"{key}.jsonl", ".gitignore"}
    names |= {f"{market}_{end}" for market in ("us", "kr") for end in ("api_token.json", "token_issued_at.dat")}
    assert {path.name for path in folder.iterdir()} == names
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert (folder / ".gitignore").read_text(encoding="ascii") == "*\n"
    view = json.loads((folder / "us_api_token.json").read_text(encoding="utf-8"))
    assert view == json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
    fields = ["access_token", "expires_at", "cached_at", "issued_at", "token_type", "environment", "key_fingerprint"]
    assert list(view) == fields


def test_paper_has_a_file_of_its_own_where_one_address_serves_both(folder: Path) -> None:
    """The sandbox serves both environments: their tokens never meet, their limits do."""
    address = {"base_url": "http://127.0.0.1:1"}
    real, paper = (open_files(folder, "us", environment=word, **address) for word in ("real", "paper"))
    save(real, make_token())
    assert paper.read()[0] is None
    save(paper, make_token(life=90_000))
    assert text_of(real) != text_of(paper)
    assert (folder / f"key-{paper.fingerprint}-paper.json").exists()


def test_two_keys_of_one_market_have_each_its_own_token(folder: Path) -> None:
    """Two bots with other keys for `us` write one view in turn: neither loses its token, and nothing is set aside."""
    stores = [open_files(folder, "us", base_url=f"http://127.0.0.1:{port}") for port in (1, 2)]
    texts = []
    for age, store in enumerate(stores):
        token = make_token(age=age)
        save(store, token)
        texts.append(token.access_token)
    assert [text_of(store) for store in stores] == texts
    save(stores[0], make_token(life=90_000))
    assert text_of(stores[1]) == texts[1]
    assert not list(folder.glob("*.aside"))


def test_a_view_is_read_where_the_key_has_no_living_token(folder: Path) -> None:
    """Earlier versions and people write views only: no file of the key, or an expired one, lets them speak."""
    put(folder / "us_api_token.json", fresh := make_token())
    store = open_files(folder)
    assert text_of(store) == fresh.access_token
    save(store, make_token(life=60, age=120))
    put(folder / "us_api_token.json", fresh)
    assert text_of(open_files(folder)) == fresh.access_token


def test_a_view_never_beats_a_living_token_of_the_key(folder: Path) -> None:
    """What stands in a market's file is a copy; only the thorough look, under the lock, finds a longer one there."""
    store, longer = open_files(folder), make_token(life=90_000)
    save(store, make_token())
    ours = text_of(store)
    put(folder / "us_api_token.json", longer)
    assert text_of(open_files(folder)) == ours
    newest = open_files(folder).newest()
    assert newest is not None
    assert newest.access_token == longer.access_token


def test_another_markets_view_serves_this_one(folder: Path) -> None:
    """A market that is new on a key has the key's token at once, without any file of its own."""
    put(folder / "kr_api_token.json", token := make_token())
    assert text_of(open_files(folder, "hk")) == token.access_token


def test_a_dead_token_does_not_come_back_from_a_view(folder: Path) -> None:
    """The key's file says that KIS has rejected it; an older copy without that word is no living token."""
    dead = make_token(rejected=True)
    store = open_files(folder)
    save(store, dead)
    put(folder / "us_api_token.json", dead)
    found = open_files(folder).read()[0]
    assert found is not None
    assert found.rejected_at is not None


@pytest.mark.parametrize("spoiled", [{"key_fingerprint": "0" * 16}, {"environment": "paper"}, {"access_token": "x"}])
def test_a_view_of_another_key_or_environment_is_a_miss(folder: Path, spoiled: dict[str, str]) -> None:
    """Whether the file says so itself, or the JWT in it."""
    token = make_token(text=make_jwt("SomebodyElsesKey")) if "access_token" in spoiled else make_token()
    put(folder / "us_api_token.json", token, **{k: v for k, v in spoiled.items() if k != "access_token"})
    assert open_files(folder).read() == (None, "of another key or environment")


DAMAGED = {
    "empty": b"",
    "half": b'{"access_token": "ey',
    "garbage": b"\x00\xff\xfe",
    "null": b"null",
    "list": b"[]",
    "number": b"NaN",
    "deep": b"[" * 100_000,
    "no expiry": b'{"access_token": "opaque"}',
    "large": b" " * (2 << 20),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_view_is_a_miss_and_set_aside_with_a_word(
    folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing breaks the reading; the next save keeps what stood there and says so once."""
    path = folder / "us_api_token.json"
    path.write_bytes(DAMAGED[damage])
    path.chmod(0o600)
    store = open_files(folder)
    token, problem = store.read()
    assert token is None
    assert problem
    with caplog.at_level(logging.WARNING):
        save(store, make_token())
    assert (folder / "us_api_token.json.aside").read_bytes() == DAMAGED[damage]
    assert [record.getMessage() for record in caplog.records if "api_token.json.aside" in record.getMessage()]
    assert text_of(open_files(folder))


@pytest.mark.parametrize("kind", ["folder", "fifo", "link"])
def test_what_is_no_file_is_a_miss_and_never_a_wait(folder: Path, kind: str, tmp_path: Path) -> None:
    """A FIFO, a folder or a link in the place of a view keeps nobody waiting."""
    path = folder / "us_api_token.json"
    put(tmp_path / "elsewhere", make_token())
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "elsewhere")
    store = open_files(folder)
    assert store.read()[0] is None
    save(store, make_token())
    assert text_of(store)


def test_a_view_that_cannot_be_written_takes_nothing_from_anybody(folder: Path) -> None:
    """The key's file has the token: the save succeeds."""
    (folder / "us_api_token.json").mkdir()
    (folder / "us_api_token.json.aside").write_text("earlier", encoding="utf-8")
    store = open_files(folder, "us", "us", "kr")
    save(store, token := make_token())
    assert text_of(open_files(folder, "kr")) == token.access_token


def test_a_token_that_cannot_be_saved_serves_its_process(folder: Path) -> None:
    """On a full disk the save fails, and this process goes on with what was paid for."""
    store = open_files(folder)
    save(store, make_token(age=100))

    def work() -> None:
        newer = make_token()
        with store.lock(wait=5):
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
            with pytest.raises(OSError, match="File too large"):
                store.save(newer)
        assert text_of(store) == newer.access_token
        assert not store.saved(newer)

    assert ended(in_child(work)) == 0
    assert text_of(store) != ""


def test_a_file_that_did_not_change_is_not_read_again(folder: Path) -> None:
    """A look at an unchanged file gives the very token that was parsed before."""
    store = open_files(folder)
    save(store, make_token())
    assert store.read()[0] is store.read()[0]


def test_a_reader_beside_a_busy_writer_always_has_a_token(folder: Path) -> None:
    """No reader ever sees half a file, or none."""
    writer, reader = open_files(folder), open_files(folder)
    save(writer, make_token())
    end = time.monotonic() + 1

    def write_on() -> None:
        while time.monotonic() < end:
            save(writer, make_token())

    thread = threading.Thread(target=write_on)
    thread.start()
    looks = 0
    while time.monotonic() < end:
        assert text_of(reader)
        looks += 1
    thread.join()
    assert looks > 100


OLD_LINE = {
    "at": "2026-11-20T07:35:00.123+00:00",
    "outcome": "issued",
    "code": None,
    "expires_at": "2026-11-21T07:35:00+00:00",
    "reason": "rule: daily",
    "by": "",
    "credentials": "0123abcd",
    "pid": 42,
}


def test_a_record_of_version_0_1_is_read_and_continued(folder: Path) -> None:
    """Its lines are padded to a disk sector, its first one may count what was cut; unknown lines are passed over."""
    store = open_files(folder)
    path = folder / f"key-{store.fingerprint}.jsonl"
    lines = [
        json.dumps({"cut": {"issued": 3}}),
        json.dumps(OLD_LINE),
        "{torn",
        json.dumps({**OLD_LINE, "outcome": "?"}),
    ]
    path.write_text("".join(line.ljust(511) + "\n" for line in lines), encoding="utf-8")
    path.chmod(0o600)
    assert [attempt.outcome for attempt in store.attempts()] == [Outcome.ISSUED, Outcome.SENT]
    with store.lock(wait=5):
        store.finish(store.begin(SENT), SENT._replace(outcome=Outcome.LIMIT))
    assert [attempt.outcome for attempt in open_files(folder).attempts()] == ["issued", "sent", "limit"]


def test_a_record_of_any_size_keeps_its_end(folder: Path) -> None:
    """Of three megabytes the last attempts are known, so the minute and the ceiling hold."""
    store = open_files(folder)
    path = folder / f"key-{store.fingerprint}.jsonl"
    path.write_text((json.dumps(OLD_LINE) + "\n") * 15_000, encoding="utf-8")
    path.chmod(0o600)
    assert len(store.attempts()) > 1000
    with store.lock(wait=5):
        store.begin(SENT)
    assert path.stat().st_size < 1 << 20
    assert open_files(folder).attempts()[-1] == SENT


def test_what_is_no_record_is_set_aside_and_the_attempt_recorded(folder: Path) -> None:
    """A folder in its place is moved away; until then it counts as an attempt made when it was changed."""
    store = open_files(folder)
    path = folder / f"key-{store.fingerprint}.jsonl"
    path.mkdir()
    assert [attempt.outcome for attempt in store.attempts()] == [Outcome.SENT]
    with store.lock(wait=5):
        store.begin(SENT)
    assert open_files(folder).attempts()[-1] == SENT
    assert path.with_name(path.name + ".aside").is_dir()


def test_on_a_full_disk_the_lock_file_keeps_the_time_and_counts_the_issues(folder: Path) -> None:
    """Where no line can be written, other processes know when a request was made, and how many brought a token."""
    store = open_files(folder)
    with store.lock(wait=5):
        pass

    def issue_twice() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        for minutes in (0, 2):
            at = NOW + timedelta(minutes=minutes)
            with store.lock(wait=5):
                fence = store.begin(SENT._replace(at=at))
                assert open_files(folder).attempts()[-1].at == at
                try:
                    store.finish(fence, SENT._replace(at=at, outcome=Outcome.ISSUED), make_token())
                except OSError:
                    continue
        os._exit(3)

    assert ended(in_child(issue_twice)) == 3
    known = open_files(folder).attempts()
    assert [attempt.outcome for attempt in known] == [Outcome.ISSUED] * 2
    assert known[-1].at == NOW + timedelta(minutes=2)
    with store.lock(wait=5):
        store.begin(later := SENT._replace(at=NOW + timedelta(minutes=5)))
    assert open_files(folder).attempts() == [*known, later]


def test_the_lock_file_forgets_issues_of_earlier_days(folder: Path) -> None:
    """A disk that stays full for days does not add its daily issues up to one day's."""
    store = open_files(folder)
    with store.lock(wait=5):
        pass

    def issue_daily() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        for day in range(3):
            with store.lock(wait=5), contextlib.suppress(OSError):
                issued = SENT._replace(at=NOW + timedelta(hours=25 * day), outcome=Outcome.ISSUED)
                store.finish(store.begin(issued._replace(outcome=Outcome.SENT)), issued, make_token())

    assert ended(in_child(issue_daily)) == 0
    assert [attempt.outcome for attempt in open_files(folder).attempts()] == [Outcome.ISSUED]


def test_the_mark_speaks_where_the_record_is_lost(folder: Path) -> None:
    """Epoch seconds as text, beside each view; it survives `delete`, and is silent beside another key's token."""
    store = open_files(folder)
    with store.lock(wait=5):
        issued = SENT._replace(outcome=Outcome.ISSUED)
        store.finish(store.begin(SENT), issued, make_token(now=NOW))
        store.delete()
    mark = folder / "us_token_issued_at.dat"
    assert mark.read_text(encoding="ascii") == f"{int(NOW.timestamp())}\n"
    (folder / f"key-{store.fingerprint}.jsonl").unlink()
    (attempt,) = open_files(folder).attempts()
    assert attempt.outcome is Outcome.ISSUED
    assert timedelta(0) <= attempt.at - NOW <= timedelta(seconds=1)
    put(folder / "us_api_token.json", make_token(), key_fingerprint="0" * 16)
    assert open_files(folder).attempts() == []


def test_an_attempt_that_seems_newer_than_the_record_is_not_lost(folder: Path) -> None:
    """The lock file's own time matters only where no clock can have set it so."""
    store = open_files(folder)
    with store.lock(wait=5):
        store.begin(SENT)
    lock = folder / f"key-{store.fingerprint}.lock"
    os.utime(lock, (time.time(), time.time()))
    assert open_files(folder).attempts() == [SENT]
    os.utime(lock, (1, (NOW + timedelta(hours=1)).timestamp()))
    assert [attempt.at for attempt in open_files(folder).attempts()] == [NOW, NOW + timedelta(hours=1)]


def test_a_store_is_not_pickled(folder: Path) -> None:
    """It knows its key."""
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(open_files(folder))


def test_a_key_is_named_without_being_shown(folder: Path) -> None:
    """The fingerprint is that of version 0.1, so that both share lock and record."""
    store = open_files(folder)
    assert KEY not in store.place
    assert store.fingerprint == "1ecf0a38badc0de1"
