"""Every wrong pairing is a typed error that names both sides, before anything is computed."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cpu_engines.megatron.logprobs import forward_logits
from megatron_router_replay import BatchLayout, attach
from router_replay.errors import CallOrderError, InputError, PairingError, SeamError, UnsupportedError
from router_replay.masks.geometry import RoutingGeometry
from router_replay.masks.masks import RoutingMasks
from tests.megatron_router_replay.batches import random_batch


@pytest.fixture
def replay(build_model):
    with attach(build_model()) as attached:
        yield attached


def _refused(replay, masks, layout, error, *parts: str) -> None:
    entered = False
    with pytest.raises(error) as caught, replay.microbatch(masks, layout):
        entered = True
    assert not entered
    for part in parts:
        assert part in str(caught.value)


def test_masks_of_other_tokens(replay, batch):
    other = batch.token_ids.clone()
    other[1, 3] += 1
    layout = BatchLayout.padded(other, batch.lengths)
    _refused(replay, batch.masks, layout, PairingError, batch.masks[1].token_digest, "of the rollout unchanged")


def test_masks_in_another_order(replay, batch):
    same_length = random_batch(batch.geometry, (6, 6), seed=2)
    _refused(replay, same_length.masks[::-1], same_length.layout, PairingError, "with its own masks")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"top_k": 2}, ("the rollout has 2 experts per token (top-k)", "this model has 4")),
        ({"num_experts": 32}, ("the rollout has 32 experts", "this model has 16")),
        (
            {"moe_layers": (0, 1, 2, 3)},
            (
                "the rollout has 4 MoE layers, this model has 3",
                "decoder layers [0] route in the rollout but not in this",
            ),
        ),
        ({"num_layers": 5}, ("the rollout has 5 decoder layers, this model has 4",)),
    ],
    ids=["top-k", "experts", "MoE layers", "decoder layers"],
)
def test_masks_of_another_model(build_model, replay, geometry, change, parts):
    other = replace(geometry, **change)
    batch = random_batch(other, (6, 4), seed=2)
    _refused(replay, batch.masks, batch.layout, PairingError, *parts)
    with pytest.raises(PairingError, match=re.escape(parts[0])):
        attach(build_model(), geometry=other)


def test_another_number_of_sequences(replay, batch):
    parts = ("the layout has 3 sequences, masks were given for 2",)
    _refused(replay, batch.masks[:2], batch.layout, PairingError, *parts)


def test_a_turns_delta_without_its_prefix(replay, geometry, batch):
    delta = RoutingMasks.from_indices(
        batch.indices[0][4:],
        torch.ones(7, dtype=torch.bool),
        start=4,
        geometry=geometry,
        codec="bitset",
        token_ids=batch.token_ids[0],
    )
    parts = ("masks of sequence 0 begin at token 4", "RoutingMasks.join")
    _refused(replay, [delta, *batch.masks[1:]], batch.layout, PairingError, *parts)


def test_masks_longer_than_their_sequence(replay, batch):
    layout = BatchLayout.padded(batch.token_ids, (12, 7, 5))
    parts = ("masks of sequence 1 cover 8 tokens, the layout gives it 7",)
    _refused(replay, batch.masks, layout, PairingError, *parts)


def test_masks_of_the_first_turn_only(replay, geometry, batch):
    """Token by token the digest fits, and everything after the turn would be routed natively."""
    first_turn = RoutingMasks.from_indices(
        batch.indices[0][:5],
        torch.ones(5, dtype=torch.bool),
        start=0,
        geometry=geometry,
        codec="bitset",
        token_ids=batch.token_ids[0],
    )
    masks = [first_turn, *batch.masks[1:]]
    parts = ("masks of sequence 0 cover 5 tokens, the layout gives it 12", "RoutingMasks.join", "partial=True")
    _refused(replay, masks, batch.layout, PairingError, *parts)
    routes = replay.place(masks, batch.layout, partial=True)
    # Tokens 5 to 10 of sequence 0, and what the masks themselves call invalid; the last tokens take any experts.
    invalid = sum(int((~one.valid).sum()) for one in batch.masks[1:])
    assert routes.native_causes == {"invalid": invalid, "stale": 0, "no routes": 0, "not in the rollout": 6}


def test_mixed_codecs(replay, geometry, batch):
    ordered = random_batch(geometry, batch.lengths, seed=1, codec="ordered")
    masks = [batch.masks[0], ordered.masks[1], batch.masks[2]]
    _refused(replay, masks, batch.layout, PairingError, "'ordered'", "'bitset'")


def test_dense_model(build_model):
    model = build_model()
    model.config.moe_layer_freq = [0, 0, 0, 0]
    with pytest.raises(UnsupportedError, match=r"4 decoder layers routes.*moe_layer_freq.*a mixture-of-experts model"):
        attach(model)
    model.config.moe_layer_freq, model.config.num_moe_experts = 1, None
    with pytest.raises(UnsupportedError, match="num_moe_experts is None"):
        attach(model)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("/checkpoints/step_100", "got a str: build the model"),
        ({"weight": torch.zeros(2)}, "got a dict"),
        ([], "got an empty list"),
        (None, "got a NoneType"),
        (["chunk"], "got a str"),
    ],
)
def test_what_is_no_model(given, message):
    with pytest.raises(InputError, match=f"attach takes this rank's live model, .*{message}"):
        attach(given)


def test_any_iterable_of_chunks(build_model):
    model = build_model()
    with attach(chunk for chunk in [model]) as replay:
        assert replay.layers == (1, 2, 3)


def test_attach_twice(build_model):
    model = build_model()
    with attach(model), pytest.raises(CallOrderError, match=r"call its remove\(\) first"):
        attach(model)
    with attach(model) as replay:
        assert replay.attached


def test_two_routers_of_one_number(build_model):
    model = build_model()
    with pytest.raises(InputError, match=r"layer number 2 \(decoder layer 1\)"):
        attach([model, model])
    model.decoder.layers[2].mlp.router.set_layer_number(2)
    with pytest.raises(InputError, match="built with its own pipeline offset"):
        attach(model)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("moe_expert_capacity_factor", 1.5),
        ("moe_router_load_balancing_type", "sinkhorn"),
        ("moe_router_load_balancing_type", ["aux_loss", "quantile_balancing"]),
        ("moe_router_force_load_balancing", True),
        ("moe_router_force_biased", 0.5),
        ("moe_flex_dispatcher_backend", "hybridep"),
        ("moe_flex_dispatcher_backend", "ncclep"),
        ("cuda_graph_impl", "local"),
        ("overlap_moe_expert_parallel_comm", True),
        ("mlp_chunks_for_training", 2),
    ],
)
def test_settings_that_would_ignore_or_undo_replay(build_model, flag, value):
    model = build_model()
    setattr(model.config, flag, value)
    with pytest.raises(UnsupportedError, match=re.escape(f"{flag} is {value!r}")):
        attach(model)
    assert all(layer.mlp.router.router_replay is None for layer in model.decoder.layers if hasattr(layer.mlp, "router"))


def test_a_setting_that_megatron_no_longer_has(build_model):
    """A renamed flag would otherwise pass for one that is off."""
    model = build_model()
    config = model.config
    fields = {name: value for name, value in vars(config).items() if name != "moe_expert_capacity_factor"}
    for layer in model.decoder.layers:
        if hasattr(layer.mlp, "router"):
            layer.mlp.router.config = SimpleNamespace(**fields)
    with pytest.raises(
        SeamError,
        match=r"a setting 'moe_expert_capacity_factor', found none\.[^$]*tested with Megatron-Core 0\.19\.2",
    ):
        attach(model)


def test_configuration_that_is_not_the_live_model(build_model):
    model = build_model()
    model.config.moe_layer_freq = [1, 1, 1, 1]
    with pytest.raises(PairingError, match=r"decoder layers \[0\] are dense in this model \(moe_layer_freq\)"):
        attach(model)
    model.config.moe_layer_freq = [0, 0, 1, 1]
    with pytest.raises(PairingError, match=r"decoder layers \[1\] are routed in this model only"):
        attach(model)
    model.config.moe_layer_freq = [0, 1, 1, 1]
    model.decoder.layers[1].mlp.router.topk = 2
    with pytest.raises(PairingError, match="4 of 16 experts, the router of decoder layer 1 to 2 of 16"):
        attach(model)


def test_chunks_of_one_model_and_a_later_stage_alone(build_model, batch):
    """Interleaved chunks, wrapped, and a stage that holds the last layers only, are attached by their own numbers."""
    layers = build_model().decoder.layers
    first, second = torch.nn.Sequential(layers[0], layers[1]), torch.nn.ModuleList([layers[2], layers[3]])
    with attach([first, second]) as replay:
        assert replay.layers == (1, 2, 3)
    with attach(second) as replay:
        assert replay.layers == (2, 3)
        assert replay.geometry.moe_layers == (1, 2, 3)


def test_forward_without_masks(build_model, batch):
    model = build_model()
    with attach(model), pytest.raises(CallOrderError, match=r"replay\.microbatch.*or in replay\.off\(\)"):
        forward_logits(model, batch.token_ids)


def test_forward_after_the_block_ended(build_model, batch):
    model = build_model()
    with attach(model) as replay:
        with replay.microbatch(batch.masks, batch.layout):
            forward_logits(model, batch.token_ids)
        with pytest.raises(CallOrderError, match="this forward pass has no masks"):
            forward_logits(model, batch.token_ids)


def test_router_sees_other_rows_than_the_layout(build_model, batch):
    model = build_model()
    with attach(model) as replay, pytest.raises(PairingError) as caught, replay.microbatch(batch.masks, batch.layout):
        forward_logits(model, batch.token_ids[:, :11])
    assert "called with token ids of shape [3, 11], the layout of this microbatch has [3, 12]" in str(caught.value)
    layer = model.decoder.layers[1]
    message = "decoder layer 1 got 33 places, the layout of this microbatch has 36 on this rank: build the layout"
    with (
        attach(layer) as replay,
        pytest.raises(PairingError, match=message),
        replay.microbatch(batch.masks, batch.layout),
    ):
        layer.mlp.router(torch.zeros(11, 3, 48))


def test_observation_is_of_one_whole_pass(build_model, batch):
    model = build_model()
    with attach(model) as replay, replay.off(), replay.observe() as observed:
        with pytest.raises(CallOrderError, match=r"no routes of decoder layers \[1, 2, 3\]"):
            observed.indices(batch.layout)
        with pytest.raises(CallOrderError, match="do not nest"), replay.observe():
            pass
        forward_logits(model, batch.token_ids)
        with pytest.raises(PairingError, match="the observed pass had 36 places, the layout has 26"):
            observed.indices(batch.packed_layout)
        with pytest.raises(CallOrderError, match="a second forward pass"):
            forward_logits(model, batch.token_ids)


def test_geometry_of_an_interval(build_model):
    """moe_layer_freq as a number: every N-th layer routes, beginning with the first."""
    from megatron_router_replay.layer_plan import geometry_of

    config = build_model().config
    config.moe_layer_freq = 2
    assert geometry_of(config) == RoutingGeometry(num_layers=4, moe_layers=(0, 2), num_experts=16, top_k=4)
