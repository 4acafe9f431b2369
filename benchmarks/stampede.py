"""Processes that all want a token at once, with none in the cache: requests, and the time until all have it.

Run `make bench`, or `python benchmarks/stampede.py`; it needs a system that forks. Every process constructs its
client and waits at a barrier. KIS takes 0.3 s. Its limit of one request a minute is on for tokencore and off for the
others: with the limit, one of their processes would be served and the rest refused.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from typing import TYPE_CHECKING

from clients import CLIENTS, tokencore
from measuring import gateway, show

if TYPE_CHECKING:
    from collections.abc import Callable

    from clients import Ask

LATENCY = 0.3  # seconds
FEW, MANY = 32, 256


def main() -> None:
    """Measure all clients with few processes, and tokencore also with many; print the table."""
    rows = [told("tokencore", tokencore, count, issue_interval=60) for count in (FEW, FEW, FEW, MANY, MANY)]
    for name, client in CLIENTS.items():
        if name == "tokencore":
            continue
        try:
            rows.append(told(name, client, FEW, issue_interval=0))
        except ImportError as missing:
            print(f"{name} is left out: {missing}", file=sys.stderr)
    columns = ["client", "processes", "served", "requests", "first", "last", "last beyond KIS's 0.3 s", "CPU of all"]
    show(
        "Processes at a barrier, no token in the cache", columns, rows, f"Load when it ended: {os.getloadavg()[0]:.1f}."
    )


def told(name: str, client: Callable[[], Ask], count: int, *, issue_interval: float) -> list[str]:
    """Return the row for that many processes of this client."""
    with gateway(issue_interval=issue_interval, latency=LATENCY) as kis:
        client()  # imports everything once, before the forks
        ends, cpu = at_a_barrier(client, count)
        row = [name, str(count), str(len(ends)), str(kis.requests)]
    return [*row, f"{ends[0]:.2f} s", f"{ends[-1]:.2f} s", f"+ {ends[-1] - LATENCY:.2f} s", f"{cpu:.2f} s"]


def at_a_barrier(client: Callable[[], Ask], count: int) -> tuple[list[float], float]:
    """Return the seconds from the barrier until each process that was served had its token, and the CPU time of all."""
    ready, go, ended = os.pipe(), os.pipe(), os.pipe()
    children = []
    for _ in range(count):
        child = os.fork()
        if not child:
            one(client, ready[1], go, ended[1])
        children.append(child)
    for _ in children:
        os.read(ready[0], 1)
    os.close(go[0])
    began = time.monotonic()
    os.close(go[1])  # wakes all of them
    statuses = [os.waitpid(child, 0)[1] for child in children]
    os.close(ended[1])
    with open(ended[0]) as file:
        lines = [line.split() for line in file]
    os.close(ready[0])
    os.close(ready[1])
    assert statuses.count(0) == len(lines)
    return sorted(float(end) - began for end, _ in lines), sum(float(cpu) for _, cpu in lines)


def one(client: Callable[[], Ask], ready: int, go: tuple[int, int], ended: int) -> None:
    """Construct the client, wait, get a token, report when, and end the process; this never returns."""
    code = 1
    try:
        os.close(go[1])
        ask = client()
        os.write(ready, b".")
        os.read(go[0], 1)
        before = spent()
        ask()
        os.write(ended, f"{time.monotonic()} {spent() - before}\n".encode())
        code = 0
    finally:
        os._exit(code)


def spent() -> float:
    """Return the CPU seconds that this process has used."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
