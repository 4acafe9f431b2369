"""A fleet on PostgreSQL: requests and times of a cold start, a renewal, a thousand keys, and a store that is down.

Run `make bench`, or `python benchmarks/fleet.py` with the packages of the tests; it needs the PostgreSQL server's
programs, as in Debian's package postgresql. The server, the machines and the sandbox share this machine's processors,
so counts are exact but times are upper bounds. A machine is simulated by a token directory of its own.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from measuring import ROOT, quantile, show

sys.path.append(str(ROOT / "tests"))

from builders import KEY, SECRET, make_market, make_token
from fleets import Fleet, Machine
from postgres import PROGRAMS, Postgres

from tokencore import TokenManager
from tokencore.attempts import Attempt, Outcome
from tokencore.renewer import Renewer
from tokencore.sandbox import Sandbox
from tokencore.stores.file_store import FileStore
from tokencore.stores.fleet import Fleet as Reached
from tokencore.stores.shared_store import SharedStore

if TYPE_CHECKING:
    from collections.abc import Callable

LATENCY, MACHINES, PROCESSES, KEYS, RENEWALS = 0.5, 8, 8, 1000, 50
PATIENT = 60.0  # seconds to wait for what should take about one
Row = tuple[str, str, str]


def main() -> None:
    """Measure one thing after the other, each on an empty store, and print the table."""
    if PROGRAMS is None:
        print("The fleet is left out: no PostgreSQL server in /usr/lib/postgresql.", file=sys.stderr)
        return
    rows: list[Row] = []
    with Postgres() as server:
        for work in (cold_start, cached, statements, renewals, thousand, away):
            with TemporaryDirectory() as folder:
                rows += work(Fleet.made(server), Path(folder))
    show("A fleet", ["what", "is to be", "is"], rows, f"Load when it ended: {os.getloadavg()[0]:.1f}.")


def cold_start(fleet: Fleet, folder: Path) -> list[Row]:
    """Start processes at a barrier, on machines with empty token directories; their imports are done before."""
    with Sandbox(issue_interval=60, latency=LATENCY) as kis:
        machines = [Machine(fleet, folder / str(n), kis, issue_interval=60, timeout=10) for n in range(MACHINES)]
        go, ends = os.pipe(), os.pipe()
        children = []
        for number in range(MACHINES * PROCESSES):
            child = os.fork()
            if not child:
                wait_and_get(machines[number % MACHINES], go, ends[1])
            children.append(child)
        time.sleep(1)
        began = time.monotonic()
        os.close(go[0])
        os.close(go[1])
        assert {os.waitpid(child, 0)[1] for child in children} == {0}
        last = max(float(line) for line in os.read(ends[0], 65536).decode().split()) - began
        count = kis.stats()["token_requests"]
    what = f"cold start of {MACHINES} machines with {PROCESSES} processes each: requests"
    late = f"{LATENCY} s of KIS + 1.5 s"
    return [(what, "1", str(count)), ("until the last is served", late, f"{LATENCY} s + {last - LATENCY:.2f} s")]


def wait_and_get(machine: Machine, go: tuple[int, int], ended: int) -> None:
    """Wait at the barrier, get a token, write the time, and end the process; this never returns."""
    code = 1
    try:
        os.close(go[1])
        os.read(go[0], 1)
        machine.get()
        os.write(ended, f"{time.monotonic()}\n".encode())
        for thread in threading.enumerate():
            if not thread.daemon and thread is not threading.current_thread():
                thread.join()
        code = 0
    finally:
        os._exit(code)


def cached(fleet: Fleet, folder: Path) -> list[Row]:
    """Time a cached token on a single machine, and on one of a fleet while the store is up, frozen and down."""
    with Sandbox() as kis:
        os.environ.update(KIS_APP_KEY=KEY, KIS_APP_SECRET=SECRET, KIS_BASE_URL=kis.url)
        alone = timed({"KIS_TOKEN_DIR": str(folder / "alone")})
        found = {"up": timed(fleet.environment(folder / "fleet"))}
        fleet.server.send(signal.SIGSTOP)
        found["frozen"] = timed(fleet.environment(folder / "fleet"), saved=True)
        fleet.server.send(signal.SIGCONT)
        fleet.server.stop()
        found["down"] = timed(fleet.environment(folder / "fleet"), saved=True)
        fleet.server.start()
    told = ", ".join(f"{seconds * 1e6:.2f} µs ({state})" for state, seconds in found.items())
    return [("a cached token, median", f"{alone * 1e6:.2f} µs, as on one machine", told)]


def timed(settings: dict[str, str], *, saved: bool = False) -> float:
    """Return the median seconds of a cached `get_valid_token`, the best of five series."""
    os.environ.update(settings)
    manager = TokenManager("us")
    if not saved:
        manager.save_token(make_token())
    for name in settings:
        del os.environ[name]
    manager.get_valid_token()
    return min(statistics.median(one(manager.get_valid_token) for _ in range(2000)) for _ in range(5))


def one(work: Callable[[], object]) -> float:
    """Return the seconds of one call, as the mean of ten."""
    began = time.perf_counter()
    for _ in range(10):
        work()
    return (time.perf_counter() - began) / 10


def statements(fleet: Fleet, folder: Path) -> list[Row]:
    """Time the store's own operations on an open connection."""
    with Sandbox() as kis:
        machine = Machine(fleet, folder / "one", kis)
    taken: dict[str, list[float]] = {"read": [], "begin": [], "depart": [], "finish": []}
    attempt = Attempt(datetime.now(UTC), Outcome.ISSUED)
    with Reached.of(machine.market.settings).connect() as session:
        session.put("key", 0, "x" * 900)
        for _ in range(200):
            marks = [time.perf_counter()]
            state = session.read(["key"])["key"]
            marks.append(time.perf_counter())
            fence = session.begin("key", state.version, attempt, state.ahead) or 0
            marks.append(time.perf_counter())
            assert session.depart("key", fence)
            marks.append(time.perf_counter())
            session.finish("key", fence, attempt, state.ahead)
            marks.append(time.perf_counter())
            for seconds, (before, after) in zip(taken.values(), pairwise(marks), strict=True):
                seconds.append(after - before)
    bounds = {"read": "2 ms"}
    return [
        (f"{name}, median", bounds.get(name, ""), f"{statistics.median(seconds) * 1000:.2f} ms")
        for name, seconds in taken.items()
    ]


def renewals(fleet: Fleet, folder: Path) -> list[Row]:
    """Measure how long it takes until a program on another machine gets the token that the first one has renewed."""
    with Sandbox() as kis, ExitStack() as running:
        first, second = (Machine(fleet, folder / name, kis) for name in ("first", "second"))
        settings = {"KIS_APP_KEY": KEY, "KIS_APP_SECRET": SECRET, "KIS_BASE_URL": kis.url}
        environment = {**os.environ, **settings, **fleet.environment(second.folder), "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen([sys.executable, "-m", "tokencore", "follow"], env=environment)
        running.callback(process.wait)
        running.callback(process.terminate)
        files = FileStore(second.market, tuple)
        os.environ.update(settings, KIS_TOKEN_DIR=str(second.folder))
        taken, life = [], 80_000
        renew(first, life)
        wait(lambda: files.read()[0] is not None)
        manager = TokenManager("us")
        for turn in range(RENEWALS):
            manager.get_valid_token()
            time.sleep(0.37 * (turn % 3))  # vary the point in the second for which a token is kept in memory
            text, began = renew(first, life + turn + 1), time.monotonic()
            wait(lambda text=text: manager.get_valid_token() == text)  # type: ignore[misc]
            taken.append(time.monotonic() - began)
        del os.environ["KIS_TOKEN_DIR"]
    shown = f"{quantile(taken, 0.5):.2f} s, {max(taken):.2f} s"
    return [(f"a renewal is seen on another machine, median and worst of {RENEWALS}", "1 s at most", shown)]


def renew(machine: Machine, life: float) -> str:
    """Save a new token on `machine`, for the whole fleet."""
    return machine.save(make_token(life=life))


def wait(happened: Callable[[], bool]) -> None:
    """Wait until `happened` returns true, for `PATIENT` seconds at most."""
    end = time.monotonic() + PATIENT
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.002)


def thousand(fleet: Fleet, folder: Path) -> list[Row]:
    """Let `KEYS` keys become due in the same minute on two machines at once; then time `check` of them all."""
    names = [f"m{number:04}" for number in range(KEYS)]
    with Sandbox(issue_interval=60) as kis:
        machines = [folder / "first", folder / "second"]
        for place in machines:
            place.mkdir(mode=0o700)
        began = time.monotonic()
        with ThreadPoolExecutor(16) as pool:
            list(
                pool.map(
                    lambda work: first_token(fleet, kis, *work), [(one, place) for one in names for place in machines]
                )
            )
        took, stats = time.monotonic() - began, kis.stats()
        environment = {name: text for name, text in os.environ.items() if not name.startswith("KIS_")}
        environment |= {f"KIS_MARKETS__{one.upper()}__APP_KEY": f"{one}{KEY}"[:36] for one in names}
        environment |= {"KIS_APP_SECRET": SECRET, "KIS_BASE_URL": kis.url, "PYTHONPATH": str(ROOT)}
        environment |= fleet.environment(folder / "third")
        command = [sys.executable, "-m", "tokencore", "check", "--json"]
        checks = []
        for _ in range(3):
            started = time.monotonic()
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            checks.append(time.monotonic() - started)
        valid = [found["valid"] for found in json.loads(done.stdout)]
        assert valid.count(True) == KEYS, (valid.count(True), done.stderr)
    what = f"{KEYS} keys due in one minute on two machines: requests, of them new, refused"
    counts = f"{stats['token_requests']}, {stats['granted_new']}, {sum(stats['refused'].values())} in {took:.0f} s"
    return [
        (what, f"{KEYS}, {KEYS}, 0", counts),
        (f"`check` of {KEYS} keys on a machine without files, whole process", "0.6 s", f"{min(checks):.2f} s"),
    ]


def first_token(fleet: Fleet, kis: Sandbox, name: str, place: Path) -> None:
    """Get the first token of the key of market `name` on the machine with the folder `place`."""
    numbers = {"issue_interval": 60.0, "timeout": 10.0, **fleet.numbers(place)}
    market = make_market(name, **numbers).given(lambda: (f"{name}{KEY}"[:36], SECRET), kis.url)
    store = SharedStore(market, lambda: [name])
    Renewer(market, store, lambda: [market]).obtain(lambda token: token.serves(datetime.now(UTC), 0), "bench")
    store.attempts()  # waits until the outcome is in the store


def away(fleet: Fleet, folder: Path) -> list[Row]:
    """Measure how long a command without a token takes to say that the store does not answer; report its exit code."""
    with Sandbox() as kis:
        environment = {**os.environ, "KIS_APP_KEY": KEY, "KIS_APP_SECRET": SECRET, "KIS_BASE_URL": kis.url}
        environment |= {**fleet.environment(folder / "cold"), "PYTHONPATH": str(ROOT)}
        fleet.server.send(signal.SIGSTOP)
        began = time.monotonic()
        command = [sys.executable, "-m", "tokencore", "get", "us"]
        code = subprocess.run(command, env=environment, capture_output=True, check=False).returncode
        took = time.monotonic() - began
        fleet.server.send(signal.SIGCONT)
    return [("store frozen, no token: exit code", "7 within 10 s", f"{code} after {took:.1f} s")]


if __name__ == "__main__":
    main()
