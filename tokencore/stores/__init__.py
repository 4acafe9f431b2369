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
    """The store of the market's key, on the medium that the settings choose: the only place that knows which.

    `siblings` tells the names of all configured markets of the key, when something is written.
    """
    if market.store:
        from tokencore.stores.shared_store import SharedStore

        return SharedStore(market, siblings)
    from tokencore.stores.file_store import FileStore

    return FileStore(market, siblings)


@sealed
def open_document(settings: Settings, name: str) -> Document:
    """A document that all keys share, such as the incidents: the machine's, or its fleet's."""
    from tokencore.stores.file_store import FileDocument

    local = FileDocument(os.path.join(settings.token_dir, f"{name}.json"))
    if not settings.store:
        return local
    from tokencore.stores.shared_store import SharedDocument

    return SharedDocument(local, settings, name)


@sealed
def check_store(settings: Settings) -> list[tuple[str, str, str, str]]:
    """What the doctor has to say of a store that machines share: state, name, detail and fix of each line.

    Raises:
        TokenError: it cannot be used.

    """
    if not settings.store:
        return []
    from tokencore.stores.checks import checks

    return checks(settings)


@sealed
def private_folder(path: str) -> None:
    """Make the folder `path` of a token directory, and that, for this user only; for programs beside the tokens.

    Raises:
        TokenStoreError: it cannot be made; or another user owns it, a file in it or a folder above, or can write one.

    """
    from tokencore.stores import file_store, permissions

    permissions.make_private(os.path.dirname(path), ours=file_store.OURS)
    permissions.make_private(path)
    permissions.refuse_planted(path, ("",))
