"""Keeps one KIS (Korea Investment & Securities) access token per app key, for every process of the machine.

    from tokencore import USTokenManager
    token = USTokenManager().get_valid_token()

The names in `__all__` are the whole public API. Each is loaded on first use: a cached token costs no other import.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tokencore.calendars import sessions
    from tokencore.clients.auth import KISAuth
    from tokencore.clients.auth_httpx import KISHttpxAuth
    from tokencore.config.settings import Settings
    from tokencore.config.sources import trusted_dotenv
    from tokencore.errors import (
        ConfigurationError,
        CredentialsError,
        IssuanceLimitError,
        IssuerUnavailableError,
        TokenError,
        TokenStoreError,
        TokenUnavailableError,
    )
    from tokencore.keys import Key, KeyState
    from tokencore.manager import BaseTokenManager, KRTokenManager, TokenManager, USTokenManager
    from tokencore.reports.plan_svg import draw_plans
    from tokencore.stores import open_document, private_folder

    __all__ = [
        "BaseTokenManager",
        "ConfigurationError",
        "CredentialsError",
        "IssuanceLimitError",
        "IssuerUnavailableError",
        "KISAuth",
        "KISHttpxAuth",
        "KRTokenManager",
        "Key",
        "KeyState",
        "Settings",
        "TokenError",
        "TokenManager",
        "TokenStoreError",
        "TokenUnavailableError",
        "USTokenManager",
        "draw_plans",
        "open_document",
        "private_folder",
        "sessions",
        "trusted_dotenv",
    ]

_PLACES = {
    "calendars": ("sessions",),
    "clients.auth": ("KISAuth",),
    "clients.auth_httpx": ("KISHttpxAuth",),
    "config.settings": ("Settings",),
    "config.sources": ("trusted_dotenv",),
    "errors": (
        "ConfigurationError", "CredentialsError", "IssuanceLimitError", "IssuerUnavailableError", "TokenError",
        "TokenStoreError", "TokenUnavailableError",
    ),
    "keys": ("Key", "KeyState"),
    "manager": ("BaseTokenManager", "KRTokenManager", "TokenManager", "USTokenManager"),
    "reports.plan_svg": ("draw_plans",),
    "stores": ("open_document", "private_folder"),
}  # fmt: skip


def __getattr__(name: str) -> object:
    """Load a public name from its module."""
    from importlib import import_module  # so that importing the package imports nothing else

    if name == "__all__":
        return _loadable()
    place = next((place for place, names in _PLACES.items() if name in names), "")
    if not place:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "sessions":
        return import_module("tokencore.calendars.sessions")
    value: object = getattr(import_module(f"tokencore.{place}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the module's names, including the public ones that are not loaded yet: `help` loads all."""
    return sorted({*globals(), *_loadable()})


def _loadable() -> list[str]:
    """Return the public names without the one that needs a package which is not installed: a star import loads all."""
    from importlib.util import find_spec

    return [name for names in _PLACES.values() for name in names if name != "KISHttpxAuth" or find_spec("httpx")]
