"""A tiny random model of every family, and what reads its routing apart from the code under test."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from router_replay.masks.geometry import RoutingGeometry
from tests.random_batches import Batch, random_batch

NUM_LAYERS, NUM_EXPERTS, TOP_K, HIDDEN, VOCABULARY = 3, 8, 3, 32, 96

_ALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "initializer_range": 0.12,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_LINEAR = {
    "head_dim": 8,
    "num_experts": NUM_EXPERTS,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_SIGMOID = {
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": NUM_EXPERTS,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}
_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            "head_dim": 8,
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "num_experts": NUM_EXPERTS,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
        },
    ),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", _LINEAR),
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", {**_LINEAR, "intermediate_size": 48}),
    "glm4_moe": ("Glm4MoeConfig", "Glm4MoeForCausalLM", {**_SIGMOID, "head_dim": 8}),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            **_SIGMOID,
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {"head_dim": 8, "num_local_experts": NUM_EXPERTS, "intermediate_size": 16},
    ),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", {"num_experts": NUM_EXPERTS, "intermediate_size": 16}),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {"head_dim": 8, "num_local_experts": NUM_EXPERTS, "intermediate_size": 16},
    ),
}
FAMILIES = tuple(_MODELS)
WITH_A_DENSE_LAYER = {"qwen3_moe", "glm4_moe", "deepseek_v3"}
SIGMOID = {"glm4_moe", "deepseek_v3"}
# Attention of these is kept within the sequences of a pack by position ids alone, without flash attention's kernels.
PACKING = ("qwen3_moe", "glm4_moe", "deepseek_v3", "olmoe", "mixtral")


def geometry_of(family: str) -> RoutingGeometry:
    """The geometry of a family's tiny model, written out."""
    moe_layers = tuple(range(family in WITH_A_DENSE_LAYER, NUM_LAYERS))
    return RoutingGeometry(NUM_LAYERS, moe_layers, NUM_EXPERTS, TOP_K)


def build(
    family: str, *, dtype: torch.dtype = torch.float32, experts: str = "eager", seed: int = 0, **overrides: Any
) -> nn.Module:
    """A random model; equal seeds give equal weights. Keyword arguments go to its configuration."""
    config_class, model_class, settings = _MODELS[family]
    config = getattr(transformers, config_class)(**{**_ALL, **settings, **overrides})
    config._attn_implementation = "eager"
    config._experts_implementation = experts
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(config).to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            # Large enough to move choices, and never a part of gates.
            buffer.copy_(torch.linspace(-0.2, 0.2, NUM_EXPERTS))
    return model


def batch_of(family: str, seed: int = 1, **how: Any) -> Batch:
    """Three sequences of 12, 9 and 5 tokens with random masks, a third of whose rows are not valid."""
    return random_batch(geometry_of(family), (12, 9, 5), seed, batch_first=True, **how)


def attention_mask(batch: Batch) -> Tensor:
    return (torch.arange(batch.token_ids.shape[1]) < torch.tensor(batch.lengths)[:, None]).long()


def logits_of(model: nn.Module, batch: Batch, **how: Any) -> Tensor:
    """Of the padded batch, `[B, S, V]`."""
    return model(input_ids=batch.token_ids, attention_mask=attention_mask(batch), use_cache=False, **how).logits


def loss_of(logits: Tensor, batch: Batch) -> Tensor:
    """An arbitrary sum over the log-probabilities of each sequence's tokens, in float32."""
    logprobs = logits[:, :-1].float().log_softmax(-1).gather(-1, batch.token_ids[:, 1:, None])[..., 0]
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(5))
    return (logprobs * weights * attention_mask(batch)[:, 1:]).sum()


def blocks(model: nn.Module) -> dict[int, nn.Module]:
    """MoE layers by decoder layer."""
    return {layer: each.mlp for layer, each in enumerate(model.base_model.layers) if hasattr(each.mlp, "experts")}


def router_of(block: nn.Module) -> nn.Module:
    return block.router if hasattr(block, "router") else block.gate


@contextlib.contextmanager
def computed_experts(model: nn.Module) -> Iterator[dict[int, list[Tensor]]]:
    """Experts `int64 [num_places, K]` that the expert modules are called with, in order, by decoder layer."""
    seen: dict[int, list[Tensor]] = {layer: [] for layer in blocks(model)}
    handles = []
    for layer, block in blocks(model).items():

        def look(module: nn.Module, args: tuple[Any, ...], layer: int = layer) -> None:
            seen[layer].append(args[1].clone())

        handles.append(block.experts.register_forward_pre_hook(look))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def router_outputs(model: nn.Module) -> Iterator[dict[int, list[tuple[Tensor, ...]]]]:
    """What routers return to hooks that are registered now, in order, by decoder layer."""
    seen: dict[int, list[tuple[Tensor, ...]]] = {layer: [] for layer in blocks(model)}
    handles = []
    for layer, block in blocks(model).items():

        def look(module: nn.Module, args: Any, output: tuple[Tensor, ...], layer: int = layer) -> None:
            seen[layer].append(tuple(each.detach().clone() for each in output))

        handles.append(router_of(block).register_forward_hook(look))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def own_choice(family: str, logits: Tensor) -> list[set[int]]:
    """Top-k of every place by its logits, in words of the papers: of the best groups where there are groups."""
    if family not in SIGMOID:
        return [set(row) for row in logits.topk(TOP_K).indices.tolist()]
    scores = logits.float().sigmoid() + torch.linspace(-0.2, 0.2, NUM_EXPERTS)
    chosen = []
    for row in scores.tolist():
        groups = [(row[2 * group] + row[2 * group + 1], group) for group in range(4)]
        best = [group for _, group in sorted(groups, reverse=True)[:2]]
        of_best = [(row[expert], expert) for group in best for expert in (2 * group, 2 * group + 1)]
        chosen.append({expert for _, expert in sorted(of_best, reverse=True)[:TOP_K]})
    return chosen


def wrong_rows(seen: dict[int, list[Tensor]], batch: Batch) -> int:
    """How many recorded (place, layer) rows of a padded batch went to other experts, in the last pass."""
    return sum(
        set(seen[layer][-1][place].tolist()) != experts for layer in seen for place, experts in batch.recorded(layer)
    )


BuildModel = Callable[..., nn.Module]
