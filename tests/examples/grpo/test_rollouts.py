"""What the loop asks of a rollout's answers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from examples.grpo.rollouts import _require_version
from examples.multi_turn_replay.rollout import RolloutError, top_k_of
from megatron_router_replay import attach
from tests.examples.grpo.conversations import own_conversations


def test_the_most_probable_tokens_of_an_answer():
    """SGLang: for each sampled token a list of log-probability, id and text or None."""
    answer = {"output_top_logprobs": [[[-0.1, 7, None], [-3.0, 2, None]], [[-0.5, 2, "a"], [-1.0, 7, "b"]]]}
    assert top_k_of(answer, 2, 2) == [[(-0.1, 7), (-3.0, 2)], [(-0.5, 2), (-1.0, 7)]]
    assert top_k_of({}, 2, 0) == [[], []]
    with pytest.raises(RolloutError, match=r"3 most probable .* at each of 2 sampled ones, .* \[2, 2\] at 2"):
        top_k_of(answer, 2, 3)
    with pytest.raises(RolloutError, match=r"\[2, 0\] at 2"):
        top_k_of({"output_top_logprobs": [*answer["output_top_logprobs"][:1], None]}, 2, 2)


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
