"""The trainer's weights on their way to the rollout engine: a checkpoint on disk, and the request to load it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from safetensors.torch import save_file
from torch import Tensor

from cpu_engines.megatron.qwen3_moe import hf_tensors
from examples.multi_turn_replay.rollout import RolloutError, post

Rendered = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""From the trainer's float32 tensors, by their names in a Hugging Face checkpoint, to those of the rollout engine."""


def in_bfloat16(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """As an engine in bfloat16 has them."""
    return {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


def export(model: GPTModel, source: Path, folder: Path, rendered: Rendered = in_bfloat16) -> None:
    """Write the model as a Hugging Face checkpoint: the tensors of now, all else of the checkpoint that it came from.

    Args:
        folder: replaced if it is there; it appears when it is whole.
        rendered: what the rollout engine is given of the trainer's tensors.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, ignore=shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json"))
    # Copies: safetensors refuses tensors that share memory, as the parts of one parameter do.
    tensors = {name: tensor.contiguous().clone() for name, tensor in rendered(hf_tensors(model)).items()}
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def push(server_url: str, folder: Path, version: str) -> None:
    """Let the rollout engine load a checkpoint; rows that it records from then on have this version's name.

    Raises:
        RolloutError: it could not.
    """
    body = {"model_path": str(folder.resolve()), "weight_version": version}
    answer = post(server_url, "/update_weights_from_disk", body)
    if not answer.get("success"):
        raise RolloutError(f"the server at {server_url} did not load {folder}: {answer.get('message')}")
