"""A Slack on loopback that records what it is sent, for tests: webhooks and chat.postMessage."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

HOOK = "/services/T000/B000/canary-of-the-webhook"
CHANNEL = "C0TOKENS"  # its number, which the API answers with whatever the channel is called


class SlackEndpoint:
    """Slack while a `with` block lasts.

    Attributes:
        messages: those that it took, in order.
        requests: all requests, as (path, authorization).
        answers: statuses for the next requests, or pairs of one and the webhook's word; 200 when there is none. 0 means
            silence.
        bot_answers: what the API says to the next requests that are not refused by status; it posts where there is
            none, with time stamps that count up.
        retry_after: seconds that a refusal asks for.

    """

    def __init__(self) -> None:
        """Record nothing yet."""
        self.messages: list[dict[str, Any]] = []
        self.requests: list[tuple[str, str]] = []
        self.answers: list[int | tuple[int, str]] = []
        self.bot_answers: list[dict[str, Any]] = []
        self.retry_after = 1
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
        return [message["blocks"][0]["text"]["text"].partition(": ")[2] for message in self.messages]


def _handler(slack: SlackEndpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            slack.requests.append((self.path, self.headers.get("Authorization", "")))
            given = slack.answers.pop(0) if slack.answers else 200
            status, word = given if isinstance(given, tuple) else (given, "ok")
            if not status:
                slack.closing.wait()
                return
            is_bot = self.path.endswith("chat.postMessage")
            answer = slack.bot_answers.pop(0) if is_bot and slack.bot_answers and status == 200 else {"ok": True}
            if status == 200 and answer["ok"]:
                slack.messages.append(message)
                answer = {"channel": CHANNEL, "ts": f"{len(slack.messages)}.0", **answer}
            body = json.dumps(answer).encode() if is_bot else word.encode()
            self.send_response(status)
            kind = "application/json" if is_bot else "text/plain"
            own = {"Content-Type": kind, "Retry-After": slack.retry_after, "Content-Length": len(body)}
            for name, value in own.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Silent."""

    return Handler
