"""No wait for the device from binding to backward: what Megatron itself waits for in a step is known by name."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace

import pytest
import torch

from cpu_engines.megatron.logprobs import token_logprobs
from megatron_router_replay import attach, layer_replay
from router_replay.replay import join_parts
from tests.no_waiting import RefuseWaiting

RECOMPUTE = {
    "no recompute": {},
    "full recompute": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
# What waits in Megatron, with this package or without: how many rows each expert gets is asked by the host.
MEGATRONS = {
    ("MoEAllGatherTokenDispatcher.dispatch_postprocess", "Tensor.cpu"): "rows of each expert",
    ("MoEAllGatherTokenDispatcher.dispatch_postprocess", "Tensor.item"): "all of them",
    ("MoEAllGatherTokenDispatcher.dispatch_postprocess", "aten::_local_scalar_dense"): "all of them",
    ("MoEAllGatherTokenDispatcher.dispatch_postprocess", "aten::masked_select"): "gates of the routing map",
    ("SequentialMLP.forward", "Tensor.tolist"): "rows of each expert",
    ("Router.gating", "Tensor.to"): "weights that are on the CPU are moved to the GPU, which is the CPU here",
}
# The gradient of masked_select, which no function of Megatron's calls; a recompute's is inside of its checkpoint.
OF_MASKED_SELECT = {"no recompute": "a backward pass", "full recompute": "CheckpointFunction.backward"}
# What reads the host's own memory, where nothing is waited for.
ON_THE_HOST = {
    ("DeviceChecks.raise_copied", "Tensor.numpy"): "flags that a copy to the host brought, once its event says so",
}
OURS = ("router_replay.", "megatron_router_replay.")


class KnownWaits(RefuseWaiting):
    """Refuses waits but those of Megatron's own functions, which it keeps by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, str]] = set()

    def refuse(self, what: str) -> None:
        module, function = _caller()
        if module.startswith(OURS) and (function, what) not in ON_THE_HOST:
            raise AssertionError(f"{what} in {module}: {function} waits for the device")
        if not module.startswith(OURS):
            self.seen.add((function, what))


def _caller() -> tuple[str, str]:
    """Module and function of this package's or Megatron's that is innermost on the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith((*OURS, "megatron.")):
            return module, frame.f_code.co_qualname
        frame = frame.f_back
    return "", "a backward pass"


# What waits on a device and runs no operator on the CPU. Patched, since a mode for functions is off inside of backward.
METHODS = ("cpu", "item", "numpy", "to", "tolist")


@contextlib.contextmanager
def known_waits():
    with KnownWaits() as known, pytest.MonkeyPatch.context() as patch:
        for name in METHODS:
            patch.setattr(torch.Tensor, name, _noted(name, known))
        yield known


def _noted(name, known):
    method = getattr(torch.Tensor, name)

    def noted(tensor, *args, **kwargs):
        if name != "to" or "cpu" in map(str, (*args, *kwargs.values())):
            known.refuse(f"Tensor.{name}")
        return method(tensor, *args, **kwargs)

    return noted


def own_routes(model, replay, batch):
    """Masks of the model's own routes, a third of them not valid, such that the alarm of the overlap is silent."""
    with replay.record(batch.layout) as recorder, torch.no_grad():
        token_logprobs(model, batch.token_ids)
    generator = torch.Generator().manual_seed(3)
    return [
        replace(one, valid=one.valid & (torch.rand(one.num_tokens, generator=generator) > 1 / 3))
        for one in join_parts([recorder.part()])
    ]


def step(model, replay, placement, token_ids):
    with replay.microbatch(placement):
        logprobs = token_logprobs(model, token_ids)
    logprobs.sum().backward()


@pytest.mark.parametrize("kind", OF_MASKED_SELECT)
def test_a_step_waits_for_nothing_that_megatron_alone_does_not_wait_for(build_model, batch, kind):
    model = build_model(**RECOMPUTE[kind])
    with attach(model, overlap_every=1) as replay:
        placement = replay.place(own_routes(model, replay, batch), batch.layout)
        assert placement.num_native > 3 and len(placement.sample) > 3
        replay.metrics()
        with known_waits() as known:
            for _ in range(2):
                step(model, replay, placement, batch.token_ids)
        replay.check()
        # Sampled in both passes, and silent.
        assert replay.metrics()["overlap/rollout"] == 1
    assert known.seen == {*MEGATRONS, (OF_MASKED_SELECT[kind], "aten::masked_scatter")}
    with known_waits() as alone:
        token_logprobs(model, batch.token_ids).sum().backward()
    assert alone.seen == known.seen


@pytest.mark.parametrize("recompute", RECOMPUTE.values(), ids=RECOMPUTE)
@pytest.mark.parametrize("wait", ["item", "tolist", "cpu", "__bool__"])
def test_a_wait_of_the_replay_is_seen(build_model, batch, monkeypatch, recompute, wait):
    choose = layer_replay.replayed_experts

    def waiting(routes, state, *args):
        if state.recomputing or not recompute:
            getattr(torch.ones(()), wait)()
        return choose(routes, state, *args)

    monkeypatch.setattr(layer_replay, "replayed_experts", waiting)
    model = build_model(**recompute)
    with attach(model, overlap_every=None) as replay:
        placement = replay.place(batch.masks, batch.layout)
        with (
            pytest.raises(AssertionError, match=r"LayerReplay\.get_replay_topk waits"),
            known_waits(),
        ):
            step(model, replay, placement, batch.token_ids)
