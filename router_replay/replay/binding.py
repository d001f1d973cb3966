"""What governs the routers right now: which replay is bound to what, and which checkpoints surround the call.

The state is a context variable and not an attribute of the model, so that a recompute in backward can re-enter the
state of its own forward pass, on whatever thread autograd runs it, without disturbing anybody else's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

from torch import Tensor

from router_replay.errors import CallOrderError
from router_replay.replay.bound_pass import BoundPass
from router_replay.replay.observe import ObservedRoutes


class Replays(Protocol):
    """What a trainer's replay is to the core: a key of bindings that compares by identity.

    Attributes:
        attached: whether its routers still ask it.
        observer: where the routes of the current forward pass are recorded, or None.
    """

    @property
    def attached(self) -> bool: ...

    @property
    def observer(self) -> ObservedRoutes | None: ...


class Native:
    """Stands for "route natively", as stock does: a reference model's pass, say."""


NATIVE = Native()


@dataclass
class Frame:
    """One activation checkpoint between its forward pass and its backward pass.

    Attributes:
        recomputing: False while the checkpoint's forward pass runs, True in every later run.
        native_choices: by router object, the experts `int [n, K]` that the trainer chose in the forward pass for the
            places that take its own; a recompute must take the same.
    """

    recomputing: bool = False
    native_choices: dict[object, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """Bindings by replay object, and the surrounding checkpoints from the outermost in."""

    bindings: Mapping[Replays, BoundPass | Native] = MappingProxyType({})
    frames: tuple[Frame, ...] = ()

    @property
    def recomputing(self) -> bool:
        """Whether this call repeats a forward pass that already happened."""
        return any(frame.recomputing for frame in self.frames)


_EMPTY = State()
_state: ContextVar[State] = ContextVar("router_replay_state", default=_EMPTY)


def current() -> State:
    """The state that a router called now is under."""
    return _state.get()


@contextlib.contextmanager
def entered(state: State) -> Iterator[None]:
    """Make `state` current for the block."""
    before = _state.get()
    _state.set(state)
    try:
        yield
    finally:
        # A checkpoint that was left by an exception may end this late, when the block around it has ended: what is
        # current by then stays.
        if _state.get() is state:
            _state.set(before)


@contextlib.contextmanager
def bound(replay: Replays, binding: BoundPass | Native) -> Iterator[None]:
    """Bind `replay` for the block; other replays keep their bindings.

    Raises:
        CallOrderError: the replay is bound already, or the block ends where its binding is not: a generator that
            yielded inside of it was closed in another thread or task.
    """
    state = current()
    frames = state.frames
    if replay in state.bindings:
        raise CallOrderError(
            "a block of this replay is open already: microbatch(), record() and off() do not nest, and a generator must"
            " not yield inside of one, which would stay open for whoever runs next; end the block after its forward"
            " pass"
        )
    _state.set(State({**state.bindings, replay: binding}, state.frames))
    try:
        yield
    finally:
        # Not a reset of the variable to what it was: blocks of other replays may have begun or ended since.
        state = current()
        is_here = state.bindings.get(replay) is binding
        if is_here:
            others = {key: value for key, value in state.bindings.items() if key is not replay}
            _state.set(State(others, frames) if others or frames else _EMPTY)
    if not is_here:
        raise CallOrderError(
            "the block of this replay ended in another thread or task than the one in which it began, where it stays"
            " open: a generator must not yield inside of microbatch(), record() or off()"
        )
