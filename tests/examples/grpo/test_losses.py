"""What the loop's losses come to, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cpu_engines.megatron.logprobs import forward_logits, token_logprobs
from examples.grpo.loop import Updates
from examples.grpo.microbatches import microbatches
from megatron_router_replay import attach
from router_replay.mismatch import group_relative_advantages, grpo_loss
from router_replay.mismatch.responses import Responses
from tests.examples.grpo.conversations import own_conversations
from tests.examples.grpo.updates import SETTINGS, gradients, optimizer_of


@pytest.mark.parametrize("routes", ["R3", "R2"])
def test_with_matched_routes_the_first_gradients_are_those_without_replay(model, tokenizer, routes):
    with attach(model) as replay:
        conversations = own_conversations(model, replay, tokenizer, 8, 4)
        own = gradients(model, replay, conversations, replace(SETTINGS, routes="own"))
        assert any(bool(each.any()) for each in own)
        replayed = gradients(model, replay, conversations, replace(SETTINGS, routes=routes))
    for ours, theirs in zip(replayed, own, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


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


@pytest.mark.parametrize("correction", ["TIS", "MIS"])
def test_a_correction_weighs_each_token(model, tokenizer, correction):
    """The first update, whose ratios to the old policy are 1: the gradient is that of the weighted log-probabilities.

    Those that the model is least sure of, which have the gradient, are made so unlikely to the sampler, or so likely,
    that they are beyond the rules' bounds.
    """
    with attach(model) as replay:
        conversations = own_conversations(model, replay, tokenizer, 8, 4, noise=0.3)
        for each in conversations[:4]:
            unsure = sorted(
                (logprob, place) for place, logprob in enumerate(each.rollout_logprobs) if each.sampled[place]
            )
            for place in (unsure[0][1], unsure[2][1]):
                each.rollout_logprobs[place] -= 2.0
            each.rollout_logprobs[unsure[1][1]] /= 4
        found = gradients(model, replay, conversations, replace(SETTINGS, routes="own", correction=correction))
        model.zero_grad()
        total, bounded = torch.zeros(()), 0
        for each in conversations:
            with replay.off():
                logprobs = token_logprobs(model, torch.tensor([each.token_ids]))[0]
            ratio = (logprobs.detach() - torch.tensor(each.rollout_logprobs)).exp()
            own = torch.tensor(each.sampled)
            weight = ratio.clamp(max=2) if correction == "TIS" else ratio * ((ratio >= 0.5) & (ratio <= 2))
            bounded += int((weight != ratio)[own].sum())
            # Every second of four responses is rewarded: advantages of +-sqrt(3) / 2.
            advantage = (1 if each.correct else -1) * 3**0.5 / 2
            total = total - advantage * (weight * logprobs)[own].mean() / 8
        total.backward()
    assert bounded >= 4
    for ours, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-3, atol=1e-6)


def test_the_loss_of_gspo_is_taken(model, tokenizer):
    """In a second update, where its clipping of whole responses shows: the loop's loss on both sides of it by hand."""
    settings = replace(SETTINGS, routes="own", algorithm="GSPO")
    with attach(model) as replay:
        conversations = own_conversations(model, replay, tokenizer, 8, 4)
        groups = [number // 4 for number in range(8)]
        (batch,) = microbatches(conversations, groups, model, replay, replace(settings, microbatch=8))
    old = batch.rollout
    shift = torch.linspace(-6e-4, 6e-4, 8)[:, None] * batch.responses.mask
    current = (old + shift).requires_grad_()
    updates = Updates(model, replay, optimizer_of(model), settings)
    loss, _ = updates._loss(replace(batch, old=old), current[..., None])
    loss.backward()
    # Within (1 - 3e-4, 1 + 4e-4) a response has its gradient, beyond it only where the advantage says so.
    ratio = shift.amin(1).where(shift.amin(1) < 0, shift.amax(1)).exp()
    there = ((ratio <= 1 + 4e-4) | (batch.advantages < 0)) & ((ratio >= 1 - 3e-4) | (batch.advantages > 0))
    assert 0 < int(there.sum()) < 8
    assert torch.equal(current.grad.abs().sum(1) > 0, there)
    per_token = -batch.advantages * ratio / batch.responses.mask.sum(1) / 8 * there
    torch.testing.assert_close(current.grad, per_token[:, None] * batch.responses.mask, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("correction", ["none", "TIS"])
def test_scores_are_centred_by_what_the_sampler_expects(model, tokenizer, correction):
    """Of every sampled token of two microbatches, summed over the vocabulary by hand."""
    settings = replace(SETTINGS, routes="own", correction=correction, score_centering=4)
    with attach(model) as replay:
        conversations = own_conversations(model, replay, tokenizer, 8, 4, top_k=4, noise=0.7)
        without = gradients(model, replay, conversations, replace(settings, score_centering=0))
        model.zero_grad()
        centred = gradients(model, replay, conversations, settings)
        model.zero_grad()
        total = torch.zeros(())
        for each in conversations:
            with replay.off():
                logprobs = forward_logits(model, torch.tensor([each.token_ids]))[0].log_softmax(-1)
            p = logprobs.detach().exp()
            # Every second of four responses is rewarded: advantages of +-sqrt(3) / 2.
            advantage = (1 if each.correct else -1) * 3**0.5 / 2
            places = [place for place, own in enumerate(each.sampled) if own]
            for place, pairs in zip(places, each.top_k, strict=True):
                row, ids = p[place - 1], torch.tensor([token for _, token in pairs])
                q = torch.tensor([logprob for logprob, _ in pairs]).exp()
                mu = (row * (1 - q.sum()) / (1 - row[ids].sum())).index_put((ids,), q)
                weight = (row / mu).clamp(max=2) if correction == "TIS" else torch.ones_like(row)
                total = total + advantage * (mu * weight * logprobs[place - 1]).sum() / len(places) / 8
        total.backward()
    moved = [ours - theirs for ours, theirs in zip(centred, without, strict=True)]
    for found, parameter in zip(moved, model.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-3, atol=1e-6)
    assert max(float(each.abs().max()) for each in moved) > 3e-4


def test_where_the_sampler_is_the_trainer_nothing_is_centred(model, tokenizer):
    with attach(model) as replay:
        conversations = own_conversations(model, replay, tokenizer, 8, 4, top_k=8)
        without = gradients(model, replay, conversations, SETTINGS)
        centred = gradients(model, replay, conversations, replace(SETTINGS, score_centering=8))
    for ours, theirs in zip(centred, without, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
