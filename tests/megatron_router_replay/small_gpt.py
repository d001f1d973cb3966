"""A small GPT with one dense and one MoE layer, from Megatron's own parts, and an average written out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from cpu_engines.megatron.config import WITHOUT_GPU

VOCABULARY = 64
TOKEN_IDS = torch.arange(16).view(2, 8) * 5 % VOCABULARY


def gpt(*, dtype: torch.dtype = torch.float32, seed: int = 0, num_layers: int = 2) -> GPTModel:
    """Tied embeddings, gated MLPs, a sigmoid router with expert bias; sharded as `parallel_state` says.

    Equal seeds give equal full weights under any tensor parallelism. In evaluation mode, since Megatron refuses to
    train MoE under tensor parallelism without sequence parallelism, which its torch norms lack; there is no dropout.
    """
    torch.manual_seed(seed)
    config = TransformerConfig(
        num_layers=num_layers,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        ffn_hidden_size=32,
        moe_ffn_hidden_size=16,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_layer_freq=[int(layer % 2) for layer in range(num_layers)],
        moe_router_load_balancing_type="none",
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_token_dispatcher_type="allgather",
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        **WITHOUT_GPU,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
    )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    return GPTModel(
        config,
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=TOKEN_IDS.shape[1],
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
    ).eval()


def logits(model: torch.nn.Module) -> Tensor:
    """Of `TOKEN_IDS`: `[2, 8, V]`, or this rank's part of V."""
    length = TOKEN_IDS.shape[1]
    causal = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    return model(TOKEN_IDS, torch.arange(length).expand_as(TOKEN_IDS), causal)


def train_step(model: GPTModel, optimizer: torch.optim.Optimizer) -> None:
    """One step of an arbitrary loss, and Megatron's update of the expert bias by 0.1 per expert."""
    optimizer.zero_grad()
    logits(model).square().mean().backward()
    optimizer.step()
    router = model.decoder.layers[1].mlp.router
    router.expert_bias.copy_(get_updated_expert_bias(router.local_tokens_per_expert, router.expert_bias, 0.1))
    router.local_tokens_per_expert.zero_()


def tracked(model: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of what an average must follow: all parameters and the expert bias."""
    buffers = {name: value for name, value in model.named_buffers() if name.endswith("expert_bias")}
    return {name: value.detach().clone() for name, value in {**dict(model.named_parameters()), **buffers}.items()}


def weighted_mean(samples: Sequence[Tensor], decay: float, first_weight: float = 1.0) -> Tensor:
    """sum_i decay^(t-i) p_i / sum_i decay^(t-i) in float64; `first_weight` multiplies that of p_0."""
    weights = [decay ** (len(samples) - 1 - i) for i in range(len(samples))]
    weights[0] *= first_weight
    total = sum(weight * sample.double() for weight, sample in zip(weights, samples, strict=True))
    return total / sum(weights)


def rounding(samples: Sequence[Tensor]) -> float:
    """Bound of what float32 adds to an average of `samples`.

    An update rounds the difference (at most 2 M, M being the largest value), its weight, their product and the sum (at
    most M), by a relative 2^-24 each: 7 M 2^-24 per update, and a later update never enlarges what an earlier one left.
    """
    largest = max(float(sample.double().abs().max()) for sample in samples)
    return len(samples) * 7 * largest * 2**-24
