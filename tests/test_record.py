"""The issuance record: one line per attempt, before the request and after it, whatever happens in between."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import tempfile
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from builders import DAY, NOW, ended, in_child
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tokencore import TokenManager
from tokencore.errors import IssuanceLimitError, TokenError
from tokencore.record import KEEP, LINE, TRIM_AT, Attempt, IssuanceRecord, Outcome, failures, issued_within, latest
from tokencore.sandbox import APP_KEY, APP_SECRET

if TYPE_CHECKING:
    from tokencore.sandbox import Sandbox

SECOND = timedelta(seconds=1)


@pytest.fixture
def record(tmp_path: Path) -> IssuanceRecord:
    """The record of a key."""
    return IssuanceRecord(str(tmp_path), "0123456789abcdef")


def attempt(at: datetime = NOW, outcome: Outcome = Outcome.SENT, reason: str = "get us") -> Attempt:
    """An attempt of this process."""
    return Attempt(at, outcome, reason=reason, credentials="89abcdef", pid=os.getpid())


def write(record: IssuanceRecord, *outcomes: Outcome, start: datetime = NOW) -> list[Attempt]:
    """Attempts a second apart, completed at once."""
    made = [attempt(start + n * SECOND, outcome) for n, outcome in enumerate(outcomes)]
    for each in made:
        record.complete(record.begin(each._replace(outcome=Outcome.SENT)), each)
    return made


def test_an_attempt_stands_on_disk_before_the_request_and_is_completed_in_place(record: IssuanceRecord) -> None:
    """One line: `sent` before, the outcome with code and expiry after, every field as it was given."""
    sent = attempt()
    position = record.begin(sent)
    assert record.attempts() == [sent]
    done = sent._replace(at=NOW + SECOND, outcome=Outcome.LIMIT, code="EGW00133", expires_at=NOW + DAY)
    record.complete(position, done)
    assert record.attempts() == [done]
    assert Path(record.path).read_bytes().count(b"\n") == 1


def test_an_attempt_is_on_disk_before_anything_is_sent(record: IssuanceRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    """`begin` and `complete` each end with their line synced, the first one also with the folder that holds it."""
    synced, real = [], os.fsync

    def sync(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        synced.append((kind, len(record.attempts())))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    write(record, Outcome.ISSUED, Outcome.LIMIT)
    assert synced == [("file", 1), ("folder", 1), ("file", 1), ("file", 2), ("file", 2)]


def test_attempts_come_oldest_first_and_a_missing_record_is_empty(record: IssuanceRecord) -> None:
    """Each attempt has a line of its own, in the order of the attempts."""
    assert record.attempts() == []
    assert write(record, *Outcome) == record.attempts()


def test_an_attempt_whose_process_was_killed_stays_sent(record: IssuanceRecord) -> None:
    """After `kill -9` between request and answer every other process still sees that something was sent."""

    def work() -> None:
        record.begin(attempt())
        os.kill(os.getpid(), signal.SIGKILL)

    assert ended(in_child(work)) == -signal.SIGKILL
    assert [(found.outcome, found.counts) for found in record.attempts()] == [(Outcome.SENT, True)]
    write(record, Outcome.ISSUED)
    assert [found.outcome for found in record.attempts()] == [Outcome.SENT, Outcome.ISSUED]


def test_a_torn_record_loses_its_last_line_at_most(record: IssuanceRecord) -> None:
    """Wherever a crash cut the file, the lines before the cut are read, and the next attempt is readable again."""
    made = write(record, Outcome.ISSUED, Outcome.LIMIT, Outcome.REFUSED)
    whole = Path(record.path).read_bytes()
    for length in range(0, len(whole), 5):
        Path(record.path).write_bytes(whole[:length])
        before = record.attempts()
        assert before in (made[: length // LINE], made[: length // LINE + 1])  # a line may only miss its blanks
        assert before + write(record, Outcome.ISSUED) == record.attempts()


@pytest.mark.parametrize(
    "damage",
    [
        b"\xff\xfe\x00 garbage",
        b"null\n[]\n5\nNaN\n",
        b'{"at": "soon", "outcome": "issued"}\n',
        b'{"at": "0001-01-01T00:00:00+09:00", "outcome": "issued"}\n',
        b'{"at": "9999-12-31T23:59:59+00:00", "outcome": "issued"}\n',
        b'{"at": "2026-11-23T08:15:00+00:00", "outcome": "issued", "pid": Infinity}\n',
        b'{"at": 5, "outcome": ["issued"]}\n',
        b"[" * 100_000 + b"\n",
    ],
)
def test_lines_that_cannot_be_read_are_passed_over(record: IssuanceRecord, damage: bytes) -> None:
    """Damage of any kind costs its own line only: what was recorded before and after it still counts."""
    first = write(record, Outcome.ISSUED)
    with Path(record.path).open("ab") as file:
        file.write(damage)
    assert record.attempts() == first
    second = write(record, Outcome.LIMIT)
    assert record.attempts() == first + second


def test_an_outcome_that_a_later_version_knows_is_an_attempt_all_the_same(record: IssuanceRecord) -> None:
    """While two versions share a folder, no attempt of either is forgotten: KIS may have seen it, and counts."""
    first = write(record, Outcome.ISSUED)
    with Path(record.path).open("ab") as file:
        file.write(b'{"at": "2026-11-23T08:15:00+00:00", "outcome": "throttled"}\n')
    assert record.attempts() == [*first, Attempt(datetime(2026, 11, 23, 8, 15, tzinfo=UTC), Outcome.SENT)]
    assert record.attempts()[-1].counts


@example(reason="\x00" * 80, by="\x00" * 40, code="EGW00133")
@example(reason="점검" * 40, by="김민지", code="EGW00133")
@given(reason=st.text(max_size=200), by=st.text(max_size=50), code=st.none() | st.just("EGW00133"))
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_reason_breaks_its_line(record: IssuanceRecord, reason: str, by: str, code: str | None) -> None:
    """Whatever a person gives, the line stays one sector; the name is kept, and as much of the reason as fits."""
    made = attempt(reason=reason)._replace(code=code, by=by[:40])
    before = record.attempts()
    record.complete(record.begin(made._replace(by=by)), made)
    found = record.attempts()
    assert found[:-1] == before
    assert found[-1]._replace(reason="") == made._replace(reason="")
    kept = found[-1].reason
    assert reason[:80].startswith(kept)
    assert kept == reason[:80] or len(kept.encode()) > 150 or not reason.isprintable()
    assert os.path.getsize(record.path) % LINE == 0


def test_a_reason_from_the_command_line_need_not_be_text(record: IssuanceRecord) -> None:
    """Bytes that are no UTF-8 reach a program as lone surrogates: they are replaced, the attempt is kept."""
    write(record, Outcome.ISSUED)
    record.begin(attempt(reason="by hand \udcff"))
    assert [found.reason for found in record.attempts()] == ["get us", "by hand ?"]


def test_a_long_record_keeps_its_newest_attempts(record: IssuanceRecord) -> None:
    """Beyond the limit the oldest lines go, whole, and the new attempt is added and completed as ever."""
    made = write(record, *[Outcome.ISSUED] * 3)
    with Path(record.path).open("ab") as file:
        file.write(Path(record.path).read_bytes()[-LINE:] * TRIM_AT)
    newest = write(record, Outcome.REFUSED)
    found = record.attempts()
    assert found == [made[-1]] * KEEP + newest
    assert os.path.getsize(record.path) == (KEEP + 2) * LINE  # one tells what was cut off
    assert not list(Path(record.path).parent.glob(".key-*"))


def test_totals_never_shrink(record: IssuanceRecord) -> None:
    """What a record has counted it goes on counting when its oldest lines go; one in flight is not counted yet."""
    write(record, Outcome.LIMIT, *[Outcome.ISSUED] * 2)
    with Path(record.path).open("ab") as file:
        file.write(Path(record.path).read_bytes()[-LINE:] * TRIM_AT)
    counted = record.read().totals()
    assert counted == {Outcome.LIMIT: 1, Outcome.ISSUED: TRIM_AT + 2}
    position = record.begin(attempt())
    assert record.read().totals() == counted
    record.complete(position, attempt(outcome=Outcome.SAME))
    assert record.read().totals() == counted + Counter({Outcome.SAME: 1})
    for _ in range(TRIM_AT):
        with Path(record.path).open("ab") as file:
            file.write(Path(record.path).read_bytes()[-LINE:])
    write(record, Outcome.SAME)
    assert record.read().totals() == counted + Counter({Outcome.SAME: TRIM_AT + 2})


def test_the_record_is_private_and_follows_no_link(record: IssuanceRecord, tmp_path: Path) -> None:
    """The file is 0600 under umask 0; a symbolic link in its place is refused, not written through."""
    before = os.umask(0)
    try:
        write(record, Outcome.ISSUED)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(record.path).st_mode) == 0o600
    os.unlink(record.path)
    os.symlink(tmp_path / "victim", record.path)
    with pytest.raises(OSError, match="symbolic link"):
        record.begin(attempt())
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_record_that_is_no_file_refuses_the_attempt(record: IssuanceRecord, kind: str) -> None:
    """Reading is empty and never waits; writing is an `OSError`, so that nothing is issued on the strength of it."""
    if kind == "folder":
        os.mkdir(record.path)
    else:
        os.mkfifo(record.path)
    assert record.attempts() == []
    with pytest.raises(OSError, match=r"[a-z]"):
        record.begin(attempt())


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can become someone else")
def test_a_record_that_cannot_be_read_still_tells_its_last_attempt() -> None:
    """Where the disk or the mode forbids to read it, the time of its last change starts the cool-down all the same."""
    with tempfile.TemporaryDirectory() as public:
        Path(public).chmod(0o755)
        record = IssuanceRecord(public, "0123456789abcdef")
        write(record, Outcome.ISSUED, Outcome.SERVER_ERROR)
        Path(record.path).chmod(0)
        os.utime(record.path, (NOW.timestamp(), NOW.timestamp()))

        def work() -> None:
            os.setuid(65_534)
            assert record.attempts() == [Attempt(NOW, Outcome.SENT)]

        assert ended(in_child(work)) == 0


def test_a_long_record_that_cannot_be_read_now_is_not_cut(
    record: IssuanceRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One read that fails costs none of the attempts that were kept."""
    write(record, Outcome.ISSUED)
    Path(record.path).write_bytes(Path(record.path).read_bytes() * (TRIM_AT + 1))

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(os, "read", broken)
        record.begin(attempt())
    assert len(record.attempts()) == TRIM_AT + 2


def test_every_line_is_json_for_other_programs(record: IssuanceRecord) -> None:
    """A line holds what, when, why and by whom it was tried, and what became of it; Korean stays Korean."""
    made = attempt(reason="점검 뒤")._replace(expires_at=NOW + DAY, by="김민지")
    record.begin(made)
    line = Path(record.path).read_text(encoding="utf-8")
    assert json.loads(line) == {
        "at": "2026-11-23T08:15:00.000+00:00",
        "outcome": "sent",
        "code": None,
        "expires_at": "2026-11-24T08:15:00+00:00",
        "reason": "점검 뒤",
        "by": "김민지",
        "credentials": "89abcdef",
        "pid": os.getpid(),
    }
    assert "점검 뒤" in line


def test_real_attempts_leave_one_line_each_and_no_secret(gateway: Sandbox, isolated: Path) -> None:
    """After issues, refusals and a broken answer the record has a line for each request and names nothing secret."""
    gateway.set_rules(same_token=0, issue_interval=0)
    manager = TokenManager("us")
    manager.market.issue_interval = 0
    token = manager.get_valid_token()
    for mode in ("limit", "bad-key", "html", "garbage", "drop"):
        gateway.fail(mode, 1)
        with pytest.raises(TokenError):
            manager.refresh(force=True)
    gateway.set_rules(token_life=90_000)  # else the new token could end in the same second: the same one, then
    manager.refresh(force=True)
    folder = isolated / ".tokencore"
    (path,) = folder.glob("key-*.jsonl")
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") == gateway.stats()["token_requests"] == 7
    outcomes = [found.outcome.value for found in manager.history()]
    assert outcomes == ["issued", "limit", "bad_key", "refused", "bad_answer", "no_answer", "issued"]
    for entry in [*folder.glob("key-*"), *folder.glob("*.dat")]:
        written = entry.name + entry.read_text(encoding="utf-8")
        assert not any(secret in written for secret in (token, token.split(".")[1], APP_KEY, APP_SECRET))


def test_a_killed_request_starts_the_cool_down_of_everyone(gateway: Sandbox) -> None:
    """A process that dies while KIS answers leaves its attempt as `sent`, and the next one waits its minute."""
    gateway.fail("hang")

    def work() -> None:
        TokenManager("us").get_valid_token()

    child = in_child(work)
    manager = TokenManager("us")
    while not manager.history():
        pass
    os.kill(child, signal.SIGKILL)
    ended(child)
    gateway.clear()
    assert [found.outcome for found in manager.history()] == [Outcome.SENT]
    with pytest.raises(IssuanceLimitError) as caught:
        manager.refresh()
    assert caught.value.cause == "minute"


def test_only_new_tokens_of_the_last_24_hours_count_for_the_ceiling() -> None:
    """Repeated tokens, failures and older issues do not count; what a clock set back left ahead does, for a day."""
    ages = {
        "a second": -SECOND,
        "almost a day": SECOND - DAY,
        "a day": -DAY,
        "an hour ahead": 3600 * SECOND,
        "a year ahead": 365 * DAY,
    }
    made = [Attempt(NOW + age, Outcome.ISSUED, reason=name) for name, age in ages.items()]
    made += [Attempt(NOW, outcome) for outcome in Outcome if outcome is not Outcome.ISSUED]
    assert [found.reason for found in issued_within(made, NOW)] == ["a second", "almost a day", "an hour ahead"]


def test_the_cool_down_runs_from_the_last_attempt_that_kis_may_have_seen() -> None:
    """Every outcome but `unreachable` and `imported` counts, as KIS may count refused and unanswered requests too."""
    for outcome in Outcome:
        made = [Attempt(NOW, Outcome.ISSUED), Attempt(NOW + SECOND, outcome)]
        assert latest(made) == made[outcome not in (Outcome.UNREACHABLE, Outcome.IMPORTED)]
    assert latest([Attempt(NOW, Outcome.UNREACHABLE)]) is None


def test_failures_are_counted_since_the_last_token() -> None:
    """A granted token, new or repeated, ends a row of failures."""
    rows = [Outcome.LIMIT, Outcome.ISSUED, Outcome.UNREACHABLE, Outcome.SENT, Outcome.REFUSED]
    assert failures([Attempt(NOW, outcome) for outcome in rows]) == 3
    assert failures([Attempt(NOW, outcome) for outcome in (*rows, Outcome.SAME)]) == 0
    assert failures([]) == 0
