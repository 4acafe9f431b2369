"""Files that no crash tears and nobody else reads."""

from __future__ import annotations

import errno
import os
import signal
import stat
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from builders import ended, in_child, killed

from tokencore.errors import TokenStoreError
from tokencore.stores import files
from tokencore.stores.file_store import OURS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OLD, NEW = "old\n" * 150, "new!\n" * 200
STEPS = ("open", "fsync", "replace", "unlink")  # what `write_text` asks of the system
NOBODY = 65534
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become someone else")


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that everyone may enter and change, as a mounted volume often is."""
    with tempfile.TemporaryDirectory() as made:
        path = Path(made)
        path.chmod(0o777)
        yield path


def write(path: Path, text: str) -> None:
    """Write as the holder of one key's lock does."""
    files.write_text(str(path), text, writer="key")


def break_step(number: int, act: Callable[[], None], *, after: bool = False) -> list[str]:
    """Let `act` happen at the file call with this number; for a child process. The list fills with the calls made."""
    calls: list[str] = []

    def broken(name: str) -> Callable[..., object]:
        real = getattr(os, name)

        def call(*args: object, **kwargs: object) -> object:
            calls.append(name)
            if len(calls) == number and not after:
                act()
            try:
                return real(*args, **kwargs)
            finally:
                if len(calls) == number and after:
                    act()

        return call

    for name in STEPS:
        setattr(os, name, broken(name))
    return calls


def fail(number: int) -> Callable[[], None]:
    """Raise the system's error with this number."""

    def act() -> None:
        raise OSError(number, os.strerror(number))

    return act


def die() -> None:
    """End at once, as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def as_nobody(work: Callable[[], None]) -> int:
    """Run `work` in a process without root's rights; its exit code."""

    def changed() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        work()

    return ended(in_child(changed))


def shown(path: Path) -> str:
    """The permissions of a file or folder itself, in octal."""
    return f"{stat.S_IMODE(path.lstat().st_mode):o}"


def test_files_are_private_from_the_first_byte(folder: Path) -> None:
    """With umask 0, no file that a busy writer leaves or passes through can ever be read by others."""
    path = folder / "us_api_token.json"

    def write_on() -> None:
        os.umask(0)
        while True:
            write(path, NEW * 20)

    child, seen = in_child(write_on), set()
    end = time.monotonic() + 1
    while time.monotonic() < end:
        for entry in os.scandir(folder):
            try:
                seen.add((entry.name.endswith(".tmp"), stat.S_IMODE(entry.stat().st_mode)))
            except FileNotFoundError:
                continue  # it was renamed between two looks
    killed(child)
    assert seen == {(True, 0o600), (False, 0o600)}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("old", [OLD, None], ids=["replacing", "new"])
def test_a_kill_at_any_step_leaves_the_old_or_the_new_content(folder: Path, old: str | None, *, after: bool) -> None:
    """Whichever file call a writer dies at, the file is whole; the next writer succeeds and nothing is left over."""
    path = folder / "us_api_token.json"
    found = []
    for step in range(1, 20):
        if old is not None:
            path.write_text(old, encoding="utf-8")
        else:
            path.unlink(missing_ok=True)

        def work(step: int = step) -> None:
            break_step(step, die, after=after)
            write(path, NEW)

        died = ended(in_child(work)) == -signal.SIGKILL
        found.append(files.read_text(str(path)))
        write(path, NEW)
        assert os.listdir(folder) == [path.name]
        if not died:
            break
    assert len(found) > len(STEPS)
    assert set(found) == {old, NEW}
    assert found == sorted(found, key=lambda text: text == NEW)  # never back to the old one


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EACCES], ids=errno.errorcode.get)
def test_a_failing_file_call_keeps_the_content_whole(folder: Path, number: int) -> None:
    """Whichever file call fails, the caller is told, the file is old or new, and no draft stays."""
    path = folder / "us_api_token.json"
    outcomes = []
    for step in range(1, 20):
        path.write_text(OLD, encoding="utf-8")

        def work(step: int = step) -> None:
            calls = break_step(step, fail(number))
            try:
                write(path, NEW)
            except OSError as error:
                os._exit(3 if error.errno == number else 4)
            os._exit(0 if len(calls) < step else 5)

        code, text = ended(in_child(work)), path.read_text(encoding="utf-8")
        assert text in (OLD, NEW)
        assert os.listdir(folder) == [path.name]
        outcomes.append((code, text))
        if code == 0:
            break
    assert outcomes[-1] == (0, NEW)
    assert {code for code, _ in outcomes[:-1]} == {3}
    assert (3, OLD) in outcomes


def test_content_is_on_disk_before_it_is_visible_and_the_change_of_name_after_it(folder: Path) -> None:
    """A power cut cannot leave an empty file under the right name: fsync, rename, fsync of the folder."""

    def work() -> None:
        calls = break_step(0, die)
        write(folder / "us_api_token.json", NEW)
        assert [name for name in calls if name in ("fsync", "replace")] == ["fsync", "replace", "fsync"]

    assert ended(in_child(work)) == 0


def test_a_writer_never_follows_a_link_at_its_path(folder: Path, tmp_path: Path) -> None:
    """A symbolic link at the file or its draft is replaced; what it points to stays as it is."""
    victim = tmp_path / "victim"
    victim.write_text(OLD, encoding="utf-8")
    path = folder / "us_api_token.json"
    path.symlink_to(victim)
    (folder / ".us_api_token.json.key.tmp").symlink_to(victim)
    write(path, NEW)
    assert victim.read_text(encoding="utf-8") == OLD
    assert (path.is_symlink(), path.read_text(encoding="utf-8")) == (False, NEW)


def test_a_busy_writer_never_shows_a_reader_half_a_file(folder: Path) -> None:
    """Thousands of reads beside a writer give the old content or the new one, and see each change by its signature."""
    path = folder / "us_api_token.json"
    write(path, OLD)

    def write_on() -> None:
        while True:
            write(path, NEW)
            write(path, OLD)

    child, texts, signatures = in_child(write_on), set(), set()
    end = time.monotonic() + 0.7
    while time.monotonic() < end:
        signatures.add(files.signature(str(path)))
        texts.add(files.read_text(str(path)))
    killed(child)
    assert texts == {OLD, NEW}
    assert None not in signatures
    assert len(signatures) > 10


def test_a_signature_differs_where_only_the_time_or_the_inode_does(folder: Path) -> None:
    """A renewal of the same size is noticed, also with an older or the same modification time."""
    path = folder / "us_api_token.json"
    write(path, "a" * 9)
    first, times = files.signature(str(path)), path.stat()
    write(path, "b" * 9)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    second = files.signature(str(path))
    os.utime(path, (1, 1))
    assert len({first, second, files.signature(str(path)), files.signature(str(folder / "none"))}) == 4


def test_text_is_read_with_and_without_a_byte_order_mark(folder: Path) -> None:
    """What Windows' editor saved is read like the rest; no file and no folder are None."""
    path = folder / "us_api_token.json"
    path.write_bytes(b"\xef\xbb\xbf{}")
    assert files.read_text(str(path)) == "{}"
    assert files.read_text(str(folder / "none")) is None
    assert files.read_text(str(path / "below")) is None


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "dangling link", "too large", "not text"])
def test_what_is_no_text_file_is_an_error_and_never_a_wait(folder: Path, kind: str) -> None:
    """A FIFO does not block, a link is not followed, 10 MB are not read whole: each is a `ValueError`."""
    path = folder / "us_api_token.json"
    make: dict[str, Callable[[], object]] = {
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "link": lambda: path.symlink_to(folder.parent),
        "dangling link": lambda: path.symlink_to("nowhere"),
        "too large": lambda: path.write_bytes(b" " * 10_000_000),
        "not text": lambda: path.write_bytes(b"\xff{}"),
    }
    make[kind]()
    with pytest.raises(ValueError, match=r"[a-z]"):
        files.read_text(str(path))


@needs_root
def test_a_file_that_may_not_be_read_is_an_error(public: Path) -> None:
    """Mode 000 is met as a `ValueError`, not as a missing file: it has to be set aside."""
    path = public / "us_api_token.json"
    path.write_text("{}", encoding="utf-8")
    path.chmod(0)

    def work() -> None:
        with pytest.raises(ValueError, match="Permission denied"):
            files.read_text(str(path))

    assert as_nobody(work) == 0


def test_a_close_that_fails_takes_nothing_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read is given, and what was written stands, although a network disk fails the last call of all."""
    path, close = folder / "us_api_token.json", os.close

    def broken(descriptor: int) -> None:
        close(descriptor)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "close", broken)
    write(path, NEW)
    assert files.read_text(str(path)) == NEW


@pytest.mark.parametrize("before", ["nothing", "file", "folder"])
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_set_aside_is_kept_and_only_a_file_keeps_its_place(folder: Path, kind: str, before: str) -> None:
    """Whatever was set aside earlier, the content is kept, private if a file; a file stays for its successor, too."""
    path, aside = folder / "us_api_token.json", folder / "us_api_token.json.aside"
    for place, what in ((aside, before), (path, kind)):
        if what == "folder":
            (place / "below").mkdir(parents=True)
        elif what == "file":
            place.write_text(what, encoding="utf-8")
            place.chmod(0o644)
        elif what == "link":
            place.symlink_to(folder)
    files.set_aside(str(path))
    kept = [place for place in folder.iterdir() if place.name.endswith(".aside")]
    assert os.path.lexists(path) == (kind == "file")
    assert any(place.is_symlink() == (kind == "link") and place.is_dir() == (kind != "file") for place in kept)
    assert shown(folder) == "700"
    if kind == "file":
        assert "600" in [shown(place) for place in kept if place.is_file()]


@needs_root
def test_a_file_of_someone_else_is_set_aside_too(public: Path) -> None:
    """Where only its owner could change the mode, the file is moved all the same instead of being lost."""
    path = public / "us_api_token.json"
    path.write_text("theirs", encoding="utf-8")
    assert as_nobody(lambda: files.set_aside(str(path))) == 0
    assert Path(f"{path}.aside").read_text(encoding="utf-8") == "theirs"


def test_the_token_directory_is_made_private(tmp_path: Path) -> None:
    """A new directory is 0700 whatever the umask; an open one that holds only our files is closed."""
    made, found = tmp_path / "deep" / "made", tmp_path / "found"
    found.mkdir(0o755)
    for name in (
        "us_api_token.json",
        "us_token_issued_at.dat",
        "us_krs_token.dat",
        "key-0.lock",
        ".key-0.jsonl.trim.tmp",
    ):
        (found / name).touch()
    found.chmod(0o755)
    before = os.umask(0)
    try:
        for folder in (made, found):
            files.make_private(str(folder), ours=OURS)
            assert shown(folder) == "700"
    finally:
        os.umask(before)


def test_a_directory_that_others_use_keeps_its_mode(tmp_path: Path) -> None:
    """`KIS_TOKEN_DIR=/tmp` locks nobody out of /tmp."""
    tmp_path.chmod(0o755)
    (tmp_path / "someone's file").touch()
    files.make_private(str(tmp_path))
    assert shown(tmp_path) == "755"


def test_an_impossible_directory_is_one_sentence_with_its_fix(tmp_path: Path) -> None:
    """A file where the directory should be is a `TokenStoreError` that names the path and what to do."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(TokenStoreError, match=r"file.*Nothing was issued.*KIS_TOKEN_DIR"):
            files.make_private(str(path))


@needs_root
@pytest.mark.parametrize("spoil", ["owner", "mode", "above"])
def test_a_folder_that_others_can_change_is_refused(public: Path, spoil: str) -> None:
    """As ssh does with its keys: of another user's, a writable one or one below a writable one nothing is believed."""
    folder = public / "tokens"
    folder.mkdir(0o700)
    public.chmod(0o777 if spoil == "above" else 0o755)
    folder.chmod(0o777 if spoil == "mode" else 0o700)
    if spoil == "owner":
        os.chown(folder, NOBODY, NOBODY)
    (folder / "theirs").touch()
    with pytest.raises(TokenStoreError, match=r"so a token there may be planted.*ch(own|mod) "):
        files.make_private(str(folder), ours=OURS)


@needs_root
@pytest.mark.parametrize("spoil", ["owner", "mode"])
def test_a_file_that_others_can_change_is_refused(folder: Path, spoil: str) -> None:
    """A planted token is never read."""
    path = folder / "us_api_token.json"
    path.write_text(NEW, encoding="utf-8")
    path.chmod(0o666 if spoil == "mode" else 0o600)
    if spoil == "owner":
        os.chown(path, NOBODY, NOBODY)
    with pytest.raises(TokenStoreError, match="may be planted"):
        files.read_text(str(path))


def test_a_mounted_file_is_written_in_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be replaced, as a single file that Docker mounts, is overwritten; nothing else is left."""
    path = folder / "us_api_token.json"
    path.write_text(OLD * 2, encoding="utf-8")
    monkeypatch.setattr(os, "replace", lambda *_: fail(errno.EBUSY)())
    write(path, NEW)
    assert path.read_text(encoding="utf-8") == NEW
    assert os.listdir(folder) == [path.name]
