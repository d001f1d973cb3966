"""This rank's chunks of the small model, with weights that every parallel layout cuts from the same full tensors."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from cpu_engines.megatron import PackedDotProductAttention
from cpu_engines.megatron.config import WITHOUT_GPU
from tests.megatron_router_replay.parallel.cases import NUM_EXPERTS, VOCABULARY, Case

# Wide enough that no two of a token's router logits are near to each other.
STD = 0.15


@dataclass(frozen=True)
class Shard:
    """Where a rank's parameter lies in the full tensor of that name.

    Attributes:
        name: the parameter's name in the model of one rank.
        dim: dimension that is cut; None: every rank has all of it.
        index, count: which of how many parts.
        gated: the full tensor has the gate's rows above those of the input that it gates, and each half is cut.
    """

    name: str
    dim: int | None = None
    index: int = 0
    count: int = 1
    gated: bool = False

    def cut(self, full: Tensor) -> Tensor:
        """This rank's part of a full tensor."""
        if self.dim is None:
            return full
        halves = full.chunk(2, self.dim) if self.gated else (full,)
        return torch.cat([half.chunk(self.count, self.dim)[self.index] for half in halves], self.dim)

    def join(self, parts: list[Tensor]) -> Tensor:
        """The full tensor of all `count` parts, in order."""
        if self.dim is None:
            return parts[0]
        if not self.gated:
            return torch.cat(parts, self.dim)
        gates, inputs = zip(*(part.chunk(2, self.dim) for part in parts), strict=True)
        return torch.cat([*gates, *inputs], self.dim)

    def full_shape(self, shape: torch.Size) -> list[int]:
        return [size * (self.count if dim == self.dim else 1) for dim, size in enumerate(shape)]


def build_chunks(case: Case) -> list[nn.Module]:
    """The model chunks of this rank, in the order of their virtual stages, filled by `full_weight`."""
    config = _config(case)
    chunks = []
    stages: list[int | None] = list(range(case.vpp)) if case.vpp > 1 else [None]
    for stage in stages:
        chunk = _build_hybrid(case, config, stage) if case.hybrid else _build_gpt(case, config, stage)
        # Torch's norms are made in float32, whatever params_dtype says.
        chunk.double().train()
        with torch.no_grad():
            for shard, parameter in shards(chunk):
                parameter.copy_(shard.cut(full_weight(shard.name, shard.full_shape(parameter.shape))))
        chunks.append(chunk)
    return chunks


def full_weight(name: str, shape: list[int]) -> Tensor:
    """A full parameter, float64: a function of its name, so that all layouts have the same."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())), dtype=torch.float64)
    return 1 + values / 10 if "norm" in name.split(".")[-2] else values * STD


def shards(chunk: nn.Module) -> Iterator[tuple[Shard, nn.Parameter]]:
    """Every parameter of a chunk and where it lies in the model of one rank."""
    numbers = {
        name: module.layer_number - 1
        for name, module in chunk.named_modules()
        if isinstance(module, TransformerLayer) and re.fullmatch(r"(module\.)*decoder\.layers\.\d+", name)
    }
    for name, parameter in chunk.named_parameters():
        layer = next((prefix for prefix in numbers if name.startswith(prefix + ".")), None)
        full = name if layer is None else f"decoder.layers.{numbers[layer]}" + name.removeprefix(layer)
        full = full.removeprefix("module.")
        yield _shard(full, parameter), parameter


def _shard(name: str, parameter: nn.Parameter) -> Shard:
    index, count = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    expert = re.search(r"(?<=\.experts\.local_experts\.)\d+", name)
    if expert is not None:
        local = NUM_EXPERTS // parallel_state.get_expert_model_parallel_world_size()
        number = int(expert[0]) + local * parallel_state.get_expert_model_parallel_rank()
        name = f"{name[: expert.start()]}{number}{name[expert.end() :]}"
        index, count = (
            parallel_state.get_expert_tensor_parallel_rank(),
            parallel_state.get_expert_tensor_parallel_world_size(),
        )
    if not getattr(parameter, "tensor_model_parallel", False) or count == 1:
        return Shard(name)
    return Shard(name, parameter.partition_dim, index, count, name.endswith("linear_fc1.weight"))


def _build_hybrid(case: Case, config: TransformerConfig, stage: int | None) -> nn.Module:
    # Megatron-Core 0.17 has no HybridModel under this name.
    from tests.megatron_router_replay.parallel.hybrid import build_hybrid

    return build_hybrid(case, config, stage)


def _build_gpt(case: Case, config: TransformerConfig, stage: int | None) -> GPTModel:
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=stage)
    layers = [*spec.layer_specs]
    mtp_spec = None
    if case.mtp:
        # Of the whole model, since a stage may have no decoder layer whose likeness the MTP layer could be.
        last_layer = get_gpt_decoder_layer_specs(config, use_transformer_engine=False, normalization="RMSNorm")[-1]
        layers.append(last_layer)
        mtp_spec = get_gpt_mtp_block_spec(config, last_layer, use_transformer_engine=False, vp_stage=stage)
    for layer in layers:
        layer.submodules.self_attention.submodules.core_attention = PackedDotProductAttention
    return GPTModel(
        config,
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=256,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        mtp_block_spec=mtp_spec,
        vp_stage=stage,
    )


def _config(case: Case) -> TransformerConfig:
    fields: dict[str, Any] = {
        "num_layers": len(case.hybrid) or case.num_layers,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "ffn_hidden_size": 48,
        "moe_ffn_hidden_size": 16,
        "num_moe_experts": NUM_EXPERTS,
        "moe_router_topk": case.top_k,
        "moe_router_score_function": case.score,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp64",
        "moe_token_dispatcher_type": case.dispatcher,
        "normalization": "RMSNorm",
        "qk_layernorm": True,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "params_dtype": torch.float64,
        "pipeline_dtype": torch.float64,
        **WITHOUT_GPU,
        # Without it 0.17 does not say how a vocabulary is split; the values are overwritten.
        "perform_initialization": True,
        # As Megatron's own training loop does.
        "deallocate_pipeline_outputs": True,
        "tensor_model_parallel_size": case.tp,
        "sequence_parallel": case.tp > 1,
        "context_parallel_size": case.cp,
        "expert_model_parallel_size": case.ep,
        "expert_tensor_parallel_size": case.tp if case.etp is None else case.etp,
        "pipeline_model_parallel_size": case.pp,
        "virtual_pipeline_model_parallel_size": case.vpp if case.vpp > 1 else None,
        # With the defaults two sends of an interleaved stage to one peer are crossed on gloo.
        "overlap_p2p_comm": case.vpp > 1,
        "batch_p2p_comm": case.vpp == 1,
    }
    if not case.hybrid:
        fields["moe_layer_freq"] = [int(layer in case.moe_layers) for layer in range(case.num_layers)]
    if case.mtp:
        fields |= {"mtp_num_layers": case.mtp, "mtp_loss_scaling_factor": 0.5}
    if case.first is not None:
        fields["num_layers_in_first_pipeline_stage"] = case.first
    if case.last is not None:
        fields["num_layers_in_last_pipeline_stage"] = case.last
    if case.standalone:
        fields |= {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}
    if case.stages:
        fields["pipeline_model_parallel_layout"] = PipelineParallelLayerLayout(case.stages, case.pp)
    if case.recompute == "full":
        fields |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if case.recompute == "selective":
        fields |= {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    return TransformerConfig(**(fields | dict(case.config)))
