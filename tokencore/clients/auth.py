"""`KISAuth`, for requests: signs calls of KIS's business API, with the token renewed behind the caller's back.

`Signer` is what it shares with `KISHttpxAuth`: the secret headers, for KIS's own address only, and what to do when an
answer says that the token is dead. KIS's call rate (EGW00201) is the caller's affair.
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
PORTS = {"https": ":443", "http": ":80"}  # which httpx, unlike requests, leaves out of an address
SECRET_HEADERS = ("authorization", "appkey", "appsecret")


class Signature(Sensitive):
    """The secret headers of one token, which no repr shows."""

    __slots__ = ("headers", "token")

    def __init__(self, token: str, credentials: tuple[str, str]) -> None:
        """Spell them once: a token serves many thousand requests."""
        self.token = token
        self.headers = dict(zip(SECRET_HEADERS, (f"Bearer {token}", *credentials), strict=True))


class Signer(Sensitive):
    """Signs for one market, from any thread."""

    __slots__ = ("_addresses", "_manager", "_present", "custtype", "market")

    def __init__(self, market: str, custtype: str) -> None:
        """Sign for the configured `market`; credentials and token are asked for with the first request."""
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
        """The headers with a valid token, which is renewed if it must be; `url` as requests and httpx spell it.

        Raises:
            ConfigurationError: that is not KIS's own address; nothing was sent.
            TokenError: there is no valid token and none can be had; nothing was sent.

        """
        if not url.startswith(self._addresses):
            raise self._elsewhere(url)
        present = self._present
        return present if present and present.token == self._manager.get_valid_token() else self._signed(url)

    def signature_at_hand(self, url: str) -> Signature | None:
        """The same where credentials and token are there and no renewal is due; None where `signature` may wait."""
        return self.signature(url) if self._present and self._manager.token_at_hand() else None

    def successor(self, rejected: Signature, url: str) -> Signature | None:
        """Report that KIS rejected a token; a signature with its successor, None where there is none for `url` yet."""
        try:
            self._manager.report_rejected(rejected.token)
            return self._signed(url)
        except TokenError as error:
            _log.warning("KIS rejected the token of %r, and there is no other yet: %s", self.market, error)
            return None

    @sealed
    def _signed(self, url: str) -> Signature:
        """With a new token the credentials are read again, after it: its key, and the address, may be other ones."""
        ask = self._manager  # neither answer becomes a variable, which an error's traceback would show
        self._present = signature = Signature(ask.get_valid_token(), ask.get_app_credentials())
        self._point()
        if not url.startswith(self._addresses):
            raise self._elsewhere(url)
        return signature


@sealed_class()
class KISAuth(Sensitive, AuthBase):
    """`requests` authentication for a market: `requests.get(url, auth=KISAuth("us"))`.

    A token that KIS rejects is reported, and the request is sent once more with its successor. Where there is none
    yet, or the body was a stream, which cannot be sent again, the caller gets KIS's own answer. A session whose retries
    name a status (`Retry(status_forcelist=[500])`) hides KIS's answer, so a rejected token goes unnoticed there. No
    redirect is followed. One object serves any number of threads and sessions.
    """

    def __init__(self, market: str, *, custtype: str = "P") -> None:
        """Sign for the configured `market`; `custtype` is `P` for a person, `B` for a firm.

        Raises:
            ConfigurationError: the settings cannot be read, or the market is not configured.

        """
        self._signer = Signer(market, custtype)

    def __repr__(self) -> str:
        return f"KISAuth({self._signer.market!r})"

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        """Put the headers on `request`.

        Raises:
            ConfigurationError: the request does not go to the market's base URL; nothing was sent.
            TokenError: there is no valid token and none can be had; nothing was sent.

        """
        headers, signature = request.headers, self._signer.signature(request.url or "")
        for name, value in signature.headers.items():  # `update` takes a tenth longer
            headers[name] = value
        headers.setdefault("custtype", self._signer.custtype)
        request.hooks["response"].append(partial(self._answered, signature))
        return request

    @sealed
    def _answered(self, used: Signature, response: Response, **sending: Any) -> Response:  # noqa: ANN401 - requests' own keywords
        response.headers.pop("location", None)  # KIS never redirects: whoever does shall not see the secret as well
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
