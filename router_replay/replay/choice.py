"""The experts of every place of one layer: recorded ones, and the trainer's own where nothing was recorded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from router_replay.errors import PairingError
from router_replay.replay.binding import State
from router_replay.replay.bound_pass import BoundPass
from router_replay.replay.microbatch import MicrobatchRoutes

NativeTopK = Callable[[Tensor], Tensor]
"""The trainer's own choice by scores: scores `[n, E]` of any n places -> experts `int [n, K]`."""

OwnChoice = Callable[[Tensor], Tensor]
"""The trainer's own choice at some places: `int64 [n]` on the device -> experts `int [n, K]`."""


def replayed_experts(
    routes: MicrobatchRoutes, state: State, layer: int, router: object, scores: Tensor, native_topk: NativeTopK
) -> Tensor:
    """Experts `int32 [num_places, K]` of decoder layer `layer`, best first where they are the trainer's own.

    The trainer's top-k runs for places that take its own only, and not at all where there are none.

    Args:
        routes, state, layer, router: as of `replayed_or_own`.
        scores: `[num_places, E]`, what the choice is made by.

    Raises:
        PairingError: as of `replayed_or_own`.
    """

    def own(places: Tensor) -> Tensor:
        of_native = scores.detach().index_select(0, places)
        return _best_first(of_native, native_topk(of_native))

    return replayed_or_own(routes, state, layer, router, scores, own)


def replayed_or_own(
    routes: MicrobatchRoutes, state: State, layer: int, router: object, by_place: Tensor, own: OwnChoice
) -> Tensor:
    """Experts `int32 [num_places, K]` of decoder layer `layer`: recorded ones, or the trainer's own.

    The trainer's own choices are kept in the surrounding checkpoints, so that a recompute takes the same ones.

    Args:
        routes: what is bound to this pass.
        state: that the router is called under.
        router: what native choices are kept under, one object for each router.
        by_place: any tensor of the router's with a row for each place, `[num_places, ...]`.
        own: the trainer's own choice; asked for the places that take it, where there are any.

    Raises:
        PairingError: another number of places than the layout's, or another device than that of the rows.
    """
    if by_place.shape[0] != routes.num_places:
        raise PairingError(
            f"the router of decoder layer {layer} got {by_place.shape[0]} places, the layout of this microbatch has"
            f" {routes.num_places} on this rank: build the layout from the token ids of whole sequences that the model"
            " is called with, in the same shape"
        )
    if by_place.device != routes.device:
        raise PairingError(
            f"the router of decoder layer {layer} computes on {by_place.device}, the rows of this microbatch are on"
            f" {routes.device}: attach and place when the model is on the device where it runs"
        )
    experts = routes.experts(layer)
    if not len(routes.own_places):
        return experts
    native = next((frame.native_choices[router] for frame in state.frames if router in frame.native_choices), None)
    if native is None:
        native = own(routes.own_places).to(experts.dtype)
    for frame in state.frames:
        frame.native_choices.setdefault(router, native)
    return experts.index_copy_(0, routes.own_places, native)


def compare_with_own(bound: BoundPass, layer: int, experts: Tensor, own: OwnChoice) -> None:
    """Note how far the replayed experts of some places are those that the trainer would have taken."""
    if bound.overlap is None or bound.routes is None or not len(bound.routes.sample):
        return
    sample = bound.routes.sample
    bound.overlap.compare(layer, own(sample), experts.index_select(0, sample))


def in_own_order(experts: Tensor, own: Tensor) -> Tensor:
    """Experts `int [n, K]` in the columns of the trainer's own choice `int [n, K]`, at places that take the same ones.

    A codec that forgets the columns gives a place's experts in ascending order; sums over them are then rounded in
    another order than the trainer's, although nothing else differs.
    """
    same = (experts[:, :, None] == own[:, None, :]).any(2).all(1, keepdim=True)
    return torch.where(same, own, experts)


def _best_first(scores: Tensor, chosen: Tensor) -> Tensor:
    # A trainer's top-k may be sorted only where gradients are recorded (Megatron's is), and a checkpoint's forward
    # pass records none: without one order in both, softmax would add up in another order in the recompute.
    return chosen.gather(1, scores.gather(1, chosen).argsort(dim=1, descending=True, stable=True))
