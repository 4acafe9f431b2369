"""The commands that report on the markets and the set-up: `check`, `doctor`, and `metrics` for Prometheus."""

from __future__ import annotations

import argparse
import sys
import textwrap
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tokencore.commands import FOR_PROGRAMS, print_json, until_stopped
from tokencore.config.settings import Settings
from tokencore.keys import Key
from tokencore.reports.status import look

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tokencore.commands import AddCommand
    from tokencore.keys import KeyState
    from tokencore.kis.gateway import Evidence
    from tokencore.reports.doctor import Finding
    from tokencore.reports.status import Seen

NOT_VALID, UNREACHABLE = 3, 6
LOOPBACK = "127.0.0.1"
WIDTH = 79  # characters of a line for people: readable in the narrowest terminal, and in an e-mail


def add(command: AddCommand) -> None:
    """Add these commands to the parser."""
    probe = "prove each valid token with one quote call; exit code 6 where KIS does not say"
    what = "status of the markets; read-only, asks KIS for nothing without --probe"
    command("check", _check, what, market="*", flags={"--probe": probe, "--json": FOR_PROGRAMS})
    what = "look at everything that a working set-up needs, with the fix for what is wrong; 0 only when all is well"
    command("doctor", _doctor, what, flags={"--json": FOR_PROGRAMS})
    metrics = command("metrics", _metrics, "status of every market for Prometheus; printed once without an option")
    where = metrics.add_mutually_exclusive_group()
    where.add_argument(
        "--listen",
        type=address,
        metavar="HOST:PORT",
        help="serve /metrics, /livez, /readyz and /readyz/MARKET; loopback for a PORT alone",
    )
    where.add_argument("--textfile", metavar="FILE", help="replace the file, for node_exporter's textfile collector")


def _check(options: argparse.Namespace) -> int:
    settings, now = Settings.load(), datetime.now(UTC)
    asked = list(dict.fromkeys(map(settings.market, options.market))) or settings.able_markets()
    states = [key.state(now) for key in Key.load(settings, asked)]
    found = {market.name: look(state, market) for state in states for market in state.key.markets}
    seen = [found[market.name] for market in asked]
    proofs = _proofs(states) if options.probe else {}
    if options.json:
        print_json([dict(one.status) | _extras(one, proofs) for one in seen])
    else:
        from tokencore.reports.tables import print_statuses  # imported only for people: programs need not wait for it

        print_statuses(seen, proofs, now)
    accepted = {proof.accepted for proof in proofs.values()}
    if False in accepted or not all(one.status["valid"] for one in seen):
        return NOT_VALID
    return UNREACHABLE if None in accepted else 0


def _proofs(states: list[KeyState]) -> dict[str, Evidence]:
    """Prove the valid token of each key by one quote call, and return the results by market."""
    proven = [(state.key, state.key.prove(state.token)) for state in states if state.token and state.serves_until]
    return {market.name: proof for key, proof in proven for market in key.markets}


def _extras(one: Seen, proofs: Mapping[str, Evidence]) -> dict[str, object]:
    """Return the optional fields: the result of `--probe`, and the expiry of an approval key that is stored."""
    found: dict[str, object] = {}
    if expires_at := one.state.approval_expires_at:
        found["approval_key_expires_at"] = expires_at
    if proof := proofs.get(one.status["market"]):
        found["probe"] = {"accepted": proof.accepted, "told": proof.detail}  # programs know these names
    return found


def _doctor(options: argparse.Namespace) -> int:
    from tokencore.reports.doctor import examine  # imports HTTP and a dozen checks

    found = examine()
    if options.json:
        print_json([{key: value for key, value in one._asdict().items() if key != "exit_code"} for one in found])
    else:
        print(_worst_first(found))
        for one in found:
            print(_lines(one))
    return next((one.exit_code for one in found if one.state == "fail"), int(any(one.state == "warn" for one in found)))


def _worst_first(found: list[Finding]) -> str:
    """Name what is wrong, for readers with a small screen: the findings that follow are in the order of their fixes."""
    named = {state: dict.fromkeys(one.name for one in found if one.state == state) for state in ("fail", "warn")}
    wrong = "; ".join(f"{state}: {', '.join(names)}" for state, names in named.items() if names)
    return textwrap.fill(wrong or "All is well.", WIDTH, break_on_hyphens=False)


def _lines(one: Finding) -> str:
    """Format one finding for people: its state, name and detail, and the fix on a line of its own."""
    lines = [f"{one.state:<7} {one.name}: {one.detail}", *([f"{'':<7} Fix: {one.cure}"] if one.cure else [])]
    return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent=" " * 8, break_on_hyphens=False) for line in lines)


def _metrics(options: argparse.Namespace) -> int:
    from tokencore.reports import metrics  # imports a server, which no other command should wait for

    watch = metrics.Watch()
    if options.listen:
        with metrics.listening(watch, *options.listen) as url, until_stopped():
            print(f"{url}/metrics, /livez and /readyz; Ctrl-C ends it.", flush=True)
            threading.Event().wait()
    elif options.textfile is not None:
        metrics.write_textfile(watch, options.textfile)
    else:
        from prometheus_client import generate_latest

        sys.stdout.write(generate_latest(watch).decode())
    return 0


def address(text: str) -> tuple[str, int]:
    """Parse `HOST:PORT`, `[HOST]:PORT` for IPv6, or a port alone, which means loopback.

    Raises:
        ArgumentTypeError: it is none of these; argparse then names the option.
    """
    host, _, port = text.rpartition(":")
    if not port.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a HOST:PORT, such as 127.0.0.1:9479")
    return host.strip("[]") or LOOPBACK, int(port)
