"""How long a durable save and `check` of a thousand markets take: Markdown tables.

Run `make bench`, or `python benchmarks/files.py`. A save by hand is: write, fsync, rename, fsync of the folder. The
other clients save with their own code; none of them syncs anything.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from measuring import gateway, interleaved, quantile, ratio, show

from tokencore.config import read_market
from tokencore.stores import open_store
from tokencore.tokens import Token

if TYPE_CHECKING:
    from collections.abc import Callable

SAVES, CHECKS, MARKETS = 300, 5, 1000
CONTENT = {"access_token": "t" * 350, "expires_at": "2026-11-22T17:15:00+09:00", "key_fingerprint": "0" * 16}


def saves() -> None:
    """Save the same token in turn by hand, with tokencore and with the others, on the disk of the working directory."""
    with TemporaryDirectory(dir=os.getcwd()) as home:
        folder = Path(home)
        works = {"by hand": lambda: by_hand(folder / "hand.json"), "tokencore": ours(folder)}
        for name, other in {"botocore's JSONFileCache": botocore, "msal-extensions": msal_extensions}.items():
            try:
                works[name] = other(folder)
            except ImportError as missing:
                print(f"{name} is left out: {missing}", file=sys.stderr)
        taken = interleaved(works, SAVES)
    rows = [
        [name, f"{1e6 * statistics.median(t):.0f} µs", f"{1e6 * quantile(t, 0.99):.0f} µs", ratio(t, taken["by hand"])]
        for name, t in taken.items()
    ]
    show("A token saved", ["client", "p50", "p99", "against by hand"], rows)


def by_hand(path: Path) -> None:
    """Do what a durable save needs, and nothing else."""
    draft = path.with_suffix(".tmp")
    with draft.open("w") as file:
        file.write(json.dumps(CONTENT, indent=2))
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def ours(folder: Path) -> Callable[[], object]:
    """Return tokencore's save, which writes the key's file and one market's view of it."""
    os.environ["KIS_TOKEN_DIR"] = str(folder)
    store = open_store(read_market("us"), lambda: ["us"])
    now = datetime.now(UTC)
    token = Token("t" * 350, now + timedelta(days=1), now)
    return lambda: store.save(token)


def botocore(folder: Path) -> Callable[[], object]:
    """Return the save of botocore's file cache."""
    cache = import_module("botocore.utils").JSONFileCache(str(folder / "botocore"))
    return lambda: cache.__setitem__("key", CONTENT)


def msal_extensions(folder: Path) -> Callable[[], object]:
    """Return the save of msal-extensions: its file with the lock around it, as PersistedTokenCache writes it."""
    extensions = import_module("msal_extensions")
    kept = extensions.FilePersistence(str(folder / "msal.json"))

    def save() -> None:
        with extensions.CrossPlatLock(str(folder / "msal.lock")):
            kept.save(json.dumps(CONTENT))

    return save


def checks() -> None:
    """Time the whole command and its work alone, for a thousand markets with one key and with as many keys."""
    rows = []
    for keys in (1, MARKETS):
        configure(keys)
        seconds = [check() for _ in range(CHECKS)]
        whole, work = (f"{statistics.median(kind):.2f} s" for kind in zip(*seconds, strict=True))
        rows.append([f"{MARKETS:,} markets, {keys:,} key{'s' * (keys > 1)}", whole, work])
    show("`tokencore check --json`", ["settings", "whole process", "in the process, imports done"], rows)


def configure(keys: int) -> None:
    """Write a configuration file with a thousand markets, and save a token for every key."""
    home = Path(os.environ["HOME"], ".tokencore")
    home.mkdir(mode=0o700, exist_ok=True)
    os.environ.pop("KIS_TOKEN_DIR", None)
    now = datetime.now(UTC)
    token = Token("t" * 350, now + timedelta(days=1), now)
    lines = ['app_secret = "s"']  # a settings file may have 64 KiB at most
    for number in range(MARKETS):
        lines += [f"[markets.m{number}]", 'exchanges = ["SEHK"]', f'app_key = "PSkey{number % keys}"']
    (home / "config.toml").write_text("\n".join(lines))
    for number in range(keys):
        open_store(read_market(f"m{number}"), list).save(token)


def check() -> tuple[float, float]:
    """Return the seconds of the whole process, and of the command in a process whose imports are done."""
    program = """
import sys, time
from tokencore.cli import main
import tokencore.commands.tokens, tokencore.keys, tokencore.reports.status
began = time.perf_counter()
main(["check", "--json"])
print(time.perf_counter() - began, file=sys.stderr)
"""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "tokencore", "check", "--json"], stdout=subprocess.DEVNULL, check=False)
    whole = time.perf_counter() - began
    inside = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert len(json.loads(inside.stdout)) == MARKETS + 2
    return whole, float(inside.stderr)


if __name__ == "__main__":
    with gateway():
        saves()
        if sys.argv[1:] != ["saves"]:
            checks()
