"""Servers on loopback for what no gateway does: bytes as they are, and business calls answered from a script."""

from __future__ import annotations

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, NamedTuple, Self

import requests

if TYPE_CHECKING:
    import ssl

    from tokencore.sandbox import Sandbox

DRIP = 0.02  # seconds between two bytes of an answer that never ends


class Wire:
    """Answers every connection with `reply`, whatever it is, in clear or encrypted, and keeps what it was sent."""

    def __init__(self, reply: bytes = b"", *, host: str = "127.0.0.1", context: ssl.SSLContext | None = None) -> None:
        """Open a port."""
        self.reply = reply
        self.drip = b""
        self.requests: list[bytes] = []
        self.raw = False  # whether the reply is sent past the encryption: no TLS record begins like that
        self._context = context
        self._socket = socket.create_server((host, 0))
        self.url = f"{'https' if context else 'http'}://{host}:{self._socket.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # A thread that waits on a closed descriptor would answer for the server that gets its number next.
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(timeout=10)
        self._socket.close()

    def answer(self, status: int, body: object, **headers: str) -> None:
        """Answer from now on with this status and JSON, or bytes as they are."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status} x", f"Content-Length: {len(content)}", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.reply = "\r\n".join([*lines, "", ""]).encode() + content

    def _serve(self) -> None:
        while True:
            try:
                plain, _ = self._socket.accept()
            except OSError:
                return
            try:
                with self._context.wrap_socket(plain, server_side=True) if self._context else plain as connection:
                    self.requests.append(_received(connection))
                    for at in range(len(self.drip)):  # by the byte, and not to its end within a test
                        connection.sendall(self.drip[at : at + 1])
                        time.sleep(DRIP)
                    with socket.fromfd(connection.fileno(), socket.AF_INET, socket.SOCK_STREAM) as bare:
                        (bare if self.raw else connection).sendall(self.reply)
            except OSError:
                continue


def _received(connection: socket.socket) -> bytes:
    got = b""
    while b"\r\n\r\n" not in got:
        piece = connection.recv(65536)
        if not piece:
            return got
        got += piece
    head, _, body = got.partition(b"\r\n\r\n")
    sizes = [int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    while len(body) < sum(sizes):
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


class Scripted:
    """A KIS that issues like the sandbox behind it and gives its other answers in order, the last one for ever."""

    class Answer(NamedTuple):
        """Status, code, where in the body that stands, what the body is said to be, and where a redirect leads."""

        status: int = 200
        code: str = "MCA00000"
        field: str = "msg_cd"
        kind: str = "application/json"
        location: str = ""

    def __init__(self, gateway: Sandbox, *answers: Answer) -> None:
        """Answer as given; requests for a token go to `gateway`."""
        script, seen = list(answers or [self.Answer()]), []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                chunked = "transfer-encoding" in headers
                body = self.chunks() if chunked else self.rfile.read(int(headers.get("content-length", 0)))
                if self.path.startswith("/oauth2/"):
                    issued = requests.post(gateway.url + self.path, data=body, timeout=5)
                    self.answer(issued.status_code, "application/json", issued.content)
                    return
                seen.append((headers, body))
                answer = script.pop(0) if len(script) > 1 else script[0]
                content = json.dumps({"rt_cd": "1", answer.field: answer.code}).encode()
                self.answer(answer.status, answer.kind, content, answer.location)

            do_POST = do_GET  # noqa: N815 - the name http.server looks for

            def chunks(self) -> bytes:
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            def answer(self, status: int, kind: str, content: bytes, location: str = "") -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Location", location)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                """Silent."""

        self.seen: list[tuple[dict[str, str], bytes]] = seen
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
