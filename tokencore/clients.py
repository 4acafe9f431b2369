"""The other KIS clients that a token can be handed to, and the form in which each of them reads it.

mojito2's file holds the app secret, because that client compares it; the others hold none. Pickles are only
made here: nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import pickle  # only written, for clients that read nothing else
from datetime import datetime, timedelta
from hashlib import sha1
from typing import TYPE_CHECKING, NamedTuple

from tokencore.errors import ConfigurationError
from tokencore.tokens import KST, Token

if TYPE_CHECKING:
    from collections.abc import Callable

PICKLE_PROTOCOL = 2  # read by every Python that the clients run on
_KRS_FILE = "_krs_token.dat"


class Holder:
    """Whose token it is: what the files and their names are made of.

    Attributes:
        fingerprint: names the key in its environment.
        app_key, app_secret: its credentials.
        environment: `real` or `paper`.
        hts_id: the account's HTS id, which python-kis has in its file's name; None when not set.

    """

    __slots__ = ("app_key", "app_secret", "environment", "fingerprint", "hts_id")

    def __init__(self, fingerprint: str, credentials: tuple[str, str], environment: str, hts_id: str | None) -> None:
        """Keep them for the files that are written next."""
        self.fingerprint, self.environment, self.hts_id = fingerprint, environment, hts_id
        self.app_key, self.app_secret = credentials

    def __repr__(self) -> str:
        return f"Holder({self.environment!r})"

    def __reduce__(self) -> str:
        raise TypeError("a Holder knows credentials and is not pickled")


class Target(NamedTuple):
    """Where a client finds the token: its absolute folder, and the file where the client leaves the name free."""

    client: str
    folder: str
    name: str = ""


class Client(NamedTuple):
    """How a client wants the token: its files by name, the folder it looks in by itself, and what they tell."""

    files: Callable[[Target, Holder, Token, datetime], dict[str, bytes]]
    folder: str | None
    holds_secret: bool = False


def target(text: str, market: str, token_dir: str) -> Target:
    """What a setting such as `mojito2`, `kis-auth` or `mojito2:~/bot` asks for in `market`.

    Raises:
        ValueError: the client is unknown, or the folder is not absolute.

    """
    client, _, folder = (part.strip() for part in text.partition(":"))
    if client not in CLIENTS:
        raise ValueError(f"{client!r} is none of the clients {', '.join(CLIENTS)}")
    if folder:
        if not os.path.isabs(os.path.expanduser(folder)):
            raise ValueError(f"the folder in {text!r} must be absolute, or begin with ~")
        return Target(client, _absolute(folder))
    default = CLIENTS[client].folder
    return Target(client, _absolute(default)) if default else Target(client, token_dir, f"{market}{_KRS_FILE}")


def file_name(to: Target, holder: Holder) -> str:
    """The name of the client's file; empty for the official sample, whose files are named by the day.

    Raises:
        ConfigurationError: python-kis' file cannot be named without KIS_HTS_ID.

    """
    if to.client == "python-kis":
        return _python_kis_name(holder)
    return "" if to.client == "kis-auth" else to.name or "token.dat"


def _absolute(folder: str) -> str:
    return os.path.abspath(os.path.expanduser(folder))


def _answer(token: Token, now: datetime) -> dict[str, object]:
    """What tokenP would answer for this token now; its expiry in KST, its life in seconds."""
    return {
        "access_token": token.access_token,
        "access_token_token_expired": f"{token.expires_at.astimezone(KST):%Y-%m-%d %H:%M:%S}",
        "token_type": token.token_type,
        "expires_in": max(0, int((token.expires_at - now).total_seconds())),
    }


def _mojito2(to: Target, holder: Holder, token: Token, now: datetime) -> dict[str, bytes]:
    content = _answer(token, now) | {"timestamp": int(token.expires_at.timestamp())}
    content |= {"api_key": holder.app_key, "api_secret": holder.app_secret}
    return {file_name(to, holder): pickle.dumps(content, protocol=PICKLE_PROTOCOL)}


def _python_kis(to: Target, holder: Holder, token: Token, now: datetime) -> dict[str, bytes]:
    return {file_name(to, holder): json.dumps(_answer(token, now)).encode()}


def _python_kis_name(holder: Holder) -> str:
    if not holder.hts_id:
        raise ConfigurationError(
            "KIS_HTS_ID is not set, and python-kis has it in the name of its file; set it to the account's HTS id."
        )
    if os.path.basename(holder.hts_id) != holder.hts_id:
        raise ConfigurationError("KIS_HTS_ID cannot be part of a file's name; set it to the account's HTS id.")
    told = f"pykis{holder.hts_id}{holder.app_key}{holder.app_secret}token"
    digest = sha1(told.encode(), usedforsecurity=False).hexdigest()  # the name that python-kis computes
    return f"token_{'virtual' if holder.environment == 'paper' else 'real'}_{holder.hts_id}_{digest}.json"


def _kis_auth(_: Target, __: Holder, token: Token, now: datetime) -> dict[str, bytes]:
    """The file is named by the day and compared with the clock, both in the zone of the machine that reads it."""
    expiry = f"{token.expires_at.astimezone():%Y-%m-%d %H:%M:%S}"
    content = f"token: {token.access_token}\nvalid-date: {expiry}\n".encode()
    today = now.astimezone().date()
    return {f"KIS{day:%Y%m%d}": content for day in (today, today + timedelta(days=1))}


CLIENTS = {
    "mojito2": Client(_mojito2, None, holds_secret=True),
    "python-kis": Client(_python_kis, "~/.pykis/cache"),
    "kis-auth": Client(_kis_auth, "~/KIS/config"),
}
