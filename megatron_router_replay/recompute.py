"""Activation checkpoints that a Megatron model can use, made to carry the bindings of their forward pass.

Every checkpoint whose body can hold a router goes through one of these: Megatron's own for full and selective
recompute, Transformer Engine's for the same of fp8 and fp4 layers, torch's where a user wraps layers, which every
replay carries. (Megatron's `CheckpointWithoutOutput` wraps layer norms, activations and projections only, never a
router.)
"""

from __future__ import annotations

import importlib

from megatron_router_replay.ledger import LEDGER, TRANSFORMER_ENGINE_LEDGER
from router_replay.replay.checkpoint import carried_by_contexts, carried_by_forward
from router_replay.upstream import Patch

_MEGATRON = (Patch(LEDGER, "tensor_parallel.random.CheckpointFunction.forward", carried_by_forward),)
# Megatron's te_checkpoint is imported by value here and late there; what it leads to in the end is wrapped.
_TRANSFORMER_ENGINE = (
    Patch(TRANSFORMER_ENGINE_LEDGER, "_CheckpointFunction.forward", carried_by_forward),
    Patch(TRANSFORMER_ENGINE_LEDGER, "get_activation_recompute_contexts", carried_by_contexts),
)


def checkpoint_patches() -> tuple[Patch, ...]:
    """Megatron's, and Transformer Engine's where it is installed; each counts its own users."""
    return (*_MEGATRON, *(_TRANSFORMER_ENGINE if _has_transformer_engine() else ()))


def _has_transformer_engine() -> bool:
    # Megatron does without it where importing it fails, too.
    try:
        importlib.import_module(TRANSFORMER_ENGINE_LEDGER.prefix.removesuffix("."))
    except ImportError:
        return False
    return True
