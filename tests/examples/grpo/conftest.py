"""The small model and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cpu_engines.megatron import CpuDevice, single_process
from cpu_engines.megatron.qwen3_moe import load_qwen3_moe
from examples.small_model import CHECKPOINT


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture
def model() -> Iterator[torch.nn.Module]:
    with CpuDevice(), single_process():
        yield load_qwen3_moe(CHECKPOINT, torch.float32).train()
