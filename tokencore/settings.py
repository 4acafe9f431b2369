"""The settings, validated: every value has a type, every mistake a sentence that names its variable."""

from __future__ import annotations

import difflib
import logging
import re
from datetime import date, time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    SecretStr,
    ValidationError,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from tokencore import market as defaults
from tokencore.clients import target
from tokencore.errors import ConfigurationError
from tokencore.market import ISSUES, SECONDS, TIMEOUTS, credential, folder, items, listed, named, number
from tokencore.sessions import Override, exchange
from tokencore.sources import CONFIG_FILE, Gathered, gather, short

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

_log = logging.getLogger(__name__)
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_TOLD = ("KIS_ACCESS_TOKEN", "KIS_TOKEN_EXPIRES_AT")  # what `get --format env` sets is no mistake
_ALIKE = 0.85  # of two names: a letter or two went wrong
_warned: set[str] = set()  # variables; one line a process is enough


def _https(url: str) -> str:
    parts = urlsplit(url)
    if not url.isascii() or not url.isprintable() or " " in url or parts.port == 0:
        raise ValueError("must be an address without spaces or other signs that none has")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("must be a plain address without user, query or fragment")
    if not parts.hostname or not (parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOOPBACK)):
        raise ValueError("must start with https:// (http:// only on loopback)")
    return url.rstrip("/")


def checked_url(url: str) -> str:
    """`url`, if credentials may be sent there; a manager's own `get_api_url` has passed no validation yet.

    Raises:
        ConfigurationError: it is no https address, nor one on loopback; nothing was sent.

    """
    try:
        return _https(url)
    except ValueError as error:
        raise ConfigurationError(f"The address that get_api_url gives {error}.") from None


def _hours(value: object) -> object:
    if isinstance(value, str):
        opens, _, closes = value.partition("-")
        return opens.strip(), closes.strip()
    return value


def _in_order(hours: tuple[time, time]) -> tuple[time, time]:
    if hours[0] >= hours[1]:
        raise ValueError("must open before it closes")
    return hours


def _traded(name: str) -> str:
    try:
        exchange(name)
    except ConfigurationError as error:
        raise ValueError(str(error)) from None
    return name


def _exported(text: str) -> str:
    target(text, "", "")
    return text


def _mention(text: str) -> str:
    if not all(
        re.fullmatch(r"<(!channel|!here|!everyone|@[UW][A-Z0-9]+|!subteam\^S[A-Z0-9]+)>", who) for who in text.split()
    ):
        raise ValueError(
            "must be mentions as Slack writes them, such as <!channel>, <@U024BE7LH> or <!subteam^S024BE7>"
        )
    return " ".join(text.split())


def _between(lowest: float, highest: float, *, whole: bool = False) -> BeforeValidator:
    return BeforeValidator(lambda value: number(value, lowest, highest, whole=whole))


# What `Market` converts on the path of a cached token is converted here by the same functions, so that both agree.
Url = Annotated[str, AfterValidator(_https)]
Credential = Annotated[SecretStr | None, BeforeValidator(credential)]
Exchange = Annotated[str, AfterValidator(_traded)]
Names = Annotated[list[Exchange], BeforeValidator(listed)]
Exports = Annotated[list[Annotated[str, AfterValidator(_exported)]], BeforeValidator(items)]
Days = Annotated[list[date], BeforeValidator(listed)]
Hours = Annotated[tuple[time, time], BeforeValidator(_hours), AfterValidator(_in_order)]
Folder = Annotated[Path, AfterValidator(lambda path: Path(folder(str(path))))]
Seconds = Annotated[float, _between(*SECONDS)]


class MarketSettings(BaseModel):
    """What one market has of its own; everything else it takes from the settings for all."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    app_key: Credential = None
    app_secret: Credential = None
    environment: Literal["real", "paper"] | None = None
    base_url: Url | None = None
    exchanges: Names | None = None
    exports: Exports = []


class ExchangeSettings(BaseModel):
    """What the user knows better than the calendar: closed days, other hours, extended hours."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    closed: Days = []
    hours: dict[date, Hours] = {}
    extended: bool = False


class _Gathered(PydanticBaseSettingsSource):
    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002 - as inherited
        return self().get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return gather().values


class Settings(BaseSettings):
    """All settings, as `sources.gather` merged them; unknown `KIS_` variables are other programs' affair."""

    model_config = SettingsConfigDict(extra="ignore", hide_input_in_errors=True)

    app_key: Credential = None
    app_secret: Credential = None
    environment: Literal["real", "paper"] = "real"
    base_url: Url | None = None
    token_dir: Folder = Path(defaults.TOKEN_DIR)
    markets: dict[Annotated[str, AfterValidator(named)], MarketSettings] = {}
    exchanges: dict[Exchange, ExchangeSettings] = {}
    issue_interval: Seconds = defaults.ISSUE_INTERVAL
    buffer: Seconds = defaults.BUFFER
    proactive_window: Seconds = defaults.PROACTIVE_WINDOW
    timeout: Annotated[float, _between(*TIMEOUTS)] = defaults.TIMEOUT
    max_issues_per_day: Annotated[int, _between(*ISSUES, whole=True)] = defaults.MAX_ISSUES_PER_DAY
    hts_id: str | None = None
    keyring: str | None = None
    slack_webhook_url: SecretStr | None = None
    slack_bot_token: SecretStr | None = None
    slack_channel: str | None = None
    slack_mention: Annotated[str, AfterValidator(_mention)] = ""
    slack_language: Literal["en", "ko"] = "en"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the signature is pydantic-settings'
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What `sources.gather` found is the one source: one precedence for every caller."""
        return (init_settings,) if init_settings() else (_Gathered(settings_cls),)

    def __reduce__(self) -> str:
        raise TypeError("Settings hold credentials and are not pickled; load them where they are needed")

    @classmethod
    def load(cls, found: Gathered | None = None) -> Self:
        """The validated settings of this process, gathered unless they have just been `found`.

        Raises:
            ConfigurationError: a value is malformed or a source unreadable; cached tokens stay usable.

        """
        found = found or gather()
        _warn_of_spaces(found.values, "KIS_")
        _refuse_unknown(found)
        try:
            return cls(**found.values)
        except ValidationError as error:
            raise ConfigurationError(_sentence(error.errors(include_input=False)[0])) from None


def overrides() -> dict[str, Override]:
    """What the user's settings say about exchanges, by order code.

    Raises:
        ConfigurationError: an exchange is unknown, or the settings are malformed.

    """
    return {
        exchange(name).code: Override(frozenset(own.closed), own.hours, own.extended)
        for name, own in Settings.load().exchanges.items()
    }


def unknown_names() -> dict[str, str]:
    """The `KIS_` names of this process's sources that are no settings, each with the one it resembles, or nothing.

    Another program's are among them; one that resembles a setting of ours is most likely misspelt.

    Raises:
        ConfigurationError: a source exists but cannot be read; the sentence names it.

    """
    known = [*(_variable((field,)) for field in Settings.model_fields), "KIS_SECRETS_DIR"]
    unknown = {}
    for name in gather().origins:
        top, *rest = name.split("__")
        if name.startswith("KIS_") and top not in (*known, *_TOLD):
            alike = difflib.get_close_matches(top, known, 1, _ALIKE)
            unknown[name] = "__".join([*alike, *rest]) if alike else ""
    return unknown


def _variable(path: tuple[int | str, ...]) -> str:
    name = "__".join(step for step in path if isinstance(step, str) and step != "[key]").upper()
    return short(name if name.startswith("SLACK_") else f"KIS_{name}")


def _sentence(error: ErrorDetails) -> str:
    if error["type"] == "extra_forbidden":
        return f"{_variable(error['loc'])} is no setting; see the README for their names, and remove or correct it."
    told = short(error["msg"].removeprefix("Value error, "))
    return f"{_variable(error['loc'])} cannot be used: {told[:1].lower()}{told[1:].rstrip('.')}. Correct or remove it."


def _warn_of_spaces(values: dict[str, Any], above: str) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _warn_of_spaces(value, f"{above}{key.upper()}__")
        elif key in ("app_key", "app_secret") and isinstance(value, str) and value != value.strip():
            name = f"{above}{key.upper()}"
            if name not in _warned:
                _warned.add(name)
                _log.warning("%s has spaces or a newline around it; they were removed.", name)


def _refuse_unknown(found: Gathered) -> None:
    """In our own file an unknown name is a misspelt one; in the environment it may be another program's."""
    for name, origin in found.origins.items():
        top = name.lower().removeprefix("kis_").partition("__")[0]
        if origin == CONFIG_FILE and top not in Settings.model_fields:
            raise ConfigurationError(
                f"{CONFIG_FILE} sets {short(repr(top))}, which is no setting; correct or remove it."
            )
