"""What the benchmarks share: the sandbox as a process of its own, quantiles, and tables in Markdown."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

sys.path.append(str(Path(__file__).parents[1]))  # an installed package comes first, but a checkout will do

import tokencore
from tokencore.sandbox import APP_KEY, APP_SECRET

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

ROOT = Path(__file__).parents[1]
SERVER = """
import sys
from tokencore.sandbox import Sandbox
interval, latency, same = map(float, sys.argv[1:])
with Sandbox(issue_interval=interval, latency=latency, same_token=same) as gateway:
    print(gateway.url, flush=True)
    while sys.stdin.readline():
        print(gateway.stats()["token_requests"], flush=True)
"""


class Gateway:
    """The sandbox in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        """Talk to the process through its standard input and output."""
        self._process = process

    @property
    def requests(self) -> int:
        """The number of requests that have reached tokenP so far."""
        return int(self._said("\n"))

    def _said(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line)
        self._process.stdin.flush()
        return self._process.stdout.readline()


@contextmanager
def gateway(*, issue_interval: float = 0, latency: float = 0, same_token: float = 21_600) -> Iterator[Gateway]:
    """Run a gateway with these rules in seconds, with a fresh home, working directory and settings that point to it."""
    command = [sys.executable, "-c", SERVER, str(issue_interval), str(latency), str(same_token)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("KIS_", "SLACK_"))}
    if ROOT in Path(tokencore.__file__).parents:
        environment["PYTHONPATH"] = str(ROOT)
    with (
        TemporaryDirectory() as home,
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        os.environ.clear()
        os.environ.update(environment, HOME=home, KIS_BASE_URL=process.stdout.readline().strip())
        os.environ.update(KIS_APP_KEY=APP_KEY, KIS_APP_SECRET=APP_SECRET, KIS_ISSUE_INTERVAL=str(issue_interval))
        os.chdir(home)
        yield Gateway(process)
        process.stdin.close()
        os.chdir(ROOT)


def quantile(samples: Sequence[float], share: float) -> float:
    """Return the sample below which that share of the samples lies."""
    return sorted(samples)[min(len(samples) - 1, int(len(samples) * share))]


def interleaved(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Run all works in every round, so that a busy machine slows them equally; return the seconds of each run."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if turn:  # the first round warms up
                taken[name].append(time.perf_counter() - began)
    return taken


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: str = "") -> None:
    """Print a table in Markdown under its title."""
    print(f"\n## {title}\n")
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    if notes:
        print(f"\n{notes}")
    sys.stdout.flush()


def ratio(samples: Sequence[float], floor: Sequence[float]) -> str:
    """Format how many times the floor the samples take, by their medians."""
    return f"{statistics.median(samples) / statistics.median(floor):.2f} x"
