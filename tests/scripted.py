"""A KIS of the test's own: it issues like the sandbox behind it, and answers business calls from a script."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, NamedTuple, Self

import requests

if TYPE_CHECKING:
    from tokencore.sandbox import Sandbox


class Scripted:
    """A server on loopback that gives its answers in order, the last one for ever, and keeps what it was sent."""

    class Answer(NamedTuple):
        """Status, `msg_cd` of the JSON body, what the body is said to be, and where a redirect leads."""

        status: int = 200
        code: str = "MCA00000"
        kind: str = "application/json"
        location: str = ""

    def __init__(self, gateway: Sandbox, *answers: Answer) -> None:
        """Answer as told; requests for a token go to `gateway`."""
        script, seen = list(answers or [self.Answer()]), []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                body = (
                    self.chunks()
                    if "transfer-encoding" in headers
                    else self.rfile.read(int(self.headers.get("Content-Length", 0)))
                )
                if self.path.startswith("/oauth2/"):
                    issued = requests.post(gateway.url + self.path, data=body, timeout=5)
                    self.answer(issued.status_code, "application/json", issued.content)
                    return
                seen.append((headers, body))
                told = script.pop(0) if len(script) > 1 else script[0]
                content = json.dumps({"rt_cd": "1", "msg_cd": told.code}).encode()
                self.answer(told.status, told.kind, content, told.location)

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

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_port}"
