"""What the rollout engine is given of the weights."""

from __future__ import annotations

from pathlib import Path

import torch

from cpu_engines.megatron.logprobs import token_logprobs
from cpu_engines.megatron.qwen3_moe import hf_tensors, load_qwen3_moe
from examples.grpo.weights import export
from examples.small_model import CHECKPOINT


def test_an_export_is_the_model(model, tmp_path: Path):
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)), alpha=0.1)
    export(model, CHECKPOINT, tmp_path / "weights", dict)
    export(model, CHECKPOINT, tmp_path / "weights", dict)
    loaded = load_qwen3_moe(tmp_path / "weights", torch.float32)
    token_ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(token_logprobs(loaded, token_ids), token_logprobs(model, token_ids))
    assert [each.name for each in tmp_path.iterdir()] == ["weights"]


def test_tensors_are_those_of_the_checkpoint(model):
    from safetensors.torch import load_file

    wanted = {name: each for file in CHECKPOINT.glob("*.safetensors") for name, each in load_file(file).items()}
    found = hf_tensors(model)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name].to(each.dtype), each) for name, each in wanted.items())
