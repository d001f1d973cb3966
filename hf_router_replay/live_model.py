"""Find the live routers of a model, and check that they are what the model's configuration says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.modeling_utils import PreTrainedModel

from hf_router_replay.families import FAMILIES, Family, family_of
from router_replay.errors import InputError, PairingError, UnsupportedError
from router_replay.masks.geometry import RoutingGeometry


@dataclass(frozen=True)
class LiveRouter:
    """One decoder layer's router.

    Attributes:
        module: the router, whose settings are its attributes.
        stock: transformers' own class of it.
        block: the MoE layer that calls it.
        family: that both are of.
    """

    module: Any
    stock: type[nn.Module]
    block: nn.Module
    family: Family


def live_layers(
    model: nn.Module, rollout: RoutingGeometry | None = None
) -> tuple[RoutingGeometry, dict[int, LiveRouter]]:
    """The geometry that masks must fit, and the routers by decoder layer.

    Args:
        model: wrapped or not.
        rollout: geometry of the masks, where it is known.

    Raises:
        UnsupportedError: a dense model, or one of a family whose routers are not known.
        InputError: no model of transformers, or one with several stacks of decoder layers that route.
        PairingError: the live layers are not those of the configuration, or the rollout's model is another one.
    """
    language = language_model(model)
    geometry = RoutingGeometry.from_hf_config(language.config)
    routers = find_routers(model)
    if not routers:
        raise UnsupportedError(
            f"a {type(language).__name__} has no router that replay knows, although its configuration routes to"
            f" {geometry.top_k} of {geometry.num_experts} experts: known are the families"
            f" {', '.join(family.name for family in FAMILIES)} of transformers >= 5; train without replay"
        )
    check_live_layers(routers, geometry)
    if rollout is not None:
        rollout.require_same(geometry, "the rollout", "this model")
    return geometry, routers


def language_model(model: nn.Module) -> PreTrainedModel:
    """The model of transformers inside of any wrappers (FSDP2, DDP, PEFT).

    Raises:
        InputError: there is none.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise InputError(
        f"a {type(model).__name__} was given that holds no PreTrainedModel of transformers, whose configuration says"
        " which layers route: pass the model, wrapped or not"
    )


def input_embedding(model: nn.Module) -> nn.Module:
    """The module that is called with the model's token ids."""
    return language_model(model).get_input_embeddings()


def find_routers(model: nn.Module) -> dict[int, LiveRouter]:
    """Routers by 0-based decoder layer, ascending: the place of its layer in the list `layers` that holds it.

    Raises:
        InputError: two routers with one number.
        UnsupportedError: a router outside of any such list, or outside of its family's MoE layer.
    """
    found: dict[int, LiveRouter] = {}
    stacks = [
        stack for module in model.modules() if isinstance(stack := getattr(module, "layers", None), nn.ModuleList)
    ]
    numbers = {id(part): number for stack in stacks for number, layer in enumerate(stack) for part in layer.modules()}
    for block in model.modules():
        for module in block.children():
            known = family_of(module)
            if known is None:
                continue
            family, stock = known
            if not any(family.has(cls, family.block) for cls in type(block).__mro__):
                raise UnsupportedError(
                    f"a {type(module).__name__} is called by a {type(block).__name__}, where replay knows it in a"
                    f" {family.block}: what becomes of replayed experts there is not known; train without replay"
                )
            number = numbers.get(id(module))
            if number is None:
                raise UnsupportedError(
                    f"a {type(module).__name__} stands in no decoder layer of a list `layers`, so its rows cannot be"
                    " told: pass the whole model"
                )
            if number in found:
                raise InputError(
                    f"two routers are of decoder layer {number}: pass one language model, without a second one beside"
                    " it"
                )
            found[number] = LiveRouter(module, stock, block, family)
    return dict(sorted(found.items()))


def check_live_layers(routers: Mapping[int, LiveRouter], geometry: RoutingGeometry) -> None:
    """Refuse a model whose layers do not route as its configuration says.

    Raises:
        PairingError: another top-k or number of experts, or a layer that is dense here and routed there.
    """
    for layer, router in routers.items():
        found = (router.module.num_experts, router.module.top_k)
        if found != (geometry.num_experts, geometry.top_k):
            raise PairingError(
                f"the model's configuration routes to {geometry.top_k} of {geometry.num_experts} experts, the router of"
                f" decoder layer {layer} to {found[1]} of {found[0]}: use masks that were recorded with the same"
                " architecture"
            )
    if tuple(routers) != geometry.moe_layers:
        dense_here = sorted(set(geometry.moe_layers) - set(routers))
        routed_here = sorted(set(routers) - set(geometry.moe_layers))
        differences = [f"decoder layers {dense_here} are dense in this model"] if dense_here else []
        if routed_here:
            differences.append(f"decoder layers {routed_here} are routed in this model only")
        raise PairingError(
            f"the model's configuration has {geometry.num_moe_layers} MoE layers, {list(geometry.moe_layers)}; the live"
            f" model has routers in {list(routers)}: {'; '.join(differences)}. Pass the whole model, with the"
            " configuration that it was built with"
        )


def device_of(model: nn.Module) -> torch.device:
    """Where the model computes: that of its parameters, or of their mesh where FSDP2 keeps shards of them elsewhere.

    Raises:
        InputError: the parameters are on no device yet.
    """
    parameter = next(model.parameters())
    kind = parameter.device_mesh.device_type if isinstance(parameter, DTensor) else parameter.device.type
    if kind == "meta":
        raise InputError("the model's parameters are on the meta device: load its weights first, then attach")
    if kind == parameter.device.type:
        return parameter.device
    return torch.device(kind, torch.get_device_module(kind).current_device())
