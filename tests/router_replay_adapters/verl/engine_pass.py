"""A training step by verl's own `MegatronEngineWithLMHead.forward_step`, in a rank process of the harness."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from tensordict import TensorDict
from torch import nn

import megatron_router_replay
from cpu_engines.megatron.release import release
from router_replay.masks.masks import RoutingMasks
from router_replay_adapters.verl.packed import KEY
from tests.megatron_router_replay.parallel import training
from tests.megatron_router_replay.parallel.cases import Case
from tests.megatron_router_replay.parallel.data import Microbatch
from tests.megatron_router_replay.parallel.model import build_chunks
from tests.megatron_router_replay.parallel.training import KeepFloat64, RankStep, parallel_layout
from tests.router_replay_adapters.verl.passes import input_ids, microbatches

PACKED = {"SGLANG_ROUTER_CAPTURE": "1"}


def engine_step(
    case: Case,
    masks: str = "as recorded",
    settings: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] = PACKED,
    judged: bool = False,
) -> RankStep:
    """Train one step.

    Args:
        masks: "as recorded"; "of the next microbatch"; "none" in the batch at all.
        settings: of the engine's configuration, and `enable_routing_replay`.
        environment: of verl's processes.
        judged: look how far the masks, which are random, are the model's own choice.
    """
    import router_replay_adapters.verl  # noqa: F401 (wraps what is imported next)

    # isort: split
    from verl.utils.megatron.pipeline_parallel import make_batch_generator
    from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, environment))
        if not judged:
            attach = partial(megatron_router_replay.attach, overlap_every=None)
            stack.enter_context(mock.patch.object(megatron_router_replay, "attach", attach))
        stack.enter_context(parallel_layout(case))
        chunks = build_chunks(case)
        wrapped = training._wrapped(chunks)
        stack.callback(release, wrapped)
        engine = _engine(MegatronEngineWithLMHead, wrapped, dict(settings or {}))
        seen = RankStep(parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_context_parallel_rank())
        whole, now = microbatches(case), []
        batches = [_batch(whole, each, masks) for each in whole]

        def forward_step(data: Iterator[TensorDict], chunk: nn.Module) -> Any:
            batch = next(data)
            now.append(batch["index"])
            result = engine.forward_step(
                iter([batch]),
                chunk,
                logits_processor_func=None,
                postprocess_micro_batch_func=partial(
                    engine.postprocess_micro_batch_func, forward_only=False, loss_function=_loss(seen)
                ),
            )
            now.pop()
            return result

        stack.enter_context(KeepFloat64())
        stack.enter_context(training._dispatched(chunks, now, [each.index for each in whole], seen))
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=make_batch_generator(batches, vpp_size=len(wrapped)),
            model=wrapped,
            num_microbatches=len(batches),
            seq_length=whole[0].token_ids.shape[1],
            micro_batch_size=1,
        )
        engine.optimizer_step()
    return seen


def refusal(*args: Any) -> str:
    """What the exception says with which `engine_step` ends; "" where there is none."""
    try:
        engine_step(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def load() -> None:
    """Import verl's engine, which takes longer than a step may."""
    importlib.import_module("verl.workers.engine.megatron.transformer_impl")


def _engine(kind: type, wrapped: list[nn.Module], settings: dict[str, Any]) -> Any:
    """As much of an engine as a step reads."""
    engine = kind.__new__(kind)
    engine.enable_routing_replay = settings.pop("enable_routing_replay", False)
    defaults = {
        "forward_only": False,
        "use_fused_kernels": False,
        "use_remove_padding": True,
        "pad_to_length": False,
        "pad_to_length_bucket": None,
        "dynamic_context_parallel": False,
        "entropy_from_logits_with_chunking": False,
    }
    engine.engine_config = SimpleNamespace(**{**defaults, **settings})
    engine.model_config = SimpleNamespace(
        mtp=SimpleNamespace(enable=False, enable_train=False),
        hf_config=SimpleNamespace(architectures=["Qwen3MoeForCausalLM"]),
        tokenizer=SimpleNamespace(pad_token_id=0),
    )
    engine.tf_config = wrapped[0].config
    engine.module = wrapped
    engine.optimizer = SimpleNamespace(step=lambda: (True, 0.0, 0))
    engine.get_data_parallel_group = parallel_state.get_data_parallel_group
    return engine


def _batch(whole: list[Microbatch], microbatch: Microbatch, masks: str) -> TensorDict:
    from verl.utils import tensordict_utils as tu

    given: list[RoutingMasks | None] = [*microbatch.masks]
    if masks == "of the next microbatch":
        given = [*whole[(microbatch.index + 1) % len(whole)].masks]
    count = len(given)
    tensors = {"input_ids": input_ids(microbatch), "loss_mask": torch.ones(count, 1), "temperature": torch.ones(count)}
    batch = TensorDict(tensors, batch_size=[count])
    weights = [
        microbatch.weights[0, start : start + one.num_tokens + 1]
        for start, one in zip(microbatch.bounds or (), microbatch.masks, strict=False)
    ]
    batch["weights"] = torch.nested.as_nested_tensor(weights, layout=torch.jagged)
    tu.assign_non_tensor(batch, index=microbatch.index, num_micro_batch=1)
    if masks != "none":
        tu.assign_non_tensor_stack(batch, KEY, given)
    return batch


def _loss(seen: RankStep) -> Any:
    def loss(model_output: Any, data: TensorDict, dp_group: Any) -> Any:
        value = -(model_output["log_probs"].values() * data["weights"].values()).sum()
        seen.losses[data["index"]] = value.detach().clone()
        return value, {}

    return loss
