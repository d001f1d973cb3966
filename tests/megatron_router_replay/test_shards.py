"""A rank's places against what Megatron and verl cut themselves, on every rank of several worlds.

The process groups are Megatron's own; torch's fake backend stands for the other ranks, since cutting sends nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from cpu_engines.megatron import CpuDevice
from megatron_router_replay.shards import rank_shards
from router_replay.errors import PairingError
from router_replay.replay import BatchLayout, Shards

# isort: split
from megatron.core import parallel_state
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank

WORLDS = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 3), (3, 2), (4, 2), (2, 4)]
"""Tensor- and context-parallel sizes."""


@pytest.fixture(scope="module", autouse=True)
def megatron() -> Iterator[None]:
    """No process group of this folder's usual kind: each test sets up ranks of its own."""
    with CpuDevice():
        yield


@contextlib.contextmanager
def rank_of(rank: int, world: int, tensor: int = 1, context: int = 1, *, hybrid: bool = False) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor,
            context_parallel_size=context,
            hybrid_context_parallel=hybrid,
            create_gloo_process_groups=False,
        )
        yield
    finally:
        parallel_state.destroy_model_parallel()
        # Megatron leaves these behind.
        parallel_state._HYBRID_DP_CP_GROUPS.clear()
        dist.destroy_process_group()


def config(tensor: int = 1, context: int = 1, *, sequence_parallel: bool | None = None) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=24,
        num_attention_heads=12,
        tensor_model_parallel_size=tensor,
        context_parallel_size=context,
        sequence_parallel=tensor > 1 if sequence_parallel is None else sequence_parallel,
    )


def ids_of_places(layout: BatchLayout) -> Tensor:
    """Token id of every place, -1 for padding."""
    values = torch.full((layout.num_places,), -1)
    inside = ~layout.is_padding
    values[inside] = layout.token_ids[layout.cu_seqlens[layout.sequence[inside]] + layout.position[inside]]
    return values


def routed_by_megatron(called: Tensor) -> Tensor:
    """Input ids `[B, S]` as the routers see them: `[S, B]` scattered over sequence-parallel ranks."""
    return scatter_to_sequence_parallel_region(called.T.contiguous()).flatten()


@pytest.mark.parametrize(("tensor", "context"), WORLDS)
def test_padded_batches_are_cut_as_megatron_cuts_them(tensor, context):
    width, batch, world = 4 * context * tensor, 3, 2 * tensor * context
    lengths = torch.tensor([width, width - 3, 1])
    whole = torch.arange(1, batch * width + 1).view(batch, width)
    right = whole.where(torch.arange(width) < lengths[:, None], -1)
    left = whole.where(torch.arange(width) >= width - lengths[:, None], -1)
    layouts = [(ids, BatchLayout.padded(ids, lengths, side=side)) for ids, side in ((right, "right"), (left, "left"))]
    for rank in range(world):
        with rank_of(rank, world, tensor, context):
            # A context-parallel group of None would be the world.
            group = parallel_state.get_context_parallel_group()
            shards = rank_shards(config(tensor, context))
            for ids, layout in layouts:
                called = get_batch_on_this_cp_rank({"tokens": ids, "cu_seqlens": None}, False, cp_group=group)["tokens"]
                assert torch.equal(shards.called(layout).called_ids(), called)
                expected = routed_by_megatron(called) if tensor > 1 else called.T.flatten()
                assert torch.equal(ids_of_places(shards.routed(layout)), expected)


@pytest.mark.parametrize(("tensor", "context"), WORLDS)
def test_packs_are_cut_as_verl_cuts_them(tensor, context):
    """Nested input of its engine, and padded input of its other path, with 0 where it pads and ids from 1."""
    from verl.models.mcore.util import preprocess_packed_seqs, preprocess_thd_engine

    lengths = [13, 4 * tensor * context, 1, 30]
    ids = torch.arange(1, sum(lengths) + 1)
    sequences = torch.nested.nested_tensor_from_jagged(ids, torch.tensor([0, *lengths]).cumsum(0))
    padded = torch.nested.to_padded_tensor(sequences, 0)
    layout = BatchLayout.jagged(sequences, tensor * context * 2 if context > 1 else tensor)
    for rank in range(tensor * context):
        with rank_of(rank, tensor * context, tensor, context):
            shards = rank_shards(config(tensor, context))
            called, parameters, _ = preprocess_thd_engine(sequences)
            assert torch.equal(layout.cut_bounds, parameters.cu_seqlens_q_padded.long())
            assert torch.equal(shards.called(layout).called_ids().clamp(min=0), called)
            if tensor > 1:
                expected = routed_by_megatron(called)
                assert torch.equal(ids_of_places(shards.routed(layout)).clamp(min=0), expected)
            called, _ = preprocess_packed_seqs(padded, padded > 0)
            assert torch.equal(shards.called(layout).called_ids().clamp(min=0), called)


@pytest.mark.parametrize("context", [2, 3, 4])
def test_bounds_of_verls_fp8_packs(context):
    """There the last sequence is stretched, so that its halves lie elsewhere: its own bounds are handed over."""
    from verl.models.mcore.util import preprocess_thd_engine

    lengths = [13, 1, 30]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    sequences = torch.nested.nested_tensor_from_jagged(torch.arange(1, sum(lengths) + 1), offsets)
    for rank in range(context):
        with rank_of(rank, context, 1, context):
            called, parameters, _ = preprocess_thd_engine(sequences, use_fp8_padding=True)
            layout = BatchLayout.jagged(sequences, cu_seqlens=parameters.cu_seqlens_q_padded)
            shards = rank_shards(config(1, context))
            assert torch.equal(shards.called(layout).called_ids().clamp(min=0), called)


@pytest.mark.parametrize("context", [1, 2, 4])
def test_contiguous_packs_are_cut_as_verl_cuts_them(context, monkeypatch):
    from verl.models.mcore import util

    # Only parameters of Megatron's dev branch say how a pack was cut; what is cut is the same.
    monkeypatch.setattr(util, "_PACKED_SEQ_PARAMS_HAS_CP_PARTITION_MODE", True)
    monkeypatch.setattr(util, "PackedSeqParams", lambda **fields: fields)
    lengths = [13, 1, 30]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    sequences = torch.nested.nested_tensor_from_jagged(torch.arange(1, sum(lengths) + 1), offsets)
    layout = BatchLayout.jagged(sequences, 2 * context)
    for rank in range(2 * context):
        with rank_of(rank, 2 * context, 2, context):
            called, _, _ = util.preprocess_thd_engine(sequences, cp_layout="contiguous")
            shards = rank_shards(config(2, context), "contiguous")
            assert torch.equal(shards.called(layout).called_ids().clamp(min=0), called)
            assert torch.equal(ids_of_places(shards.routed(layout)).clamp(min=0), routed_by_megatron(called))


def test_without_sequence_parallelism_every_rank_routes_all_places():
    for rank in range(4):
        with rank_of(rank, 4, 2, 2):
            assert rank_shards(config(2, 2, sequence_parallel=False)) == Shards(2, rank // 2)
            assert rank_shards(config(2, 2)) == Shards(2, rank // 2, "zigzag", 2, rank % 2)


@pytest.mark.parametrize(("tensor", "context"), [(1, 1), (1, 2), (2, 2)])
def test_microbatches_with_a_context_size_of_their_own(tensor, context):
    """Hybrid context parallelism: groups of 2 and 4 of 8 data- and context-parallel ranks, all of them, and one."""
    world = 8 * tensor
    width = 16 * tensor
    layout = BatchLayout.packed(torch.arange(width), [0, width])
    for rank in range(world):
        with rank_of(rank, world, tensor, context, hybrid=True):
            for size in (1, 2, 4, 8):
                batch = {
                    "tokens": torch.arange(width)[None],
                    "cu_seqlens": torch.tensor([[0, width]]),
                    "local_cp_size": torch.tensor(size),
                }
                here = get_batch_on_this_cp_rank(
                    batch, True, hybrid_cp_group_func=parallel_state.get_hybrid_data_context_parallel_groups
                )
                shards = rank_shards(config(tensor, context), context_size=size)
                assert shards.context_size == size
                assert torch.equal(shards.called(layout).called_ids(), here["tokens"])
                assert shards.sequence_rank == rank % tensor


def test_groups_of_the_dev_branch(monkeypatch):
    """It has another name for them; verl's dynamic context parallelism needs that branch."""
    groups = parallel_state.get_hybrid_data_context_parallel_groups
    monkeypatch.setattr(parallel_state, "get_dynamic_data_context_parallel_groups", groups, raising=False)
    monkeypatch.delattr(parallel_state, "get_hybrid_data_context_parallel_groups")
    with rank_of(5, 8, hybrid=True):
        assert rank_shards(config(), context_size=4) == Shards(4, 1)


def test_groups_that_are_not_there():
    with rank_of(1, 8, hybrid=True), pytest.raises(PairingError, match="no group of 3 of the 8 data- and context-"):
        rank_shards(config(), context_size=3)
    with (
        rank_of(1, 8),
        pytest.raises(PairingError, match="with hybrid_context_parallel=True and take"),
    ):
        rank_shards(config(), context_size=2)


def test_one_rank_where_nothing_is_initialised():
    assert rank_shards(config()) == rank_shards(config(), context_size=1) == Shards()
    with pytest.raises(PairingError, match="2 ranks cannot share a microbatch: megatron"):
        rank_shards(config(), context_size=2)
    for sizes, name in (((2, 1), "tensor_model_parallel_size=2"), ((1, 2), "context_parallel_size=2")):
        with pytest.raises(PairingError, match=rf"has {name}, megatron.core.parallel_state 1 rank, for it is not init"):
            rank_shards(config(*sizes))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 2), "has tensor_model_parallel_size=1, megatron.core.parallel_state 2: build the model with the sizes"),
        ((2, 1), "has context_parallel_size=1, megatron.core.parallel_state 2: build the model with the sizes"),
    ],
)
def test_a_model_with_other_groups_than_parallel_states(sizes, message):
    with rank_of(0, 4, 2, 2), pytest.raises(PairingError, match=message):
        rank_shards(config(*sizes))
