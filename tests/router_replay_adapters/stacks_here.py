"""Two stacks by what a test does with them: their own queues and functions, around a router of stock Megatron-Core."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Protocol

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from router_replay.upstream import Patch
from router_replay_adapters.refusals import SETTINGS
from tests.router_replay_adapters.routers import TopK

MEGATRON_ARGS = {row.setting: getattr(TransformerConfig, row.setting) for row in SETTINGS}
"""Of a stack's arguments those of Megatron that adapters look at, each as it is by itself."""


class StackHere(Protocol):
    """A stack in this process.

    Attributes:
        name: of `STACKS`.
        patches: what its adapter's `init` applies.
    """

    name: str
    patches: tuple[Patch, ...]

    def topk(self, default_compute_topk: TopK) -> TopK:
        """What its Megatron makes of a router's own top-k."""

    def register(self, router: torch.nn.Module) -> None:
        """Give a router a queue, as its Megatron does when it makes one."""

    def record(self, experts: Tensor) -> None:
        """Put experts `int [rows, K]` into the queue of the last router."""

    def set_stage(self, stage: str) -> None:
        """Say what routers do with their queues."""

    def switch_off(self) -> None:
        """Leave routers without replay, whatever the stage is."""

    def clear(self) -> None:
        """What it does at the end of a step."""

    def forget(self) -> None:
        """Empty its queues, whether routers asked or not."""


@contextlib.contextmanager
def applied(patches: tuple[Patch, ...]) -> Iterator[None]:
    """Patches around the block."""
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def remove(patches: tuple[Patch, ...]) -> None:
    """Undo one `init`."""
    for patch in patches:
        patch.remove()


class Miles:
    """The stack miles, by its module `miles.utils.replay_base`."""

    name = "miles"

    def __init__(self, module: ModuleType, patches: tuple[Patch, ...]) -> None:
        self.module = module
        self.patches = patches
        self.manager: Any = module.routing_replay_manager
        self.manager.replays = []
        self.manager.current = None
        self.manager.enabled = True

    def topk(self, default_compute_topk: TopK) -> TopK:
        return self.manager.get_topk_fn(default_compute_topk, return_probs=True)

    def register(self, router: torch.nn.Module) -> None:
        self.manager.register_to_module(router, "routing_replay")

    def record(self, experts: Tensor) -> None:
        self.manager.replays[-1].record(experts)

    def set_stage(self, stage: str) -> None:
        self.manager.stage = stage

    def switch_off(self) -> None:
        self.manager.enabled = False

    def clear(self) -> None:
        self.manager.clear_all()

    def forget(self) -> None:
        for queue in self.manager.replays:
            queue.clear()


class Slime:
    """The stack slime, by its module `slime.utils.routing_replay`."""

    name = "slime"

    def __init__(self, module: ModuleType, patches: tuple[Patch, ...], monkeypatch: pytest.MonkeyPatch) -> None:
        self.module = module
        self.patches = patches
        self._monkeypatch = monkeypatch
        monkeypatch.setenv("ENABLE_ROUTING_REPLAY", "1")
        module.RoutingReplay.all_routing_replays.clear()
        if hasattr(module, "accelerator"):
            monkeypatch.setattr(module.accelerator, "current_device", lambda: torch.device("cpu"))

    def topk(self, default_compute_topk: TopK) -> TopK:
        # Looked up in every call, as its Megatron does.
        return self.module.get_routing_replay_compute_topk(default_compute_topk)

    def register(self, router: torch.nn.Module) -> None:
        self.module.register_routing_replay(router)

    def record(self, experts: Tensor) -> None:
        self.module.RoutingReplay.all_routing_replays[-1].record(experts)

    def set_stage(self, stage: str) -> None:
        self._monkeypatch.setenv("ROUTING_REPLAY_STAGE", stage)

    def switch_off(self) -> None:
        self._monkeypatch.setenv("ENABLE_ROUTING_REPLAY", "0")

    def clear(self) -> None:
        self.module.RoutingReplay.clear_all()

    def forget(self) -> None:
        for queue in self.module.RoutingReplay.all_routing_replays:
            queue.clear()
