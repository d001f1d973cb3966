"""Two gloo ranks that hold parts of every sequence, against one that holds them whole, for every function."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from router_replay import mismatch
from router_replay.errors import InputError
from router_replay.mismatch import Responses
from tests.router_replay.mismatch.batches import PER_SEQUENCE, PER_TOKEN, SCALARS, Batch, gradient_of, padded_batch
from tests.router_replay.mismatch.pairs import log_ratios
from tests.router_replay.mismatch.spawned import on_ranks

LENGTHS = [8, 3, 0, 16, 1, 5, 9]
GROUPS = [0, 1, 0, 1, 2, 0, 2]
WIDTH = 16


VARIANTS = ("a rank without tokens", "bfloat16", "a token of probability 0")
"""What else a batch may be, for the packed layout."""


def _owners(variant: str | None = None) -> Tensor:
    """The rank that holds each token, padded `[7, 16]`: zigzag quarters, halves, all on one, every other token."""
    at = torch.arange(WIDTH)
    owners = torch.stack([(at * 4 // max(length, 1)).clamp(max=3) % 3 > 0 for length in LENGTHS]).long()
    owners[1] = 1
    owners[5] = at % 2
    owners[6] = (at >= 4).long()
    return owners * (variant != "a rank without tokens")


def _whole(variant: str | None = None) -> Batch:
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(len(LENGTHS), WIDTH, generator=generator) < 0.75
    mask &= torch.arange(WIDTH)[None] < torch.tensor(LENGTHS)[:, None]
    mask[4, 0] = True
    dtype = torch.bfloat16 if variant == "bfloat16" else torch.float64
    batch = padded_batch(mask, torch.tensor(GROUPS), seed=4, dtype=dtype)
    if variant == "a token of probability 0":
        batch.trainer[3, int(mask[3].nonzero()[4])] = -torch.inf
    return batch


def _part(rank: int, variant: str | None = None) -> Batch:
    """Packed, with a prompt's tokens where they are."""
    whole, there = _whole(variant), torch.arange(WIDTH)[None] < torch.tensor(LENGTHS)[:, None]
    mine = there & (_owners(variant) == rank)
    bounds = torch.nn.functional.pad(mine.sum(-1).cumsum(0), (1, 0))
    positions = torch.arange(WIDTH).expand_as(mine)[mine]
    # What is no response token may be said to be anywhere.
    positions = positions.masked_fill(~whole.responses.mask[mine], 3)
    responses = Responses.packed(
        whole.responses.mask[mine], bounds, GROUPS, context_group=dist.group.WORLD, positions=positions
    )
    return replace(whole, responses=responses, **{name: tensor[mine] for name, tensor in whole.tokens.items()})


def _padded_part(rank: int) -> Batch:
    """The first half of the columns, or the second."""
    whole, columns = _whole(), slice(rank * WIDTH // 2, (rank + 1) * WIDTH // 2)
    mask = whole.responses.mask[:, columns]
    positions = torch.arange(WIDTH)[columns].expand_as(mask)
    responses = Responses.padded(mask, GROUPS, context_group=dist.group.WORLD, positions=positions)
    return replace(whole, responses=responses, **{name: tensor[:, columns] for name, tensor in whole.tokens.items()})


def _expanded(batch: Batch, current: Tensor) -> Tensor:
    """A loss of one's own, in which gradients go through a sequence's value to its tokens, and on."""
    responses = batch.responses
    log_ratio = mismatch.log_ratio(current=current, old=batch.trainer, responses=responses)
    per_token = responses.expand(responses.mean(log_ratio)).exp() * log_ratio.sin()
    return mismatch.aggregate(per_token, responses, "token-mean")


def _metropolis_of_tokens(batch: Batch) -> Tensor:
    # Numbers that belong to tokens, wherever they are.
    uniforms = batch.values.double().sin().abs() * 0.999
    ratios = log_ratios(batch.trainer, batch.rollout, batch.responses)
    return mismatch.metropolis_chain(ratios, level="token", uniforms=uniforms).multiplicity


def _metrics(name: str) -> Callable[[Batch], dict[str, float]]:
    def metrics(batch: Batch) -> dict[str, float]:
        ratios = log_ratios(batch.trainer, batch.rollout, batch.responses)
        given = {"current": batch.current, "advantages": batch.rewards}
        weights = mismatch.truncated_importance_weights(ratios) * mismatch.catastrophic_token_veto(
            ratios, threshold=0.3
        )
        if name == "decoupled":
            return mismatch.decoupled_loss(ratios, **given, weights=weights)[1].flat()
        loss = {"grpo": mismatch.grpo_loss, "gspo": mismatch.gspo_loss}[name]
        return loss(**given, old=batch.trainer, responses=batch.responses, weights=weights)[1].flat()

    return metrics


TOKENS = PER_TOKEN | {
    "gradient through a sequence's value": gradient_of(_expanded),
    "metropolis, tokens": _metropolis_of_tokens,
    "rewards of tokens": lambda batch: mismatch.optimal_token_baseline_advantages(
        batch.values, batch.trainer, (batch.trainer.exp() + 1) / 2, batch.responses
    ),
}
FIGURES = SCALARS | {f"metrics of {name}": _metrics(name) for name in ("grpo", "gspo", "decoupled")}
SEQUENCES = PER_SEQUENCE | {
    "lengths": lambda batch: batch.responses.lengths.double(),
    "maxima": lambda batch: batch.responses.max(batch.values),
    "log-ratios": lambda batch: log_ratios(batch.trainer, batch.rollout, batch.responses).sequence,
    "geometric": lambda batch: log_ratios(batch.trainer, batch.rollout, batch.responses).geometric,
}


def _results(batch: Batch, variant: str | None = None) -> dict[str, dict[str, Any]]:
    """Of every function; losses have no ratio over a token of probability 0."""

    def of(functions: dict[str, Callable[[Batch], Any]]) -> dict[str, Any]:
        without = ("grpo", "gspo", "decoupled", "gradient") if variant == "a token of probability 0" else ()
        return {name: call(batch) for name, call in functions.items() if not any(each in name for each in without)}

    return {"tokens": of(TOKENS), "sequences": of(SEQUENCES), "figures": of(FIGURES)}


LONG = 40


def _chain(places: Tensor, seed: int, group: dist.ProcessGroup | None) -> Tensor:
    """Of one response's tokens, with numbers that are drawn."""
    noise = torch.randn(2, LONG, generator=torch.Generator().manual_seed(9))[:, places]
    responses = Responses.packed(torch.ones(len(places)), [0, len(places)], [0], context_group=group, positions=places)
    ratios = log_ratios(-3 - noise[0].abs(), -3 - noise[1].abs(), responses)
    generator = torch.Generator().manual_seed(seed)
    return mismatch.metropolis_chain(ratios, level="token", generator=generator).multiplicity


def _above_by_rounding(rank: int) -> tuple[int, bool]:
    """One rank's tokens have logarithms that are all above 0, the other's have not."""
    logprobs = torch.tensor([[0.12, 0.2]] if rank else [[-1.0, -2.0]])
    responses = Responses.padded(torch.ones(1, 2), context_group=dist.group.WORLD)
    log_ratios(logprobs, logprobs, responses)
    given = {"trainer": logprobs, "rollout": logprobs, "responses": responses}
    loss, _ = mismatch.grpo_loss(current=logprobs, old=logprobs, advantages=torch.ones(1), responses=responses)
    return int(mismatch.LogRatios.of(**given, bad_responses="drop").dropped), bool(loss.isfinite())


def _nan_on_the_second(rank: int) -> dict[str, list[bool]]:
    """Whether losses and all of this rank's gradients are NaN."""
    part, found = _part(rank), {}
    for name, loss in {"grpo": mismatch.grpo_loss, "gspo": mismatch.gspo_loss}.items():
        current = part.current.clone()
        current[part.responses.mask.nonzero()[0]] = torch.nan if rank else -1.0
        current.requires_grad_()
        value, metrics = loss(current=current, old=part.trainer, advantages=part.rewards, responses=part.responses)
        value.backward()
        assert current.grad is not None
        good = part.responses.mask & ~current.detach().isnan()
        refused = metrics.refused_tokens.item() == 1
        found[name] = [bool(value.isnan()), bool(current.grad[good].isnan().all()), refused]
    return found


def _rank(rank: int) -> dict[str, Any]:
    return {
        "layouts": [_results(_part(rank)), _results(_padded_part(rank))],
        "variants": {variant: _results(_part(rank, variant), variant) for variant in VARIANTS},
        "chain": _chain(torch.arange(rank, LONG, 2), rank, dist.group.WORLD),
        "above by rounding": _above_by_rounding(rank),
        "NaN": _nan_on_the_second(rank),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(2, _rank, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def one() -> dict[str, dict[str, Any]]:
    return _results(_whole())


LAYOUTS = pytest.mark.parametrize("layout", [0, 1], ids=["packed", "padded"])


@LAYOUTS
@pytest.mark.parametrize("name", TOKENS)
def test_tokens_have_what_they_have_on_one_rank(name, layout, ranks, one):
    there = torch.arange(WIDTH)[None] < torch.tensor(LENGTHS)[:, None]
    expected = one["tokens"][name]
    for rank, results in enumerate(ranks):
        mine = there & (_owners() == rank)
        columns = slice(rank * WIDTH // 2, (rank + 1) * WIDTH // 2)
        wanted = expected[:, columns] if layout else expected[mine]
        # Sums of the same float64 numbers, some tens of size 1, in another order.
        torch.testing.assert_close(results["layouts"][layout]["tokens"][name], wanted, rtol=1e-12, atol=1e-13)


@LAYOUTS
@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences_have_the_same_on_both(name, layout, ranks, one):
    first, second = (results["layouts"][layout]["sequences"][name] for results in ranks)
    assert first.equal(second)
    torch.testing.assert_close(first, one["sequences"][name], rtol=1e-12, atol=1e-13)


@LAYOUTS
@pytest.mark.parametrize("name", FIGURES)
def test_losses_metrics_and_figures_are_those_of_whole_sequences(name, layout, ranks, one):
    first, second = (results["layouts"][layout]["figures"][name] for results in ranks)
    assert first == second == pytest.approx(one["figures"][name], rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_batches_have_what_they_have_on_one_rank_as_well(variant, ranks):
    there = torch.arange(WIDTH)[None] < torch.tensor(LENGTHS)[:, None]
    one = _results(_whole(variant), variant)
    # Numbers that are rounded to float32 at the end, and gradients to bfloat16.
    close = {"rtol": 1e-2, "atol": 1e-5} if variant == "bfloat16" else {"rtol": 1e-12, "atol": 1e-13}
    for rank, results in enumerate(each["variants"][variant] for each in ranks):
        mine = there & (_owners(variant) == rank)
        assert bool(mine.any()) == (rank == 0 or variant != "a rank without tokens")
        for name, found in results["tokens"].items():
            torch.testing.assert_close(found, one["tokens"][name][mine], **close, msg=name)
        for name, found in results["sequences"].items():
            torch.testing.assert_close(found, one["sequences"][name], **close, msg=name)
        for name, found in results["figures"].items():
            assert found == pytest.approx(one["figures"][name], rel=close["rtol"], abs=close["atol"]), name


def test_a_chain_of_tokens_has_one_number_for_each_whatever_ranks_would_draw(ranks):
    expected = _chain(torch.arange(LONG), 0, None)
    assert 3 < int((expected > 0).sum()) < LONG - 3
    for rank, results in enumerate(ranks):
        assert results["chain"].equal(expected[rank::2])


def test_a_part_whose_logarithms_are_above_0_by_rounding_is_no_part_of_probabilities(ranks):
    assert [results["above by rounding"] for results in ranks] == [(0, True), (0, True)]


def test_a_bad_token_on_one_rank_makes_the_gradients_of_all_nan(ranks):
    for results in ranks:
        assert results["NaN"] == {"grpo": [True, True, True], "gspo": [True, True, True]}


def test_every_function_of_the_package_is_among_them():
    """Those that take no tokens of sequences are not."""
    called = set()
    sys.setprofile(lambda frame, event, argument: called.add(frame.f_code))
    try:
        _results(_whole())
    finally:
        sys.setprofile(None)
    functions = {name: getattr(mismatch, name) for name in mismatch.__all__ if name[0].islower()}
    left_out = {name for name, function in functions.items() if function.__code__ not in called}
    assert left_out == {"apply_sampling_mask", "filter_responses", "kept_token_ids", "logprobs_at"}


ZIGZAG = torch.tensor([0, 1, 6, 7, 0, 1, 6, 7])


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (ZIGZAG, "sequence 0 has response tokens at positions that are not consecutive.*2 of 2 sequences are parts"),
        (torch.arange(4).repeat(2) + torch.tensor([0] * 4 + [4] * 4), "sequence 1 has response tokens.*1 of 2"),
        (torch.arange(7), r"positions \[7\] and the response mask \[8\] must have one shape"),
        (torch.arange(8.0), "positions must be integers"),
    ],
)
def test_parts_without_a_group_are_noticed_by_their_positions(positions, message):
    with pytest.raises(InputError, match=message):
        Responses.packed(torch.ones(8), [0, 4, 8], positions=positions)


def test_whole_sequences_may_have_positions_and_padding_any():
    whole = Responses.packed(torch.tensor([0, 1, 1, 1, 1]), [0, 3, 5], positions=torch.tensor([9, 1, 2, 0, 1]))
    assert whole.lengths.tolist() == [2, 2]
    left = torch.tensor([[-1, -1, 0, 1], [0, 1, 2, 3]])
    assert Responses.padded(left >= 0, positions=left).lengths.tolist() == [2, 4]


def test_bounds_of_whole_sequences_for_a_part_of_their_tokens_say_so():
    with pytest.raises(InputError, match=r"2 times as many tokens.*context_group"):
        Responses.packed(torch.ones(8), [0, 4, 16])
