"""The watchdog against a server that answers, ails and dies: what it asks, what it reports, and that once."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, NamedTuple

import pytest
from slack_endpoint import SlackEndpoint
from stacks import free_port

from flows.stack import watchdog
from tokencore.sandbox import APP_KEY, APP_SECRET

if TYPE_CHECKING:
    from collections.abc import Iterator

TITLE = "Prefect: Prefect does not look after the tokens"


class Answers:
    """What the server says: how it is, and when the last check ended (None: not yet, it has just been deployed)."""

    def __init__(self) -> None:
        """All is well."""
        self.health = 200
        self.asked = threading.Event()
        self.checked: datetime | None = datetime.now(UTC)


class Desk(NamedTuple):
    """A port where there may be a server, and the Slack that hears of it."""

    port: int
    slack: SlackEndpoint
    capfd: pytest.CaptureFixture[str]

    @contextmanager
    def server(self) -> Iterator[Answers]:
        """A server, as far as the watchdog asks it."""
        answers = Answers()
        server = ThreadingHTTPServer(("127.0.0.1", self.port), _handler(answers))
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield answers
        server.shutdown()
        thread.join()
        server.server_close()

    def look(self) -> tuple[int, str]:
        """Its exit code and what it said on standard error."""
        code = watchdog.watch()
        return code, self.capfd.readouterr().err


def _handler(answers: Answers) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/api/health":
                answers.asked.set()
                self._say(answers.health, True)  # noqa: FBT003 - as Prefect says it
            else:
                self._say(200, {"created": datetime.now(UTC).isoformat()})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert asked["flows"] == {"name": {"any_": ["check-tokens"]}}
            ended = {"state_name": "AlreadyValid", "end_time": answers.checked.isoformat()} if answers.checked else None
            self._say(200, [ended] if ended else [])

        def _say(self, status: int, content: object) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Silent."""

    return Handler


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Desk]:
    """No server yet; the watchdog bears silence for a moment only."""
    port = free_port()
    monkeypatch.setattr(watchdog, "PATIENCE", 0.1)
    monkeypatch.setattr(watchdog, "PAUSE", 0.05)
    monkeypatch.setenv("KIS_APP_KEY", APP_KEY)
    monkeypatch.setenv("KIS_APP_SECRET", APP_SECRET)
    monkeypatch.setenv("PREFECT_SERVER_API_PORT", str(port))
    with SlackEndpoint() as slack:
        monkeypatch.setenv("SLACK_WEBHOOK_URL", f"{slack.url}/services/CanaryWebhook")
        yield Desk(port, slack, capfd)


def test_a_dead_server_is_told_once_and_its_return_too(desk: Desk) -> None:
    """Exit 1 with a line for cron at each look, one message to Slack; then one that it is over, and silence."""
    for _ in range(2):
        code, said = desk.look()
        assert code == 1
        assert said.endswith(f"Prefect's server at http://127.0.0.1:{desk.port} does not answer.\n")
        assert desk.slack.headlines == [TITLE]
    with desk.server():
        for _ in range(2):
            assert desk.look()[0] == 0
            assert len(desk.slack.told) == 2
    assert "solved: " in desk.slack.told[-1]["blocks"][0]["text"]["text"]


@pytest.mark.parametrize("ill", ["unhealthy", "no check for long"])
def test_a_server_that_looks_after_nothing_is_told(ill: str, desk: Desk) -> None:
    """One that says itself that it is ill, and one that answers while no check ends."""
    with desk.server() as answers:
        if ill == "unhealthy":
            answers.health = 500
        else:
            answers.checked = datetime.now(UTC) - watchdog.SILENCE - timedelta(minutes=1)
        assert desk.look()[0] == 1
    assert len(desk.slack.told) == 1


def test_while_all_is_well_nothing_is_told(desk: Desk) -> None:
    """Nor with a server so new that no check has ended yet."""
    with desk.server() as answers:
        assert desk.look() == (0, "")
        answers.checked = None
        assert desk.look() == (0, "")
    assert desk.slack.requests == []


def test_a_restart_is_no_death(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is well again within the watchdog's patience has been away for nobody."""
    monkeypatch.setattr(watchdog, "PATIENCE", 60)
    looked: list[tuple[int, str]] = []
    looking = threading.Thread(target=lambda: looked.append(desk.look()))
    with desk.server() as answers:
        answers.health = 500
        looking.start()
        assert answers.asked.wait(30)
        answers.health = 200
        looking.join()
    assert looked == [(0, "")]
    assert desk.slack.requests == []
