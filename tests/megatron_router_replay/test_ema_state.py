"""The state of averages: through torch.save and Megatron's sharded checkpoints, and what does not fit."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from megatron_router_replay.averages import ExponentialMovingAverage
from router_replay.errors import PairingError, SeamError
from tests.megatron_router_replay.averaging import WEIGHT, averages, moved
from tests.megatron_router_replay.small_gpt import gpt


def test_state_goes_through_torch_save_and_goes_on_alike():
    model = nn.Linear(5, 3)
    ema = ExponentialMovingAverage(model, 0.9)
    moved(model, 3, ema.update)
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    resumed_model = copy.deepcopy(model)
    resumed = ExponentialMovingAverage(resumed_model, 0.9)
    resumed.load_state_dict(torch.load(file))
    moved(model, 3, ema.update, seed=1)
    moved(resumed_model, 3, resumed.update, seed=1)
    assert resumed.total_weight == ema.total_weight
    assert all(torch.equal(value, averages(ema)[name]) for name, value in averages(resumed).items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("total_weight"), r"lacks \['total_weight'\], it has \['averages', 'decay'\]"),
        (lambda state: state.update(decay=0.8), r"decay 0.8, this average has decay 0.9.*saved decay"),
        (lambda state: state["averages"].pop("bias"), r"has 1 averages, this model 2.*only in the model: bias"),
        (lambda state: state["averages"].update(gate=torch.zeros(1)), r"has 3 averages.*only in the state: gate"),
        (
            lambda state: state["averages"].update(bias=torch.zeros(6)),
            r"bias is float32 \[6\] in the state and float32 \[3\] in this model.*tensor-parallel size",
        ),
        (
            lambda state: state["averages"].update(bias=torch.zeros(3, dtype=torch.bfloat16)),
            r"bias is bfloat16 \[3\] in the state and float32 \[3\]",
        ),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    model = nn.Linear(5, 3)
    ema = ExponentialMovingAverage(model, 0.9)
    other = ExponentialMovingAverage(nn.Linear(5, 3), 0.9)
    other.update()
    state = other.state_dict()
    change(state)
    before = averages(ema)
    with pytest.raises(PairingError, match=message):
        ema.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in averages(ema).items())
    assert ema.total_weight == 1.0


def test_sharded_state_of_another_model_is_refused():
    ema = ExponentialMovingAverage(gpt(), 0.9)
    with pytest.raises(PairingError, match=r"22 of 22 averaged tensors are not.*and 18 more.*of the very model"):
        ema.sharded_state_dict(gpt().sharded_state_dict())


def test_sharded_state_of_several_chunks():
    chunks = [gpt(), gpt(seed=1)]
    ema = ExponentialMovingAverage(chunks, 0.9)
    sharded = ema.sharded_state_dict(
        {f"model{index}": chunk.sharded_state_dict() for index, chunk in enumerate(chunks)}, prefix="proximal"
    )
    for index, chunk in enumerate(chunks):
        entry = sharded["averages"][f"chunk{index}.{WEIGHT}"]
        assert entry.key == f"proximal.{WEIGHT}"
        assert entry.data.dtype == torch.float32
        assert torch.equal(entry.data, chunk.embedding.word_embeddings.weight)


def test_sharded_state_checks_the_installed_seams(monkeypatch):
    from megatron.core.dist_checkpointing import optimizer

    model = gpt()
    ema = ExponentialMovingAverage(model, 0.9)
    monkeypatch.setattr(optimizer, "make_sharded_optimizer_tensor", lambda model_param, value: value)
    with pytest.raises(
        SeamError, match=r"make_sharded_optimizer_tensor: expected parameters \(model_param, optim_param"
    ):
        ema.sharded_state_dict(model.sharded_state_dict())
