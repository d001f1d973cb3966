"""The demo's passes in a model of Hugging Face, with a rollout by the same weights in bfloat16 in place of a server."""

from __future__ import annotations

import pytest
import torch

from examples.multi_turn_replay.hf_scores import score, trainer
from examples.multi_turn_replay.replay_report import compare
from examples.multi_turn_replay.rollout import Conversation
from hf_router_replay import BatchLayout, attach, join_parts


@pytest.fixture(scope="module")
def conversations(small_model):
    """Prompts of random tokens, eight further tokens of which are said to be sampled."""
    found = []
    with trainer(small_model, torch.bfloat16) as model, attach(model) as replay, torch.no_grad():
        for seed in range(6):
            ids = torch.randint(3, model.config.vocab_size, (1, 40), generator=torch.Generator().manual_seed(seed))
            with replay.record(BatchLayout.padded(ids, [40])) as recorded:
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            (masks,) = join_parts([recorded.part()])
            logprobs = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            found.append(
                Conversation(
                    token_ids=ids[0].tolist(),
                    sampled=[False] + [True] * 39,
                    rollout_logprobs=[0.0, *logprobs.tolist()],
                    masks=masks.cut(39, ids[0]),
                    num_turns=1,
                    correct=True,
                    prefix_cached_tokens=0,
                    masks_bytes=0,
                    cut_off=False,
                    bad_calls=0,
                )
            )
    return found


def test_replay_leaves_less_of_the_mismatch(small_model, conversations):
    with trainer(small_model, torch.float32) as model:
        scores = score(model, conversations, batch_size=4)
    found = compare(conversations, scores.native_logprobs, scores.replay_logprobs, scores.native_routes)
    assert 0.001 < found.routes.differing_routes < 0.2
    assert 0 < found.replay.k3 < found.native.k3
