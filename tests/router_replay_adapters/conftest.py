"""Stacks as they are imported here, and Megatron on a machine without a GPU."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import pytest
import torch

from cpu_engines.megatron import CpuDevice, single_process
from tests.stack_packages import checkout, importable, miles

STAND_INS = Path(__file__).parent / "stand_ins"


@pytest.fixture(scope="module", autouse=True)
def megatron() -> Iterator[None]:
    """Process groups and CUDA stand-ins."""
    with CpuDevice(), single_process():
        yield


@pytest.fixture(scope="module")
def miles_replay_base() -> Iterator[ModuleType]:
    """`miles.utils.replay_base` of miles itself."""
    with importable("miles", miles()):
        yield importlib.import_module("miles.utils.replay_base")


@pytest.fixture(scope="module")
def slime_routing_replay() -> Iterator[ModuleType]:
    """`slime.utils.routing_replay` of a given checkout; the stand-in where there is none."""
    with importable("slime", checkout("slime") or STAND_INS):
        yield importlib.import_module("slime.utils.routing_replay")


@pytest.fixture(scope="module")
def nemo_rl_router_replay() -> Iterator[ModuleType]:
    """`nemo_rl.models.megatron.router_replay` of a given checkout; the stand-in where there is none."""
    given = checkout("nemo_rl")
    with importable("nemo_rl", given or STAND_INS), pytest.MonkeyPatch.context() as patch:
        if given is not None:
            # Types of its configuration alone, but for a patch of transformers, of which it refuses ours.
            types = ModuleType("nemo_rl.models.policy")
            types.__path__ = [str(given / "nemo_rl" / "models" / "policy")]
            types.PolicyConfig = dict
            patch.setitem(sys.modules, types.__name__, types)
        # What its import sets.
        for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_UV_RUN_RUNTIME_ENV"):
            patch.setenv(name, "0")
        yield importlib.import_module("nemo_rl.models.megatron.router_replay")


@pytest.fixture(scope="module")
def slime_modules(slime_routing_replay: ModuleType) -> Iterator[dict[str, ModuleType]]:
    """Those modules of slime that routes pass on their way, by their last name; of the same slime."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        # slime imports them for what no test here calls.
        for name in ("wandb", "pylatexenc"):
            if importlib.util.find_spec(name) is None:
                monkeypatch.setitem(sys.modules, name, MagicMock(__path__=[], __spec__=None))
                for part in ("latex2text",):
                    monkeypatch.setitem(sys.modules, f"{name}.{part}", MagicMock())
        paths = ("utils.types", "ray.rollout", "backends.megatron_utils.actor", "backends.megatron_utils.data")
        yield {path.rpartition(".")[2]: importlib.import_module(f"slime.{path}") for path in paths}


@pytest.fixture
def pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queues of stacks record into pinned memory, of which there is none without a GPU: here into any."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, pin_memory=False, **kwargs: empty_like(*args, **kwargs))
