"""How training goes at a step: reward, evaluation, entropy, gradient norm and the like, as a trainer knows them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from router_replay.errors import InputError
from router_replay.masks.arguments import as_integer

_COUNTS = ("num_responses", "num_tokens", "longest_response", "dropped_responses", "dropped_groups")
_SHARES = ("cut_off", "clipped", "dropped", "effective_share", "route_drift", "route_overlap")
_NOT_NEGATIVE = ("entropy", "gradient_norm", "response_length", "seconds")

# How figures of a step's parts become those of the step; what is not named is of the whole step.
_BY_RESPONSES = ("reward", "response_length", "cut_off")
_BY_TOKENS = ("entropy", "clipped", "dropped", "route_drift", "route_overlap")
_SUMMED = ("num_responses", "num_tokens", "dropped_responses", "dropped_groups")
_LARGEST = ("longest_response", "seconds")


@dataclass(frozen=True)
class Dynamics:
    """Figures of a step, None where a trainer has not got them. KL and F(tau) follow from its log-probabilities.

    A number that is not finite, such as the gradient norm of a step that overflows, is kept, written as a string, and
    shown as what it is; shares and counts are always finite.

    Where several ranks write parts of a step, each gives the figures of its own responses and tokens, with how many
    these are; `evaluation`, `gradient_norm` and `effective_share` are of the whole step, on one rank or the same on
    all. Or one rank gives all figures of the whole step, and the others none.

    Attributes:
        num_responses: that `reward`, `response_length` and `cut_off` are means over.
        reward: mean of the responses.
        response_length: mean, in tokens that the rollout sampled.
        longest_response: in such tokens.
        cut_off: share of the responses that end where the largest length is reached.
        num_tokens: response tokens that `entropy`, `clipped`, `dropped` and the two of the routes are means over.
        entropy: of the trainer's distributions from which response tokens were drawn, mean, nats per token.
        clipped: share of tokens (for losses of whole sequences, of these) whose gradient clipping stops.
        dropped: share of them with weight 0.
        dropped_responses, dropped_groups: that the loss never saw, such as groups of equal rewards.
        effective_share: effective sample size (sum w)^2 / (n sum w^2) of the weights as applied, a share of all n.
        route_drift: share of (token, MoE layer) rows for which the trainer's own router takes another set of experts
            under the present weights, during the step's updates, than it took when the old log-probabilities were made.
        route_overlap: of the same, mean share of a row's experts that are among the old ones.
        gradient_norm: before clipping, the largest of the step's updates.
        evaluation: score on held-out problems after the step's updates; on the steps where there is one.
        seconds: that the step took.
    """

    num_responses: int | None = None
    reward: float | None = None
    response_length: float | None = None
    longest_response: int | None = None
    cut_off: float | None = None
    num_tokens: int | None = None
    entropy: float | None = None
    clipped: float | None = None
    dropped: float | None = None
    dropped_responses: int | None = None
    dropped_groups: int | None = None
    effective_share: float | None = None
    route_drift: float | None = None
    route_overlap: float | None = None
    gradient_norm: float | None = None
    evaluation: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is None:
                continue
            if name in _COUNTS:
                count = as_integer(name, value)
                if count < 0:
                    raise InputError(f"{name} is a number of things, 0 or more, got {value}")
                # Of Python, which JSON can hold.
                object.__setattr__(self, name, count)
                continue
            # Some floats of numpy are no floats of Python; a tensor would be kept with its graph.
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise InputError(f"{name} must be a number, got a {type(value).__name__}: float({name})")
            if name in _SHARES and not 0 <= value <= 1:
                raise InputError(f"{name} is a share, from 0 to 1, got {value}: leave it out where there is none")
            if name in _NOT_NEGATIVE and value < 0:
                raise InputError(f"{name} is 0 or more, got {value}")

    @classmethod
    def join(cls, parts: Sequence[Dynamics]) -> Dynamics:
        """Of a step, from those of its parts: means by the numbers that they are over, sums, and the largest.

        Raises:
            InputError: parts with a mean, of which one does not say how many it is over; or parts with different
                figures of the whole step.
        """
        return parts[0] if len(parts) == 1 else cls(**{each.name: _joined(each.name, parts) for each in fields(cls)})

    def to_json(self) -> str:
        """As a JSON object of the figures that there are; `number_to_json` says what becomes of its numbers."""
        named = {name: number_to_json(value) for name, value in asdict(self).items() if value is not None}
        return json.dumps(named, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Dynamics:
        """What `to_json` made.

        Raises:
            InputError: another object, or figures that this release does not know.
        """
        try:
            found = json.loads(text)
        except ValueError as error:
            raise InputError(f"the figures of the step are no JSON ({error})") from error
        names = [each.name for each in fields(cls)]
        unknown = [name for name in found if name not in names] if isinstance(found, Mapping) else None
        if unknown is None or unknown:
            raise InputError(f"figures of a step are an object of {', '.join(names)}; got {unknown or text[:60]}")
        return cls(**{name: _number_from_json(value) for name, value in found.items()})


def number_to_json(value: float) -> float | str:
    """A number as JSON can hold it: "nan", "inf" or "-inf", which `float` reads, where it is not finite."""
    return value if isinstance(value, int) or math.isfinite(value) else str(float(value))


def _number_from_json(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value


def _joined(name: str, parts: Sequence[Dynamics]) -> Any:
    values = [value for part in parts if (value := getattr(part, name)) is not None]
    if len(values) < 2:
        return values[0] if values else None
    if name in _SUMMED:
        return sum(values)
    if name in _LARGEST:
        return max(values)
    if name in _BY_RESPONSES or name in _BY_TOKENS:
        counted = "num_responses" if name in _BY_RESPONSES else "num_tokens"
        return _mean(name, counted, [part for part in parts if getattr(part, name) is not None])
    # By their text: NaN is not equal to itself.
    if len(told := dict.fromkeys(str(float(value)) for value in values)) > 1:
        raise InputError(
            f"parts of one step have {name} {' and '.join(told)}: it is of the whole step, so reduce it over the ranks"
            " first, or write it from one of them"
        )
    return values[0]


def _mean(name: str, counted: str, parts: Sequence[Dynamics]) -> float | None:
    pairs = [(getattr(part, name), getattr(part, counted)) for part in parts]
    if any(count is None for _, count in pairs):
        raise InputError(
            f"parts of one step have {name}, and one of them not {counted}, which says how many that is over: give it"
            " on every rank"
        )
    total = sum(count for _, count in pairs)
    # A part of nothing has no mean, whatever it says, and not one of 0 times NaN.
    return sum(value * count for value, count in pairs if count) / total if total else None
