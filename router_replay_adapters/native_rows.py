"""Rows that nobody recorded, in stacks that replay by themselves: they take the router's own experts.

miles and slime keep a queue of recorded experts for each router: one tensor for each microbatch, which the forward pass
and its recompute take in turns. A row of -1 is one that the server does not know, or padding. Of packed rows, which may
be there instead of a tensor, it is known already which are native.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

from router_replay.errors import DataError, PairingError, SeamError
from router_replay_adapters.packed_queues import PackedLayer
from router_replay_adapters.seldom import Seldom
from router_replay_adapters.unknown import UNKNOWN

logger = logging.getLogger(__name__)

FORWARD = "replay_forward"
RECOMPUTE = "replay_backward"
STAGES = (FORWARD, RECOMPUTE)
"""The stages in which recorded experts are replayed, by the name that miles and slime give them."""

_OTHER_STAGES = ("fallthrough", "record")

OwnTopK = Callable[[Tensor], Tensor]
"""A router's own choice: scores `[T, E]` -> experts `int [T, K]`."""


class Popped(Protocol):
    """What a router takes recorded experts from."""

    def pop_forward(self) -> Tensor:
        """Experts `int [T, K]` of the next forward pass, on the device."""

    def pop_backward(self) -> Tensor:
        """Experts `int [T, K]` of the next recompute, on the device."""


class Queue(Popped, Protocol):
    """What a stack keeps for one router."""

    forward_index: int
    backward_index: int
    top_indices_list: list[Any]


def replays(stack: str, stage: str) -> bool:
    """Whether a router takes recorded experts in this stage of a stack's replay.

    Raises:
        SeamError: a stage that is not known, in which rows that nobody recorded could be replayed as they are.
    """
    if stage not in (*STAGES, *_OTHER_STAGES):
        raise SeamError(
            f"{stack}'s replay is in a stage {stage!r}, and its adapter knows {', '.join((*STAGES, *_OTHER_STAGES))}:"
            f" install a release of {stack} that has these, or take the adapter away and let no server answer with"
            " unknown rows"
        )
    return stage in STAGES


@dataclass(eq=False)
class _Native:
    """The rows of one recorded tensor that take the router's own experts.

    `places` are int64 `[n]`, on the device of the scores; `experts` int `[n, K]`, None before the first choice.
    """

    places: Tensor
    experts: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Filled:
    """A queue whose next recorded tensor has the router's own experts where it has none; it stands in for one call."""

    queue: Popped
    native: _Native

    def pop_forward(self) -> Tensor:
        return self._filled(self.queue.pop_forward())

    def pop_backward(self) -> Tensor:
        return self._filled(self.queue.pop_backward())

    def _filled(self, experts: Tensor) -> Tensor:
        assert self.native.experts is not None
        return experts.index_copy(0, self.native.places, self.native.experts.to(experts.dtype))


class NativeRows:
    """The router's own experts for rows without any, chosen in the forward pass and kept for its recompute.

    Choices are kept with the recorded tensor that they belong to, and gone when the stack lets go of it.
    """

    def __init__(self, stack: str) -> None:
        self._stack = stack
        # Tensors compare by their elements; these keys are the objects themselves.
        self._native: WeakIdKeyDictionary = WeakTensorKeyDictionary()
        self._warning = Seldom()

    def filled(self, queue: Queue, stage: str, scores: Tensor, topk: int, own_topk: OwnTopK) -> Popped:
        """What a router takes its experts from in this call: its queue, or one that has own experts in unknown rows.

        A forward pass chooses anew. A recompute takes the choice of its forward pass, which another one could miss at
        near ties; where there was none, it chooses.

        Args:
            queue: of this router.
            stage: one of `STAGES`.
            scores: `[T, E]`, what the choice is made by.
            topk: K.
            own_topk: the router's own choice, called only where a row is unknown.

        Raises:
            DataError: a row is known in part, or has an expert twice, as no choice has.
            PairingError: a row names an expert that the router does not have.
        """
        index = queue.forward_index if stage == FORWARD else queue.backward_index
        recorded = queue.top_indices_list[index] if index < len(queue.top_indices_list) else None
        # An empty queue, another shape and what is neither are for the stack to refuse or to take.
        if not isinstance(recorded, Tensor | PackedLayer) or recorded.shape != (scores.shape[0], topk):
            return queue
        native = self._native.get(recorded)
        if native is None:
            if isinstance(recorded, PackedLayer):
                places = recorded.native_places
            else:
                places = self._unknown_places(recorded, scores.shape[1])
            native = self._native[recorded] = _Native(places.to(scores.device))
        if not len(native.places):
            return queue
        if stage == FORWARD or native.experts is None:
            native.experts = own_topk(scores.detach()).index_select(0, native.places)
        return _Filled(queue, native)

    def _unknown_places(self, recorded: Tensor, num_experts: int) -> Tensor:
        columns = recorded.T.contiguous()
        strange = (columns < 0) | (columns >= num_experts)
        # Turned by up to half of K, every column meets every other.
        for turn in range(1, len(columns) // 2 + 1):
            strange |= columns == columns.roll(turn, 0)
        whole = (columns == UNKNOWN).all(0)
        wrong = strange.any(0) & ~whole
        if wrong.any():
            self._refuse(recorded, int(wrong.nonzero()[0]), num_experts)
        places = whole.nonzero().flatten()
        if len(places) == len(recorded) > 0:
            self._warn(len(recorded))
        return places

    def _refuse(self, recorded: Tensor, row: int, num_experts: int) -> None:
        experts = recorded[row].tolist()
        found = f"{self._stack} replays row {row} of a microbatch with experts {experts}"
        if UNKNOWN in experts:
            raise DataError(
                f"{found}, of which only a part is known: a row is {UNKNOWN} as a whole where the server does not know"
                " it; look for what writes rows between the server and the trainer"
            )
        if not all(0 <= expert < num_experts for expert in experts):
            raise PairingError(
                f"{found}, and the router has experts 0 to {num_experts - 1}: the rollout ran another model than the"
                " trainer has"
            )
        raise DataError(
            f"{found}, and a choice of {len(experts)} has none of them twice. SGLang's own recorder leaves zeros where"
            " it recorded nothing, and every server does in layers that are dense for it: have all servers capture by"
            f" this package's recorder (r3 doctor --stack {self._stack} --server URL), compare their model's dense"
            " layers with the trainer's --moe-layer-freq, and look for what else fills rows between the two: one of a"
            f" token that no server saw, such as a tool's, is {UNKNOWN} in every expert"
        )

    def _warn(self, num_rows: int) -> None:
        if not self._warning.due():
            return
        logger.warning(
            "none of the %d rows of a microbatch has routes: its routers take their own experts, as without replay."
            " It may be padding alone; if routes never arrive, see r3 doctor --stack %s --server URL",
            num_rows,
            self._stack,
        )
