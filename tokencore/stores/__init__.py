"""Where a key's token, issuance record and lock are kept; `base.Store` says what every store can do."""

from __future__ import annotations

import os

from tokencore.sealing import sealed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tokencore.config.market import Market
    from tokencore.stores.base import Document, Store


def open_store(market: Market, siblings: Callable[[], Sequence[str]]) -> Store:
    """The store of the market's key, on the medium that the settings choose: the only place that knows which.

    `siblings` tells the names of all configured markets of the key, when something is written.
    """
    from tokencore.stores.file_store import FileStore

    return FileStore(market, siblings)


@sealed
def open_document(token_dir: str, name: str) -> Document:
    """A document that all keys share, such as the incidents."""
    from tokencore.stores.file_store import FileDocument

    return FileDocument(os.path.join(token_dir, f"{name}.json"))


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
