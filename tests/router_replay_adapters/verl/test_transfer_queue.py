"""Masks in the samples that verl's trainer sends through TransferQueue, in a small Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict

from router_replay.errors import DataError
from router_replay.masks import RoutingMasks
from router_replay_adapters.verl.packed import KEY, PackedRoutes, masks_of
from tests.megatron_router_replay.batches import Batch, random_batch
from tests.router_replay_adapters.verl.rollout import agent_loop_worker
from tests.router_replay_adapters.verl.test_packed import GEOMETRY, all_same

# isort: split
import cpu_engines.megatron  # noqa: F401 (before anything that may import Megatron)

# isort: split
import ray
import transfer_queue
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ
from verl.utils import tensordict_utils as tu
from verl.utils.transferqueue_utils import tqbridge

import router_replay_adapters.verl  # noqa: F401

LENGTHS = (12, 9)


@pytest.fixture(scope="module")
def queue() -> Iterator[Any]:
    ray.init(num_cpus=3, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    transfer_queue.init(OmegaConf.create({"backend": {"SimpleStorage": {"num_data_storage_units": 1}}}))
    yield transfer_queue
    transfer_queue.close()
    ray.shutdown()


@pytest.fixture(scope="module")
def batch() -> Batch:
    return random_batch(GEOMETRY, LENGTHS, seed=1, codec="rank")


def output(ids: np.ndarray, masks: RoutingMasks | None) -> AgentLoopOutput:
    """A sample of verl's agent loop; without masks, one in which nothing was sampled."""
    return AgentLoopOutput(
        prompt_ids=ids[:4].tolist(),
        response_ids=ids[4:].tolist(),
        response_mask=[int(masks is not None)] * len(ids[4:]),
        routed_experts=None if masks is None else PackedRoutes(masks, ids),
        metrics=AgentLoopMetrics(),
    )


@tqbridge()
def taken(data: TensorDict) -> tuple[list[RoutingMasks | None] | None, list[torch.Tensor]]:
    """What a worker of the trainer is called with."""
    return masks_of(data.get(KEY)), list(data["input_ids"].unbind())


def test_masks_reach_the_trainers_workers(
    queue: Any, batch: Batch, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the agent loop's own put, the samples that fill up a batch, and the bridge around a worker's methods."""
    monkeypatch.setenv("SGLANG_ROUTER_CAPTURE", "1")
    worker = agent_loop_worker(AgentLoopWorkerTQ.__ray_metadata__.modified_class, small_model)
    ids = [batch.token_ids[row, :length].numpy() for row, length in enumerate(LENGTHS)]
    outputs = [output(ids[0], batch.masks[0]), output(ids[1], None), output(ids[1], batch.masks[1])]
    asyncio.run(worker._agent_loop_postprocess(outputs, False, uid="u", session_id=0, global_steps=1))
    tags = queue.kv_list(partition_id="train")["train"]
    sent = queue.KVBatchMeta(keys=sorted(tags), tags=[tags[key] for key in sorted(tags)], partition_id="train")
    filled = upsample_batch_to_divisible_size(sent, 4, eos_token_id=0)
    assert len(filled) == 4
    masks, input_ids = taken(filled)
    assert all_same(masks, [batch.masks[0], None, batch.masks[1], None])
    for each, given in zip(masks, input_ids, strict=True):
        if each is not None:
            each.check_tokens(given)


def test_masks_themselves_would_not(queue: Any, batch: Batch) -> None:
    samples = [{"input_ids": torch.arange(3), KEY: each} for each in batch.masks]
    meta = queue.kv_batch_put(
        keys=["a", "b"], partition_id="bare", tags=[{}, {}], fields=tu.list_of_dict_to_tensordict(samples)
    )
    with pytest.raises(DataError, match="a batch of verl has a dict under 'routing_masks'"):
        taken(meta)
