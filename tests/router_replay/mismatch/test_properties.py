"""What holds for every function: layout, order and padding do not matter, and nothing is ever NaN or infinite."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from router_replay.errors import InputError
from router_replay.mismatch import Responses
from tests.router_replay.mismatch.batches import PER_SEQUENCE, PER_TOKEN, SCALARS, Batch, pack, padded_batch, permute

# Sums of the same float64 numbers in another order, of at most some hundred terms of like size.
SAME = {"rel": 1e-10, "abs": 1e-10}


@st.composite
def shapes(draw: st.DrawFn) -> tuple[list[int], torch.Tensor, torch.Tensor, int]:
    """Lengths of sequences, a response mask within them, group ids, a seed."""
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=7))
    width = max(lengths) + draw(st.integers(0, 2))
    bits = draw(st.lists(st.booleans(), min_size=len(lengths) * width, max_size=len(lengths) * width))
    mask = torch.tensor(bits, dtype=torch.bool).reshape(len(lengths), width)
    mask &= torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    groups = torch.tensor(draw(st.lists(st.integers(-3, 2), min_size=len(lengths), max_size=len(lengths))))
    return lengths, mask, groups, draw(st.integers(0, 2**16))


def _scalars(batch: Batch, name: str) -> dict[str, float]:
    """The figures, or that a batch of nothing has none."""
    try:
        return SCALARS[name](batch)
    except InputError:
        return {"refused": 1.0}


@settings(deadline=None, max_examples=60)
@given(shapes())
def test_packed_equals_padded(shape):
    lengths, mask, groups, seed = shape
    # See the next test.
    assume(sum(lengths) != len(lengths) or set(lengths) == {1})
    padded = padded_batch(mask, groups, seed=seed)
    packed = pack(padded, lengths, groups)
    there = torch.arange(mask.shape[1])[None] < torch.tensor(lengths)[:, None]
    for name, function in PER_TOKEN.items():
        torch.testing.assert_close(
            function(packed),
            function(padded)[there],
            rtol=1e-10,
            atol=1e-10,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    for name, function in PER_SEQUENCE.items():
        torch.testing.assert_close(function(packed), function(padded), msg=lambda text, name=name: f"{name}: {text}")
    for name in SCALARS:
        assert _scalars(packed, name) == pytest.approx(_scalars(padded, name), **SAME), name


def test_as_many_packed_tokens_as_sequences_are_told_apart_or_refused():
    """A list of two numbers is one for each token or one for each sequence: here they differ."""
    groups = torch.tensor([0, 0])
    packed = pack(padded_batch(torch.tensor([[1, 1], [0, 0]]), groups), [2, 0], groups)
    for name in ("off-policy sequences", "optimal token baseline", "doubly robust", "gradient of grpo"):
        with pytest.raises(InputError, match="for each of 2 packed tokens: pad the batch"):
            PER_TOKEN[name](packed)


@settings(deadline=None, max_examples=60)
@given(shapes(), st.randoms(use_true_random=False))
def test_another_order_of_sequences_changes_nothing(shape, random):
    _, mask, groups, seed = shape
    order = list(range(len(mask)))
    random.shuffle(order)
    batch = padded_batch(mask, groups, seed=seed)
    moved = permute(batch, torch.tensor(order), groups)
    for name, function in (PER_TOKEN | PER_SEQUENCE).items():
        # A chain takes its proposals in their order: another order is another chain, see below.
        if name != "metropolis":
            torch.testing.assert_close(
                function(moved),
                function(batch)[order],
                rtol=1e-10,
                atol=1e-10,
                msg=lambda text, name=name: f"{name}: {text}",
            )
    for name in SCALARS:
        assert _scalars(moved, name) == pytest.approx(_scalars(batch, name), **SAME), name


@settings(deadline=None, max_examples=40)
@given(shapes(), st.randoms(use_true_random=False))
def test_a_chain_sees_its_own_group_only(shape, random):
    """Groups may be interleaved in any way, as long as each keeps its order."""
    _, mask, groups, seed = shape
    keys = {int(group): random.random() for group in groups.unique()}
    order = sorted(range(len(mask)), key=lambda sequence: keys[int(groups[sequence])])
    batch = padded_batch(mask, groups, seed=seed)
    moved = permute(batch, torch.tensor(order), groups)
    torch.testing.assert_close(PER_TOKEN["metropolis"](moved), PER_TOKEN["metropolis"](batch)[order], rtol=0, atol=0)


@settings(deadline=None, max_examples=40)
@given(shapes(), st.sampled_from([1.5, -1e30, -math.inf, math.inf, math.nan]))
def test_what_masked_tokens_hold_changes_nothing(shape, constant):
    _, mask, groups, seed = shape
    batch = padded_batch(mask, groups, seed=seed)
    filled = {name: torch.where(mask, tensor, tensor + constant) for name, tensor in batch.tokens.items()}
    other = replace(batch, **filled)
    for name, function in PER_TOKEN.items():
        # Nothing of it is even rounded.
        torch.testing.assert_close(
            function(other), function(batch), rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
    for name in SCALARS:
        assert _scalars(other, name) == _scalars(batch, name), name


EXTREME = [-1e-30, -1.0, -69.0, -100.0, -1e4, -1e30, -math.inf]


@settings(deadline=None, max_examples=150)
@given(
    shapes(),
    st.lists(st.sampled_from(EXTREME), min_size=3, max_size=30),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_extremes_give_finite_results_or_a_typed_error(shape, values, dtype):
    """Ratios of exp(+-1e30), probability 0, responses of one token or none, in any float dtype."""
    _, mask, groups, seed = shape
    batch = padded_batch(mask, groups, seed=seed, dtype=dtype)
    cycle = torch.tensor(values, dtype=torch.float64).repeat(3 * mask.numel() // len(values) + 1)[: 3 * mask.numel()]
    trainer, rollout, current = cycle.reshape(3, *mask.shape).to(dtype)
    batch = replace(batch, trainer=trainer, rollout=rollout, current=current)
    for name, function in (PER_TOKEN | PER_SEQUENCE).items():
        try:
            found = function(batch)
        except InputError:
            continue
        # A token of probability 0 has this log-ratio; nothing else does.
        finite = found.isfinite() | ((found == -math.inf) if name.startswith("log ratio") else False)
        assert finite.all(), (name, found)
    for name in SCALARS:
        found = _scalars(batch, name)
        assert all(math.isfinite(value) for value in found.values()), (name, found)


def test_groups_of_tokens_and_sequences_are_where_they_belong():
    batch = padded_batch(torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]]), torch.tensor([7, 7, -2]))
    responses = batch.responses
    assert responses.lengths.tolist() == [2, 0, 3]
    values = torch.arange(9.0).reshape(3, 3)
    assert responses.sum(values).tolist() == [2, 0, 21]
    assert responses.mean(values).tolist() == [1, 0, 7]
    assert responses.max(values).tolist() == [2, -math.inf, 8]
    assert responses.expand(torch.tensor([1.0, 2.0, 3.0])).tolist() == [[1, 0, 1], [0, 0, 0], [3, 3, 3]]
    assert responses.keep(values > 6).lengths.tolist() == [0, 0, 2]
    assert responses.prompts.sum(torch.tensor([1.0, 2.0, 3.0])).tolist() == [3, 3]


@pytest.mark.parametrize(
    "ids", [["u1", "u1", "u2"], np.array(["u1", "u1", "u2"], dtype=object), (0.5, 0.5, 2), [3, 3, "3"]]
)
def test_groups_are_called_by_whatever_tells_prompts_apart(ids):
    assert Responses.padded(torch.ones(3, 1), ids).prompts.segment.tolist() == [0, 0, 1]


def test_what_compares_responses_to_one_prompt_asks_which_those_are():
    batch = padded_batch(torch.ones(3, 2), torch.zeros(3))
    unknown = replace(batch, responses=Responses.padded(torch.ones(3, 2)))
    names = ("SNIS, sequences of a group", "SNIS, tokens of a group", "metropolis", "optimal token baseline")
    for function in (*(PER_TOKEN[name] for name in names), PER_SEQUENCE["group-relative"]):
        with pytest.raises(InputError, match="give group_ids"):
            function(unknown)
    assert PER_TOKEN["SNIS, sequences of the batch"](unknown).sum() > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Responses.padded([[1]]), r"must be a tensor \[B, T\], got list"),
        (lambda: Responses.packed(torch.ones(2, 2), [0, 2]), r"must be a tensor \[N\], got \[2, 2\]"),
        (lambda: Responses.padded(torch.full((1, 1), 0.5)), "must be bool, or hold 0 and 1"),
        (lambda: Responses.packed(torch.ones(2), [0, 1]), "must rise from 0 to the mask's 2 tokens"),
        (lambda: Responses.packed(torch.ones(2), [0, 2, 1, 2]), "must rise from 0"),
        (lambda: Responses.padded(torch.ones(2, 1), [0]), "1 group ids are given for 2 sequences"),
        (lambda: Responses.padded(torch.ones(2, 1), [[0], [1]]), "one number or name for each"),
        (lambda: Responses.padded(torch.ones(1, 1)).require(values=[[1.0]]), "values must be a torch.Tensor, got list"),
        (
            lambda: Responses.padded(torch.ones(1, 1)).require(values=torch.ones(1, 1, device="meta")),
            "values is on meta, the response mask on cpu",
        ),
    ],
)
def test_what_is_no_batch_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_one_long_response_among_short_ones_costs_what_its_tokens_cost():
    """The rectangle of 4,001 sequences would have 131 million places."""
    lengths = [32768] + [1] * 4000
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    responses = Responses.packed(torch.ones(sum(lengths)), bounds, range(len(lengths)))
    values = torch.full((sum(lengths),), 0.1)
    with torch.profiler.profile(profile_memory=True) as profile:
        found = responses.sum(values), responses.max(values), responses.mean(values), responses.lengths
    assert found[0][0].item() == pytest.approx(3276.8, rel=1e-7) and found[3].tolist() == lengths
    assert sum(max(event.self_cpu_memory_usage, 0) for event in profile.events()) < 100 * sum(lengths)
