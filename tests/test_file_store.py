"""A key's files: its own is the truth, the markets' are views, the record outlives both, and none is ever torn."""

import errno
import json
import logging
import os
import pickle
import resource
import stat
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from builders import NOW, ended, in_child, make_jwt, make_market, make_token
from test_store_contract import MARKETS, SENT, save, text_of

from tokencore.attempts import Outcome
from tokencore.stores import files, open_store, permissions
from tokencore.stores.file_store import FileStore
from tokencore.stores.lock import OURS
from tokencore.stores.record import KEEP
from tokencore.tokens import Token

VIEW = "us_api_token.json"
LOOPBACK = "http://127.0.0.1:1"


def open_files(folder: Path, market: str = "us", *siblings: str, **settings: object) -> FileStore:
    """Return the file store of a market whose key the `siblings` share."""
    store = open_store(make_market(market, token_dir=folder, **settings), lambda: siblings or (market,))
    assert isinstance(store, FileStore)
    return store


def put(path: Path, content: bytes | Token, **fields: object) -> None:
    """Write a private file as an earlier version or a person would."""
    if not isinstance(content, bytes):
        known = {"access_token": content.access_token, "expires_at": content.expires_at.isoformat()}
        content = json.dumps({**known, **fields}).encode()
    path.write_bytes(content)
    path.chmod(0o600)


def mode_of(path: Path) -> str:
    """Return the permissions of a file or folder (not a link's target) in octal."""
    return f"{stat.S_IMODE(path.lstat().st_mode):o}"


def test_files_have_the_contracts_names_and_modes(folder: Path) -> None:
    """Files are 0600, in a folder of 0700 that git ignores; the key's fingerprint is that of version 0.1."""
    store = open_files(folder, "us", *MARKETS)
    with store.lock(wait=5):
        store.finish(store.begin(SENT), SENT._replace(outcome=Outcome.ISSUED), make_token())
    key = f"key-{store.fingerprint}"
    names = {f"{key}.json", f"{key}.lock", f"{key}.jsonl", ".gitignore"}
    names |= {f"{market}_{end}" for market in MARKETS for end in ("api_token.json", "token_issued_at.dat")}
    assert {path.name: mode_of(path) for path in folder.iterdir()} == dict.fromkeys(names, "600")
    assert (mode_of(folder), (folder / ".gitignore").read_text(encoding="ascii")) == ("700", "*\n")
    view = (folder / VIEW).read_text(encoding="utf-8")
    assert view == (folder / f"{key}.json").read_text(encoding="utf-8")
    fields = ["access_token", "expires_at", "cached_at", "issued_at", "token_type", "environment", "key_fingerprint"]
    assert list(json.loads(view)) == fields
    assert store.fingerprint == "1ecf0a38badc0de1"  # so that both versions share lock and record
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        pickle.dumps(store)


@pytest.mark.parametrize(
    "others",
    [{"base_url": LOOPBACK, "environment": "paper"}, {"base_url": "http://127.0.0.1:2"}],
    ids=["paper at the same address", "another key"],
)
def test_two_keys_of_one_market_have_each_its_own_token(folder: Path, others: dict[str, str]) -> None:
    """Two keys that write one view in turn keep their tokens and set nothing aside; delete removes only one's own."""
    one, other = (
        {market: open_files(folder, market, *MARKETS, **how) for market in MARKETS}
        for how in ({"base_url": LOOPBACK}, others)
    )
    ours = save(one["us"], make_token()).access_token
    assert other["us"].read() == (None, "")
    theirs = save(other["us"], make_token(life=90_000)).access_token
    assert [text_of(store["us"]) for store in (one, other)] == [ours, theirs]
    for market, left in (("us", ours), ("kr", None)):  # the other key's views replaced ours, and stay
        with one["us"].lock(wait=5):
            assert [one[market].delete() for _ in range(2)] == [True, False]
        assert [text_of(store["kr"]) for store in (one, other)] == [left, theirs]
    assert (len(list(folder.glob(f"*_{VIEW[3:]}"))), list(folder.glob("*.aside"))) == (2, [])


def test_a_key_whose_token_only_0_1_has_saved_keeps_it_when_another_key_saves(folder: Path) -> None:
    """What 0.1 left in a market's view becomes the file of its key before another key takes the view over."""
    earlier, later = (open_files(folder, "us", "us", base_url=url) for url in (LOOPBACK, "http://127.0.0.1:2"))
    ours = save(earlier, make_token()).access_token
    (folder / f"key-{earlier.fingerprint}.json").unlink()  # 0.1 has no such file
    theirs = save(later, make_token(life=90_000)).access_token
    assert [text_of(store) for store in (earlier, later)] == [ours, theirs]
    assert list(folder.glob("*.aside")) == []


SERVES, COPY, MISS = [True, True], [False, True], [False, False]
VIEWS: dict[str, tuple[dict[str, Any] | None, dict[str, Any], dict[str, str], list[bool]]] = {
    # the key's own token, the view's token, its other fields, and whether it serves: a reader, the holder of the lock
    "without a file of the key": (None, {}, {}, SERVES),
    "beside an expired token": ({"life": 60, "age": 120}, {}, {}, SERVES),
    "beside a living one that ends earlier": ({}, {"life": 90_000}, {}, COPY),
    "of a token that is known to be dead": ({"text": "dead", "rejected": True}, {"text": "dead"}, {}, MISS),
    "of another key": (None, {}, {"key_fingerprint": "0" * 16}, MISS),
    "of paper": (None, {}, {"environment": "paper"}, MISS),
    "of another key by its JWT": (None, {"text": make_jwt("SomebodyElsesKey")}, {}, MISS),
}


@pytest.mark.parametrize("case", VIEWS)
def test_a_view_serves_where_the_key_has_no_living_token(folder: Path, case: str) -> None:
    """A view serves alone, as 0.1 leaves it; beside a living token it is a copy, and another key's is a miss."""
    own, view, fields, serves = VIEWS[case]
    store, theirs = open_files(folder), make_token(**view)
    if own is not None:
        with store.lock(wait=5):
            store.save(make_token(**own))
    put(folder / "kr_api_token.json", theirs, **fields)
    found, problem = open_files(folder).read()
    living = [one and not one.rejected_at and one.access_token for one in (found, store.newest())]
    assert ([text == theirs.access_token for text in living], problem) == (serves, "")


DAMAGED = {"half": b'{"access_token": "ey', "no expiry": b'{"access_token": "opaque"}', "number": b"NaN"}
DAMAGED |= {"garbage": b"\x00\xff\xfe", "deep": b"[" * 100_000, "large": b" " * (2 << 20)}


@pytest.mark.parametrize("place", ["view", "key"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_a_miss_and_set_aside_with_a_word(
    folder: Path, damage: str, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    """No damage breaks reading; the next save sets the content aside, readable by its owner only, with one warning."""
    store = open_files(folder)
    name = VIEW if place == "view" else f"key-{store.fingerprint}.json"
    put(folder / name, DAMAGED[damage])
    (folder / name).chmod(0o644)
    (folder / f"{name}.aside").mkdir()  # which must stay
    token, problem = store.read()
    assert (token, bool(problem)) == (None, True)
    save(store, make_token())
    (aside,) = folder.glob(f"{name}.*.aside")
    assert (aside.read_bytes(), mode_of(aside)) == (DAMAGED[damage], "600")
    assert [line.levelno for line in caplog.records if f"{name}.aside" in line.message] == [logging.WARNING]


def test_all_that_one_save_sets_aside_is_one_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A person reads one warning that names every file, however many were damaged at once."""
    store = open_files(folder, "us", "us", "kr")
    names = [f"key-{store.fingerprint}.json", VIEW, "kr_api_token.json"]
    for name in names:
        put(folder / name, b"damaged")
    save(store, make_token())
    (line,) = (one.message for one in caplog.records if ".aside" in one.message)
    assert all(f"{name}.aside" in line for name in names)


def test_a_file_that_comes_right_after_our_save_is_set_aside_by_the_next(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another tool writes just as a save ends is not taken for that save's own: it is kept, not overwritten."""
    store, replace, foreign = open_files(folder), os.replace, make_token(text=make_jwt("PSother" + "x" * 29))

    def replaced(draft: str, path: str) -> None:
        replace(draft, path)
        if path.endswith(VIEW):
            put(Path(path), foreign)

    with monkeypatch.context() as busy:
        busy.setattr(os, "replace", replaced)
        save(store, make_token())
    save(store, make_token())
    assert foreign.access_token in (folder / f"{VIEW}.aside").read_text("utf-8")


def test_what_is_set_aside_again_and_again_is_kept_once(folder: Path) -> None:
    """A file that each try finds again, as on a full disk without a successor, is set aside only once."""
    put(folder / VIEW, b"damaged")
    for _ in range(3):
        files.set_aside(str(folder / VIEW))
    assert sorted(path.name for path in folder.iterdir()) == [VIEW, f"{VIEW}.aside"]


@pytest.mark.parametrize("kind", ["folder", "fifo", "link", "dangling link"])
def test_what_is_no_file_is_a_miss_and_never_a_wait(folder: Path, kind: str, tmp_path: Path) -> None:
    """A FIFO, folder or link in place of a view makes nobody wait, and what a link points to is not changed."""
    path, victim, store = folder / VIEW, tmp_path / "victim", open_files(folder)
    put(victim, make_token())
    before = victim.read_bytes()
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(victim if kind == "link" else "nowhere")
    (folder / f".{VIEW}.{store.fingerprint}.tmp").symlink_to(victim)  # where the next draft goes
    assert store.read()[0] is None
    assert save(store, make_token()).access_token == text_of(open_files(folder, "kr"))
    assert (path.is_file(), path.is_symlink(), victim.read_bytes()) == (True, False, before)


def test_a_process_that_runs_for_months_leaves_no_file_open(folder: Path) -> None:
    """Neither saving, reading nor what cannot be read takes a descriptor for good, as a process has only so many."""

    def work() -> None:
        present = len(os.listdir("/dev/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (present + 10, present + 10))
        store = open_files(folder)
        for _ in range(12):
            put(folder / VIEW, b"damaged")
            open_files(folder, "kr").read()
            save(store, make_token())

    assert ended(in_child(work)) == 0


def test_content_is_on_disk_before_it_is_visible_and_the_change_of_name_after_it(folder: Path) -> None:
    """No power cut leaves an empty file; one that cannot be replaced, as Docker mounts it alone, is overwritten."""

    def work() -> None:
        calls = Mock(**{"fsync.side_effect": os.fsync, "replace.side_effect": os.replace})
        os.fsync, os.replace = calls.fsync, calls.replace
        files.write_bytes(str(folder / VIEW), b"new")
        assert [name for name, _, _ in calls.mock_calls] == ["fsync", "replace", "fsync"]
        calls.replace.side_effect = OSError(errno.EBUSY, "")
        files.write_bytes(str(folder / VIEW), b"1")
        assert ((folder / VIEW).read_bytes(), os.listdir(folder)) == (b"1", [VIEW])

    assert ended(in_child(work)) == 0


def test_a_directory_that_holds_only_our_files_is_closed_to_others(folder: Path) -> None:
    """A directory that others use keeps its mode, so that `KIS_TOKEN_DIR=/tmp` locks nobody out of /tmp."""
    for name in (*(f"us{part}" for part in OURS), "someone's file"):
        (folder / name).touch()
        folder.chmod(0o755)
        permissions.make_private(str(folder), ours=OURS)
        assert mode_of(folder) == ("755" if "someone" in name else "700")
    (folder / ".gitignore").unlink()
    permissions.make_private(str(folder), ours=OURS)
    assert not (folder / ".gitignore").exists()


ISSUED = {"at": "2026-11-20T07:35:00.123+00:00", "outcome": "issued", "code": None, "reason": "rule: daily"}


def test_a_record_of_version_0_1_is_read_and_continued(folder: Path) -> None:
    """Padded lines are read, damaged ones skipped, unknown outcomes taken as sent; a long record's end is kept."""
    store = open_files(folder)
    odd: list[Any] = [{"cut": {"issued": 3}}, {**ISSUED, "at": "9999-12-31T23:59:59Z"}, {"at": [], "outcome": {}}, 7]
    lines = [*map(json.dumps, [None, *odd, *[ISSUED] * 3000, {**ISSUED, "outcome": "?"}]), "{torn", "[" * 50_000, "\0"]
    put(folder / f"key-{store.fingerprint}.jsonl", "".join(line.ljust(511) + "\n" for line in lines).encode())
    assert [attempt.outcome for attempt in store.attempts()][-KEEP:] == ["issued"] * (KEEP - 1) + ["sent"]
    with store.lock(wait=5):
        store.finish(store.begin(SENT), SENT._replace(outcome=Outcome.LIMIT))
    found = [attempt.outcome for attempt in open_files(folder).attempts()]
    assert (len(found), found[-3:]) == (KEEP, ["issued", "sent", "limit"])


def test_the_mark_speaks_where_the_record_is_lost(folder: Path) -> None:
    """The mark, epoch seconds as text, survives `delete` and a lost record; beside another key's view it is ignored."""
    store = open_files(folder)
    with store.lock(wait=5):
        store.finish(store.begin(SENT), SENT._replace(outcome=Outcome.ISSUED), make_token(now=NOW))
        store.delete()
    assert (folder / "us_token_issued_at.dat").read_text(encoding="ascii") == f"{int(NOW.timestamp())}\n"
    (folder / f"key-{store.fingerprint}.jsonl").unlink()
    (attempt,) = open_files(folder).attempts()
    assert attempt.outcome is Outcome.ISSUED
    assert timedelta(0) <= attempt.at - NOW <= timedelta(seconds=1)
    put(folder / VIEW, make_token(), key_fingerprint="0" * 16)
    assert open_files(folder).attempts() == []
