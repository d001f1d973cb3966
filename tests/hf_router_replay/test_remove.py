"""Invariant: remove() leaves stock transformers, in its numbers and in its objects."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint

from hf_router_replay import attach
from router_replay.errors import SeamError
from tests.hf_router_replay.small_models import FAMILIES, batch_of, build, logits_of, loss_of
from tests.random_batches import gradients

families = pytest.mark.parametrize("family", FAMILIES)


def step(model, batch):
    logits = logits_of(model, batch)
    loss_of(logits, batch).backward()
    return logits.detach(), gradients(model)


@families
def test_numbers_are_those_of_a_model_never_touched(family):
    untouched, removed, batch = build(family), build(family), batch_of(family)
    with attach(removed, overlap_every=None) as replay, replay.microbatch(batch.masks, batch.layout):
        under_replay, _ = step(removed, batch)
    removed.zero_grad(set_to_none=True)
    expected, expected_gradients = step(untouched, batch)
    found, found_gradients = step(removed, batch)
    assert not torch.equal(under_replay, expected)
    assert torch.equal(found, expected)
    assert all(torch.equal(value, expected_gradients[name]) for name, value in found_gradients.items())


def objects(model):
    """What every module holds, and in its dicts, hooks of all kinds among them."""
    return {
        (name, attribute): dict(value) if isinstance(value, dict) else value
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
    }


@families
def test_objects_are_put_back(family):
    model = build(family)
    modules = objects(model)
    forward = torch.utils.checkpoint.CheckpointFunction.__dict__["forward"]
    replay = attach(model)
    assert torch.utils.checkpoint.CheckpointFunction.__dict__["forward"] is not forward
    assert objects(model) != modules
    replay.remove()
    replay.remove()
    assert not replay.attached
    assert torch.utils.checkpoint.CheckpointFunction.__dict__["forward"] is forward
    assert objects(model) == modules


def test_a_torch_that_does_not_fit_is_refused_and_nothing_is_touched(monkeypatch):
    model = build("qwen3_moe")

    def other(ctx, function, *args):
        raise AssertionError("never called")

    monkeypatch.setattr(torch.utils.checkpoint.CheckpointFunction, "forward", staticmethod(other))
    with pytest.raises(SeamError, match=r"torch\.utils\.checkpoint\.CheckpointFunction\.forward: expected parameters"):
        attach(model)
    assert all(not module._forward_hooks for module in model.modules())


def test_an_error_in_the_block_still_removes():
    model = build("qwen3_moe")
    with pytest.raises(KeyboardInterrupt), attach(model):
        raise KeyboardInterrupt
    with attach(model):
        pass
