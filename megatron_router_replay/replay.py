"""Replay of one attached Megatron model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import nn

from megatron_router_replay.flex_gates import FlexGates
from megatron_router_replay.layer_replay import LayerReplay, index_dtype
from megatron_router_replay.model_groups import ModelGroups
from megatron_router_replay.recompute import checkpoint_patches
from megatron_router_replay.router_settings import RouterSettings
from router_replay.masks.geometry import RoutingGeometry
from router_replay.replay.attached import AttachedReplay
from router_replay.replay.called_ids import watch
from router_replay.replay.layout import BatchLayout
from router_replay.replay.shards import Shards


class Replay(AttachedReplay):
    """Replay attached to one model; as a context manager it removes itself at the end.

    This rank's part of a batch is what `parallel_state` says, unless `place`, `microbatch` or `record` are given
    `shards`: as of `shards_of` where another number of context-parallel ranks shares each microbatch
    (`local_cp_size`), or `Shards()` for a layout of this rank's places.
    """

    def __init__(
        self,
        routers_by_chunk: Sequence[dict[int, TopKRouter]],
        geometry: RoutingGeometry,
        device: torch.device,
        *,
        settings: RouterSettings,
        flex: FlexGates,
        embeddings: Sequence[Sequence[nn.Module]],
        groups: ModelGroups,
        overlap_every: int | None,
    ) -> None:
        super().__init__(
            routers_by_chunk,
            geometry,
            device,
            with_ids=[bool(each) for each in embeddings],
            overlap_every=overlap_every,
            tensor_groups=groups.tensor_groups,
            step_groups=groups.step_groups,
        )
        self._settings = settings
        self._groups = groups
        dtype = index_dtype(device)
        with self._installing(checkpoint_patches()) as undo:
            for made_right in (settings, flex):
                made_right.apply()
                undo.callback(made_right.remove)
            for layer, router in ((layer, router) for routers in routers_by_chunk for layer, router in routers.items()):
                ours = LayerReplay(self, layer, router.layer_number, dtype)
                undo.callback(_put_back, router, ours, router.router_replay)
                router.router_replay = ours
            for embedding in (each for of_chunk in embeddings for each in of_chunk):
                undo.callback(watch(embedding, self._compare_ids).remove)

    def shards_of(self, context_size: int) -> Shards:
        """What this rank's routers see of a microbatch that `context_size` context-parallel ranks share.

        Raises:
            InputError, PairingError: a number of ranks that cannot share one.
        """
        return self._groups.shards(context_size)

    def _part(self, layout: BatchLayout, shards: Shards | None) -> Shards:
        if shards is None:
            return self._groups.shards(None)
        # Each context-parallel rank may now have microbatches of its own.
        self._checks.set_apart(self._groups.context_group)
        return shards

    def _check_settings(self) -> None:
        self._settings.check_now()


def _put_back(router: TopKRouter, ours: LayerReplay, original: object) -> None:
    if router.router_replay is ours:
        router.router_replay = original
