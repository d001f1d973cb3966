"""The ledger fits the installed Megatron-Core, and a renamed or changed seam is refused with a useful message."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace

import pytest
from megatron.core.tensor_parallel.random import CheckpointFunction

from megatron_router_replay import attach
from megatron_router_replay.layer_replay import LayerReplay
from megatron_router_replay.ledger import AVERAGES_LEDGER, LEDGER
from megatron_router_replay.refusals import SETTINGS
from router_replay.errors import SeamError
from router_replay.upstream import At, Installed, check_settings, require

INSTALLED = importlib.metadata.version("megatron-core")
RELEASE = Installed("megatron-core").release
ALL_SEAMS = tuple(seam for seam in LEDGER.seams + AVERAGES_LEDGER.seams if seam.paths(RELEASE))
WITH_PARAMETERS = [seam for seam in ALL_SEAMS if seam.parameters]


def _require(*seams):
    require(replace(LEDGER, seams=seams))


@pytest.mark.parametrize("seam", ALL_SEAMS, ids=lambda seam: seam.name)
def test_installed_megatron_has_the_seam(seam):
    _require(seam)
    assert seam.why
    assert seam.until


def test_installed_megatron_has_every_setting():
    assert check_settings(LEDGER, SETTINGS, Installed(LEDGER.distribution)) == []


def test_installed_version_is_a_tested_one():
    assert importlib.metadata.version("megatron-core") in LEDGER.tested


@pytest.mark.parametrize("seam", ALL_SEAMS, ids=lambda seam: seam.name)
def test_a_seam_that_moved_is_refused(seam):
    renamed = replace(seam, where=seam.name + "_renamed")
    with pytest.raises(SeamError) as caught:
        _require(renamed)
    path = f"megatron.core.{renamed.name}"
    for part in (
        f"\n  {path}: expected ",
        ", found nothing of that name (",
        f"Megatron-Core {INSTALLED} (megatron-core):",
    ):
        assert part in str(caught.value)
    with pytest.raises(SeamError, match=r"nothing of that name \(No module named 'megatron\.core\.not_there'\)"):
        _require(replace(seam, where="not_there.module." + seam.name))


def test_a_seam_that_moved_is_followed():
    """The old name works while some release has it, and the new one where it is."""
    seam = LEDGER.seam("transformer.moe.router.TopKRouter.set_layer_number")
    _require(replace(seam, where=(At(f"{seam.name}_renamed", ">=0.20"), At(seam.name, "<0.20"))))
    with pytest.raises(SeamError, match=r"set_layer_number_renamed: expected parameters \(layer_number\)"):
        _require(replace(seam, where=(At(f"{seam.name}_renamed", f">={INSTALLED}"), At(seam.name, f"<{INSTALLED}"))))


@pytest.mark.parametrize("seam", WITH_PARAMETERS, ids=lambda seam: seam.name)
def test_a_seam_whose_parameters_changed_is_refused(seam):
    changed = replace(seam, parameters=(*seam.parameters, "brand_new"))
    with pytest.raises(SeamError) as caught:
        _require(changed)
    for part in (seam.name, "expected parameters (", "brand_new", "found parameters (", seam.parameters[-1]):
        assert part in str(caught.value)


def test_attach_checks_the_installed_seams(build_model, monkeypatch):
    model = build_model()

    def forward(ctx, function, *args):
        raise AssertionError("never called")

    monkeypatch.setattr(CheckpointFunction, "forward", staticmethod(forward))
    with pytest.raises(SeamError, match=r"CheckpointFunction\.forward: expected parameters \(ctx, run_function"):
        attach(model)
    assert model.decoder.layers[1].mlp.router.router_replay is None


def test_our_object_answers_upstreams_call():
    import inspect

    seam = LEDGER.seam("transformer.moe.router_replay.RouterReplay.get_replay_topk")
    assert tuple(inspect.signature(LayerReplay.get_replay_topk).parameters) == ("self", *seam.parameters)
