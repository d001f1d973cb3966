"""Rules that make a weight of one log-ratio, whosever it is: a sampled token's, a sequence's, a candidate's."""

from __future__ import annotations

import math

from torch import Tensor

from router_replay.errors import InputError
from router_replay.mismatch.log_ratios import saturating_exp


def truncated_weight(log_ratio: Tensor, *, cap: float = 2.0) -> Tensor:
    """The rule of TIS: w = min(rho, cap).

    Args:
        log_ratio: log rho, any shape.
        cap: above 0; `math.inf` for rho itself, saturating at the dtype's range.

    Raises:
        InputError: a cap that is not above 0.
    """
    if not cap > 0:
        raise InputError(f"a cap of weights must be above 0, got {cap}")
    # The cap's logarithm, exponentiated, may round to more than the cap.
    return saturating_exp(log_ratio.clamp(max=math.log(cap))).clamp(max=cap)


def masked_weight(log_ratio: Tensor, *, lower: float = 0.5, upper: float = 2.0) -> Tensor:
    """The rule of MIS, and with bounds of 0.5 and 5 of IcePop: w = rho if lower <= rho <= upper, else 0.

    Args:
        log_ratio: log rho, any shape.
        lower, upper: both inclusive, compared as logarithms.

    Raises:
        InputError: bounds out of order.
    """
    if not 0 <= lower <= upper or upper == 0:
        raise InputError(f"bounds must satisfy 0 <= lower <= upper and upper > 0, got {lower} and {upper}")
    lowest = math.log(lower) if lower > 0 else -math.inf
    kept = (log_ratio >= lowest) & (log_ratio <= math.log(upper))
    return saturating_exp(log_ratio).masked_fill(~kept, 0)
