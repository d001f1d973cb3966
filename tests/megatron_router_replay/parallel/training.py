"""One training step by Megatron's own schedules, and what it computed: losses, dispatched experts, gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cpu_engines.megatron import model_parallel
from cpu_engines.megatron.release import release
from tests.megatron_router_replay.parallel.cases import Case
from tests.megatron_router_replay.parallel.data import LOSS_SCALE, Microbatch, columns, microbatches
from tests.megatron_router_replay.parallel.model import Shard, build_chunks, shards

Around = Callable[[Microbatch, nn.Module], AbstractContextManager[Any]]
MTP = -1


@dataclass
class RankStep:
    """What one rank saw of a step.

    Attributes:
        tp_rank, cp_rank: where it stood.
        losses: this rank's part of the loss of each microbatch, by index; empty before the last stage.
        maps: routing map `bool [rows, E]` that a dispatcher got, by (decoder layer, microbatch); layer `MTP` for those
            of multi-token prediction.
        gradients: after Megatron's own reduction.
        recomputed_otherwise: how many rows a recompute dispatched to other experts than the forward pass, by (decoder
            layer, microbatch), where there are any.
    """

    tp_rank: int
    cp_rank: int
    losses: dict[int, Tensor] = field(default_factory=dict)
    maps: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    gradients: list[tuple[Shard, Tensor]] = field(default_factory=list)
    recomputed_otherwise: dict[tuple[int, int], int] = field(default_factory=dict)


class KeepFloat64(TorchFunctionMode):
    """Leaves float64 alone where Megatron asks for float32: softmax of routers, loss, norms.

    Rounding to float32 would leave only 1e-7 of what two layouts are compared by.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            if kwargs.get("dtype") == torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@contextlib.contextmanager
def parallel_layout(case: Case) -> Iterator[None]:
    """Megatron's process groups for a case, in a world that is there."""
    with model_parallel(
        tensor_parallel=case.tp,
        context_parallel=case.cp,
        pipeline_parallel=case.pp,
        virtual_pipeline=case.vpp if case.vpp > 1 else None,
        expert_parallel=case.ep,
        expert_tensor_parallel=case.etp,
        context_order=case.context_order,
    ):
        yield


def native_step(case: Case) -> RankStep:
    """Build this rank's model in an existing world, and train one step without any replay."""
    with parallel_layout(case):
        return train_step(case, build_chunks(case))


def refusal(case: Case) -> str:
    """What the exception says with which `native_step` ends on this rank; "" where there is none."""
    try:
        native_step(case)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def train_step(case: Case, chunks: list[nn.Module], around: Around | None = None) -> RankStep:
    """One step of the model of `build_chunks`, inside `parallel_layout`.

    Args:
        around: makes the context in which forward_step calls a chunk with a microbatch.
    """
    seen = RankStep(parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_context_parallel_rank())
    wrapped = _wrapped(chunks)
    count, own = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    batches = microbatches(case)[own::count]
    current: list[int] = []

    def forward_step(data: Iterator[Microbatch], chunk: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        microbatch = next(data)
        current.append(microbatch.index)
        with around(microbatch, chunk) if around is not None else contextlib.nullcontext():
            output = chunk(**_arguments(case, microbatch, seen.cp_rank))
        current.pop()
        return output, partial(_loss, case, microbatch, seen)

    try:
        with KeepFloat64(), _dispatched(chunks, current, [each.index for each in batches], seen):
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[iter(batches) for _ in chunks],
                model=wrapped,
                num_microbatches=len(batches),
                seq_length=batches[0].token_ids.shape[1],
                micro_batch_size=batches[0].token_ids.shape[0],
            )
        seen.gradients = [(shard, each.main_grad.clone()) for chunk in chunks for shard, each in shards(chunk)]
    finally:
        release(wrapped)
    return seen


def _wrapped(chunks: list[nn.Module]) -> list[DistributedDataParallel]:
    wrapped = []
    for number, chunk in enumerate(chunks):
        chunk.config.finalize_model_grads_func = finalize_model_grads
        ddp = DistributedDataParallel(
            chunk.config, DistributedDataParallelConfig(), chunk, disable_bucketing=number > 0
        )
        ddp.zero_grad_buffer()
        wrapped.append(ddp)
    return wrapped


def _arguments(case: Case, microbatch: Microbatch, cp_rank: int) -> dict[str, Any]:
    own = columns(case, microbatch, cp_rank)
    packed = None
    if microbatch.bounds is not None:
        cu_seqlens = torch.tensor(microbatch.bounds, dtype=torch.int32)
        longest = int(cu_seqlens.diff().max())
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            cu_seqlens_q_padded=cu_seqlens,
            cu_seqlens_kv_padded=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
    length = microbatch.token_ids.shape[1]
    return {
        "input_ids": microbatch.token_ids[:, own],
        "position_ids": microbatch.position_ids[:, own],
        "attention_mask": torch.ones(1, 1, length, length, dtype=torch.bool).triu(1),
        "labels": microbatch.labels[:, own],
        "loss_mask": microbatch.mtp_mask[:, own],
        "packed_seq_params": packed,
    }


def _loss(case: Case, microbatch: Microbatch, seen: RankStep, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum over this rank's places; context-parallel ranks add up, since schedules multiply by their
    number and DistributedDataParallel divides by it.
    """
    loss = (output * microbatch.weights[:, columns(case, microbatch, seen.cp_rank)]).sum() * LOSS_SCALE
    seen.losses[microbatch.index] = loss.detach().clone()
    return loss, {}


@contextlib.contextmanager
def _dispatched(chunks: list[nn.Module], current: list[int], order: list[int], seen: RankStep) -> Iterator[None]:
    """Keep what every dispatcher gets in forward_step, and hold that of a recompute against it.

    Args:
        current: holds the microbatch while forward_step calls a chunk with it.
        order: microbatches; every schedule takes the backward passes of one chunk in it.
    """
    dispatchers: list[Any] = []
    for chunk in chunks:
        for module in chunk.modules():
            if not isinstance(module, MoELayer):
                continue
            layer = MTP if module.router.is_mtp_layer else module.router.layer_number - 1
            dispatcher = module.token_dispatcher
            original, recomputed = dispatcher.dispatch_preprocess, iter(order)

            def spy(
                hidden: Tensor,
                routing_map: Tensor,
                probs: Tensor,
                _original: Any = original,
                _layer: int = layer,
                _recomputed: Iterator[int] = recomputed,
            ) -> Any:
                if current:
                    seen.maps[_layer, current[0]] = routing_map.detach().clone()
                else:
                    key = _layer, next(_recomputed)
                    if others := int((seen.maps[key] != routing_map).any(-1).sum()):
                        seen.recomputed_otherwise[key] = others
                return _original(hidden, routing_map, probs)

            dispatcher.dispatch_preprocess = spy
            dispatchers.append(dispatcher)
    try:
        yield
    finally:
        for dispatcher in dispatchers:
            del dispatcher.dispatch_preprocess
