"""Every kind of activation checkpoint around the layers of a small model, and microbatches through it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed._composable import checkpoint as composable_checkpoint
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cpu_engines.megatron.logprobs import token_logprobs
from tests.megatron_router_replay.batches import Batch

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MOE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}

Wrap = Callable[[torch.nn.Module], None]


@dataclass(frozen=True)
class Kind:
    """What a model is built with, and what is then put around its decoder layers."""

    overrides: dict[str, Any] = field(default_factory=dict)
    wrap: Wrap | None = None

    def build(self, build_model: Callable[..., torch.nn.Module], **overrides: Any) -> torch.nn.Module:
        model = build_model(**self.overrides, **overrides)
        if self.wrap is not None:
            self.wrap(model)
        return model


def _layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return list(model.decoder.layers)


def _mlps(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [layer.mlp for layer in model.decoder.layers]


def _by_torch(modules: Callable[[torch.nn.Module], Sequence[torch.nn.Module]], **how: Any) -> Wrap:
    """`checkpoint` around the forward of modules, whose first tensor goes in by position as the reentrant one needs."""

    def wrap(model: torch.nn.Module) -> None:
        for module in modules(model):
            module.forward = functools.partial(_checkpointed, module.forward, how)

    return wrap


def _checkpointed(forward: Callable, how: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    first = args[0] if args else kwargs.pop("hidden_states")
    rest = args[1:]
    return checkpoint(lambda hidden: forward(hidden, *rest, **kwargs), first, **how)


def _composable(model: torch.nn.Module) -> None:
    for layer in _layers(model):
        composable_checkpoint(layer)


def _keep_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE


def _both(*wraps: Wrap) -> Wrap:
    def wrap(model: torch.nn.Module) -> None:
        for each in wraps:
            each(model)

    return wrap


_selective_contexts = functools.partial(create_selective_checkpoint_contexts, _keep_products)
_layers_reentrant = _by_torch(_layers, use_reentrant=True)
_layers_other = _by_torch(_layers, use_reentrant=False)

KINDS = {
    "torch.utils.checkpoint, reentrant": Kind(wrap=_layers_reentrant),
    "torch.utils.checkpoint, non-reentrant": Kind(wrap=_layers_other),
    "torch.utils.checkpoint, non-reentrant, to the end": Kind(
        wrap=_by_torch(_layers, use_reentrant=False, early_stop=False)
    ),
    "torch.utils.checkpoint, non-reentrant, selective": Kind(
        wrap=_by_torch(_layers, use_reentrant=False, context_fn=_selective_contexts)
    ),
    "torch's composable checkpoint": Kind(wrap=_composable),
    "Megatron's inside torch's, reentrant": Kind(MOE, _layers_reentrant),
    "Megatron's inside torch's, non-reentrant": Kind(MOE, _layers_other),
    "torch's inside Megatron's, reentrant": Kind(FULL, _by_torch(_mlps, use_reentrant=True)),
    "torch's inside Megatron's, non-reentrant": Kind(FULL, _by_torch(_mlps, use_reentrant=False)),
    "torch's of both kinds": Kind(wrap=_both(_by_torch(_mlps, use_reentrant=True), _layers_other)),
    "torch's of both kinds, the other way round": Kind(
        wrap=_both(_by_torch(_mlps, use_reentrant=False), _layers_reentrant)
    ),
}


def forward(model: torch.nn.Module, replay: Any, batch: Batch) -> torch.Tensor:
    """A microbatch's loss, its forward pass in its own block."""
    with replay.microbatch(batch.masks, batch.layout):
        return loss_of(model, batch)


def loss_of(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    logprobs = token_logprobs(model, batch.token_ids)
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(5))
    return (logprobs * weights).sum()


def first_in_first_out(model: torch.nn.Module, replay: Any, batches: Sequence[Batch]) -> None:
    for loss in [forward(model, replay, batch) for batch in batches]:
        loss.backward()


def last_in_first_out(model: torch.nn.Module, replay: Any, batches: Sequence[Batch]) -> None:
    for loss in [forward(model, replay, batch) for batch in batches][::-1]:
        loss.backward()


def inside_another_block(model: torch.nn.Module, replay: Any, batches: Sequence[Batch]) -> None:
    """Each backward pass runs while the next microbatch is bound, before its forward pass; the last in no block."""
    earlier = None
    for batch in batches:
        with replay.microbatch(batch.masks, batch.layout):
            if earlier is not None:
                earlier.backward()
            earlier = loss_of(model, batch)
    earlier.backward()


ORDERS = {
    "first in first out": first_in_first_out,
    "last in first out": last_in_first_out,
    "backward inside another block": inside_another_block,
}
