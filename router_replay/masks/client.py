"""The masks in an answer of the rollout server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from router_replay.errors import DataError, InputError
from router_replay.masks.masks import RoutingMasks
from router_replay.masks.stores import load


def masks_from_meta_info(meta_info: Mapping[str, Any]) -> RoutingMasks:
    """The masks that a finished request's `meta_info` carries; they may be in any store.

    Args:
        meta_info: of one answer, as the server sent it; `meta_info["routing_masks"]` is a list that holds one handle.

    Returns:
        The rows from the request's `routed_experts_start_len` up to the token before the last sampled one.

    Raises:
        InputError: a whole answer, several of them, or anything else that is no `meta_info`.
        DataError: no masks, masks in SGLang's own format, or not one handle.
    """
    require_meta_info(meta_info, "routing_masks", "masks_from_meta_info")
    handles = meta_info.get("routing_masks")
    if not handles:
        if meta_info.get("routed_experts") is not None:
            raise DataError(
                'the answer has routes in SGLang\'s own format (meta_info["routed_experts"]), not routing masks: start'
                " the server with --enable-router-capture --router-capture-format masks, or read them with"
                " masks_from_sglang(meta_info, token_ids, geometry)"
            )
        raise DataError(
            "the answer has no routing masks: the request must say return_routed_experts: true, and the server must run"
            " with --enable-router-capture --router-capture-format masks; of a streamed answer, pass the last chunk's"
            " meta_info"
        )
    if not isinstance(handles, list) or len(handles) != 1:
        found = f"{len(handles)} handles" if isinstance(handles, list) else f"a {type(handles).__name__}"
        raise DataError(
            f'meta_info["routing_masks"] must be a list of one handle, found {found}: pass the meta_info of one answer'
            " as it is"
        )
    return load(handles[0])


def require_meta_info(meta_info: Any, key: str, reader: str) -> None:
    """Raise InputError for what is no `meta_info`; `reader` is the function that looks for `key` in it."""
    if isinstance(meta_info, Mapping):
        if "meta_info" in meta_info and key not in meta_info:
            raise InputError('this is a whole answer, not its meta_info: pass answer["meta_info"]')
        if "store" in meta_info and key not in meta_info:
            raise InputError("this is a handle, not a meta_info: pass it to load(handle)")
        return
    if isinstance(meta_info, list | tuple):
        raise InputError(
            f"this is a list of {len(meta_info)}, not one meta_info: a request with n > 1 and a batched request are"
            f' answered with a list, so call it for each: [{reader}(answer["meta_info"]) for answer in answers]'
        )
    way_out = "there is none in a request that failed, so look for its error"
    if isinstance(meta_info, str | bytes):
        way_out = 'this is the answer\'s JSON: pass json.loads(text)["meta_info"]'
    raise InputError(f'expected the dictionary answer["meta_info"], got a {type(meta_info).__name__}; {way_out}')
