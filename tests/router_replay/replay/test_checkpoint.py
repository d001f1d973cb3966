"""The wrappers that carry bindings, each on the bare form of checkpoint that it is for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from router_replay.errors import CallOrderError
from router_replay.replay.binding import NATIVE, bound, current
from router_replay.replay.checkpoint import carried_by_contexts, carried_by_forward, carried_by_generator, carry
from tests.router_replay.replay.small_router import Replay, Router, inputs, microbatch

Run = Callable[[], Tensor]
Form = Callable[[Callable[..., Tensor], Tensor], tuple[Tensor, Run]]
"""Runs the forward pass of a checkpointed function, and gives its output and what recomputes it."""


def _function(function, hidden):
    carried = carry(function)
    return carried(hidden), lambda: carried(hidden)


def _forward(function, hidden):
    kept = []

    def forward(ctx, run_function, *args):
        kept.append(run_function)
        return run_function(*args)

    return carried_by_forward(forward)(None, function, hidden), lambda: kept[0](hidden)


def _generator(function, hidden):
    kept = []

    def generator(fn) -> Iterator[None]:
        kept.append(fn)
        yield

    around = carried_by_generator(generator)(function)
    next(around)
    try:
        output = function(hidden)
    except BaseException as error:
        around.throw(error)
    assert next(around, "ended") == "ended"
    # What a generator's function returns in a recompute is of no use to it.
    return output, lambda: kept[0](hidden)


def _contexts(function, hidden):
    forward, recompute = carried_by_contexts(lambda: (contextlib.nullcontext(), contextlib.nullcontext()))()
    with forward:
        output = function(hidden)

    def again():
        with recompute:
            return function(hidden)

    return output, again


FORMS = {"function": _function, "forward": _forward, "generator": _generator, "contexts": _contexts}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def _clean() -> bool:
    return dict(current().bindings) == {} and current().frames == ()


@forms
def test_nothing_bound_leaves_the_function_alone(form):
    seen = []

    def function(hidden):
        seen.append(current())
        return hidden

    _, again = form(function, inputs())
    with bound(Replay(), NATIVE):
        again()
        assert seen[1] is current()
    assert carry(function) is function


@forms
def test_a_recompute_repeats_its_own_forward_pass(form):
    replay = Replay()
    router = Router(replay)
    first, second = microbatch(0), microbatch(1)
    with bound(replay, first):
        _, again = form(router, inputs())
    assert _clean()
    # The recompute finds other weights, which would choose otherwise, and another microbatch around it.
    router.weight.data.neg_()
    with bound(replay, second):
        again()
        assert current().bindings[replay] is second and current().frames == ()
        router(inputs())
    assert _clean()
    (was, forward), (repeated, recomputed), (later, other) = router.seen
    assert (was, repeated, later) == (False, True, False)
    assert torch.equal(recomputed, forward)
    assert not torch.equal(other, forward)
    assert first.routes.num_native >= 2 and first.routes.num_replayed >= 2


@forms
def test_an_error_leaves_nothing_bound(form):
    replay = Replay()

    def function(hidden):
        assert current().bindings
        raise KeyError

    with bound(replay, NATIVE):
        with pytest.raises(KeyError):
            form(function, inputs())
        assert dict(current().bindings) == {replay: NATIVE} and current().frames == ()
    assert _clean()


@forms
def test_an_error_in_a_recompute_leaves_what_is_bound_there(form):
    replay = Replay()
    calls = []

    def function(hidden):
        calls.append(current().recomputing)
        if current().recomputing:
            raise KeyError
        return hidden

    with bound(replay, microbatch(0)):
        _, again = form(function, inputs())
    with bound(replay, NATIVE):
        with pytest.raises(KeyError):
            again()
        assert dict(current().bindings) == {replay: NATIVE} and current().frames == ()
    assert _clean() and calls == [False, True]


@forms
def test_a_replay_that_was_removed_since(form):
    replay = Replay()
    with bound(replay, microbatch(0)):
        _, again = form(Router(replay), inputs())
    replay.attached = False
    with pytest.raises(CallOrderError, match=r"the replay was removed since.*call remove\(\) after the backward pass"):
        again()
    assert _clean()


@forms
def test_tensors_are_passed_on_as_they_are(form):
    """What is kept until backward is a reference: no copy, on whatever device."""
    seen = []

    def function(hidden):
        seen.append(hidden)
        return hidden

    hidden = inputs()
    with bound(Replay(), NATIVE):
        output, again = form(function, hidden)
    again()
    assert seen[0] is hidden and seen[1] is hidden and output is hidden


def test_bindings_of_two_replays_are_apart_and_end_with_their_blocks():
    one, other = Replay(), Replay()
    routes = microbatch(0)
    with bound(one, routes):
        with contextlib.suppress(KeyError), bound(other, NATIVE):
            assert dict(current().bindings) == {one: routes, other: NATIVE}
            raise KeyError
        assert dict(current().bindings) == {one: routes}
    assert dict(current().bindings) == {}
