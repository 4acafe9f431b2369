"""Where settings come from: the environment, `.env`, a secrets folder, `~/.tokencore/config.toml`.

The first source that has a name wins. Every cached `get` passes through this module, so it imports only `os` and
`stat`; the parsers of `.env` and TOML are imported where such a file exists.

A `.env` counts only where nobody else can have written it. Even then it may not say where a secret of another source
is sent: the `.env` of a cloned repository is the user's own file.
"""

from __future__ import annotations

import os
import stat

from tokencore.errors import ConfigurationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

CONFIG_FILE = "~/.tokencore/config.toml"
DOTENV_FILE = ".env"
ENVIRONMENT = "environment"
TRUSTED = (ENVIRONMENT, CONFIG_FILE)  # may give an address for any secret
SECRETS_DIR = "KIS_SECRETS_DIR"
FILE_LIMIT = 65_536  # bytes of a file of settings
SHOWN = 400  # characters that a message repeats of what was given
SECRET_LENGTH = 20  # characters in a row: no word of a setting has so many, and of a key they would show too much
PAPER_WORDS = ("virtual", "demo", "vps", "mock", "모의", "모의투자")  # what other tools call the paper environment
_OTHERS = 0o022  # writable by the group, by all
_LINKS = 40  # in a row; no system follows more
_PREFIXES = ("KIS_", "SLACK_", "PREFECT_UI_URL")
_parsed: dict[bytes, dict[str, Any]] = {}  # the last config file: to parse a thousand markets takes 30 ms
_warned: set[str] = set()  # messages; once a process is enough


class Found:
    """The merged settings by variable name in upper case: text, of config.toml also its types, and their sources."""

    __slots__ = ("markets", "origins", "values")

    def __init__(self) -> None:
        """Start with nothing."""
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.markets: set[str] = set()  # those that have a setting of their own

    def add(self, origin: str, values: Mapping[str, Any]) -> None:
        """Take what no earlier source gave; empty text counts as not given, other programs' names do not count."""
        for given, value in values.items():
            name = given.upper()
            if name not in self.values and value != "" and name.startswith(_PREFIXES):
                self.values[name], self.origins[name] = _read_as(name, value), origin
                if name.startswith("KIS_MARKETS__"):
                    self.markets.add(name.split("__")[1].lower())

    def common_address_serves(self, own: str) -> bool:
        """Whether KIS_BASE_URL is also for the market whose variables begin with `own`: it has the same environment."""
        common = self.values.get("KIS_ENVIRONMENT", "real")
        return f"{own}BASE_URL" not in self.values and self.values.get(f"{own}ENVIRONMENT", common) == common

    def __repr__(self) -> str:
        return f"Found({sorted(self.origins)})"

    def __reduce__(self) -> str:
        raise TypeError("the settings hold credentials and are not pickled; read them where they are needed")


def gather() -> Found:
    """All settings of this process.

    Raises:
        ConfigurationError: a source exists but cannot be read, or gives an address for a secret of another source.

    """
    found = Found()
    found.add(ENVIRONMENT, os.environ)
    found.add(DOTENV_FILE, _dotenv())
    if folder := _secrets_dir(found):
        found.add(folder, dict(_secrets(folder)))
    found.add(CONFIG_FILE, _config())
    for name, origin in found.origins.items():
        if origin not in TRUSTED and (name == "KIS_STORE" or name.endswith("BASE_URL")):
            _check_address(name, found)
    return found


def _read_as(name: str, value: Any) -> Any:  # noqa: ANN401 - text, or a type of TOML
    if name.endswith("ENVIRONMENT") and isinstance(value, str) and value.lower() in PAPER_WORDS:
        warn(f"{short(name)}={value} was read as paper; set {short(name)}=paper.")
        return "paper"
    return value


def read_regular(path: str, limit: int = FILE_LIMIT) -> bytes:
    """The content of a file, links followed; a FIFO or a device is not waited for.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a regular file of at most `limit` bytes.

    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # before it is opened: that alone makes some devices act
        raise ValueError("not a regular file")
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("not a regular file")
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"more than {limit} bytes")
    return content


def warn(message: str) -> None:
    """Log `message` as a warning, once a process."""
    if message not in _warned:
        import logging  # only for a mistake

        _warned.add(message)
        logging.getLogger("tokencore").warning(message)


def short(text: str, apart: str = " _") -> str:
    """`text` on one line without words (between the characters `apart`) as long as a key: they may be one."""
    import re  # only for a mistake

    return re.sub(f"[^{apart}]{{{SECRET_LENGTH},}}", "***", _printable(text[:SHOWN]))


def _printable(text: str) -> str:
    return "".join(sign if sign.isprintable() else "?" for sign in text)


def trusted_dotenv() -> dict[str, str]:
    """What `.env` adds to this process's environment, for whoever hands both on to another process.

    Raises:
        ConfigurationError: as from `gather`.

    """
    gather()
    known = {name.upper() for name, value in os.environ.items() if value}
    return {name.upper(): value for name, value in _dotenv().items() if value and name.upper() not in known}


def _secrets_dir(found: Found) -> str:
    """The secrets folder that the environment names, or else the config file; `.env` may not."""
    if found.origins.get(SECRETS_DIR) == DOTENV_FILE:
        raise ConfigurationError(
            f"{SECRETS_DIR} in {place_of(DOTENV_FILE)} is refused, because a .env may not say where secrets come from; "
            f"set it in the environment, or as secrets_dir in {CONFIG_FILE}."
        )
    folder = str(found.values.get(SECRETS_DIR) or _config().get(SECRETS_DIR, ""))
    return folder and os.path.abspath(os.path.expanduser(folder))


def _check_address(name: str, found: Found) -> None:
    """Refuse an address whose users have their secret from another source or, where `.env` gives it, their key."""
    origin, origins = found.origins[name], found.origins
    if name == "KIS_STORE" and origins.get("KIS_STORE_KEYS") != origin:
        raise address_refused(name, origin, "tokens", origins.get("KIS_STORE_KEYS", "another source"))
    for users in _users(name, found):
        givers = {"app secret": _secret_from(users, origins)}
        if origin == DOTENV_FILE:
            givers["app key"] = origins.get(f"{users}APP_KEY") or origins.get("KIS_APP_KEY", "")
        for what, giver in givers.items():
            if giver and giver != origin:
                raise address_refused(name, origin, what, giver)


def _users(name: str, found: Found) -> list[str]:
    """What the variables of those who use the address `name` begin with."""
    if name != "KIS_BASE_URL":
        return [name.removesuffix("BASE_URL")]
    own = (f"KIS_MARKETS__{market.upper()}__" for market in found.markets)
    return ["KIS_", *filter(found.common_address_serves, own)]


def _secret_from(users: str, origins: dict[str, str]) -> str:
    """The source of the secret of those whose variables begin with `users`; empty where there is none."""
    keyring = "the keyring" if "KIS_KEYRING" in origins else ""
    if f"{users}APP_SECRET" in origins or (keyring and users != "KIS_" and f"{users}APP_KEY" in origins):
        return origins.get(f"{users}APP_SECRET", keyring)
    return origins.get("KIS_APP_SECRET", keyring)


def address_refused(name: str, origin: str, what: str, giver: str) -> ConfigurationError:
    """The error for an address of the source `origin` that would get a secret of the source `giver`."""
    place = place_of(origin)
    return ConfigurationError(
        f"{short(name)} in {place} is refused, because it would send there the {what} that {place_of(giver)} gives; "
        f"set {short(name)} in the environment or in {CONFIG_FILE} instead, or remove it from {place}."
    )


def place_of(origin: str) -> str:
    """A source as messages call it."""
    if origin == DOTENV_FILE:
        return _printable(os.path.abspath(origin))
    return "the environment" if origin == ENVIRONMENT else short(origin, " _/")


def _dotenv() -> dict[str, str]:
    """The pairs of `.env`, the last one of each name; none where others can have written it."""
    if not os.path.exists(DOTENV_FILE) or os.path.isdir(DOTENV_FILE):  # a folder of this name is a virtualenv
        return {}
    path = os.path.abspath(DOTENV_FILE)
    try:
        why = _written_by_others(path)
        if not why:
            return _pairs(read_regular(path).decode("utf-8-sig"), path)
    except (OSError, ValueError) as error:
        why = _why(error)
    else:
        warn(f"{_printable(path)} is ignored, because {why}.")
        return {}
    raise ConfigurationError(f"{_printable(path)} cannot be read ({why}); fix or remove it.")


def _pairs(text: str, path: str) -> dict[str, str]:
    import io

    from dotenv.parser import parse_stream

    lines = list(parse_stream(io.StringIO(text)))
    for line in lines:
        if line.error:
            place = f"{_printable(path)}, line {line.original.line},"
            warn(f"{place} is not NAME=value, so it is ignored; fix or remove it.")
    return {line.key: line.value or "" for line in lines if line.key}


def _written_by_others(path: str) -> str:
    """Why the file may be somebody else's, and what to do; empty where it, its folder and its links are safe."""
    if os.name != "posix":
        return ""  # the modes say nothing there
    for _ in range(_LINKS):
        folder = os.path.realpath(os.path.dirname(path))
        if why := _open_to_others(folder):
            return why
        if not os.path.islink(path):
            break
        path = os.path.join(folder, os.readlink(path))
    return _open_to_others(path)


def _open_to_others(path: str) -> str:
    found, shown = os.stat(path), _printable(path)
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        return ""  # is not read anyway
    if found.st_uid not in (0, os.geteuid()):
        return f"{shown} belongs to another user; keep your settings in a folder and a file of your own"
    if not found.st_mode & _OTHERS:
        return ""
    if found.st_mode & stat.S_ISVTX:
        return f"{shown} is open to all users; keep your settings in a folder that only you can write"
    import shlex  # only for a mistake

    return f"others can write {shown}; run `chmod go-w {shlex.quote(shown)}`"


def _secrets(folder: str) -> Iterable[tuple[str, str]]:
    path = folder
    try:
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if e.name.upper().startswith(_PREFIXES) and not e.is_dir())
        for name in names:
            path = os.path.join(folder, name)
            yield name, read_regular(path).decode().strip()
        return  # noqa: TRY300 - raised below, where no error with the file's content is its context
    except (OSError, ValueError) as error:
        why = _why(error)
    raise ConfigurationError(
        f"{SECRETS_DIR}: {short(path, ' _/')} cannot be read ({why}); point it at a folder with a file per variable."
    )


def _config() -> dict[str, Any]:
    path = os.path.expanduser(CONFIG_FILE)
    if not os.path.isabs(path) or not os.path.exists(path):  # without a home there is none, least of all in `./~`
        return {}
    try:
        return _settings_of(read_regular(path))
    except (OSError, ValueError, RecursionError) as error:
        why = _why(error)
    raise ConfigurationError(f"{CONFIG_FILE} cannot be read ({why}); fix or remove it.")


def _settings_of(content: bytes) -> dict[str, Any]:
    import tomllib

    found = _parsed.get(content)
    if found is None:
        found = dict(_leaves(tomllib.loads(content.decode()), ""))
        _parsed.clear()
        _parsed[content] = found
    return found


def _leaves(tree: dict[str, Any], above: str) -> Iterable[tuple[str, Any]]:
    """Flatten tables into variable names, so that every source names a setting in the same way."""
    for key, value in tree.items():
        name = f"{above}__{key}".upper() if above else key.upper()
        if not above and not name.startswith(_PREFIXES):
            name = f"KIS_{name}"
        if isinstance(value, dict):
            yield from _leaves(value, name)
        else:
            yield name, value


def _why(error: Exception) -> str:
    return short(getattr(error, "strerror", None) or str(error).partition("\n")[0])
