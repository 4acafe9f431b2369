"""A key's token files: whose token they hold, what is set aside, and what another process changed."""

from __future__ import annotations

import errno
import json
import os
import pickle
import stat
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest
from builders import CANARIES, DAY, KEY, NOW, in_child, killed, make_jwt, make_token, make_url

from tokencore import store, tokens
from tokencore.cache import Cache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tokencore.tokens import Token


@pytest.fixture
def kept(folder: Path) -> Iterator[Cache]:
    """A cache whose token could not be saved; what it kept is forgotten after the test."""
    cache = open_cache(folder)
    yield cache
    cache.delete()


def open_cache(folder: Path, *prefixes: str, key: str = KEY, url: str = make_url(), environment: str = "real") -> Cache:
    """The files of a key in the real environment, for the US market if no other is named."""
    return Cache(str(folder), url, environment, key, prefixes or ("us_",))


def text_of(found: tuple[Token | None, str]) -> str | None:
    """The token's text, without which there must be a reason."""
    token, problem = found
    assert bool(token) != bool(problem)
    return token.access_token if token else None


def test_a_saved_token_is_found_by_every_market_of_the_key(folder: Path) -> None:
    """One save writes the contract's fields into the private file of each market, and nothing else."""
    token = make_token()
    open_cache(folder, "us_", "kr_").save(token, NOW)
    for prefix in ("us_", "kr_"):
        cache, path = open_cache(folder, prefix), folder / f"{prefix}api_token.json"
        assert text_of(cache.read()) == token.access_token
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        content = json.loads(path.read_text(encoding="utf-8"))
        assert content.pop("expires_at") == token.expires_at.isoformat()
        assert content.pop("cached_at") == NOW.isoformat()
        assert content.pop("issued_at").endswith("+00:00")
        assert content == {
            "access_token": token.access_token,
            "token_type": "Bearer",
            "environment": "real",
            "key_fingerprint": cache.fingerprint,
        }
    assert sorted(os.listdir(folder)) == ["kr_api_token.json", "us_api_token.json"]


def test_the_name_of_a_key_tells_nothing_of_it(folder: Path) -> None:
    """The fingerprint is 16 hex digits that change with the key and with where it is used."""
    found = {
        open_cache(folder, key=key, url=url).fingerprint for key in (KEY, "x") for url in ("https://a", "https://b")
    }
    assert len(found) == 4
    assert {len(name) for name in found} == {16}
    assert not any(name in KEY or KEY[:8] in name for name in found)


@pytest.mark.parametrize(
    "reader",
    [{"key": "another"}, {"url": "https://openapivts.koreainvestment.com:29443"}, {"environment": "paper"}],
    ids=["key", "base URL", "environment"],
)
def test_a_file_of_another_key_or_environment_is_a_miss(folder: Path, reader: dict[str, str]) -> None:
    """What another key or environment saved is no answer, and a save puts it aside instead of losing it."""
    foreign, token = make_token(text=make_jwt(life=86_400)), make_token(life=3600)
    open_cache(folder).save(foreign, NOW)
    mine = open_cache(folder, **reader)
    assert mine.read() == (None, "of another key or environment")
    assert mine.newest() is None
    mine.save(token, NOW)
    assert text_of(mine.read()) == token.access_token
    assert foreign.access_token in (folder / "us_api_token.json.aside").read_text(encoding="utf-8")


OLD_FORMATS: dict[str, Callable[[str], dict[str, object]]] = {
    "naive local times": lambda text: {
        "access_token": text,
        "expires_at": (NOW + DAY).astimezone().replace(tzinfo=None).isoformat(),
        "cached_at": NOW.astimezone().replace(tzinfo=None).isoformat(),
    },
    "epoch seconds": lambda text: {
        "access_token": text,
        "expires_at": (NOW + DAY).timestamp(),
        "created_at": NOW.timestamp(),
        "expires_datetime": "2026-11-24 17:15:00",
    },
}


@pytest.mark.parametrize("old_format", OLD_FORMATS)
def test_a_file_of_an_earlier_tool_is_ours_unless_its_jwt_names_another_key(folder: Path, old_format: str) -> None:
    """Where no fingerprint is, the JWT's `jti` decides; a token that names no key is believed."""
    path = folder / "us_api_token.json"
    for text, ours in ((make_jwt(issued=NOW), True), ("opaque", True), (make_jwt("another", issued=NOW), False)):
        path.write_text(json.dumps(OLD_FORMATS[old_format](text)), encoding="utf-8")
        token, problem = open_cache(folder).read()
        assert (token is not None, problem == "") == (ours, ours)
        if token:
            assert (token.issued_at, token.expires_at) == (NOW, NOW + DAY)


def damages(good: str) -> dict[str, bytes]:
    """What can become of the file with the content `good`, by name."""
    numbered = json.dumps({**json.loads(good), "expires_at": 0})
    texts = {
        "empty": "",
        "null": "null",
        "list": "[]",
        "text": '"token"',
        "not a number": "NaN",
        "endless number": numbered.replace(": 0", ": 1e400"),
        "long number": numbered.replace(": 0", ": " + "9" * 5000),
        "no token": json.dumps({**json.loads(good), "access_token": None}),
        "line break in the token": json.dumps({**json.loads(good), "access_token": "a\r\nb"}),
        "other types": json.dumps({**json.loads(good), "key_fingerprint": ["x"], "environment": {"a": 1}}),
        "nested": "[" * 60_000,
        "duplicate keys": good.replace('"expires_at"', '"expires_at": "soon", "expires_at": null, "x"'),
        "10 MB": good + " " * 10_000_000,
    }
    return {"garbage": os.urandom(700) + b"\xff", **{name: text.encode() for name, text in texts.items()}}


def put_special(path: Path, kind: str) -> None:
    """Put at `path` what is no regular file."""
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(kind)


def test_no_damage_breaks_the_reading_and_a_save_sets_it_aside(folder: Path) -> None:
    """Each damaged file is a miss with its reason, stays where it is until a save, and is then kept aside."""
    path, token = folder / "us_api_token.json", make_token()
    open_cache(folder).save(token, NOW)
    good = path.read_text(encoding="utf-8")
    (folder / "elsewhere").write_text(good, encoding="utf-8")
    contents = damages(good)
    for name in (*contents, "folder", "pipe", "elsewhere", "nowhere"):
        path.unlink()
        if name in contents:
            path.write_bytes(contents[name])
        else:
            put_special(path, name)
        cache = open_cache(folder)
        found, problem = cache.read()
        assert (found, bool(problem)) == (None, True), name
        assert not any(canary in problem for canary in CANARIES), name
        assert os.path.lexists(path), name
        cache.save(token, NOW)
        assert text_of(open_cache(folder).read()) == token.access_token, name
        aside = [entry for entry in folder.iterdir() if entry.name.endswith(".aside")]
        assert len(aside) == 1, name
        if aside[0].is_dir():
            aside[0].rmdir()
        else:
            aside[0].unlink()
    assert (folder / "elsewhere").read_text(encoding="utf-8") == good


def test_a_token_that_cannot_be_read_just_now_outlives_a_failed_save(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails a read and then a write takes no token away: the next look finds it, here too."""
    token, successor = make_token(), make_token(2 * 86_400)
    open_cache(folder).save(token, NOW)
    cache = open_cache(folder)

    def broken(*_: object) -> NoReturn:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as failing:
        failing.setattr(os, "read", broken)
        failing.setattr(os, "fsync", broken)
        assert cache.read() == (None, os.strerror(errno.EIO))
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            cache.save(successor, NOW)
    assert text_of(cache.read()) == text_of(open_cache(folder).read()) == token.access_token


def test_every_truncation_is_a_miss(folder: Path) -> None:
    """However much of its end is missing, the file is a miss; whole, also with a byte order mark, it is the token."""
    path, token = folder / "us_api_token.json", make_token()
    open_cache(folder).save(token, NOW)
    whole = path.read_bytes().rstrip()
    cache = open_cache(folder)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert text_of(cache.read()) is None
    path.write_bytes(b"\xef\xbb\xbf" + whole)
    assert text_of(cache.read()) == token.access_token


def test_another_processs_renewal_is_seen_at_the_next_look(folder: Path) -> None:
    """Also where the new file has the same size and time, or an older one because the clock was set back."""
    mine, other = open_cache(folder), open_cache(folder)
    first, second, third = (make_token(text=letter * 50) for letter in "abc")
    other.save(first, NOW)
    path = folder / "us_api_token.json"
    times = path.stat()
    assert text_of(mine.read()) == first.access_token
    other.save(second, NOW)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert text_of(mine.read()) == second.access_token
    other.save(third, NOW)
    os.utime(path, (1, 1))
    assert text_of(mine.read()) == third.access_token
    other.delete()
    assert mine.read() == (None, "")


def test_a_file_that_did_not_change_is_not_read_again(folder: Path) -> None:
    """The second look costs one `stat`: the very same token comes back."""
    cache = open_cache(folder)
    cache.save(make_token(), NOW)
    assert cache.read()[0] is cache.read()[0]


def test_a_reader_beside_a_busy_writer_always_has_a_token(folder: Path) -> None:
    """While another process saves without pause, no look finds a miss, and both tokens are seen."""
    pair = [make_token(text=letter * 400) for letter in "ab"]
    open_cache(folder).save(pair[0], NOW)

    def write_on() -> None:
        writer = open_cache(folder)
        while True:
            for token in pair:
                writer.save(token, NOW)

    child, reader, seen = in_child(write_on), open_cache(folder), set()
    end = time.monotonic() + 0.7
    while time.monotonic() < end:
        seen.add(text_of(reader.read()))
    killed(child)
    assert seen == {token.access_token for token in pair}


def test_the_newest_token_of_the_key_lasts_longest_and_is_not_rejected(folder: Path) -> None:
    """Over all files of the key, named or not, a token that serves comes before a longer one that was rejected."""
    short, long = make_token(life=3600, text="short"), make_token(life=7200, text="long")
    dead = make_token(life=9999, text="dead", rejected=True)
    for prefix, token in (("us_", short), ("kr_", dead), ("hk_", long)):
        open_cache(folder, prefix).save(token, NOW)
    every = open_cache(folder, "us_", "kr_", "hk_", "jp_")
    assert [token.access_token for token in [every.newest()] if token] == ["long"]
    assert text_of(every.read(every.paths[1])) == "dead"
    assert [token.access_token for token in [open_cache(folder, "kr_").newest()] if token] == ["long"]
    for prefix in ("us_", "hk_"):
        open_cache(folder, prefix).delete()
    only = open_cache(folder, "kr_").newest()
    assert only is not None
    assert only.rejected_at is not None


def test_a_token_that_could_not_be_saved_serves_its_process_until_there_is_a_later_one(
    kept: Cache, folder: Path
) -> None:
    """It comes before what is on file, also for another object; another process's later token comes before it."""
    kept.save(make_token(life=3600, text="on-file"), NOW)
    kept.keep(make_token(life=7200, text="kept"))
    assert [text_of(cache.read()) for cache in (kept, open_cache(folder))] == ["kept", "kept"]
    later = make_token(life=9999, text="of-another-process")
    content = tokens.to_cache(later, now=NOW, environment="real", key_fingerprint=kept.fingerprint)
    store.write_text(kept.paths[0], json.dumps(content), temporary="other")
    assert text_of(kept.read()) == "of-another-process"
    assert [token.access_token for token in [kept.newest()] if token] == ["of-another-process"]


def test_a_save_ends_what_was_kept_and_still_sets_aside_what_is_damaged(kept: Cache, folder: Path) -> None:
    """A kept token does not hide that its file is damaged: the next save keeps the damage aside."""
    path = folder / "us_api_token.json"
    path.write_text("damage", encoding="utf-8")
    kept.keep(make_token(life=7200, text="kept"))
    kept.save(make_token(life=60, text="saved"), NOW)
    assert text_of(kept.read()) == "saved"
    assert Path(f"{path}.aside").read_text(encoding="utf-8") == "damage"


@pytest.mark.parametrize("failing", ["us", "kr"])
def test_a_token_reaches_every_file_that_takes_it(folder: Path, failing: str) -> None:
    """Where one market's file and mark cannot be written, first or last, the other has the new ones and it the old."""
    cache = open_cache(folder, "us_", "kr_")
    cache.save(make_token(text="old"), NOW)
    for name in ("api_token.json", "token_issued_at.dat"):
        (folder / f".{failing}_{name}.{cache.fingerprint}.tmp").mkdir()  # where the draft has to be
    token = make_token(text="new")
    with pytest.raises(OSError, match="directory"):
        cache.save(token, NOW)
    assert [text_of(cache.read(path)) for path in cache.paths] == (
        ["old", "new"] if failing == "us" else ["new", "old"]
    )
    assert not cache.is_only_here(token)
    with pytest.raises(OSError, match="directory"):
        cache.mark_issued(NOW)
    assert cache.issued_mark() == NOW


def test_only_the_first_markets_file_is_deleted(folder: Path) -> None:
    """`delete` takes one market's file and tells whether there was one; the marks of the issue stay."""
    cache = open_cache(folder, "us_", "kr_")
    cache.save(make_token(), NOW)
    cache.mark_issued(NOW)
    assert (cache.delete(), cache.delete()) == (True, False)
    assert sorted(os.listdir(folder)) == ["kr_api_token.json", "kr_token_issued_at.dat", "us_token_issued_at.dat"]
    assert open_cache(folder, "us_").issued_mark() == NOW


def test_the_mark_of_the_last_issue_is_epoch_seconds_as_text(folder: Path) -> None:
    """The latest of the markets' marks counts, in whole seconds; a damaged one counts for nothing."""
    cache = open_cache(folder, "us_", "kr_")
    assert cache.issued_mark() is None
    cache.mark_issued(NOW + timedelta(milliseconds=700))
    path = folder / "us_token_issued_at.dat"
    assert path.read_text(encoding="utf-8").strip() == str(int(NOW.timestamp()))
    path.write_text(f"{NOW.timestamp() + 60:.2f}", encoding="utf-8")
    assert cache.issued_mark() == NOW + timedelta(seconds=60)
    for damage in (b"", b"soon", b"nan", b"inf", b"9" * 400, b"\xff", b"-1e300"):
        path.write_bytes(damage)
        assert cache.issued_mark() == NOW
    path.unlink()
    path.mkdir()
    assert cache.issued_mark() == NOW


def test_a_cache_shows_no_key(folder: Path) -> None:
    """Neither its repr nor a pickle gives the key away."""
    cache = open_cache(folder)
    assert KEY not in repr(cache)
    with pytest.raises(TypeError):
        pickle.dumps(cache)
