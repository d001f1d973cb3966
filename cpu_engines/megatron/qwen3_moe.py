"""Load a Hugging Face Qwen3-MoE checkpoint into Megatron-Core's GPTModel, and take the model's tensors out again.

    with CpuDevice(), single_process():
        model = load_qwen3_moe("path/of/checkpoint")
        tensors = hf_tensors(model)

Layers are Megatron's own local ones (no Transformer Engine), one rank, one model chunk.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors import safe_open
from torch import Tensor

from cpu_engines.megatron.config import WITHOUT_GPU
from router_replay.masks.geometry import RoutingGeometry


class CheckpointError(ValueError):
    """A checkpoint that this loader cannot turn into the same model."""


_REQUIRED = {
    "model_type": "qwen3_moe",
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    # Megatron's softmax after top-k is the renormalised softmax of Hugging Face; without the renormalisation the
    # router would be pre-softmax, another function.
    "norm_topk_prob": True,
}


def load_qwen3_moe(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    core_attention: type | None = None,
    **config_overrides: Any,
) -> GPTModel:
    """Build the model of a checkpoint folder and fill it.

    Args:
        path: folder with `config.json` and one or more `*.safetensors`.
        dtype: dtype of all parameters. With the default `moe_router_dtype` of None the router computes in it too;
            pass `moe_router_dtype="fp32"` to keep its logits in float32 under bfloat16.
        core_attention: replaces the layers' core attention, for packed batches for example.
        **config_overrides: fields of `TransformerConfig` that win over the checkpoint's.

    Returns:
        The model in training mode.

    Raises:
        CheckpointError: a setting that Megatron's local layers do not reproduce, a tensor of the checkpoint that no
            parameter takes, a parameter that no tensor fills, or another shape.
    """
    folder = Path(path)
    hf_config = json.loads((folder / "config.json").read_text())
    _check_config(hf_config)
    config = megatron_config(hf_config, dtype, **config_overrides)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    if core_attention is not None:
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = core_attention
    model = GPTModel(
        config,
        spec,
        vocab_size=hf_config["vocab_size"],
        max_sequence_length=hf_config["max_position_embeddings"],
        position_embedding_type="rope",
        rotary_base=_rope(hf_config)["rope_theta"],
        share_embeddings_and_output_weights=False,
    ).to(dtype)
    _fill(model, _read_tensors(folder), config)
    return model


def hf_tensors(model: GPTModel) -> dict[str, Tensor]:
    """The tensors of a checkpoint of the model as it is now, by Hugging Face's names: views of its parameters.

    Raises:
        CheckpointError: a parameter that no tensor of such a checkpoint holds.
    """
    parameters = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {}
    for target, sources in _mapping(model.config):
        parts = _split(target, parameters.pop(target).data, len(sources), model.config)
        tensors.update(zip(sources, parts, strict=True))
    if parameters:
        raise CheckpointError(f"parameters that no tensor of a checkpoint holds: {sorted(parameters)}")
    return tensors


def megatron_config(hf_config: dict[str, Any], dtype: torch.dtype, **overrides: Any) -> TransformerConfig:
    """The `TransformerConfig` of a Qwen3-MoE `config.json`; `overrides` win."""
    geometry = RoutingGeometry.from_hf_config(hf_config)
    fields: dict[str, Any] = {
        "num_layers": geometry.num_layers,
        "hidden_size": hf_config["hidden_size"],
        "num_attention_heads": hf_config["num_attention_heads"],
        "num_query_groups": hf_config["num_key_value_heads"],
        "kv_channels": hf_config["head_dim"],
        "ffn_hidden_size": hf_config["intermediate_size"],
        "moe_ffn_hidden_size": hf_config["moe_intermediate_size"],
        "num_moe_experts": geometry.num_experts,
        "moe_router_topk": geometry.top_k,
        "moe_layer_freq": [int(layer in geometry.moe_layers) for layer in range(geometry.num_layers)],
        "moe_router_load_balancing_type": "none",
        "moe_router_pre_softmax": False,
        "moe_token_dispatcher_type": "allgather",
        "layernorm_epsilon": hf_config["rms_norm_eps"],
        "normalization": "RMSNorm",
        "qk_layernorm": True,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        **WITHOUT_GPU,
        "perform_initialization": False,
    }
    return TransformerConfig(**(fields | overrides))


def _check_config(hf_config: dict[str, Any]) -> None:
    for key, wanted in _REQUIRED.items():
        if hf_config.get(key) != wanted:
            raise CheckpointError(
                f"config.json has {key} = {hf_config.get(key)!r}; the model built here computes {key} = {wanted!r} only"
            )
    if _rope(hf_config).get("rope_type", "default") != "default":
        raise CheckpointError(
            f"config.json scales its rotary positions ({_rope(hf_config)}); only 'default' is built here"
        )


def _rope(hf_config: dict[str, Any]) -> dict[str, Any]:
    # transformers 5 nests the rotary fields; 4 wrote them at the top.
    nested = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    return {"rope_theta": hf_config.get("rope_theta", 10000.0)} | nested


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors.update((name, opened.get_tensor(name)) for name in opened.keys())  # noqa: SIM118 (no mapping)
    return tensors


def _fill(model: GPTModel, tensors: dict[str, Tensor], config: TransformerConfig) -> None:
    parameters = dict(model.named_parameters())
    missing: list[str] = []
    for target, sources in _mapping(config):
        absent = [source for source in sources if source not in tensors]
        if absent or target not in parameters:
            missing += absent if target in parameters else [target]
            continue
        value = _merge(target, [tensors.pop(source) for source in sources], config)
        parameter = parameters.pop(target)
        if parameter.shape != value.shape:
            raise CheckpointError(
                f"{target} has shape {tuple(parameter.shape)} in Megatron, but {', '.join(sources)} make "
                f"{tuple(value.shape)}"
            )
        parameter.data.copy_(value)
    if missing or tensors or parameters:
        raise CheckpointError(
            f"checkpoint and model do not match: not found {missing}; tensors that no parameter takes"
            f" {sorted(tensors)}; parameters that no tensor fills {sorted(parameters)}"
        )


def _merge(target: str, values: list[Tensor], config: TransformerConfig) -> Tensor:
    """Join the tensors of one parameter: by query group for `linear_qkv`, gate before up for `linear_fc1`."""
    if target.endswith("linear_qkv.weight"):
        groups, width = config.num_query_groups, config.hidden_size
        return torch.cat([value.view(groups, -1, width) for value in values], dim=1).reshape(-1, width)
    return torch.cat(values)


def _split(target: str, value: Tensor, parts: int, config: TransformerConfig) -> Sequence[Tensor]:
    """What `_merge` joins."""
    if target.endswith("linear_qkv.weight"):
        groups, width, head = config.num_query_groups, config.hidden_size, config.kv_channels
        grouped = value.view(groups, -1, width)
        sizes = (grouped.shape[1] - 2 * head, head, head)
        return [part.reshape(-1, width) for part in grouped.split(sizes, dim=1)]
    return value.chunk(parts)


def _mapping(config: TransformerConfig) -> Iterator[tuple[str, list[str]]]:
    """(Megatron parameter, the Hugging Face tensors that make it) for every parameter of the model."""
    yield "embedding.word_embeddings.weight", ["model.embed_tokens.weight"]
    yield "decoder.final_layernorm.weight", ["model.norm.weight"]
    yield "output_layer.weight", ["lm_head.weight"]
    assert isinstance(config.moe_layer_freq, list) and config.num_moe_experts is not None
    for layer, routes in enumerate(config.moe_layer_freq):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        attention, hf_attention = ours + "self_attention.", theirs + "self_attn."
        yield ours + "input_layernorm.weight", [theirs + "input_layernorm.weight"]
        yield ours + "pre_mlp_layernorm.weight", [theirs + "post_attention_layernorm.weight"]
        yield attention + "linear_qkv.weight", [hf_attention + f"{name}_proj.weight" for name in "qkv"]
        yield attention + "linear_proj.weight", [hf_attention + "o_proj.weight"]
        yield attention + "q_layernorm.weight", [hf_attention + "q_norm.weight"]
        yield attention + "k_layernorm.weight", [hf_attention + "k_norm.weight"]
        if routes:
            yield ours + "mlp.router.weight", [theirs + "mlp.gate.weight"]
            for expert in range(config.num_moe_experts):
                yield from _mlp(f"{ours}mlp.experts.local_experts.{expert}.", f"{theirs}mlp.experts.{expert}.")
        else:
            yield from _mlp(ours + "mlp.", theirs + "mlp.")


def _mlp(ours: str, theirs: str) -> Iterator[tuple[str, list[str]]]:
    yield ours + "linear_fc1.weight", [theirs + "gate_proj.weight", theirs + "up_proj.weight"]
    yield ours + "linear_fc2.weight", [theirs + "down_proj.weight"]
