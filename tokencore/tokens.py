"""The access token as a value, read from every form it is found in: KIS's answer, caches of many tools, a JWT."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone

from tokencore.sealing import Sensitive

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import Any

KST = timezone(timedelta(hours=9), "KST")  # Korea has no daylight saving time
SAME_TOKEN = timedelta(hours=6)  # how long after an issue KIS answers requests with the same token
TRUNCATED = timedelta(seconds=1)  # KIS states whole seconds, so a token may be this much younger than it says
MAX_LENGTH = 4096  # characters; KIS promises at most 350, and the rest leaves room for a change of format
PICKLED = b"\x80"  # how mojito2's file begins
FIRST_YEAR, LAST_YEAR = 2000, 2199  # KIS's API is younger than the first, and this program will not outlive the second

# Other tools' names for the token and its expiry, in lower case with `_` for `-`. A naive time is KST under KIS's own
# names, this machine's zone under names of tools known to write that, and otherwise the earlier of the two.
TOKEN_NAMES = ("access_token", "token", "kis_access_token", "authorization", "accesstoken")
KST_NAMES = ("access_token_token_expired", "expired_at", "token_expired")
LOCAL_NAMES = ("expires_at", "valid_date", "expires_datetime")
OTHER_NAMES = (
    "expiration", "expires", "expire", "expiry", "expires_on", "expiresat", "expire_at", "expire_time", "timestamp",
    "kis_token_expires_at", "token_expires_at", "valid_until",
)  # fmt: skip
ISSUE_NAMES = ("issued_at", "created_at", "cached_at")  # the first one present counts


class Token(Sensitive):
    """An access token with its times; no repr shows its text, and no pickle contains it.

    The text contains the app key, so treat it like the key. The times are aware UTC: `expires_at` is the earliest
    expiry that KIS gave, `cached_at` when its file was written, `rejected_at` when KIS was found to reject it. All but
    `expires_at` may be None, for unknown.
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
        """Take the text unchanged, and the times as aware UTC.

        Raises:
            ValueError: the text is not one word of visible ASCII, or the expiry is not an aware time.
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

    def serves(self, until: datetime, buffer: float) -> bool:
        """Whether the token counts as valid at `until`: it is not rejected, and expires over `buffer` seconds later."""
        return self.rejected_at is None and until < self.expires_at - timedelta(seconds=buffer)

    def same_until(self) -> datetime | None:
        """Return until when KIS would return this same token: six hours after its issue.

        For a token that lives less than a day, such as the sandbox's on a fast clock, it is a quarter of its life,
        which for KIS's 24 hours is the same. None if the issue time is unknown.
        """
        if self.issued_at is None:
            return None
        return self.issued_at + min(SAME_TOKEN, (self.expires_at - self.issued_at) / 4) + TRUNCATED


def longest(found: Iterable[Token | None]) -> Token | None:
    """Return the token that lasts longest, preferring any that is not rejected; None if there is none."""
    known = (token for token in found if token is not None)
    return max(known, key=lambda token: (token.rejected_at is None, token.expires_at), default=None)


def from_answer(answer: Mapping[str, Any], received_at: datetime) -> Token:
    """Return the token in tokenP's answer, with the earliest of the three expiries that the answer may give.

    When KIS returns an earlier token, `expires_in` overstates its life; the JWT's `exp` is not documented.

    Raises:
        ValueError: there is no usable token or no expiry in the answer; the message says which.
    """
    text = answer.get("access_token")
    if not isinstance(text, str) or not text:
        raise ValueError("the answer holds no access_token")
    claims = jwt_claims(text)
    expiries = [*_time(answer.get("access_token_token_expired"), KST), *_time(claims.get("exp"))]
    expiries += _lifetime(answer.get("expires_in"), received_at)
    if not expiries:
        raise ValueError("the answer holds no readable expiry")
    expires_at = min(expiries)
    issued_at = next((at for at in _time(claims.get("iat")) if at < expires_at), received_at)
    return Token(text, expires_at, issued_at)


def from_text(text: str) -> tuple[Token, dict[str, Any]]:
    """Return the token in the text of a file or of standard input, and all fields found there.

    The text may be our own or tokenP's JSON, JSON with other usual names, the official sample's YAML, lines for a
    shell or for Docker, an `Authorization` header, or anything around a single JWT. The earliest expiry wins.

    Raises:
        ValueError: the text holds no token with an expiry.
    """
    content = _fields(text.removeprefix("\ufeff").strip())
    named = (content[name] for name in TOKEN_NAMES if isinstance(content.get(name), str))
    access_token = next(named, None) or _only_jwt(text)
    access_token = access_token.removeprefix("Bearer ").strip()
    claims = jwt_claims(access_token)
    issued = next((content[name] for name in ISSUE_NAMES if content.get(name)), None)
    issues = [*_time(issued), *_time(claims.get("iat"))]
    expiries = [*_expiries(content), *_time(claims.get("exp"))]
    if not expiries:
        raise ValueError("no expiry")
    token = Token(
        access_token,
        min(expiries),
        min(issues, default=None),
        cached_at=next(_time(content.get("cached_at", content.get("created_at"))), None),
        rejected_at=next(_time(content.get("rejected_at")), None),
    )
    return token, content


def to_cache(token: Token, *, now: datetime, environment: str, key_fingerprint: str) -> str:
    """Return the content of a token file: its documented fields, with times as ISO 8601 with offset."""
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
    return json.dumps(content, separators=(",\n ", ": ")) + "\n"  # a field a line; `indent` takes five times as long


def as_answer(token: Token, now: datetime) -> dict[str, object]:
    """Return what tokenP would answer for this token at `now`: its expiry in KST, its remaining life in seconds."""
    return {
        "access_token": token.access_token,
        "access_token_token_expired": f"{token.expires_at.astimezone(KST):%Y-%m-%d %H:%M:%S}",
        "token_type": token.token_type,
        "expires_in": max(0, int((token.expires_at - now).total_seconds())),
    }


def jwts_in(content: bytes) -> list[str]:
    """Return what looks like a JWT in a file of any client; a pickle's parts are listed, not loaded."""
    import pickletools  # neither is on the path of a cached token
    import re

    jwt = re.compile(r"(?<![\w-])[\w-]++\.[\w-]++\.[\w-]++", re.ASCII)  # possessive, so linear in time for any input
    if not content.startswith(PICKLED):
        return jwt.findall(content.decode("utf-8", errors="replace"))
    try:
        return [part for _, part, _ in pickletools.genops(content) if isinstance(part, str) and jwt.fullmatch(part)]
    except Exception:  # noqa: BLE001 - on damaged input pickletools may raise anything
        return []


def jwt_claims(text: str) -> dict[str, Any]:
    """Return the claims of a three-part JWT, unverified, as only KIS has the signing key; empty if it is not one.

    KIS's tokens have `iat`, `exp` and the app key as `jti`.
    """
    from binascii import a2b_base64  # loaded only when needed

    parts = text.split(".")
    if len(parts) != 3:  # noqa: PLR2004 - header, claims, signature
        return {}
    try:
        padded = parts[1].replace("-", "+").replace("_", "/") + "=" * (-len(parts[1]) % 4)
        claims = json.loads(a2b_base64(padded).decode())
    except (ValueError, RecursionError):
        return {}
    return claims if isinstance(claims, dict) else {}


def sane(at: datetime) -> bool:
    """Whether `at` is in a plausible year, so that arithmetic cannot overflow; any other time comes from damage."""
    return FIRST_YEAR <= at.year <= LAST_YEAR


def format_time(at: datetime) -> str:
    """Format a time for people, in KST as in KIS's own notices."""
    return at.astimezone(KST).strftime("%Y-%m-%d %H:%M:%S KST")


def _fields(text: str) -> dict[str, Any]:
    """Return the fields of a JSON object, of lines such as `name: value` or `export NAME=value`, or a bare token."""
    if text.startswith("{"):
        try:
            content = json.loads(text)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        return {str(name).lower().replace("-", "_"): value for name, value in content.items()}
    found: dict[str, Any] = {}
    for line in text.splitlines():
        name, sign, value = line.strip().removeprefix("export ").partition("=" if "=" in line.split(":")[0] else ":")
        if sign:
            found[name.strip().lower().replace("-", "_")] = value.strip().strip("'\"")
    return found


def _only_jwt(text: str) -> str:
    """Return the one JWT in `text`, whatever surrounds it.

    Raises:
        ValueError: there is none, or more than one.
    """
    found = {jwt for jwt in jwts_in(text.encode(errors="replace")) if jwt_claims(jwt)}
    if len(found) != 1:
        raise ValueError("no access_token")
    return found.pop()


def _expiries(content: Mapping[str, Any]) -> Iterator[datetime]:
    for names, zones in ((KST_NAMES, (KST,)), (LOCAL_NAMES, (None,)), (OTHER_NAMES, (KST, None))):
        for name in content.keys() & names:
            for zone in zones:
                yield from _time(content[name], zone)
    for issued_at in _time(content.get("issued_at", content.get("created_at"))):
        yield from _lifetime(content.get("expires_in"), issued_at)


def _time(value: object, zone: timezone | None = None) -> Iterator[datetime]:
    """Yield the time in `value`: ISO 8601, in `zone` (None: this machine's) if it has no offset, or epoch seconds."""
    try:
        if isinstance(value, str) and value.replace(".", "", 1).isdecimal():
            value = float(value)
        if isinstance(value, str):
            at = datetime.fromisoformat(value.strip())
            at = (at.replace(tzinfo=zone) if zone and at.tzinfo is None else at).astimezone(UTC)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            at = datetime.fromtimestamp(value, UTC)
        else:
            return
    except (ValueError, OverflowError, OSError):
        return
    if sane(at):
        yield at


def _lifetime(value: object, received_at: datetime) -> Iterator[datetime]:
    """Yield the end of a life of `value` seconds, a number or its digits as text, that began at `received_at`."""
    try:
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            yield from _time((received_at + timedelta(seconds=float(value))).timestamp())
    except (ValueError, OverflowError):
        return
