"""The trainer's part of the loop: what it is given decides what comes out, to the last bit."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cpu_engines.megatron import CpuDevice, single_process
from cpu_engines.megatron.logprobs import forward_logits, token_logprobs
from cpu_engines.megatron.qwen3_moe import hf_tensors, load_qwen3_moe
from examples.grpo import loop
from examples.grpo.loop import Updates
from examples.grpo.rollouts import _require_version
from examples.grpo.settings import Settings
from examples.grpo.state import RunFolder
from examples.grpo.weights import export
from examples.multi_turn_replay.rollout import RolloutError, top_k_of
from examples.small_model import CHECKPOINT
from megatron_router_replay import attach
from router_replay.errors import InputError
from router_replay.mismatch import group_relative_advantages, grpo_loss
from router_replay.mismatch.responses import Responses
from router_replay.run import Dynamics
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
        (batch,) = Updates(model, replay, optimizer_of(model), replace(settings, microbatch=8))._microbatches(
            conversations, [number // 4 for number in range(8)]
        )
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
        updates = Updates(model, replay, optimizer_of(model), settings)
        made = updates._microbatches(played[:7], [0] * 7)
        updates.step(1, played, lambda: None)
    assert seen == [2, 1, 2, 2]
    assert [(each.minibatch, each.denominator) for each in made] == [(0, 1.5), (0, 1.5), (1, 2.0), (1, 2.0)]


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


def test_the_most_probable_tokens_of_an_answer():
    """SGLang: for each sampled token a list of log-probability, id and text or None."""
    answer = {"output_top_logprobs": [[[-0.1, 7, None], [-3.0, 2, None]], [[-0.5, 2, "a"], [-1.0, 7, "b"]]]}
    assert top_k_of(answer, 2, 2) == [[(-0.1, 7), (-3.0, 2)], [(-0.5, 2), (-1.0, 7)]]
    assert top_k_of({}, 2, 0) == [[], []]
    with pytest.raises(RolloutError, match=r"3 most probable .* at each of 2 sampled ones, .* \[2, 2\] at 2"):
        top_k_of(answer, 2, 3)
    with pytest.raises(RolloutError, match=r"\[2, 0\] at 2"):
        top_k_of({"output_top_logprobs": [*answer["output_top_logprobs"][:1], None]}, 2, 2)


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


def test_masks_of_other_weights_than_the_server_was_given_are_refused(model, tokenizer):
    def of(*versions):
        runs = tuple(enumerate(versions))
        return [replace(each, masks=replace(each.masks, weight_versions=runs)) for each in played]

    with attach(model) as replay:
        played = own_conversations(model, replay, tokenizer, 4, 4)
    _require_version(of("run-1"), "run-1")
    for other in (of("run-0"), of("run-1", "run-0"), of(), [*of("run-1"), *of("run-2")]):
        with pytest.raises(RolloutError, match="the server was given the weights 'run-1', and the masks name"):
            _require_version(other, "run-1")


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


def test_groups_of_one_reward_are_counted_and_teach_nothing(model, tokenizer):
    with attach(model) as replay:
        played = own_conversations(model, replay, tokenizer, 8, 4)
        played = [replace(each, correct=number < 4) for number, each in enumerate(played)]
        figures, _ = Updates(model, replay, optimizer_of(model), SETTINGS).step(1, played, lambda: None)
    assert (figures["groups_of_one_reward"], figures["gradient_norm"], figures["reward"]) == (1.0, 0.0, 0.5)


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


def test_the_entropy_is_that_of_the_distributions_that_were_sampled_from(model, tokenizer):
    with attach(model) as replay:
        played = own_conversations(model, replay, tokenizer, 8, 4)
        settings = replace(SETTINGS, routes="own", correction="TIS")
        with torch.no_grad(), replay.off():
            logits = [forward_logits(model, torch.tensor([each.token_ids]))[0] for each in played]
        figures, step = Updates(model, replay, optimizer_of(model), settings).step(1, played, lambda: None)
    entropies = [
        torch.distributions.Categorical(logits=of_each[:-1]).entropy()[torch.tensor(each.sampled[1:])]
        for of_each, each in zip(logits, played, strict=True)
    ]
    assert figures["entropy"] == pytest.approx(float(torch.cat(entropies).mean()), rel=1e-5)
    lengths = [len(each) for each in entropies]
    assert step.dynamics == Dynamics(
        num_responses=8,
        reward=0.5,
        response_length=sum(lengths) / 8,
        longest_response=max(lengths),
        cut_off=0.0,
        dropped_responses=0,
        dropped_groups=0,
        num_tokens=sum(lengths),
        entropy=figures["entropy"],
        clipped=figures["loss/clipped_low"] + figures["loss/clipped_high"],
        dropped=0.0,
        effective_share=figures["loss/weight_ess"],
        route_drift=0.0,
        route_overlap=1.0,
        gradient_norm=figures["gradient_norm"],
    )
    assert figures["loss/weight_ess"] > 0.9
    assert list(step.weights) == ["TIS"] and len(step.weights["TIS"]) == len(step.responses.mask)


def test_routes_drift_with_the_weights(model, tokenizer):
    settings = replace(SETTINGS, minibatches=2, learning_rate=1e-2)
    with attach(model, overlap_every=1) as replay:
        played = own_conversations(model, replay, tokenizer, 8, 4)
        before = copy.deepcopy(model.state_dict())
        found = {}
        for routes in ("own", "R2", "R3"):
            model.load_state_dict(before)
            updates = Updates(model, replay, optimizer_of(model), replace(settings, routes=routes))
            found[routes] = updates.step(1, played, lambda: None)[0]
    # The first of two minibatches is trained by the weights of the scoring pass, the second by others.
    assert 0 < found["own"]["route_drift"] < 0.5
    assert 0.5 < found["own"]["route_overlap"] < 1
    # Under recorded routes those that the trainer would take by itself are not known.
    assert not {"route_drift", "route_overlap"} & (found["R2"].keys() | found["R3"].keys())


def test_figures_that_are_not_finite_are_json(model, tmp_path: Path):
    run = RunFolder(tmp_path)
    run.save(1, model, optimizer_of(model), {"gradient_norm": float("inf"), "seconds": {"update": float("nan")}})
    run.save(2, model, optimizer_of(model), {"gradient_norm": 1.0})
    lines = [
        json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "figures.jsonl").read_text().splitlines()
    ]
    assert lines == [
        {"step": 1, "gradient_norm": "inf", "seconds": {"update": "nan"}},
        {"step": 2, "gradient_norm": 1.0},
    ]


def test_an_export_is_the_model(model, tmp_path: Path):
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)), alpha=0.1)
    export(model, CHECKPOINT, tmp_path / "weights", dict)
    export(model, CHECKPOINT, tmp_path / "weights", dict)
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
