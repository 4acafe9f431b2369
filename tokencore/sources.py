"""Where settings come from: the environment, `.env`, a secrets folder, `~/.tokencore/config.toml`.

The first source that knows a name wins. This room only reads and merges text; what the values mean
is `market`'s and `settings`' affair. It stays light because every cached `get` passes through it:
the parsers of `.env` and TOML are imported only where such a file exists.
"""

from __future__ import annotations

import os

from tokencore.errors import ConfigurationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

CONFIG_FILE = "~/.tokencore/config.toml"
DOTENV_FILE = ".env"
SECRET_FILE_LIMIT = 65_536  # bytes; a mounted secret is one short line
TELLING = 20  # signs in a row: no word of a setting has so many, and of a key they would tell too much
TOLD_LENGTH = 400  # characters of a sentence that repeats what it was given
_warned: set[str] = set()  # sentences; once a process is enough
_parsed: dict[bytes, list[tuple[str, Any]]] = {}  # the config file as it was last: a thousand markets take 30 ms
_PREFIXES = ("kis_", "slack_")
_ALIEN = ("kis_secrets_dir",)  # says where to read, is no value itself
_GROUPS = ("markets", "exchanges")  # names with names below them
_LONGEST, _DEEPEST = 200, 8  # of a name: signs, and parts with `__` between them; what is more is no name


class Gathered:
    """The merged settings as text, and which source each came from.

    Attributes:
        values: nested mapping, keys in lower case without the `kis_` prefix, such as
            `{"app_key": "…", "markets": {"us": {"app_key": "…"}}}`; values of files may be typed.
        origins: the source of each value by its variable name in upper case, such as
            `{"KIS_APP_KEY": "environment"}`.

    """

    __slots__ = ("origins", "values")

    def __init__(self) -> None:
        """Start with nothing known."""
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"Gathered({sorted(self.origins)})"

    def __reduce__(self) -> str:
        raise TypeError("the settings hold credentials and are not pickled; gather them where they are needed")

    def add(self, name: str, value: Any, origin: str) -> None:  # noqa: ANN401 - text, or TOML's types
        """Take a value unless an earlier source gave it; empty text counts as not given.

        Raises:
            ConfigurationError: the name stands for a group of settings, goes on where another one ends, or is none.

        """
        name = name.upper()
        if value == "" or name in self.origins:
            return
        if len(name) > _LONGEST or name.count("__") > _DEEPEST or not name.isprintable():
            raise ConfigurationError(f"{origin} has a name that is too long, too deep or not printable; remove it.")
        *path, last = name.lower().removeprefix("kis_").split("__")
        if not path and last in _GROUPS:
            raise ConfigurationError(f"{name} alone sets nothing; set {name}__<NAME>__<FIELD>, and remove {name}.")
        branch: Any = self.values
        for step in path:
            branch = branch.setdefault(step, {}) if isinstance(branch, dict) else branch
        if not isinstance(branch, dict) or isinstance(branch.get(last), dict):
            raise ConfigurationError(f"{short(name)} contradicts a longer or shorter setting of this name; remove one.")
        branch[last] = value
        self.origins[name] = origin


def gather() -> Gathered:
    """All settings of this process, the environment before `.env`, secrets folder and config file.

    Raises:
        ConfigurationError: a source exists but cannot be read; the sentence names it.

    """
    found = Gathered()
    environment = [(k.lower(), v) for k, v in os.environ.items()]
    dotenv = list(_dotenv())
    secrets_dir = dict(pair for pair in [*dotenv, *environment] if pair[1]).get("kis_secrets_dir")
    _take(found, environment, "environment")
    _take(found, dotenv, DOTENV_FILE)
    if secrets_dir:
        _take(found, _secrets(os.path.expanduser(secrets_dir)), secrets_dir)
    for name, value in _config():
        found.add(name, value, CONFIG_FILE)
    return found


def origins() -> dict[str, str]:
    """Where each setting came from, by its variable name: the environment, the file or folder, or the keyring.

    A keyring (KIS_KEYRING) is asked here for each app secret that no other source gives, as a renewal asks it.

    Raises:
        ConfigurationError: a source exists but cannot be read; the sentence names it.

    """
    found = gather()
    service = found.values.get("keyring")
    if service:
        from tokencore.vault import first_secret

        own = [f"KIS_MARKETS__{name.upper()}__APP_SECRET" for name in found.values.get("markets", {})]
        for name in ("KIS_APP_SECRET", *own):
            if name not in found.origins and first_secret(str(service), [name]):
                found.origins[name] = f"keyring {service}"
    return found.origins


def _take(found: Gathered, pairs: Iterable[tuple[str, str]], origin: str) -> None:
    for name, value in pairs:
        if name.startswith(_PREFIXES) and name not in _ALIEN:
            found.add(name, value, origin)


def _dotenv() -> Iterable[tuple[str, str]]:
    if not os.path.exists(DOTENV_FILE):
        return
    from dotenv.parser import parse_stream  # only who has a .env pays for its parser

    path = os.path.abspath(DOTENV_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            lines = list(parse_stream(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{DOTENV_FILE} cannot be read ({_why(error)}); mend or remove it.") from None
    for line in lines:
        if line.error:
            _warn(f"{path}, line {line.original.line}, is no NAME=value, so it is ignored; mend or remove it.")
    values = {line.key: line.value for line in lines if line.key}  # the last one of a name counts
    for name, value in values.items():
        yield name.lower(), value or ""


def _warn(sentence: str) -> None:
    if sentence not in _warned:
        import logging  # only for a mistake

        _warned.add(sentence)
        logging.getLogger("tokencore").warning(sentence)


def _secrets(folder: str) -> Iterable[tuple[str, str]]:
    try:
        with os.scandir(folder) as entries:
            files = sorted((e.name, e.path) for e in entries if e.is_file())
        for name, path in files:
            if name.lower().startswith(_PREFIXES):
                with open(path, encoding="utf-8") as file:
                    yield name.lower(), file.read(SECRET_FILE_LIMIT).strip()
    except (OSError, ValueError) as error:
        shown = "".join(sign if sign.isprintable() else "?" for sign in folder[:TOLD_LENGTH])
        told = "/".join(short(name) for name in shown.split("/"))
        raise ConfigurationError(
            f"KIS_SECRETS_DIR={told} cannot be read ({_why(error)}); point it at a folder with a file per variable.",
        ) from None


def _config() -> Iterable[tuple[str, Any]]:
    path = os.path.expanduser(CONFIG_FILE)
    if not os.path.exists(path):
        return
    try:
        yield from _settings_of(path)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{CONFIG_FILE} cannot be read ({_why(error)}); mend or remove it.") from None


def _settings_of(path: str) -> list[tuple[str, Any]]:
    import tomllib  # only who has a config file pays for its parser

    with open(path, "rb") as file:
        content = file.read()
    found = _parsed.get(content)
    if found is None:
        found = list(_leaves(tomllib.loads(content.decode()), ""))
        _parsed.clear()
        _parsed[content] = found
    return found


def _leaves(tree: dict[str, Any], above: str) -> Iterable[tuple[str, Any]]:
    """Flatten tables into variable names, so that every source speaks of a setting in one way."""
    for key, value in tree.items():
        name = f"{above}__{key}" if above else key.lower()
        if not above and not name.startswith(_PREFIXES):
            name = f"kis_{name}"
        if isinstance(value, dict):
            yield from _leaves(value, name)
        else:
            yield name, value


def _why(error: Exception) -> str:
    return short(getattr(error, "strerror", None) or str(error).splitlines()[0])


def short(text: str) -> str:
    """`text` without words and parts of names that are too long for it: a key, or half of one, in the wrong place."""
    words = (word.split("_") for word in text[:TOLD_LENGTH].split(" "))
    return " ".join("_".join("***" if len(part) >= TELLING else part for part in word) for word in words)
