"""What reads Megatron's routing apart from the code under test, and the random batches of these tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.random_batches import Batch, gradients, random_batch, random_indices

__all__ = ["Batch", "dispatched_maps", "experts_of", "gradients", "random_batch", "random_indices"]


@contextlib.contextmanager
def dispatched_maps(model: torch.nn.Module) -> Iterator[dict[int, list[Tensor]]]:
    """Routing maps `bool [num_places, E]` that the token dispatchers receive, in order, by 0-based decoder layer."""
    maps: dict[int, list[Tensor]] = {}
    dispatchers: list[Any] = []
    for index, layer in enumerate(model.decoder.layers):
        dispatcher = getattr(layer.mlp, "token_dispatcher", None)
        if dispatcher is None:
            continue
        maps[index] = []
        original = dispatcher.dispatch_preprocess

        def spy(
            hidden: Tensor, routing_map: Tensor, probs: Tensor, *, _original: Any = original, _seen: Any = maps[index]
        ) -> Any:
            _seen.append(routing_map.detach().clone())
            return _original(hidden, routing_map, probs)

        dispatcher.dispatch_preprocess = spy
        dispatchers.append(dispatcher)
    try:
        yield maps
    finally:
        for dispatcher in dispatchers:
            del dispatcher.dispatch_preprocess


def experts_of(routing_map: Tensor, place: int) -> set[int]:
    return set(routing_map[place].nonzero().flatten().tolist())
