"""The access token as a value: its text, when it was issued, when it expires, and what tells us so."""

from __future__ import annotations

from tokencore import flatjson
from tokencore.moments import UTC, datetime, timedelta, timezone

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

KST = timezone(timedelta(hours=9), "KST")  # Korea has no daylight saving time
SAME_TOKEN = timedelta(hours=6)  # KIS answers a request this soon after an issue with the same token
MAX_LENGTH = 4096  # characters; KIS promises at most 350, the rest is room for a change of format


class Token:
    """An access token with its life; its text is shown by no repr and goes into no pickle.

    Attributes:
        access_token: what goes behind `Bearer `. It contains the app key: treat it like one.
        expires_at: aware UTC, the earliest of all that KIS said.
        issued_at: aware UTC, or None when nothing tells.
        token_type: `Bearer`.
        cached_at: aware UTC when its file was written, or None.
        rejected_at: aware UTC when a business call found it dead on the server, else None.

    """

    __slots__ = ("access_token", "cached_at", "expires_at", "issued_at", "rejected_at", "token_type")

    def __init__(
        self,
        access_token: str,
        expires_at: datetime,
        issued_at: datetime | None = None,
        *,
        token_type: str = "Bearer",  # noqa: S107 - a scheme, no password
        cached_at: datetime | None = None,
        rejected_at: datetime | None = None,
    ) -> None:
        """Take the text as it is and the times as aware UTC.

        Raises:
            ValueError: the text is not one word of visible ASCII, or the expiry is no aware time.

        """
        if not 0 < len(access_token) <= MAX_LENGTH or not (access_token.isascii() and access_token.isprintable()):
            raise ValueError("the access_token is no word of visible ASCII")
        if " " in access_token or expires_at.tzinfo is None:
            raise ValueError("the access_token has a space in it, or the expiry no zone")
        self.access_token = access_token
        self.expires_at = expires_at
        self.issued_at = issued_at
        self.token_type = token_type
        self.cached_at = cached_at
        self.rejected_at = rejected_at

    def __repr__(self) -> str:
        return f"Token(expires_at={self.expires_at.isoformat()})"

    def __reduce__(self) -> str:
        raise TypeError("a Token is a secret and is not pickled; ask the manager for it where it is needed")

    def serves(self, until: datetime, buffer: float) -> bool:
        """Whether it still counts as valid at `until`: not rejected, and `buffer` seconds before expiry not reached."""
        return self.rejected_at is None and until < self.expires_at - timedelta(seconds=buffer)

    def same_until(self) -> datetime | None:
        """Until when KIS would hand back this very token: six hours after its issue.

        A token that lives less than a day, such as the sandbox's on a fast clock, has a quarter of its
        life instead; for KIS's 24 hours that is the same.
        """
        if self.issued_at is None:
            return None
        return self.issued_at + min(SAME_TOKEN, (self.expires_at - self.issued_at) / 4)


def from_answer(answer: Mapping[str, Any], received_at: datetime) -> Token:
    """The token in tokenP's answer; the earliest of its three ways to tell the expiry wins.

    A re-returned token's `expires_in` overstates its life, and the format of the token is not
    promised, so none of the three (KST text, the JWT's `exp`, `received_at` + `expires_in`) is trusted alone.

    Raises:
        ValueError: there is no usable token or no expiry in the answer; the sentence says which.

    """
    text = answer.get("access_token")
    if not isinstance(text, str) or not text:
        raise ValueError("the answer holds no access_token")
    claims = jwt_claims(text)
    expiries = [*_kst(answer.get("access_token_token_expired")), *_epoch(claims.get("exp"))]
    expiries += _lifetime(answer.get("expires_in"), received_at)
    if not expiries:
        raise ValueError("the answer holds no readable expiry")
    expires_at = min(expiries)
    issued_at = next((at for at in _epoch(claims.get("iat")) if at < expires_at), received_at)
    return Token(text, expires_at, issued_at)


def from_cache(content: Mapping[str, Any]) -> Token:
    """The token in a cache file, ours or an earlier tool's.

    Ours has `expires_at` and `issued_at` as ISO 8601 with offset. Earlier tools wrote naive local ISO times
    (`expires_at`, `cached_at`) or epoch seconds (`expires_at`, `created_at`). A JWT's own `exp` and `iat`
    count too: the earliest wins.

    Raises:
        ValueError: the content is no token with an expiry.

    """
    text = content.get("access_token")
    if not isinstance(text, str):
        raise ValueError("no access_token")  # noqa: TRY004 - one error for all that is wrong with a file
    claims = jwt_claims(text)
    expiries = [*_time(content.get("expires_at")), *_epoch(claims.get("exp"))]
    told = content.get("issued_at", content.get("created_at", content.get("cached_at")))
    issues = [*_time(told), *_epoch(claims.get("iat"))]
    expiries += _local_life(told, content.get("expires_at"))
    if not list(_time(content.get("expires_at"))):
        raise ValueError("no expires_at")
    return Token(
        text,
        min(expiries),
        min(issues, default=None),
        cached_at=next(_time(content.get("cached_at", content.get("created_at"))), None),
        rejected_at=next(_time(content.get("rejected_at")), None),
    )


def to_cache(token: Token, *, now: datetime, environment: str, key_fingerprint: str) -> dict[str, str]:
    """The content of a token file: the contract's fields, times as ISO 8601 with offset."""
    content = {
        "access_token": token.access_token,
        "expires_at": token.expires_at.isoformat(),
        "cached_at": now.isoformat(),
        "issued_at": (token.issued_at or now).isoformat(),
        "token_type": token.token_type,
        "environment": environment,
        "key_fingerprint": key_fingerprint,
    }
    if token.rejected_at is not None:
        content["rejected_at"] = token.rejected_at.isoformat()
    return content


def jwt_claims(text: str) -> dict[str, Any]:
    """The claims of a three-part JWT, unverified (KIS keeps the key); empty when it is none.

    KIS's tokens carry `iat`, `exp` and, as `jti`, the app key.
    """
    from binascii import a2b_base64  # a plain token must not pay for it

    parts = text.split(".")
    if len(parts) != 3:  # noqa: PLR2004 - header, claims, signature
        return {}
    try:
        padded = parts[1].replace("-", "+").replace("_", "/") + "=" * (-len(parts[1]) % 4)
        claims = flatjson.loads(a2b_base64(padded).decode())
    except (ValueError, RecursionError):
        return {}
    return claims if isinstance(claims, dict) else {}


def _kst(value: object) -> Iterator[datetime]:
    if isinstance(value, str):
        try:
            text = value.strip().replace(":60", ":59")  # a leap second, which `datetime` does not know
            told = datetime.strptime(text, "%Y-%m-%d %H:%M:%S").replace(tzinfo=KST)
            yield from _sane(told.astimezone(UTC))
        except (ValueError, OverflowError):
            return


def _epoch(value: object) -> Iterator[datetime]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            yield from _sane(datetime.fromtimestamp(value, UTC))
        except (ValueError, OverflowError, OSError):
            return


def _lifetime(value: object, received_at: datetime) -> Iterator[datetime]:
    """`expires_in` in seconds, as a number or as digits in text."""
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value.strip()) if len(value) < len("9" * 12) else None
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            yield from _sane(received_at + timedelta(seconds=value))
        except (ValueError, OverflowError):
            return


def _time(value: object) -> Iterator[datetime]:
    """ISO 8601, where a missing offset means this machine's zone, or epoch seconds."""
    if isinstance(value, str):
        try:
            yield from _sane(datetime.fromisoformat(value).astimezone(UTC))
        except (ValueError, OverflowError, OSError):
            return
    else:
        yield from _epoch(value)


def _local_life(issued: object, expires: object) -> Iterator[datetime]:
    """The expiry by the hours between two naive times: a day added to local time is an hour too long in autumn."""
    if isinstance(issued, str) and isinstance(expires, str):
        try:
            begun, ended = datetime.fromisoformat(issued), datetime.fromisoformat(expires)
            if begun.tzinfo is None and ended.tzinfo is None:
                yield from _sane(begun.astimezone(UTC) + (ended - begun))
        except (ValueError, OverflowError, OSError):
            return


def sane(at: datetime) -> bool:
    """Whether arithmetic with it cannot overflow: anything else is damage, not a time."""
    return 2000 <= at.year < 2200  # noqa: PLR2004 - KIS began after the one and this program ends before the other


def _sane(at: datetime) -> Iterator[datetime]:
    if sane(at):
        yield at
