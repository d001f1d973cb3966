"""The experts of every place of one layer: recorded ones, and the trainer's own where nothing was recorded."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from router_replay.errors import PairingError
from router_replay.replay.binding import State
from router_replay.replay.bound_pass import BoundPass
from router_replay.replay.microbatch import MicrobatchRoutes

NativeTopK = Callable[[Tensor], Tensor]
"""The trainer's own choice: scores `[n, E]` of any n places -> experts `int [n, K]`."""


def replayed_experts(
    routes: MicrobatchRoutes, state: State, layer: int, router: object, scores: Tensor, native_topk: NativeTopK
) -> Tensor:
    """Experts `int32 [num_places, K]` of decoder layer `layer`, best first where they are the trainer's own.

    The trainer's top-k runs for native places only, and not at all where there are none. Its choices are kept in the
    surrounding checkpoints, so that a recompute takes the same ones.

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
            f" {routes.num_places} on this rank: build the layout from the token ids of whole sequences that the model"
            " is called with, in the same shape"
        )
    if scores.device != routes.device:
        raise PairingError(
            f"the router of decoder layer {layer} computes on {scores.device}, the rows of this microbatch are on"
            f" {routes.device}: attach and place when the model is on the device where it runs"
        )
    experts = routes.experts(layer)
    if routes.num_native == 0:
        return experts
    native = next((frame.native_choices[router] for frame in state.frames if router in frame.native_choices), None)
    if native is None:
        of_native = scores.detach().index_select(0, routes.native_places)
        native = _best_first(of_native, native_topk(of_native)).to(experts.dtype)
    for frame in state.frames:
        frame.native_choices.setdefault(router, native)
    return experts.index_copy_(0, routes.native_places, native)


def compare_with_own(bound: BoundPass, layer: int, scores: Tensor, experts: Tensor, native_topk: NativeTopK) -> None:
    """Note how far the replayed experts of some places are those that the trainer would have taken."""
    if bound.overlap is None or bound.routes is None or not len(bound.routes.sample):
        return
    sample = bound.routes.sample
    own = native_topk(scores.detach().index_select(0, sample))
    bound.overlap.compare(layer, own, experts.index_select(0, sample))


def _best_first(scores: Tensor, chosen: Tensor) -> Tensor:
    # A trainer's top-k may be sorted only where gradients are recorded (Megatron's is), and a checkpoint's forward
    # pass records none: without one order in both, softmax would add up in another order in the recompute.
    return chosen.gather(1, scores.gather(1, chosen).argsort(dim=1, descending=True, stable=True))
