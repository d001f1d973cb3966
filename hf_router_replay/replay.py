"""Replay of one attached model of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from hf_router_replay.layer_replay import LayerReplay
from hf_router_replay.live_model import LiveRouter
from hf_router_replay.refusals import check_routers
from router_replay.errors import InputError
from router_replay.masks.geometry import RoutingGeometry
from router_replay.replay.attached import AttachedReplay
from router_replay.replay.called_ids import watch
from router_replay.replay.layout import BatchLayout
from router_replay.replay.shards import Shards


class Replay(AttachedReplay):
    """Replay attached to one model; as a context manager it removes itself at the end.

    Routers see the batch that the model is called with, whole. Where ranks share its sequences (Ulysses), `place`,
    `microbatch` and `record` are given `shards`: `Shards(ranks, rank, "contiguous")` of whole sequences.
    """

    batch_first = True
    # The routers' own choice is there in any case, and no ranks share the experts.
    spread = False

    def __init__(
        self,
        routers: Mapping[int, LiveRouter],
        geometry: RoutingGeometry,
        device: torch.device,
        *,
        embedding: nn.Module,
        overlap_every: int | None,
    ) -> None:
        super().__init__([routers], geometry, device, with_ids=[True], overlap_every=overlap_every)
        self._routers = routers
        with self._installing() as undo:
            for layer, router in routers.items():
                ours = LayerReplay(self, layer, router.family.gates)
                undo.callback(router.module.register_forward_hook(ours).remove)
            # A torch.nn.Embedding's parameter.
            undo.callback(watch(embedding, self._compare_ids, "input").remove)

    def _part(self, layout: BatchLayout, shards: Shards | None) -> Shards:
        if shards is None and layout.called_shape is None:
            raise InputError(
                "this layout is of some places of a batch (`at`, or made by hand), and nothing says that they are in"
                " the order of the model's routers, sequence by sequence: pass the layout of the whole batch, or"
                " shards=Shards() where they are"
            )
        return replace(Shards() if shards is None else shards, batch_first=True)

    def _check_settings(self) -> None:
        check_routers(self._routers)
