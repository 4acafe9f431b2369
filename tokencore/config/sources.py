"""Where settings come from: the environment, `.env`, a secrets folder, `~/.tokencore/config.toml`; the first one wins.

A `.env` counts only if nobody else can have written it. Even then it may not say where a secret of another source is
sent, because a cloned repository's `.env` is owned by the user too. Every cached `get` passes through here, so parsers
are imported only if there is something to parse.
"""

from __future__ import annotations

import os

from tokencore.errors import ConfigurationError
from tokencore.redaction import log, printable, short
from tokencore.sealing import Sensitive, sealed
from tokencore.stores import files, permissions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any, TypeVar

    _Read = TypeVar("_Read")

CONFIG_FILE = "~/.tokencore/config.toml"
DOTENV_FILE = ".env"
ENVIRONMENT = "environment"
TRUSTED = (ENVIRONMENT, CONFIG_FILE)  # may give an address for any secret
SECRETS_DIR = "KIS_SECRETS_DIR"
FILE_LIMIT = 65_536  # bytes; larger files of settings are refused
EXPORT_FOLDERS = {"mojito2": "", "python-kis": "~/.pykis/cache", "kis-auth": "~/KIS/config"}
"""The clients that can be exported to, and the folders where they look; mojito2's file is beside the tokens."""
PAPER_WORDS = ("virtual", "demo", "vps", "mock", "모의", "모의투자")  # what other tools call the paper environment
NOWHERE, NO_KEYS = "nowhere", "KIS_STORE_KEYS is not set in the same place"
_DIR_FIX = f"point {SECRETS_DIR} at a folder with a file per variable"
_PREFIXES = ("KIS_", "SLACK_", "PREFECT_UI_URL")
_FOR_ALERTS = ("SLACK_", "KIS_TOKEN_DIR")
_warned: set[str] = set()  # messages that were logged; once per process is enough
_left: list[str] = []  # the path of the last `.env` found: a program that changes its folder keeps it


class Found(Sensitive):
    """The merged settings by variable name in upper case, and their sources; values are text or config.toml's types."""

    __slots__ = ("markets", "origins", "values")

    def __init__(self) -> None:
        """Start with nothing."""
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.markets: set[str] = set()  # those that have a setting of their own

    def add(self, origin: str, values: Mapping[str, Any]) -> None:
        """Add what no earlier source gave; blank text counts as not given, and other programs' names are ignored."""
        for given, value in values.items():
            name = given.upper()
            if name in self.values or not name.startswith(_PREFIXES) or (isinstance(value, str) and not value.strip()):
                continue
            self.values[name], self.origins[name] = value, origin
            if name.startswith("KIS_MARKETS__"):
                self.markets.add(name.split("__")[1].lower())
            if name.endswith("ENVIRONMENT") and str(value).lower() in PAPER_WORDS:
                warn(f"{short(name)}={value} was read as paper; set {short(name)}=paper.")
                self.values[name] = "paper"

    def variable(self, market: str, field: str) -> str:
        """Return the variable that gives a field of the market: its own if that is set, else the common one."""
        own = f"KIS_MARKETS__{market.upper()}__{field}"
        return own if own in self.values else f"KIS_{field}"

    def address_variable(self, market: str) -> str:
        """Return the variable of the market's base URL; the common one serves only markets of its own environment."""
        name, common = self.variable(market, "BASE_URL"), self.values.get("KIS_ENVIRONMENT", "real")
        if name == "KIS_BASE_URL" and self.values.get(self.variable(market, "ENVIRONMENT"), common) != common:
            return f"KIS_MARKETS__{market.upper()}__BASE_URL"
        return name

    def destinations(self, market: str) -> list[str]:
        """Return the variables that say where tokens and secrets go: the store, and exports if not all in the home."""
        name = f"KIS_MARKETS__{market.upper()}__EXPORTS"
        wanted = str(self.values.get(name, ""))
        return ["KIS_STORE", name] if ":" in wanted or "mojito2" in wanted else ["KIS_STORE"]

    def in_keyring(self, market: str) -> list[str]:
        """Return the variables to ask the keyring for, in this order: only those that no other source gives."""
        own = f"KIS_MARKETS__{market.upper()}__"
        if "KIS_KEYRING" not in self.values or f"{own}APP_SECRET" in self.values:
            return []
        of_market = [f"{own}APP_SECRET"] if f"{own}APP_KEY" in self.values else []
        return of_market + ([] if "KIS_APP_SECRET" in self.values else ["KIS_APP_SECRET"])


@sealed
def gather() -> Found:
    """Return all settings of this process.

    Raises:
        ConfigurationError: a source exists but cannot be read, or gives an address for a secret of another source.
    """
    found = Found()
    found.add(ENVIRONMENT, os.environ)
    found.add(DOTENV_FILE, _dotenv())
    if found.origins.get(SECRETS_DIR) == DOTENV_FILE:
        raise ConfigurationError(
            f"{SECRETS_DIR} in {place_of(DOTENV_FILE)} is refused, because a .env may not say where secrets come from; "
            f"set it in the environment, or as secrets_dir in {CONFIG_FILE}."
        )
    config = _config()
    if folder := str(found.values.get(SECRETS_DIR) or config.get(SECRETS_DIR, "")):
        folder = _readable(str, folder, _DIR_FIX)  # absolute
        found.add(folder, _secrets(folder))
    found.add(CONFIG_FILE, config)
    _check_addresses(found)
    return found


@sealed
def gather_for_alerts() -> Found:
    """Return what alerts need, from every source that can be read: to report that the settings cannot be used."""
    found = Found()
    sources: tuple[tuple[str, Callable[[], Mapping[str, Any]]], ...] = (
        (ENVIRONMENT, lambda: os.environ),
        (DOTENV_FILE, _dotenv),
        (SECRETS_DIR, lambda: _secrets(folder) if (folder := found.values.get(SECRETS_DIR)) else {}),
        (CONFIG_FILE, _config),
    )
    for origin, read in sources:
        try:
            given = read()
        except ConfigurationError:  # this may be what is to be reported
            continue
        names = _FOR_ALERTS if origin == DOTENV_FILE else (*_FOR_ALERTS, "KIS_STORE", SECRETS_DIR)  # addresses
        found.add(origin, {name: value for name, value in given.items() if name.upper().startswith(names)})
    return found


@sealed
def trusted_dotenv() -> dict[str, str]:
    """Return what `.env` adds to this process's environment, for callers that pass both on.

    Raises:
        ConfigurationError: a source of settings cannot be used; see `gather`.
    """
    gather()
    known = {name.upper() for name, value in os.environ.items() if value}
    return {name.upper(): value for name, value in _dotenv().items() if value and name.upper() not in known}


def _check_addresses(found: Found) -> None:
    """Refuse addresses and export folders of another source than the secret that goes there or, in `.env`, the key."""
    origins = found.origins
    check_address("KIS_STORE", found, "store keys", origins.get("KIS_STORE_KEYS", NOWHERE))
    for market in ("", *sorted(found.markets)):  # the empty name: all that have no settings of their own
        secret = "the keyring" if found.in_keyring(market) else origins.get(found.variable(market, "APP_SECRET"), "")
        for name in (found.address_variable(market), *found.destinations(market)):
            check_address(name, found, "app secret", secret)
            if origins.get(name) == DOTENV_FILE:
                check_address(name, found, "app key", origins.get(found.variable(market, "APP_KEY"), ""))


def check_address(name: str, found: Found, what: str, giver: str) -> None:
    """Check that the address in the variable `name` may receive `what`, which the source `giver` gives.

    Raises:
        ConfigurationError: neither that source nor a trusted one gives the address; nothing was sent.
    """
    origin, verb = found.origins.get(name, ENVIRONMENT), "copy" if name.endswith("EXPORTS") else "send"
    if origin in TRUSTED or giver in ("", origin):
        return
    place, what = place_of(origin), f"tokens of the {what}" if name == "KIS_STORE" else what
    why = f"it would {verb} the {what} from {place_of(giver)} there" if giver != NOWHERE else NO_KEYS
    raise ConfigurationError(
        f"{short(name)} in {place} is refused, because {why}; set {short(name)} in the environment or in {CONFIG_FILE} "
        f"instead, or remove it from {place}."
    )


def place_of(origin: str) -> str:
    """Return the name of a source for messages."""
    if origin == DOTENV_FILE:
        return printable(_path_of(origin))
    return "the environment" if origin == ENVIRONMENT else short(origin, " _/")


def warn(message: str) -> None:
    """Log `message` as a warning, once per process."""
    if message not in _warned:
        _warned.add(message)
        log().warning(message)


def _dotenv() -> dict[str, str]:
    """Return the pairs of `.env`, the last one of each name; none if others can have written it."""
    if os.path.exists(DOTENV_FILE):
        _left[:] = [os.path.abspath(DOTENV_FILE)]
    if not _left or not os.path.exists(_left[0]) or os.path.isdir(_left[0]):  # a folder of this name is a virtualenv
        return {}
    shown = place_of(DOTENV_FILE)
    if fault := _readable(lambda path: _stranger(path, lenient=False), DOTENV_FILE):
        why = printable(fault[0])
        warn(f"{shown} is ignored, because {why}; keep it in a folder that only you can write (chmod go-w both).")
        return {}
    import io

    from dotenv.parser import parse_stream

    lines = list(parse_stream(io.StringIO(_readable(_text, DOTENV_FILE))))
    for line in lines:
        if line.error:
            warn(f"{shown}, line {line.original.line}, is not NAME=value, so it is ignored; fix or remove it.")
    return {line.key: line.value or "" for line in lines if line.key}


def _stranger(path: str, *, lenient: bool) -> tuple[str, str] | None:
    """Return what `permissions.stranger` says of the file, its folder, or its links and their folders."""
    while True:
        folder = os.path.realpath(os.path.dirname(path))
        fault = permissions.stranger(folder, os.stat(folder), lenient=lenient)
        if fault or not os.path.islink(path):
            break
        path = os.path.join(folder, os.readlink(path))
    if not fault and os.path.isfile(path):  # nothing else is read anyway
        fault = permissions.stranger(path, os.stat(path), lenient=lenient)
    return fault


def _secrets(folder: str) -> dict[str, str]:
    ours = [name for name in sorted(_readable(os.listdir, folder, _DIR_FIX)) if name.upper().startswith(_PREFIXES)]
    paths = {name: os.path.join(folder, name) for name in ours}
    return {name: _readable(_text, path, _DIR_FIX).strip() for name, path in paths.items() if not os.path.isdir(path)}


def _config() -> dict[str, Any]:
    path = os.path.expanduser(CONFIG_FILE)
    if not os.path.isabs(path) or not os.path.exists(path):  # without a home there is none, and none in `./~`
        if os.path.isdir(folder := os.path.dirname(path)) and not os.access(folder, os.X_OK):  # made by root, perhaps
            warn(f"{CONFIG_FILE} does not count, because its folder is closed to this user; fix its owner and mode.")
        return {}
    import tomllib

    found = _readable(lambda path: dict(_leaves(tomllib.loads(_text(path)), "")), CONFIG_FILE)
    if fault := _readable(lambda path: _stranger(path, lenient=True), CONFIG_FILE):
        raise ConfigurationError(
            f"{CONFIG_FILE} is refused, because other users can write it or its folder, and it may say where secrets "
            f"are sent; look whether it is still yours, then run `{fault[1]}`."
        )
    return found


def _leaves(tree: dict[str, Any], above: str) -> Iterable[tuple[str, Any]]:
    """Yield the values of all tables, by the names of variables."""
    for key, value in tree.items():
        name = f"{above}__{key}".upper() if above else key.upper()
        if not above and not name.startswith(_PREFIXES):
            name = f"KIS_{name}"
        if isinstance(value, dict):
            yield from _leaves(value, name)
        else:
            yield name, value


def _path_of(origin: str) -> str:
    return _left[0] if origin == DOTENV_FILE and _left else os.path.abspath(os.path.expanduser(origin))


def _text(path: str) -> str:
    content = files.read_bytes(os.path.realpath(path), FILE_LIMIT, trusted=False)
    if content is None:
        raise ValueError("it is not there any more")
    return content.decode("utf-8-sig")


def _readable(read: Callable[[str], _Read], place: str, fix: str = "fix or remove it") -> _Read:
    try:
        return read(_path_of(place))
    except (OSError, ValueError, RecursionError) as error:
        why = short(getattr(error, "strerror", None) or str(error).partition("\n")[0])
        raise ConfigurationError(f"{place_of(place)} cannot be read ({why}); {fix}.") from None
