"""What runs in a rank process: calls that come through a pipe, one after the other, in one gloo world.

The fork server imports this module, so that every rank starts with torch and Megatron in place.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import os
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import tests.megatron_router_replay.parallel.replaying  # noqa: F401 (what cases need, before the fork)
from cpu_engines.megatron import CpuDevice, world
from tests.megatron_router_replay.parallel.pool import pack, unpack


def serve(connection: Connection, rank: int, world_size: int, folder: Path) -> None:
    """Answer calls until the other end is closed.

    Args:
        connection: brings (module, function, arguments, seconds), takes (True, result) or (False, traceback).
        folder: where the ranks meet, and where what this one prints goes.
    """
    log = (folder / f"log{rank}").open("w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    gc.freeze()
    with CpuDevice(), world(rank, world_size, folder / "rendezvous"):
        while True:
            try:
                module, name, args, seconds = unpack(connection.recv_bytes())
            except EOFError:
                return
            # Says where a rank hangs, before it is killed.
            faulthandler.dump_traceback_later(max(1.0, seconds - 5), file=log)
            connection.send_bytes(pack(_answer(module, name, args)))
            faulthandler.cancel_dump_traceback_later()


def _answer(module: str, name: str, args: tuple[Any, ...]) -> tuple[bool, Any]:
    try:
        return True, getattr(importlib.import_module(module), name)(*args)
    except Exception:
        return False, traceback.format_exc()
    finally:
        # A process group ends with the last model that refers to it; each has threads that wake all the time.
        gc.collect()


def ready() -> int:
    """This rank's number, once all of them are there."""
    dist.barrier()
    return dist.get_rank()
