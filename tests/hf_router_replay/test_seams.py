"""The ledger fits the installed transformers, and a renamed or changed seam, or another formula, is refused."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace

import pytest
import torch
from transformers.models.mixtral import modeling_mixtral

from hf_router_replay import attach
from hf_router_replay.families import FAMILIES
from hf_router_replay.ledger import LEDGER, ledger_of
from router_replay.errors import SeamError
from router_replay.upstream import require
from tests.hf_router_replay import small_models
from tests.hf_router_replay.small_models import build


@pytest.mark.parametrize("seam", LEDGER.seams, ids=lambda seam: seam.name)
def test_installed_transformers_has_the_seam(seam):
    require(replace(LEDGER, seams=(seam,)))
    with pytest.raises(SeamError, match="found nothing of that name"):
        require(replace(LEDGER, seams=(replace(seam, where=seam.name + "_renamed"),)))


def test_installed_version_is_a_tested_one():
    assert importlib.metadata.version("transformers") in LEDGER.tested


def test_every_known_family_is_tested():
    assert {family.name for family in FAMILIES} == set(small_models.FAMILIES)
    for family in FAMILIES:
        assert set(ledger_of(family).seams) < set(LEDGER.seams)


def test_a_changed_signature_is_refused_by_attach(monkeypatch):
    model = build("mixtral")

    def forward(self, states):
        raise AssertionError("never called")

    forward.__module__, forward.__qualname__ = modeling_mixtral.__name__, "MixtralTopKRouter.forward"
    monkeypatch.setattr(modeling_mixtral.MixtralTopKRouter, "forward", forward)
    with pytest.raises(SeamError, match=r"MixtralTopKRouter\.forward: expected parameters \(hidden_states\), found"):
        attach(model)
    assert all(not module._forward_hooks for module in model.modules())


def _unnormalized(self, hidden_states):
    logits = torch.nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
    gates, experts = torch.topk(logits.float().softmax(-1), self.top_k, dim=-1)
    return logits, gates, experts


def _another_dtype(self, hidden_states):
    logits, gates, experts = _unnormalized(self, hidden_states)
    return logits, (gates / gates.sum(-1, keepdim=True)).double(), experts


def _four_results(self, hidden_states):
    return (*_unnormalized(self, hidden_states), None)


def _another_shape(self, hidden_states):
    logits, gates, experts = _unnormalized(self, hidden_states)
    return logits, torch.zeros_like(logits).scatter(1, experts, gates), experts


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (_unnormalized, "its gates are not those that"),
        (_another_dtype, "its gates are not those that"),
        (_four_results, "its forward was expected to return logits, gates and experts"),
        (_another_shape, r"its forward returns shapes \[\[16, 8\], \[16, 8\], \[16, 3\]\]"),
    ],
)
def test_a_router_of_another_formula_is_refused(monkeypatch, forward, message):
    """As a later release might have it, under the same names."""
    model = build("mixtral")
    forward.__module__, forward.__qualname__ = modeling_mixtral.__name__, "MixtralTopKRouter.forward"
    monkeypatch.setattr(modeling_mixtral.MixtralTopKRouter, "forward", forward)
    version = importlib.metadata.version("transformers")
    with pytest.raises(SeamError, match=rf"MixtralTopKRouter of transformers {version}: {message}"):
        attach(model)
    assert all(not module._forward_hooks for module in model.modules())
