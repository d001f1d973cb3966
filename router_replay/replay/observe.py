"""The routes that a forward pass took, for metrics and for replaying the trainer's own earlier routes."""

from __future__ import annotations

import torch
from torch import Tensor

from router_replay.errors import CallOrderError, PairingError
from router_replay.replay.layout import BatchLayout, require_layout
from router_replay.replay.shards import Shards


class ObservedRoutes:
    """Experts of every attached layer in one forward pass; recomputes are not recorded again.

    Attributes:
        layers: 0-based decoder layers that are recorded, ascending: the routed ones of the model chunks here.
    """

    def __init__(self, layers: tuple[int, ...], *, batch_first: bool = False) -> None:
        """Make ready for one pass, whose routers see places in the order of `batch_first` of `Shards`."""
        self.layers = layers
        self._order = Shards(batch_first=batch_first)
        self._experts: dict[int, Tensor] = {}

    def record(self, layer: int, experts: Tensor) -> None:
        """Keep the experts `[num_places, K]` of one layer."""
        if layer in self._experts:
            raise CallOrderError(
                f"decoder layer {layer} routed a second forward pass inside one observe(): observe each pass by itself"
            )
        self._experts[layer] = experts.detach()

    def indices(self, layout: BatchLayout) -> list[Tensor]:
        """Per sequence of `layout` the experts `int64 [n_i, num_layers, K]`, in the routers' column order.

        A token that has no place in the layout has -1.

        Raises:
            CallOrderError: a layer is missing: no whole forward pass was observed.
            PairingError: the pass had another number of places than the layout.
        """
        require_layout(layout)
        layout = self._order.routed(layout)
        missing = [layer for layer in self.layers if layer not in self._experts]
        if missing:
            raise CallOrderError(
                f"no routes of decoder layers {missing} were observed, of {list(self.layers)}: run one whole forward "
                "pass inside observe()"
            )
        experts = torch.stack([self._experts[layer] for layer in self.layers], dim=1)
        if experts.shape[0] != layout.num_places:
            raise PairingError(
                f"the observed pass had {experts.shape[0]} places, the layout has {layout.num_places}: pass the layout"
                " of the batch that was observed"
            )
        return list(layout.by_sequence(layout.of_tokens(experts, -1)))
