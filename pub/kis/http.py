"""One HTTP request with bounded size and time: no redirect is followed, and nothing is sent twice."""

from __future__ import annotations

import io
import re
import time
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import HTTPError

from tokencore.kis.codes import ANSWER_LIMIT, parse

if TYPE_CHECKING:
    from collections.abc import Mapping

LOOPBACK = ("127.0.0.1", "localhost", "::1")
FAULTS = {  # what failed, by a word in the error's name or text; the first match counts
    "proxyerror": "the proxy cannot be reached (HTTPS_PROXY, NO_PROXY)",
    "certificate": "the certificate of {host} cannot be verified (clock, REQUESTS_CA_BUNDLE){reason}",
    "sslerror": "the encrypted connection to {host} failed{reason}",
    "connecttimeout": "{host} takes no connection within {timeout:g} s",
    "timeout": "{host} does not answer within {timeout:g} s",
    "nameresolution": "the name {host} cannot be found (DNS)",
    "refused": "{host} refuses the connection",
    "": "the connection to {host} failed or broke off",
}
_REASON = re.compile(r"\[SSL: \w+\] (?:certificate verify failed: )?([^(:]*\w)")  # OpenSSL's


class Answer(NamedTuple):
    """An HTTP answer: status, headers, JSON body (empty if it is not a JSON object), and the text without HTML tags.

    `trouble` says why the body is incomplete: it came too slowly, or is larger than `ANSWER_LIMIT`.
    """

    status: int
    headers: Mapping[str, str]
    body: Mapping[str, Any]
    text: str
    trouble: str

    def clock_ahead(self) -> timedelta | None:
        """Return how far this machine's clock is ahead of the server's; None if the answer gives no time."""
        try:
            return datetime.now(UTC) - parsedate_to_datetime(self.headers.get("Date", ""))
        except (ValueError, TypeError):
            return None


class NoAnswer(Exception):  # noqa: N818 - named after what happened
    """No answer came; the message says why, without the path and headers that the libraries' own messages repeat.

    `left` tells whether the request's content may have reached the server; one without content asks for nothing.
    """

    def __init__(self, why: str, *, left: bool) -> None:
        """Keep the reason and whether the request may have left."""
        super().__init__(why)
        self.left = left


class _Body(io.BytesIO):
    """A request body that notes when it `left`: it is first read once the connection is up and the headers are sent."""

    left = False

    def read(self, size: int | None = -1) -> bytes:
        self.left = True
        return super().read(size)


def send(method: str, url: str, content: bytes | None = None, *, timeout: float, **fields: Any) -> Answer:  # noqa: ANN401 - requests' own keywords
    """Send one request; `timeout` (seconds) bounds connecting and each wait for data, and twice that the whole.

    Raises:
        NoAnswer: no answer came.
    """
    host, deadline = str(urlsplit(url).hostname), time.monotonic() + 2 * timeout
    body = None if content is None else _Body(content)
    fields["auth"] = fields.get("auth") or (lambda request: request)  # otherwise requests reads `.netrc`
    fields |= {"data": body, "timeout": timeout, "stream": True, "allow_redirects": False}
    try:
        with requests.Session() as session:
            session.trust_env = host not in LOOPBACK  # the sandbox is not behind a proxy
            session.hooks["response"].append(_go_nowhere)
            with session.request(method, url, **fields) as response:
                return _read(response, deadline)
    except (requests.RequestException, HTTPError, OSError, ValueError) as error:
        said = f"{type(error).__name__} {error}".lower()
        reason = "".join(f": {why}" for why in _REASON.findall(str(error)))
    why = next(FAULTS[sign] for sign in FAULTS if sign in said)
    raise NoAnswer(why.format(host=host, timeout=timeout, reason=reason), left=bool(body and body.left))


def _go_nowhere(response: requests.Response, **_: object) -> None:
    """Hide a redirect from requests, which would read its whole body at once, without bounds of size or time."""
    response.headers.pop("location", None)


def _read(response: requests.Response, deadline: float) -> Answer:
    """Read the answer up to `ANSWER_LIMIT` or until `deadline` (monotonic seconds), whichever comes first."""
    content, trouble = b"", ""
    while not trouble and (piece := response.raw.read1(ANSWER_LIMIT, decode_content=True)):
        content += piece
        if len(content) > ANSWER_LIMIT:
            trouble = f"the answer is larger than {ANSWER_LIMIT} bytes"
        elif time.monotonic() > deadline:
            trouble = "the answer came too slowly"
    body, text = parse(content), re.sub(r"<[^<>]*>", " ", content.decode("utf-8", errors="replace"))
    # A process that was suspended meanwhile is past the deadline but may have a whole body, which came in time.
    return Answer(response.status_code, response.headers, body, text, "" if body else trouble)
