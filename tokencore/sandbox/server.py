"""The sandbox's gateway over HTTP: keep-alive on loopback, and the failures that only a connection can play."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from tokencore.errors import ConfigurationError
from tokencore.sandbox.rules import TOKEN, Answer, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tokencore.sandbox.rules import Gateway

_POLL = 0.02  # seconds until the accepting thread sees that it shall end
_IDLE = 75.0  # seconds a kept-alive connection may stay silent, or a body may take to arrive
_HANG = 300.0  # seconds after which even `hang` lets go of its client
_DRIP = 0.05  # seconds between two bytes: each read is quick, the whole takes about half a minute
_CHUNK = b"x" * 65536
_HUGE = 1024  # chunks: 64 MiB
_LONGEST_BODY = 1 << 20  # bytes that are read; no real request comes near it
_REDIRECT = 302


class Server(ThreadingTCPServer):
    """Listens on loopback for a gateway; `start` serves from a thread, `stop` closes the port and every connection."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024  # hundreds of processes may connect in one instant
    allow_reuse_address = os.name == "posix"  # elsewhere it would let two programs share a port

    def __init__(self, port: int, gateway: Gateway, *, verbose: bool) -> None:
        """Open the port; OSError where that is impossible."""
        self.gateway = gateway
        self.verbose = verbose
        self.closing = threading.Event()
        self._connections: set[Any] = set()
        super().__init__(("127.0.0.1", port), _Handler)

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
            with contextlib.suppress(OSError):  # its client was faster
                connection.shutdown(socket.SHUT_RDWR)
        self.closing.set()  # last: who wakes now finds no connection left to answer on


class _Handler(BaseHTTPRequestHandler):
    """One connection: asks the gateway and delivers its answer, whole or as the failure has it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the body waits 40 ms for the header's acknowledgement
    timeout = _IDLE
    server: Server

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if path.startswith("/sandbox/"):
            answer = self._controlled(path, self._fields())
        else:
            headers = {name.lower(): value for name, value in self.headers.items()}
            params = {name.upper(): value for name, value in parse_qsl(query)}
            asked = Request(self.command, path, self._fields(), headers, params)
            answer = self.server.gateway.respond(asked, time.time())
        if path == TOKEN:
            self.server.closing.wait(self.server.gateway.rules["latency"])
        if self.server.verbose:
            sys.stderr.write(f"{self.command} {path.encode('unicode_escape').decode()} {answer.outcome}\n")
        self._deliver(answer)

    do_POST = do_GET  # noqa: N815 - the name http.server looks for

    def log_message(self, *_: object) -> None:
        """Silent: the lines of http.server would show query strings."""

    def _fields(self) -> Mapping[str, Any]:
        """The JSON object of the body; empty if there is none."""
        length = self.headers.get("Content-Length", "")
        try:
            fields = json.loads(self.rfile.read(min(int(length), _LONGEST_BODY) if length.isdecimal() else 0))
        except (ValueError, RecursionError):
            return {}
        return fields if isinstance(fields, dict) else {}

    def _controlled(self, path: str, fields: Mapping[str, Any]) -> Answer:
        gateway = self.server.gateway
        actions: dict[tuple[str, str], Callable[..., object]] = {
            ("GET", "/sandbox/stats"): gateway.stats,
            ("POST", "/sandbox/answer"): gateway.answer,
            ("POST", "/sandbox/clear"): gateway.clear,
            ("POST", "/sandbox/fail"): gateway.fail,
            ("POST", "/sandbox/rules"): gateway.set_rules,
        }
        if (action := actions.get((self.command, path))) is None:
            return Answer(404, {"error": "The sandbox has no such path."}, "404")
        try:
            result = action(**fields)
        except ConfigurationError as error:
            return Answer(400, {"error": str(error)}, "400")
        except (TypeError, AttributeError):
            return Answer(400, {"error": "A field is unknown, missing or of another type."}, "400")
        return Answer(200, result if isinstance(result, dict) else {"ok": True}, "200")

    def _deliver(self, answer: Answer) -> None:
        content = answer.content
        body = (content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)).encode()
        self.close_connection = self.close_connection or answer.delivery in ("drop", "hang", "half")
        if answer.delivery == "hang":
            self.server.closing.wait(_HANG)
        elif answer.delivery != "drop":
            self._send_head(answer, _HUGE * len(_CHUNK) if answer.delivery == "huge" else len(body))
            for piece in self._pieces(answer.delivery, body):
                self.wfile.write(piece)

    def _send_head(self, answer: Answer, length: int) -> None:
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(length))
        if answer.status == _REDIRECT:
            self.send_header("Location", "/sandbox/elsewhere")
        self.end_headers()

    def _pieces(self, delivery: str, body: bytes) -> Iterator[bytes]:
        if delivery == "huge":
            yield b'{"access_token": "' + _CHUNK[18:]
            yield from [_CHUNK] * (_HUGE - 2)
            yield _CHUNK[2:] + b'"}'
        elif delivery == "drip":
            for byte in body:
                yield bytes([byte])
                if self.server.closing.wait(_DRIP):
                    return
        else:
            yield body[: len(body) // 2] if delivery == "half" else body
