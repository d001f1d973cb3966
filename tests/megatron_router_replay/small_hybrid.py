"""A small HybridModel of Megatron's own torch parts: attention '*', MLP '-' and experts 'E' are layers of their own."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from cpu_engines.megatron.config import WITHOUT_GPU


def hybrid(pattern: str, *, config: dict[str, Any] | None = None, **arguments: Any) -> HybridModel:
    """16 experts, top-4; `arguments` are those of HybridModel.

    There is no final norm: HybridStack knows Transformer Engine's only.
    """
    torch.manual_seed(0)
    mtp = pattern.count("/")
    settings = TransformerConfig(
        **{
            "num_layers": len(pattern.partition("/")[0].replace("|", "")),
            "mtp_num_layers": mtp or None,
            "is_hybrid_model": True,
            "hidden_size": 48,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "kv_channels": 16,
            "ffn_hidden_size": 80,
            "moe_ffn_hidden_size": 24,
            "num_moe_experts": 16,
            "moe_router_topk": 4,
            "moe_router_load_balancing_type": "none",
            "init_method_std": 0.06,
            "normalization": "RMSNorm",
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "add_bias_linear": False,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            **WITHOUT_GPU,
            **(config or {}),
        }
    )
    return HybridModel(
        settings,
        _stack(),
        vocab_size=96,
        max_sequence_length=256,
        hybrid_layer_pattern=pattern,
        position_embedding_type="rope",
        **arguments,
    )


def _stack() -> ModuleSpec:
    dense = get_gpt_layer_local_submodules(normalization="RMSNorm")
    experts = get_gpt_layer_local_submodules(num_experts=16, normalization="RMSNorm")
    return ModuleSpec(
        module=HybridStack,
        params={"post_layer_norm": False},
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    input_layernorm=dense.input_layernorm,
                    self_attention=dense.self_attention,
                    self_attn_bda=get_bias_dropout_add,
                ),
            ),
            mlp_layer=ModuleSpec(
                module=MLPLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=dense.pre_mlp_layernorm, mlp=dense.mlp, mlp_bda=get_bias_dropout_add
                ),
            ),
            moe_layer=ModuleSpec(
                module=MoETransformerLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=experts.pre_mlp_layernorm, mlp=experts.mlp, mlp_bda=get_bias_dropout_add
                ),
            ),
            mtp_block_spec=ModuleSpec(
                module=MultiTokenPredictionBlock,
                submodules=MultiTokenPredictionBlockSubmodules(
                    layer_specs=[
                        ModuleSpec(
                            module=MultiTokenPredictionLayer,
                            submodules=MultiTokenPredictionLayerSubmodules(
                                enorm=WrappedTorchNorm,
                                hnorm=WrappedTorchNorm,
                                eh_proj=ColumnParallelLinear,
                                mtp_model_layer=None,
                                layer_norm=WrappedTorchNorm,
                            ),
                        )
                    ]
                ),
            ),
        ),
    )
