"""Masks of many sequences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from router_replay.errors import InputError
from router_replay.masks.masks import RoutingMasks


def list_of_masks(masks: Iterable[RoutingMasks]) -> list[RoutingMasks]:
    """Masks of several sequences as a list, from any iterable.

    Raises:
        InputError: one RoutingMasks alone, a handle, or an iterable of something else.
    """
    listed = list_of_masks_or_none(masks)
    for index, one in enumerate(listed):
        if one is None:
            raise InputError(f"masks of sequence {index} are None: {_WAY_OUT}")
    return [one for one in listed if one is not None]


def list_of_masks_or_none(masks: Iterable[RoutingMasks | None]) -> list[RoutingMasks | None]:
    """As `list_of_masks`, but None may stand for a sequence that has no masks."""
    if isinstance(masks, RoutingMasks | str | bytes | Mapping) or not isinstance(masks, Iterable):
        raise InputError(f"masks of a microbatch are a list, got {_kind(masks)} alone: {_WAY_OUT}")
    listed = list(masks)
    for index, one in enumerate(listed):
        if one is not None and not isinstance(one, RoutingMasks):
            raise InputError(f"masks of sequence {index} are {_kind(one)}: {_WAY_OUT}")
    return listed


_WAY_OUT = "pass a list with one RoutingMasks for each sequence, as masks_from_meta_info gives them"


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
