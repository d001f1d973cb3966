"""The store of a server: the one that its URL names, or files that the server serves itself."""

from __future__ import annotations

from router_replay.masks import Store, open_store
from router_replay.masks.stores.directory import DirectoryStore
from router_replay.masks.stores.http import HttpStore
from router_replay.masks.stores.served import ServedDirectory
from sglang_router_capture.options import CaptureOptions
from sglang_router_capture.server_folder import ServerFolder


def store_of(chosen: CaptureOptions) -> Store:
    """The store that a server's masks are put into. An HTTP URL is that of the server itself, as trainers reach it.

    Raises:
        InputError: the URL of no store.
    """
    store = open_store(chosen.store)
    if isinstance(store, HttpStore):
        return ServedDirectory(store.url, DirectoryStore(f"file://{ServerFolder(chosen.start).masks}"))
    return store
