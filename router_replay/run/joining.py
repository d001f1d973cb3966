"""What must be the same in all parts of a step, and what adds up, with its tokens or only tallies of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from router_replay.errors import InputError
from router_replay.masks.agreement import RouteTally
from router_replay.run.dynamics import Dynamics

Layers = tuple[int, ...] | None


def require_one_step(numbers: Sequence[int]) -> None:
    """Raise InputError for parts of several steps."""
    if len(set(numbers)) > 1:
        raise InputError(f"parts of the steps {sorted(set(numbers))} do not fit: join those of one step")


def require_same(step: int, parts: Sequence[Mapping[str, object]]) -> None:
    """Raise InputError for the first part that has something else than the first one, by what it is of."""
    for part in parts:
        for what, here in parts[0].items():
            if here != part[what]:
                raise InputError(f"parts of step {step} do not fit: one has {what} {here}, another {part[what]}")


def joined_dynamics(parts: Sequence[Dynamics | None]) -> Dynamics | None:
    """Of the parts that have them; errors as of `Dynamics.join`."""
    known = [part for part in parts if part is not None]
    return Dynamics.join(known) if known else None


def joined_routes(step: int, parts: Sequence[tuple[RouteTally | None, Layers]]) -> tuple[RouteTally | None, Layers]:
    """Routes and their decoder layers, of the parts that have them.

    Raises:
        InputError: routes of other layers.
    """
    whole: RouteTally | None = None
    layers: Layers = None
    for routes, theirs in parts:
        if routes is None:
            continue
        if whole is not None and theirs != layers:
            raise InputError(f"parts of step {step} route in different decoder layers: {layers} and {theirs}")
        whole, layers = routes if whole is None else whole + routes, theirs
    return whole, layers
