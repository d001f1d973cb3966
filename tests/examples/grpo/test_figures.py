"""What a step says of itself."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cpu_engines.megatron.logprobs import forward_logits
from examples.grpo.loop import Updates
from examples.grpo.state import RunFolder
from megatron_router_replay import attach
from router_replay.run import Dynamics
from tests.examples.grpo.conversations import own_conversations
from tests.examples.grpo.updates import SETTINGS, optimizer_of


def test_groups_of_one_reward_are_counted_and_teach_nothing(model, tokenizer):
    with attach(model) as replay:
        played = own_conversations(model, replay, tokenizer, 8, 4)
        played = [replace(each, correct=number < 4) for number, each in enumerate(played)]
        figures, _ = Updates(model, replay, optimizer_of(model), SETTINGS).step(1, played, lambda: None)
    assert (figures["groups_of_one_reward"], figures["gradient_norm"], figures["reward"]) == (1.0, 0.0, 0.5)


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
