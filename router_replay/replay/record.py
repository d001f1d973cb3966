"""The trainer's own routes of a forward pass, kept to be replayed later: R2, replay of the old policy's routes.

The old log-probabilities are computed by a pass under `record`, and the training passes after it replay its routes, so
that a policy update changes the gates and not the choice (routing replay, arXiv 2507.18071). On the same rank a
recording is bound as it is; where another rank will hold its tokens, or another layout, the parts of all ranks are
joined into masks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from router_replay.errors import CallOrderError, InputError, PairingError
from router_replay.masks import Codec, RoutingGeometry, RoutingMasks, choose_codec
from router_replay.replay.layout import BatchLayout
from router_replay.replay.microbatch import MicrobatchRoutes
from router_replay.replay.placement import called_ids_on, sample_of, to_device


@dataclass(frozen=True, eq=False)
class RecordedPart:
    """What one rank recorded of one microbatch, on the CPU, to be sent to where parts are joined.

    Attributes:
        layout: of the places that this rank's routers saw.
        geometry: of the whole model.
        layers: decoder layers that were recorded here, ascending.
        rows: `uint8 [num_places, row_bytes]` of these layers.
        codec: name of the codec of `rows`.
    """

    layout: BatchLayout
    geometry: RoutingGeometry
    layers: tuple[int, ...]
    rows: Tensor
    codec: str


class RouteRecorder:
    """Keeps the experts of one forward pass, and packs them on the device when it ends.

    Nothing here waits for the device, but `part`.
    """

    def __init__(
        self,
        layout: BatchLayout,
        called: BatchLayout,
        geometry: RoutingGeometry,
        device: torch.device,
        fingerprint: int,
    ) -> None:
        """Make ready for one pass.

        Args:
            layout: of this rank's places.
            called: of the places that the model is called with on this rank.
            geometry: of the whole model.
            device: of the routers.
            fingerprint: of the layout of whole sequences.
        """
        self._layout, self._geometry, self._fingerprint = layout, geometry, fingerprint
        self._called_ids = called_ids_on(called, device)
        self._device = device
        self._experts: dict[int, Tensor] = {}
        self._layers: tuple[int, ...] = ()
        self._routes: MicrobatchRoutes | None = None

    @property
    def num_places(self) -> int:
        """Rows that a router's input must have."""
        return self._layout.num_places

    @property
    def called_ids(self) -> Tensor | None:
        """As of `MicrobatchRoutes`."""
        return self._called_ids

    def record(self, layer: int, experts: Tensor) -> None:
        """Keep the experts `[num_places, K]` that decoder layer `layer` took.

        Raises:
            PairingError: another number of places than the layout's.
        """
        if len(experts) != self.num_places:
            raise PairingError(
                f"the router of decoder layer {layer} got {len(experts)} places, the layout that is recorded has"
                f" {self.num_places} on this rank: build the layout from the token ids that the model is called with"
            )
        self._experts[layer] = experts.detach()

    def finish(self) -> None:
        """Pack what was recorded, at the end of the pass."""
        self._layers = tuple(sorted(self._experts))
        here = _of_layers(self._geometry, self._layers)
        codec: Codec = choose_codec("auto", here, order=True)
        if self._layers:
            rows = codec.pack(torch.stack([self._experts[layer] for layer in self._layers], dim=1), here)
        else:
            # A chunk without MoE layers: rows that no codec unpacks.
            rows = torch.empty(self.num_places, 0, dtype=torch.uint8, device=self._device)
        self._experts.clear()
        replayed = (~self._layout.is_padding).nonzero().flatten()
        self._routes = MicrobatchRoutes(
            geometry=here,
            codec=codec,
            rows=rows,
            own_places=to_device(replayed[:0], rows.device),
            sample=to_device(sample_of(replayed), rows.device),
            called_ids=self._called_ids,
            num_replayed=len(replayed),
            num_padding=self.num_places - len(replayed),
            native_causes={},
            fingerprint=self._fingerprint,
            source="recorded",
        )

    @property
    def routes(self) -> MicrobatchRoutes:
        """What was recorded, to be bound to further passes of the same microbatch and model chunk on this rank.

        Padding takes what it took in the recorded pass.

        Raises:
            CallOrderError: the pass has not ended.
        """
        if self._routes is None:
            raise CallOrderError(
                "nothing is recorded yet: use it after the block of record(), inside of which the model was called"
            )
        return self._routes

    def part(self) -> RecordedPart:
        """What was recorded, on the CPU. Waits for the device.

        Raises:
            CallOrderError: as of `routes`.
        """
        routes = self.routes
        return RecordedPart(self._layout, self._geometry, self._layers, routes.rows.cpu(), routes.codec.name)


def join_parts(parts: Iterable[RecordedPart]) -> list[RoutingMasks]:
    """Masks of the sequences of one microbatch, from what all ranks and model chunks recorded of it.

    Parts of pipeline stages and chunks bring other layers, those of sequence- and context-parallel ranks other tokens;
    a token that no part has in every layer is not valid.

    Args:
        parts: in any order.

    Raises:
        InputError: no parts.
        PairingError: parts of other sequences or of another model.
    """
    listed = list(parts) if isinstance(parts, Iterable) else []
    if not listed or not all(isinstance(part, RecordedPart) for part in listed):
        raise InputError("no parts to join: pass what part() gave on every rank, for every model chunk")
    first = listed[0]
    for number, part in enumerate(listed[1:], start=1):
        part.geometry.require_same(first.geometry, f"part {number}", "part 0")
        same_tokens = torch.equal(part.layout.token_ids, first.layout.token_ids)
        if not same_tokens or not torch.equal(part.layout.cu_seqlens, first.layout.cu_seqlens):
            raise PairingError(
                f"part {number} is of other sequences than part 0: join the parts of one microbatch at a time"
            )
    geometry, layout = first.geometry, first.layout
    experts = torch.full((len(layout.token_ids), geometry.num_moe_layers, geometry.top_k), -1, dtype=torch.int32)
    for part in listed:
        _fill(experts, part)
    valid = (experts >= 0).all(-1).all(-1)
    return [
        RoutingMasks.from_indices(
            of_sequence, known, start=0, geometry=geometry, codec=first.codec, token_ids=token_ids
        )
        for of_sequence, known, token_ids in _by_sequence(layout, experts, valid, layout.token_ids)
    ]


def _fill(experts: Tensor, part: RecordedPart) -> None:
    whole, layout = part.geometry, part.layout
    if not part.layers:
        return
    here = _of_layers(whole, part.layers)
    inside = ~layout.is_padding
    tokens = layout.cu_seqlens[layout.sequence[inside]] + layout.position[inside]
    columns = torch.tensor([whole.index_of(layer) for layer in part.layers])
    found = choose_codec(part.codec, here).unpack_indices(part.rows[inside], here)
    experts[tokens[:, None], columns] = found


def _of_layers(whole: RoutingGeometry, layers: tuple[int, ...]) -> RoutingGeometry:
    return replace(whole, moe_layers=layers) if layers else whole


def _by_sequence(layout: BatchLayout, *tensors: Tensor) -> Sequence[tuple[Tensor, ...]]:
    return list(zip(*(layout.by_sequence(tensor) for tensor in tensors), strict=True))
