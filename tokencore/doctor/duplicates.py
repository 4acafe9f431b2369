"""Tokens of the same key in the caches of other KIS clients: each of those would issue for itself.

The files are searched as plain bytes; nothing is unpickled.
"""

from __future__ import annotations

import glob
import os
import re
from typing import TYPE_CHECKING

from tokencore import store
from tokencore.doctor.finding import ok, warn
from tokencore.tokens import jwt_claims

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from tokencore.doctor.finding import Finding

PLACES = {
    "mojito2": ("token.dat", "~/token.dat"),
    "python-kis": ("~/.pykis/cache/*.json",),
    "KIS's sample (kis_auth)": ("~/KIS/config/KIS*",),
    "korea-investment-stock": ("~/.cache/kis/token.key",),
}
MANY = 64  # files of one pattern that are looked at
SIZE_LIMIT = 65_536  # bytes; a token file has a thousand
_JWT = re.compile(rb"[\w-]+\.[\w-]+\.[\w-]+", re.ASCII)


def check(keys: Mapping[str, Collection[str]]) -> list[Finding]:
    """Each cache of another client that names one of the app keys; `keys` has the present tokens of each."""
    found = {path: client for client, patterns in PLACES.items() for path in _files(patterns)}
    told = [one for path, client in found.items() if (one := _judged(path, client, keys))]
    return told or [ok("duplicates", "no other client's cache holds a token of your keys")]


def _files(patterns: tuple[str, ...]) -> list[str]:
    every = [path for pattern in patterns for path in sorted(glob.glob(os.path.expanduser(pattern)))[-MANY:]]
    return list(dict.fromkeys(os.path.abspath(path) for path in every))


def _judged(path: str, client: str, keys: Mapping[str, Collection[str]]) -> Finding | None:
    try:
        content = store.read_bytes(path, SIZE_LIMIT) or b""
    except ValueError:
        return None
    named = [key for key in keys if _names(content, key)]
    if not named:
        return None
    if any(token.encode() in content for key in named for token in keys[key]):
        return ok("duplicates", f"{path} ({client}) has the same token")
    return warn(
        "duplicates",
        f"{path} ({client}) has another token of the same key: that client issues for itself",
        "delete the file; if that client is used, let tokencore feed it (tokencore export)",
    )


def _names(content: bytes, app_key: str) -> bool:
    claims = [jwt_claims(text.decode()) for text in _JWT.findall(content)]
    return app_key.encode() in content or any(one.get("jti") == app_key for one in claims)
