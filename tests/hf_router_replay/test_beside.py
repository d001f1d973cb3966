"""What replay leaves as it is beside the choice of experts, and what it must not do there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import hf_router_replay
import router_replay
from hf_router_replay import attach
from router_replay.errors import CallOrderError, PairingError
from tests.hf_router_replay.small_models import (
    FAMILIES,
    NUM_EXPERTS,
    TOP_K,
    attention_mask,
    batch_of,
    blocks,
    build,
    computed_experts,
    logits_of,
    loss_of,
    router_of,
    router_outputs,
    wrong_rows,
)
from tests.no_waiting import RefuseWaiting
from tests.random_batches import gradients


@pytest.mark.parametrize("codec", ["bitset", "ordered"])
@pytest.mark.parametrize("family", FAMILIES)
def test_routers_never_wait_for_the_device(family, codec):
    model, batch = build(family), batch_of(family, codec=codec)
    hidden = torch.randn(36, 32, generator=torch.Generator().manual_seed(32))
    with attach(model) as replay:
        placed, found = replay.place(batch.masks, batch.layout), {}
        with replay.microbatch(placed), RefuseWaiting():
            for layer, block in blocks(model).items():
                found[layer] = router_of(block)(hidden)[2]
    for layer, experts in found.items():
        recorded = dict(batch.recorded(layer))
        assert {place: set(experts[place].tolist()) for place in recorded} == recorded


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_the_load_balancing_loss_counts_the_trainers_own_choice(family):
    """It makes its own top-k of the logits; those of the first MoE layer are not even reached by replay."""
    model, batch = build(family, output_router_logits=True), batch_of(family)
    inputs = {"input_ids": batch.token_ids, "attention_mask": attention_mask(batch), "use_cache": False}
    stock = model(**inputs)
    with (
        attach(model, overlap_every=None) as replay,
        computed_experts(model) as seen,
        replay.microbatch(batch.masks, batch.layout),
    ):
        replayed = model(**inputs)
    assert wrong_rows(seen, batch) == 0
    assert torch.equal(replayed.router_logits[0], stock.router_logits[0])
    native = load_balancing_loss_func(replayed.router_logits, NUM_EXPERTS, TOP_K, attention_mask(batch))
    assert torch.equal(replayed.aux_loss, native)


def test_outputs_that_transformers_captures():
    family = "qwen3_moe"
    model, batch = build(family), batch_of(family)
    with attach(model, overlap_every=None) as replay, replay.microbatch(batch.masks, batch.layout):
        plain = logits_of(model, batch)
    with attach(model, overlap_every=None) as replay, replay.microbatch(batch.masks, batch.layout):
        output = model(
            input_ids=batch.token_ids, attention_mask=attention_mask(batch), use_cache=False,
            output_router_logits=True, output_hidden_states=True,
        )  # fmt: skip
    assert torch.equal(output.logits, plain)
    assert [each.shape for each in output.router_logits] == [(36, NUM_EXPERTS)] * 2


def test_generation_is_native_where_replay_is_off():
    family = "qwen3_moe"
    model, batch = build(family), batch_of(family)
    ids = batch.token_ids[:1, :6]
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    with attach(model) as replay, replay.off():
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)


def test_layers_that_are_compiled_after_attach():
    """Their code is cut where the router's hook is, which runs as it stands."""
    family = "qwen3_moe"
    model, batch, other = build(family), batch_of(family), batch_of(family, 2)
    with attach(model, overlap_every=None) as replay:
        expected = []
        for each in (other, batch):
            with replay.microbatch(each.masks, each.layout):
                expected.append(logits_of(model, each))
        for block in blocks(model).values():
            block.compile(backend="eager")
        for each, eager in zip((other, batch), expected, strict=True):
            with replay.microbatch(each.masks, each.layout), router_outputs(model) as outputs:
                logits = logits_of(model, each)
            assert wrong_rows({layer: [seen[0][2]] for layer, seen in outputs.items()}, each) == 0
            assert torch.equal(logits, eager)
        with pytest.raises(CallOrderError, match="has no masks"):
            logits_of(model, batch)


class CountsModelsCode(CompileCounter):
    """Counts what is compiled, and refuses code of ours."""

    def __call__(self, graph, example_inputs):
        ours = [f'File "{Path(package.__file__).parent}/' for package in (hf_router_replay, router_replay)]
        traces = [node.stack_trace or "" for node in graph.graph.nodes]
        assert not [trace for trace in traces if any(folder in trace for folder in ours)]
        return super().__call__(graph, example_inputs)


@pytest.mark.parametrize("use_reentrant", [None, False])
def test_a_model_that_is_compiled_whole_after_attach_trains_the_same(use_reentrant):
    """Each pass has its own masks and token ids, of which code that is compiled once must keep none."""
    family = "qwen3_moe"
    model, batches = build(family), [batch_of(family), batch_of(family, 2), batch_of(family, 3), batch_of(family, 4)]
    model.train()
    if use_reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})

    def step(call, batch):
        model.zero_grad(set_to_none=True)
        with replay.microbatch(batch.masks, batch.layout), router_outputs(model) as outputs:
            logits = call(input_ids=batch.token_ids, attention_mask=attention_mask(batch), use_cache=False).logits
        loss_of(logits, batch).backward()
        replay.check()
        assert wrong_rows({layer: [seen[0][2]] for layer, seen in outputs.items()}, batch) == 0
        return logits.detach(), gradients(model)

    with attach(model, overlap_every=None) as replay:
        expected = [step(model, batch) for batch in batches]
        counter, frames = CountsModelsCode(), []
        compiled = torch.compile(model, backend=counter)
        for batch, (logits, of_logits) in zip(batches, expected, strict=True):
            found, found_gradients = step(compiled, batch)
            assert torch.equal(found, logits)
            assert all(torch.equal(value, of_logits[name]) for name, value in found_gradients.items())
            frames.append(counter.frame_count)
        # The second pass has other shapes than the first; no pass after that is compiled for its masks.
        assert frames[-1] == frames[1] > 0
        with replay.microbatch(batches[0].masks, batches[0].layout):
            compiled(input_ids=batches[0].token_ids.flip(0), attention_mask=attention_mask(batches[0]))
        with pytest.raises(PairingError, match="token ids"):
            replay.check()


def test_a_single_token_that_is_looked_up_is_no_batch():
    """As models of images and text do for their placeholders."""
    family = "qwen3_moe"
    model, batch = build(family), batch_of(family)
    with attach(model, overlap_every=None) as replay, replay.microbatch(batch.masks, batch.layout):
        model.get_input_embeddings()(torch.tensor(3))
        logits_of(model, batch)
        replay.check()


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_models(family):
    model, batch = build(family, dtype=torch.bfloat16), batch_of(family)
    with (
        attach(model, overlap_every=None) as replay,
        computed_experts(model) as seen,
        replay.microbatch(batch.masks, batch.layout),
    ):
        assert logits_of(model, batch).dtype == torch.bfloat16
    assert wrong_rows(seen, batch) == 0
