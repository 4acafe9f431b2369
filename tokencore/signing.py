"""What KIS's business API wants of a request, whichever HTTP client sends it; `auth` and `auth_httpx` put it there.

Four headers, for KIS's own address only, and what to do when an answer says that the token is dead.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tokencore.errors import ConfigurationError, TokenError
from tokencore.manager import TokenManager
from tokencore.refusals import DEAD_TOKEN  # EGW00201, the call rate, is the caller's affair

if TYPE_CHECKING:
    from typing import NoReturn

    Origin = tuple[str, str, int | None]

_log = logging.getLogger("tokencore")
SECRET_HEADERS = ("authorization", "appkey", "appsecret")
_PORTS = {"https": 443, "http": 80}
_DEAD_START = b"EGW0012"  # of both codes: most answers need not be parsed for them


class Signature:
    """The headers of one token, neither shown nor pickled: the secret ones as text, and all four as bytes."""

    __slots__ = ("headers", "raw", "token")

    def __init__(self, token: str, credentials: tuple[str, str], custtype: str) -> None:
        """Spell them once: a token serves many thousand requests."""
        self.token = token
        self.headers = dict(zip(SECRET_HEADERS, (f"Bearer {token}", *credentials), strict=True))
        self.raw = [(name.encode(), value.encode()) for name, value in self.headers.items()]
        self.raw.append((b"custtype", custtype.encode()))

    def __reduce__(self) -> str:
        raise TypeError("a signature holds credentials and is not pickled")


class Signer:
    """Signs for one market, from any thread.

    Attributes:
        prefix: how every address begins that may see the credentials, as clients normally spell it.
        origin: the same as scheme, host and port.

    """

    __slots__ = ("_credentials", "_custtype", "_manager", "_present", "origin", "prefix")

    def __init__(self, market: str, custtype: str) -> None:
        """Sign for the configured `market`; credentials and token are asked for with the first request."""
        self._manager = TokenManager(market)
        self._custtype = custtype
        url = urlsplit(self._manager.get_api_url())
        self.prefix = f"{url.scheme}://{url.netloc}/".lower()
        self.origin: Origin = (url.scheme, url.hostname or "", url.port or _PORTS.get(url.scheme))
        self._credentials: tuple[str, str] | None = None
        self._present: Signature | None = None

    def __repr__(self) -> str:
        return repr(self._manager.market.name)

    def __reduce__(self) -> str:
        raise TypeError("what signs requests knows credentials and is not pickled; make it anew where it is needed")

    def signature(self) -> Signature:
        """The headers with a valid token, which is renewed if it must be.

        Raises:
            TokenError: there is no valid token and none can be had; nothing was sent.

        """
        token, present = self._manager.get_valid_token(), self._present
        return present if present is not None and present.token == token else self._signed(token)

    def signature_for(self, url: str) -> Signature:
        """The same for a request to `url`.

        Raises:
            ConfigurationError: it is another address than KIS's own (scheme, host, port); nothing was sent.
            TokenError: as above.

        """
        if not url.startswith(self.prefix) and _origin(url) != self.origin:
            self.refuse(url)
        token, present = self._manager.get_valid_token(), self._present
        return present if present is not None and present.token == token else self._signed(token)

    def signature_at_hand(self) -> Signature | None:
        """The headers where the token is there and no renewal is due; None where `signature` might wait."""
        token, present = self._manager.token_at_hand(), self._present
        if token is None or (self._credentials is None and self._manager.market.keyring):
            return None
        return present if present is not None and present.token == token else self._signed(token)

    def successor(self, token: str) -> Signature | None:
        """Report that KIS rejected `token`; a signature with its successor, None where there is none yet."""
        try:
            return self._signed(self._manager.report_rejected(token))
        except TokenError as error:
            _log.warning("KIS rejected the token of %r, and there is no other yet: %s", self, error)
            return None

    def refuse(self, url: str) -> NoReturn:
        """Say that `url` is not KIS's."""
        where = url.replace("\\", "/").partition("?")[0].rpartition("@")[2]
        raise ConfigurationError(
            f"The credentials of {self!r} are for {self.prefix} only, and this request goes to {where}: nothing was "
            "sent. Correct the address, or KIS_BASE_URL and KIS_ENVIRONMENT.",
        )

    def _signed(self, token: str) -> Signature:
        if self._credentials is None:
            self._credentials = self._manager.get_app_credentials()
        self._present = signature = Signature(token, self._credentials, self._custtype)
        return signature


def is_json(kind: str | None) -> bool:
    """Whether an answer of this content type can be a refusal of KIS; what cannot is left unread."""
    return kind is not None and "json" in kind


def says_dead(content: bytes) -> bool:
    """Whether this JSON says that KIS takes the token no longer; HTTP's status tells nothing about it."""
    if _DEAD_START not in content:
        return False
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(body, dict) and body.get("msg_cd") in DEAD_TOKEN


def _origin(url: str) -> Origin | None:
    try:
        parts = urlsplit(url)
        port = parts.port or _PORTS.get(parts.scheme)
    except ValueError:
        return None
    if "\\" in url:  # where urllib3 ends the host and urlsplit does not
        return None
    return parts.scheme, parts.hostname or "", port
