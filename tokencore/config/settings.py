"""The settings, validated: every value has a type, every mistake a message that names its variable."""

from __future__ import annotations

import difflib
import re
from datetime import date, time
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, SecretStr, ValidationError, WrapValidator
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from tokencore.calendars.sessions import Override, exchange
from tokencore.config import market as values
from tokencore.config.market import ISSUES, SECONDS, TIMEOUTS, Market
from tokencore.config.sources import (
    CONFIG_FILE,
    EXPORT_FOLDERS,
    SECRETS_DIR,
    Found,
    gather,
    gather_for_alerts,
    place_of,
    warn,
)
from tokencore.errors import ConfigurationError
from tokencore.redaction import short
from tokencore.sealing import Sensitive, sealed, sealed_class

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pydantic import ValidatorFunctionWrapHandler
    from pydantic_core import ErrorDetails

_REAL_WORDS = ("real", "live", "prod", "production", "false", "0", "no", "실전", "실전투자")
PAPER_SIGNS = ("KIS_ENV", "KIS_MODE", "KIS_IS_PAPER", "KIS_ACCOUNT_TYPE")  # what other tools call KIS_ENVIRONMENT
_OUTPUT = ("KIS_ACCESS_TOKEN", "KIS_TOKEN_EXPIRES_AT")  # set by `get --format env`, so not a mistake
_ALIKE = 0.85  # similarity of names that differ in a letter or two


def _items(value: object) -> object:
    """Return the items of `A, B` or `["A", "B"]` as text; anything else is left to the validator."""
    if isinstance(value, str):
        value = value.strip().strip("[]").replace('"', "").split(",")
    return [str(item).strip() for item in value if str(item).strip()] if isinstance(value, list) else value


def _exchange(name: str) -> str:
    try:
        return exchange(name).code
    except ConfigurationError as error:
        raise ValueError(str(error)) from None


def _export(text: str) -> str:
    client, _, folder = (part.strip() for part in text.partition(":"))
    if client not in EXPORT_FOLDERS:
        raise ValueError(f"must be one of the clients {', '.join(EXPORT_FOLDERS)}, or CLIENT:FOLDER")
    if folder := folder or EXPORT_FOLDERS[client]:
        values.folder(folder)
    return text


def _parsed(value: object, parse: ValidatorFunctionWrapHandler, example: str) -> Any:  # noqa: ANN401 - as given back
    try:
        return parse(value)
    except ValidationError:
        raise ValueError(f"must be written as in {example}") from None


def _hours(value: object, parse: ValidatorFunctionWrapHandler) -> tuple[time, time]:
    parts = [part.strip() for part in value.split("-", 1)] if isinstance(value, str) else value
    opens, closes = _parsed(parts, parse, "10:00-15:30")
    if opens >= closes:
        raise ValueError("must open before it closes")
    return opens, closes


def _store(url: SecretStr) -> SecretStr:
    if not re.match(r"postgres(ql)?://[^/\s]", url.get_secret_value()):
        raise ValueError("must begin with postgresql:// (docs/fleet.md has the whole form)")
    return url


def _mention(text: str) -> str:
    known = r"<(!channel|!here|!everyone|@[UW][A-Z0-9]+|!subteam\^S[A-Z0-9]+)>"
    if not all(re.fullmatch(known, who) for who in text.split()):
        raise ValueError("must be as Slack writes mentions, such as <!channel>, <@U024BE7LH> or <!subteam^S024BE7>")
    return " ".join(text.split())


def _number(lowest: float, highest: float, *, whole: bool = False) -> BeforeValidator:
    return BeforeValidator(lambda value: values.number(value, lowest, highest, whole=whole))


# What `Market` converts on the path of a cached token is converted here by the same functions, so that both agree.
Credential = Annotated[SecretStr | None, BeforeValidator(values.credential)]
Environment = Literal["real", "paper"]
Url = Annotated[str, AfterValidator(values.address)]
Seconds = Annotated[float, _number(*SECONDS)]
Exchange = Annotated[str, AfterValidator(_exchange)]
Listed = BeforeValidator(_items)
Stripped = BeforeValidator(lambda value: value.strip() if isinstance(value, str) else value)
Day = Annotated[date, WrapValidator(lambda value, parse: _parsed(value, parse, "2026-12-24"))]
Hours = Annotated[tuple[time, time], WrapValidator(_hours)]


class MarketSettings(Sensitive, BaseModel):
    """One market's own settings, where they differ from the common ones."""

    app_key: Credential = None
    app_secret: Credential = None
    environment: Environment | None = None
    base_url: Url | None = None
    exchanges: Annotated[list[Exchange], Listed] | None = None
    exports: Annotated[list[Annotated[str, AfterValidator(_export)]], Listed] = []


class ExchangeSettings(BaseModel):
    """The user's corrections of an exchange's calendar: closed days, other hours, extended hours."""

    closed: Annotated[list[Day], Listed] = []
    hours: dict[Day, Hours] = {}
    extended: bool = False


@sealed_class()
class Settings(Sensitive, BaseSettings):
    """All settings of this process; `KIS_` variables with other names belong to other programs."""

    model_config = SettingsConfigDict(extra="ignore", hide_input_in_errors=True, arbitrary_types_allowed=True)

    found: Found = Field(default_factory=Found, exclude=True, repr=False)
    app_key: Credential = None
    app_secret: Credential = None
    environment: Environment = "real"
    base_url: Url | None = None
    token_dir: Annotated[str, AfterValidator(values.folder)] = values.TOKEN_DIR
    markets: dict[Annotated[str, AfterValidator(values.named)], MarketSettings] = {}
    exchanges: dict[Exchange, ExchangeSettings] = {}
    issue_interval: Seconds = values.ISSUE_INTERVAL
    buffer: Seconds = values.BUFFER
    proactive_window: Seconds = values.PROACTIVE_WINDOW
    timeout: Annotated[float, _number(*TIMEOUTS)] = values.TIMEOUT
    max_issues_per_day: Annotated[int, _number(*ISSUES, whole=True)] = values.MAX_ISSUES_PER_DAY
    prove_tokens: bool = True
    hts_id: str | None = None
    keyring: str | None = None
    store: Annotated[SecretStr, Stripped, AfterValidator(_store)] | None = None  # an address with a password
    store_keys: Annotated[list[SecretStr], Listed] = []
    slack_webhook_url: Annotated[SecretStr | None, Stripped] = None
    slack_bot_token: Annotated[SecretStr | None, Stripped] = None
    slack_channel: Annotated[str | None, Stripped] = None
    slack_mention: Annotated[str, AfterValidator(_mention)] = ""
    slack_language: Annotated[Literal["en", "ko"], Stripped] = "en"
    prefect_ui_url: str | None = None
    _markets: dict[str, Market] = {}
    if not TYPE_CHECKING:
        __init__ = sealed(BaseSettings.__init__)  # its frames have all values

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *_: PydanticBaseSettingsSource,
        **__: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return one source, the same as the fast reader's, so that precedence and trust are decided in one place."""
        return (InitSettingsSource(settings_cls, _nested(init_settings().get("found") or gather())),)

    @classmethod
    def load(cls) -> Self:
        """Return the validated settings of this process.

        Raises:
            ConfigurationError: a value is malformed or a source unreadable; cached tokens stay usable.
        """
        try:
            loaded = cls()
        except ValidationError as error:
            raise ConfigurationError(_message(error.errors(include_input=False, include_url=False)[0])) from None
        if loaded.store_keys and not loaded.store:
            raise ConfigurationError(
                "KIS_STORE_KEYS is set without KIS_STORE: this machine would issue independently of its fleet. Nothing "
                "was issued; valid tokens on this machine are served. Set KIS_STORE too, or remove KIS_STORE_KEYS."
            )
        _warn(loaded)
        return loaded

    @classmethod
    def for_alerts(cls) -> Settings | None:
        """Return the settings without those that alerts do not need; None if not even these can be used."""
        try:
            return cls(found=gather_for_alerts())
        except (ConfigurationError, ValidationError):
            return None

    def model_post_init(self, _: Any, /) -> None:  # noqa: ANN401 - as inherited
        """Create the markets."""
        self._markets = {name: Market(name, self.found, lambda: self) for name in values.market_names(self.found)}

    def market(self, name: str) -> Market:
        """Return the market of that name, in upper or lower case.

        Raises:
            ConfigurationError: it is not configured; the message names those that are.
        """
        return self._markets[values.known(name, self.found)]

    def all_markets(self) -> list[Market]:
        """Return the configured markets: `us`, `kr`, then the user's own by name."""
        return list(self._markets.values())

    def able_markets(self) -> list[Market]:
        """Return the markets that have an app key.

        Raises:
            ConfigurationError: none has; the message says what to set.
        """
        if able := [market for market in self.all_markets() if market.app_key]:
            return able
        how = f"set KIS_APP_KEY and KIS_APP_SECRET in the environment, .env or {CONFIG_FILE}"
        raise ConfigurationError(f"No market has an app key; {how}.")

    def sharing(self, market: Market) -> list[Market]:
        """Return the configured markets with the key of `market`, and so one token; `market` may be a program's own."""
        return [one for one in self.all_markets() if one.app_key and one.key_name == market.key_name]

    @property
    def overrides(self) -> dict[str, Override]:
        """The user's corrections of the calendars, by order code of the exchange."""
        known = self.exchanges.items()
        return {code: Override(frozenset(own.closed), own.hours, own.extended) for code, own in known}

    @property
    def origins(self) -> dict[str, str]:
        """The source of each setting: `environment`, a file or folder, or the keyring, which this asks for secrets.

        Raises:
            ConfigurationError: there is no keyring, or it is locked.
        """
        wanted = {name for market in ("", *self.found.markets) for name in self.found.in_keyring(market)}
        kept = [name for name in wanted if self.in_keyring([name])]
        return self.found.origins | dict.fromkeys(kept, f"keyring {self.keyring}")

    def misspelt(self) -> dict[str, str]:
        """Return the unknown `KIS_` names, each with the setting it resembles, or "" if it is another program's."""
        return {name: meant for name, meant in _unknown(self.found).items() if name.startswith("KIS_")}

    def in_keyring(self, names: Iterable[str]) -> str | None:
        """Return what the keyring has for the first of `names` that it knows; this may be slow, or prompt a person.

        Raises:
            ConfigurationError: there is no keyring, or it is locked; cached tokens are served without it.
        """
        try:
            import keyring  # an optional extra, and slow to import

            kept = (values.credential(keyring.get_password(str(self.keyring), name)) for name in names)
            return next(filter(None, kept), None)
        except ModuleNotFoundError:
            why = "the package is not installed: run `pip install 'keyring>=25'`"
        except Exception as error:  # noqa: BLE001 - a backend's own error, whose text may contain anything
            why = f"it failed ({type(error).__name__}): unlock it, set the secret again, or run `keyring diagnose`"
        raise ConfigurationError(
            f"The app secret should come from the system's keyring (KIS_KEYRING={short(str(self.keyring))}), but {why}"
            "; or remove KIS_KEYRING. Cached tokens are served anyway."
        )


def _variable(path: Iterable[int | str]) -> str:
    name = "__".join(step for step in path if isinstance(step, str) and step != "[key]").upper()
    return name if name.startswith(("SLACK_", "PREFECT_")) else f"KIS_{name}"


_GROUPS = ("KIS_MARKETS", "KIS_EXCHANGES")
_KNOWN = [*map(_variable, zip(Settings.model_fields.keys() - {"found", "markets", "exchanges"})), SECRETS_DIR]
_KNOWN += [_variable(("markets", "*", field)) for field in MarketSettings.model_fields]
_KNOWN += [_variable(("exchanges", "*", field)) for field in ("closed", "hours__*", "extended")]
_KNOWN += [*_OUTPUT, *PAPER_SIGNS]


def _message(error: ErrorDetails) -> str:
    why = "must be true or false" if error["type"] == "bool_parsing" else error["msg"].removeprefix("Value error, ")
    why = short(why)
    name = short(_variable(error["loc"]))
    return f"{name} cannot be used: {why[:1].lower()}{why[1:].rstrip('.')}. Correct or remove it."


def _unknown(found: Found) -> dict[str, str]:
    """Return the names that are not settings, each with the one it resembles, or an empty text."""
    unknown = {}
    for name in found.values:
        steps = name.split("__")
        free, steps[1::2] = steps[1::2], ["*"] * len(steps[1::2])  # names of markets or exchanges, and days
        pattern = "__".join(steps)
        if pattern not in _KNOWN:
            alike = "".join(difflib.get_close_matches(pattern, _KNOWN, 1, _ALIKE))
            unknown[name] = alike.replace("*", "{}").format(*free, "*", "*")
    return unknown


def _nested(found: Found) -> dict[str, Any]:
    """Return the settings as pydantic takes them; unknown names are refused where they can only be meant for us."""
    tree: dict[str, Any] = {"found": found}
    unknown = _unknown(found)
    for name, meant in unknown.items():
        hint = f"did you mean {short(meant)}?" if meant else ".env.example lists the settings."
        if name.startswith("KIS_PREFECT_"):
            hint = "Prefect's own settings are read from the environment and .env only."
        if found.origins[name] == CONFIG_FILE or name.split("__")[0] in _GROUPS:
            raise ConfigurationError(f"Unknown setting {short(name)} in {place_of(found.origins[name])}; {hint}")
        if meant:
            warn(f"Unknown setting {short(name)}; {hint}")
    for name in found.values.keys() - unknown.keys():
        branch, (*steps, field) = tree, name.lower().removeprefix("kis_").split("__")
        for step in steps:
            branch = branch.setdefault(step, {})
        branch[field] = found.values[name]
    return tree


def _warn(settings: Settings) -> None:
    given = settings.found.values
    for name, value in given.items():
        if name.endswith(("APP_KEY", "APP_SECRET")) and value != value.strip():
            warn(f"{short(name)} has white space around it, which was removed.")
        if name in PAPER_SIGNS and "KIS_ENVIRONMENT" not in given and str(value).strip().lower() not in _REAL_WORDS:
            now = f"{name} is not a setting, so the environment is real"
            warn(f"{now}; set KIS_ENVIRONMENT=real or KIS_ENVIRONMENT=paper.")
