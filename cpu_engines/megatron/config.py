"""Fields of a `TransformerConfig` under which Megatron's layers need no GPU."""

from __future__ import annotations

WITHOUT_GPU = {
    "use_cpu_initialization": True,
    "persist_layer_norm": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "gradient_accumulation_fusion": False,
}
"""Fused kernels off, parameters made on the CPU."""
