"""The object that sits in `TopKRouter.router_replay` and answers which experts each token takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from router_replay.errors import CallOrderError, PairingError
from router_replay.replay import binding as scope
from router_replay.replay.microbatch import MicrobatchRoutes

if TYPE_CHECKING:
    from megatron_router_replay.attach import Replay

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

    def __init__(self, replay: Replay, layer: int) -> None:
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
        """Scores and experts `[num_rows, K]` of every token; Megatron calls this in place of its top-k.

        Args:
            scores: `[num_rows, E]`, what the choice is made by: logits, or probabilities, or these plus a bias.
            default_compute_topk: Megatron's own choice.

        Raises:
            CallOrderError: neither masks nor native routing were asked for.
            PairingError: another number of tokens than the layout's.
        """
        state = scope.current()
        binding = state.bindings.get(self._replay)
        if binding is None:
            raise CallOrderError(
                f"decoder layer {self.layer} is attached to a replay, but this forward pass has no masks: wrap the call"
                " of the model in replay.microbatch(masks, layout), or in replay.off() for native routing"
            )
        if isinstance(binding, MicrobatchRoutes):
            experts = self._experts(binding, state, scores, topk, num_groups, group_topk, default_compute_topk)
            probs = scores.gather(1, experts)
        else:
            probs, experts = default_compute_topk(scores, topk, num_groups, group_topk)
        if self._replay.observer is not None and not state.recomputing:
            self._replay.observer.record(self.layer, experts)
        return probs, experts

    def _experts(
        self,
        routes: MicrobatchRoutes,
        state: scope.State,
        scores: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: TopK,
    ) -> Tensor:
        if scores.shape[0] != routes.num_rows:
            raise PairingError(
                f"the router of decoder layer {self.layer} got {scores.shape[0]} tokens, the layout of this microbatch "
                f"has {routes.num_rows} rows: build the layout from the token ids that this rank's layers see (sequence"
                " and context parallelism split them)"
            )
        experts = routes.experts(self.layer)
        if routes.num_native == 0:
            return experts
        native = next((frame.native_choices[self] for frame in state.frames if self in frame.native_choices), None)
        if native is None:
            _, chosen = default_compute_topk(scores.detach(), topk, num_groups, group_topk)
            native = _best_first(scores.detach(), chosen, routes.native_rows)
        for frame in state.frames:
            frame.native_choices.setdefault(self, native)
        return experts.index_copy_(0, routes.native_rows, native)


def _best_first(scores: Tensor, chosen: Tensor, rows: Tensor) -> Tensor:
    # Megatron's top-k is sorted only where gradients are recorded, and a checkpoint's forward pass records none:
    # without one order in both, softmax would add up in another order in the recompute.
    picked = chosen.index_select(0, rows)
    order = scores.index_select(0, rows).gather(1, picked).argsort(dim=1, descending=True, stable=True)
    return torch.gather(picked, 1, order)
