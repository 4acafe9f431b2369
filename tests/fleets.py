"""A fleet's store on a PostgreSQL server of the tests, and machines that share it: folders with their own tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cryptography.fernet import Fernet
from pydantic import SecretStr

from tokencore.stores import database

if TYPE_CHECKING:
    from pathlib import Path

    from postgres import Postgres

ROLE = "machines"


class Fleet(NamedTuple):
    """Its server, its address for the machines' role, and its Fernet key."""

    server: Postgres
    url: str
    key: str

    @classmethod
    def made(cls, server: Postgres) -> Fleet:
        """Empty tables, and a role that may do what `tokencore fleet init` grants."""
        database.make_tables(server.url())
        server.sql("delete from tokencore_key where key <> 'layout'", "truncate tokencore_attempt")
        return cls(server, server.url(), Fernet.generate_key().decode())

    def numbers(self, folder: Path) -> dict[str, object]:
        """What `make_market` needs for a machine with that token directory."""
        store, keys = SecretStr(self.url), [SecretStr(self.key)]
        return {"store": store, "store_keys": keys, "token_dir": str(folder)}

    def environment(self, folder: Path) -> dict[str, str]:
        """The settings of a machine with that token directory."""
        return {"KIS_STORE": self.url, "KIS_STORE_KEYS": self.key, "KIS_TOKEN_DIR": str(folder)}

    def rows(self) -> list[str]:
        """The attempts, oldest first."""
        return self.server.sql("select what from tokencore_attempt order by key, fence").splitlines()
