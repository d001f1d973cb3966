"""Log-probabilities of chosen tokens against torch's log-softmax, and what they hold in memory."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from router_replay.errors import InputError
from router_replay.mismatch import logprobs_at
from tests.no_waiting import RefuseWaiting
from tests.router_replay.mismatch.spawned import on_ranks

VOCABULARY = 11


def _given(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `[3, 4, V]` and five ids at each place, some of them -1 and some twice."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 4, VOCABULARY, generator=generator, dtype=torch.float64)
    ids = torch.randint(-1, VOCABULARY, (3, 4, 5), generator=generator)
    return logits.to(dtype), ids


def _reference(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.log_softmax(-1).gather(-1, ids.clamp(min=0)).masked_fill(ids == -1, 0)


def _slope(of: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The gradient of a sum with different factors for each entry."""
    factors = torch.arange(of.numel(), dtype=of.dtype).view(of.shape).sin()
    return torch.autograd.grad((factors * of).sum(), logits)[0]


@pytest.mark.parametrize("chunk_tokens", [1, 5, 1024])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_values_and_gradients_are_those_of_the_log_softmax(dtype, near, chunk_tokens):
    """A bfloat16 gradient is rounded once, to 8 bits, from some 5 terms below 1."""
    logits, ids = _given(dtype)
    logits.requires_grad_()
    found, wanted = logprobs_at(logits, ids, chunk_tokens=chunk_tokens), _reference(logits, ids)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found, wanted, rtol=1e-6 if dtype != torch.float64 else 1e-14, atol=1e-6)
    gradient = _slope(found, logits)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, _slope(wanted, logits), rtol=near, atol=near)


def test_ids_that_nobody_has_are_nan_and_so_are_rows_without_a_distribution():
    logits, ids = _given(torch.float32)
    ids[0, 0, 1], ids[0, 1, 2] = VOCABULARY, -2
    logits[1, 0], logits[1, 1, 3], logits[1, 2] = -math.inf, math.nan, math.inf
    ids[1, :3] = torch.tensor([0, 1, 2, 3, -1])
    found = logprobs_at(logits, ids)
    wanted = torch.zeros_like(found, dtype=torch.bool)
    wanted[0, 0, 1] = wanted[0, 1, 2] = True
    wanted[1, :3, :4] = True
    assert torch.equal(found.isnan(), wanted) and found[~wanted].isfinite().all()


def test_rows_that_nothing_hangs_on_may_hold_nan():
    logits, ids = _given()
    logits[0], ids[0] = math.nan, -1
    logits.requires_grad_()
    found = logprobs_at(logits, ids)
    assert not found[0].any() and not _slope(found, logits)[0].any()


def test_a_token_that_was_cut_off_has_no_probability_and_no_gradient():
    logits, ids = _given()
    logits[0, 0, 2], ids[0, 0] = -math.inf, torch.tensor([2, 1, 3, -1, -1])
    logits.requires_grad_()
    found = logprobs_at(logits, ids)
    assert found[0, 0, 0] == -math.inf and found[0, 0, 1:3].isfinite().all()
    assert _slope(found[..., 1:], logits)[0, 0, 2] == 0


def test_no_places_and_no_ids():
    logits, _ = _given()
    assert logprobs_at(logits, torch.empty(3, 4, 0, dtype=torch.int64)).shape == (3, 4, 0)
    assert logprobs_at(logits[:0], torch.empty(0, 4, 2, dtype=torch.int64)).shape == (0, 4, 2)


def test_what_does_not_fit_is_refused():
    logits, ids = _given()
    for wrong in (ids[:2], ids[..., 0], ids.flatten()):
        with pytest.raises(InputError, match="must be a list of ids for each row"):
            logprobs_at(logits, wrong)
    with pytest.raises(InputError, match="must be integers"):
        logprobs_at(logits, ids.double())
    with pytest.raises(InputError, match=r"floating point, got torch\.int64"):
        logprobs_at(logits.long(), ids)
    with pytest.raises(InputError, match="chunk_tokens"):
        logprobs_at(logits, ids, chunk_tokens=0)
    with pytest.raises(InputError, match=r"must be a torch.Tensor"):
        logprobs_at(logits.tolist(), ids)


class _Sizes(TorchDispatchMode):
    """Operators whose result holds as many numbers as the logits, in memory of its own."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits, self.large = logits, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        given = {each.data_ptr() for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
        for each in tree_leaves(found):
            if isinstance(each, torch.Tensor) and each.numel() >= self.logits.numel() and each.data_ptr() not in given:
                self.large.append(func.overloadpacket.__name__)
        return found


def test_nothing_of_the_logits_size_is_made_but_their_gradient():
    logits = torch.randn(64, 300).to(torch.bfloat16).requires_grad_()
    ids = torch.randint(300, (64, 5))
    with _Sizes(logits) as sizes, RefuseWaiting():
        found = logprobs_at(logits, ids, chunk_tokens=8)
        assert sizes.large == []
        found.sum().backward()
    assert sizes.large == ["empty_like"]


def _sharded(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits, ids = _given()
    logits[0, 0, :6] = -math.inf  # all that the first rank has
    bounds = [0, 6, VOCABULARY]
    own = logits[..., bounds[rank] : bounds[rank + 1]].clone().requires_grad_()
    ids[2, 3, 4] = VOCABULARY
    found = logprobs_at(own, ids, vocab_start=bounds[rank], tensor_group=dist.group.WORLD)
    return found.detach(), _slope(found.masked_fill(found.isinf() | found.isnan(), 0), own)


def test_columns_on_two_ranks_are_the_whole_vocabulary(tmp_path: Path):
    logits, ids = _given()
    logits[0, 0, :6], ids[2, 3, 4] = -math.inf, -1
    logits.requires_grad_()
    wanted = _reference(logits, ids)
    results = on_ranks(2, _sharded, tmp_path)
    for found, _ in results:
        assert found[2, 3, 4].isnan()
        torch.testing.assert_close(found[:2], wanted[:2].detach(), rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(found[2, :3], wanted[2, :3].detach(), rtol=1e-14, atol=1e-14)
    gradient = torch.cat([each for _, each in results], -1)
    torch.testing.assert_close(gradient, _slope(wanted.masked_fill(wanted.isinf(), 0), logits), rtol=1e-13, atol=1e-14)
