"""Metrics and health for machines: over HTTP, as a file for node_exporter, or once as text.

Read-only: nothing here issues or writes a token, and no answer holds anything secret.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import socketserver
import sys
import tempfile
import threading
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

from prometheus_client import generate_latest
from prometheus_client.exposition import choose_encoder

from tokencore.errors import ConfigurationError
from tokencore.metrics import TokenCollector
from tokencore.vitals import Watch

if TYPE_CHECKING:
    from typing import Any, Self

PATIENCE = 10.0  # seconds for a client to send its request and take the answer
PUBLIC_FILE = 0o644  # node_exporter is another user; nothing in the file is secret
PLAIN = "text/plain; charset=utf-8"


def text() -> str:
    """All metrics of this moment in Prometheus' text format.

    Raises:
        ConfigurationError: the settings are malformed, or no market has credentials.

    """
    return generate_latest(TokenCollector(Watch())).decode()


def write_textfile(path: str) -> None:
    """Replace `path` by the metrics of this moment, whole and readable by all.

    Raises:
        ConfigurationError: the settings are malformed, or the file cannot be written; what was there before still is.

    """
    content = text()
    folder, name = os.path.split(os.path.abspath(path))
    try:
        descriptor, draft = tempfile.mkstemp(dir=folder, prefix=f".{name}.", suffix=".tmp")  # no `.prom` for a draft
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(content)
            os.chmod(draft, PUBLIC_FILE)
            os.replace(draft, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(draft)
            raise
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}; name a file elsewhere.") from None


class Exporter:
    """`/metrics`, `/livez` and `/readyz` over HTTP while a `with` block lasts.

    Raises:
        ConfigurationError: the settings are malformed or, on entering, the address cannot be had.

    """

    def __init__(self, host: str, port: int) -> None:
        """Read the settings and keep the address; port 0 takes a free one."""
        self._address = host, port
        self._watch = Watch()
        self._collector = TokenCollector(self._watch)
        self._turn = threading.Lock()  # one look at a time: who asks twice at once waits some milliseconds

    def __enter__(self) -> Self:
        host, port = self._address
        self._watch.look(datetime.now(UTC))  # a year of records and the calendars: no scrape waits for them
        try:
            self._server = _server(self, host, port)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or "no such port"
            raise ConfigurationError(
                f"{host}:{port} cannot be had ({why}); choose another with --listen HOST:PORT."
            ) from None
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self._server.server_address[:2]
        shown = f"[{host!s}]" if ":" in str(host) else host
        return f"http://{shown!s}:{port}"

    def answer(self, path: str, accepted: str) -> tuple[int, str, bytes]:
        """The status, content type and body for a path; `accepted` is what the client says it understands."""
        match path:
            case "/metrics":
                encode, kind = choose_encoder(accepted)
                with self._turn:
                    return 200, kind, encode(self._collector)
            case "/livez":
                return 200, PLAIN, b"alive\n"
            case "/readyz":
                return self._readiness()
            case _:
                return 404, PLAIN, b"Here are /metrics, /livez and /readyz.\n"

    def _readiness(self) -> tuple[int, str, bytes]:
        with self._turn:
            vitals = self._watch.look(datetime.now(UTC))
        lines = [f"{one.market}: {f'not ready: {one.unready}' if one.unready else 'ready'}\n" for one in vitals]
        return 503 if any(one.unready for one in vitals) else 200, PLAIN, "".join(lines).encode()


def serve(host: str, port: int) -> None:
    """Answer at `host:port` until SIGINT or SIGTERM; for the main thread.

    Raises:
        ConfigurationError: the settings are malformed, or the address cannot be had.

    """
    # A shell's background jobs start with SIGINT ignored, and SIGTERM would end without closing.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Exporter(host, port) as exporter:
            print(f"{exporter.url}/metrics, /livez and /readyz; Ctrl-C ends it.", flush=True)
            threading.Event().wait()
    except KeyboardInterrupt:
        return


def _server(exporter: Exporter, host: str, port: int) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        timeout = PATIENCE
        disable_nagle_algorithm = True  # else the body waits for the header's acknowledgement

        def do_GET(self) -> None:
            status, kind, body = exporter.answer(self.path.partition("?")[0], self.headers.get("Accept", ""))
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815 - the name http.server looks for

        def log_message(self, *_: object) -> None:
            """Silent: a line a scrape helps nobody."""

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        daemon_threads = True
        block_on_close = False

        def server_bind(self) -> None:
            # HTTPServer's own looks the host's name up, which can take seconds.
            socketserver.TCPServer.server_bind(self)

        def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401, ARG002 - as inherited
            error = sys.exception()
            if not isinstance(error, OSError):  # a client that gives up is no fault
                print(f"tokencore: a request met {type(error).__name__}.", file=sys.stderr)

    return Server((host, port), Handler)
