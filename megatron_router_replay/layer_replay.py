"""The object that sits in `TopKRouter.router_replay` and answers which experts each token takes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from router_replay.errors import CallOrderError
from router_replay.replay.binding import Replays, current
from router_replay.replay.choice import replayed_experts
from router_replay.replay.microbatch import MicrobatchRoutes

TopK = Callable[[Tensor, int, int | None, int | None], tuple[Tensor, Tensor]]


class LayerReplay:
    """Replays one decoder layer.

    Only the choice is replaced: gates come from the trainer's own scores at the chosen experts, so that for
    softmax after top-k g_i = I_i exp(s_i) / sum_j I_j exp(s_j) and the router keeps learning
    (arXiv 2510.11370, equation of routing replay).

    Attributes:
        layer: 0-based decoder layer.
        layer_number: Megatron's 1-based number, which `TopKRouter.set_layer_number` keeps up to date.
    """

    def __init__(self, replay: Replays, layer: int) -> None:
        self.layer = layer
        self.layer_number: int | None = layer + 1
        self._replay = replay

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: TopK,
    ) -> tuple[Tensor, Tensor]:
        """Scores and experts `[num_places, K]` of every place; Megatron calls this in place of its top-k.

        Args:
            scores: `[num_places, E]`, what the choice is made by: logits, or probabilities, or these plus a bias.
            default_compute_topk: Megatron's own choice.

        Raises:
            CallOrderError: neither masks nor native routing were asked for.
            PairingError: another number of places than the layout's.
        """
        state = current()
        binding = state.bindings.get(self._replay)
        if binding is None:
            raise CallOrderError(
                f"decoder layer {self.layer} is attached to a replay, but this forward pass has no masks: wrap the call"
                " of the model in replay.microbatch(masks, layout), or in replay.off() for native routing"
            )

        def native(of: Tensor) -> tuple[Tensor, Tensor]:
            return default_compute_topk(of, topk, num_groups, group_topk)

        if isinstance(binding, MicrobatchRoutes):
            experts = replayed_experts(binding, state, self.layer, self, scores, lambda of: native(of)[1])
            probs = scores.gather(1, experts)
        else:
            probs, experts = native(scores)
        if self._replay.observer is not None and not state.recomputing:
            self._replay.observer.record(self.layer, experts)
        return probs, experts
