"""A running stack on folders and ports of its own, for tests: start it, ask it, and find its processes in /proc."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import uuid
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import pytest
import requests
from requests.adapters import HTTPAdapter

from flows.stack import supervisor
from flows.stack.api import BUSY
from tokencore import sessions
from tokencore.sandbox import APP_KEY, APP_SECRET

ROOT = Path(__file__).resolve().parent.parent
KEYS = {"KIS_APP_KEY": APP_KEY, "KIS_APP_SECRET": APP_SECRET}
MARK = "PYTHON_TEST_MARK"  # in the environment of every process that a test starts, directly or not
SLOW = 90  # seconds to allow for what takes a few on two idle cores
in_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")


class Place(NamedTuple):
    """The folders of one machine, and the environment that makes programs use them."""

    home: Path
    work: Path
    temporary: Path
    environment: dict[str, str]

    @classmethod
    def made(cls, folder: Path, **settings: str) -> Place:
        """Make the folders below `folder`, and choose a port; `settings` are further environment variables."""
        known = {k: v for k, v in os.environ.items() if not k.startswith(("KIS_", "SLACK_", "PREFECT_"))}
        place = cls(folder / "home", folder / "work", folder / "tmp", known)
        for one in place[:3]:
            one.mkdir(parents=True)
        known |= {"HOME": str(place.home), "TMPDIR": str(place.temporary), "PYTHONPATH": str(ROOT)}
        known |= {MARK: uuid.uuid4().hex, "PREFECT_SERVER_API_PORT": str(free_port()), **settings}
        known.setdefault("PREFECT_WORKER_QUERY_SECONDS", "1")
        return place

    def dotenv(self, **settings: str) -> None:
        """Write these settings to the `.env` of the working directory."""
        (self.work / ".env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))

    def with_tables(self, database: Path, folder: str = "home/.tokencore") -> Path:
        """Give the stack of that token directory a copy of Prefect's database; return the stack's folder."""
        stack = self.home.parent / folder / "prefect"
        for path in (stack.parent, stack):
            path.mkdir(0o700)
        Path(shutil.copy(database, stack)).chmod(0o600)
        return stack

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start `python -m flows.stack` with its output and errors in one pipe."""
        command = [sys.executable, "-m", "flows.stack", *arguments]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=self.environment, cwd=self.work, **pipes)

    def run(self, *arguments: str) -> tuple[int, str]:
        """Run `python -m flows.stack` to its end, and return exit code and output."""
        started = self.start(*arguments)
        output = started.communicate(timeout=3 * SLOW)[0]
        return started.returncode, output

    def up(self) -> Up:
        """Start the stack in the background, with the password that it generates for itself."""
        code, output = self.run("up")
        assert code == 0, output
        lines = (self.work / ".env").read_text().splitlines()
        folder = Path(dict(line.split("=", 1) for line in lines)["KIS_TOKEN_DIR"]) / "prefect"
        url = f"http://127.0.0.1:{self.environment['PREFECT_SERVER_API_PORT']}"
        return Up(self, output, folder, url, (folder / "password").read_text().strip())

    def living(self) -> dict[int, str]:
        """Return the command lines of all processes that were started from here, by process id."""
        mark = f"{MARK}={self.environment[MARK]}"
        numbers = [int(process.name) for process in Path("/proc").glob("[0-9]*")]
        mine = [number for number in numbers if mark in environment_of(number)]
        return {one: Path(f"/proc/{one}/cmdline").read_bytes().replace(b"\0", b" ").decode() for one in mine}


class Up(NamedTuple):
    """A stack in the background: its place, what `up` printed, its folder, its server's address and password."""

    place: Place
    output: str
    folder: Path
    url: str
    password: str

    def processes(self) -> dict[str, int]:
        """Return the process ids of its running parts, by name."""
        return supervisor.running(self.folder)

    def control(self, *command: str) -> str:
        """Run a supervisorctl command and return its output."""
        program = [sys.executable, "-m", "supervisor.supervisorctl", "-c", str(self.folder / "supervisord.conf")]
        return subprocess.run([*program, *command], capture_output=True, text=True, check=True).stdout.strip()

    def api(self, method: str, path: str, content: object = None, **headers: str) -> requests.Response:
        """Send a request to Prefect's API with the password, and return the answer."""
        with requests.Session() as session:
            session.mount("http://", HTTPAdapter(max_retries=BUSY))
            session.auth = tuple(self.password.split(":", 1))  # type: ignore[assignment] # user and password
            session.headers.update({"Connection": "close", **headers})  # the server hangs up after a 503
            return session.request(method, f"{self.url}/api/{path}", json=content, timeout=60)

    def create(self, deployment: str, **content: object) -> str:
        """Create a run of the deployment and return its id."""
        found = self.api("GET", f"deployments/name/{deployment}").json()["id"]
        return str(self.api("POST", f"deployments/{found}/create_flow_run", content).json()["id"])

    def look(self, run: str) -> dict[str, Any]:
        """Return the run as the server shows it."""
        found: dict[str, Any] = self.api("GET", f"flow_runs/{run}").json()
        return found

    def state(self, run: str) -> tuple[str, str]:
        """Return the type and name of the run's state."""
        state = self.look(run)["state"]
        return state["type"], state["name"]


def environment_of(process: int) -> set[str]:
    """Return a process's environment as `NAME=value`; empty if it has ended or is another user's."""
    try:
        return {one.decode(errors="replace") for one in Path(f"/proc/{process}/environ").read_bytes().split(b"\0")}
    except OSError:
        return set()


def always_open(*exchanges: str) -> dict[str, str]:
    """Return settings that give these exchanges a session that runs now and ends within the hour, on any day."""
    found = {}
    for code in exchanges:
        now = datetime.now(ZoneInfo(sessions.exchange(code).zone))
        closes = min(now + timedelta(hours=1), now.replace(hour=23, minute=59))
        found[f"KIS_EXCHANGES__{code}__HOURS__{now.date()}"] = f"00:00-{closes:%H:%M}"
    return found


def free_port() -> int:
    """Return a free port on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
