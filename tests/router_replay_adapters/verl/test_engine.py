"""Masks in a batch of verl, replayed by `megatron_router_replay` in verl's own `forward_step`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import pytest
import torch

from tests.megatron_router_replay.parallel.cases import Case
from tests.megatron_router_replay.parallel.comparison import TOLERANCE
from tests.megatron_router_replay.parallel.data import LOSS_SCALE, Microbatch, places
from tests.megatron_router_replay.parallel.pool import RankPool
from tests.megatron_router_replay.parallel.training import RankStep
from tests.router_replay_adapters.verl.engine_pass import PACKED, STEPPED, engine_step, fp8_packs, refusal
from tests.router_replay_adapters.verl.passes import microbatches, our_step

ONE_RANK = Case(packed=True)
CASES = (
    ONE_RANK,
    Case(packed=True, dense=(0, 2), recompute="full"),
    Case(packed=True, tp=2, recompute="full"),
    Case(packed=True, cp=2),
    Case(packed=True, cp=2, dense=(1,), recompute="full"),
    Case(packed=True, pp=2, dense=(1,), recompute="full"),
    Case(packed=True, pp=2, vpp=2, recompute="full"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_masks_are_replayed_in_verls_engine(case: Case, engines: dict[int, RankPool]) -> None:
    ranks = engines[case.world_size].run(engine_step, case)
    batches, replayed = microbatches(case), 0
    for rank in ranks:
        assert not rank.recomputed_otherwise
        for (layer, index), maps in rank.maps.items():
            known = dict(batches[index].recorded(case.moe_layers.index(layer)))
            for row, place in enumerate(places(case, batches[index], rank.cp_rank, rank.tp_rank).tolist()):
                if place in known:
                    assert maps[row].nonzero().flatten().tolist() == known[place]
                    replayed += 1
    valid = sum(int(masks.valid.sum()) for each in batches for masks in each.masks)
    assert replayed == valid * len(case.moe_layers)


def test_losses_and_experts_are_those_of_our_own_loop(engines: dict[int, RankPool]) -> None:
    (found,), (expected,) = engines[1].run(engine_step, ONE_RANK), engines[1].run(our_step, ONE_RANK)
    assert found.maps.keys() == expected.maps.keys()
    for key, maps in found.maps.items():
        read = microbatches(ONE_RANK)[key[1]].is_read()
        assert torch.equal(maps[read], expected.maps[key][read])
    for index, loss in expected.losses.items():
        assert abs(float(found.losses[index] * LOSS_SCALE - loss)) <= TOLERANCE * abs(float(loss))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("of the next microbatch",), "masks were recorded for a sequence whose first"),
        (("none",), "a batch of the policy has none under 'routing_masks'"),
        (("experts", {}, {}), "and verl's own replay is off, so that nobody would replay them"),
        (("experts", {}, {**PACKED, "SGLANG_ROUTER_CAPTURE_FORMAT": "sglang"}), "and no SGLANG_ROUTER_CAPTURE_FORMAT"),
        (("experts",), "a batch of the policy has none under 'routing_masks'"),
        (
            ("as recorded", {"mode": "R3"}),
            "its routers would take the place of this package's; set megatron.router_replay.mode='disabled'",
        ),
        (("as recorded", {"use_remove_padding": False}), "where use_remove_padding is False: rows are put into"),
        (
            ("as recorded", {"dynamic_context_parallel": True, "max_seqlen_per_dp_cp_rank": 64}),
            "where dynamic_context_parallel is True: it cuts each microbatch",
        ),
        (("as recorded", {"cut": "contiguous"}), "but not in packs that are cut in a contiguous way"),
    ],
    ids=[
        "other masks",
        "no masks",
        "experts, no capture",
        "experts, another format",
        "experts in place of masks",
        "verl's replay",
        "padded",
        "dynamic",
        "contiguous",
    ],
)
def test_what_could_be_wrong_is_refused(
    engines: dict[int, RankPool], arguments: tuple[object, ...], words: str
) -> None:
    (told,) = engines[1].run(refusal, ONE_RANK, *arguments)
    assert words in told


def test_a_pass_that_verls_routers_were_told_nothing_of_is_refused(engines: dict[int, RankPool]) -> None:
    """As of a worker that calls the engine without the flag of verl's own."""
    case = Case(packed=True, config=(("moe_enable_routing_replay", True),))
    (told,) = engines[1].run(refusal, case, "experts", {"mode": "R3"}, {})
    assert "verl's routers were not told to replay them in this pass: a worker of your own marks such batches" in told


def test_what_the_device_found_is_raised_before_weights_change(engines: dict[int, RankPool]) -> None:
    """Of the last microbatch, which no later one follows."""
    case = Case(packed=True, num_microbatches=2)
    (told,) = engines[1].run(refusal, case, "as recorded", None, PACKED, True)
    assert "share fewer than 44% of their 2 experts with the trainer's own choice" in told


def test_what_replay_did_is_among_verls_metrics(engines: dict[int, RankPool]) -> None:
    case = Case(packed=True, pp=2)
    first, last = engines[2].run(engine_step, case)
    batches = microbatches(case)
    valid = sum(int(masks.valid.sum()) for each in batches for masks in each.masks)
    read = sum(masks.num_tokens for each in batches for masks in each.masks)
    # The last token of a sequence, and padding, do not count.
    assert first.metrics == {}
    assert last.metrics.pop("grad_norm") == STEPPED
    assert last.metrics == {
        "router_replay/replayed": [pytest.approx(valid / read)],
        "router_replay/native (invalid)": [pytest.approx(1 - valid / read)],
        "router_replay/native (stale)": [0],
        "router_replay/native (no routes)": [0],
        "router_replay/native (not in the rollout)": [0],
    }


def test_a_step_without_any_pass_has_shares_of_nothing() -> None:
    from router_replay_adapters.verl.engine import _shares

    assert {*_shares({}).values()} == {0.0}
    found = {"places/replayed": 3.0, "places/native (stale)": 1.0, "places/padding": 9.0, "overlap/rollout": 0.9}
    shares = _shares(found)
    assert shares["replayed"] == 0.75 and shares["native (stale)"] == 0.25 and shares["overlap/rollout"] == 0.9
    assert "padding" not in shares


def test_metrics_of_ranks_and_mini_batches_are_reduced_by_verl() -> None:
    """As its workers do: lists of all ranks end to end, then those of all mini-batches; a rank may have no overlap."""
    from verl.utils.metric import reduce_metrics
    from verl.utils.py_functional import append_to_dict

    from router_replay_adapters.verl.engine import _named, _shares

    first = {"places/replayed": 3.0, "places/native (stale)": 1.0, "overlap/rollout": 0.9}
    other = {"places/replayed": 1.0, "places/native (invalid)": 1.0}
    metrics: dict[str, list[float]] = {}
    for ranks in ((first, other), (other, other)):
        of_ranks = [_named(_shares(each)) for each in ranks]
        gathered = {name: [each[name] for each in of_ranks if name in each] for name in of_ranks[0]}
        append_to_dict(metrics, {name: list(chain.from_iterable(lists)) for name, lists in gathered.items()})
    reduced = reduce_metrics(metrics)
    assert reduced["router_replay/replayed"] == pytest.approx((0.75 + 3 * 0.5) / 4)
    assert reduced["router_replay/native (invalid)"] == pytest.approx(3 * 0.5 / 4)
    assert reduced["router_replay/native (stale)"] == pytest.approx(0.25 / 4)
    assert reduced["router_replay/overlap/rollout"] == 0.9


def test_a_mini_batch_without_any_valid_row_is_told(caplog: pytest.LogCaptureFixture) -> None:
    from router_replay_adapters.verl.engine import _tell_if_nothing_is_known

    _tell_if_nothing_is_known({"places/native (no routes)": 5.0})
    _tell_if_nothing_is_known({"places/native (invalid)": 5.0, "places/replayed": 1.0})
    assert not caplog.records
    _tell_if_nothing_is_known({"places/native (invalid)": 5.0, "places/native (no routes)": 2.0})
    _tell_if_nothing_is_known({"places/native (invalid)": 7.0})
    (record,) = caplog.records
    assert "none of the 5 places with a row" in record.getMessage()


def test_tokens_behind_the_last_generation_are_routed_natively(engines: dict[int, RankPool]) -> None:
    (found,) = engines[1].run(engine_step, ONE_RANK, "cut short")
    sequences = sum(len(each.masks) for each in microbatches(ONE_RANK))
    read = sum(masks.num_tokens for each in microbatches(ONE_RANK) for masks in each.masks)
    assert found.metrics["router_replay/native (not in the rollout)"] == [pytest.approx(2 * sequences / read)]


@pytest.mark.parametrize("recompute", [None, "full"])
def test_a_microbatch_without_any_valid_row_is_routed_natively(
    recompute: str | None, engines: dict[int, RankPool]
) -> None:
    case = Case(packed=True, recompute=recompute)
    (found,), (native,) = (
        engines[1].run(engine_step, case, "unknown"),
        engines[1].run(engine_step, case, "none", {}, {}),
    )
    assert not found.recomputed_otherwise
    whole = microbatches(case)
    of_first = [key for key in found.maps if key[1] == 0]
    read = whole[0].is_read()
    assert len(of_first) == len(case.moe_layers)
    for key in of_first:
        assert torch.equal(found.maps[key][read], native.maps[key][read])
    assert torch.equal(found.losses[0], native.losses[0])
    same, all_known = _as_recorded(found, case, whole[1:])
    assert same == all_known > 0
    known = sum(int(masks.valid.sum()) for each in whole[1:] for masks in each.masks)
    without, unknown = whole[0].masks[-1].num_tokens + 1, sum(masks.num_tokens for masks in whole[0].masks[:-1])
    unknown += sum(int((~masks.valid).sum()) for each in whole[1:] for masks in each.masks)
    shares = [
        found.metrics[f"router_replay/{kind}"][0] for kind in ("replayed", "native (invalid)", "native (no routes)")
    ]
    assert shares == [pytest.approx(count / (known + unknown + without)) for count in (known, unknown, without)]


def test_without_masks_or_capture_it_is_verl_as_ever(engines: dict[int, RankPool]) -> None:
    (found,) = engines[1].run(engine_step, ONE_RANK, "none", {}, {})
    assert found.metrics == {"grad_norm": STEPPED} and found.losses


@pytest.mark.parametrize(
    "settings", [{"mode": "R2"}, {"mode": "R3"}, {"forward_only": True}], ids=["R2", "R3", "a reference model's engine"]
)
def test_experts_that_are_verls_business_are_left_to_it(
    settings: dict[str, object], engines: dict[int, RankPool]
) -> None:
    """Its own replay is set up by its trainer, and takes nothing here."""
    (found,) = engines[1].run(engine_step, ONE_RANK, "experts", settings, {})
    assert found.metrics == {"grad_norm": STEPPED} and found.losses


def test_packs_that_are_filled_up_to_a_length(engines: dict[int, RankPool]) -> None:
    (found,) = engines[1].run(engine_step, ONE_RANK, "as recorded", {"pad_to_length": True, "pad_to_length_bucket": 32})
    assert {len(maps) for maps in found.maps.values()} == {32}
    same, all_known = _as_recorded(found)
    assert same == all_known > 0


def test_packs_of_a_model_in_fp8(engines: dict[int, RankPool]) -> None:
    ((found, fp8, other),) = engines[1].run(fp8_packs, ONE_RANK)
    assert found == fp8 != other


def test_masks_in_a_batch_are_replayed_whatever_the_environment_says(engines: dict[int, RankPool]) -> None:
    environment = {"SGLANG_ROUTER_CAPTURE": "1", "SGLANG_ROUTER_CAPTURE_FORMAT": "sglang"}
    (found,) = engines[1].run(engine_step, ONE_RANK, "as recorded", {}, environment)
    same, all_known = _as_recorded(found)
    assert same == all_known > 0


def test_the_reference_models_engine_is_left_alone(engines: dict[int, RankPool]) -> None:
    """Its routers choose by themselves: few experts are those of the masks, which are random."""
    (found,) = engines[1].run(engine_step, ONE_RANK, "as recorded", {"forward_only": True})
    same, all_known = _as_recorded(found)
    assert same < all_known / 4


def _as_recorded(
    found: RankStep, case: Case = ONE_RANK, batches: Sequence[Microbatch] | None = None
) -> tuple[int, int]:
    """Of the (place, layer) pairs that the masks know, those that were dispatched as recorded, and all."""
    same = all_known = 0
    for batch in microbatches(case) if batches is None else batches:
        for ordinal, layer in enumerate(case.moe_layers):
            for place, experts in batch.recorded(ordinal):
                same += found.maps[layer, batch.index][place].nonzero().flatten().tolist() == experts
                all_known += 1
    return same, all_known
