"""One of two tensor-parallel ranks: trains, averages, swaps, saves and loads, and leaves what it saw in a file.

PYTHONPATH=. python tests/megatron_router_replay/tensor_parallel_rank.py RANK FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

# Nothing else is imported up here: saving starts a helper process, which imports this file again.
DECAY = 0.8
NUM_UPDATES = 6


def run(rank: int, folder: Path) -> None:
    import torch

    from cpu_engines.megatron import CpuDevice, process_group

    torch.set_num_threads(1)
    with CpuDevice(), process_group(rank, 2, folder / "rendezvous", tensor_parallel=2):
        record(rank, folder)


def record(rank: int, folder: Path) -> None:
    import torch
    from megatron.core import dist_checkpointing

    from megatron_router_replay.averages import ExponentialMovingAverage
    from tests.megatron_router_replay.small_gpt import gpt, logits, tracked, train_step

    model = gpt()
    ema = ExponentialMovingAverage(model, DECAY)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    trajectory = [tracked(model)]
    for _ in range(NUM_UPDATES):
        train_step(model, optimizer)
        ema.update()
        trajectory.append(tracked(model))
    averages = {name: value.clone() for name, value in ema.state_dict()["averages"].items()}

    by_hand = gpt(seed=1)
    with torch.no_grad():
        for name, target in {**dict(by_hand.named_parameters()), **dict(by_hand.named_buffers())}.items():
            if name in averages:
                target.copy_(averages[name])
        logits_by_hand = logits(by_hand)
        logits_before = logits(model)
        with ema.swapped_in():
            logits_inside = logits(model)

    checkpoint = folder / "checkpoint"
    if rank == 0:
        checkpoint.mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save({"ema": ema.sharded_state_dict(model.sharded_state_dict())}, str(checkpoint))
    torch.save(ema.state_dict(), folder / f"state{rank}.pt")

    other = gpt(seed=1)
    from_shards = ExponentialMovingAverage(other, DECAY)
    template = {"ema": from_shards.sharded_state_dict(other.sharded_state_dict())}
    from_shards.load_state_dict(dist_checkpointing.load(template, str(checkpoint))["ema"])
    from_own_file = ExponentialMovingAverage(other, DECAY)
    from_own_file.load_state_dict(torch.load(folder / f"state{rank}.pt"))

    found = {
        "trajectory": trajectory,
        "averages": averages,
        "total_weight": ema.total_weight,
        "partition_dims": {
            name: p.partition_dim for name, p in model.named_parameters() if hasattr(p, "partition_dim")
        },
        "after_swap": tracked(model),
        "logits_before": logits_before,
        "logits_inside": logits_inside,
        "logits_by_hand": logits_by_hand,
        "logits_after": logits(model).detach(),
        "from_shards": from_shards.state_dict(),
        "from_own_file": from_own_file.state_dict(),
    }
    torch.save(found, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    run(int(sys.argv[1]), Path(sys.argv[2]))
