"""The ledger fits the installed Megatron-Core, and a renamed or changed seam is refused with a useful message."""

from __future__ import annotations

from dataclasses import replace

import megatron.core
import pytest
from megatron.core.tensor_parallel.random import CheckpointFunction

from megatron_router_replay import attach
from megatron_router_replay.layer_replay import LayerReplay
from megatron_router_replay.ledger import AVERAGE_SEAMS, SEAMS, TESTED_VERSIONS, check_seams
from router_replay.errors import SeamError

ALL_SEAMS = SEAMS + AVERAGE_SEAMS


@pytest.mark.parametrize("seam", ALL_SEAMS, ids=lambda seam: seam.path.rpartition("core.")[2])
def test_installed_megatron_has_the_seam(seam):
    check_seams([seam])
    assert seam.why
    assert seam.until


def test_installed_version_is_a_tested_one():
    assert megatron.core.__version__.partition("+")[0] in TESTED_VERSIONS


@pytest.mark.parametrize("seam", ALL_SEAMS, ids=lambda seam: seam.path.rpartition("core.")[2])
def test_a_seam_that_moved_is_refused(seam):
    renamed = replace(seam, path=seam.path + "_renamed")
    with pytest.raises(SeamError) as caught:
        check_seams([renamed])
    name = renamed.path.rpartition(".")[2]
    for part in (renamed.path, f"expected an attribute '{name}', found none", megatron.core.__version__, "0.19.2"):
        assert part in str(caught.value)
    with pytest.raises(SeamError, match="expected an importable module, found none"):
        check_seams([replace(seam, path="not_there." + seam.path)])


@pytest.mark.parametrize("seam", ALL_SEAMS, ids=lambda seam: seam.path.rpartition("core.")[2])
def test_a_seam_whose_parameters_changed_is_refused(seam):
    changed = replace(seam, parameters=(*seam.parameters, "brand_new"))
    with pytest.raises(SeamError) as caught:
        check_seams([changed])
    for part in (seam.path, "expected parameters (", "brand_new", "found (", seam.parameters[-1]):
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

    seam = next(seam for seam in SEAMS if seam.path.endswith("get_replay_topk"))
    assert tuple(inspect.signature(LayerReplay.get_replay_topk).parameters) == seam.parameters
