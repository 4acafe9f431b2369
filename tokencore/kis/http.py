"""One HTTP request within bounds of size and time: no redirect is followed, and nothing is sent twice."""

from __future__ import annotations

import io
import re
import time
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import HTTPError

from tokencore.kis.codes import ANSWER_LIMIT, parse

if TYPE_CHECKING:
    from collections.abc import Mapping

LOOPBACK = ("127.0.0.1", "localhost", "::1")
FAULTS = {  # by a sign in an error's name or text: what failed; the first that fits
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
    """An HTTP answer: status, headers, the JSON body (empty when it is none), its text without tags.

    `trouble` says why the body is not whole: it came too slowly, or is larger than `ANSWER_LIMIT`.
    """

    status: int
    headers: Mapping[str, str]
    body: Mapping[str, Any]
    text: str
    trouble: str


class NoAnswer(Exception):  # noqa: N818 - what happened
    """Nobody answered: why, without the address's path and headers, which the libraries' own texts repeat.

    `left` tells whether the request may have reached the server.
    """

    def __init__(self, why: str, *, left: bool) -> None:
        """Keep both."""
        super().__init__(why)
        self.left = left


class _Body(io.BytesIO):
    """A request's body that knows whether it `left`: it is read when the connection stands and the header is sent."""

    left = False

    def read(self, size: int | None = -1) -> bytes:
        self.left = True
        return super().read(size)


def send(method: str, url: str, content: bytes | None = None, *, timeout: float, **fields: Any) -> Answer:  # noqa: ANN401 - requests' own keywords
    """Send one request; `timeout` in seconds, to connect and for each wait for data, twice that for the whole.

    Raises:
        NoAnswer: nobody answered.

    """
    host, deadline = str(urlsplit(url).hostname), time.monotonic() + 2 * timeout
    body = None if content is None else _Body(content)
    fields["auth"] = fields.get("auth") or (lambda request: request)  # else requests looks into `.netrc`
    fields |= {"data": body, "timeout": timeout, "stream": True, "allow_redirects": False}
    try:
        with requests.Session() as session:
            session.trust_env = host not in LOOPBACK  # no proxy stands before the sandbox
            session.hooks["response"].append(_go_nowhere)
            with session.request(method, url, **fields) as response:
                return _read(response, deadline)
    except (requests.RequestException, HTTPError, OSError, ValueError) as error:
        said = f"{type(error).__name__} {error}".lower()
        reason = "".join(f": {why}" for why in _REASON.findall(str(error)))
    why = next(FAULTS[sign] for sign in FAULTS if sign in said)
    raise NoAnswer(why.format(host=host, timeout=timeout, reason=reason), left=body is None or body.left)


def _go_nowhere(response: requests.Response, **_: object) -> None:
    """Requests would read a redirect's body whole, without bounds of size or time, before it is asked for it."""
    response.headers.pop("location", None)


def _read(response: requests.Response, deadline: float) -> Answer:
    """Read until the limit or until `deadline` of the monotonic clock, whichever comes first."""
    content, trouble = b"", ""
    while not trouble and (piece := response.raw.read1(ANSWER_LIMIT, decode_content=True)):
        content += piece
        if len(content) > ANSWER_LIMIT:
            trouble = f"the answer is larger than {ANSWER_LIMIT} bytes"
        elif time.monotonic() > deadline:
            trouble = "the answer came too slowly"
    body, text = parse(content), re.sub(r"<[^<>]*>", " ", content.decode("utf-8", errors="replace"))
    # A process that was stopped meanwhile finds a whole body, which was there in time.
    return Answer(response.status_code, response.headers, body, text, "" if body else trouble)
