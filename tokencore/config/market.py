"""A market: its key, its environment, and the few values that a cached token needs, read without pydantic."""

from __future__ import annotations

import os

from tokencore.errors import ConfigurationError
from tokencore.redaction import short
from tokencore.sealing import Sensitive, digest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from tokencore.config.settings import Settings
    from tokencore.config.sources import Found

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
HIGHEST_PORT = 65_535
PAIR = 2  # an app key and its secret
LONGEST_NAME = 100  # characters of a market: it is part of file names
LONGEST = 1024  # characters of a credential, an address, a path; KIS's secrets have 180
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_")
_HOST_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_.")
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


class Market(Sensitive):
    """One market's settings. What a cached token needs is read at once, the rest when first needed."""

    __slots__ = (
        "_app_secret", "_in_keyring", "_load", "_settings", "_timeout",
        "app_key", "base_url", "buffer", "environment", "name", "proactive_window", "store", "token_dir",
    )  # fmt: skip

    def __init__(self, name: str, found: Found, load: Callable[[], Settings]) -> None:
        """Take the values of the market `name` from the merged settings; `load` returns the validated ones.

        Raises:
            ConfigurationError: the market is not configured, or its address is the other environment's. Other errors
                mean that a value cannot be used; `Settings.load()` says which.
        """
        get = found.values.get
        self.name = known(name, found)  # in lower case, such as `us`
        self._load = load
        self._settings: Settings | None = None
        self._timeout: object = get("KIS_TIMEOUT", TIMEOUT)
        self.app_key = credential(get(found.variable(self.name, "APP_KEY")))  # None when not set
        self._app_secret = credential(get(found.variable(self.name, "APP_SECRET")))
        self._in_keyring = found.in_keyring(self.name)
        self.environment: str = get(found.variable(self.name, "ENVIRONMENT"), "real")  # or `paper`
        self.base_url = self._address(found.address_variable(self.name), found.values)
        self.store = bool(get("KIS_STORE"))
        self.token_dir = folder(get("KIS_TOKEN_DIR", TOKEN_DIR))
        self.buffer = number(get("KIS_BUFFER", BUFFER), *SECONDS)  # both in seconds before expiry
        self.proactive_window = number(get("KIS_PROACTIVE_WINDOW", PROACTIVE_WINDOW), *SECONDS)

    def _address(self, variable: str, values: Mapping[str, Any]) -> str:
        url = address(values.get(variable, HOSTS[self.environment]))
        other = "paper" if self.environment == "real" else "real"
        if _parts(url)[1].rstrip(".") == _parts(HOSTS[other])[1]:  # a dot ends a name that is complete
            raise ConfigurationError(
                f"{variable} is the address of the {other} environment, but the market {self.name!r} is set to "
                f"{self.environment}; set KIS_ENVIRONMENT={other}, or remove {variable}."
            )
        return url

    @property
    def settings(self) -> Settings:
        """The validated settings, read when first needed.

        Raises:
            ConfigurationError: one of them cannot be used; cached tokens stay usable.
        """
        self._settings = self._settings or self._load()
        return self._settings

    @property
    def timeout(self) -> float:
        """KIS_TIMEOUT in seconds, without the validated settings, which a caller that waits for another has no use for.

        Raises:
            ConfigurationError: it cannot be used; cached tokens stay usable.
        """
        try:
            return number(self._timeout, *TIMEOUTS)
        except ValueError:
            return self.settings.timeout  # its error says what is wrong

    @property
    def fingerprint(self) -> str:
        """16 hex digits that identify the key at its address without revealing it; of an empty key if none is set."""
        return fingerprint(self.app_key or "", self.base_url)

    @property
    def key_name(self) -> str:
        """The name of the key's token file and of its row in a fleet's store."""
        return key_name(self.fingerprint, self.environment)

    @property
    def exchanges(self) -> tuple[str, ...]:
        """The exchanges on which the market trades, by order code."""
        own = self.settings.markets.get(self.name)
        return DEFAULT_EXCHANGES.get(self.name, ()) if not own or own.exchanges is None else tuple(own.exchanges)

    @property
    def exports(self) -> tuple[str, ...]:
        """The clients whose files follow every renewal, such as `mojito2` or `python-kis:DIR`."""
        own = self.settings.markets.get(self.name)
        return tuple(own.exports) if own else ()

    def identified(self) -> str:
        """Return the app key if a secret is set too, or the keyring may have one.

        Raises:
            ConfigurationError: one of them is not set; the message names the variable.
        """
        if not self.app_key:
            raise self._missing("APP_KEY", "; the keyring holds only its secret" if self._in_keyring else "")
        if not self._app_secret and not self._in_keyring:
            raise self._missing("APP_SECRET")
        return self.app_key

    def credentials(self) -> tuple[str, str]:
        """Return the app key and app secret.

        Raises:
            ConfigurationError: one is not set, or cannot be read from the keyring; the message says what to set.
        """
        self.identified()  # not assigned to a name, so that no traceback's frame has it
        if self._in_keyring:
            self._app_secret = self.settings.in_keyring(self._in_keyring) or self._app_secret
            if not self._app_secret:
                command = f"keyring set {self.settings.keyring} {self._in_keyring[0]}"
                raise self._missing("APP_SECRET", f"; or run `{command}`")
            self._in_keyring = []
        return str(self.app_key), str(self._app_secret)

    @property
    def credentials_digest(self) -> str:
        """8 hex digits that change with the app key or the app secret and reveal neither.

        Raises:
            ConfigurationError: one is not set, or cannot be read from the keyring.
        """
        return digest(*self.credentials(), length=8)

    def given(self, credentials: Callable[[], tuple[str, str]], base_url: str) -> Market:
        """Change this market to the program's own key and address, and return it.

        Raises:
            ConfigurationError: one of them cannot be used; the message names it and does not repeat it.
        """
        given: object = credentials()
        if not isinstance(given, tuple | list) or len(given) != PAIR:
            what = f"The value of get_app_credentials of {self.name!r}"
            raise ConfigurationError(f"{what} must be two texts, the app key and the app secret.")
        try:
            self.app_key, self._app_secret = map(credential, given)
            self.base_url, self._in_keyring = address(base_url), []
        except ValueError as error:
            what = f"The value of get_app_credentials or get_api_url of {self.name!r} {error}."
            raise ConfigurationError(what) from None
        return self

    def _missing(self, field: str, more: str = "") -> ConfigurationError:
        return ConfigurationError(
            f"KIS_{field} is not set for the market {self.name!r}; set KIS_{field} (or "
            f"KIS_MARKETS__{self.name.upper()}__{field}) in the environment, .env or ~/.tokencore/config.toml{more}."
        )


def fingerprint(app_key: str, base_url: str) -> str:
    """Return 16 hex digits that identify a key at an address without revealing the key."""
    return digest("tokencore", base_url, app_key, length=16)


def key_name(fingerprint: str, environment: str) -> str:
    """Return the name under which a key's token is stored."""
    return fingerprint + ("-paper" if environment == "paper" else "")


def named(name: str) -> str:
    """Return `name` in lower case.

    Raises:
        ValueError: it cannot be part of the names of files and variables.
    """
    lower = str(name).lower()
    if not lower or len(lower) > LONGEST_NAME or not _NAME_CHARACTERS.issuperset(lower):
        shown = short(lower)  # it may be a key in the wrong place
        raise ValueError(f"{shown!r} is not a market's name: use letters, digits, - and _")
    return lower


def credential(value: object) -> str | None:
    """Return an app key or secret without the white space around it, None if empty.

    Raises:
        ValueError: it is not one word, or has quotes around it; the message does not repeat it.
    """
    found = value.strip() if isinstance(value, str) else "" if value is None else "no text"
    if found[:1] in ("'", '"') or found[-1:] in ("'", '"'):
        raise ValueError("must not have quotes around it")
    if not found.isascii() or not found.isprintable() or " " in found or len(found) > LONGEST:
        raise ValueError("must be one word of letters, digits and symbols, as KIS shows it")
    return found or None


def address(value: str) -> str:
    """Return a base URL without a trailing slash.

    Raises:
        ValueError: it is neither a plain https address nor http on loopback.
    """
    url = str(value or "").rstrip("/")
    scheme, host, port = _parts(url)
    plain = url.isascii() and url.isprintable() and len(url) <= LONGEST and not set(url) & set(" \\@?#")
    trusted = scheme == "https" or (scheme == "http" and host in _LOOPBACK)
    numbered = port.isdigit() and 0 < int(port) <= HIGHEST_PORT
    if not (plain and trusted and numbered and host and (_HOST_CHARACTERS.issuperset(host) or host in _LOOPBACK)):
        raise ValueError("must be a plain address such as https://host:9443 (http:// only on loopback)")
    return url


def _parts(url: str) -> tuple[str, str, str]:
    """Return scheme and host in lower case, and the port (or 443); urllib would cost a tenth of a cached `get`."""
    scheme, _, rest = url.lower().partition("://")
    host = rest.partition("/")[0]
    port = "443" if ":" not in host.rpartition("]")[2] else host.rpartition(":")[2]
    return scheme, host.removesuffix(f":{port}"), port


def folder(value: str) -> str:
    """Return the absolute path.

    Raises:
        ValueError: it is relative or too long, or its `~` does not resolve.
    """
    path = os.path.expanduser(value)
    if not os.path.isabs(path) or "\0" in path:
        raise ValueError("must be an absolute path, or begin with a ~ that resolves")
    if len(path) > LONGEST:
        raise ValueError("is too long for a path")
    return os.path.abspath(path)


def number(value: Any, lowest: float, highest: float, *, whole: bool = False) -> float:  # noqa: ANN401 - text or number
    """Return `value` as a number.

    Raises:
        ValueError: it is no number, or not between `lowest` and `highest`; the message names both.
    """
    try:
        found = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        found = float("nan")
    if not lowest <= found <= highest or (whole and not found.is_integer()):
        raise ValueError(f"must be a {'whole ' if whole else ''}number from {lowest:g} to {highest:g}")
    return found


def known(name: str, found: Found) -> str:
    """Return `name` in lower case.

    Raises:
        ConfigurationError: no such market is configured; the message names those that are.
    """
    try:
        lower = named(name)
    except ValueError as error:
        raise ConfigurationError(f"{error}.") from None
    if lower not in found.markets and lower not in DEFAULT_EXCHANGES:  # sorting a thousand names takes longer
        raise ConfigurationError(
            f"The market {short(lower)!r} is not configured (known: {', '.join(market_names(found))}); "
            f"set KIS_MARKETS__{short(lower).upper()}__EXCHANGES to the exchanges it trades, such as SEHK."
        )
    return lower


def market_names(found: Found) -> list[str]:
    """Return the configured markets in a stable order: `us`, `kr`, then the user's own by name."""
    return [*DEFAULT_EXCHANGES, *sorted(found.markets - set(DEFAULT_EXCHANGES))]
