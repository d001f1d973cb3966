"""Find the live routers of a model and check that they are what the rollout's geometry says."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from router_replay.errors import InputError, PairingError, UnsupportedError
from router_replay.masks.geometry import RoutingGeometry


def find_routers(chunks: Sequence[nn.Module]) -> dict[int, TopKRouter]:
    """The decoder's routers by 0-based layer, ascending; those of MTP layers are left out.

    MTP routers count their layers from 1 again and would pass for decoder layers. Wrappers (DDP, Float16Module) need
    no unwrapping, since modules are walked through them.

    Raises:
        UnsupportedError: there is none.
        InputError: two routers with the same layer number, or a chunk given twice.
    """
    routers: dict[int, TopKRouter] = {}
    for chunk in chunks:
        for module in chunk.modules():
            if not isinstance(module, TopKRouter) or module.is_mtp_layer:
                continue
            layer = _layer(module.layer_number, "router")
            if layer in routers:
                raise InputError(
                    f"two routers have layer number {layer + 1} (decoder layer {layer}): pass every model chunk once, "
                    "and every chunk built with its own pipeline offset (vp_stage)"
                )
            routers[layer] = module
    if not routers:
        raise UnsupportedError(
            f"no TopKRouter in the {len(chunks)} model chunk(s) given: replay needs a mixture-of-experts model, and a "
            "pipeline stage that holds dense layers only needs no replay"
        )
    return dict(sorted(routers.items()))


def geometry_of(config: TransformerConfig) -> RoutingGeometry:
    """The whole model's geometry by its configuration, as Megatron reads `moe_layer_freq`."""
    frequency = config.moe_layer_freq
    routed = (
        [layer % frequency == 0 for layer in range(config.num_layers)]
        if isinstance(frequency, int)
        else [bool(flag) for flag in frequency]
    )
    moe_layers = tuple(layer for layer, flag in enumerate(routed) if flag)
    return RoutingGeometry(config.num_layers, moe_layers, config.num_moe_experts or 0, config.moe_router_topk)


def check_live_layers(
    chunks: Sequence[nn.Module], routers: dict[int, TopKRouter], geometry: RoutingGeometry, whose: str
) -> None:
    """Refuse a model whose layers do not route as `geometry` says; `whose` names the geometry in the message.

    Raises:
        PairingError: another top-k or number of experts, or a layer that is dense here and routed there.
    """
    for layer, router in routers.items():
        found = (router.num_experts, router.topk)
        if found != (geometry.num_experts, geometry.top_k):
            raise PairingError(
                f"{whose} routes to {geometry.top_k} of {geometry.num_experts} experts, the router of decoder layer "
                f"{layer} to {found[1]} of {found[0]}: use masks that were recorded with the same architecture"
            )
    dense_here = sorted((_decoder_layers(chunks) & set(geometry.moe_layers)) - set(routers))
    routed_here = sorted(set(routers) - set(geometry.moe_layers))
    if dense_here or routed_here:
        differences = [f"decoder layers {dense_here} are dense in this model (moe_layer_freq)"] if dense_here else []
        if routed_here:
            differences.append(f"decoder layers {routed_here} are routed in this model only")
        raise PairingError(
            f"{whose} has {geometry.num_moe_layers} MoE layers, {list(geometry.moe_layers)}; the live model has routers"
            f" in {list(routers)}: {'; '.join(differences)}"
        )


def _decoder_layers(chunks: Sequence[nn.Module]) -> set[int]:
    layers: set[int] = set()
    for chunk in chunks:
        mtp = {
            id(part)
            for root in chunk.modules()
            if isinstance(root, MultiTokenPredictionLayer)
            for part in root.modules()
        }
        layers |= {
            _layer(module.layer_number, "layer")
            for module in chunk.modules()
            if isinstance(module, TransformerLayer) and id(module) not in mtp
        }
    return layers


def _layer(layer_number: int | None, what: str) -> int:
    if layer_number is None:
        raise PairingError(
            f"a {what} of the model has no layer number, so its rows cannot be told: build it through TransformerLayer "
            "or call set_layer_number"
        )
    return layer_number - 1
