"""The trainer's part of the loop: what it is given decides what comes out, to the last bit."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cpu_engines.megatron.logprobs import token_logprobs
from cpu_engines.megatron.qwen3_moe import hf_tensors
from examples.grpo import loop
from examples.grpo.loop import Updates
from examples.grpo.microbatches import microbatches
from examples.grpo.state import RunFolder
from megatron_router_replay import attach
from router_replay.errors import InputError
from tests.examples.grpo.conversations import own_conversations, with_masks
from tests.examples.grpo.updates import SETTINGS, gradients, optimizer_of
from tests.megatron_router_replay.batches import dispatched_maps


def test_under_r2_every_update_takes_the_routes_of_the_scoring_pass(model, tokenizer):
    """Also the second, whose weights would choose others by themselves.

    Conversations of a group have the same tokens: weights that differ give them a gradient.
    """
    settings = replace(SETTINGS, minibatches=2, learning_rate=1e-2, routes="R2", correction="TIS")
    with attach(model, overlap_every=None) as replay:
        conversations = own_conversations(model, replay, tokenizer, 8, 4, noise=0.7)
        updates = Updates(model, replay, optimizer_of(model), settings)
        with dispatched_maps(model) as maps:
            updates.step(1, conversations, lambda: None)
        own = Updates(model, replay, optimizer_of(model), replace(settings, routes="own"))
        with dispatched_maps(model) as later:
            own.step(2, conversations, lambda: None)
    length = len(conversations[4].token_ids)
    read = [place * 4 + row for row in range(4) for place in range(length - 1)]
    moved = 0
    for layer, (_, scored, _, trained) in maps.items():  # two microbatches are scored, then each is trained by
        assert torch.equal(trained[read], scored[read])
        moved += int((later[layer][1][read] != scored[read]).sum())
    assert moved > 100


def test_filters_leave_minibatches_of_one_size(model, tokenizer, monkeypatch):
    """Seven of eight conversations in two optimizer steps are three and four, in microbatches of at most two."""
    seen = []
    scored = loop.logprobs_with_top_k
    monkeypatch.setattr(
        loop, "logprobs_with_top_k", lambda model, ids, top_k: seen.append(len(ids)) or scored(model, ids, top_k)
    )
    with attach(model) as replay:
        played = own_conversations(model, replay, tokenizer, 8, 4)
        played[2] = replace(played[2], cut_off=True)
        settings = replace(SETTINGS, minibatches=2, microbatch=2, drop=("cut-off",))
        made = microbatches(played[:7], [0] * 7, model, replay, settings)
        Updates(model, replay, optimizer_of(model), settings).step(1, played, lambda: None)
    assert seen == [2, 1, 2, 2]
    assert [(each.minibatch, each.denominator) for each in made] == [(0, 1.5), (0, 1.5), (1, 2.0), (1, 2.0)]


def test_microbatches_are_made_for_a_wrapped_model(model, tokenizer):
    """As Megatron's data-parallel wrapper has it, which hands on no attribute of what is in it."""

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = model

    with attach(model) as replay:
        played = own_conversations(model, replay, tokenizer, 4, 4, top_k=4)
        settings = replace(SETTINGS, score_centering=4)
        (bare,) = microbatches(played, [0] * 4, model, replay, settings)
        (wrapped,) = microbatches(played, [0] * 4, Wrapper(), replay, settings)
    assert torch.equal(wrapped.token_ids, bare.token_ids)
    assert torch.equal(wrapped.top_k.token_ids, bare.top_k.token_ids)


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


def test_a_bad_token_of_a_pass_is_told_before_the_weights_change(model, tokenizer, monkeypatch):
    def nan_in_training(model, token_ids, top_k):
        logprobs = loop_logprobs(model, token_ids, top_k)
        return logprobs * float("nan") if logprobs.requires_grad else logprobs

    loop_logprobs = loop.logprobs_with_top_k
    with attach(model) as replay:
        played = own_conversations(model, replay, tokenizer, 8, 4)
        before = copy.deepcopy(hf_tensors(model))
        monkeypatch.setattr(loop, "logprobs_with_top_k", nan_in_training)
        with pytest.raises(InputError, match="response tokens of the loss have log-probabilities that are NaN"):
            Updates(model, replay, optimizer_of(model), SETTINGS).step(1, played, lambda: None)
    after = hf_tensors(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_conversations_that_are_dropped_are_as_if_they_had_never_been_played(model, tokenizer):
    """Of three groups one has one reward and one loses a conversation: three microbatches, the last of them short."""
    with attach(model) as replay:
        played = own_conversations(model, replay, tokenizer, 12, 4)
        played = [replace(each, correct=each.correct or number < 4) for number, each in enumerate(played)]
        played[5] = replace(played[5], cut_off=True)
        played[10] = replace(played[10], bad_calls=1)
        settings = replace(SETTINGS, problems=3, microbatch=3, minibatches=1)
        found = gradients(model, replay, played, replace(settings, drop=("cut-off", "bad-call", "one-reward")))
        model.zero_grad()
        total = torch.zeros(())
        for group in ([4, 6, 7], [8, 9, 11]):
            rewards = torch.tensor([float(played[number].correct) for number in group])
            for number, advantage in zip(group, (rewards - rewards.mean()) / rewards.std(), strict=True):
                with replay.off():
                    logprobs = token_logprobs(model, torch.tensor([played[number].token_ids]))[0]
                total = total - advantage * logprobs[torch.tensor(played[number].sampled)].mean() / 6
        total.backward()
        for ours, parameter in zip(found, model.parameters(), strict=True):
            torch.testing.assert_close(ours, parameter.grad, rtol=1e-3, atol=1e-5)


def test_a_step_of_which_nothing_is_left_leaves_the_weights(model, tokenizer, tmp_path: Path):
    settings = replace(SETTINGS, drop=("one-reward",))
    with attach(model) as replay:
        played = own_conversations(model, replay, tokenizer, 8, 4)
        before = copy.deepcopy(hf_tensors(model))
        updates = Updates(model, replay, optimizer_of(model), settings)
        figures, run_step = updates.step(1, [replace(each, correct=True) for each in played], lambda: None)
        after = hf_tensors(model)
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert run_step.dynamics.dropped_responses == 8 and not len(run_step.responses.mask)
        assert figures["reward"] == figures["filter/dropped/one_reward"] == 1.0
        assert figures["filter/kept"] == 0.0 and "gradient_norm" not in figures
        # Fewer microbatches than minibatches before: they are cut.
        few = [replace(each, correct=each.correct or number < 4) for number, each in enumerate(played)]
        figures, run_step = Updates(model, replay, optimizer_of(model), replace(settings, minibatches=2)).step(
            2, few, lambda: None
        )
        assert run_step is not None and figures["filter/kept"] == 0.5 and figures["gradient_norm"] > 0
