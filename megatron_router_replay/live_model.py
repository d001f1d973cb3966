"""Find the live routers of a model by chunk, and check that they are what the model's configuration says."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from megatron_router_replay.layer_plan import LayerPlan, layer_plan
from router_replay.errors import InputError, PairingError
from router_replay.masks.geometry import RoutingGeometry


def live_layers(
    chunks: Sequence[nn.Module], rollout: RoutingGeometry | None = None
) -> tuple[RoutingGeometry, list[dict[int, TopKRouter]]]:
    """The geometry that masks must fit, and each chunk's routers by decoder layer of that geometry.

    Args:
        chunks: this rank's model chunks, wrapped or not; one without MoE layers has no routers.
        rollout: geometry of the masks, where it is known; by default as the model's own configuration counts layers.

    Raises:
        UnsupportedError: a dense model.
        InputError: chunks of different models, a chunk given twice, or two routers with one layer number.
        PairingError: the live layers are not those of the configuration, or the rollout's model is another one.
    """
    plan = layer_plan(chunks)
    routers = find_routers(chunks)
    check_live_layers(chunks, routers, plan)
    if rollout is not None:
        plan = plan.counted_as(rollout)
    return plan.geometry, [
        {plan.layer_of(position): router for position, router in of_chunk.items()} for of_chunk in routers
    ]


def find_routers(chunks: Sequence[nn.Module]) -> list[dict[int, TopKRouter]]:
    """Each chunk's decoder routers by Megatron's layer number less one, ascending; those of MTP layers are left out.

    MTP routers count their layers from 1 again and would pass for decoder layers. Wrappers (DDP, Float16Module) need
    no unwrapping, since modules are walked through them.

    Raises:
        InputError: two routers with the same layer number, or a chunk given twice.
        PairingError: a router without a number.
    """
    found: list[dict[int, TopKRouter]] = []
    for chunk in chunks:
        routers: dict[int, TopKRouter] = {}
        for module in _decoder_modules(chunk):
            if not isinstance(module, TopKRouter) or module.is_mtp_layer:
                continue
            position = _position(module.layer_number, "router")
            if any(position in others for others in (*found, routers)):
                raise InputError(
                    f"two routers have layer number {position + 1} (decoder layer {position}): pass every model chunk"
                    " once, and every chunk built with its own pipeline offset (vp_stage)"
                )
            routers[position] = module
        found.append(dict(sorted(routers.items())))
    return found


def check_live_layers(chunks: Sequence[nn.Module], routers: Sequence[dict[int, TopKRouter]], plan: LayerPlan) -> None:
    """Refuse a model whose layers do not route as its configuration says.

    Raises:
        PairingError: another top-k or number of experts, or a layer that is dense here and routed there.
    """
    live = {position: router for of_chunk in routers for position, router in of_chunk.items()}
    geometry = plan.geometry
    for position, router in live.items():
        found = (router.num_experts, router.topk)
        if found != (geometry.num_experts, geometry.top_k):
            raise PairingError(
                f"the model's configuration routes to {geometry.top_k} of {geometry.num_experts} experts, the router of"
                f" decoder layer {position} to {found[1]} of {found[0]}: use masks that were recorded with the same"
                " architecture"
            )
    held = {
        _position(module.layer_number, "layer")
        for chunk in chunks
        for module in _decoder_modules(chunk)
        if isinstance(module, TransformerLayer)
    }
    dense_here = sorted((held & set(plan.positions)) - set(live))
    routed_here = sorted(set(live) - set(plan.positions))
    if dense_here or routed_here:
        differences = [f"decoder layers {dense_here} are dense in this model ({plan.setting})"] if dense_here else []
        if routed_here:
            differences.append(f"decoder layers {routed_here} are routed in this model only")
        raise PairingError(
            f"the model's configuration has {len(plan.positions)} MoE layers, {list(plan.positions)}; the live model"
            f" has routers in {sorted(live)}: {'; '.join(differences)}. Set {plan.setting} to what the model was built"
            " with"
        )


def _decoder_modules(chunk: nn.Module) -> list[nn.Module]:
    # HybridModel's MTP routers do not say that they are (is_mtp_layer is False): where they are has to.
    mtp = {
        id(part) for root in chunk.modules() if isinstance(root, MultiTokenPredictionLayer) for part in root.modules()
    }
    return [module for module in chunk.modules() if id(module) not in mtp]


def _position(layer_number: int | None, what: str) -> int:
    if layer_number is None:
        raise PairingError(
            f"a {what} of the model has no layer number, so its rows cannot be told: build it through TransformerLayer "
            "or call set_layer_number"
        )
    return layer_number - 1
