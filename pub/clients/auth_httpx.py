"""`KISHttpxAuth`, the counterpart of `KISAuth` for httpx, with `Client` from threads or `AsyncClient` from a loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from tokencore.clients.auth import SECRET_HEADERS, Signer
from tokencore.kis.codes import is_dead
from tokencore.sealing import Sensitive, sealed

try:
    import httpx
    from anyio import CapacityLimiter, to_thread
    from anyio.lowlevel import RunVar
except ImportError as error:
    raise ImportError("KISHttpxAuth needs httpx: pip install 'httpx>=0.28' 'anyio>=4.1'") from error

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator
    from typing import Any

    from tokencore.clients.auth import Signature

_T = TypeVar("_T")
_SECRET = frozenset(name.encode() for name in SECRET_HEADERS)


class KISHttpxAuth(Sensitive, httpx.Auth):
    """`httpx` authentication for a market: `httpx.Client(auth=KISHttpxAuth("us"))`, and likewise `AsyncClient`.

    A token that KIS rejects is reported, and the request is sent once more with its successor. If there is none yet,
    or the body was a stream, which cannot be sent again, the caller gets KIS's own answer. The event loop is never
    blocked: a renewal waits in a thread, and a cached token needs none. The signature appears only on the wire:
    `request.headers` does not show it, and a redirect does not carry it along.
    """

    @sealed
    def __init__(self, market: str, *, custtype: str = "P") -> None:
        """Sign for the configured `market`; `custtype` is `P` for a person or `B` for a firm.

        Raises:
            ConfigurationError: the settings cannot be read, or the market is not configured.
        """
        self._signer = Signer(market, custtype)
        self._turn: RunVar[CapacityLimiter] = RunVar(f"renewal {id(self)}")

    def __repr__(self) -> str:
        return f"KISHttpxAuth({self._signer.market!r})"

    def sync_auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Sign and send `request`; if KIS rejects the token, report that and send once more.

        Raises:
            ConfigurationError: the request does not go to the market's base URL; nothing was sent.
            TokenError: there is no valid token and none could be obtained; nothing was sent.
        """
        url = _spelt(request.url)
        signature = self._signer.signature(url)
        response = yield self._signed(request, signature)
        if is_dead(response.read()):
            successor = self._signer.successor(signature, url)
            if successor and isinstance(request.stream, httpx.ByteStream):
                yield self._signed(request, successor)

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        """Do the same on an event loop, which keeps running while KIS is asked for a token."""
        url = _spelt(request.url)
        signature = self._signer.signature_at_hand(url)
        if signature is None:
            signature = await self._aside(self._signer.signature, url)
        response = yield self._signed(request, signature)
        if is_dead(await response.aread()):
            successor = await self._aside(self._signer.successor, signature, url)
            if successor and isinstance(request.stream, httpx.ByteStream):
                yield self._signed(request, successor)

    async def _aside(self, work: Callable[..., _T], *arguments: Any) -> _T:  # noqa: ANN401 - as the work takes them
        """Run `work` in a thread, one call at a time, so that waits for KIS leave the loop's other threads free."""
        turn = self._turn.get(None) or CapacityLimiter(1)
        self._turn.set(turn)
        return await to_thread.run_sync(work, *arguments, limiter=turn, abandon_on_cancel=True)

    def _signed(self, request: httpx.Request, signature: Signature) -> httpx.Request:
        request.headers.setdefault("custtype", self._signer.custtype)
        headers = _Signed(request.headers)
        headers.signature = signature
        request.headers = headers
        return request


def _spelt(url: httpx.URL) -> str:
    return (url.raw_scheme + b"://" + url.netloc + b"/").decode()


class _Signed(httpx.Headers):
    """A request's headers, with the signature only in `raw`, which is what a transport sends.

    This is because httpx shows headers in a repr, and on a redirect copies all but `authorization`.
    """

    signature: Signature

    def __reduce__(self) -> tuple[type[httpx.Headers], tuple[list[tuple[bytes, bytes]]]]:
        return httpx.Headers, (super().raw,)

    @property
    def raw(self) -> list[tuple[bytes, bytes]]:
        """The headers that are sent: the signature replaces headers of the same names from the caller."""
        own = [(name, value) for name, value in super().raw if name.lower() not in _SECRET]
        return own + [(name.encode(), value.encode()) for name, value in self.signature.headers.items()]
