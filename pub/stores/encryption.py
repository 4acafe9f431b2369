"""Encrypts the entries of a fleet's store, and binds each one to its row."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tokencore.errors import ConfigurationError, TokenStoreError
from tokencore.sealing import Sensitive

KEY = re.compile(r"[\w+/-]{43}=", re.ASCII)
INSTALL = "run `pip install 'tokencore[fleet]'`"
try:
    from cryptography.fernet import Fernet, InvalidToken, MultiFernet
except ImportError:  # it is an optional extra
    raise ConfigurationError(f"KIS_STORE needs the package cryptography; {INSTALL}.") from None

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class SealError(TokenStoreError):
    """An entry of the store cannot be decrypted, or belongs to another row."""


class Seal(Sensitive):
    """Fernet keys, the newest first: the newest encrypts, and any of them decrypts."""

    __slots__ = ("_fernet", "_keys")

    def __init__(self, keys: Iterable[str]) -> None:
        """Take the keys of KIS_STORE_KEYS.

        Raises:
            ConfigurationError: there is none, or one is malformed.
        """
        given = list(keys)
        if not (given and all(KEY.fullmatch(key) for key in given)):  # Fernet would ignore what follows the first `=`
            raise ConfigurationError(
                f"KIS_STORE_KEYS is {'malformed' if given else 'not set'}: KIS_STORE needs the Fernet keys of its "
                "fleet, 44 characters each, between commas, the newest first, the same on all machines. Nothing was "
                "issued; valid tokens on this machine are served anyway."
            )
        self._keys = [Fernet(key) for key in given]
        self._fernet = MultiFernet(self._keys)

    def close(self, content: Mapping[str, Any]) -> str:
        """Return `content`, encrypted with the newest key."""
        return self._fernet.encrypt(json.dumps(content).encode()).decode()

    def open(self, sealed: str, about: Mapping[str, str]) -> dict[str, Any]:
        """Return the decrypted content, which has to include `about`, so that no row can take another's place.

        Raises:
            SealError: no key decrypts it, or it belongs to another row.
        """
        try:
            content: dict[str, Any] = json.loads(self._fernet.decrypt(sealed.encode()))
        except (InvalidToken, ValueError):
            why = "cannot be decrypted: compare KIS_STORE_KEYS with another machine's; if they agree, it is damaged"
        else:
            if content.items() >= about.items():
                return content
            why = "belongs to another row: rows were swapped"
        raise SealError(
            f"The fleet's entry of {' '.join(about.values())} {why}, and `tokencore delete MARKET` makes room for a "
            "new one. Nothing was issued or overwritten; a valid token on this machine is served anyway."
        )

    def opened_by(self, sealed: str) -> int | None:
        """Return the index of the key that decrypts it, 0 for the newest; None if none does."""
        for number, fernet in enumerate(self._keys):
            with suppress(InvalidToken):
                fernet.decrypt(sealed.encode())
                return number
        return None

    def renewed(self, sealed: str) -> str | None:
        """Return the same content, encrypted with the newest key; None if no key decrypts it."""
        with suppress(InvalidToken):
            return self._fernet.rotate(sealed.encode()).decode()
        return None
