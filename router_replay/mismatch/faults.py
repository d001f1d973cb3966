"""What log-probabilities cannot be used, found on the device and said in words where somebody asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from router_replay.errors import InputError
from router_replay.mismatch.ranks import maximum, together
from router_replay.mismatch.responses import Responses, require_responses

LARGEST_LOG = 0.5
"""Rounding lifts the logarithm of a probability of 1 above 0, in bfloat16 by up to 0.25 for logits below 64."""


@dataclass(frozen=True, eq=False)
class Faults:
    """What is wrong with the log-probabilities of two sides, on the device: nothing waits for it until it is read.

    Attributes:
        undefined: bool, tokens' shape: response tokens that have no log-ratio.
        flags: float32 `[5]`, 1 or 0: whether each side has a value that is not above 0, whether each has one above 0.1,
            and whether a token by itself cannot be used.
        mask: bool, tokens' shape, response tokens.
        sides: both sides' log-probabilities, 0 for all but response tokens.
        names: of the two sides, as the caller knows them.
    """

    undefined: Tensor
    flags: Tensor
    mask: Tensor
    sides: tuple[Tensor, Tensor]
    names: tuple[str, str]

    @property
    def probabilities(self) -> Tensor:
        """Bool `[2]`: every value of a side is above 0, and one above 0.1."""
        return (self.flags[:2] == 0) & (self.flags[2:4] > 0)

    @property
    def tokens(self) -> Tensor:
        """Response tokens that cannot be used, bool in the tokens' shape: all of a side that holds probabilities."""
        return _alone(self.undefined, self.sides) | (self.probabilities.any() & self.mask)

    @property
    def found(self) -> Tensor:
        """Whether there is one, on this rank or another of the context group, bool 0-d."""
        return (self.flags[4] > 0) | self.probabilities.any()

    def of_whole(self, responses: Responses) -> Faults:
        """Those of whole sequences: a part may hold tokens that are all above 0 by rounding. Every rank calls."""
        group = responses.context_group
        return self if group is None else replace(self, flags=maximum(self.flags, group))

    def require_none(self) -> None:
        """Raise InputError if a token cannot be used; waits for the device."""
        if bool(self.tokens.any()):
            raise self.error()

    def error(self) -> InputError:
        """What is wrong with the `tokens`, of which there are some, in words; waits for the device."""
        (top, bottom), count = self.sides, int(self.mask.sum())
        if bool(self.undefined.any()):
            place = tuple(self.undefined.nonzero()[0].tolist())
            return InputError(
                f"{int(self.undefined.sum())} of {count} response tokens have no log-ratio; the first, at"
                f" {list(place)}, has log-probability {top[place]:g} in {self.names[0]} over {bottom[place]:g} in"
                f" {self.names[1]}. A token that was sampled has a probability above 0 under the policy that sampled"
                " it: look for tokens that the mask should leave out, and for log-probabilities taken after a top-p or"
                " top-k mask that was not the sampler's"
            )
        which = 0 if bool(self.probabilities[0] | (top > LARGEST_LOG).any()) else 1
        values = self.sides[which]
        return InputError(
            f"{int((values > 0).sum())} of {count} response tokens have a log-probability above 0 in"
            f" {self.names[which]}, up to {float(values.max()):g}: pass natural logarithms of probabilities, not"
            " probabilities and not losses"
        )


def faults_of(numerator: Tensor, denominator: Tensor, responses: Responses, names: tuple[str, str]) -> Faults:
    """What `LogRatios.of` refuses, of this rank's tokens; waits for nothing.

    Raises:
        InputError: no tensors of floating point, or shapes or devices that differ.
    """
    require_responses(responses)
    responses.require(**dict(zip(names, (numerator, denominator), strict=True)))
    for name, values in zip(names, (numerator, denominator), strict=True):
        if not values.is_floating_point():
            raise InputError(f"{name} must be floating point, got {values.dtype}: it is of logarithms of probabilities")
    sides = numerator.detach().masked_fill(~responses.mask, 0), denominator.detach().masked_fill(~responses.mask, 0)
    top, bottom = sides
    undefined = top.isnan() | (top == torch.inf) | ~bottom.isfinite()
    # Probabilities, taken for logarithms, are all above 0 even if none is large.
    flags = [(~(values > 0) & responses.mask).any() for values in sides]
    flags += [(values > 0.1).any() for values in sides]
    flags.append(_alone(undefined, sides).any())
    return Faults(undefined, torch.stack(flags).float(), responses.mask, sides, names)


def joint_faults(
    numerator: Tensor,
    denominator: Tensor,
    responses: Responses,
    names: tuple[str, str],
    groups: Sequence[dist.ProcessGroup | None],
) -> Faults:
    """As of `faults_of`, of whole sequences; what that refuses on one rank of the groups is raised on all."""
    faults = together(lambda: faults_of(numerator, denominator, responses, names), *groups)
    return faults.of_whole(responses)


def require_log_probabilities(
    numerator: Tensor,
    denominator: Tensor,
    responses: Responses,
    names: tuple[str, str],
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Raise InputError, as `LogRatios.of`, for arguments that the caller knows by `names`; waits for the device.

    On every rank of the process group and of the context group of the responses.
    """
    require_responses(responses)
    groups = responses.groups_with(process_group)
    together(joint_faults(numerator, denominator, responses, names, groups).require_none, *groups)


def _alone(undefined: Tensor, sides: tuple[Tensor, Tensor]) -> Tensor:
    top, bottom = sides
    return undefined | (top > LARGEST_LOG) | (bottom > LARGEST_LOG)
