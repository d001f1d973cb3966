"""Torch's norms under sequence parallelism, where Megatron's wrapper refuses them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

_new_torch_norm = WrappedTorchNorm.__new__


def new_torch_norm(
    cls: type[WrappedTorchNorm], config: TransformerConfig, hidden_size: int, *args: Any, **kwargs: Any
) -> torch.nn.Module:
    """`WrappedTorchNorm.__new__` whose parameters say whether the sequence is sharded, as Transformer Engine's do.

    A norm works on each token alone, so its output is right for any part of a sequence; its weight's gradient is
    then a part, too, and `finalize_model_grads` sums what carries `sequence_parallel` over the tensor-parallel ranks.
    """
    whole = copy.copy(config)
    whole.sequence_parallel = False
    norm: torch.nn.Module = _new_torch_norm(cls, whole, hidden_size, *args, **kwargs)
    for parameter in norm.parameters():
        setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010 (no attribute of Parameter)
    return norm
