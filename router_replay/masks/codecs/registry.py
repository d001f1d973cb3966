"""The codecs that there are. The kernels have a list of their own in csrc/codes.h: both are compared at the import."""

from __future__ import annotations

from router_replay.masks.codecs import bitset, ordered, rank
from router_replay.masks.codecs.layer_code import LayerCode

# Of codecs whose rows are equally small, 'auto' takes the first.
_ALL: tuple[LayerCode, ...] = (bitset.BitsetCode(), rank.RankCode(), ordered.OrderedCode())
CODES: dict[str, LayerCode] = {code.name: code for code in _ALL}
"""By name."""
