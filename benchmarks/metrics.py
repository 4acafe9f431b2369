"""What a scrape of `tokencore metrics` costs with 100 markets: a Markdown table.

Run `python benchmarks/metrics.py`. The exporter runs as a process of its own, `tokencore metrics --listen`, and is
scraped over HTTP on loopback. Every key has a token and the issuance record of a year. Three kinds of scrapes are
timed: the first one, plain ones (nothing has changed since the last), and those after every key has renewed, as in
the minute of the anchor.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1]))  # lets the benchmark run from a checkout that is not installed

from tokencore import tokens
from tokencore.attempts import Attempt, Outcome, render
from tokencore.calendars.exchanges import EXCHANGES
from tokencore.config.market import fingerprint
from tokencore.stores import files
from tokencore.tokens import Token

if TYPE_CHECKING:
    from collections.abc import Callable

MARKETS, SCRAPES, RARE = 100, 500, 10
RECORDED = 365  # attempts: a year of daily issues
LIMIT = 0.050  # seconds a scrape may take
URL = "https://kis.invalid"


def settings(home: Path, keys: int) -> dict[str, str]:
    """Return the environment of an exporter with 100 markets that share `keys` keys; their exchanges differ."""
    codes = list(EXCHANGES)
    found = {name: value for name, value in os.environ.items() if not name.startswith(("KIS_", "SLACK_"))}
    found |= {"HOME": str(home), "PYTHONPATH": sys.path[0], "KIS_BASE_URL": URL, "KIS_TOKEN_DIR": str(home / "tokens")}
    for n in range(MARKETS):
        market = f"KIS_MARKETS__M{n:02d}"
        found[f"{market}__EXCHANGES"] = ",".join({codes[n % len(codes)], codes[n // 11 % len(codes)]})
        found[f"{market}__APP_KEY"] = key(n, keys)
        found[f"{market}__APP_SECRET"] = "s" * 180
    return found


def key(market: int, keys: int) -> str:
    """Return the app key of a market."""
    return f"PS{market % keys:034d}"


def renew(folder: Path, keys: int, *, history: int = 0) -> None:
    """Give every key a new token, and a record of `history` older attempts and the one that brought it."""
    now = datetime.now(UTC)
    for n in range(keys):
        name = fingerprint(key(n, keys), URL)
        token = Token(f"token-{now.timestamp()}", now + timedelta(hours=24), now)
        content = tokens.to_cache(token, now=now, environment="real", key_fingerprint=name)
        files.write_bytes(str(folder / f"key-{name}.json"), content.encode())
        attempts = [Attempt(now - timedelta(days=9), Outcome.ISSUED, expires_at=now)] * history
        attempts.append(Attempt(now, Outcome.ISSUED, expires_at=now))
        files.write_bytes(str(folder / f"key-{name}.jsonl"), render(attempts).encode())


def scrape(address: str) -> float:
    """Return the seconds of one scrape, including the connection."""
    began = time.perf_counter()
    connection = HTTPConnection(address, timeout=10)
    connection.request("GET", "/metrics")
    body = connection.getresponse().read()
    connection.close()
    took = time.perf_counter() - began
    assert body.count(b"\nkis_token_valid{") == MARKETS
    assert body.count(b"kis_token_renewal_timestamp_seconds{") == MARKETS
    return took


def measured(keys: int) -> dict[str, list[float]]:
    """Run the scrapes and return their seconds by kind."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "tokens"
        folder.mkdir(0o700)
        renew(folder, keys, history=RECORDED)
        command = [sys.executable, "-m", "tokencore", "metrics", "--listen", "0"]
        with subprocess.Popen(command, env=settings(Path(made), keys), stdout=subprocess.PIPE, text=True) as exporter:
            assert exporter.stdout is not None
            try:
                address = exporter.stdout.readline().partition("/metrics")[0].removeprefix("http://")
                return {
                    "first": [scrape(address)],
                    "plain": after(address, lambda: None, SCRAPES),
                    "all keys renewed": after(address, lambda: renew(folder, keys), RARE),
                }
            finally:
                exporter.terminate()


def after(address: str, happens: Callable[[], None], times: int) -> list[float]:
    """Return the seconds of that many scrapes; `happens` is called before each."""
    found = []
    for _ in range(times):
        happens()
        found.append(scrape(address))
    return found


def main() -> int:
    """Print the table; return 1 if plain scrapes exceed the limit at the 99th percentile."""
    worst = 0.0
    print("| 100 markets of | scrapes | median ms | p99 ms |\n|---|---|---|---|")
    for keys in (MARKETS, 1):
        for kind, took in measured(keys).items():
            high = sorted(took)[min(len(took) - 1, round(len(took) * 0.99))]
            worst = max(worst, high if kind == "plain" else 0)
            print(f"| {keys} keys | {kind} ({len(took)}) | {statistics.median(took) * 1e3:.1f} | {high * 1e3:.1f} |")
    return worst > LIMIT


if __name__ == "__main__":
    sys.exit(main())
