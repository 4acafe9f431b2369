"""File calls that fail: the caller has the token that was paid for or one clear error, and the old one survives."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from scenarios import (
    FULL,
    MARKETS,
    SCENARIOS,
    SPACE,
    Desk,
    Scenario,
    desks,
    needs_space,
    served,
    still_serving,
    tokens_of,
    untidy,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from running import Ran
    from stepping import Stepped

make_desk = pytest.fixture(scope="module", name="make_desk")(desks)
RENEWALS = [name for name in SCENARIOS if name not in ("delete", "inside the minute")]
ERRORS = (errno.EIO, errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EINTR, errno.EMFILE)
EVERY = 1 if FULL else 19  # calls; the part that a run takes begins elsewhere in each scenario
CLEAR = (0, 3, 4, 6, 7)  # exit codes that say what is the matter
NO_FILE = ("start", "sleep", "connect", "sendall", "recv_into", "close socket")
LOOKS = ("open key", "read key", "fstat key")
NOBODY = 65_534
needs_root = pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="only root can mount")


def with_failing(number: int, error: int, process: Stepped) -> Ran:
    """Let the call with this number fail, and nothing else."""
    for _ in range(number):
        if process.at is not None:
            process.go()
    if process.at is not None:
        process.go(error)
    return process.finish()


def with_full_disk(number: int, error: int, process: Stepped) -> Ran:
    """Let the disk be full from the call with this number on, and say so with the error."""
    made = 0
    while process.at is not None:
        process.go(error if made >= number and needs_space(process.at) else 0)
        made += 1
    return process.ran


def wrong(scenario: Scenario, desk: Desk, old: dict[str, str | None], issued: int, ran: Ran) -> Iterator[str]:
    """What is not as it must be whichever call failed, after `issued` tokens; nothing where all is well."""
    now, bought = tokens_of(desk), set(desk.granted[issued:])
    if ran.code not in CLEAR or "Traceback" in ran.err:
        yield f"unclear: {ran}"
    elif ran.code and not ran.err.splitlines()[-1].startswith("tokencore: "):
        yield f"no sentence: {ran}"
    if not all(now[market] in {old[market], *desk.granted} for market in MARKETS):
        yield "a file holds neither the old nor the new token"
    lost = bought - {ran.out.strip(), *now.values()}
    if lost and (ran.code != 7 or "only this process" not in ran.err):
        yield f"a bought token reached nobody, and nobody was told: {ran}"
    answers = served(desk)
    if not answers <= {desk.granted[-1], *(still_serving(old) if scenario.keeps else ())}:
        yield f"the next processes got {len(answers)} tokens, not only those that serve"
    yield from untidy(desk)


def tortured(
    desk: Desk,
    name: str,
    chosen: Callable[[list[str]], Iterable[tuple[int, int]]],
    fault: Callable[[int, int, Stepped], Ran] = with_failing,
) -> tuple[int, list[tuple[int, str, str, str]]]:
    """Let the chosen ones of the scenario's calls meet their errors: how many there were, and all that went wrong."""
    scenario, cases, found = SCENARIOS[name], 0, []
    scenario.prepare(desk)
    old, issued, again = tokens_of(desk), len(desk.granted), desk.saved()
    calls = desk.calls(*scenario.arguments)
    for number, error in chosen(calls):
        again()
        ran = fault(number, error, desk.start(*scenario.arguments))
        cases += 1
        bad = wrong(scenario, desk, old, issued, ran)
        found += [(number, calls[number], errno.errorcode[error], what) for what in bad]
    return cases, found


@pytest.mark.parametrize("name", RENEWALS)
def test_a_call_that_fails_costs_no_token(
    name: str, make_desk: Callable[[], Desk], record_property: Callable[[str, object], None]
) -> None:
    """Each error at each call: a documented exit code, no traceback, and a bought token in hand or on disk."""
    turn = RENEWALS.index(name)

    def chosen(calls: list[str]) -> Iterator[tuple[int, int]]:
        for number in range(turn % EVERY, len(calls), EVERY):
            if not calls[number].startswith(NO_FILE):
                yield from ((number, error) for error in (ERRORS if FULL else [ERRORS[(number + turn) % len(ERRORS)]]))

    with make_desk() as desk:
        cases, found = tortured(desk, name, chosen)
    assert not found, "\n".join(map(str, found))
    record_property("cases", cases)


def test_a_record_that_cannot_be_read_does_not_cost_a_request(
    make_desk: Callable[[], Desk], record_property: Callable[[str, object], None]
) -> None:
    """Each look at the record fails once, ten seconds after a request: the rest of the minute is waited out."""

    def chosen(calls: list[str]) -> list[tuple[int, int]]:
        looks = [number for number, call in enumerate(calls) if call.split("-")[0] in LOOKS]
        return [(number, errno.EIO) for number in looks[:12]]

    with make_desk() as desk:
        cases, found = tortured(desk, "inside the minute", chosen)
    assert not found, "\n".join(map(str, found))
    assert cases
    record_property("cases", cases)


@pytest.mark.parametrize("name", RENEWALS)
def test_a_disk_that_fills_up_costs_no_token(
    name: str, make_desk: Callable[[], Desk], record_property: Callable[[str, object], None]
) -> None:
    """Every write from some call on fails, as on a full disk: the same holds, and with space again all is well."""

    def chosen(calls: list[str]) -> list[tuple[int, int]]:
        writes = [(number, errno.ENOSPC) for number, call in enumerate(calls) if call.startswith(SPACE)]
        return writes if FULL else writes[RENEWALS.index(name) % 3 :: 12]

    with make_desk() as desk:
        cases, found = tortured(desk, name, chosen, with_full_disk)
    assert not found, "\n".join(map(str, found))
    record_property("cases", cases)


def mount(folder: Path, *options: str) -> None:
    """Mount a file system in memory at `folder`, or change the one there; skips where the machine forbids it."""
    done = subprocess.run(["/bin/mount", *options, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mount is not allowed here: {done.stderr.strip()}")


@pytest.fixture
def small(make_desk: Callable[[], Desk]) -> Iterator[Desk]:
    """A desk whose folder is a file system of its own, of 64 kB."""
    with make_desk() as desk:
        desk.folder.mkdir(mode=0o700, parents=True)
        mount(desk.folder, "-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs")
        try:
            yield desk
        finally:
            subprocess.run(["/bin/umount", "--lazy", str(desk.folder)], check=True)


@needs_root
@pytest.mark.parametrize("left", [0, 1, 2, 3, 4], ids="{} pages left".format)
def test_a_full_file_system_costs_no_token(
    small: Desk, left: int, record_property: Callable[[str, object], None]
) -> None:
    """A real one, with room for so many files: the token is printed, and with space again the same one is served."""
    filler, room = small.folder / "filler", os.statvfs(small.folder)
    filler.write_bytes(b"x" * room.f_bsize * (room.f_bavail - left))
    ran = small.run("get", "us")
    assert (ran.code, ran.out.strip()) == (0, small.granted[0])
    filler.unlink()
    assert served(small) == {small.granted[0]}
    assert len(small.granted) == 1
    assert list(untidy(small)) == []
    record_property("cases", 1)


@needs_root
@pytest.mark.parametrize(("hours", "code"), [(0.0, 7), (23.6, 0), (24.5, 7)], ids=["no token", "old one", "expired"])
def test_a_read_only_file_system_is_one_sentence(
    small: Desk, hours: float, code: int, record_property: Callable[[str, object], None]
) -> None:
    """Nothing is issued that could not be kept: the token that serves goes on, else the error names the folder."""
    if hours:
        assert small.run("get", "us").code == 0
        small.clock.true += hours * 3600
    issued = len(small.granted)
    mount(small.folder, "-o", "remount,ro")
    ran = small.run("get", "us")
    assert ran.code == code, ran
    assert ("The token directory cannot be used" in ran.err) == (code == 7)
    assert len(small.granted) == issued
    mount(small.folder, "-o", "remount,rw")
    assert len(served(small)) == 1
    assert list(untidy(small)) == []
    record_property("cases", 1)


@needs_root
@pytest.mark.parametrize("kind", ["folder", "cache", "record", "lock"])
def test_what_an_ordinary_user_may_not_open_is_one_sentence(
    kind: str, make_desk: Callable[[], Desk], record_property: Callable[[str, object], None]
) -> None:
    """Mode 000 on each of the files and on their folder, met by nobody: a token or a sentence, then all is well."""
    with make_desk() as desk:
        desk.folder.mkdir(mode=0o700, parents=True)
        for path in (desk.folder, desk.folder.parent, desk.folder.parent.parent):
            path.chmod(0o755)
        os.chown(desk.folder, NOBODY, NOBODY)
        desk.user = NOBODY
        assert desk.run("get", "us").code == 0
        desk.clock.true += 24.5 * 3600
        names = {"cache": "us_api_token.json", "record": ".jsonl", "lock": ".lock"}
        barred = desk.path(names[kind]) if kind in names else desk.folder
        mode = barred.stat().st_mode
        barred.chmod(0)
        ran = desk.run("get", "us")
        assert ran.code in CLEAR, ran
        assert "Traceback" not in ran.err
        if barred.exists():
            barred.chmod(mode)
        assert served(desk) == {desk.granted[-1]}
        assert list(untidy(desk)) == []
        assert len(desk.granted) <= 3
    record_property("cases", 1)
