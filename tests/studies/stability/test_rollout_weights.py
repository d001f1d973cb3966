"""What the rollout engine is given: the same function of the weights each time, of the named tensors alone."""

from __future__ import annotations

import pytest
import torch

from studies.stability.rollout_weights import RolloutWeights

ROUTER, EXPERT = "model.layers.1.mlp.gate.weight", "model.layers.1.mlp.experts.3.gate_proj.weight"
HEAD, NORM = "lm_head.weight", "model.layers.1.input_layernorm.weight"


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(32, 128, generator=generator) for name in (ROUTER, EXPERT, HEAD)}
    return {**made, NORM: torch.ones(128)}


def test_the_control_is_given_the_weights_themselves():
    assert all(torch.equal(given, tensors()[name]) for name, given in RolloutWeights()(tensors()).items())


@pytest.mark.parametrize(
    ("rounded", "changed"),
    [
        (RolloutWeights(router_offset=0.6), {ROUTER}),
        (RolloutWeights(router_bits=4), {ROUTER}),
        (RolloutWeights("fp8"), {EXPERT}),
        (RolloutWeights("int4", router_bits=3, router_offset=0.1), {ROUTER, EXPERT}),
    ],
)
def test_only_the_named_matrices_change_and_each_time_alike(rounded, changed):
    first, second = rounded(tensors()), rounded(tensors())
    assert {name for name, given in first.items() if not torch.equal(given, tensors()[name])} == changed
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_offset_has_the_size_that_is_asked_for_and_follows_the_weights():
    before = tensors()[ROUTER]
    moved = RolloutWeights(router_offset=0.6)({ROUTER: before})[ROUTER] - before
    assert float(moved.std() / before.std()) == pytest.approx(0.6, rel=0.05)
    twice = RolloutWeights(router_offset=0.6)({ROUTER: 2 * before})[ROUTER] - 2 * before
    torch.testing.assert_close(twice, 2 * moved)
    other = RolloutWeights(router_offset=0.6)({ROUTER.replace("1", "2"): before})
    assert not torch.equal(next(iter(other.values())) - before, moved)


@pytest.mark.parametrize(("bits", "values"), [(2, 3), (4, 15), (8, 255)])
def test_integers_have_so_many_values_a_row_and_are_the_nearest(bits, values):
    rows = tensors()[ROUTER]
    found = RolloutWeights(router_bits=bits)({ROUTER: rows})[ROUTER]
    step = rows.abs().amax(-1, keepdim=True) / (values // 2)
    assert max(len(row.unique()) for row in found) <= values
    assert ((found - rows).abs() <= step / 2 * (1 + 1e-5)).all()


def test_fp8_is_off_by_a_sixteenth_at_most_but_for_the_smallest_weights():
    rows = tensors()[EXPERT]
    found = RolloutWeights("fp8")({EXPERT: rows})[EXPERT]
    # Three bits of mantissa; below 2^-6 of 448, e4m3's spacing is even: 2^-9.
    smallest = rows.abs().amax(-1, keepdim=True) / 448 * 2**-10
    assert ((found - rows).abs() <= torch.maximum(rows.abs() / 16, smallest) * (1 + 1e-5)).all()
    assert not torch.equal(found, rows)


def test_a_row_of_zeros_stays_one():
    for rounded in (RolloutWeights("fp8"), RolloutWeights("int4")):
        assert not rounded({EXPERT: torch.zeros(2, 8)})[EXPERT].any()


@pytest.mark.parametrize("wrong", [{"linears": "int9"}, {"linears": "bf16"}, {"router_bits": 1}])
def test_roundings_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match=r"they are exact|choose 2 to 8"):
        RolloutWeights(**wrong)
