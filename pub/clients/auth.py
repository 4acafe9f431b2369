"""`KISAuth`, for requests: signs calls to KIS's business API and renews the token without the caller's help.

`Signer` is the part shared with `KISHttpxAuth`: it makes the secret headers, only for KIS's own address, and handles
answers that say that the token is dead. Staying within KIS's call rate (EGW00201) is up to the caller.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

from requests.auth import AuthBase

from tokencore.errors import ConfigurationError, TokenError
from tokencore.kis.codes import is_dead
from tokencore.manager import TokenManager
from tokencore.sealing import Sensitive, sealed, sealed_class

if TYPE_CHECKING:
    from typing import Any

    from requests import PreparedRequest, Response

_log = logging.getLogger("tokencore")
PORTS = {"https": ":443", "http": ":80"}  # default ports, which httpx, unlike requests, drops from an address
SECRET_HEADERS = ("authorization", "appkey", "appsecret")


class Signature(Sensitive):
    """The secret headers for one token, which no repr shows."""

    __slots__ = ("headers", "token")

    def __init__(self, token: str, credentials: tuple[str, str]) -> None:
        """Build the headers once, as a token serves many thousands of requests."""
        self.token = token
        self.headers = dict(zip(SECRET_HEADERS, (f"Bearer {token}", *credentials), strict=True))


class Signer(Sensitive):
    """Signs requests for one market, from any thread."""

    __slots__ = ("_addresses", "_manager", "_present", "custtype", "market")

    def __init__(self, market: str, custtype: str) -> None:
        """Sign for the configured `market`; credentials and token are read at the first request."""
        self._manager = TokenManager(market)
        self._present: Signature | None = None
        self._point()
        self.custtype = custtype
        self.market = self._manager.market.name

    def _point(self) -> None:
        address = "/".join(self._manager.get_api_url().lower().split("/")[:3])
        port = PORTS[address.partition(":")[0]]
        spellings = {address, address.removesuffix(port)} if address.endswith(port) else {address, address + port}
        self._addresses = tuple(f"{one}/" for one in spellings)

    def _elsewhere(self, url: str) -> ConfigurationError:
        where = url.replace("\\", "/").partition("?")[0].rpartition("@")[2]
        own = self._manager.get_api_url()
        return ConfigurationError(
            f"The credentials of {self.market!r} are for {own}/ only, and this request goes to {where}: "
            "nothing was sent. Correct the address, or KIS_BASE_URL and KIS_ENVIRONMENT.",
        )

    def signature(self, url: str) -> Signature:
        """Return the headers with a valid token, renewed if necessary; `url` is as requests or httpx spells it.

        Raises:
            ConfigurationError: `url` is not at KIS's own address; nothing was sent.
            TokenError: there is no valid token and none could be obtained; nothing was sent.
        """
        if not url.startswith(self._addresses):
            raise self._elsewhere(url)
        present = self._present
        return present if present and present.token == self._manager.get_valid_token() else self._signed(url)

    def signature_at_hand(self, url: str) -> Signature | None:
        """Return the same headers if nothing has to be waited for; None if `signature` might wait for a renewal."""
        return self.signature(url) if self._present and self._manager.token_at_hand() else None

    def successor(self, rejected: Signature, url: str) -> Signature | None:
        """Report that KIS rejected a token; return a signature with its successor, None if `url` has none yet."""
        try:
            self._manager.report_rejected(rejected.token)
            return self._signed(url)
        except TokenError as error:
            _log.warning("KIS rejected the token of %r, and there is no other yet: %s", self.market, error)
            return None

    @sealed
    def _signed(self, url: str) -> Signature:
        """Sign with the current token, reading the credentials after it: with a new one, key and address may differ."""
        ask = self._manager  # neither answer is kept in a variable, where a traceback could show it
        self._present = signature = Signature(ask.get_valid_token(), ask.get_app_credentials())
        self._point()
        if not url.startswith(self._addresses):
            raise self._elsewhere(url)
        return signature


@sealed_class()
class KISAuth(Sensitive, AuthBase):
    """`requests` authentication for a market: `requests.get(url, auth=KISAuth("us"))`.

    A token that KIS rejects is reported, and the request is sent once more with its successor. If there is none yet,
    or the body was a stream, which cannot be sent again, the caller gets KIS's own answer. A session that retries on
    statuses (`Retry(status_forcelist=[500])`) hides KIS's answer, so a rejected token goes unnoticed there. Redirects
    are not followed. One object can be used by any number of threads and sessions.
    """

    def __init__(self, market: str, *, custtype: str = "P") -> None:
        """Sign for the configured `market`; `custtype` is `P` for a person or `B` for a firm.

        Raises:
            ConfigurationError: the settings cannot be read, or the market is not configured.
        """
        self._signer = Signer(market, custtype)

    def __repr__(self) -> str:
        return f"KISAuth({self._signer.market!r})"

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        """Add the headers to `request`.

        Raises:
            ConfigurationError: the request does not go to the market's base URL; nothing was sent.
            TokenError: there is no valid token and none could be obtained; nothing was sent.
        """
        headers, signature = request.headers, self._signer.signature(request.url or "")
        for name, value in signature.headers.items():  # a tenth faster than `update`
            headers[name] = value
        headers.setdefault("custtype", self._signer.custtype)
        request.hooks["response"].append(partial(self._answered, signature))
        return request

    @sealed
    def _answered(self, used: Signature, response: Response, **sending: Any) -> Response:  # noqa: ANN401 - requests' own keywords
        response.headers.pop("location", None)  # KIS never redirects, and whoever does must not get the secret
        request = response.request
        if not is_dead(response.content):
            return response
        successor = self._signer.successor(used, request.url or "")
        if successor is None or not isinstance(request.body, str | bytes | None):
            return response
        again = request.copy()
        again.headers.update(successor.headers)
        response.close()
        retried: Response = response.connection.send(again, **sending)
        retried.headers.pop("location", None)
        retried.history.append(response)
        retried.request = again
        return retried
