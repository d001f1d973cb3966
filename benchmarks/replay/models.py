"""Small models of Megatron's own layers with the routers of large ones."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.moe.router import TopKRouter
from torch import nn

from benchmarks.replay.shapes import SHAPES
from cpu_engines.megatron.qwen3_moe import megatron_config

VOCABULARY = 512


class NoExperts(nn.Module):
    """In place of a layer's experts, where only its router runs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()


def build(shape: str, num_layers: int, hidden: int, *, experts: bool = True, **overrides: Any) -> GPTModel:
    """A GPT of MoE layers; equal arguments give equal weights.

    Args:
        shape: of its routers, one of `SHAPES`.
        hidden: a multiple of 16; an expert's own is a quarter of it.
        experts: whether its layers can run, or only their routers.
        overrides: fields of `TransformerConfig`.
    """
    torch.manual_seed(0)
    sizes = {
        "num_hidden_layers": num_layers,
        "hidden_size": hidden,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "intermediate_size": hidden,
        "moe_intermediate_size": hidden // 4,
        "num_experts": SHAPES[shape]["num_moe_experts"],
        "num_experts_per_tok": SHAPES[shape]["moe_router_topk"],
        "model_type": "qwen3_moe",
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
        "rms_norm_eps": 1e-6,
    }
    fields = {"perform_initialization": True, "moe_router_dtype": "fp32", **SHAPES[shape], **overrides}
    config = megatron_config(sizes, torch.float32, **fields)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    if not experts:
        for layer in spec.layer_specs:
            layer.submodules.mlp.keywords["submodules"].experts = NoExperts
    model = GPTModel(config, spec, vocab_size=VOCABULARY, max_sequence_length=1 << 16, position_embedding_type="rope")
    for router in routers_of(model):
        # Logits that differ as those of a trained router do, of inputs of unit variance.
        nn.init.normal_(router.weight, std=2 / hidden**0.5)
        if router.expert_bias is not None:
            nn.init.normal_(router.expert_bias, std=0.05)
    return model


def routers_of(model: nn.Module) -> list[TopKRouter]:
    """In the order of the layers."""
    return [module for module in model.modules() if isinstance(module, TopKRouter)]
