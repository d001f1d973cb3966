"""Natural mistakes, each of which once replayed wrong routes without a word: an exception, or right."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from cpu_engines.megatron.logprobs import forward_logits, token_logprobs
from megatron_router_replay import Replay, attach
from router_replay.errors import CallOrderError, PairingError, UnsupportedError
from router_replay.masks.masks import RoutingMasks
from tests.megatron_router_replay.batches import dispatched_maps, random_batch
from tests.megatron_router_replay.own_routes import own_masks, wrong_rows


@pytest.fixture
def model(build_model):
    return build_model()


@pytest.fixture
def others(geometry):
    """Another batch of the same shape."""
    return random_batch(geometry, (12, 9, 5), seed=2)


def test_a_block_around_the_whole_schedule(model, batch, others):
    """The second microbatch's forward pass is refused in its first layer, before it is computed with wrong experts."""
    batches = iter([batch, others, batch])

    def forward_step(data, chunk):
        each = next(data)
        return token_logprobs(chunk, each.token_ids), lambda output: (output.sum(), {})

    schedule = get_forward_backward_func()
    with (
        attach(model, overlap_every=None) as replay,
        pytest.raises(CallOrderError, match=r"layer 1 routes a second .* not around forward_backward_func"),
        replay.microbatch(batch.masks, batch.layout),
    ):
        schedule(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=model,
            num_microbatches=3,
            seq_length=12,
            micro_batch_size=3,
        )


def test_model_that_runs_on_other_tokens_than_the_layout(model, batch, others):
    with attach(model, overlap_every=None) as replay:
        with replay.microbatch(batch.masks, batch.layout):
            forward_logits(model, others.token_ids)
        with pytest.raises(PairingError, match=r"in the 1\. bound pass the model was called with other token ids"):
            replay.check()
        with replay.microbatch(batch.masks, batch.layout):
            forward_logits(model, batch.token_ids)
        replay.check()


def test_model_that_runs_on_other_tokens_and_nobody_checks(model, batch, others):
    """The next binding raises, where the optimizer's step was not preceded by a check."""
    with attach(model, overlap_every=None) as replay:
        with replay.microbatch(batch.masks, batch.layout):
            forward_logits(model, others.token_ids)
        with (
            pytest.raises(PairingError, match=r"in the 1\. bound pass"),
            replay.microbatch(batch.masks, batch.layout),
        ):
            raise AssertionError("bound")


def test_what_stands_in_padding_does_not_matter(model, batch):
    ids = batch.token_ids.clone()
    for row, length in zip(ids, batch.lengths, strict=True):
        row[length:] = 95
    with attach(model, overlap_every=None) as replay:
        with replay.microbatch(batch.masks, batch.layout):
            forward_logits(model, ids)
        replay.check()


def test_a_padded_layout_for_packed_ids_of_equal_lengths(model, geometry):
    batch = random_batch(geometry, (12, 12, 12), seed=4)
    with (
        attach(model, overlap_every=None) as replay,
        pytest.raises(PairingError, match=r"ids of shape \[1, 36\], the layout of this microbatch has \[3, 12\]"),
        replay.microbatch(batch.masks, batch.layout),
    ):
        forward_logits(model, batch.packed_ids, batch.cu_seqlens)


def test_no_forward_in_a_block(model, batch):
    with (
        attach(model) as replay,
        pytest.raises(CallOrderError, match="no router asked for its experts inside this block"),
        replay.microbatch(batch.masks, batch.layout),
    ):
        pass


def test_two_forwards_in_a_block(model, batch):
    with (
        attach(model) as replay,
        replay.microbatch(batch.masks, batch.layout),
    ):
        forward_logits(model, batch.token_ids)
        with pytest.raises(CallOrderError, match="decoder layer 1 routes a second forward pass inside one block"):
            forward_logits(model, batch.token_ids)


def test_an_exception_inside_of_a_block_is_the_callers(model, batch):
    with attach(model) as replay:
        with pytest.raises(ZeroDivisionError), replay.microbatch(batch.masks, batch.layout):
            raise ZeroDivisionError
        with replay.off():
            forward_logits(model, batch.token_ids)


def test_a_layer_that_is_never_asked(model, batch):
    """Somebody put another object into a router after attach."""
    with attach(model) as replay:
        router = model.decoder.layers[2].mlp.router
        ours, router.router_replay = router.router_replay, None
        with (
            pytest.raises(CallOrderError, match=r"layers \[2\] did not ask for their experts, while \[1, 3\] did"),
            replay.microbatch(batch.masks, batch.layout),
        ):
            forward_logits(model, batch.token_ids)
        router.router_replay = ours
        with replay.microbatch(batch.masks, batch.layout):
            forward_logits(model, batch.token_ids)


def test_all_rows_invalid(model, geometry, batch):
    nothing = random_batch(geometry, batch.lengths, seed=1, invalid=1.0)
    with attach(model) as replay:
        with pytest.raises(PairingError, match=r"none of the 23 rows of these 3 masks is valid.*valid=False"):
            replay.place(nothing.masks, nothing.layout)
        natively = replay.place(nothing.masks, nothing.layout, valid=False)
        # One sequence without a valid row among others is an answer like any other.
        routes = replay.place([nothing.masks[0], *batch.masks[1:]], batch.layout)
    assert natively.num_replayed == 0 and natively.native_causes["invalid"] == 23
    assert routes.native_causes["invalid"] >= 11


def test_a_batch_without_any_valid_row_is_routed_natively_where_that_is_asked_for(model, geometry, batch):
    """There is nothing to compare with the model's own choice, which the random model is to be judged by here."""
    nothing = random_batch(geometry, batch.lengths, seed=1, invalid=1.0)
    with attach(model, overlap_every=1) as replay, dispatched_maps(model) as maps:
        for _ in range(3):
            with replay.microbatch(nothing.masks, nothing.layout, valid=False):
                forward_logits(model, nothing.token_ids)
        replay.check()
        with replay.off():
            forward_logits(model, nothing.token_ids)
        metrics = replay.metrics()
    read = [nothing.place(row, position) for row, one in enumerate(nothing.masks) for position in range(one.num_tokens)]
    for *bound, native in maps.values():
        assert all(torch.equal(each[read], native[read]) for each in bound)
    assert metrics["places/native (invalid)"] == 3 * 23
    assert not metrics["places/replayed"] and "overlap/rollout" not in metrics


def test_a_sequence_without_masks_is_routed_natively(model, batch):
    with attach(model, overlap_every=None) as replay, dispatched_maps(model) as maps:
        with replay.microbatch([None, *batch.masks[1:]], batch.layout) as routes:
            forward_logits(model, batch.token_ids)
        with replay.off():
            forward_logits(model, batch.token_ids)
    assert routes.native_causes["no routes"] == 12
    for replayed, native in maps.values():
        first = [batch.place(0, position) for position in range(12)]
        # Its tokens attend to themselves only, so that what the others replay does not reach them.
        assert torch.equal(replayed[first], native[first])
    assert maps.keys() == {1, 2, 3}


def _forward_in_a_block(replay: Replay, model, batch) -> Iterator[torch.Tensor]:
    with replay.microbatch(batch.masks, batch.layout):
        yield forward_logits(model, batch.token_ids)


def test_a_generator_that_holds_a_block_open_over_a_yield(model, batch, others):
    with attach(model, overlap_every=None) as replay, dispatched_maps(model) as maps:
        held = _forward_in_a_block(replay, model, batch)
        next(held)
        assert wrong_rows(maps, batch) == 0
        # Whoever runs now finds that block still open, bound to the other microbatch.
        with pytest.raises(CallOrderError, match="second forward pass inside one block"):
            forward_logits(model, others.token_ids)
        with (
            pytest.raises(CallOrderError, match="a generator must not yield inside of one"),
            replay.microbatch(others.masks, others.layout),
        ):
            raise AssertionError("bound")
        held.close()
        with replay.microbatch(others.masks, others.layout):
            forward_logits(model, others.token_ids)
        assert wrong_rows(maps, others) == 0


@pytest.mark.parametrize(
    ("setting", "value"), [("moe_expert_capacity_factor", 1.0), ("moe_router_force_load_balancing", True)]
)
def test_configuration_changed_after_attach(model, batch, setting, value):
    with attach(model, overlap_every=None) as replay:
        with replay.microbatch(batch.masks, batch.layout):
            forward_logits(model, batch.token_ids)
        setattr(model.config, setting, value)
        with (
            pytest.raises(UnsupportedError, match=rf"{setting} .*changed after attach"),
            replay.microbatch(batch.masks, batch.layout),
        ):
            raise AssertionError("bound")


def test_configuration_changed_inside_of_a_block(model, batch):
    def step() -> None:
        with replay.microbatch(batch.masks, batch.layout):
            model.config.moe_expert_capacity_factor = 1.0
            forward_logits(model, batch.token_ids)

    message = r"moe_expert_capacity_factor .*changed after attach"
    with attach(model, overlap_every=None) as replay, pytest.raises(UnsupportedError, match=message):
        step()


def test_a_fused_router_switched_on_after_attach_replays(model, batch):
    with attach(model, overlap_every=None) as replay, dispatched_maps(model) as maps:
        model.config.moe_router_fusion = True
        with pytest.warns(UserWarning, match="un-fused"), replay.microbatch(batch.masks, batch.layout):
            forward_logits(model, batch.token_ids)
    assert wrong_rows(maps, batch) == 0


def test_routes_of_other_tokens_are_seen_in_the_first_training_pass(model, batch, others):
    """Masks, layout and the ids that the model is called with fit each other; the routes are others."""
    with attach(model) as replay:
        own, theirs = own_masks(model, replay, batch), own_masks(model, replay, others)
        with replay.microbatch(own, batch.layout):
            forward_logits(model, batch.token_ids)
        replay.check()
        assert replay.metrics()["overlap/rollout"] == 1
        crossed = [
            RoutingMasks(
                other.rows, other.valid, 0, other.geometry, other.codec, other.weight_versions, mine.token_digest
            )
            for mine, other in zip(own, theirs, strict=True)
        ]
    with attach(model) as replay:
        with replay.microbatch(crossed, batch.layout):
            forward_logits(model, batch.token_ids)
        with pytest.raises(PairingError, match=r"places share fewer than 44% .* choices of 4 of 16 share 25%"):
            replay.check()


def test_routes_of_other_tokens_are_seen_by_the_next_binding(model, batch):
    with attach(model) as replay:
        # Its 14 valid rows are too few to be judged by themselves.
        for _ in range(2):
            with replay.microbatch(batch.masks, batch.layout):
                forward_logits(model, batch.token_ids)
        with (
            pytest.raises(PairingError, match="most sampled places share fewer than"),
            replay.microbatch(batch.masks, batch.layout),
        ):
            raise AssertionError("bound")
