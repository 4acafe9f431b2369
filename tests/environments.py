"""The other clients, each in a virtual environment of its own beside the one that runs the tests.

They are built once, from exact pins, and found again until the pins change: installing them takes longer than all
their tests.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from filelock import FileLock

PINS = Path(__file__).with_name("clients")


def interpreter_with(client: str) -> Path:
    """The Python of an environment with `client` as pinned in `clients/<client>.txt`; built if need be.

    Raises:
        CalledProcessError: the packages cannot be had; its `stderr` says why.

    """
    pins = PINS / f"{client}.txt"
    version = hashlib.sha256(pins.read_bytes()).hexdigest()[:12]
    home = Path(sys.prefix, "clients", f"{client}-{version}")
    python, complete = home / "bin" / "python", home / "complete"
    home.parent.mkdir(exist_ok=True)
    with FileLock(home.with_suffix(".lock")):
        if not complete.exists():
            shutil.rmtree(home, ignore_errors=True)
            venv.create(home, symlinks=True)
            _install(python, pins)
            complete.touch()
    return python


def _install(python: Path, pins: Path) -> None:
    """By this environment's pip, so that a second one need not be installed first."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    subprocess.run([*command, "--requirement", str(pins)], check=True, capture_output=True, text=True)
