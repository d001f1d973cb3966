"""One decoder layer's side of a replay, whoever's router asks it."""

from __future__ import annotations

from typing import Never, SupportsIndex

from torch import Tensor

from router_replay.errors import CallOrderError
from router_replay.replay.binding import Native, Replays, State, current
from router_replay.replay.bound_pass import BoundPass


class RoutedLayer:
    """Finds what is bound to the pass in which its router is asked, and notes what it chose.

    Attributes:
        layer: 0-based decoder layer of the rollout's geometry.
    """

    def __init__(self, replay: Replays, layer: int) -> None:
        self.layer = layer
        self._replay = replay

    def bound(self) -> tuple[State, BoundPass | Native]:
        """The state of this call, and what is bound in it.

        Raises:
            CallOrderError: neither masks nor native routing were asked for.
        """
        state = current()
        binding = state.bindings.get(self._replay)
        if binding is None:
            raise CallOrderError(
                f"decoder layer {self.layer} is attached to a replay, but this forward pass has no masks: wrap the call"
                " of the model in replay.microbatch(masks, layout), or in replay.off() for native routing"
            )
        return state, binding

    def __reduce_ex__(self, protocol: SupportsIndex) -> Never:
        """Refuse a copy, which would answer for another model's router by what is bound to this one.

        Raises:
            CallOrderError: always.
        """
        raise CallOrderError(
            "a model that a replay is attached to is copied or pickled: do that before attach, or call remove() first"
        )

    def note(self, state: State, binding: BoundPass | Native, experts: Tensor) -> None:
        """The layer takes these experts `int [num_places, K]`; recomputes are not noted again.

        Raises:
            CallOrderError: a second pass inside of one block.
            PairingError: another number of places than those of the layout that is recorded.
        """
        if state.recomputing:
            return
        if not isinstance(binding, Native):
            binding.ask(self.layer)
            if binding.recorder is not None:
                binding.recorder.record(self.layer, experts)
        if self._replay.observer is not None:
            self._replay.observer.record(self.layer, experts)
