"""The object that sits in `TopKRouter.router_replay` and answers which experts each token takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.transformer.moe.moe_utils import group_limited_topk
from torch import Tensor

from router_replay.replay.binding import Native, Replays
from router_replay.replay.choice import compare_with_own, replayed_experts
from router_replay.replay.routed_layer import RoutedLayer

TopK = Callable[[Tensor, int, int | None, int | None], tuple[Tensor, Tensor]]


class LayerReplay(RoutedLayer):
    """Replays one decoder layer.

    Only the choice is replaced: gates come from the trainer's own scores at the chosen experts, so that for
    softmax after top-k g_i = I_i exp(s_i) / sum_j I_j exp(s_j) and the router keeps learning
    (arXiv 2510.11370, equation of routing replay).

    Attributes:
        layer_number: Megatron's 1-based number, which `TopKRouter.set_layer_number` keeps up to date.
    """

    def __init__(self, replay: Replays, layer: int, layer_number: int, index_dtype: torch.dtype) -> None:
        """Answer for the router of `layer`, with experts of `index_dtype`."""
        super().__init__(replay, layer)
        self.layer_number: int | None = layer_number
        self._index_dtype = index_dtype

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
            CallOrderError: neither masks nor native routing were asked for, or a second pass inside of one block.
            PairingError: another number of places than the layout's.
        """
        state, binding = self.bound()
        if isinstance(binding, Native) or binding.routes is None:
            probs, experts = default_compute_topk(scores, topk, num_groups, group_topk)
        else:

            def native(of: Tensor) -> Tensor:
                return _own_choice(of, topk, num_groups, group_topk, default_compute_topk)

            experts = replayed_experts(binding.routes, state, self.layer, self, scores, native)
            if not state.recomputing:
                compare_with_own(binding, self.layer, experts, lambda at: native(scores.detach().index_select(0, at)))
            experts = experts.to(self._index_dtype)
            probs = scores.gather(1, experts)
        self.note(state, binding, experts)
        return probs, experts


def _own_choice(
    scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, default_compute_topk: TopK
) -> Tensor:
    """Megatron's own choice for some of the places.

    Its group-limited choice is called by its own name, since the function that the router hands over looks up the
    number of places among its caller's variables, and there it is that of all places.
    """
    if group_topk:
        num_places, num_experts = scores.shape
        return group_limited_topk(scores, topk, num_places, num_experts, num_groups, group_topk)[1]
    return default_compute_topk(scores, topk, num_groups, group_topk)[1]


def index_dtype(device: torch.device) -> torch.dtype:
    """The dtype of experts: int32 where torch gathers and scatters by it on `device`, else int64, twice as large."""
    scores = torch.zeros(1, 2, device=device, requires_grad=True)
    index = torch.zeros(1, 1, dtype=torch.int32, device=device)
    try:
        gates = scores.gather(1, index)
        torch.zeros_like(scores).scatter(1, index, gates).sum().backward()
    except RuntimeError:
        return torch.int64
    return torch.int32
