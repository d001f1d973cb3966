"""Fused routers replay, and a setting that changes after attach is neither missed nor hidden from the routers."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from megatron.core.transformer.moe import moe_utils

from cpu_engines.megatron.logprobs import token_logprobs
from megatron_router_replay import attach
from megatron_router_replay import router_settings as subject
from router_replay.errors import UnsupportedError
from tests.megatron_router_replay.batches import dispatched_maps, experts_of, gradients

AUX_LOSS = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1}


class FusedKernelAsked(Exception):
    """Megatron went to Transformer Engine's kernels, which there are none of on a CPU."""


@pytest.fixture
def fused_kernels(monkeypatch):
    """Transformer Engine's functions, which say that they were asked."""

    def asked(*args, **kwargs):
        raise FusedKernelAsked

    monkeypatch.setattr(moe_utils, "HAVE_TE", True)
    for name in ("fused_topk_with_score_function", "fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss"):
        monkeypatch.setattr(moe_utils, name, asked)


def _routers(model):
    return [layer.mlp.router for layer in model.decoder.layers if hasattr(layer.mlp, "router")]


def _step(model, batch):
    with attach(model, overlap_every=None) as replay, replay.microbatch(batch.masks, batch.layout):
        logprobs = token_logprobs(model, batch.token_ids)
        logprobs.sum().backward()
    return logprobs.detach(), gradients(model)


@pytest.mark.parametrize("settings", [{}, AUX_LOSS], ids=["no auxiliary loss", "auxiliary loss"])
def test_fused_routers_replay_as_others_do(build_model, batch, fused_kernels, settings):
    plain, fused = build_model(**settings), build_model(**settings)
    fused.config.moe_router_fusion = True
    expected, expected_gradients = _step(plain, batch)
    with pytest.warns(UserWarning, match="replay runs 3 routers un-fused") as warned, dispatched_maps(fused) as maps:
        found, found_gradients = _step(fused, batch)
    assert ["un-fused" in str(each.message) for each in warned].count(True) == 1
    recorded = dict(batch.recorded(2))
    assert {place: experts_of(maps[2][0], place) for place in recorded} == recorded
    assert torch.equal(found, expected)
    assert all(torch.equal(found_gradients[name], value) for name, value in expected_gradients.items())
    with pytest.raises(FusedKernelAsked):
        token_logprobs(fused, batch.token_ids)


@pytest.mark.filterwarnings("ignore:replay runs")
def test_the_shared_configuration_is_left_and_put_back(build_model):
    model = build_model()
    config = model.config
    config.moe_router_fusion = True
    before = copy.copy(vars(config))
    replay = attach(model)
    assert all(router.config is not config and not router.config.moe_router_fusion for router in _routers(model))
    assert all(layer.mlp.config is config for layer in model.decoder.layers)
    assert vars(config) == before
    replay.remove()
    assert all(router.config is config for router in _routers(model))


@pytest.mark.filterwarnings("ignore:replay runs")
def test_what_changes_on_the_shared_configuration_reaches_the_routers(build_model, batch):
    """And what is set on a router's configuration, all others: there is one."""
    model = build_model()
    model.config.moe_router_fusion = True
    first, *others = _routers(model)
    with attach(model, overlap_every=None) as replay:
        model.config.moe_z_loss_coeff = 0.5
        assert [router.config.moe_z_loss_coeff for router in (first, *others)] == [0.5] * 3
        first.config.moe_z_loss_coeff = 0.25
        assert model.config.moe_z_loss_coeff == 0.25
        with replay.microbatch(batch.masks, batch.layout):
            token_logprobs(model, batch.token_ids).sum().backward()
        with pytest.raises(AttributeError, match="no_such_setting"):
            _ = first.config.no_such_setting
        copied = copy.deepcopy(first.config)
        assert (copied.moe_router_fusion, copied.moe_z_loss_coeff) == (False, 0.25)


def test_a_router_fused_after_attach_is_unfused_by_the_next_binding(build_model, batch, fused_kernels):
    model = build_model()
    with attach(model, overlap_every=None) as replay:
        model.config.moe_router_fusion = True
        with (
            pytest.warns(UserWarning, match="replay runs 3 routers un-fused"),
            dispatched_maps(model) as maps,
            replay.microbatch(batch.masks, batch.layout),
        ):
            token_logprobs(model, batch.token_ids)
    recorded = dict(batch.recorded(1))
    assert {place: experts_of(maps[1][0], place) for place in recorded} == recorded
    assert all(router.config is model.config for router in _routers(model))


@pytest.mark.filterwarnings("ignore:replay runs")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("flag", "value", "was"),
    [("moe_expert_capacity_factor", 1.5, None), ("moe_router_force_load_balancing", True, False)],
)
def test_a_setting_that_changed_after_attach_is_refused(build_model, batch, fused, flag, value, was):
    """The per-router view of a fused router's configuration must not hide it."""
    model = build_model()
    model.config.moe_router_fusion = fused
    with attach(model, overlap_every=None) as replay:
        with replay.microbatch(batch.masks, batch.layout):
            token_logprobs(model, batch.token_ids)
        setattr(model.config, flag, value)
        message = rf"{flag} is {value!r}: .*\. It was changed after attach: {flag} was {was!r}"
        for _ in range(2):
            with pytest.raises(UnsupportedError, match=message), replay.microbatch(batch.masks, batch.layout):
                pytest.fail("bound under a setting that undoes replay")
        setattr(model.config, flag, was)
        with replay.microbatch(batch.masks, batch.layout):
            token_logprobs(model, batch.token_ids)


def test_a_list_that_changed_in_place_and_another_configuration_are_seen(build_model, batch):
    model = build_model()
    model.config.moe_router_load_balancing_type = ["aux_loss"]
    last = _routers(model)[-1]
    with attach(model, overlap_every=None) as replay:
        model.config.moe_router_load_balancing_type.append("sinkhorn")
        with pytest.raises(UnsupportedError, match=r"was \['aux_loss'\]"), replay.microbatch(batch.masks, batch.layout):
            pytest.fail("bound under a setting that undoes replay")
        model.config.moe_router_load_balancing_type.pop()
        last.config = copy.copy(model.config)
        last.config.moe_expert_capacity_factor = 2.0
        message = re.escape("moe_expert_capacity_factor was None")
        with pytest.raises(UnsupportedError, match=message), replay.microbatch(batch.masks, batch.layout):
            pytest.fail("bound under a setting that undoes replay")
        last.config.moe_expert_capacity_factor = None
        other = last.config
        with replay.microbatch(batch.masks, batch.layout):
            token_logprobs(model, batch.token_ids)
    assert last.config is other


def test_settings_are_judged_once_unless_they_change(build_model, batch, monkeypatch):
    """A binding must not pay for what attach has done."""
    model = build_model()
    judged = []
    check_config = subject.check_config
    monkeypatch.setattr(subject, "check_config", lambda config: judged.append(config) or check_config(config))
    with attach(model, overlap_every=None) as replay:
        assert judged == [model.config]
        for _ in range(2):
            with replay.microbatch(batch.masks, batch.layout):
                token_logprobs(model, batch.token_ids)
        assert len(judged) == 1
        model.config.cuda_graph_impl = None
        for _ in range(2):
            with replay.microbatch(batch.masks, batch.layout):
                token_logprobs(model, batch.token_ids)
        assert len(judged) == 2


def test_a_configuration_that_was_exchanged_is_watched_like_the_first(build_model, batch):
    model = build_model()
    router = next(iter(_routers(model)))
    with attach(model, overlap_every=None) as replay:
        for _ in range(2):
            router.config = copy.copy(router.config)
            with replay.microbatch(batch.masks, batch.layout):
                token_logprobs(model, batch.token_ids)
        router.config.moe_expert_capacity_factor = 1.0
        with (
            pytest.raises(UnsupportedError, match=r"moe_expert_capacity_factor .*changed after attach"),
            replay.microbatch(batch.masks, batch.layout),
        ):
            raise AssertionError("bound")
