"""The errors of this package, one class for each action an operator has to take. This module imports nothing.

Every message says what happened, what still works until when, and what to do; none contains a token, key or
secret. `exit_code` is the command line's exit code for the class.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from datetime import datetime


class TokenError(Exception):
    """Base of all errors of this package; never raised directly."""

    exit_code = 1


class ConfigurationError(TokenError):
    """A setting is missing or malformed; the message names the variable and how to set it."""

    exit_code = 2


class TokenUnavailableError(TokenError):
    """No token is valid for the requested time, and none can be issued without breaking a rule."""

    exit_code = 3


class IssuanceLimitError(TokenError):
    """A rule about how often a key may issue forbids a request until `retry_at` (aware UTC, None if unknown).

    `cause` is `minute` (KIS's one request a minute), `ceiling` (KIS_MAX_ISSUES_PER_DAY), `same_token` (KIS returns the
    current token for six hours) or `backoff` (the pause after a failure while the current token is still served).
    """

    exit_code = 4

    def __init__(self, message: str, *, retry_at: datetime | None = None, cause: str = "") -> None:
        """Store the message, `retry_at` and `cause`; unpickling passes the message only, hence the defaults."""
        super().__init__(message)
        self.retry_at = retry_at
        self.cause = cause


class CredentialsError(TokenError):
    """KIS refused the key, the secret or this IP address; nothing retries automatically until a person acts."""

    exit_code = 5


class IssuerUnavailableError(TokenError):
    """KIS could not be asked or did not give a usable answer; asking again later may help."""

    exit_code = 6


class TokenStoreError(TokenError):
    """The token store cannot be used: permissions, read-only, no space for the lock, or no access to the fleet's."""

    exit_code = 7
