"""Truncated distributions, by hand and in the trainer's own cross entropy."""

from __future__ import annotations

import math

import pytest
import torch

from router_replay.errors import InputError
from router_replay.mismatch import apply_sampling_mask, kept_token_ids

PROBS = torch.tensor([0.1, 0.4, 0.2, 0.3])
LOGITS = PROBS.log()


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [1, 3, 2, 0]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 9}, [1, 3, 2, 0]),
        ({"top_p": 0.3}, [1]),
        ({"top_p": 0.5}, [1, 3]),
        ({"top_p": 0.75}, [1, 3, 2]),
        # Of the three that are left, 0.4 / 0.9 reaches 0.44.
        ({"top_k": 3, "top_p": 0.43}, [1]),
        ({"top_k": 3, "top_p": 0.45}, [1, 3]),
    ],
)
def test_top_k_and_top_p_keep_what_a_sampler_keeps(settings, kept):
    assert kept_token_ids(LOGITS[None], **settings).tolist() == [kept]


def test_rows_of_different_lengths_are_filled_up():
    even = torch.zeros(4)
    assert kept_token_ids(torch.stack([LOGITS, even]), top_p=0.5).tolist() == [[1, 3], [0, 1]]
    assert kept_token_ids(torch.stack([LOGITS, even]), top_p=0.4 - 1e-6).tolist() == [[1, -1], [0, 1]]


def test_log_probabilities_are_those_of_the_truncated_distribution():
    logits = LOGITS[None].clone().requires_grad_()
    kept = kept_token_ids(logits, top_k=2)
    log_probs = apply_sampling_mask(logits, kept, torch.tensor([3])).log_softmax(-1)
    assert log_probs.tolist() == [pytest.approx([-math.inf, math.log(4 / 7), -math.inf, math.log(3 / 7)], rel=1e-6)]
    log_probs[0, 3].backward()
    # d log p_3 / d z_j = delta_3j - p_j over the kept, nothing for the others.
    assert logits.grad.tolist() == [pytest.approx([0, -4 / 7, 0, 4 / 7], rel=1e-6)]


def test_a_row_of_no_ids_was_not_truncated():
    logits = torch.randn(2, 3, 5)
    kept = torch.full((2, 3, 2), -1)
    assert torch.equal(apply_sampling_mask(logits, kept), logits)


def test_shards_of_the_vocabulary_are_masked_alike():
    torch.manual_seed(0)
    logits = torch.randn(6, 10)
    kept = kept_token_ids(logits, top_p=0.7)
    kept[2] = -1
    halves = [apply_sampling_mask(logits[:, at : at + 5], kept, vocab_start=at, vocab_size=10) for at in (0, 5)]
    assert torch.equal(torch.cat(halves, -1), apply_sampling_mask(logits, kept))


def test_a_sampled_token_that_was_cut_off_is_refused():
    kept = torch.tensor([[1, 3], [1, -1]])
    with pytest.raises(InputError, match=r"the first is token 2 at \[1\]"):
        apply_sampling_mask(LOGITS.expand(2, 4), kept, torch.tensor([3, 2]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 4), torch.zeros(3, 1).long()), r"kept ids \[3, 1\] must be \[2\]"),
        ((torch.zeros(2, 4), torch.zeros(2, 1).long(), torch.zeros(3).long()), r"sampled ids \[3\] must be \[2\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        apply_sampling_mask(*arguments)


@pytest.mark.parametrize("settings", [{"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InputError, match="top_k must be at least 1"):
        kept_token_ids(LOGITS[None], **settings)


def test_nothing_is_cut_off_a_long_tail_where_nothing_is_truncated():
    """Float32 sums of 150,000 probabilities reach 1 before the last of them."""
    logits = 3 * torch.randn(1, 151936, generator=torch.Generator().manual_seed(0))
    for settings in ({}, {"top_p": 1.0}, {"top_k": 200_000}):
        assert kept_token_ids(logits, **settings).shape == logits.shape
    probs = logits.double().softmax(-1).sort(descending=True).values[0]
    kept = int((kept_token_ids(logits, top_p=0.9999) >= 0).sum())
    assert probs[: kept - 1].sum() < 0.9999 <= probs[:kept].sum()


def test_an_id_that_is_in_no_shard_is_refused():
    with pytest.raises(InputError, match=r"kept ids must be in \[0, 4\), or -1, and go from 7 to 7"):
        apply_sampling_mask(torch.zeros(1, 4), torch.tensor([[7]]))
    with pytest.raises(InputError, match=r"\[0, 8\)"):
        apply_sampling_mask(torch.zeros(1, 4), torch.tensor([[8]]), vocab_start=4, vocab_size=8)
