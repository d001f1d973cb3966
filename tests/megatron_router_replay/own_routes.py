"""Masks that are a model's own choice, so that comparing them with it finds nothing wrong."""

from __future__ import annotations

import torch

from cpu_engines.megatron.logprobs import forward_logits
from megatron_router_replay import Replay
from router_replay.masks.masks import RoutingMasks
from router_replay.replay import join_parts
from tests.megatron_router_replay.batches import Batch


def own_masks(model: torch.nn.Module, replay: Replay, batch: Batch) -> list[RoutingMasks]:
    """Of the padded batch's sequences, up to their last token but one."""
    with torch.no_grad(), replay.record(batch.layout) as recorded:
        forward_logits(model, batch.token_ids)
    masks = join_parts([recorded.part()])
    return [
        one.cut(length - 1, ids[:length])
        for one, length, ids in zip(masks, batch.lengths, batch.token_ids, strict=True)
    ]


def wrong_rows(maps: dict[int, list[torch.Tensor]], batch: Batch) -> int:
    """How many recorded (place, layer) rows of a padded batch were dispatched to other experts, in the last pass."""
    return sum(
        set(maps[layer][-1][place].nonzero().flatten().tolist()) != experts
        for layer in maps
        for place, experts in batch.recorded(layer)
    )
