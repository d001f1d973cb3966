"""Live modules under which replay would silently do nothing, or be undone."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from hf_router_replay.live_model import LiveRouter
from router_replay.errors import UnsupportedError


def check_model(model: nn.Module) -> None:
    """Refuse models that transformers spread over ranks by a plan, or of which a part was compiled before.

    Raises:
        UnsupportedError: naming the plan and its size, or the module that is compiled, and the way out.
    """
    _check_parallel(model)
    _check_not_compiled(model)


def _check_parallel(model: nn.Module) -> None:
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        sizes = {"tp_size": module._tp_size}
        # Configurations have it only where a model was loaded with one.
        if (plan := getattr(module.config, "distributed_config", None)) is not None:
            sizes |= {"ep_size": plan.ep_size, "pp_size": plan.pp_size}
        for name, size in sizes.items():
            if size is not None and size > 1:
                raise UnsupportedError(
                    f"replay cannot run where a {type(module).__name__} was loaded with {name} {size}: transformers'"
                    " parallel plans replace the forward of routers and experts, and what becomes of replayed experts"
                    " there was not looked into; use FSDP2 (fsdp_size, or torch's fully_shard)"
                )


def _check_not_compiled(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise UnsupportedError(
                f"replay cannot be attached to a model of which {name or 'the whole'} ({type(module).__name__}) is"
                " compiled: code that was compiled before asks no replay; attach first, and compile then"
            )


def check_routers(routers: Mapping[int, LiveRouter]) -> None:
    """Refuse routers, and MoE layers, that run something else than transformers' own forward.

    Raises:
        UnsupportedError: naming the layer and the class.
    """
    for layer, router in routers.items():
        family = router.family
        for module, name in ((router.module, family.router), (router.block, family.block)):
            if found := _replaced(module, f"transformers.{family.module}", name):
                raise UnsupportedError(
                    f"replay cannot run where decoder layer {layer} has a {type(module).__name__} {found}: whether"
                    f" replayed experts would be computed there is known of transformers' own {name} only; use no"
                    " kernels from the hub (use_kernels), quantised MoE layers, device maps of accelerate or patches"
                )


def check_weights(routers: Mapping[int, LiveRouter]) -> None:
    """Refuse routers whose matrix is not there as a whole, or as FSDP2's shard of one.

    Raises:
        UnsupportedError: naming the layer and both shapes.
    """
    for layer, router in routers.items():
        expected = [router.module.num_experts, router.module.hidden_dim]
        weight = getattr(router.module, "weight", None)
        found = list(weight.shape) if isinstance(weight, Tensor) else None
        if found != expected:
            shape = "no matrix" if found is None else f"a matrix of shape {found}"
            raise UnsupportedError(
                f"the router of decoder layer {layer} has {shape} where {expected} was expected: its parameters were"
                " flattened or taken apart (FSDP1, DeepSpeed ZeRO-3); use FSDP2 (torch's fully_shard)"
            )


def _replaced(module: nn.Module, stock_module: str, stock_name: str) -> str | None:
    """What of a module's forward is not that of the stock class, or None."""
    if "forward" in vars(module):
        return "whose forward was replaced"
    forward = type(module).forward
    if (forward.__module__, forward.__qualname__) != (stock_module, f"{stock_name}.forward"):
        return f"with the forward {forward.__module__}.{forward.__qualname__}"
    # A decorator passes the name on that it decorates.
    if hasattr(forward, "__wrapped__"):
        return f"whose forward is wrapped, by {forward.__code__.co_filename}"
    return None
