"""The hook behind a router's forward, which answers which experts each token takes."""

from __future__ import annotations

from torch import Tensor, nn

from hf_router_replay.gates import Gates
from router_replay.replay.binding import Native, Replays
from router_replay.replay.choice import compare_with_own, in_own_order, replayed_or_own
from router_replay.replay.routed_layer import RoutedLayer
from router_replay.replay.uncompiled import never_compiled


class LayerReplay(RoutedLayer):
    """Replays one decoder layer.

    Only the choice is replaced: gates come from the trainer's own logits at the chosen experts, by the formula of the
    model's family, so that the router keeps learning (arXiv 2510.11370, equation of routing replay). The router's own
    choice is made in any case; places without recorded routes take it, column by column, and places whose recorded
    experts are the same, by a codec that forgets their columns, take its columns.
    """

    def __init__(self, replay: Replays, layer: int, gates: Gates) -> None:
        super().__init__(replay, layer)
        self._gates = gates

    @never_compiled
    def __call__(
        self, router: nn.Module, args: tuple[object, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits `[num_places, E]`, and gates and experts `[num_places, K]` of every place, in the router's dtypes.

        Args:
            output: of the router itself.

        Raises:
            CallOrderError: neither masks nor native routing were asked for, or a second pass inside of one block.
            PairingError: another number of places than the layout's.
        """
        logits, _, own = output
        state, binding = self.bound()
        if isinstance(binding, Native) or binding.routes is None:
            self.note(state, binding, own)
            return output

        def own_at(places: Tensor) -> Tensor:
            return own.index_select(0, places)

        experts = replayed_or_own(binding.routes, state, self.layer, self, own, own_at)
        if not state.recomputing:
            compare_with_own(binding, self.layer, experts, own_at)
        experts = experts.to(own.dtype)
        if not binding.routes.codec.keeps_order:
            experts = in_own_order(experts, own)
        self.note(state, binding, experts)
        return logits, self._gates(router, logits, experts), experts
