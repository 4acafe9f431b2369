"""The commands that tell how all of it is: `metrics` for machines, `doctor` for people."""

from __future__ import annotations

import argparse
import sys
import textwrap
from typing import TYPE_CHECKING

from tokencore.commands.shared import add_json, print_json

if TYPE_CHECKING:
    from tokencore.commands.shared import AddCommand
    from tokencore.doctor import Finding

LOOPBACK = "127.0.0.1"
WIDTH = 79  # characters of a line for people: readable in the narrowest terminal, and in an e-mail


def add(command: AddCommand) -> None:
    """Add these commands to the parser."""
    metrics = command("metrics", _metrics, "how every market is, for Prometheus; without an option once, as text")
    where = metrics.add_mutually_exclusive_group()
    where.add_argument(
        "--listen",
        type=_address,
        metavar="HOST:PORT",
        help="serve /metrics, /livez and /readyz; loopback for a PORT alone",
    )
    doctor = command(
        "doctor", _doctor, "look at everything that a working set-up needs, with the cure for what is wrong"
    )
    add_json(doctor)
    where.add_argument("--textfile", metavar="FILE", help="replace the file, for node_exporter's textfile collector")


def _metrics(options: argparse.Namespace) -> int:
    from tokencore import exporter  # a server and formats, which no other command should wait for

    if options.listen:
        exporter.serve(*options.listen)
    elif options.textfile is not None:
        exporter.write_textfile(options.textfile)
    else:
        sys.stdout.write(exporter.text())
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from tokencore import doctor  # HTTP, and a dozen checks

    found = doctor.examine()
    if options.json:
        print_json([{key: value for key, value in one._asdict().items() if key != "exit_code"} for one in found])
    else:
        for one in found:
            print(_lines(one))
    return next((one.exit_code for one in found if one.state == "fail"), int(any(one.state == "warn" for one in found)))


def _lines(one: Finding) -> str:
    """One finding for people: its state, name and meaning; the cure on a line of its own."""
    told = [f"{one.state:<7} {one.name}: {one.detail}", *([f"{'':<7} Cure: {one.cure}"] if one.cure else [])]
    return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent=" " * 8, break_on_hyphens=False) for line in told)


def _address(text: str) -> tuple[str, int]:
    """`HOST:PORT`, `[HOST]:PORT` for IPv6, or a port alone, which is loopback's."""
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or not int(port) < 65536:  # noqa: PLR2004 - ports end there
        raise argparse.ArgumentTypeError(f"{text!r} is no HOST:PORT, such as 127.0.0.1:9479")
    return host.strip("[]") or LOOPBACK, int(port)
