"""What the rollout engine is given of the trainer's weights: the same, or rounded and moved as a mismatch needs."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_ROUTER = re.compile(r"\.mlp\.gate\.weight$")
_LINEAR = re.compile(r"\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)\.weight$")
_FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class RolloutWeights:
    """A function of the trainer's tensors that is the same in every step, so that its error persists, as rounding's.

    Attributes:
        linears: how the matrices of attention and MLPs are rounded, a row at a time: not at all, to fp8 (e4m3) with
            one scale a row, or to integers of so many bits, symmetric, one scale a row.
        router_bits: of the routers' matrices, rounded likewise to integers; 0 for not at all.
        router_offset: standard deviations of its own weights by which each router's matrix is moved, in a direction
            drawn once from the tensor's name.
    """

    linears: str = "exact"
    router_bits: int = 0
    router_offset: float = 0.0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"exact|fp8|int[2-8]", self.linears):
            raise ValueError(f"linears cannot be {self.linears!r}: they are exact, fp8, or int2 to int8")
        if self.router_bits not in (0, *range(2, 9)):
            raise ValueError(f"routers cannot have {self.router_bits} bits: choose 2 to 8, or 0 for exact ones")

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors with those changed that this says; in float32, whatever they were rounded to."""
        return {name: self._of(name, tensor) for name, tensor in tensors.items()}

    def _of(self, name: str, tensor: Tensor) -> Tensor:
        if _ROUTER.search(name):
            if self.router_offset:
                tensor = tensor + self.router_offset * tensor.std() * _direction(name, tensor)
            return _integers(tensor, self.router_bits) if self.router_bits else tensor
        if self.linears == "exact" or not _LINEAR.search(name):
            return tensor
        return _fp8(tensor) if self.linears == "fp8" else _integers(tensor, int(self.linears.removeprefix("int")))


def _direction(name: str, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(like.shape, generator=generator)


def _fp8(rows: Tensor) -> Tensor:
    scale = _largest(rows) / torch.finfo(_FP8).max
    return (rows / scale).to(_FP8).to(rows.dtype) * scale


def _integers(rows: Tensor, bits: int) -> Tensor:
    scale = _largest(rows) / (2 ** (bits - 1) - 1)
    return (rows / scale).round() * scale


def _largest(rows: Tensor) -> Tensor:
    # A row of zeros stays one.
    return rows.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
