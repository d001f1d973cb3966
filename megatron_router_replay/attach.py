"""Attach replay to a live Megatron model, after checking that it is one that replay can be right for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from megatron_router_replay.flex_gates import FlexGates
from megatron_router_replay.input_ids import first_embeddings
from megatron_router_replay.layer_plan import config_of
from megatron_router_replay.layer_replay import LayerReplay
from megatron_router_replay.ledger import LEDGER
from megatron_router_replay.live_model import live_layers
from megatron_router_replay.model_groups import ModelGroups
from megatron_router_replay.replay import Replay
from megatron_router_replay.router_settings import RouterSettings
from router_replay.errors import CallOrderError, InputError
from router_replay.masks.arguments import require_type
from router_replay.masks.geometry import RoutingGeometry
from router_replay.replay.attached import require_overlap_every
from router_replay.replay.shards import ContextOrder
from router_replay.upstream import require


def attach(
    model_chunks: nn.Module | Iterable[nn.Module],
    geometry: RoutingGeometry | None = None,
    *,
    context_order: ContextOrder = "zigzag",
    overlap_every: int | None = 100,
) -> Replay:
    """Put a replay into every decoder router of a model.

    Args:
        model_chunks: this rank's model, or its chunks under interleaved pipelining, wrapped (DDP, Float16Module) or
            not. A pipeline stage without MoE layers is attached like the others.
        geometry: the rollout's, where it is known already, so that a mismatch is found before any training; by
            default the model's own configuration.
        context_order: how context-parallel ranks share a sequence; Megatron's own is the zigzag.
        overlap_every: in the first training pass and in every so many passes some replayed routes are compared with the
            trainer's own choice, and ranks compare what they were given; None never does, for a model whose routers
            have nothing to do with the rollout's.

    Returns:
        The replay; from now on every forward pass must be inside its `microbatch`, `record` or `off`, until `remove`.

    Raises:
        InputError: no model, or two routers with one layer number.
        UnsupportedError: a dense model, or a setting under which replay would be ignored or undone.
        CallOrderError: a replay is attached.
        PairingError: the live layers are not those of the geometry.
        SeamError: the installed Megatron-Core is not one that replay knows.
    """
    require(LEDGER)
    chunks = _chunks(model_chunks)
    if geometry is not None:
        require_type("geometry", geometry, RoutingGeometry)
    require_overlap_every(overlap_every)
    found, routers = live_layers(chunks, geometry)
    for layer, router in ((layer, router) for of_chunk in routers for layer, router in of_chunk.items()):
        if isinstance(router.router_replay, LayerReplay):
            raise CallOrderError(
                f"the router of decoder layer {layer} belongs to an attached replay already: use that one, or call its "
                "remove() first"
            )
    configs = [config_of(chunk) for chunk in chunks]
    all_routers = [router for of_chunk in routers for router in of_chunk.values()]
    settings, flex = RouterSettings(configs, all_routers), FlexGates(chunks, all_routers)
    device = next((parameter.device for chunk in chunks for parameter in chunk.parameters()), torch.device("cpu"))
    return Replay(
        routers,
        found,
        device,
        settings=settings,
        flex=flex,
        embeddings=[first_embeddings(chunk) for chunk in chunks],
        groups=ModelGroups(configs[0], context_order),
        overlap_every=overlap_every,
    )


def _chunks(given: nn.Module | Iterable[nn.Module]) -> list[nn.Module]:
    if isinstance(given, nn.Module):
        return [given]
    several = isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping | Tensor)
    chunks = list(given) if several else []
    wrong = next((each for each in chunks if not isinstance(each, nn.Module)), None)
    if chunks and wrong is None:
        return chunks
    found = "an empty list" if several and not chunks else f"a {type(given if wrong is None else wrong).__name__}"
    raise InputError(
        f"attach takes this rank's live model, a torch.nn.Module, or the list of its chunks, got {found}: build the"
        " model and load its weights first"
    )
