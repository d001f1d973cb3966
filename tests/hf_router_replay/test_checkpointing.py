"""Invariant: under transformers' gradient checkpointing a recompute routes as its own forward pass did."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint

from hf_router_replay import attach
from router_replay.errors import CallOrderError
from tests.hf_router_replay.small_models import (
    FAMILIES,
    batch_of,
    blocks,
    build,
    computed_experts,
    logits_of,
    loss_of,
    router_of,
    wrong_rows,
)
from tests.random_batches import gradients

families = pytest.mark.parametrize("family", FAMILIES)
kinds = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])


def checkpointed(family, use_reentrant):
    model = build(family).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    return model


def forward(model, replay, batch):
    with replay.microbatch(batch.masks, batch.layout):
        return loss_of(logits_of(model, batch), batch)


def train(model, batches):
    """Both forward passes before both backward passes, in one order and then in the other."""
    found = []
    with attach(model, overlap_every=None) as replay:
        for order in ((0, 1), (1, 0)):
            losses = [forward(model, replay, batch) for batch in batches]
            for index in order:
                losses[index].backward()
            found.append(gradients(model))
            model.zero_grad(set_to_none=True)
    return found


@kinds
@families
def test_gradients_are_bitwise_those_without_checkpointing(family, use_reentrant):
    batches = [batch_of(family, seed) for seed in (21, 22)]
    plain, again = train(build(family).train(), batches), train(checkpointed(family, use_reentrant), batches)
    for expected, found in zip(plain, again, strict=True):
        assert expected.keys() == found.keys()
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@kinds
@families
def test_native_choices_are_frozen_for_the_recompute(family, use_reentrant):
    """Router weights change between forward and backward: places without a row repeat the forward pass's choice."""
    model, batch = checkpointed(family, use_reentrant), batch_of(family)
    with attach(model, overlap_every=None) as replay, computed_experts(model) as seen:
        loss = forward(model, replay, batch)
        for block in blocks(model).values():
            router_of(block).weight.data.neg_()
        loss.backward()
        with replay.off(), torch.no_grad():
            logits_of(model, batch)
    for first, again, native in seen.values():
        assert torch.equal(first.sort(1).values, again.sort(1).values)
        assert torch.equal(first[batch.native()], again[batch.native()])
        assert not torch.equal(native[batch.native()].sort(1).values, first[batch.native()].sort(1).values)


@kinds
def test_backward_inside_another_block(use_reentrant):
    family = "glm4_moe"
    first, second = batch_of(family, 21), batch_of(family, 22)
    model = checkpointed(family, use_reentrant)
    with attach(model, overlap_every=None) as replay, computed_experts(model) as seen:
        loss = forward(model, replay, first)
        with replay.microbatch(second.masks, second.layout):
            loss.backward()
            assert wrong_rows(seen, first) == 0
            logits_of(model, second)
        assert wrong_rows(seen, second) == 0
    assert all(len(each) == 3 for each in seen.values())


@kinds
def test_a_recompute_after_remove_is_refused(use_reentrant):
    family = "qwen3_moe"
    model, batch = checkpointed(family, use_reentrant), batch_of(family)
    with attach(model, overlap_every=None) as replay:
        loss = forward(model, replay, batch)
    with pytest.raises(CallOrderError, match="the replay was removed since"):
        loss.backward()


@kinds
def test_observed_and_recorded_routes_are_of_the_forward_pass_alone(use_reentrant):
    family = "qwen3_moe"
    model, batch = checkpointed(family, use_reentrant), batch_of(family)
    with attach(model, overlap_every=None) as replay:
        with replay.record(batch.layout) as recorded, replay.observe() as observed:
            loss = loss_of(logits_of(model, batch), batch)
            loss.backward()
        routes = recorded.part()
    assert len(routes.rows) == 36
    assert [len(each) for each in observed.indices(batch.layout)] == list(batch.lengths)
