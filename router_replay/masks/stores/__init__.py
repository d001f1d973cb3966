"""Where a sequence's masks wait for the trainer. A handle is a small dictionary that names its store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from router_replay.errors import DataError
from router_replay.masks.masks import RoutingMasks
from router_replay.masks.stores import inline

_STORES = {inline.NAME: inline}


def load(handle: Mapping[str, Any]) -> RoutingMasks:
    """The masks behind the handle that a server put into `meta_info["routing_masks"]`.

    Raises:
        DataError: not a handle, or one of a store that this version does not know.
    """
    name = handle.get("store") if isinstance(handle, Mapping) else None
    if not isinstance(name, str) or name not in _STORES:
        raise DataError(
            f"not a handle of a known store ({', '.join(_STORES)}): {str(handle)[:80]!r}; pass"
            ' meta_info["routing_masks"] of the answer as it is'
        )
    return _STORES[name].get(handle)
