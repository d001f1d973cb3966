"""The masks of one microbatch, laid out as its routers see its tokens and kept packed on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from router_replay.errors import PairingError
from router_replay.masks.codecs.row_codec import Codec, get_codec
from router_replay.masks.geometry import RoutingGeometry
from router_replay.masks.masks import RoutingMasks
from router_replay.replay.layout import BatchLayout


class MicrobatchRoutes:
    """Packed rows of every token of a microbatch, in the layout's order.

    A row is *replayed* (the rollout recorded it), *native* (a token without a valid row: the trainer's own top-k
    chooses) or *padding* (K distinct experts, taken in turn so that padding loads all experts alike).

    Attributes:
        num_rows, num_replayed, num_native, num_padding: counts of rows; the last three add up to the first.
        native_rows: `int64 [num_native]` on the device.
    """

    def __init__(
        self,
        masks: Sequence[RoutingMasks],
        layout: BatchLayout,
        geometry: RoutingGeometry,
        device: torch.device,
        *,
        partial: bool = False,
    ) -> None:
        """Check the pairing and move the rows to `device`.

        Masks whose tensors are on a device are read back here; the forward pass itself never waits.

        Raises:
            PairingError: masks of another model.
            PairingError: masks of other tokens.
            PairingError: another number of sequences, a missing prefix, rows beyond a sequence or, without
                `partial`, short of it, mixed codecs.
        """
        _check(masks, layout, geometry, partial)
        self.geometry = geometry
        self._codec: Codec = get_codec(masks[0].codec)
        spread = _spread_rows(self._codec, geometry)
        packed = spread[:1].repeat(layout.num_rows, 1)
        packed[layout.padding_rows] = spread[torch.arange(layout.padding_rows.numel()) % geometry.num_experts]
        is_native = torch.zeros(layout.num_rows, dtype=torch.bool)
        for one, places in zip(masks, layout.rows, strict=True):
            is_native[places] = True
            valid = one.valid.cpu()
            replayed = places[: one.num_tokens][valid]
            is_native[replayed] = False
            packed[replayed] = one.rows.cpu()[valid]
        native = is_native.nonzero().flatten()
        self.num_rows = layout.num_rows
        self.num_native = native.numel()
        self.num_padding = layout.padding_rows.numel()
        self.num_replayed = self.num_rows - self.num_native - self.num_padding
        self.native_rows = native.to(device)
        self._packed = packed.to(device)

    def experts(self, layer: int) -> Tensor:
        """Experts of decoder layer `layer` (0-based) for every row, `int64 [num_rows, K]`, freshly unpacked.

        Native rows hold placeholders that the caller overwrites.
        """
        return self._codec.unpack_layer(self._packed, self.geometry, self.geometry.index_of(layer)).long()


def _check(masks: Sequence[RoutingMasks], layout: BatchLayout, geometry: RoutingGeometry, partial: bool) -> None:
    if len(masks) != layout.num_sequences or not masks:
        raise PairingError(
            f"the layout has {layout.num_sequences} sequences, masks were given for {len(masks)}: pass one RoutingMasks"
            " per sequence, in the layout's order"
        )
    for index, (one, token_ids) in enumerate(zip(masks, layout.token_ids, strict=True)):
        one.geometry.require_same(geometry, "the rollout", "this model")
        if one.start != 0:
            raise PairingError(
                f"masks of sequence {index} begin at token {one.start}, the sequence at token 0: join the masks of all "
                "turns first (RoutingMasks.join)"
            )
        if one.end > token_ids.numel():
            raise PairingError(
                f"masks of sequence {index} cover {one.end} tokens, the layout gives it {token_ids.numel()}: do not cut"
                " a sequence shorter than its rollout without cutting its masks"
            )
        if one.codec != masks[0].codec:
            raise PairingError(
                f"masks of sequence {index} use codec {one.codec!r}, those of sequence 0 {masks[0].codec!r}: one "
                "microbatch needs one codec"
            )
        one.check_tokens(token_ids)
        # The last token of a rollout was sampled and not fed back: it alone has no row.
        if one.end < token_ids.numel() - 1 and not partial:
            raise PairingError(
                f"masks of sequence {index} cover {one.end} tokens, the layout gives it {token_ids.numel()}: the tokens"
                " after them would be routed natively; join the masks of all turns (RoutingMasks.join), or pass"
                " partial=True if these tokens were never in the rollout"
            )


def _spread_rows(codec: Codec, geometry: RoutingGeometry) -> Tensor:
    """E packed rows; row i holds experts i*K, i*K + 1, ... modulo E in every layer."""
    first = torch.arange(geometry.num_experts)[:, None] * geometry.top_k
    experts = (first + torch.arange(geometry.top_k)) % geometry.num_experts
    return codec.pack(experts[:, None].expand(-1, geometry.num_moe_layers, -1), geometry)
