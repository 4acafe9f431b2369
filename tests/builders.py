"""Test values: tokens, JWTs, answers and markets, with secrets that are easy to find in any output."""

import base64
import html
import json
import os
import signal
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, quote_plus

from tokencore import BaseTokenManager
from tokencore.config.market import Market
from tokencore.config.sources import Found
from tokencore.tokens import Token

KEY = "PSCanaryKey" + "k" * 25
SECRET = "CanarySecret/" + "s" * 160 + "+Canary="
CANARIES = ("Canary", "eyJ")  # parts of the credentials and of every JWT, which no message, repr or record may contain
DAY = timedelta(hours=24)
NOW = datetime(2026, 11, 23, 8, 15, tzinfo=UTC)  # a Monday, 17:15 KST, for functions that take `now`


def forms(text: str) -> set[bytes]:
    """Return the text as bytes, as it is and in every encoding in which a log, file or database may hold it.

    Base64 encodes it differently at each of three offsets; each form is cut to what its neighbours cannot change.
    """
    raw = text.encode()
    dresses = {raw, text.encode("utf-16-le"), raw.hex().encode(), quote(text).encode(), quote_plus(text).encode()}
    dresses |= {json.dumps(text)[1:-1].encode(), json.dumps(text).replace("/", "\\/")[1:-1].encode()}
    dresses |= {html.escape(text).encode(), repr(text)[1:-1].encode()}
    for before in range(3):
        whole = len(raw) - (len(raw) + before) % 3
        packed = base64.b64encode(b"\0" * before + raw[:whole])[4 * (before > 0) :]
        dresses |= {packed, packed.replace(b"+", b"-").replace(b"/", b"_")}
    return dresses


def make_jwt(key: str = KEY, *, life: float = 86_400, issued: datetime | None = None, **claims: object) -> str:
    """Return a JWT of `key` as KIS makes them, valid `life` seconds from `issued` (now); a None claim is left out."""
    iat = int((issued or datetime.now(UTC)).timestamp())
    body = {"iss": "unogw", "iat": iat, "exp": iat + int(life), "jti": key, **claims}
    present = {name: value for name, value in body.items() if value is not None}
    parts = ({"typ": "JWT", "alg": "HS512"}, present)
    return ".".join([*(_base64url(json.dumps(part).encode()) for part in parts), _base64url(b"signature" * 7)])


def make_token(
    life: float = 86_400,
    *,
    age: float = 0,
    now: datetime | None = None,
    text: str | None = None,
    rejected: bool = False,
) -> Token:
    """Return a token issued `age` seconds before `now` (default: the present) and valid for `life` seconds."""
    now = now or datetime.now(UTC)
    issued = now - timedelta(seconds=age)
    text = text or make_jwt(life=life, issued=issued)
    return Token(text, issued + timedelta(seconds=life), issued, rejected_at=now if rejected else None)


def make_answer(life: float = 86_400, *, now: datetime | None = None) -> dict[str, object]:
    """Return tokenP's answer at `now` (default: the present): a token of `life` seconds, its expiry in three forms."""
    now = (now or datetime.now(UTC)).replace(microsecond=0)
    expiry = now + timedelta(seconds=life, hours=9)
    return {
        "access_token": make_jwt(life=life, issued=now),
        "access_token_token_expired": f"{expiry:%Y-%m-%d %H:%M:%S}",
        "token_type": "Bearer",
        "expires_in": int(life),
    }


def make_market(name: str = "us", /, **numbers: object) -> Market:
    """Return a market with the key `KEY` in the real environment; `numbers` are settings fields, such as `buffer`."""
    found = Found()
    found.add("environment", {"KIS_APP_KEY": KEY, "KIS_APP_SECRET": SECRET})
    found.add("environment", {f"KIS_{field.upper()}": str(value) for field, value in numbers.items()})
    found.markets.add(name)
    defaults = {"issue_interval": 60.0, "timeout": 10.0, "max_issues_per_day": 2, "markets": {}, "overrides": {}}
    defaults |= {"all_markets": list, "sharing": lambda _: [], "store": None, "store_keys": []}
    settings: Any = SimpleNamespace(**{**defaults, **numbers})
    return Market(name, found, lambda: settings)


class OwnManager(BaseTokenManager):
    """A user's own manager; two of them may spell the same key differently, with `more` at its end."""

    def __init__(self, prefix: str = "own_", more: str = "", url: str = "") -> None:
        """Use the settings' address, unless another one is given."""
        self.prefix, self.more, self.url = prefix, more, url or os.environ["KIS_BASE_URL"]
        super().__init__()

    def get_api_url(self) -> str:
        """Return the address, with a slash for each character of `more`."""
        return self.url + "/" * len(self.more)

    def get_app_credentials(self) -> tuple[str, str]:
        """Return credentials that are easy to find in any output."""
        return KEY + self.more, SECRET + self.more

    def get_token_file_prefix(self) -> str:
        """Return what the names of its files begin with."""
        return self.prefix


def in_child(work: Callable[[], object]) -> int:
    """Start `work` in a forked process and return its id; it ends with 0, or 1 if `work` raised."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:  # noqa: BLE001 - the child must not go on with the parent's tests
        os._exit(1)
    os._exit(0)


def ended(child: int) -> int:
    """Wait for a process of `in_child` and return its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(child: int) -> None:
    """Kill a process of `in_child` as `kill -9` does, and wait for its end."""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def fill_disk(room: int = 0) -> None:
    """Keep this child from writing files of more than `room` bytes, as on a full disk; -1 lifts the limit."""
    import resource  # not on every platform

    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
