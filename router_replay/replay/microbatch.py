"""The masks of one microbatch, laid out as its routers see its tokens and kept packed on the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from router_replay.errors import PairingError
from router_replay.masks import Codec, RoutingGeometry, RoutingMasks, get_codec
from router_replay.masks.batch import list_of_masks
from router_replay.replay.layout import BatchLayout, require_layout


class MicrobatchRoutes:
    """Packed rows of every place of a microbatch, in the layout's order.

    A place is *replayed* (the rollout recorded its token), *native* (a token without a valid row: the trainer's own
    top-k chooses) or *padding* (K distinct experts, taken in turn so that padding loads all experts alike).

    Attributes:
        num_places, num_replayed, num_native, num_padding: counts of places; the last three add up to the first.
        native_places: `int64 [num_native]` on the device.
    """

    def __init__(
        self,
        masks: Iterable[RoutingMasks],
        layout: BatchLayout,
        geometry: RoutingGeometry,
        device: torch.device,
        *,
        partial: bool = False,
    ) -> None:
        """Check the pairing and move the rows to `device`.

        Masks whose tensors are on a device are read back here; the forward pass itself never waits.

        Args:
            masks: one for each sequence of the layout, in its order, each from token 0.
            layout: of the whole sequences, whichever of their tokens have a place.
            geometry: of the model.
            partial: accept masks that end before the last token but one of their sequence.

        Raises:
            InputError: masks or a layout that are something else.
            PairingError: masks of another model, of other tokens, of another number of sequences; a missing prefix,
                rows beyond a sequence or, without `partial`, short of it; mixed codecs.
        """
        recorded = list_of_masks(masks)
        require_layout(layout)
        _check(recorded, layout, geometry, partial)
        self.geometry = geometry
        self._codec: Codec = get_codec(recorded[0].codec)
        padding = layout.is_padding
        counts = torch.tensor([one.num_tokens for one in recorded])
        rows = torch.cat([one.rows.cpu() for one in recorded])
        valid = torch.cat([one.valid.cpu() for one in recorded])
        sequence = layout.sequence.clamp(min=0)
        has_row = ~padding & (layout.position < counts[sequence])
        source = ((counts.cumsum(0) - counts)[sequence] + layout.position)[has_row]
        replayed = has_row.clone()
        replayed[has_row] = valid[source]
        spread = _spread_rows(self._codec, geometry)
        packed = spread[:1].repeat(layout.num_places, 1)
        self.num_padding = int(padding.sum())
        packed[padding] = spread[torch.arange(self.num_padding) % geometry.num_experts]
        packed[replayed] = rows[source[valid[source]]]
        native = (~padding & ~replayed).nonzero().flatten()
        self.num_places = layout.num_places
        self.num_native = native.numel()
        self.num_replayed = self.num_places - self.num_native - self.num_padding
        self.native_places = native.to(device)
        self._packed = packed.to(device)

    def experts(self, layer: int) -> Tensor:
        """Experts of decoder layer `layer` (0-based) for every place, `int64 [num_places, K]`, freshly unpacked.

        Native places hold placeholders that the caller overwrites.
        """
        return self._codec.unpack_layer(self._packed, self.geometry, self.geometry.index_of(layer)).long()


def _check(masks: list[RoutingMasks], layout: BatchLayout, geometry: RoutingGeometry, partial: bool) -> None:
    if len(masks) != layout.num_sequences or not masks:
        raise PairingError(
            f"the layout has {layout.num_sequences} sequences, masks were given for {len(masks)}: pass one RoutingMasks"
            " per sequence, in the layout's order"
        )
    for index, (one, token_ids) in enumerate(zip(masks, layout.by_sequence(layout.token_ids), strict=True)):
        one.geometry.require_same(geometry, "the rollout", "this model")
        if one.start != 0:
            raise PairingError(
                f"masks of sequence {index} begin at token {one.start}, the sequence at token 0: join the masks of all "
                "turns first (RoutingMasks.join)"
            )
        if one.end > token_ids.numel():
            raise PairingError(
                f"masks of sequence {index} cover {one.end} tokens, the layout gives it {token_ids.numel()}: do not cut"
                " a sequence shorter than its rollout without cutting its masks (RoutingMasks.cut)"
            )
        if one.codec != masks[0].codec:
            raise PairingError(
                f"masks of sequence {index} use codec {one.codec!r}, those of sequence 0 {masks[0].codec!r}: one "
                "microbatch needs one codec"
            )
        try:
            one.check_tokens(token_ids)
        except PairingError as error:
            raise PairingError(
                f"masks of sequence {index}: {error}; a batch that is padded on the left needs"
                ' BatchLayout.padded(..., side="left")'
            ) from error
        # The last token of a rollout was sampled and not fed back: it alone has no row.
        if one.end < token_ids.numel() - 1 and not partial:
            raise PairingError(
                f"masks of sequence {index} cover {one.end} tokens, the layout gives it {token_ids.numel()}: the tokens"
                " after them would be routed natively; join the masks of all turns (RoutingMasks.join), or pass"
                " partial=True if these tokens were never in the rollout"
            )


def _spread_rows(codec: Codec, geometry: RoutingGeometry) -> Tensor:
    """Rows that load all experts alike: E packed rows, row i with experts i*K, i*K + 1, ... modulo E in every layer."""
    first = torch.arange(geometry.num_experts)[:, None] * geometry.top_k
    experts = (first + torch.arange(geometry.top_k)) % geometry.num_experts
    return codec.pack(experts[:, None].expand(-1, geometry.num_moe_layers, -1), geometry)
