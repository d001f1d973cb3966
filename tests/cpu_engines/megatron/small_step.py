"""A training step of a small GPT in float64, the same in every parallel layout: losses and whole gradients."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from cpu_engines.megatron import PackedDotProductAttention
from cpu_engines.megatron.config import WITHOUT_GPU
from cpu_engines.megatron.context_parallel import rows_of_rank
from cpu_engines.megatron.release import release

Kind = Literal["padded", "packed", "uncut packs"]

NUM_LAYERS, EXPERTS, VOCABULARY = 4, 4, 32
LENGTH, MICROBATCH, NUM_MICROBATCHES = 16, 2, 4
# The longest sum of a layer's products is over this many terms: a row of the dense layer's intermediate.
LONGEST_SUM = 48


def config(**overrides: Any) -> TransformerConfig:
    """A dense layer and three MoE layers with q/k norms, sized by `parallel_state`."""
    fields: dict[str, Any] = {
        "num_layers": NUM_LAYERS,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "ffn_hidden_size": LONGEST_SUM,
        "moe_ffn_hidden_size": 16,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": 2,
        "moe_layer_freq": [0, 1, 1, 1],
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
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
        "perform_initialization": False,
        "calculate_per_token_loss": True,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "sequence_parallel": parallel_state.get_tensor_model_parallel_world_size() > 1,
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
    }
    return TransformerConfig(**(fields | overrides))


def model_chunks(config: TransformerConfig) -> list[DistributedDataParallel]:
    """This rank's part of the model, every weight a function of its name and place in the whole one."""
    ddp = DistributedDataParallelConfig(overlap_grad_reduce=False, use_distributed_optimizer=False)
    stages = config.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(stages or 1):
        vp_stage = stage if stages else None
        spec = get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage
        )
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = PackedDotProductAttention
        model = GPTModel(
            config,
            spec,
            vocab_size=VOCABULARY,
            max_sequence_length=LENGTH,
            position_embedding_type="rope",
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=False,
            vp_stage=vp_stage,
        ).double()
        for name, parameter in model.named_parameters():
            whole, own = _whole(model, name, parameter)
            generator = torch.Generator().manual_seed(zlib.crc32(_global_name(model, name).encode()))
            # Embeddings that outweigh what the layers add keep every expert busy.
            whole.normal_(std=1.0 if "embedding" in name else 0.2, generator=generator)
            parameter.data.copy_((1 + whole if "layernorm.weight" in name else whole)[own].reshape(parameter.shape))
        chunks.append(DistributedDataParallel(config, ddp, model))
    return chunks


def _global_name(model: GPTModel, name: str) -> str:
    parts = name.split(".")
    if "layers" in parts:
        at = parts.index("layers") + 1
        parts[at] = str(model.decoder.layers[int(parts[at])].layer_number)
    if "local_experts" in parts:
        at = parts.index("local_experts") + 1
        size = parallel_state.get_expert_model_parallel_world_size()
        parts[at] = str(int(parts[at]) + parallel_state.get_expert_model_parallel_rank() * EXPERTS // size)
    return ".".join(parts)


def _whole(model: GPTModel, name: str, parameter: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """An empty tensor of the whole weight, rows of the gate and of what it gates apart, and this rank's part of it."""
    halves = 2 if name.endswith("linear_fc1.weight") else 1
    shape = [halves, parameter.shape[0] // halves, *parameter.shape[1:]]
    own = [slice(None)] * len(shape)
    # A replicated parameter's partition_dim is -1.
    dim = getattr(parameter, "partition_dim", -1)
    if dim >= 0:
        expert = "local_experts" in name
        size, rank = (
            (
                parallel_state.get_expert_tensor_parallel_world_size(),
                parallel_state.get_expert_tensor_parallel_rank(),
            )
            if expert
            else (
                parallel_state.get_tensor_model_parallel_world_size(),
                parallel_state.get_tensor_model_parallel_rank(),
            )
        )
        own[dim + 1] = slice(rank * shape[dim + 1], (rank + 1) * shape[dim + 1])
        shape[dim + 1] *= size
    return torch.empty(shape, dtype=parameter.dtype), tuple(own)


@dataclass(frozen=True)
class Batch:
    """Whole sequences, `[B, S]` each, before any rank takes its part."""

    token_ids: Tensor
    labels: Tensor
    weights: Tensor
    bounds: Tensor
    packed: PackedSeqParams | None


def batches(kind: Kind) -> list[Batch]:
    """The microbatches of the whole step. A pack's sequences end in padding, with which eight divides them."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(NUM_MICROBATCHES):
        token_ids = torch.randint(VOCABULARY, (MICROBATCH, LENGTH), generator=generator)
        weights = torch.ones(MICROBATCH, LENGTH)
        weights[:, -1] = 0
        bounds, packed = torch.tensor([0, LENGTH]), None
        if kind != "padded":
            token_ids, weights = token_ids.view(1, -1), torch.zeros(1, MICROBATCH * LENGTH)
            lengths, bounds = torch.tensor([7, 11, 5]), torch.tensor([0, 8, 24, 32])
            for start, length in zip(bounds.tolist(), lengths.tolist(), strict=False):
                weights[0, start : start + length - 1] = 1
            ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
            packed = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=ends.int(),
                cu_seqlens_kv=ends.int(),
                cu_seqlens_q_padded=bounds.int(),
                cu_seqlens_kv_padded=bounds.int(),
                max_seqlen_q=16,
                max_seqlen_kv=16,
                local_cp_size=1 if kind == "uncut packs" else None,
            )
        found.append(Batch(token_ids, token_ids.roll(-1, 1), weights, bounds, packed))
    return found


def _forward_step(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Any]:
    batch = next(batches)
    length = batch.token_ids.shape[1]
    mask = None if batch.packed else torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    rows = torch.arange(length)
    if not (batch.packed and batch.packed.local_cp_size):
        rows = rows_of_rank(batch.bounds, size, rank)
    token_ids = batch.token_ids[:, rows]
    output = model(token_ids, rows.expand_as(token_ids), mask, packed_seq_params=batch.packed)

    def loss(logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        logprobs = gather_from_tensor_model_parallel_region(logits).log_softmax(-1)
        nats = -logprobs.gather(-1, batch.labels[:, rows, None]).squeeze(-1)
        nats = (nats * batch.weights[:, rows]).sum()
        return nats, torch.tensor(token_ids.numel(), dtype=torch.int), {"loss": nats.detach()}

    return output, loss


def step(kind: Kind, overrides: dict[str, Any]) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
    """Forward and backward by Megatron's own schedule, `finalize_model_grads` included.

    Returns:
        The losses of this rank's part of its microbatches by their number, where the last stage is; and by global name
        the gradients as the whole model has them, NaN in the parts of other ranks.
    """
    model_config = config(**overrides)
    model_config.finalize_model_grads_func = finalize_model_grads
    chunks = model_chunks(model_config)
    # Ranks that do not cut a batch together have batches of their own.
    uncut = kind == "uncut packs"
    size = parallel_state.get_data_parallel_world_size(with_context_parallel=uncut)
    rank = parallel_state.get_data_parallel_rank(with_context_parallel=uncut)
    mine = batches(kind)[rank::size]
    losses = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=[iter(mine) for _ in chunks] if len(chunks) > 1 else iter(mine),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(mine),
        seq_length=mine[0].token_ids.shape[1],
        micro_batch_size=mine[0].token_ids.shape[0],
        forward_only=False,
    )
    gradients = {}
    for chunk in chunks:
        for name, parameter in chunk.module.named_parameters():
            whole, own = _whole(chunk.module, name, parameter)
            whole.fill_(torch.nan)
            whole[own] = parameter.main_grad.view(whole[own].shape)
            gradients[_global_name(chunk.module, name)] = whole
    release(chunks)
    return {rank + size * number: each["loss"] for number, each in enumerate(losses)}, gradients
