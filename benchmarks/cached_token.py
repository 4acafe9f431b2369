"""What it takes to get a cached, valid token in one process, alone or while another thread renews it: Markdown tables.

Run `make bench`, or this file in an environment with `benchmarks/requirements.txt`; clients that are not installed
are left out. Every call is timed individually, and its time includes that of reading the clock (the first row).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import threading
import time
from time import perf_counter_ns
from typing import TYPE_CHECKING

from clients import CLIENTS
from measuring import gateway, quantile, show

from tokencore import USTokenManager

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CALLS, ROUNDS = 20_000, 5  # all clients take part in each round, so that a busy machine slows them equally
SLOW = 2.0  # seconds that KIS takes while one thread renews
RENEWALS = 10  # how often another process renews
PACE = 0.001  # seconds between two calls of a bot that also does other things


class Floor:
    """The least that a cache with an expiry has to do."""

    def __init__(self) -> None:
        """Hold a token for an hour."""
        self._token, self._until = "token", time.time() + 3600

    def get(self) -> str:
        """Compare the clock with an attribute and return another."""
        return self._token if time.time() < self._until else ""


def timed(call: Callable[[], object], calls: int) -> list[int]:
    """Return the nanoseconds that each call took."""
    taken = []
    for _ in range(calls):
        began = perf_counter_ns()
        call()
        taken.append(perf_counter_ns() - began)
    return taken


def told(taken: Sequence[float], *shares: float) -> list[str]:
    """Format these quantiles of nanoseconds as microseconds."""
    return [f"{quantile(taken, share) / 1000:.3g} µs" for share in shares]


def alone() -> None:
    """Compare every client's cached token with the floor."""
    calls: dict[str, Callable[[], object]] = {"nothing: the clock alone": lambda: None, "the floor": Floor().get}
    with gateway():
        for name, client in CLIENTS.items():
            try:
                calls[name] = client()
            except ImportError as missing:
                print(f"{name} is left out: {missing}", file=sys.stderr)
                continue
            calls[name]()
        taken: dict[str, list[int]] = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, call in calls.items():
                taken[name] += timed(call, CALLS)
        floor = quantile(taken["the floor"], 0.5)
        rows = [[name, *told(t, 0.5, 0.99), f"{quantile(t, 0.5) / floor:.1f} x"] for name, t in taken.items()]
    show("A cached token in one process", ["client", "p50", "p99", "p50 against the floor"], rows, NOTE)


NOTE = "The floor is an attribute and `time.time()`."


def while_renewing() -> None:
    """Time our calls while another thread waits for KIS."""
    rows = []
    for pace, name in ((0.0, "one after the other"), (PACE, "one each millisecond")):
        for renews in (False, True):
            with gateway(latency=SLOW):
                os.environ["KIS_MAX_ISSUES_PER_DAY"] = "24"
                USTokenManager().get_valid_token()
                taken = beside(renews=renews, pace=pace)
            row = [name, f"renews, KIS takes {SLOW:.0f} s" if renews else "sleeps", f"{len(taken):,}"]
            rows.append(row + told(taken, 0.5, 0.99, 0.999))
    columns = ["calls", "the other thread", "how many", "p50", "p99", "p99.9"]
    show("A cached token while another thread renews", columns, rows, BESIDE)


BESIDE = "Once in 0.9 s a call looks whether another process has renewed; at one call a millisecond that is one in 900."


def beside(*, renews: bool, pace: float) -> list[int]:
    """Return the nanoseconds of each call while another thread renews, or sleeps for as long."""
    ours = USTokenManager()
    ours.get_valid_token()
    work: Callable[[], object] = (lambda: USTokenManager().refresh(force=True)) if renews else lambda: time.sleep(SLOW)
    other = threading.Thread(target=work)
    taken = []
    other.start()
    while other.is_alive():
        taken += timed(ours.get_valid_token, 1)
        if pace:
            time.sleep(pace)
    return taken


def seen() -> None:
    """Measure how long it takes until a process gets the token that another process saved."""
    taken = []
    with gateway(same_token=0):
        os.environ.update(KIS_MAX_ISSUES_PER_DAY="24")
        ours = USTokenManager()
        for _ in range(RENEWALS):
            old = ours.get_valid_token()
            program = (
                "from tokencore import USTokenManager as M; import time; M().refresh(force=True); print(time.time())"
            )
            with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as other:
                while ours.get_valid_token() == old:
                    time.sleep(0.001)
                at = time.time()
                saved = float(other.communicate()[0])
            taken.append(max(0.0, at - saved))
    row = [str(RENEWALS), f"{statistics.median(taken):.2f} s", f"{max(taken):.2f} s"]
    show("Another process's renewal", ["renewals", "seen after, median", "at most"], [row])


if __name__ == "__main__":
    alone()
    while_renewing()
    seen()
