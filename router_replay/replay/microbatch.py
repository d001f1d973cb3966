"""The routes of one microbatch's places, packed on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from router_replay.masks import Codec, RoutingGeometry


@dataclass(frozen=True, eq=False)
class MicrobatchRoutes:
    """Packed rows of every place that this rank's routers see of a microbatch.

    A place is *replayed* (its routes were recorded), *native* (the trainer's own top-k chooses) or *padding* (nothing
    reads its output: it belongs to no token, or to a sequence's last one, which was sampled and never fed back; it gets
    K distinct experts that load all alike, or the trainer's own, as its end has it). It is made once, and may be bound
    to any number of passes.

    Attributes:
        geometry: of the rows; its MoE layers are those that can be asked for.
        codec: of the rows.
        rows: `uint8 [num_places, row_bytes]` on the device; those of `own_places` mean nothing.
        own_places: `int64 [n]` on the device, those that take the trainer's own experts: native ones, and padding where
            it does.
        sample: `int64 [n]` on the device, some of the replayed places, for comparing with the trainer's own choice.
        called_ids: `int64` on the device, the token ids in the shape in which the model is called here, -1 for padding;
            None where this is not known.
        num_replayed, num_padding: counts of places.
        native_causes: number of native places by cause: "invalid" (a row that is not valid), "stale" (of weights too
            old), "no routes" (a sequence without masks), "not in the rollout" (tokens after the masks' end).
        fingerprint: number below 2**61 that is the same on all ranks that were given the same masks and layout.
        source: "rollout", or "recorded" where the trainer itself made the routes.
    """

    geometry: RoutingGeometry
    codec: Codec
    rows: Tensor
    own_places: Tensor
    sample: Tensor
    called_ids: Tensor | None
    num_replayed: int
    num_padding: int
    native_causes: Mapping[str, int]
    fingerprint: int
    source: str = "rollout"

    @property
    def num_places(self) -> int:
        """Rows of a router's input."""
        return len(self.rows)

    @property
    def num_native(self) -> int:
        """Places that the trainer routes itself."""
        return sum(self.native_causes.values())

    def are_of(self, geometry: RoutingGeometry) -> bool:
        """Whether these are routes of this model: of all of its MoE layers, or of those that a chunk recorded."""
        if self.source == "rollout":
            return self.geometry == geometry
        same_but_layers = replace(self.geometry, moe_layers=geometry.moe_layers) == geometry
        return same_but_layers and set(self.geometry.moe_layers) <= set(geometry.moe_layers)

    def experts(self, layer: int) -> Tensor:
        """Experts of decoder layer `layer` (0-based) for every place, `int32 [num_places, K]`, freshly unpacked.

        Places that take the trainer's own hold placeholders that the caller overwrites.
        """
        return self.codec.unpack_layer(self.rows, self.geometry, self.geometry.index_of(layer))

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.rows.device
