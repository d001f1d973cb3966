"""Where a sequence's masks wait for the trainer. A handle is a small dictionary that names its store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from routing_masks.errors import ContainerError
from routing_masks.masks import RoutingMasks
from routing_masks.stores import inline

_STORES = {inline.NAME: inline}


def load(handle: Mapping[str, Any]) -> RoutingMasks:
    """The masks behind the handle that a server put into `meta_info["routing_masks"]`.

    Raises:
        ContainerError: not a handle, or one of a store that this version does not know.
    """
    name = handle.get("store") if isinstance(handle, Mapping) else None
    if not isinstance(name, str) or name not in _STORES:
        raise ContainerError(
            f"not a handle of a known store ({', '.join(_STORES)}): {str(handle)[:80]!r}; pass"
            ' meta_info["routing_masks"] of the answer as it is'
        )
    return _STORES[name].get(handle)
