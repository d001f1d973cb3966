"""Activation checkpoints that a Megatron model can use, made to carry the bindings of their forward pass.

Every checkpoint whose body can hold a router goes through one of these: Megatron's own for full and selective
recompute, Transformer Engine's for the same of fp8 and fp4 layers, torch's where a user wraps layers. (Megatron's
`CheckpointWithoutOutput` wraps layer norms, activations and projections only, never a router.)
"""

from __future__ import annotations

import contextlib
import importlib

from megatron_router_replay.ledger import LEDGER, TRANSFORMER_ENGINE_LEDGER
from router_replay.replay.checkpoint import carried_by_contexts, carried_by_forward
from router_replay.replay.torch_checkpoint import TORCH_PATCHES
from router_replay.upstream import Patch

_MEGATRON = (Patch(LEDGER, "tensor_parallel.random.CheckpointFunction.forward", carried_by_forward),)
# Megatron's te_checkpoint is imported by value here and late there; what it leads to in the end is wrapped.
_TRANSFORMER_ENGINE = (
    Patch(TRANSFORMER_ENGINE_LEDGER, "_CheckpointFunction.forward", carried_by_forward),
    Patch(TRANSFORMER_ENGINE_LEDGER, "get_activation_recompute_contexts", carried_by_contexts),
)


class CheckpointPatch:
    """All of them, wrapped while at least one replay is attached; counts its users."""

    def __init__(self) -> None:
        self._users = 0
        self._applied = contextlib.ExitStack()

    def apply(self) -> None:
        """Put the wrappers in, unless they are there already.

        Raises:
            SeamError: an installed release does not fit its ledger; nothing is wrapped then.
        """
        if self._users == 0:
            with contextlib.ExitStack() as applied:
                for patch in (*_MEGATRON, *TORCH_PATCHES, *(_TRANSFORMER_ENGINE if _has_transformer_engine() else ())):
                    applied.enter_context(patch)
                self._applied = applied.pop_all()
        self._users += 1

    def remove(self) -> None:
        """Take the wrappers out once nobody needs them."""
        self._users -= 1
        if self._users == 0:
            self._applied.close()


def _has_transformer_engine() -> bool:
    # Megatron does without it where importing it fails, too.
    try:
        importlib.import_module(TRANSFORMER_ENGINE_LEDGER.prefix.removesuffix("."))
    except ImportError:
        return False
    return True


CHECKPOINT_PATCH = CheckpointPatch()
