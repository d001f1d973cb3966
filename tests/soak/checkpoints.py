"""Checkpoints that differ in the router of the last layer alone."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True)
class Checkpoints:
    """Folders of one model, with the experts of the last layer's router exchanged among each other.

    Attributes:
        folders: Hugging Face folders; the first is the model as it was.
        orders: `int64 [checkpoints, experts]`: the logits of checkpoint c are `logits[orders[c]]` of the first one's.
    """

    folders: list[Path]
    orders: Tensor


def make_checkpoints(model: Path, folder: Path, count: int, seed: int) -> Checkpoints:
    """Write `count - 1` variants of `model` into `folder`.

    An exchange of rows leaves the logits' sizes, and so their ties, as they were: no checkpoint is easier to check.
    """
    weights = load_file(model / "model.safetensors")
    routers = sorted(name for name in weights if name.endswith(".mlp.gate.weight"))
    last = max(routers, key=lambda name: int(name.split(".")[2]))
    generator = torch.Generator().manual_seed(seed)
    num_experts = len(weights[last])
    orders = [torch.arange(num_experts)]
    folders = [model]
    for number in range(1, count):
        order = torch.randperm(num_experts, generator=generator)
        variant = folder / f"checkpoint-{number}"
        shutil.copytree(model, variant)
        save_file({**weights, last: weights[last][order].contiguous()}, variant / "model.safetensors", {"format": "pt"})
        orders.append(order)
        folders.append(variant)
    return Checkpoints(folders, torch.stack(orders))
