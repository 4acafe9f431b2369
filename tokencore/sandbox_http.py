"""The sandbox's gateway over HTTP: keep-alive on loopback, and the failures that only a connection can play."""

from __future__ import annotations

import json
import os
import re
import socket
import socketserver
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from tokencore.errors import ConfigurationError
from tokencore.sandbox_answers import QUOTES, Answer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tokencore.sandbox_rules import Gateway

_POLL = 0.02  # seconds until the accepting thread sees that it shall end
_IDLE = 75.0  # seconds a kept-alive connection may stay silent, or a body may take to arrive
_HANG = 300.0  # seconds after which even `hang` lets go of a client that does not
_DRIP = 0.05  # seconds between two bytes: each read is quick, the whole takes about half a minute
_HUGE = 64 * 1024 * 1024  # bytes
_CHUNK = b"x" * 65536
_LENGTH = re.compile(r"[0-9]{1,5}")  # what a client may announce: no real request comes near 100 kB
_JSON = "application/json; charset=UTF-8"
_HTML = "<html><head><title>403 Forbidden</title></head><body><h1>Forbidden</h1></body></html>"


class Server(ThreadingHTTPServer):
    """Listens on loopback for a gateway; `start` serves from a thread, `stop` closes the port and every connection."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024  # hundreds of processes may connect in one instant
    allow_reuse_address = os.name == "posix"  # elsewhere it would let two programs share a port
    allow_reuse_port = False

    def __init__(self, port: int, gateway: Gateway, *, verbose: bool) -> None:
        """Open the port, which raises OSError where it cannot be had."""
        self.gateway = gateway
        self.verbose = verbose
        self.closing = threading.Event()
        self._connections: set[Any] = set()
        super().__init__(("127.0.0.1", port), Handler)

    def server_bind(self) -> None:  # noqa: D102 - as inherited
        # HTTPServer's own looks the host's name up, which can take seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401, D102 - as inherited
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:  # noqa: ANN401, D102 - as inherited
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401, D102 - as inherited
        if not isinstance(sys.exception(), OSError):  # a client that gives up is no fault
            super().handle_error(request, client_address)

    def start(self) -> None:
        """Serve from a thread until `stop`."""
        threading.Thread(target=self.serve_forever, args=(_POLL,), daemon=True).start()

    def stop(self) -> None:
        """End at once, kept-alive connections included: a gateway that is down answers nobody."""
        self.shutdown()
        self.server_close()
        for connection in list(self._connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # its client was faster
        self.closing.set()  # last: who wakes now finds no connection left to answer on


class Handler(BaseHTTPRequestHandler):
    """One connection: asks the gateway and delivers its answer, whole or as the failure has it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the body waits 40 ms for the header's acknowledgement
    timeout = _IDLE
    server: Server

    def do_GET(self) -> None:
        """Answer one request of any method."""
        asked = self._asked()
        answer = self._too_long() if asked is None else self._decided(asked)
        if self.server.verbose:
            path = self.path.partition("?")[0].encode("unicode_escape").decode()
            sys.stderr.write(f"{self.command} {path} {answer.outcome}\n")
        self._deliver(answer)

    do_POST = do_GET  # noqa: N815 - the name http.server looks for

    def log_message(self, *_: object) -> None:
        """Silent: the lines of http.server would show query strings."""

    def _asked(self) -> Mapping[str, Any] | None:
        """The JSON object of the body, empty if there is none; None if its length is not acceptable."""
        length = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers or not _LENGTH.fullmatch(length):
            return None
        try:
            fields = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            return {}
        return fields if isinstance(fields, dict) else {}

    def _too_long(self) -> Answer:
        self.close_connection = True
        return Answer(413, {"error": "The body must come with a length below 100 kB."}, "413")

    def _decided(self, asked: Mapping[str, Any]) -> Answer:
        gateway, (path, _, query) = self.server.gateway, self.path.partition("?")
        answer = Answer(404, {"error": "The sandbox has no such path."}, "404")
        match self.command, path:
            case "POST", "/oauth2/tokenP":
                answer = gateway.issue(asked, time.time())
                self.server.closing.wait(gateway.rules.latency)
            case "POST", "/oauth2/revokeP":
                answer = gateway.revoke(asked)
            case "POST", "/oauth2/Approval":
                answer = gateway.approve(asked)
            case "GET", _ if path in QUOTES:
                headers = {name.lower(): value for name, value in self.headers.items()}
                params = {name.upper(): value for name, value in parse_qsl(query)}
                answer = gateway.quote(path, headers, params, time.time())
            case "GET", "/sandbox/stats":
                answer = Answer(200, gateway.stats(), "200")
            case "POST", "/sandbox/fail" | "/sandbox/clear" | "/sandbox/rules":
                answer = self._controlled(path, asked)
        return answer

    def _controlled(self, path: str, asked: Mapping[str, Any]) -> Answer:
        gateway = self.server.gateway
        try:
            match path:
                case "/sandbox/fail":
                    gateway.fail(asked.get("mode", ""), asked.get("count"))
                case "/sandbox/rules":
                    gateway.set_rules(**asked)
                case _:
                    gateway.clear()
        except ConfigurationError as error:
            return Answer(400, {"error": str(error)}, "400")
        return Answer(200, {"ok": True}, "200")

    def _deliver(self, answer: Answer) -> None:
        body = json.dumps(answer.content, ensure_ascii=False).encode()
        match answer.delivery:
            case "drop":
                self.close_connection = True
            case "hang":
                self._hang()
            case "html":
                self._send(403, _HTML.encode(), content_type="text/html; charset=UTF-8")
            case "garbage":
                self._send(200, b"\x00<<< this is not JSON >>>")
            case "redirect":
                self._send(302, b"", Location="/sandbox/elsewhere")
            case "half":
                self.close_connection = True
                self._send(200, body[: len(body) // 2], length=len(body))
            case "huge":
                self._huge()
            case "drip":
                self._drip(answer.status, body)
            case _:
                self._send(answer.status, body)

    def _send(
        self,
        status: int,
        body: bytes,
        *,
        length: int | None = None,
        content_type: str = _JSON,
        **more: str,
    ) -> None:
        self.send_response(status)
        size = len(body) if length is None else length
        for name, value in {"Content-Type": content_type, "Content-Length": str(size), **more}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _hang(self) -> None:
        self.close_connection = True
        self.connection.setblocking(False)  # noqa: FBT003 - the socket's own signature
        give_up = time.monotonic() + _HANG
        while time.monotonic() < give_up and not self.server.closing.wait(0.05):
            try:
                if not self.connection.recv(1, socket.MSG_PEEK):
                    return  # the client gave up
            except BlockingIOError:
                continue

    def _huge(self) -> None:
        start, end = b'{"access_token": "', b'"}'
        self._send(200, start, length=len(start) + _HUGE + len(end))
        for _ in range(_HUGE // len(_CHUNK)):
            self.wfile.write(_CHUNK)
        self.wfile.write(end)

    def _drip(self, status: int, body: bytes) -> None:
        self._send(status, b"", length=len(body))
        for byte in body:
            self.wfile.write(bytes([byte]))
            if self.server.closing.wait(_DRIP):
                return
