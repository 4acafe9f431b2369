"""A keyring for tests: what is in `keyring.json` of the home; each question is noted in `keyring.log`."""

from __future__ import annotations

import json
from pathlib import Path

from keyring import errors
from keyring.backend import KeyringBackend


class Keyring(KeyringBackend):
    """Answers from the file; without one it is locked, and where that has the name of an error, it fails so."""

    priority = 1

    def get_password(self, service: str, username: str) -> str | None:
        """The secret of `username` in `service`."""
        with (Path.home() / "keyring.log").open("a") as log:
            log.write(f"{service} {username}\n")
        try:
            known = json.loads((Path.home() / "keyring.json").read_text())
        except FileNotFoundError:
            raise errors.KeyringLocked("Canary") from None
        if isinstance(known, str):
            raise getattr(errors, known, RuntimeError)("Canary")
        found: str | None = known.get(service, {}).get(username)
        return found

    def set_password(self, service: str, username: str, password: str) -> None:
        """Not by us."""
        raise NotImplementedError
