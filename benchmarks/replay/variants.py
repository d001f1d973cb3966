"""One piece of work under native routing, under Megatron's RouterReplay, and under this package's replay."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_router_replay import BatchLayout, attach
from router_replay.masks import RoutingMasks
from router_replay.replay import join_parts

Work = Callable[[GPTModel, Callable[[], AbstractContextManager[Any]]], Any]
"""Runs with a model; what is inside the context is the forward pass."""

NATIVE, AGAIN, STOCK, OURS, WITH_NATIVE = (
    *("native", "native again", "stock RouterReplay", "replay"),
    "replay, 1 % of places native",
)
ORDER = (NATIVE, AGAIN, STOCK, OURS, WITH_NATIVE)


@contextlib.contextmanager
def variants(build: Callable[..., GPTModel], work: Work, layout: BatchLayout) -> Iterator[dict[str, Callable[[], Any]]]:
    """The same work in each variant, by name; all replay the routes that native routing takes, of the same load.

    For the block, since a replay is attached.

    Args:
        build: makes a model; keyword arguments go to its configuration.
        work: with the token ids of `layout`.
    """
    RouterReplay.clear_global_router_replay_instances()
    native, ours, stock = build(), build(), build(moe_enable_routing_replay=True)
    # Its own routes agree with these weights: the check of the overlap runs as in training.
    with attach(ours) as replay:
        with replay.record(layout) as recorder:
            work(ours, contextlib.nullcontext)
        masks = join_parts([recorder.part()])
        whole, holed = replay.place(masks, layout), replay.place(with_holes(masks), layout)
        targets = [whole.experts(layer).long() for layer in replay.layers]
        yield {
            # No model runs twice in a row, which would find its weights in the cache.
            NATIVE: lambda: work(native, contextlib.nullcontext),
            OURS: lambda: work(ours, lambda: replay.microbatch(whole)),
            AGAIN: lambda: work(native, contextlib.nullcontext),
            WITH_NATIVE: lambda: work(ours, lambda: replay.microbatch(holed)),
            STOCK: lambda: work(stock, lambda: _stock(targets)),
        }
    RouterReplay.clear_global_router_replay_instances()


@contextlib.contextmanager
def _stock(targets: list[Tensor]) -> Iterator[None]:
    """Megatron's guide: set the data, set the action, run, clear both."""
    RouterReplay.set_replay_data(targets)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    yield
    RouterReplay.clear_global_indices()
    RouterReplay.clear_global_router_replay_action()


def with_holes(masks: list[RoutingMasks]) -> list[RoutingMasks]:
    """The same masks, of which one row of a hundred is not valid, one of each sequence at least."""
    generator = torch.Generator().manual_seed(1)
    holed = []
    for one in masks:
        holes = torch.randperm(one.num_tokens - 1, generator=generator)[: max(1, one.num_tokens // 100)]
        holed.append(replace(one, valid=one.valid.index_fill(0, holes, False)))
    return holed


def num_operators(run: Callable[[], Any]) -> int:
    """Operators that it runs, views left out."""
    with _Counter() as counter:  # type: ignore[no-untyped-call]
        run()
    return counter.count


class _Counter(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))
