"""The commands that tell how all of it is: `metrics` for machines."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from tokencore import exporter

if TYPE_CHECKING:
    from tokencore.commands.shared import AddCommand

LOOPBACK = "127.0.0.1"


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
    where.add_argument("--textfile", metavar="FILE", help="replace the file, for node_exporter's textfile collector")


def _metrics(options: argparse.Namespace) -> int:
    if options.listen:
        exporter.serve(*options.listen)
    elif options.textfile:
        exporter.write_textfile(options.textfile)
    else:
        sys.stdout.write(exporter.text())
    return 0


def _address(text: str) -> tuple[str, int]:
    """`HOST:PORT`, `[HOST]:PORT` for IPv6, or a port alone, which is loopback's."""
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or not int(port) < 65536:  # noqa: PLR2004 - ports end there
        raise argparse.ArgumentTypeError(f"{text!r} is no HOST:PORT, such as 127.0.0.1:9479")
    return host.strip("[]") or LOOPBACK, int(port)
