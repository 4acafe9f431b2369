"""Keeps one KIS (Korea Investment & Securities) access token per app key, for every process of the machine.

    from tokencore import USTokenManager
    token = USTokenManager().get_valid_token()

The names below are the whole public surface. They are loaded when they are first used, so that a
cached token costs no import of HTTP, settings validation or locking.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tokencore import sessions
    from tokencore.auth import KISAuth
    from tokencore.auth_httpx import KISHttpxAuth
    from tokencore.errors import (
        ConfigurationError,
        CredentialsError,
        IssuanceLimitError,
        IssuerUnavailableError,
        TokenError,
        TokenStoreError,
        TokenUnavailableError,
    )
    from tokencore.fleet import managers, trading
    from tokencore.foresight import Consequence, foresee
    from tokencore.manager import BaseTokenManager, KRTokenManager, TokenManager, USTokenManager
    from tokencore.picture import draw_plans
    from tokencore.plan import Plan, make_plan
    from tokencore.remarks import NOTE_FIELDS, Note
    from tokencore.rule import Decision, Outlook, look, next_attempt, tick
    from tokencore.settings import Settings, overrides
    from tokencore.status import CLOCK_SLACK

__all__ = [
    "CLOCK_SLACK",
    "NOTE_FIELDS",
    "BaseTokenManager",
    "ConfigurationError",
    "Consequence",
    "CredentialsError",
    "Decision",
    "IssuanceLimitError",
    "IssuerUnavailableError",
    "KISAuth",
    "KISHttpxAuth",
    "KRTokenManager",
    "Note",
    "Outlook",
    "Plan",
    "Settings",
    "TokenError",
    "TokenManager",
    "TokenStoreError",
    "TokenUnavailableError",
    "USTokenManager",
    "draw_plans",
    "foresee",
    "look",
    "make_plan",
    "managers",
    "next_attempt",
    "overrides",
    "sessions",
    "tick",
    "trading",
]

_ROOMS = {
    "manager": ("BaseTokenManager", "KRTokenManager", "TokenManager", "USTokenManager"),
    "auth": ("KISAuth",),
    "auth_httpx": ("KISHttpxAuth",),
    "fleet": ("managers", "trading"),
    "foresight": ("Consequence", "foresee"),
    "remarks": ("NOTE_FIELDS", "Note"),
    "settings": ("Settings", "overrides"),
    "picture": ("draw_plans",),
    "plan": ("Plan", "make_plan"),
    "status": ("CLOCK_SLACK",),
    "rule": ("Decision", "Outlook", "look", "next_attempt", "tick"),
}


def __getattr__(name: str) -> object:
    """Load a public name from its room."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # the module itself stays free of imports

    if name == "sessions":
        return import_module("tokencore.sessions")
    room = next((room for room, names in _ROOMS.items() if name in names), "errors")
    value: object = getattr(import_module(f"tokencore.{room}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted({*globals(), *__all__})
