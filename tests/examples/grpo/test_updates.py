"""The trainer's part of the loop: what it is given decides what comes out, to the last bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cpu_engines.megatron import CpuDevice, single_process
from cpu_engines.megatron.logprobs import token_logprobs
from cpu_engines.megatron.qwen3_moe import hf_tensors, load_qwen3_moe
from examples.grpo.loop import Updates
from examples.grpo.settings import Settings
from examples.grpo.state import RunFolder
from examples.grpo.weights import export
from examples.small_model import CHECKPOINT
from megatron_router_replay import attach
from router_replay.mismatch import group_relative_advantages, grpo_loss
from router_replay.mismatch.responses import Responses
from tests.examples.grpo.conversations import own_conversations, with_masks
from tests.megatron_router_replay.batches import dispatched_maps

SETTINGS = Settings(problems=2, group_size=4, minibatches=1, microbatch=4, warmup=1)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture
def model() -> Iterator[torch.nn.Module]:
    with CpuDevice(), single_process():
        yield load_qwen3_moe(CHECKPOINT, torch.float32).train()


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


def gradients(model, replay, conversations, settings) -> list[torch.Tensor]:
    class Kept(torch.optim.SGD):
        """Leaves weights and gradients as they are."""

        def step(self, closure=None):
            return None

    Updates(model, replay, Kept(model.parameters()), settings).step(1, conversations, lambda: None)
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("routes", ["R3", "R2"])
def test_with_matched_routes_the_first_gradients_are_those_without_replay(model, tokenizer, routes):
    with attach(model) as replay:
        conversations = own_conversations(model, replay, tokenizer, 8, 4)
        own = gradients(model, replay, conversations, replace(SETTINGS, routes="own"))
        assert any(bool(each.any()) for each in own)
        replayed = gradients(model, replay, conversations, replace(SETTINGS, routes=routes))
    for ours, theirs in zip(replayed, own, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_training_takes_the_recorded_experts(model, tokenizer):
    settings = replace(SETTINGS, routes="R3", group_size=2, microbatch=4)
    # Routes at random are none that this model would choose, which is an error otherwise.
    with attach(model, overlap_every=None) as replay:
        conversations = with_masks(own_conversations(model, replay, tokenizer, 4, 2), seed=3)
        updates = Updates(model, replay, optimizer_of(model), settings)
        with dispatched_maps(model) as maps:
            updates.step(1, conversations, lambda: None)
    size = len(conversations)
    for layer, passes in maps.items():
        assert len(passes) == 2  # scored once, trained once
        for seen in passes:
            for number, each in enumerate(conversations):
                index = each.masks.geometry.moe_layers.index(layer)
                for position, experts in enumerate(each.masks.indices()[:, index].tolist()):
                    place = position * size + number
                    assert set(seen[place].nonzero().flatten().tolist()) == set(experts)


def test_the_gradient_is_of_the_mean_over_the_minibatch(model, tokenizer):
    """In two microbatches on Megatron's schedule as in one by hand."""
    with attach(model) as replay:
        conversations = own_conversations(model, replay, tokenizer, 8, 4)
        # Lengths that differ between the microbatches.
        found = gradients(model, replay, conversations, replace(SETTINGS, routes="own"))
        model.zero_grad()
        total = torch.zeros(())
        groups = [number // 4 for number in range(8)]
        rewards = torch.tensor([float(each.correct) for each in conversations])
        whole = Responses.packed(torch.ones(8, dtype=torch.bool), list(range(9)), groups)
        advantages = group_relative_advantages(rewards, whole)
        for number, each in enumerate(conversations):
            with replay.off():
                logprobs = token_logprobs(model, torch.tensor([each.token_ids]))
            loss, _ = grpo_loss(
                current=logprobs,
                old=logprobs.detach(),
                advantages=advantages[number : number + 1],
                responses=Responses.padded(torch.tensor([each.sampled])),
            )
            total = total + loss / 8
        total.backward()
    for ours, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_run_that_goes_on_is_the_same_to_the_last_bit(model, tokenizer, tmp_path: Path):
    settings = replace(SETTINGS, minibatches=2, routes="R3", correction="TIS")
    run = RunFolder(tmp_path)
    with attach(model) as replay:
        conversations = own_conversations(model, replay, tokenizer, 8, 4)
        optimizer = optimizer_of(model)
        updates = Updates(model, replay, optimizer, settings)
        updates.step(1, conversations, lambda: None)
        run.save(1, model, optimizer, {})
        first, _ = updates.step(2, conversations, lambda: None)
        wanted = copy.deepcopy(hf_tensors(model))
        # In the middle of the third step, when one of its two updates is done, it is killed.
        updates.step(3, conversations[::-1], lambda: None)
        again = optimizer_of(model)
        assert run.restore(model, again) == 1
        second, _ = Updates(model, replay, again, settings).step(2, conversations, lambda: None)
    found = hf_tensors(model)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert first == second
    assert (first["reward"], first["groups_of_one_reward"]) == (0.5, 0.0)


def test_groups_of_one_reward_are_counted_and_teach_nothing(model, tokenizer):
    with attach(model) as replay:
        played = own_conversations(model, replay, tokenizer, 8, 4)
        played = [replace(each, correct=number < 4) for number, each in enumerate(played)]
        figures, _ = Updates(model, replay, optimizer_of(model), SETTINGS).step(1, played, lambda: None)
    assert (figures["groups_of_one_reward"], figures["gradient_norm"], figures["reward"]) == (1.0, 0.0, 0.5)


def test_an_export_is_the_model(model, tmp_path: Path):
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)), alpha=0.1)
    export(model, CHECKPOINT, tmp_path / "weights", torch.float32)
    export(model, CHECKPOINT, tmp_path / "weights", torch.float32)
    loaded = load_qwen3_moe(tmp_path / "weights", torch.float32)
    token_ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(token_logprobs(loaded, token_ids), token_logprobs(model, token_ids))
    assert [each.name for each in tmp_path.iterdir()] == ["weights"]


def test_tensors_are_those_of_the_checkpoint(model):
    from safetensors.torch import load_file

    wanted = {name: each for file in CHECKPOINT.glob("*.safetensors") for name, each in load_file(file).items()}
    found = hf_tensors(model)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name].to(each.dtype), each) for name, each in wanted.items())
