"""A training step of a model of Hugging Face, under native routing and under replay."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.replay.learning import learn
from benchmarks.replay.models import VOCABULARY
from benchmarks.replay.variants import AGAIN, NATIVE, OURS, WITH_NATIVE, with_holes
from hf_router_replay import BatchLayout, attach
from router_replay.replay import join_parts

NUM_LAYERS = 2


def build(hidden: int) -> nn.Module:
    """A Qwen3-MoE with the router shape of Qwen3-30B-A3B; equal arguments give equal weights."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        intermediate_size=hidden,
        moe_intermediate_size=hidden // 4,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
    )
    # What waits least of its implementations, and the one that a trainer would take.
    config._experts_implementation = "grouped_mm"
    model = Qwen3MoeForCausalLM(config)
    for layer in model.model.layers:
        # Logits that differ as those of a trained router do, of inputs of unit variance.
        nn.init.normal_(layer.mlp.gate.weight, std=2 / hidden**0.5)
    return model


def step(model: nn.Module, token_ids: Tensor, block: Callable[[], AbstractContextManager[Any]]) -> None:
    """Forward and backward pass, and an update; what is inside of the block is the forward pass."""
    with block():
        logits = model(input_ids=token_ids, use_cache=False).logits
    learn(model, logits, token_ids)


@contextlib.contextmanager
def variants(hidden: int, token_ids: Tensor) -> Iterator[dict[str, Callable[[], Any]]]:
    """The step in each variant, by name; for the block, since a replay is attached."""
    layout = BatchLayout.padded(token_ids, [token_ids.shape[1]] * len(token_ids))
    native, ours = build(hidden), build(hidden)
    # Its own routes agree with these weights: the check of the overlap runs as in training.
    with attach(ours) as replay:
        with replay.record(layout) as recorder:
            step(ours, token_ids, contextlib.nullcontext)
        masks = join_parts([recorder.part()])
        whole, holed = replay.place(masks, layout), replay.place(with_holes(masks), layout)
        yield {
            # No model runs twice in a row, which would find its weights in the cache.
            NATIVE: lambda: step(native, token_ids, contextlib.nullcontext),
            OURS: lambda: step(ours, token_ids, lambda: replay.microbatch(whole)),
            AGAIN: lambda: step(native, token_ids, contextlib.nullcontext),
            WITH_NATIVE: lambda: step(ours, token_ids, lambda: replay.microbatch(holed)),
        }
