"""One of two ranks of FSDP2 over gloo: trains on its own microbatches, and leaves what it saw in a file.

PYTHONPATH=. python tests/hf_router_replay/fsdp_rank.py RANK FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from hf_router_replay import attach
from tests.hf_router_replay.small_models import (
    FAMILIES,
    batch_of,
    blocks,
    build,
    computed_experts,
    logits_of,
    loss_of,
    router_of,
)

NUM_RANKS = 2
WAYS = ("attach first", "shard first", "checkpointed", "routers by themselves")
# One way for each family, and every way for routers of three kinds.
CASES = [
    (family, way)
    for family in FAMILIES
    for way in WAYS
    if way == "attach first" or family in ("qwen3_moe", "deepseek_v3", "gpt_oss")
]


def batches(family: str, rank: int) -> list[Any]:
    """A rank's two microbatches."""
    return [batch_of(family, 10 * rank + number) for number in (1, 2)]


def sharded(model: nn.Module, way: str) -> nn.Module:
    if way == "routers by themselves":
        for block in blocks(model).values():
            fully_shard(router_of(block))
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def run(family: str, way: str, rank: int) -> dict[str, Any]:
    model = build(family).train()
    if way == "checkpointed":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    replay = attach(model, overlap_every=None) if way == "attach first" else None
    sharded(model, way)
    replay = replay or attach(model, overlap_every=None)
    logits: list[Tensor] = []
    with replay, computed_experts(model) as seen:
        for batch in batches(family, rank):
            with replay.microbatch(batch.masks, batch.layout):
                logits.append(logits_of(model, batch))
            loss_of(logits[-1], batch).backward()
        replay.check()
    return {
        "logits": [each.detach() for each in logits],
        "experts": seen,
        "gradients": {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None},
    }


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=NUM_RANKS)
    torch.save({case: run(*case, rank) for case in CASES}, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
