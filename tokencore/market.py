"""A market: the scope that a token file serves, with its key, its environment and its rules in numbers."""

from __future__ import annotations

import os

from tokencore.errors import ConfigurationError
from tokencore.sources import CONFIG_FILE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from hashlib import sha256
    from typing import Any
else:
    try:  # OpenSSL's hashlib costs a cached `get` 3 ms; the interpreter's own SHA-256 costs nothing
        from _sha2 import sha256
    except ImportError:
        from _sha256 import sha256

HOSTS = {
    "real": "https://openapi.koreainvestment.com:9443",
    "paper": "https://openapivts.koreainvestment.com:29443",
}
TOKEN_DIR = "~/.tokencore"  # noqa: S105 - a folder
ISSUE_INTERVAL = 60.0  # seconds between issue requests of a key: KIS's EGW00133
BUFFER = 300.0  # seconds before expiry in which a token no longer counts as valid
PROACTIVE_WINDOW = 1800.0  # seconds before expiry in which a renewal is tried ahead
TIMEOUT = 10.0  # seconds to connect, and to wait for an answer
MAX_ISSUES_PER_DAY = 2  # in any 24 hours; KIS asks for one
SECONDS, TIMEOUTS, ISSUES = (0, 86_400), (0.001, 300), (1, 24)  # lowest and highest that make sense
DEFAULT_EXCHANGES = {"us": ("NASD", "NYSE", "AMEX"), "kr": ("KRX",)}
KEY_LENGTH = 36  # characters of an app key; secrets and tokens have more
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_")


class Market:
    """One market's settings, converted but not validated: plain enough for the path of a cached token.

    Attributes:
        name: the market, in lower case, such as `us`.
        app_key, app_secret: the credentials; None when not set, the secret also while it is only in a keyring.
        environment: `real` or `paper`.
        base_url: where KIS is asked, without a trailing slash.
        token_dir: absolute folder of the token files.
        keyring: the service in the system's keyring that has secrets; empty for none.
        exchanges: what the market trades, as the user wrote it.
        issue_interval, buffer, proactive_window, timeout: seconds.
        max_issues_per_day: the ceiling of issuances in any 24 hours.

    """

    __slots__ = (
        "_in_keyring", "app_key", "app_secret", "base_url", "buffer", "environment", "exchanges", "issue_interval",
        "keyring", "max_issues_per_day", "name", "proactive_window", "timeout", "token_dir",
    )  # fmt: skip

    def __init__(self, name: str, values: Mapping[str, Any]) -> None:
        """Convert the merged settings `values` (see `sources.Gathered`) for the market `name`.

        Raises:
            ConfigurationError: the name is no market's, or it is not configured.
            ValueError: a value cannot be used; `Settings.load()` then says which and why.

        """
        own = _own_values(name, values)
        self.name = name
        self.app_key = credential(own.get("app_key")) or credential(values.get("app_key"))
        self.app_secret = credential(own.get("app_secret")) or credential(values.get("app_secret"))
        self.keyring = _text(values.get("keyring", ""))
        self._in_keyring = _variables_in_keyring(name, own, values) if self.keyring else []
        common = _environment(values.get("environment", "real"))
        self.environment = _environment(own.get("environment", common))
        self.base_url = _base_url(own, values if self.environment == common else {}, self.environment)
        self.token_dir = folder(values.get("token_dir", TOKEN_DIR))
        self.exchanges = listed(own.get("exchanges", DEFAULT_EXCHANGES.get(name, ())))
        self.issue_interval = number(values.get("issue_interval", ISSUE_INTERVAL), *SECONDS)
        self.buffer = number(values.get("buffer", BUFFER), *SECONDS)
        self.proactive_window = number(values.get("proactive_window", PROACTIVE_WINDOW), *SECONDS)
        self.timeout = number(values.get("timeout", TIMEOUT), *TIMEOUTS)
        self.max_issues_per_day = int(number(values.get("max_issues_per_day", MAX_ISSUES_PER_DAY), *ISSUES, whole=True))

    def identified(self) -> str:
        """The app key, where a secret is set too or may be in the keyring, which is not asked.

        Raises:
            ConfigurationError: one of them is not set; the sentence names the variable.

        """
        if not self.app_key:
            raise self._missing("APP_KEY", "; the keyring keeps its secret only" if self.keyring else "")
        if not self.app_secret and not self._in_keyring:
            raise self._missing("APP_SECRET")
        return self.app_key

    def credentials(self) -> tuple[str, str]:
        """The app key and app secret; the keyring is asked once for what no other source gives.

        Raises:
            ConfigurationError: one of them is not set, or the keyring cannot be used.

        """
        app_key = self.identified()
        if self._in_keyring:
            from tokencore.vault import first_secret  # not on the path of a cached token

            self.app_secret = credential(first_secret(self.keyring, self._in_keyring)) or self.app_secret
            if not self.app_secret:
                raise self._missing("APP_SECRET", f"; or run `keyring set {self.keyring} {self._in_keyring[0]}`")
            self._in_keyring = []
        return app_key, str(self.app_secret)

    def _missing(self, field: str, more: str = "") -> ConfigurationError:
        return ConfigurationError(
            f"KIS_{field} is not set for the market {self.name!r}; set KIS_{field} (or "
            f"KIS_MARKETS__{self.name.upper()}__{field}) in the environment, .env or {CONFIG_FILE}{more}.",
        )

    def __repr__(self) -> str:
        return f"Market({self.name!r}, {self.environment!r}, {self.base_url!r})"

    def __reduce__(self) -> str:
        raise TypeError("a Market holds credentials and is not pickled; make it anew where it is needed")


def market_names(values: Mapping[str, Any]) -> list[str]:
    """The configured markets in a stable order: `us`, `kr`, then the user's own by name."""
    return [*DEFAULT_EXCHANGES, *sorted(set(values.get("markets", {})) - set(DEFAULT_EXCHANGES))]


def digest(*parts: str, length: int) -> str:
    """So many hex digits that change with any of the parts and tell none of them."""
    return sha256("\0".join(parts).encode()).hexdigest()[:length]


def fingerprint(app_key: str, base_url: str) -> str:
    """16 hex digits that name a key in an environment without telling the key."""
    return digest("tokencore", base_url, app_key, length=16)


def credential(value: Any) -> str | None:  # noqa: ANN401 - text, or a TOML type
    """An app key or secret without the white space around it; None for nothing.

    Raises:
        ValueError: it cannot be one; the words do not repeat it.

    """
    text = "" if value is None else _text(value).strip()
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("must be one word of letters, digits and signs, as KIS shows it")
    return text or None


def folder(value: Any) -> str:  # noqa: ANN401 - text, or a TOML type
    """An absolute path from one that may begin with `~`."""
    return os.path.abspath(os.path.expanduser(_text(value)))


def number(value: Any, lowest: float, highest: float, *, whole: bool = False) -> float:  # noqa: ANN401 - text or number
    """`value` as a number between two others.

    Raises:
        ValueError: it is none, or not between them; the words name both.

    """
    try:
        found = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        found = float("nan")
    if not lowest <= found <= highest or (whole and not found.is_integer()):
        raise ValueError(f"must be a {'whole ' if whole else ''}number from {lowest:g} to {highest:g}")
    return found


def listed(value: Any) -> tuple[str, ...]:  # noqa: ANN401 - text with commas, or a TOML list
    """The upper-case `items`."""
    return tuple(item.upper() for item in items(value))


def items(value: Any) -> tuple[str, ...]:  # noqa: ANN401 - text with commas, or a TOML list
    """The items of `A, B`, `["A", "B"]` as text, or of a list; other types stay for the validator."""
    if isinstance(value, str):
        value = value.strip().strip("[]").replace('"', "").split(",")
    if not isinstance(value, list | tuple):
        raise ValueError("must be names separated by commas")  # noqa: TRY004 - pydantic words ValueError
    return tuple(str(item).strip() for item in value if str(item).strip())


def named(name: str) -> str:
    """`name`, if files and variables can bear it.

    Raises:
        ValueError: they cannot.

    """
    if not name or not _NAME_CHARACTERS.issuperset(name):
        shown = repr(name) if len(name) < KEY_LENGTH else "What was given"  # a key, perhaps, in the wrong place
        raise ValueError(f"{shown} is no market's name: use letters, digits, - and _ in lower case")
    return name


def _own_values(name: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        named(name)
    except ValueError as error:
        raise ConfigurationError(f"{error}.") from None
    if name not in DEFAULT_EXCHANGES and name not in values.get("markets", {}):
        raise ConfigurationError(
            f"The market {name!r} is not configured (known: {', '.join(market_names(values))}); "
            f"set KIS_MARKETS__{name.upper()}__EXCHANGES to the exchanges it trades, such as SEHK.",
        )
    own = values.get("markets", {}).get(name, {})
    if not isinstance(own, dict):
        raise ValueError(name)  # noqa: TRY004 - settings.load() says it better
    return own


def _variables_in_keyring(name: str, own: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """Which variables to ask a keyring for, in this order: only those that no other source gives."""
    if own.get("app_secret"):
        return []
    of_market = [f"KIS_MARKETS__{name.upper()}__APP_SECRET"] if own.get("app_key") else []
    return of_market + ([] if values.get("app_secret") else ["KIS_APP_SECRET"])


def _base_url(own: Mapping[str, Any], common: Mapping[str, Any], environment: str) -> str:
    """The market's own URL, else the one for all markets of its environment, else the environment's host."""
    return _text(own.get("base_url") or common.get("base_url") or HOSTS[environment]).rstrip("/")


def _environment(value: Any) -> str:  # noqa: ANN401 - text, or a TOML type
    if value not in tuple(HOSTS):
        raise ValueError("environment")
    return str(value)


def _text(value: Any) -> str:  # noqa: ANN401 - text, or a TOML type that settings will refuse
    if isinstance(value, str):
        return value
    raise ValueError(type(value).__name__)
