"""Files that someone else wrote, broke or barred: each command ends with a token or a sentence; `get` heals."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scenarios import FULL, HOUR, Desk, desks, served
from test_faults_calls import CLEAR, needs_root

from tokencore.cache import Cache
from tokencore.errors import ConfigurationError
from tokencore.record import IssuanceRecord
from tokencore.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

make_desk = pytest.fixture(scope="module", name="make_desk")(desks)
TEXTS: dict[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "not a number": b"NaN",
    "endless number": b'{"access_token": "a", "expires_at": 1e400}',
    "other types": b'{"access_token": ["a"], "expires_at": {}, "at": [], "outcome": 1}',
    "duplicate keys": b'{"access_token": "a", "access_token": null, "expires_at": 1, "expires_at": "x"}',
    "byte order mark": b"\xef\xbb\xbf{}",
    "garbage": bytes(range(256)) * 3,
    "nul bytes": b"\0" * 600,
    "nested": b"[" * 50_000,
    "10 MB": b"7" * 10_000_000,
    "far future": b'{"access_token": "a", "expires_at": "9999-12-31T23:59:59+00:00", "at": "9999-12-31T23:59:59Z"}',
    "far past": b'{"access_token": "a", "expires_at": "0001-01-01T00:00:00+00:00", "at": "0001-01-01T00:00:00Z"}',
}
KINDS = (*TEXTS, "folder", "pipe", "link", "dangling link", "foreign owner", "open mode")
PLACES = ("us_api_token.json", ".jsonl", "us_token_issued_at.dat")
COMMANDS = (("check", "--json"), ("history", "us"), ("get", "us"), ("tick",), ("get", "kr"))


def damage(path: Path, kind: str) -> None:
    """Put at `path` what the name says."""
    if kind in TEXTS:
        path.write_bytes(TEXTS[kind])
        return
    kept = path.with_name("elsewhere.aside")
    path.replace(kept)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind.endswith("link"):
        path.symlink_to(kept if kind == "link" else "nowhere")
    else:
        shutil.copy(kept, path)
        path.chmod(0o666)
        if kind == "foreign owner":
            os.chown(path, 12_345, 12_345)


@needs_root
@pytest.mark.parametrize("place", PLACES)
def test_no_file_of_the_folder_stops_a_command(
    place: str, make_desk: Callable[[], Desk], record_property: Callable[[str, object], None]
) -> None:
    """Whatever stands in place of token, record or mark: documented exit codes, no traceback, then a token for both."""
    with make_desk() as desk:
        assert desk.run("get", "us").code == 0
        desk.clock.true += 24.5 * HOUR
        again = desk.saved()
        kinds = KINDS if FULL else KINDS[PLACES.index(place) :: 3]
        for kind in kinds:
            again()
            damage(desk.path(place), kind)
            for arguments in COMMANDS:
                ran = desk.run(*arguments)
                assert ran.code in CLEAR, (kind, arguments, ran)
                assert "Traceback" not in ran.err, (kind, arguments, ran)
            assert len(served(desk)) == 1, kind
    record_property("cases", len(kinds) * len(COMMANDS))


@pytest.mark.parametrize("kind", [*TEXTS, "folder"])
@pytest.mark.parametrize("name", [".env", ".tokencore/config.toml"])
def test_settings_files_are_read_or_named(
    name: str, kind: str, isolated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stands in place of a settings file, loading ends well or with one sentence for people."""
    monkeypatch.chdir(isolated)
    path, told = isolated / name, "one sentence"
    path.parent.mkdir(exist_ok=True)
    if kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(TEXTS[kind])
    try:
        Settings.load()
    except ConfigurationError as error:
        told = str(error)
    assert "\n" not in told


TOKEN = {"access_token": "opaque", "expires_at": "2027-01-01T00:00:00+00:00", "cached_at": "2026-12-31T00:00:00+00:00"}
pieces = st.one_of(st.binary(max_size=300), st.sampled_from(sorted(TEXTS.values(), key=len)[:-1]))
changed = st.dictionaries(
    st.sampled_from([*TOKEN, "issued_at", "key_fingerprint", "environment", "rejected_at", "at", "outcome", "pid"]),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=40) | st.datetimes().map(str),
        lambda inner: st.lists(inner, max_size=2),
        max_leaves=3,
    ),
)


@hypothesis_settings(max_examples=400)
@given(content=pieces | changed.map(lambda own: json.dumps({**TOKEN, **own}).encode()))
@example(content=json.dumps(TOKEN).encode())
def test_parsers_of_foreign_bytes_never_raise(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Token file, mark and record read any bytes as something or as nothing."""
    folder = tmp_path_factory.getbasetemp()
    cache, record = Cache(str(folder), "https://kis", "real", "key", ["us_"]), IssuanceRecord(str(folder), "0" * 16)
    for path in (cache.paths[0], str(folder / "us_token_issued_at.dat"), record.path):
        with open(path, "wb") as file:
            file.write(content)
    token, problem = cache.read()
    assert (token is None) == bool(problem)
    cache.issued_mark()
    record.attempts()
