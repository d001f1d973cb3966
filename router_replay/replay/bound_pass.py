"""One forward pass between the beginning and the end of its block: what is bound to it, and what was asked for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from router_replay.errors import CallOrderError
from router_replay.replay.microbatch import MicrobatchRoutes
from router_replay.replay.overlap import OverlapSample
from router_replay.replay.record import RouteRecorder


class BoundPass:
    """The binding of one block, which takes exactly one forward pass of one or more whole model chunks.

    All of this is kept on the host, by the calls that routers make anyway: a layer that is asked twice is a second
    pass, and a layer that was not asked at the end is a pass that is not whole.

    Attributes:
        routes: what is replayed; None where the pass is recorded and routes natively.
        recorder: where the pass is recorded, or None.
        overlap: where replayed experts are compared with the trainer's own choice, or None.
        ids_compared: whether the model's input ids have been compared with those of the layout.
    """

    def __init__(
        self,
        routes: MicrobatchRoutes | None,
        *,
        recorder: RouteRecorder | None = None,
        overlap: OverlapSample | None = None,
    ) -> None:
        self.routes = routes
        self.recorder = recorder
        self.overlap = overlap
        self.ids_compared = False
        self._asked: set[int] = set()

    @property
    def called_ids(self) -> Tensor | None:
        """Token ids that the model is to be called with, as of `MicrobatchRoutes`; None where that is not known."""
        of = self.routes if self.recorder is None else self.recorder
        return None if of is None else of.called_ids

    def ask(self, layer: int) -> None:
        """A router asks for the experts of decoder layer `layer`, not in a recompute.

        Raises:
            CallOrderError: it asked before.
        """
        if layer in self._asked:
            raise CallOrderError(
                f"decoder layer {layer} routes a second forward pass inside one block, whose masks are those of the"
                " first: a block goes around one call of the model, in forward_step, and not around"
                " forward_backward_func or a loop; the same placement may be bound to another block"
            )
        self._asked.add(layer)

    def ran(self, layers: frozenset[int]) -> bool:
        """Whether a chunk with these layers ran in this pass; False where it has none."""
        return bool(layers & self._asked)

    def require_whole(self, chunks: Sequence[frozenset[int]]) -> None:
        """At the end of the block: every layer of the chunks that ran was asked.

        Args:
            chunks: decoder layers with a router of each model chunk on this rank; empty for a dense one.

        Raises:
            CallOrderError: no forward pass, or a layer that did not ask.
        """
        if not self._asked and all(chunks):
            raise CallOrderError(
                "no router asked for its experts inside this block: the call of the model must be inside of it, and a"
                " model that was wrapped or compiled after attach must still call its own routers"
            )
        missing = sorted(layer for chunk in chunks if chunk & self._asked for layer in chunk - self._asked)
        if missing:
            raise CallOrderError(
                f"decoder layers {missing} did not ask for their experts, while {sorted(self._asked)} did: these layers"
                " routed by themselves, or were skipped; attach again after whatever replaced their routers or their"
                " router_replay"
            )
