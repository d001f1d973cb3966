"""Checks on the device: what raises, when, and that nothing waits before."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from router_replay.errors import PairingError
from router_replay.masks import RoutingGeometry
from router_replay.replay.checks import DeviceChecks
from router_replay.replay.overlap import MIN_PLACES, OverlapSample, hardly_any
from tests.no_waiting import RefuseWaiting

GEOMETRY = RoutingGeometry(num_layers=48, moe_layers=tuple(range(48)), num_experts=128, top_k=8)
CPU = torch.device("cpu")


@pytest.fixture
def checks() -> DeviceChecks:
    return DeviceChecks(GEOMETRY, CPU)


def test_ids_that_are_not_the_layouts(checks):
    expected = torch.tensor([[5, 6, -1], [7, -1, -1]])
    with RefuseWaiting():
        # What stands in padding does not matter.
        checks.compare_ids(torch.tensor([[5, 6, 0], [7, 5, 6]]), expected, 1)
    checks.read()
    with RefuseWaiting():
        checks.compare_ids(torch.tensor([[5, 6, 0], [8, 5, 6]]), expected, 2)
        checks.compare_ids(torch.tensor([[5, 6, 0], [7, 5, 6]]), expected, 3)
    with pytest.raises(PairingError, match=r"in the 2\. bound pass the model was called with other token ids"):
        checks.read()
    checks.read()


def test_what_was_not_read_is_raised_without_waiting(checks):
    wrong = (torch.tensor([[1]]), torch.tensor([[2]]), 4)
    with RefuseWaiting():
        checks.compare_ids(*wrong)
        checks.raise_copied()
        checks.copy_to_host()
        with pytest.raises(PairingError, match=r"in the 4\. bound pass"):
            checks.raise_copied()
        checks.raise_copied()


def test_overlap_is_judged_of_enough_places(checks):
    checks.add_overlap(torch.tensor(MIN_PLACES - 1), MIN_PLACES - 1, 1)
    checks.read()
    # 15 of 15 and 0 of 16: less than a half of both together.
    checks.add_overlap(torch.tensor(0), 16, 2)
    checks.read()
    checks.add_overlap(torch.tensor(9), 16, 3)
    with pytest.raises(PairingError, match=r"up to the 3\. .* than 30% of their 8 .* choices of 8 of 128 share 6%"):
        checks.read()


def own_and_unrelated(geometry: RoutingGeometry, num_places: int, seed: int) -> tuple[OverlapSample, OverlapSample]:
    """Choices of which one in ten experts differs, and such that have nothing to do with each other."""
    generator = torch.Generator().manual_seed(seed)
    near, far = OverlapSample(), OverlapSample()
    for layer in geometry.moe_layers:
        scores, others = torch.rand(2, num_places, geometry.num_experts, generator=generator).unbind()
        own = scores.topk(geometry.top_k).indices
        swapped = own.clone()
        swap = torch.rand(num_places, generator=generator) < 0.1 * geometry.top_k
        swapped[swap, -1] = scores.topk(geometry.top_k + 1).indices[swap, -1]
        near.compare(layer, own, swapped)
        far.compare(layer, own, others.topk(geometry.top_k).indices)
    return near, far


MODELS = {
    "Qwen3-30B": GEOMETRY,
    "DeepSeek-V3": RoutingGeometry(61, tuple(range(3, 61)), 256, 8),
    "Mixtral": RoutingGeometry(32, tuple(range(32)), 8, 2),
    "gpt-oss": RoutingGeometry(24, tuple(range(24)), 32, 4),
    "one layer": RoutingGeometry(2, (1,), 64, 6),
}


@pytest.mark.parametrize("model", MODELS)
def test_routes_of_other_tokens_are_told_from_those_of_another_engine(model):
    geometry = MODELS[model]
    near, far = own_and_unrelated(geometry, 64, seed=2)
    assert near.num_with_hardly_any(geometry) <= 6
    assert far.num_with_hardly_any(geometry) >= 58


@given(st.integers(2, 64), st.data())
def test_the_threshold_lies_between_chance_and_equality(experts, data):
    top_k = data.draw(st.integers(1, experts - 1))
    geometry = RoutingGeometry(1, (0,), experts, top_k)
    assert top_k / experts < hardly_any(geometry) < 1


def test_chunks_of_one_rank_that_ran_other_microbatches(checks):
    """Interleaved chunks run the same microbatches in the same order; a dense one has no order."""
    for chunk in (0, 1):
        for fingerprint in (5, 7):
            checks.count(chunk, fingerprint)
    checks.read()
    for chunk, order in ((0, (5, 7)), (1, (7, 5))):
        for fingerprint in order:
            checks.count(chunk, fingerprint)
    with pytest.raises(PairingError, match="chunks or ranks of one model replayed different microbatches"):
        checks.read()
    checks.read()


def test_who_reads_the_flags_is_not_met_by_them_before(checks):
    checks.read()
    checks.compare_ids(torch.tensor([[1]]), torch.tensor([[2]]), 1)
    checks.copy_to_host()
    checks.raise_copied()
    with pytest.raises(PairingError, match="other token ids"):
        checks.read()


def test_a_rank_that_set_its_group_apart_takes_part_and_compares_nothing(monkeypatch):
    """Another rank of the group bound something else; it must not be left waiting, and neither is wrong."""
    group = object()
    calls = []

    def all_reduce(tensor, op, group):
        calls.append(len(tensor))
        theirs = torch.zeros_like(tensor)
        theirs[-2:] = torch.tensor([7, -7])
        tensor.copy_(torch.maximum(tensor, theirs))

    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    for apart in (False, True):
        checks = DeviceChecks(GEOMETRY, CPU, [group], [group])
        if apart:
            checks.set_apart(group)
        checks.compare_fingerprints(5, 1)
        checks.count(0, 5)
        if apart:
            checks.read()
            continue
        with pytest.raises(PairingError, match="had different masks or layouts"):
            checks.read()
    assert calls == [2, 5, 2, 5]
