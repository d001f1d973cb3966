"""The same on a CUDA device, by torch's own check: a whole step in which whatever waits raises.

Megatron's dispatchers wait (`test_no_waiting.py` has the list), so its MoE layers only route here: embedding,
attention, checkpoints and routers are its own, the gates are the output. On the CPU the same model is under the guard.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_layer import MoELayer

from cpu_engines.megatron import CpuDevice, single_process
from cpu_engines.megatron.logprobs import token_logprobs
from megatron_router_replay import attach
from router_replay.replay import join_parts
from tests.no_waiting import RefuseWaiting

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.fixture(scope="module", autouse=True, params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def megatron(request) -> Iterator[torch.device]:
    """Process groups, and stand-ins for CUDA only where it is not there."""
    with CpuDevice() if request.param == "cpu" else contextlib.nullcontext(), single_process():
        if request.param == "cuda":
            model_parallel_cuda_manual_seed(0)
        yield torch.device(request.param)


@contextlib.contextmanager
def waiting_raises(device):
    if device.type == "cpu":
        with RefuseWaiting():
            yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def only_route(moe, hidden_states, *args, **kwargs):
    gates, _ = moe.router(hidden_states)
    weights = torch.arange(gates.shape[1], device=gates.device, dtype=gates.dtype)
    return hidden_states * (gates @ weights).view(*hidden_states.shape[:2], 1), None


@pytest.mark.parametrize("recompute", [{}, FULL], ids=["no recompute", "full recompute"])
def test_no_step_waits(build_model, batch, megatron, monkeypatch, recompute):
    monkeypatch.setattr(MoELayer, "forward", only_route)
    model, token_ids = build_model(core_attention=None, **recompute).to(megatron), batch.token_ids.to(megatron)
    with attach(model, overlap_every=1) as replay:
        with replay.record(batch.layout) as recorder, torch.no_grad():
            token_logprobs(model, token_ids)
        generator = torch.Generator().manual_seed(3)
        masks = [
            replace(one, valid=one.valid & (torch.rand(one.num_tokens, generator=generator) > 1 / 3))
            for one in join_parts([recorder.part()])
        ]
        placement = replay.place(masks, batch.layout)
        assert placement.num_native > 3 and len(placement.sample) > 3

        def step():
            with replay.microbatch(placement):
                logprobs = token_logprobs(model, token_ids)
            logprobs.sum().backward()

        # What is made once, by Megatron and by CUDA, may wait.
        step()
        with waiting_raises(megatron):
            for _ in range(2):
                step()
        replay.check()
        assert replay.metrics()["overlap/rollout"] == 1
    assert all(layer.mlp.router.weight.grad.abs().sum() > 0 for layer in model.decoder.layers[1:])


def test_a_wait_raises(megatron):
    one = torch.ones((), device=megatron)
    message = "waits for the device" if megatron.type == "cpu" else "synchronizing CUDA operation"
    with pytest.raises((AssertionError, RuntimeError), match=message), waiting_raises(megatron):
        one.item()
