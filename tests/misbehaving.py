"""KIS at its worst: the gateway by the test's clock, which can be down, or answer with anything that bytes can be."""

from __future__ import annotations

import gzip
import json
import time
from typing import TYPE_CHECKING

from stepping import Clock, Kis

from tokencore.sandbox_http import Handler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Self

    from tokencore.sandbox_answers import Answer

    Play = Callable[[bytes], Iterator[bytes]]

HUGE = 64 * 1024 * 1024  # bytes
PIECE = b"x" * 65_536
PAUSE = 0.002  # seconds between two bytes that drip
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=UTF-8\r\n"


class Misbehaving(Kis):
    """KIS, which issues by its rules but lets a `play` take its answer's place on the wire."""

    def __init__(self, clock: Clock) -> None:
        """Behave, to begin with."""
        super().__init__(clock)
        self.clock = clock
        self.play: Play | None = None
        self._is_down = False

    def __enter__(self) -> Self:
        super().__enter__()
        self._port = self._server.server_port
        self._server.RequestHandlerClass = _Wild
        return self

    def down(self) -> None:
        """Let the port be closed."""
        self._server.stop()
        self._is_down = True

    def well(self) -> None:
        """Behave again."""
        self.clear()
        self.play, self.rules = None, type(self.rules)()
        if self._is_down:
            self._is_down = False
            self.__enter__()


class _Wild(Handler):
    def _deliver(self, answer: Answer) -> None:
        gateway = self.server.gateway
        if not isinstance(gateway, Misbehaving) or gateway.play is None:
            super()._deliver(answer)
            return
        self.close_connection = True
        for piece in gateway.play(json.dumps(answer.content).encode()):
            self.wfile.write(piece)


def slow_body(answer: bytes) -> Iterator[bytes]:
    """A byte at a time, each of them soon enough for a time-out that begins anew with every read."""
    yield OK + b"Content-Length: 60000\r\n\r\n"
    yield from _drip(answer.ljust(60_000))


def slow_headers(_: bytes) -> Iterator[bytes]:
    """The same before the answer has even begun."""
    yield OK
    yield from _drip(b"X-Padding: " + b"x" * 60_000)


def endless_continue(_: bytes) -> Iterator[bytes]:
    """`100 Continue` for ever, which a client skips while it waits for the answer."""
    while True:
        yield b"HTTP/1.1 100 Continue\r\n\r\n"
        time.sleep(PAUSE)


def endless_header(_: bytes) -> Iterator[bytes]:
    """One header of 64 MB."""
    yield OK + b"X-Padding: "
    yield from (PIECE for _ in range(HUGE // len(PIECE)))


def endless_chunks(_: bytes) -> Iterator[bytes]:
    """A body of 64 MB that announces no length."""
    yield OK + b"Transfer-Encoding: chunked\r\n\r\n"
    yield from (b"%x\r\n%s\r\n" % (len(PIECE), PIECE) for _ in range(HUGE // len(PIECE)))


def bomb(_: bytes) -> Iterator[bytes]:
    """64 kB that unpack to 64 MB."""
    packed = gzip.compress(b"\0" * HUGE)
    yield OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%s" % (len(packed), packed)


def no_http(_: bytes) -> Iterator[bytes]:
    """Another protocol's greeting."""
    yield b"SSH-2.0-OpenSSH_9.6\r\n"


def half_a_header(_: bytes) -> Iterator[bytes]:
    """The end amid the headers."""
    yield OK + b"Content-Le"


def half_a_body(answer: bytes) -> Iterator[bytes]:
    """The end amid a body whose length was told."""
    yield OK + b"Content-Length: %d\r\n\r\n%s" % (len(answer), answer[:-40])


def null(_: bytes) -> Iterator[bytes]:
    """JSON, but no object."""
    yield OK + b"Content-Length: 4\r\n\r\nnull"


def _drip(text: bytes) -> Iterator[bytes]:
    for byte in text:
        yield bytes([byte])
        time.sleep(PAUSE)
