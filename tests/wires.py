"""A server on loopback that says anything: bytes as they are, in clear or encrypted."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl
    from typing import Self

DRIP = 0.02  # seconds between two bytes of an answer that never ends


class Wire:
    """A server on loopback that answers every connection with `reply`, whatever it is, and keeps what it was sent."""

    def __init__(self, reply: bytes = b"", *, host: str = "127.0.0.1", context: ssl.SSLContext | None = None) -> None:
        """Open a port."""
        self.reply = reply
        self.drip = b""
        self.requests: list[bytes] = []
        self.connections = 0
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
            self.connections += 1
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
