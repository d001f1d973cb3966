"""The inline store: the container travels inside the handle, as base64 text."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from router_replay.errors import DataError
from router_replay.masks import container
from router_replay.masks.masks import RoutingMasks

NAME = "inline"


def put(masks: RoutingMasks) -> dict[str, Any]:
    """A handle that carries the masks: plain JSON types only."""
    return {"store": NAME, "data": base64.b64encode(container.to_bytes(masks)).decode("ascii")}


def get(handle: Mapping[str, Any]) -> RoutingMasks:
    """The masks of a handle made by `put`.

    Raises:
        DataError: the text is not base64 of a whole container.
    """
    try:
        data = base64.b64decode(handle["data"], validate=True)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"an inline handle whose data is not base64 text: {error!r}") from error
    return container.from_bytes(data)
