"""Where a key's token, issuance record and lock are kept; `base.Store` says what every store can do."""

from __future__ import annotations

import os

from tokencore.sealing import sealed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tokencore.config.market import Market
    from tokencore.config.settings import Settings
    from tokencore.stores.base import Document, Store


def open_store(market: Market, siblings: Callable[[], Sequence[str]]) -> Store:
    """Return the store of the market's key, on the medium that the settings name; only this function knows which.

    `siblings` returns the names of all configured markets of the key; it is called only when they are needed.
    """
    if market.store:
        from tokencore.stores.shared_store import SharedStore

        return SharedStore(market, siblings)
    from tokencore.stores.file_store import FileStore

    return FileStore(market, siblings)


@sealed
def open_document(settings: Settings, name: str) -> Document:
    """Return a document that all keys share, such as the incidents: the fleet's if there is one, else the machine's."""
    from tokencore.stores.file_store import FileDocument

    local = FileDocument(os.path.join(settings.token_dir, f"{name}.json"))
    if not settings.store:
        return local
    from tokencore.stores.shared_store import SharedDocument

    return SharedDocument(local, settings, name)


@sealed
def check_store(settings: Settings) -> list[tuple[str, str, str, str]]:
    """Return the doctor's lines about a store that machines share, each as (state, name, detail, fix).

    Raises:
        TokenError: the store cannot be used.
    """
    if not settings.store:
        return []
    from tokencore.stores.checks import checks

    return checks(settings)


@sealed
def private_folder(path: str) -> None:
    """Create a token directory and the folder `path` in it, both for this user only; other programs keep files there.

    Raises:
        TokenStoreError: a folder cannot be created; or another user owns or can write to one of them, a folder above
            or a file in `path`.
    """
    from tokencore.stores import lock, permissions

    permissions.make_private(os.path.dirname(path), ours=lock.OURS)
    permissions.make_private(path)
    permissions.refuse_planted(path, ("",))
