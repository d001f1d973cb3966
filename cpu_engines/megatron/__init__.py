"""Megatron-Core's own layers, in one process or several, on a machine without a GPU.

    with CpuDevice(), single_process():
        model = GPTModel(...)

Import this package before anything of `megatron.core`: an installed FlashMLA raises OSError where there is no
CUDA driver, Megatron expects an ImportError only, and this package makes it one.
"""

import sys

if "flash_mla" not in sys.modules:
    # A None entry makes the import system raise ModuleNotFoundError, which is what Megatron catches.
    sys.modules["flash_mla"] = None  # type: ignore[assignment]

from cpu_engines.megatron.attention import PackedDotProductAttention
from cpu_engines.megatron.device import CpuDevice
from cpu_engines.megatron.parallel import model_parallel, process_group, single_process, world

__all__ = ["CpuDevice", "PackedDotProductAttention", "model_parallel", "process_group", "single_process", "world"]
