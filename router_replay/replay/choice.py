"""The experts of every place of one layer: recorded ones, and the trainer's own where nothing was recorded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from router_replay.errors import PairingError
from router_replay.replay.binding import State
from router_replay.replay.microbatch import MicrobatchRoutes

NativeTopK = Callable[[Tensor], Tensor]
"""The trainer's own choice: scores `[num_places, E]` -> experts `int64 [num_places, K]`."""


def replayed_experts(
    routes: MicrobatchRoutes, state: State, layer: int, router: object, scores: Tensor, native_topk: NativeTopK
) -> Tensor:
    """Experts `int64 [num_places, K]` of decoder layer `layer`, best first where they are the trainer's own.

    Native choices are kept in the surrounding checkpoints, so that a recompute takes the same ones.

    Args:
        routes: what is bound to this pass.
        state: that the router is called under.
        router: what native choices are kept under, one object for each router.
        scores: `[num_places, E]`, what the choice is made by.

    Raises:
        PairingError: another number of places than the layout's.
    """
    if scores.shape[0] != routes.num_places:
        raise PairingError(
            f"the router of decoder layer {layer} got {scores.shape[0]} places, the layout of this microbatch has"
            f" {routes.num_places}: build the layout from the token ids that the model is called with; sequence and"
            " context parallelism, which split them, are not supported yet"
        )
    experts = routes.experts(layer)
    if routes.num_native == 0:
        return experts
    native = next((frame.native_choices[router] for frame in state.frames if router in frame.native_choices), None)
    if native is None:
        chosen = native_topk(scores.detach())
        native = _best_first(scores.detach(), chosen, routes.native_places)
    for frame in state.frames:
        frame.native_choices.setdefault(router, native)
    return experts.index_copy_(0, routes.native_places, native)


def _best_first(scores: Tensor, chosen: Tensor, places: Tensor) -> Tensor:
    # A trainer's top-k may be sorted only where gradients are recorded (Megatron's is), and a checkpoint's forward
    # pass records none: without one order in both, softmax would add up in another order in the recompute.
    picked = chosen.index_select(0, places)
    order = scores.index_select(0, places).gather(1, picked).argsort(dim=1, descending=True, stable=True)
    return torch.gather(picked, 1, order)
