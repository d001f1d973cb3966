"""An SGLang plugin that supplies the leaf kernels of the hierarchical cache on the CPU.

Found by its metadata, since this folder is on the server's path. It does nothing unless the server was started with
`--enable-hierarchical-cache`: other servers need none of this.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch

HICACHE_FLAG = "--enable-hierarchical-cache"
_VARIABLE = "SGLANG_CPU_ENGINE_HICACHE"


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


def load() -> None:
    if HICACHE_FLAG not in sys.argv and os.environ.get(_VARIABLE) != "1":
        return
    # Child processes do not see the command line.
    os.environ[_VARIABLE] = "1"
    torch.cpu.Event, torch.cpu.Stream = _Event, _Stream
    torch.cpu.current_stream = lambda *args: _Stream()
    torch.cpu.stream = lambda stream: _Stream()
    torch.Tensor.record_stream = lambda self, *args: None
    # Imported here: most servers have no hierarchical cache.
    import sglang.srt.mem_cache.pool_host.mha as mha

    mha.transfer_kv_direct = _transfer
