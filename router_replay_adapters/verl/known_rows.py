"""Routes that nobody recorded are the trainer's own choice in verl's replay, in every layer by itself.

verl's `RouterReplay` has a mask of the tokens to replay, one for all layers, in which it leaves out the last token of a
response only. Here what a layer is given says itself what is known of it: by then verl has cut it for this rank.

Nobody knows a row of -1, nor one that has an expert twice, which is no choice of K experts: verl and SGLang's own
recorder write zeros where nothing was recorded. Dense layers are zeros, too, which no router asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor


def around_set_target_indices(original: Callable[..., None]) -> Callable[..., None]:
    """Of `RouterReplay.set_target_indices`: rows with an expert of -1, or one twice, are left out of the mask."""

    @wraps(original)
    def set_target_indices(router: Any, topk_indices: Tensor, replay_mask: Tensor | None = None) -> None:
        experts = topk_indices.sort(-1).values
        known = (experts[..., 0] >= 0) & (experts[..., 1:] != experts[..., :-1]).all(-1)
        if replay_mask is not None:
            known = known & replay_mask.bool()
        original(router, topk_indices, replay_mask=known)

    return set_target_indices


def around_get_replay_topk(original: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Of `RouterReplay.get_replay_topk`: a recompute takes what the forward pass took, also where that chose itself.

    verl chooses anew there, from logits whose last bits may differ.
    """

    @wraps(original)
    def get_replay_topk(router: Any, scores: Tensor, *args: Any, **others: Any) -> tuple[Tensor, Tensor]:
        forward = getattr(router.router_replay_action, "name", None) == "REPLAY_FORWARD"
        gates, indices = original(router, scores, *args, **others)
        if forward:
            for number, given in enumerate(router.replay_backward_list):
                if given is router.target_topk_idx:
                    router.replay_backward_list[number] = indices
                    router.replay_backward_mask_list[number] = None
        return gates, indices

    return get_replay_topk
