"""DeepEP's dispatcher, made to take the experts of the routing map and not those with the largest gates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher, _DeepepManager
from torch import Tensor, nn

from router_replay.errors import UnsupportedError


class FlexGates:
    """Wraps the `setup_metadata` of the flex dispatchers of replayed routers.

    `_DeepepManager.setup_metadata` turns the routing map into indices by `topk(probs)`. A native choice has the largest
    gates, a replayed one need not: where the gate of a replayed expert underflows to 0, any expert that was not chosen
    ties with it.

    Args:
        chunks: of the model.
        routers: those that are replayed.

    Raises:
        UnsupportedError: a flex dispatcher of another backend than DeepEP; nothing has been touched.
    """

    def __init__(self, chunks: Iterable[nn.Module], routers: Iterable[TopKRouter]) -> None:
        replayed = set(routers)
        dispatchers = [
            module.token_dispatcher
            for chunk in chunks
            for module in chunk.modules()
            if isinstance(module, BaseMoELayer) and module.router in replayed
        ]
        self._managers = [each._comm_manager for each in dispatchers if isinstance(each, MoEFlexTokenDispatcher)]
        self._wrappers: dict[Any, Callable[[Tensor, Tensor], None]] = {}
        for manager in self._managers:
            if not isinstance(manager, _DeepepManager):
                raise UnsupportedError(
                    f"replay runs DeepEP's flex dispatcher only, and this model was built with a"
                    f" {type(manager).__name__}: build it with moe_flex_dispatcher_backend='deepep', or with"
                    " moe_token_dispatcher_type='alltoall'"
                )

    def apply(self) -> None:
        """Put the wrappers in."""
        for manager in self._managers:
            if manager not in self._wrappers:
                manager.setup_metadata = self._wrappers[manager] = _by_the_map(manager)

    def remove(self) -> None:
        """Take out the wrappers that nobody wrapped again."""
        for manager, wrapper in self._wrappers.items():
            if vars(manager).get("setup_metadata") is wrapper:
                del manager.setup_metadata
        self._wrappers.clear()


def _by_the_map(manager: _DeepepManager) -> Callable[[Tensor, Tensor], None]:
    stock = manager.setup_metadata

    def setup_metadata(routing_map: Tensor, probs: Tensor) -> None:
        gates = probs.detach()
        tiny = torch.finfo(gates.dtype).tiny
        stock(routing_map, torch.where(routing_map, gates.clamp_min(tiny), 0))
        # The gates themselves, 0 or not, and their gradients are those of the router.
        manager.token_probs = probs.reshape(-1, manager.num_experts).gather(1, manager.token_indices)

    return setup_metadata
