"""The sandbox's gateway over HTTP: keep-alive on loopback, and the failures that happen on the connection."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from tokencore.errors import ConfigurationError
from tokencore.sandbox.rules import NO_SUCH_PATH, TOKEN, Answer, Gateway, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Self

_POLL = 0.02  # seconds until the accepting thread notices that it has to stop
_DRIP = 0.05  # seconds between two bytes: each read is quick, but the whole answer takes about half a minute


class Sandbox(Gateway):
    """A gateway that listens during a `with` block; leaving it closes the port, and open connections get no answer.

    The keywords besides `port` (0 takes a free one) are lengths as in `RULES`, in seconds.

    Raises:
        ConfigurationError: a length is impossible or, on entering, the port is not free.
    """

    def __init__(self, *, port: int = 0, **lengths: float) -> None:
        """Set the rules and keep the port, which `__enter__` opens."""
        super().__init__(**lengths)
        self._port = port
        self.closing = threading.Event()

    def __enter__(self) -> Self:
        try:
            self._server = _Server(("127.0.0.1", self._port), _Handler)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or "no such port"
            message = f"Cannot listen on 127.0.0.1:{self._port} ({why}); choose another port with --port."
            raise ConfigurationError(message) from None
        self._server.gateway = self
        self.closing.clear()
        threading.Thread(target=self._server.serve_forever, args=(_POLL,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """The base URL, for KIS_BASE_URL."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"


class _Server(ThreadingTCPServer):
    gateway: Sandbox
    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024  # hundreds of processes may connect at the same instant
    allow_reuse_address = os.name == "posix"  # elsewhere it would let two programs share a port

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - as inherited
        if not isinstance(sys.exception(), OSError):  # a client that gives up is not an error
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """One connection: asks the gateway and delivers its answer, whole or in the way of a failure."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the body waits 40 ms for the header's acknowledgement
    server: _Server

    def do_GET(self) -> None:
        gateway, (path, _, query) = self.server.gateway, self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        params = {name.upper(): value for name, value in parse_qsl(query)}
        asked = Request(self.command, path, self._fields(), headers, params)
        answer = self._controlled(asked) if path.startswith("/sandbox/") else gateway.respond(asked, time.time())
        slow = None if answer.delivery == "hang" else gateway.rules["latency"] if path == TOKEN else 0
        if gateway.closing.wait(slow) or answer.delivery in ("drop", "hang"):
            self.close_connection = True  # a gateway that is down answers nobody, kept connections included
        else:
            self._deliver(answer)

    do_POST = do_GET  # noqa: N815 - the name http.server looks for

    def log_message(self, *_: object) -> None:
        """Log nothing: the lines of http.server would show query strings."""

    def _fields(self) -> Mapping[str, Any]:
        """Return the JSON object in the body, or an empty one."""
        length = self.headers.get("Content-Length", "")
        try:
            fields = json.loads(self.rfile.read(int(length) if length.isdecimal() else 0))
        except (ValueError, RecursionError):
            return {}
        return fields if isinstance(fields, dict) else {}

    def _controlled(self, asked: Request) -> Answer:
        gateway = self.server.gateway
        actions: dict[tuple[str, str], Callable[..., Mapping[str, Any] | None]] = {
            ("GET", "/sandbox/stats"): gateway.stats,
            ("POST", "/sandbox/answer"): gateway.answer,
            ("POST", "/sandbox/clear"): gateway.clear,
            ("POST", "/sandbox/fail"): gateway.fail,
            ("POST", "/sandbox/rules"): gateway.set_rules,
        }
        if asked[:2] not in actions:
            return NO_SUCH_PATH
        try:
            return Answer(200, actions[asked[:2]](**asked.body) or {"ok": True}, "200")
        except (ConfigurationError, TypeError, AttributeError) as error:  # the last two: wrong or mistyped fields
            return Answer(400, {"error": str(error)}, "400")

    def _deliver(self, answer: Answer) -> None:
        content, way = answer.content, answer.delivery
        kind, text = ("text/html", content) if isinstance(content, str) else ("application/json", json.dumps(content))
        body = text.encode()
        self.send_response(answer.status)
        self.send_header("Content-Type", f"{kind}; charset=UTF-8")
        self.send_header("Content-Length", str(len(body) * 2 if way == "half" else len(body)))
        self.end_headers()
        step = 1 if way == "drip" else len(body) or 1
        for start in range(0, len(body), step):
            self.wfile.write(body[start : start + step])
            if self.server.gateway.closing.wait(_DRIP if way == "drip" else 0):
                break
        self.close_connection = self.close_connection or way == "half" or self.server.gateway.closing.is_set()
