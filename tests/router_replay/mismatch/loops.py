"""Sequence-level functions as loops over a packed batch's responses, in plain Python numbers, with bounds of rounding.

Each returns what is expected, and beside it a magnitude: the same sum with every term's absolute value. A sum or a
recurrence of n terms, in whatever order it is computed, is off by at most about 2 n eps of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

EPS = 2.0**-52


@dataclass(frozen=True)
class Packed:
    """Ragged sequences, some empty; every list has one number for each token, `rewards` one for each sequence."""

    lengths: list[int]
    mask: list[bool]
    groups: list[int]

    def responses(self) -> list[list[int]]:
        """Places of the response tokens of each sequence."""
        found, begin = [], 0
        for length in self.lengths:
            found.append([place for place in range(begin, begin + length) if self.mask[place]])
            begin += length
        return found


def doubly_robust(
    batch: Packed,
    rewards: list[float],
    values: list[float],
    weights: list[float],
    actions: list[float],
    discount: float,
) -> tuple[list[float], list[float], list[float]]:
    """V_DR, advantages, and the magnitude of V_DR and of what an advantage is made of."""
    size = len(batch.mask)
    found, advantages, magnitude = [0.0] * size, [0.0] * size, [0.0] * size
    for places in batch.responses():
        after = after_magnitude = 0.0
        for place in reversed(places):
            target = rewards[place] + discount * after
            found[place] = values[place] + weights[place] * (target - actions[place])
            advantages[place] = target - values[place]
            terms = abs(rewards[place]) + abs(discount) * after_magnitude
            own = abs(values[place]) + abs(weights[place]) * (terms + abs(actions[place]))
            magnitude[place] = own + terms
            after, after_magnitude = found[place], own
    return found, advantages, magnitude


def token_baseline(batch: Packed, rewards: list[float], energies: list[float]) -> tuple[list[float], list[float]]:
    """A = G - sum W G / sum W over the group's t-th tokens, and the largest sum of abs(rewards) of the group."""
    size = len(batch.mask)
    cells: dict[tuple[int, int], list[tuple[int, float, float]]] = {}
    largest: dict[int, float] = {}
    for group, places in zip(batch.groups, batch.responses(), strict=True):
        gathered = 0.0
        total = math.fsum(abs(rewards[place]) for place in places)
        largest[group] = max(largest.get(group, 0.0), total)
        for number, place in enumerate(places):
            gathered += energies[place]
            gain = math.fsum(rewards[each] for each in places[number:])
            cells.setdefault((group, number), []).append((place, gain, gathered))
    found, magnitude = [0.0] * size, [0.0] * size
    for (group, _), cell in cells.items():
        energy = math.fsum(each[2] for each in cell)
        baseline = math.fsum(each[1] * each[2] for each in cell) / energy if len(cell) > 1 and energy > 0 else 0.0
        for place, gain, _ in cell:
            found[place], magnitude[place] = gain - baseline, largest[group]
    return found, magnitude


def chain(log_rho: list[float], uniforms: list[float], proposed: list[bool], chain_of: list[int]) -> list[int]:
    """Steps of Metropolis chains: a proposal y is taken from x where log rho(y) - log u > log rho(x)."""
    steps, state = [0] * len(log_rho), {}
    for item, (log, uniform, counts, of) in enumerate(zip(log_rho, uniforms, proposed, chain_of, strict=True)):
        if not counts:
            continue
        there = log_rho[state[of]] if of in state else -math.inf
        moved = there == -math.inf or (log > -math.inf and (uniform == 0 or log - math.log(uniform) > there))
        if moved:
            state[of] = item
        steps[state[of]] += 1
    return steps
