"""A cached token for a process that has just started: how long it takes and what memory it needs. Tables in Markdown.

Run `make bench`. The command is the one that pip has installed next to this interpreter; commands built on other
libraries are represented by their top imports. All are run in turn, so that a busy machine slows them equally.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from measuring import gateway, interleaved, quantile, ratio, show

BARE = [sys.executable, "-c", "pass"]
ROUNDS, SIZES = 40, 7
GET = Path(sys.executable).with_name("tokencore")
COMMANDS = {
    "`python -c pass`": BARE,
    "`tokencore get us`": [str(GET), "get", "us"],
    "`python -m tokencore get us`": [sys.executable, "-m", "tokencore", "get", "us"],
    "a script with `import requests`": [sys.executable, "-c", "import requests"],
    "`import botocore.session`, as aws does": [sys.executable, "-c", "import botocore.session"],
    "`import msal`, as az does": [sys.executable, "-c", "import msal"],
    "`import azure.identity`": [sys.executable, "-c", "import azure.identity"],
    "`import google.auth.transport.requests`": [sys.executable, "-c", "import google.auth.transport.requests"],
    "`import pykis`": [sys.executable, "-c", "import pykis"],
    "`import mojito`": [sys.executable, "-c", "import mojito"],
}
SIZE = """
with open("/proc/self/smaps_rollup") as file:
    for line in file:
        if line.startswith(("Rss", "Pss:")): print(line.split()[1])
"""
PROGRAMS = {
    "the bare interpreter": "",
    "tokencore, one `get_valid_token()`": "from tokencore import USTokenManager; USTokenManager().get_valid_token()",
    "msal": "import msal",
    "botocore's tokens": "import botocore.tokens",
    "google-auth": "import google.auth.transport.requests",
    "azure-identity": "import azure.identity",
    "python-kis": "import pykis",
    "mojito2": "import mojito",
}


def times() -> None:
    """Measure the wall time of whole processes."""
    able = {name: command for name, command in COMMANDS.items() if runs(command)}
    taken = interleaved({name: lambda command=command: run(command) for name, command in able.items()}, ROUNDS)  # type: ignore[misc]  # bound at once
    floor = taken["`python -c pass`"]
    rows = [
        [name, f"{1000 * statistics.median(t):.1f} ms", f"{1000 * quantile(t, 0.99):.1f} ms", ratio(t, floor)]
        for name, t in taken.items()
    ]
    show("A whole process that prints a cached token", ["process", "p50", "p99", "against the bare interpreter"], rows)


def memory() -> None:
    """Measure a process's memory: the resident size, and the proportional share, which divides shared pages."""
    if not os.path.exists("/proc/self/smaps_rollup"):
        return
    sizes = {name: [size(program) for _ in range(SIZES)] for name, program in PROGRAMS.items() if runs(with_(program))}
    middles = {name: [statistics.median(kind) for kind in zip(*all_, strict=True)] for name, all_ in sizes.items()}
    bare = middles["the bare interpreter"]
    rows = [
        [name, *(f"{kind / 1024:.1f} MB ({kind / least:.2f} x)" for kind, least in zip(middle, bare, strict=True))]
        for name, middle in middles.items()
    ]
    show("Memory of a process with a cached token", ["process", "resident", "proportional share"], rows)


def with_(program: str) -> list[str]:
    """Return the command that runs a program and prints its size."""
    return [sys.executable, "-c", program + SIZE]


def size(program: str) -> list[int]:
    """Return the resident and the proportional kilobytes at the end of a program."""
    out = subprocess.run(with_(program), capture_output=True, text=True, check=True).stdout
    return [int(line) for line in out.split()]


def runs(command: list[str]) -> bool:
    """Whether the command can be run here: the other libraries may be missing."""
    return (
        shutil.which(command[0]) is not None
        and not subprocess.run(command, capture_output=True, check=False).returncode
    )


def run(command: list[str]) -> None:
    """Run the command to its end and discard its output."""
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


if __name__ == "__main__":
    with gateway():
        run([sys.executable, "-m", "tokencore", "get", "us"])
        times()
        memory()
