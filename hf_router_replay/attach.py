"""Attach replay to a live model of transformers, after checking that it is one that replay can be right for."""

from __future__ import annotations

from torch import nn

from hf_router_replay.formula import require_formula
from hf_router_replay.layer_replay import LayerReplay
from hf_router_replay.ledger import ledger_of
from hf_router_replay.live_model import device_of, input_embedding, live_layers
from hf_router_replay.refusals import check_model, check_routers, check_weights
from hf_router_replay.replay import Replay
from router_replay.errors import CallOrderError, InputError
from router_replay.masks.arguments import require_type
from router_replay.masks.geometry import RoutingGeometry
from router_replay.replay.attached import require_overlap_every
from router_replay.upstream import require


def attach(model: nn.Module, geometry: RoutingGeometry | None = None, *, overlap_every: int | None = 100) -> Replay:
    """Put a replay behind every router of a model's decoder layers.

    Args:
        model: with its weights, on the device where it runs; wrapped or not, before `fully_shard` or after it, before
            `torch.compile`.
        geometry: the rollout's, where it is known already, so that a mismatch is found before any training; by
            default the model's own configuration.
        overlap_every: in the first training pass and in every so many passes some replayed routes are compared with the
            trainer's own choice; None never does, for a model whose routers have nothing to do with the rollout's.

    Returns:
        The replay; from now on every forward pass must be inside its `microbatch`, `record` or `off`, until `remove`.

    Raises:
        InputError: no model of transformers, or one without weights.
        UnsupportedError: a dense model, one of a family that is not known, or one whose routers would ignore or undo
            replay.
        CallOrderError: a replay is attached.
        PairingError: the live layers are not those of the geometry.
        SeamError: the installed transformers is not one that replay knows.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"attach takes a live model, a torch.nn.Module, got a {type(model).__name__}: load it first, with"
            " AutoModelForCausalLM.from_pretrained(path)"
        )
    if geometry is not None:
        require_type("geometry", geometry, RoutingGeometry)
    require_overlap_every(overlap_every)
    found, routers = live_layers(model, geometry)
    for layer, router in routers.items():
        if any(isinstance(hook, LayerReplay) for hook in router.module._forward_hooks.values()):
            raise CallOrderError(
                f"the router of decoder layer {layer} belongs to an attached replay already: use that one, or call its "
                "remove() first"
            )
    # First, since a forward that somebody put in the place of transformers' own would not fit the ledger either.
    check_routers(routers)
    for family in dict.fromkeys(router.family for router in routers.values()):
        require(ledger_of(family))
    check_model(model)
    check_weights(routers)
    for router in {router.stock: router for router in routers.values()}.values():
        require_formula(router)
    return Replay(routers, found, device_of(model), embedding=input_embedding(model), overlap_every=overlap_every)
