"""An SGLang plugin that supplies on the CPU the leaf kernels of the hierarchical cache, and what several ranks lack.

Found by its metadata, since this folder is on the server's path. It does nothing unless the server was started with
`--enable-hierarchical-cache`, with more than one rank, or with `_DECODE_VARIABLE` in its environment: other servers
need none of this.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Sequence

import torch

HICACHE_FLAG = "--enable-hierarchical-cache"
RANK_FLAGS = ("--tp-size", "--dp-size", "--pp-size")
_HICACHE_VARIABLE = "SGLANG_CPU_ENGINE_HICACHE"
_RANKS_VARIABLE = "SGLANG_CPU_ENGINE_RANKS"
_DECODE_VARIABLE = "SGLANG_CPU_ENGINE_BATCHED_DECODE"


class _Event:
    """Work on the CPU is done when its call returns."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def record(self, *args: object) -> None: ...

    def wait(self, *args: object) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 0.01


class _Stream:
    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def wait_event(self, *args: object) -> None: ...

    def wait_stream(self, *args: object) -> None: ...

    def synchronize(self) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: object) -> None: ...


def _transfer(
    src_layers: Sequence[torch.Tensor],
    dst_layers: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    for source, destination in zip(src_layers, dst_layers, strict=True):
        destination[dst_indices.to(destination.device)] = source[src_indices.to(source.device)]


def _transfer_pages_to_host(
    src_ptrs: Sequence[torch.Tensor],
    dst_ptrs: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """From all layers' K, then V, to a buffer `[page, layer, token of the page, ...]` for each of the two."""
    num_layers = len(src_ptrs) // 2
    for number, layer in enumerate(src_ptrs):
        host = dst_ptrs[number // num_layers]
        host[dst_indices // page_size, number % num_layers, dst_indices % page_size] = layer[src_indices]


def _transfer_layer_from_pages(
    src_ptrs: Sequence[torch.Tensor],
    dst_ptrs: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    layer_id: int,
    page_size: int,
) -> None:
    for host, layer in zip(src_ptrs, dst_ptrs, strict=True):
        layer[dst_indices] = host[src_indices // page_size, layer_id, src_indices % page_size]


def load() -> None:
    names = {argument.split("=")[0] for argument in sys.argv}
    for flags, variable, supply in (
        ({HICACHE_FLAG}, _HICACHE_VARIABLE, _supply_hicache),
        (set(RANK_FLAGS), _RANKS_VARIABLE, _supply_ranks),
    ):
        if names & flags or os.environ.get(variable) == "1":
            # Child processes do not see the command line.
            os.environ[variable] = "1"
            supply()
    if os.environ.get(_DECODE_VARIABLE) == "1":
        import batched_decode

        batched_decode.supply()


def _supply_hicache() -> None:
    torch.cpu.Event, torch.cpu.Stream = _Event, _Stream
    torch.cpu.current_stream = lambda *args: _Stream()
    torch.cpu.stream = lambda stream: _Stream()
    torch.Tensor.record_stream = lambda self, *args: None
    # Imported here: most servers have no hierarchical cache.
    import sglang.srt.mem_cache.pool_host.base as base
    import sglang.srt.mem_cache.pool_host.mha as mha

    # SGLang leaves 10 GiB to others, which a machine without a GPU may not have; a test's pool takes some megabytes.
    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 0
    # Nothing can be pinned without a GPU.
    empty_page = mha.MHATokenToKVPoolHost.get_dummy_flat_data_page

    @functools.wraps(empty_page)
    def unpinned_empty_page(self: mha.MHATokenToKVPoolHost) -> torch.Tensor:
        self.pin_memory = False
        return empty_page(self)

    mha.MHATokenToKVPoolHost.get_dummy_flat_data_page = unpinned_empty_page
    mha.transfer_kv_direct = _transfer
    mha.transfer_kv_all_layer_direct_lf_pf = _transfer_pages_to_host
    mha.transfer_kv_per_layer_direct_pf_lf = _transfer_layer_from_pages


def _supply_ranks() -> None:
    from sglang.srt.distributed.parallel_state import GroupCoordinator
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    create = GroupCoordinator.__init__
    signature = inspect.signature(create)

    @functools.wraps(create)
    def create_without_nccl(self: GroupCoordinator, *args: object, **kwargs: object) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.arguments["use_pynccl"] = False
        create(*bound.args, **bound.kwargs)

    GroupCoordinator.__init__ = create_without_nccl
    # Attention data parallelism pads batches as a graph does, and asks with what.
    TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value = lambda self: 1
