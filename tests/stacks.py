"""The running system on folders and ports of its own, for tests: started, asked, and looked for in /proc."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import requests
from requests.adapters import HTTPAdapter
from slack_endpoint import SlackEndpoint

from flows.stack.api import BUSY
from flows.stack.crew import told
from tokencore.sandbox import APP_KEY, APP_SECRET, Sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
MARK = "TOKENCORE_TEST_MARK"  # in the environment of all that a test starts, at whatever remove
SLOW = 480  # seconds; half a minute on two idle cores
PASSWORD = "admin:CanaryPassword"  # of the server that the tests share
WEBHOOK = "CanaryWebhook"  # in the address of the Slack that a stack tells
in_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
# A worker that shows every 3 s that it lives is missed after 6.
QUICK_WORKER = {
    "PREFECT_WORKER_HEARTBEAT_SECONDS": "3",
    "PREFECT_SERVER_SERVICES_FOREMAN_LOOP_SECONDS": "2",
    "PREFECT_SERVER_SERVICES_FOREMAN_INACTIVITY_HEARTBEAT_MULTIPLE": "2",
}


class Place(NamedTuple):
    """A machine's worth of folders for one system, and the environment that leads there."""

    home: Path
    work: Path
    temporary: Path
    environment: dict[str, str]

    @classmethod
    def made(cls, folder: Path, **settings: str) -> Place:
        """Folders below `folder`, with more environment variables."""
        place = cls(folder / "stack" / "home", folder / "stack" / "work", folder / "stack" / "tmp", {})
        for one in place[:3]:
            one.mkdir(parents=True)
        known = {
            name: value for name, value in os.environ.items() if not name.startswith(("KIS_", "SLACK_", "PREFECT_"))
        }
        own = {"HOME": str(place.home), "TMPDIR": str(place.temporary), "PYTHONPATH": str(ROOT), MARK: uuid.uuid4().hex}
        place.environment.update(known, **own, **settings)
        return place

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start `python -m flows.stack`, its output and errors in one pipe."""
        command = [sys.executable, "-m", "flows.stack", *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, env=self.environment, cwd=self.work, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )

    def run(self, *arguments: str) -> tuple[int, str]:
        """Run it to its end; exit code and output."""
        started = self.start(*arguments)
        output = started.communicate(timeout=SLOW)[0]
        return started.returncode, output

    def living(self) -> list[str]:
        """The command lines of all processes that come from here."""
        mark = f"{MARK}={self.environment[MARK]}".encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue  # it has ended, or is another user's
        return found


def free_port() -> int:
    """A port of loopback that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Up(NamedTuple):
    """A stack in the background: where, what `up` printed, and its folder."""

    place: Place
    output: str
    folder: Path
    slack: SlackEndpoint
    gateway: Sandbox
    auth: tuple[str, str] | None = None

    @property
    def url(self) -> str:
        """The address of its page."""
        address: str = told(self.folder)["url"]
        return address

    def processes(self) -> dict[str, int]:
        """Its processes that live, by name."""
        found: dict[str, int] = told(self.folder).get("processes", {})
        return found

    def api(self, method: str, path: str, content: object = None) -> requests.Response:
        """What the server answers."""
        with requests.Session() as session:
            session.mount("http://", HTTPAdapter(max_retries=BUSY))
            session.auth = self.auth
            session.headers["Connection"] = "close"  # the server hangs up after a 503
            return session.request(method, f"{self.url}/api/{path}", json=content, timeout=60)


@pytest.fixture(scope="session")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """A stack whose credentials are in `.env` only, with a token folder that is relative; stopped in the end.

    The tests of several files share it, in the order of their names: those that hurt it come last.
    """
    place = Place.made(tmp_path_factory.mktemp("up"), PREFECT_SERVER_API_PORT=str(free_port()), **QUICK_WORKER)
    with Sandbox() as gateway, SlackEndpoint() as slack:
        settings = {"KIS_APP_KEY": APP_KEY, "KIS_APP_SECRET": APP_SECRET, "KIS_BASE_URL": gateway.url}
        settings |= {"KIS_TOKEN_DIR": "tokens", "KIS_MARKETS__HK__EXCHANGES": "SEHK"}
        settings |= {"SLACK_WEBHOOK_URL": f"{slack.url}/services/{WEBHOOK}", "KIS_TIMEOUT": "60"}
        settings |= {"PREFECT_SERVER_API_AUTH_STRING": PASSWORD}
        lines = [f"{name}={value}" for name, value in settings.items()]
        (place.work / ".env").write_text("\n".join(lines))
        code, output = place.run("up")
        assert code == 0, output
        user, _, secret = PASSWORD.partition(":")
        yield Up(place, output, place.work / "tokens" / "prefect", slack, gateway, (user, secret))
        place.run("down")
