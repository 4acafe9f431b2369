"""The systemd units: that systemd takes them, and that every command in them is there."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tokencore.commands import parsers

ROOT = Path(__file__).resolve().parent.parent
UNITS = sorted((ROOT / "docs" / "systemd").iterdir())
COMMAND = re.compile(r"-?%h/tokencore/\.venv/bin/python -m (\S+) (\S+)")


def commands(unit: Path) -> list[str]:
    """What the unit starts; systemd's files have keys more than once, which Python's parser does not."""
    return re.findall(r"^ExecStart=(.+)$", unit.read_text(), re.MULTILINE)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze (Debian's package systemd)")
def test_systemd_takes_them(tmp_path: Path) -> None:
    """`systemd-analyze verify` finds nothing, where the folder is as the units say."""
    home = tmp_path / "home"
    program = home / "tokencore" / ".venv" / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.symlink_to(sys.executable)
    place = {"HOME": str(home), "XDG_RUNTIME_DIR": str(tmp_path), "PATH": os.environ["PATH"]}
    verify = ["systemd-analyze", "verify", "--user", "--man=no", *map(str, UNITS)]
    done = subprocess.run(verify, env=place, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_every_command_is_there(unit: Path) -> None:
    """A module of ours with that command; the settings' file is optional; a timer has its service."""
    read = configparser.ConfigParser(strict=False, interpolation=None)
    read.read_string(unit.read_text())
    for line in commands(unit):
        match = COMMAND.fullmatch(line)
        assert match, line
        module, command = match.groups()
        known = {"tokencore": parsers()[0].format_help(), "flows.stack": stack_help()}[module]
        assert re.search(rf"\b{command}\b", known)
    if unit.suffix == ".timer":
        assert unit.with_suffix(".service") in UNITS
    else:
        assert commands(unit)
        assert read["Service"]["EnvironmentFile"].startswith("-")
        assert read["Service"]["LimitCORE"] == "0"  # it would hold secrets


def stack_help() -> str:
    """What `python -m flows.stack --help` prints."""
    command = [sys.executable, "-m", "flows.stack", "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
