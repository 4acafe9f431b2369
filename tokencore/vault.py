"""The system's keyring: the last source of app secrets, asked only for what no other one gives.

It holds secrets alone. Every `get` has to know whose a cached token is, so the app key stands in the settings: a
keyring costs more time than the token and may ask a person for a password. The key would not be hidden by it anyway,
because the token contains it.
"""

from __future__ import annotations

from tokencore.errors import ConfigurationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def first_secret(service: str, names: Sequence[str]) -> str | None:
    """What the keyring keeps under `service` for the first of the variables `names` that it knows; None for nothing.

    Raises:
        ConfigurationError: there is no keyring, or it is locked. Cached tokens are served without it.

    """
    try:
        import keyring  # an extra, and slow to load
        from keyring.errors import KeyringLocked, NoKeyringError
    except ImportError:
        raise _unusable(service, "the package is not installed", "pip install 'tokencore[keyring]'") from None
    try:
        return next((found for name in names if (found := keyring.get_password(service, name))), None)
    except NoKeyringError:
        why, cure = "this machine has none that programs can use", "install one, or give the secret in another way"
    except KeyringLocked:
        why, cure = "it is locked", "unlock it, by logging in or with its own program"
    except Exception as error:  # noqa: BLE001 - a backend's own, whose text may hold anything
        why, cure = f"it failed ({type(error).__name__})", "look at it with `keyring diagnose`"
    raise _unusable(service, why, cure)


def _unusable(service: str, why: str, cure: str) -> ConfigurationError:
    return ConfigurationError(
        f"The app secret should come from the system's keyring (KIS_KEYRING={service}), but {why}. "
        f"Cached tokens are served all the same. To do: {cure}; or remove KIS_KEYRING.",
    )
