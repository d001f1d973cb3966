"""Megatron's real layers on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cpu_engines.megatron import CpuDevice, single_process


@pytest.fixture(scope="module", autouse=True)
def megatron() -> Iterator[None]:
    """Process groups and CUDA stand-ins; by module, since a folder that is no package has no scope of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with CpuDevice(), single_process():
        yield
    torch.set_num_threads(threads)
