"""Masks and layout of a microbatch -> the packed rows of this rank's places, on the device."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from router_replay.masks import RoutingGeometry, RoutingMasks, RoutingMasksBatch, choose_codec, get_codec
from router_replay.masks.arguments import require_type
from router_replay.masks.batch import list_of_masks_or_none, row_checksum
from router_replay.replay.gate import FreshWeights
from router_replay.replay.layout import BatchLayout, require_layout
from router_replay.replay.microbatch import MicrobatchRoutes
from router_replay.replay.pairing import check_pairing
from router_replay.replay.shards import Shards
from router_replay.replay.spread import spread_rows

SAMPLED_PLACES = 64
"""At most as many replayed places of a microbatch are compared with the trainer's own choice."""

NATIVE_CAUSES = ("invalid", "stale", "no routes", "not in the rollout")
"""Why a place is native, as in `MicrobatchRoutes.native_causes`."""

# What is known of a token; the causes stand at their index in NATIVE_CAUSES.
_INVALID, _STALE, _NO_ROUTES, _NOT_IN_THE_ROLLOUT = range(4)
_REPLAYED, _UNREAD = 4, 5


def place(
    masks: Iterable[RoutingMasks | None] | RoutingMasksBatch,
    layout: BatchLayout,
    geometry: RoutingGeometry,
    device: torch.device,
    *,
    shards: Shards | None = None,
    fresh: FreshWeights | None = None,
    partial: bool = False,
    spread: bool = True,
    valid: bool = True,
) -> MicrobatchRoutes:
    """Check the pairing, and put the rows of this rank's places on `device`.

    Masks of a list whose tensors are on a device are read back here; nothing afterwards waits for the device. The rows
    of a batch that is on `device` are put in their places there.

    Args:
        masks: one for each sequence of the layout, in its order, each from token 0; None for a sequence without routes,
            which the trainer routes itself. A list, a batch or a part of one.
        layout: of whole sequences.
        geometry: of the model.
        shards: what part of the batch this rank's routers see; by default the layout is of this rank's places.
        fresh: which weights' routes are replayed; all by default.
        partial: accept masks that end before the last token but one of their sequence.
        spread: whether places of padding, and of last tokens without a row, take experts that load all alike; else they
            take the trainer's own.
        valid: whether some row of the masks has to be valid.

    Raises:
        InputError: masks or a layout that are something else, or sizes that cannot be cut into shards.
        PairingError: as of `check_pairing`.
    """
    recorded = list_of_masks_or_none(masks)
    require_layout(layout)
    if shards is not None:
        require_type("shards", shards, Shards)
    if fresh is not None:
        require_type("fresh", fresh, FreshWeights)
    check_pairing(recorded, layout, geometry, partial, valid)
    given = [one for one in recorded if one is not None]
    codec = get_codec(given[0].codec) if given else choose_codec("auto", geometry)
    called, routed = (layout, layout) if shards is None else (shards.called(layout), shards.routed(layout))

    # By token, and one more for the places of none.
    kinds = [_kinds(one, length, fresh) for one, length in zip(recorded, layout.lengths.tolist(), strict=True)]
    kind_of_token = torch.cat([*kinds, torch.tensor([_UNREAD], dtype=torch.uint8)])
    row_of_token = torch.cat([*_row_numbers(recorded, layout), torch.zeros(1, dtype=torch.int64)])
    token = torch.where(routed.is_padding, len(layout.token_ids), layout.cu_seqlens[routed.sequence] + routed.position)
    kind = kind_of_token[token]

    evenly = spread_rows(codec.name, geometry)
    num_recorded = sum(len(one) for one in given)
    source = torch.where(kind == _REPLAYED, row_of_token[token], num_recorded)
    unread = (kind == _UNREAD).nonzero().flatten()
    # Ranks begin at different rows, so that a few places of padding on each do not all load the same experts.
    first = 0 if shards is None else shards.part * len(evenly) // shards.num_parts
    source[unread] = num_recorded + (first + torch.arange(len(unread))) % len(evenly)
    own = kind < _REPLAYED if spread else kind != _REPLAYED

    counts = torch.bincount(kind, minlength=6).tolist()
    return MicrobatchRoutes(
        geometry=geometry,
        codec=codec,
        rows=_rows_of_places(masks if isinstance(masks, RoutingMasksBatch) else given, evenly, source, device),
        own_places=to_device(own.nonzero().flatten(), device),
        sample=to_device(sample_of((kind == _REPLAYED).nonzero().flatten()), device),
        called_ids=called_ids_on(called, device),
        num_replayed=counts[_REPLAYED],
        num_padding=counts[_UNREAD],
        native_causes=dict(zip(NATIVE_CAUSES, counts, strict=False)),
        fingerprint=fingerprint(layout, kind_of_token, given, _checksums(masks, given)),
    )


def _rows_of_places(
    masks: Sequence[RoutingMasks] | RoutingMasksBatch, spread: Tensor, source: Tensor, device: torch.device
) -> Tensor:
    """Row `source[i]` of all rows and those of `spread` behind them, for every place, on the device."""
    parts = [masks.rows] if isinstance(masks, RoutingMasksBatch) else [one.rows.cpu() for one in masks]
    there = parts[0].device if parts and parts[0].device.type == device.type else torch.device("cpu")
    table = torch.cat([*(part.to(there) for part in parts), to_device(spread, there)])
    # Whole rows at once; table[source] would go byte by byte.
    return to_device(table.index_select(0, to_device(source, there)), device)


def _checksums(masks: object, given: Sequence[RoutingMasks]) -> list[int]:
    """CRC-32 of the rows of every sequence that has masks."""
    if not isinstance(masks, RoutingMasksBatch):
        return [row_checksum(one.rows) for one in given]
    both = zip(masks.checksums, masks.token_digests, strict=True)
    return [checksum for checksum, digest in both if digest is not None]


def _kinds(masks: RoutingMasks | None, length: int, fresh: FreshWeights | None) -> Tensor:
    """What is known of each token of a sequence, `uint8 [length]`."""
    if masks is None:
        return torch.full((length,), _NO_ROUTES, dtype=torch.uint8)
    kinds = torch.full((length,), _NOT_IN_THE_ROLLOUT, dtype=torch.uint8)
    rows = kinds[: masks.num_tokens]
    rows.fill_(_REPLAYED)
    if fresh is not None:
        rows[~fresh.of(masks)] = _STALE
    rows[~masks.valid.cpu()] = _INVALID
    # The last token was sampled and not fed back: it has no row, and nothing comes after it that reads its output.
    if length and kinds[-1] in (_INVALID, _NOT_IN_THE_ROLLOUT):
        kinds[-1] = _UNREAD
    return kinds


def _row_numbers(recorded: Sequence[RoutingMasks | None], layout: BatchLayout) -> list[Tensor]:
    """By sequence, for each token the number of its row among all; beyond the masks' end it means nothing."""
    numbers, before = [], 0
    for one, length in zip(recorded, layout.lengths.tolist(), strict=True):
        numbers.append(torch.arange(before, before + length))
        before += 0 if one is None else one.num_tokens
    return numbers


def sample_of(places: Tensor) -> Tensor:
    """At most `SAMPLED_PLACES` of `int64 [n]`, evenly spread."""
    count = min(SAMPLED_PLACES, len(places))
    return places[torch.arange(count) * len(places) // max(count, 1)]


def called_ids_on(called: BatchLayout, device: torch.device) -> Tensor | None:
    """The token ids with which the model is called, on a device, as of `MicrobatchRoutes`."""
    return None if called.called_shape is None else to_device(called.called_ids(), device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy from the host without waiting for the device: from pinned memory. What is there already stays."""
    if tensor.device.type == device.type:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def fingerprint(
    layout: BatchLayout,
    kinds: Tensor | None = None,
    masks: Sequence[RoutingMasks] = (),
    checksums: Sequence[int] = (),
) -> int:
    """A number below 2**61 of what was bound; ranks with another number were given something else."""
    parts = [one.token_digest for one in masks]
    parts += [str(checksum) for checksum in checksums]
    # Not its places: a rank may have been given the layout of its own.
    vectors = (layout.token_ids, layout.cu_seqlens, *(() if kinds is None else (kinds,)))
    parts += [str(zlib.crc32(each.contiguous().numpy())) for each in vectors]
    digest = hashlib.blake2b(" ".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 3
