"""Natural mistakes: an exception, or right."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_router_replay import attach
from router_replay.errors import CallOrderError, InputError, PairingError
from router_replay.masks.geometry import RoutingGeometry
from router_replay.replay import Shards
from tests.hf_router_replay.small_models import (
    attention_mask,
    batch_of,
    build,
    computed_experts,
    geometry_of,
    logits_of,
    loss_of,
    wrong_rows,
)
from tests.random_batches import random_batch

FAMILY = "qwen3_moe"


@pytest.fixture
def model():
    return build(FAMILY)


@pytest.fixture
def batch():
    return batch_of(FAMILY)


@pytest.fixture
def others():
    """Another batch of the same shape."""
    return batch_of(FAMILY, 2)


def test_a_pass_outside_of_any_block(model, batch):
    with attach(model), pytest.raises(CallOrderError, match=r"layer 1 is attached to a replay, but .* has no masks"):
        logits_of(model, batch)


def test_a_model_that_runs_on_other_tokens_than_the_layout(model, batch, others):
    with attach(model, overlap_every=None) as replay:
        with replay.microbatch(batch.masks, batch.layout):
            logits_of(model, others)
        with pytest.raises(PairingError, match=r"in the 1\. bound pass the model was called with other token ids"):
            replay.check()
        with replay.microbatch(batch.masks, batch.layout):
            logits_of(model, batch)
        replay.check()


def test_other_tokens_and_nobody_checks(model, batch, others):
    with attach(model, overlap_every=None) as replay:
        with replay.microbatch(batch.masks, batch.layout):
            logits_of(model, others)
        with pytest.raises(PairingError, match=r"1\. bound pass"), replay.microbatch(batch.masks, batch.layout):
            raise AssertionError("bound")


def test_masks_of_other_tokens(model, batch, others):
    with attach(model) as replay, pytest.raises(PairingError, match="token"):
        replay.place(batch.masks, others.layout)


def test_masks_of_another_model(model):
    other = random_batch(RoutingGeometry(3, (0, 1, 2), 8, 3), (12, 9, 5), 1)
    with attach(model) as replay, pytest.raises(PairingError, match="decoder layers"):
        replay.place(other.masks, other.layout)
    with pytest.raises(PairingError, match=r"the rollout has 3 MoE layers, this model has 2"):
        attach(model, other.geometry)
    with attach(model, geometry_of(FAMILY)):
        pass


def test_what_stands_in_padding_does_not_matter(model, batch):
    with attach(model, overlap_every=None) as replay:
        layout = batch.layout
        for row, length in zip(batch.token_ids, batch.lengths, strict=True):
            row[length:] = 95
        with replay.microbatch(batch.masks, layout):
            logits_of(model, batch)
        replay.check()


def test_a_padded_layout_for_packed_ids(model, batch):
    with (
        attach(model, overlap_every=None) as replay,
        pytest.raises(PairingError, match=r"ids of shape \[1, 26\], the layout of this microbatch has \[3, 12\]"),
        replay.microbatch(batch.masks, batch.layout),
    ):
        model(input_ids=batch.packed_ids, use_cache=False)


def test_embeddings_in_place_of_token_ids_are_counted(model, batch):
    """Of these only the comparison with the trainer's own choice could tell that they are another microbatch's."""
    with attach(model, overlap_every=None) as replay, computed_experts(model) as seen:
        embedded = model.get_input_embeddings().weight[batch.token_ids]
        with replay.microbatch(batch.masks, batch.layout):
            model(inputs_embeds=embedded, attention_mask=attention_mask(batch), use_cache=False)
        replay.check()
        assert replay.metrics()["passes/input ids not seen"] == 1
    assert wrong_rows(seen, batch) == 0


def test_embeddings_of_another_shape(model, batch):
    with (
        attach(model, overlap_every=None) as replay,
        pytest.raises(PairingError, match="got 35 places, the layout of this microbatch has 36"),
        replay.microbatch(batch.masks, batch.layout),
    ):
        model(inputs_embeds=torch.zeros(1, 35, 32), use_cache=False)


def test_no_forward_in_a_block(model, batch):
    with (
        attach(model) as replay,
        pytest.raises(CallOrderError, match="no router asked for its experts inside this block"),
        replay.microbatch(batch.masks, batch.layout),
    ):
        pass


def test_two_forwards_in_a_block(model, batch):
    with attach(model) as replay, replay.microbatch(batch.masks, batch.layout):
        logits_of(model, batch)
        with pytest.raises(CallOrderError, match="decoder layer 1 routes a second forward pass inside one block"):
            logits_of(model, batch)


def test_a_hook_that_somebody_took_away(model, batch):
    with attach(model) as replay:
        model.model.layers[2].mlp.gate._forward_hooks.clear()
        with (
            pytest.raises(CallOrderError, match=r"layers \[2\] did not ask for their experts, while \[1\] did"),
            replay.microbatch(batch.masks, batch.layout),
        ):
            logits_of(model, batch)


def test_routes_of_other_tokens_are_seen_in_the_first_training_pass(model, batch):
    with attach(model) as replay:
        with replay.microbatch(batch.masks, batch.layout):
            loss_of(logits_of(model, batch), batch).backward()
        with pytest.raises(PairingError, match=r"share fewer than 53% .* of 3 of 8 share 38%"):
            replay.check()


def test_a_replay_that_was_removed(model, batch):
    replay = attach(model)
    replay.remove()
    with pytest.raises(CallOrderError, match="was removed from its model: attach again"):
        replay.place(batch.masks, batch.layout)


def test_layouts_that_are_none(model, batch):
    with attach(model) as replay, pytest.raises(InputError, match=r"BatchLayout\.padded"):
        replay.place(batch.masks, None)


def test_a_part_of_the_places_of_which_the_order_is_not_known(model, batch):
    """A layout's own order is step by step, that of the routers sequence by sequence."""
    part = batch.layout.at(slice(None))
    with attach(model, overlap_every=None) as replay:
        for use in (lambda: replay.place(batch.masks, part), lambda: replay.record(part).__enter__()):
            with pytest.raises(InputError, match=r"some places of a batch.*shards=Shards\(\)"):
                use()
        order = torch.arange(batch.layout.num_places).view(-1, 3).T.flatten()
        expected = replay.place(batch.masks, batch.layout)
        placed = replay.place(batch.masks, batch.layout.at(order), shards=Shards())
        for layer in replay.layers:
            assert torch.equal(placed.experts(layer), expected.experts(layer))


def test_a_model_with_a_replay_is_not_copied(model):
    with attach(model), pytest.raises(CallOrderError, match=r"copied or pickled: do that before attach"):
        copy.deepcopy(model)
    copy.deepcopy(model)


def test_observed_routes_of_a_part_of_the_places(model, batch):
    """A layout by hand has its places in the routers' order."""
    with attach(model, overlap_every=None) as replay:
        with replay.microbatch(batch.masks, batch.layout), replay.observe() as observed:
            logits_of(model, batch)
        expected = observed.indices(batch.layout)
        width = batch.token_ids.shape[1]
        order = torch.tensor([step * 3 + sequence for sequence in range(3) for step in range(width)])
        found = observed.indices(batch.layout.at(order))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
