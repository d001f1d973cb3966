"""Megatron's real layers on the CPU, and a small random checkpoint to fill them with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from cpu_engines.megatron import CpuDevice, single_process
from router_replay.masks.geometry import RoutingGeometry
from tests.megatron_router_replay.batches import Batch, random_batch

BuildModel = Callable[..., torch.nn.Module]


@pytest.fixture(scope="module", autouse=True)
def megatron() -> Iterator[None]:
    """Process groups and CUDA stand-ins; by module, since a folder that is no package has no scope of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with CpuDevice(), single_process():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE: 4 layers, the first dense, 16 experts, top-4; init std 0.06 makes routing decisive."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        moe_intermediate_size=24,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        mlp_only_layers=[0],
        initializer_range=0.06,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 5e4},
    )
    folder = tmp_path_factory.mktemp("qwen3_moe")
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def geometry() -> RoutingGeometry:
    """The geometry of `checkpoint`, written out."""
    return RoutingGeometry(num_layers=4, moe_layers=(1, 2, 3), num_experts=16, top_k=4)


@pytest.fixture
def build_model(checkpoint: Path, megatron: None) -> BuildModel:
    """A function that loads `checkpoint` into Megatron; keyword arguments as of `load_qwen3_moe`."""
    from cpu_engines.megatron import PackedDotProductAttention
    from cpu_engines.megatron.qwen3_moe import load_qwen3_moe

    def build(**overrides: object) -> torch.nn.Module:
        return load_qwen3_moe(checkpoint, **{"core_attention": PackedDotProductAttention, **overrides})

    return build


@pytest.fixture
def batch(geometry: RoutingGeometry) -> Batch:
    """Three sequences of 12, 9 and 5 tokens with random masks, a third of whose rows are not valid."""
    return random_batch(geometry, lengths=(12, 9, 5), seed=1)
