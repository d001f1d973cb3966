"""LayerCode: how the experts of one MoE layer become a field of a row, and back."""

from __future__ import annotations

import abc
from typing import ClassVar

from torch import Tensor


class LayerCode(abc.ABC):
    """All that Python knows about one codec: its name, its widths, and its fields in plain torch.

    Shapes: T = tokens, L = MoE layers, E = `num_experts`, K = `top_k`. `registry` lists the codes, and `csrc/codes.h`
    those of the kernels, which write the same bits.

    Attributes:
        name: what `Codec`, the ops and the masks call it.
        keeps_order: the experts come back in the router's column order, else ascending.
        illegal_bit: what each bit is of a field whose indices are not K different experts.
    """

    name: ClassVar[str]
    keeps_order: ClassVar[bool]
    illegal_bit: ClassVar[bool]

    @abc.abstractmethod
    def bits(self, num_experts: int, top_k: int) -> int:
        """Bits of one layer's field; also of fields that `refusal` refuses."""

    def refusal(self, num_experts: int, top_k: int) -> str | None:
        """Why this codec cannot write the choices of K of E experts, and the way out; None where it can."""
        return None

    @abc.abstractmethod
    def encode(self, indices: Tensor, num_experts: int) -> Tensor:
        """K different experts each, `int64 [T, L, K]` -> fields `bool [T, L, bits]`."""

    @abc.abstractmethod
    def decode(self, fields: Tensor, num_experts: int, top_k: int) -> tuple[Tensor, Tensor]:
        """Fields `bool [T, L, bits]` -> `(indices int [T, L, K], legal bool [T, L])`; any indices where not legal."""


def are_different_experts(indices: Tensor, num_experts: int) -> Tensor:
    """Whether `int [..., K]` are K different experts, each in [0, E): `bool [...]`."""
    ordered = indices.sort(-1).values
    inside = (ordered[..., 0] >= 0) & (ordered[..., -1] < num_experts)
    return inside & (ordered[..., 1:] != ordered[..., :-1]).all(-1)
