"""A Slack on loopback that records what it is sent, for tests: webhooks and chat.postMessage."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class SlackEndpoint:
    """Slack while a `with` block lasts.

    Attributes:
        told: the messages that it took, in order.
        requests: all requests, as (path, authorization).
        answers: statuses for the next requests; 200 when there is none. 0 means silence.

    """

    def __init__(self) -> None:
        """Record nothing yet."""
        self.told: list[dict[str, Any]] = []
        self.requests: list[tuple[str, str]] = []
        self.answers: list[int] = []
        self.bot_answer: dict[str, Any] = {"ok": True}
        self.closing = threading.Event()

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def headlines(self) -> list[str]:
        """The headers of the messages that it took, without the icon."""
        return [message["blocks"][0]["text"]["text"].partition(": ")[2] for message in self.told]


def _handler(slack: SlackEndpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            slack.requests.append((self.path, self.headers.get("Authorization", "")))
            status = slack.answers.pop(0) if slack.answers else 200
            if not status:
                slack.closing.wait()
                return
            if status == 200:
                slack.told.append(message)
            is_bot = self.path.endswith("chat.postMessage")
            body = json.dumps(slack.bot_answer).encode() if is_bot else b"ok"
            self.send_response(status)
            self.send_header("Content-Type", "application/json" if is_bot else "text/plain")
            self.send_header("Retry-After", "1")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Silent."""

    return Handler
