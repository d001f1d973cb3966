"""Codec 'rank': the number of the expert set. In plain torch, exact up to 128 bits, in limbs of 32 bits, lowest first.

The combinatorial number system (D. H. Lehmer 1964; D. E. Knuth, The Art of Computer Programming 4A, section 7.2.1.3,
theorem L): experts c_1 < ... < c_K have the rank C(c_1, 1) + ... + C(c_K, K), their number in colexicographic order.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from router_replay.masks.codecs.bits import bits_of_integers, integers_of_bits
from router_replay.masks.codecs.layer_code import LayerCode
from router_replay.masks.limits import MAX_RANK_BITS

_LIMB_BITS = 32
_LIMB = (1 << _LIMB_BITS) - 1


class RankCode(LayerCode):
    """The set's number in colexicographic order, in ceil(log2 C(E, K)) bits."""

    name = "rank"
    keeps_order = False
    illegal_bit = True

    def bits(self, num_experts: int, top_k: int) -> int:
        return (math.comb(num_experts, top_k) - 1).bit_length()

    def refusal(self, num_experts: int, top_k: int) -> str | None:
        bits = self.bits(num_experts, top_k)
        if bits <= MAX_RANK_BITS:
            return None
        return (
            f"codec 'rank' has ranks of at most {MAX_RANK_BITS} bits, and the sets of {top_k} of {num_experts} experts"
            f" need {bits}: choose 'auto', 'bitset' or 'ordered'"
        )

    def encode(self, indices: Tensor, num_experts: int) -> Tensor:
        top_k = indices.shape[-1]
        coefficients = _coefficients(num_experts, top_k).to(indices.device)
        columns = torch.arange(top_k, device=indices.device)
        limbs = coefficients[columns, indices.sort(-1).values].sum(-2)
        for low in range(limbs.shape[-1] - 1):
            limbs[..., low + 1] += limbs[..., low] >> _LIMB_BITS
        return bits_of_integers(limbs & _LIMB, _LIMB_BITS).flatten(2)[..., : self.bits(num_experts, top_k)]

    def decode(self, fields: Tensor, num_experts: int, top_k: int) -> tuple[Tensor, Tensor]:
        coefficients = _coefficients(num_experts, top_k).to(fields.device)
        num_limbs = coefficients.shape[-1]
        padded = fields.new_zeros((*fields.shape[:-1], num_limbs * _LIMB_BITS))
        padded[..., : fields.shape[-1]] = fields
        remainder = integers_of_bits(padded.unflatten(2, (num_limbs, _LIMB_BITS)))
        num_sets = _limbs(math.comb(num_experts, top_k), num_limbs + 1).to(fields.device)
        legal = ~_not_above(num_sets, torch.nn.functional.pad(remainder, (0, 1)))
        remainder = torch.where(legal[..., None], remainder, 0)
        indices = torch.empty((*fields.shape[:-1], top_k), dtype=torch.int64, device=fields.device)
        for k in reversed(range(top_k)):
            # The coefficients of one k rise with the expert: as many as are not above the remainder, less one.
            expert = _not_above(coefficients[k], remainder[..., None, :]).sum(-1) - 1
            indices[..., k] = expert
            remainder = remainder - coefficients[k][expert]
            for low in range(num_limbs - 1):
                borrow = (remainder[..., low] < 0).long()
                remainder[..., low] += borrow << _LIMB_BITS
                remainder[..., low + 1] -= borrow
        return indices, legal


@functools.cache
def _coefficients(num_experts: int, top_k: int) -> Tensor:
    """C(c, k + 1) at [k, c] in limbs of 32 bits, lowest first: `int64 [K, E, limbs]`.

    Expert c cannot be the k-th if fewer than K - 1 - k experts are above it; the largest number stands there.
    """
    bits = (math.comb(num_experts, top_k) - 1).bit_length()
    num_limbs = max(1, -(-bits // _LIMB_BITS))
    largest = (1 << num_limbs * _LIMB_BITS) - 1
    return torch.stack(
        [
            torch.stack(
                [
                    _limbs(math.comb(c, k + 1) if c <= num_experts - top_k + k else largest, num_limbs)
                    for c in range(num_experts)
                ]
            )
            for k in range(top_k)
        ]
    )


def _limbs(number: int, count: int) -> Tensor:
    return torch.tensor([number >> limb * _LIMB_BITS & _LIMB for limb in range(count)])


def _not_above(a: Tensor, b: Tensor) -> Tensor:
    """Whether a <= b, for numbers in limbs along the last dimension."""
    result = torch.ones((), dtype=torch.bool, device=a.device)
    for limb in range(a.shape[-1]):
        result = (a[..., limb] < b[..., limb]) | ((a[..., limb] == b[..., limb]) & result)
    return result
