"""Blocks: one at a time of each replay, around one whole forward pass, ended where they began."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from router_replay.errors import CallOrderError
from router_replay.replay import MicrobatchRoutes, ObservedRoutes, place
from router_replay.replay.binding import NATIVE, Frame, State, bound, current, entered
from router_replay.replay.bound_pass import BoundPass
from tests.router_replay.replay.batches import GEOMETRY, padded, recorded


@dataclass(eq=False)
class Replay:
    attached: bool = True
    observer: ObservedRoutes | None = None


def routes() -> MicrobatchRoutes:
    ids, masks, _ = recorded([6, 3], 0)
    return place(masks, padded(ids), GEOMETRY, torch.device("cpu"))


def test_blocks_of_one_replay_do_not_nest():
    replay, other = Replay(), Replay()
    first = BoundPass(routes())
    with bound(replay, first), bound(other, NATIVE):
        with pytest.raises(CallOrderError, match=r"open already: .*must not yield inside"), bound(replay, NATIVE):
            pass
        assert current().bindings == {replay: first, other: NATIVE}
    assert not current().bindings


def held_open(replay: Replay) -> Iterator[None]:
    with bound(replay, NATIVE):
        yield


def test_a_generator_that_holds_a_block_open_over_a_yield():
    replay = Replay()
    generator = held_open(replay)
    next(generator)
    with pytest.raises(CallOrderError, match="a generator must not yield inside of one"), bound(replay, NATIVE):
        pass
    generator.close()
    assert not current().bindings
    with bound(replay, NATIVE):
        pass


def test_blocks_of_two_replays_may_end_in_any_order():
    policy, reference = Replay(), Replay()
    first, second = held_open(policy), held_open(reference)
    next(first)
    next(second)
    with contextlib.suppress(StopIteration):
        next(first)
    assert current().bindings == {reference: NATIVE}
    with contextlib.suppress(StopIteration):
        next(second)
    assert not current().bindings


def test_a_block_that_ends_in_another_thread():
    replay, caught = Replay(), []
    generator = held_open(replay)

    def begin() -> None:
        next(generator)

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    try:
        next(generator)
    except (CallOrderError, StopIteration) as error:
        caught.append(error)
    assert isinstance(caught[0], CallOrderError) and "ended in another thread or task" in str(caught[0])
    assert not current().bindings


def test_a_second_pass_in_one_block():
    one = BoundPass(routes())
    one.ask(1)
    one.ask(3)
    with pytest.raises(CallOrderError, match=r"decoder layer 1 routes a second .* not around forward_backward_func"):
        one.ask(1)


@pytest.mark.parametrize(
    ("chunks", "asked", "message"),
    [
        ([{1, 3}], [], "no router asked"),
        ([{1}, {3}], [], "no router asked"),
        ([{1}, set()], [], None),
        ([set()], [], None),
        ([{1, 3}], [1, 3], None),
        ([{1, 3}], [3], r"decoder layers \[1\] did not ask for their experts, while \[3\] did"),
        ([{1}, {3}], [3], None),
        ([{1, 2}, {3, 5}], [1, 2, 5], r"decoder layers \[3\] did not ask"),
    ],
)
def test_a_block_is_around_a_whole_pass_of_whole_chunks(chunks, asked, message):
    one = BoundPass(routes())
    for layer in asked:
        one.ask(layer)
    sets = [frozenset(chunk) for chunk in chunks]
    if message is None:
        one.require_whole(sets)
        return
    with pytest.raises(CallOrderError, match=message):
        one.require_whole(sets)


def test_a_checkpoint_that_ends_after_the_block_brings_nothing_back():
    """An exception left it suspended, and the garbage collector ends it when the block has long ended."""
    replay = Replay()

    def suspended() -> Iterator[None]:
        with entered(State(current().bindings, (*current().frames, Frame()))):
            yield

    checkpoint = suspended()
    with contextlib.suppress(ZeroDivisionError), bound(replay, NATIVE):
        next(checkpoint)
        raise ZeroDivisionError
    assert current() == State()
    checkpoint.close()
    assert current() == State()
    with bound(replay, NATIVE):
        pass
