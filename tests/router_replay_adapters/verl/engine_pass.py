"""A training step by verl's own `MegatronEngineWithLMHead.forward_step`, in a rank process of the harness."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
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
from router_replay.masks import to_bytes
from router_replay_adapters.verl.packed import KEY
from tests.megatron_router_replay.parallel import training
from tests.megatron_router_replay.parallel.cases import Case
from tests.megatron_router_replay.parallel.data import Microbatch
from tests.megatron_router_replay.parallel.model import build_chunks
from tests.megatron_router_replay.parallel.training import KeepFloat64, RankStep, parallel_layout
from tests.router_replay_adapters.verl.passes import input_ids, microbatches, routed_experts

PACKED = {"SGLANG_ROUTER_CAPTURE": "1"}
STEPPED = 0.5
"""The norm of its gradients that an optimizer answers with."""


@dataclass
class EngineStep(RankStep):
    """What one rank saw of a step, and the metrics that the engine returned."""

    metrics: dict[str, Any] = field(default_factory=dict)


def engine_step(
    case: Case,
    masks: str = "as recorded",
    settings: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] = PACKED,
    judged: bool = False,
) -> EngineStep:
    """Train one step.

    Args:
        masks: "as recorded"; "cut short" by two rows; "of the next microbatch"; "unknown" rows alone in microbatch 0,
            of whose samples the last has None; "none" in the batch at all; "experts", verl's own, in their place.
        settings: of the engine's configuration; `mode` of verl's own replay; how ranks `cut` a pack.
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
        seen = EngineStep(parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_context_parallel_rank())
        whole, now = microbatches(case), []
        batches = [_batch(case, whole, each, masks) for each in whole]

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

        def forward_backward_batch(*_: Any, **__: Any) -> dict[str, Any]:
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=make_batch_generator(batches, vpp_size=len(wrapped)),
                model=wrapped,
                num_microbatches=len(batches),
                seq_length=whole[0].token_ids.shape[1],
                micro_batch_size=1,
            )
            return {"metrics": {}}

        engine.forward_backward_batch = forward_backward_batch
        seen.metrics = engine.train_batch(batches[0], loss_function=None)["metrics"]
    return seen


def refusal(*args: Any) -> str:
    """What the exception says with which `engine_step` ends; "" where there is none."""
    try:
        engine_step(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def fp8_packs(case: Case) -> tuple[list[int], list[int], list[int]]:
    """Where sequences begin in a pack: as the adapter says in a model in FP8, and as verl makes it with and without."""
    from verl.models.mcore.util import preprocess_thd_engine

    from router_replay_adapters.verl.engine import _layout

    with parallel_layout(case):
        engine = SimpleNamespace(engine_config=SimpleNamespace(pad_to_length=False, pad_to_length_bucket=512))
        model, ids = SimpleNamespace(config=SimpleNamespace(fp8="hybrid")), input_ids(microbatches(case)[0])
        bounds = _layout(engine, ids, model).cut_bounds
        assert bounds is not None
        packs = [preprocess_thd_engine(ids, use_fp8_padding=fp8)[1].cu_seqlens_q_padded for fp8 in (True, False)]
    return bounds.tolist(), packs[0].tolist(), packs[1].tolist()


def load() -> None:
    """Import verl's engine, which takes longer than a step may."""
    importlib.import_module("verl.workers.engine.megatron.transformer_impl")


def _engine(kind: type, wrapped: list[nn.Module], settings: dict[str, Any]) -> Any:
    """As much of an engine as a step reads."""
    from verl.workers.config.engine import EngineRouterReplayConfig, McoreEngineConfig

    mode, cut = settings.pop("mode", "disabled"), settings.pop("cut", None)
    engine = kind.__new__(kind)
    engine.engine_config = McoreEngineConfig(router_replay=EngineRouterReplayConfig(mode=mode), **settings)
    engine.enable_routing_replay = mode != "disabled"
    if cut is not None:
        engine._get_context_parallel_layout = lambda model: cut
    engine.model_config = SimpleNamespace(
        model_type="language_model",
        mtp=SimpleNamespace(enable=False, enable_train=False),
        hf_config=SimpleNamespace(architectures=["Qwen3MoeForCausalLM"]),
        tokenizer=SimpleNamespace(pad_token_id=0),
    )
    engine.tf_config = wrapped[0].config
    engine.module = wrapped
    engine.optimizer = SimpleNamespace(step=lambda: (True, STEPPED, 0))
    engine.optimizer_zero_grad = lambda: None
    engine.is_mp_src_rank_with_outputs = parallel_state.is_pipeline_last_stage
    engine.get_data_parallel_group = parallel_state.get_data_parallel_group
    return engine


def _batch(case: Case, whole: list[Microbatch], microbatch: Microbatch, masks: str) -> TensorDict:
    from verl.utils import tensordict_utils as tu

    of = whole[(microbatch.index + (masks == "of the next microbatch")) % len(whole)]
    kept = [each.num_tokens - (2 if masks == "cut short" else 0) for each in of.masks]
    given: list[bytes | None] = [
        to_bytes(each.cut(rows, ids)) for each, rows, ids in zip(of.masks, kept, input_ids(of).unbind(), strict=True)
    ]
    if masks == "unknown" and microbatch.index == 0:
        given = [to_bytes(replace(one, valid=torch.zeros_like(one.valid))) for one in of.masks[:-1]] + [None]
    count = len(given)
    tensors = {"input_ids": input_ids(microbatch), "loss_mask": torch.ones(count, 1), "temperature": torch.ones(count)}
    batch = TensorDict(tensors, batch_size=[count])
    weights = [
        microbatch.weights[0, start : start + one.num_tokens + 1]
        for start, one in zip(microbatch.bounds or (), microbatch.masks, strict=False)
    ]
    batch["weights"] = torch.nested.as_nested_tensor(weights, layout=torch.jagged)
    tu.assign_non_tensor(batch, index=microbatch.index, num_micro_batch=1)
    if masks == "experts":
        batch["routed_experts"] = routed_experts(case, microbatch)
    elif masks != "none":
        tu.assign_non_tensor_stack(batch, KEY, given)
    return batch


def _loss(seen: RankStep) -> Any:
    def loss(model_output: Any, data: TensorDict, dp_group: Any) -> Any:
        value = -(model_output["log_probs"].values() * data["weights"].values()).sum()
        seen.losses[data["index"]] = value.detach().clone()
        return value, {}

    return loss
