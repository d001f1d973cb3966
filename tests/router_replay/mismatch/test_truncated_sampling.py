"""Truncated distributions, by hand and in the trainer's own cross entropy."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from router_replay.errors import InputError
from router_replay.mismatch import apply_sampling_mask, kept_token_ids
from router_replay.mismatch.corrections import truncated_sampling as subject

PROBS = torch.tensor([0.1, 0.4, 0.2, 0.3])
LOGITS = PROBS.log()


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.3}, [1]),
        ({"top_p": 0.5}, [1, 3]),
        ({"top_p": 0.75}, [1, 2, 3]),
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


def _by_sorting_everything(logits: torch.Tensor, top_k: int | None, top_p: float | None) -> torch.Tensor:
    ordered, ids = torch.sort(logits.double(), descending=True, stable=True, dim=-1)
    width = min(top_k or logits.shape[-1], logits.shape[-1])
    ordered, ids = ordered[..., :width], ids[..., :width]
    kept = ordered > -torch.inf
    if top_p is not None and top_p < 1:
        probs = ordered.softmax(-1)
        kept &= probs.cumsum(-1) - probs < top_p
    rising = ids.masked_fill(~kept, logits.shape[-1]).sort(-1).values[..., : max(int(kept.sum(-1).max()), 1)]
    return rising.masked_fill(rising == logits.shape[-1], -1)


@hypothesis_settings(deadline=None, max_examples=100)
@given(
    st.integers(1, 40),
    st.integers(0, 2**16),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.sampled_from([0.0, 0.3, 3.0]),
    st.sampled_from([None, 1, 2, 3, 7, 16, 40]),
    # None that a sum of a few equal probabilities is, so that rounding decides nothing.
    st.sampled_from([None, 1.0, 0.0837, 0.317, 0.731, 0.9713, 0.99937]),
    st.integers(1, 6),
    st.integers(1, 4),
    st.sampled_from([0.4, 64.0]),
)
def test_what_histograms_keep_is_what_sorting_everything_keeps(
    vocab, seed, dtype, spread, top_k, top_p, head, bits, reach
):
    """Values on a coarse grid, with both zeros and -inf among them; histograms of few bins, of a part of the range."""
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(5, vocab, generator=generator)).mul(2).round() / 2
    logits[torch.rand(5, vocab, generator=generator) < 0.1] = -math.inf
    logits[torch.rand(5, vocab, generator=generator) < 0.1] = -0.0
    logits[torch.rand(5, vocab, generator=generator) < 0.1] = 0.0
    logits = logits.to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject, "_HEAD", head)
        patch.setattr(subject, "_BITS", bits)
        patch.setattr(subject, "_REACH", reach)
        patch.setattr(subject, "_PLACES", 90)
        found = kept_token_ids(logits, top_k=top_k, top_p=top_p)
    expected = _by_sorting_everything(logits, top_k, top_p)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("settings", [{"top_p": 0.7}, {"top_k": 700}, {"top_k": 3000, "top_p": 0.4}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("spread", [1e-6, 1.0, 30.0])
def test_large_vocabularies_keep_what_sorting_everything_keeps(settings, dtype, spread):
    logits = (spread * torch.randn(3, 20_011, generator=torch.Generator().manual_seed(1))).to(dtype)
    expected, before = _by_sorting_everything(logits, settings.get("top_k"), settings.get("top_p")), logits.clone()
    assert kept_token_ids(logits, **settings).equal(expected) and logits.equal(before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_of_no_distribution_are_refused(bad):
    logits = LOGITS.clone()
    logits[2] = bad
    with pytest.raises(InputError, match=r"NaN or \+inf"):
        kept_token_ids(logits[None], top_p=0.5)


def test_a_row_that_excludes_everything_keeps_nothing():
    logits = torch.stack([LOGITS, torch.full((4,), -math.inf)])
    for settings in ({}, {"top_k": 2}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.5}):
        assert kept_token_ids(logits, **settings)[1].tolist() == [-1] * kept_token_ids(LOGITS, **settings).numel()


def test_what_has_no_probability_is_not_kept_where_rounding_leaves_room_for_it():
    """Sums in two orders differ by some eps, and top_p is one below 1."""
    logits = 30 * torch.randn(64, 700, generator=torch.Generator().manual_seed(2))
    logits[:, ::7] = -math.inf
    kept = kept_token_ids(logits, top_p=math.nextafter(1, 0))
    assert not (kept[kept >= 0] % 7 == 0).any()


def test_rows_without_any_are_none():
    assert kept_token_ids(torch.zeros(0, 7), top_p=0.9).tolist() == []
    assert kept_token_ids(torch.zeros(2, 0, 7)).shape[:2] == (2, 0)
    assert kept_token_ids(torch.zeros(3), top_k=2).tolist() == [0, 1]
