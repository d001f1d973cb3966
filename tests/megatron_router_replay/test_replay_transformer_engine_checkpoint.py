"""Recompute of fp8 and fp4 layers goes through Transformer Engine's checkpoint, which carries bindings too.

Megatron's own code runs up to there; in place of Transformer Engine, which needs a GPU, stands its checkpoint alone,
and layers compute in float32 although their configuration says fp8.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import sys
from types import ModuleType

import pytest
import torch
from megatron.core.extensions import transformer_engine as extension
from torch.utils.checkpoint import CheckpointFunction

from cpu_engines.megatron.logprobs import token_logprobs
from megatron_router_replay import attach
from megatron_router_replay.ledger import TRANSFORMER_ENGINE_LEDGER
from router_replay.errors import SeamError
from tests.megatron_router_replay import transformer_engine_stand_in as stand_in
from tests.megatron_router_replay.batches import dispatched_maps, gradients, random_batch
from tests.megatron_router_replay.checkpoint_kinds import FULL, MOE, ORDERS, forward

RECOMPUTE = {
    "full, uniform": FULL,
    "full, block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3},
    "selective, moe": MOE,
}
# As modules import it by value, where they have Transformer Engine.
_IMPORTED_BY = ("megatron.core.recompute", "megatron.core.transformer.moe.moe_layer")
_QUANTISED_BY = ("megatron.core.recompute", "megatron.core.transformer.transformer_block", "megatron.core.fp8_utils")


@pytest.fixture
def transformer_engine(monkeypatch):
    """Transformer Engine as far as Megatron's te_checkpoint needs it; a list of what it was called for."""
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.distributed", stand_in)
    monkeypatch.setattr(extension, "HAVE_TE", True)
    monkeypatch.setattr(extension, "is_te_min_version", lambda *args, **kwargs: True)
    for name in _IMPORTED_BY:
        monkeypatch.setattr(importlib.import_module(name), "te_checkpoint", extension.te_checkpoint)
    for name in _QUANTISED_BY:
        monkeypatch.setattr(
            importlib.import_module(name), "get_fp8_context", lambda *args, **kwargs: contextlib.nullcontext()
        )
    calls = []
    monkeypatch.setattr(stand_in, "checkpoint", _counted(stand_in.checkpoint, calls))
    return calls


def _counted(checkpoint, calls):
    def counted(function, *args, **kwargs):
        calls.append(function)
        return checkpoint(function, *args, **kwargs)

    return counted


@pytest.fixture
def batches(geometry):
    return [random_batch(geometry, (12, 9, 5), seed=seed) for seed in (21, 22, 23)]


def _fp8(model):
    """What layers ask for when they choose a checkpoint; experts, which would pad for it, go on as they are."""
    plain = copy.copy(model.config)
    model.config.fp8 = "hybrid"
    for layer in model.decoder.layers:
        for module in layer.mlp.experts.modules() if hasattr(layer.mlp, "experts") else ():
            if hasattr(module, "config"):
                module.config = plain
    return model


def _train(model, batches, order):
    with attach(model, overlap_every=None) as replay:
        ORDERS[order](model, replay, batches)
    return gradients(model)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_gradients_are_bitwise_those_without_recompute(build_model, batches, transformer_engine, recompute, order):
    plain = _train(build_model(), batches, order)
    assert not transformer_engine
    recomputed = _train(_fp8(build_model(**RECOMPUTE[recompute])), batches, order)
    # Block recompute is of the first three layers, and three of the four layers route.
    assert len(transformer_engine) == len(batches) * (4 if recompute == "full, uniform" else 3)
    assert [name for name in plain if not torch.equal(plain[name], recomputed[name])] == []


def _user_wraps(model, reentrant):
    for layer in model.decoder.layers:
        layer.mlp.forward = functools.partial(stand_in.checkpoint, layer.mlp.forward, use_reentrant=reentrant)
    return model


MODELS = {name: lambda build, of=of: _fp8(build(**of)) for name, of in RECOMPUTE.items()}
MODELS |= {
    "a user's own, reentrant": lambda build: _user_wraps(build(), True),
    "a user's own, non-reentrant": lambda build: _user_wraps(build(), False),
}


@pytest.mark.parametrize("name", MODELS)
def test_backward_in_another_block_repeats_the_forward_pass(build_model, batches, transformer_engine, name):
    """Router weights change before it, so that native places would choose otherwise."""
    first, second, _ = batches
    model = MODELS[name](build_model)
    with attach(model, overlap_every=None) as replay, dispatched_maps(model) as maps:
        loss = forward(model, replay, first)
        for layer in maps:
            model.decoder.layers[layer].mlp.router.weight.data.neg_()
        with replay.microbatch(second.masks, second.layout):
            loss.backward()
            seen_then = {layer: list(seen) for layer, seen in maps.items()}
            token_logprobs(model, second.token_ids)
    assert transformer_engine or "user" in name
    for layer, (before, *again) in seen_then.items():
        assert len(again) == (0 if name == "full, block" and layer == 3 else 1)
        assert all(torch.equal(before, each) for each in again)


def test_stand_in_has_the_names_and_is_put_back(build_model, transformer_engine):
    names = [seam.name for seam in TRANSFORMER_ENGINE_LEDGER.seams]
    assert names == ["_CheckpointFunction.forward", "get_activation_recompute_contexts"]
    forward_before = vars(stand_in._CheckpointFunction)["forward"]
    contexts_before = stand_in.get_activation_recompute_contexts
    with attach(build_model()):
        assert vars(stand_in._CheckpointFunction)["forward"] is not forward_before
        assert stand_in.get_activation_recompute_contexts is not contexts_before
    assert vars(stand_in._CheckpointFunction)["forward"] is forward_before
    assert stand_in.get_activation_recompute_contexts is contexts_before


def test_a_transformer_engine_without_the_names_is_refused_and_nothing_is_touched(
    build_model, transformer_engine, monkeypatch
):
    model = build_model()
    before = vars(CheckpointFunction)["forward"]
    monkeypatch.delattr(stand_in, "get_activation_recompute_contexts")
    with pytest.raises(SeamError, match=r"get_activation_recompute_contexts: expected a function, found nothing"):
        attach(model)
    assert vars(CheckpointFunction)["forward"] is before
    assert model.decoder.layers[1].mlp.router.router_replay is None
