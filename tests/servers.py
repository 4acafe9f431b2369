"""Stand-ins for tests: loopback servers, such as Slack and a KIS with a script."""

import json
import re
import socket
import ssl
import threading
from collections.abc import Mapping
from itertools import takewhile
from socketserver import StreamRequestHandler, ThreadingTCPServer
from typing import Any, NamedTuple, Self

import requests

from tokencore.sandbox import Sandbox

HOOK = "/services/T000/B000/canary-of-the-webhook"
CHANNEL = "C0TOKENS"  # the channel's id, with which Slack's API answers whatever name it was given


class Wire(ThreadingTCPServer):
    """Answers every connection with `reply`, in clear or encrypted, and keeps the requests."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, reply: bytes = b"", *, host: str = "127.0.0.1", context: ssl.SSLContext | None = None) -> None:
        """Open a port."""
        super().__init__((host, 0), StreamRequestHandler)
        self.reply = reply
        self.requests: list[bytes] = []
        self._context = context
        self.url = f"{'https' if context else 'http'}://{host}:{self.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def answer(self, status: int, body: object, **headers: str) -> None:
        """Answer from now on with this status and a body: JSON, or bytes as they are."""
        self.reply = _answer(status, body, headers)

    def finish_request(self, request: Any, client_address: object) -> None:  # noqa: ANN401, ARG002 - as the base has it
        """Answer one connection."""
        with self._context.wrap_socket(request, server_side=True) if self._context else request as connection:
            connection.sendall(self._reply_to(_received(connection)))

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that hang up."""

    def _reply_to(self, request: bytes) -> bytes:
        self.requests.append(request)
        return self.reply


def _answer(status: int, body: object, headers: Mapping[str, str]) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Length": str(len(content)), "Connection": "close", **headers}
    lines = [f"HTTP/1.1 {status} x", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + content


def parsed(request: bytes) -> tuple[str, dict[str, str], bytes]:
    """Return a request's path, its headers by lower-case name, and its body."""
    head, _, body = request.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return first.split()[1], {name.lower(): value for name, _, value in (one.partition(": ") for one in lines)}, body


def _received(connection: socket.socket) -> bytes:
    """Read a whole request, joining the chunks of a chunked body."""
    with connection.makefile("rb") as stream:
        head = b"".join(takewhile(b"\r\n".__ne__, iter(stream.readline, b""))) + b"\r\n"
        if b"transfer-encoding: chunked" in head.lower():
            body = b""
            while size := int(stream.readline(), 16):
                body += stream.read(size + 2)[:size]
            return head + body
        length = re.search(rb"content-length: (\d+)", head.lower())
        return head + stream.read(int(length[1]) if length else 0)


class Scripted(Wire):
    """A KIS that issues as the sandbox behind it does; its other answers follow a script, whose last one repeats."""

    class Answer(NamedTuple):
        """An answer: status, KIS's code and the body's field for it, content type, and where a redirect leads."""

        status: int = 200
        code: str = "MCA00000"
        field: str = "msg_cd"
        kind: str = "application/json"
        location: str = ""

    def __init__(self, gateway: Sandbox, *answers: Answer) -> None:
        """Answer with `answers` in order; requests for a token go to `gateway`."""
        super().__init__()
        self.seen: list[tuple[dict[str, str], bytes]] = []
        self.script = list(answers or [self.Answer()])
        self._gateway = gateway
        self._turn = threading.Lock()

    def _reply_to(self, request: bytes) -> bytes:
        path, headers, body = parsed(request)
        issued = requests.post(self._gateway.url + path, data=body, timeout=5) if "/oauth2/" in path else None
        with self._turn:
            if issued is not None:
                return _answer(issued.status_code, issued.content, {})
            self.seen.append((headers, body))
            one = self.script.pop(0) if len(self.script) > 1 else self.script[0]
            where = {"Location": one.location} if one.location else {}
            return _answer(one.status, {"rt_cd": "1", one.field: one.code}, {"Content-Type": one.kind, **where})


class SlackEndpoint(Wire):
    """A Slack that takes webhook calls and chat.postMessage, and records what it is sent."""

    def __init__(self) -> None:
        """Record nothing yet."""
        super().__init__()
        self.messages: list[dict[str, Any]] = []  # those that it accepted
        self.asked: list[tuple[str, str]] = []  # path and authorization of all requests
        # Statuses of the next answers, or pairs of a status and the webhook's word; 0 is silence. Without any: 200.
        self.answers: list[int | tuple[int, str]] = []
        self.bot_answers: list[dict[str, Any]] = []  # the API's next answers; without any it accepts the message
        self.retry_after = 1  # seconds that a refusal asks for
        self._closing = threading.Event()

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        super().__exit__()

    @property
    def headlines(self) -> list[str]:
        """The headers of the accepted messages, without the icon."""
        return [message["blocks"][0]["text"]["text"].partition(": ")[2] for message in self.messages]

    def _reply_to(self, request: bytes) -> bytes:
        path, fields, body = parsed(request)
        self.asked.append((path, fields.get("authorization", "")))
        given = self.answers.pop(0) if self.answers else 200
        status, word = given if isinstance(given, tuple) else (given, "ok")
        if not status:
            self._closing.wait()
            return b""
        is_bot = path.endswith("chat.postMessage")
        answer = self.bot_answers.pop(0) if is_bot and self.bot_answers and status == 200 else {"ok": True}
        if status == 200 and answer["ok"]:
            self.messages.append(json.loads(body))
            answer = {"channel": CHANNEL, "ts": f"{len(self.messages)}.0", **answer}
        headers = {"Content-Type": "application/json" if is_bot else "text/plain", "Retry-After": str(self.retry_after)}
        return _answer(status, answer if is_bot else word.encode(), headers)
