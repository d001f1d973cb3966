"""The inline store: the container travels inside the handle, as base64 text."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from routing_masks import container
from routing_masks.errors import ContainerError
from routing_masks.masks import RoutingMasks

NAME = "inline"


def put(masks: RoutingMasks) -> dict[str, Any]:
    """A handle that carries the masks: plain JSON types only."""
    return {"store": NAME, "data": base64.b64encode(container.to_bytes(masks)).decode("ascii")}


def get(handle: Mapping[str, Any]) -> RoutingMasks:
    """The masks of a handle made by `put`.

    Raises:
        ContainerError: the text is not base64 of a whole container.
    """
    try:
        data = base64.b64decode(handle["data"], validate=True)
    except (KeyError, TypeError, ValueError) as error:
        raise ContainerError(f"an inline handle whose data is not base64 text: {error!r}") from error
    return container.from_bytes(data)
