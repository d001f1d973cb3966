"""Bindings in torch's own activation checkpoints, of every kind and nested in each other."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._composable import checkpoint as composable_checkpoint
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from router_replay.errors import CallOrderError
from router_replay.replay.binding import NATIVE, bound, current
from router_replay.replay.torch_checkpoint import TORCH_PATCHES
from tests.router_replay.replay.small_router import Replay, Router, inputs, microbatch

Kind = Callable[[nn.Module, Tensor], Tensor]

_reentrant = functools.partial(checkpoint, use_reentrant=True)
_other = functools.partial(checkpoint, use_reentrant=False)
_to_the_end = functools.partial(checkpoint, use_reentrant=False, early_stop=False)


def _keep_products(ctx, op, *args, **kwargs):
    products = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
    return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE


_selective = functools.partial(
    checkpoint,
    use_reentrant=False,
    context_fn=functools.partial(create_selective_checkpoint_contexts, _keep_products),
)


def _composable(module: nn.Module, hidden: Tensor) -> Tensor:
    if not hasattr(module, "composable"):
        module.composable = [composable_checkpoint(nn.Sequential(module))]
    return module.composable[0](hidden)


def _inside(inner: Kind, outer: Kind) -> Kind:
    return lambda module, hidden: outer(lambda x: inner(module, x), hidden)


KINDS: dict[str, Kind] = {
    "reentrant": _reentrant,
    "non-reentrant": _other,
    "non-reentrant, without early stop": _to_the_end,
    "non-reentrant, selective": _selective,
    "composable": _composable,
}
for outer, inner in [
    ("reentrant", "reentrant"),
    ("reentrant", "non-reentrant"),
    ("non-reentrant", "reentrant"),
    ("non-reentrant", "non-reentrant"),
    ("non-reentrant, without early stop", "non-reentrant"),
    ("non-reentrant", "non-reentrant, selective"),
    ("reentrant", "composable"),
]:
    KINDS[f"{inner} inside {outer}"] = _inside(KINDS[inner], KINDS[outer])

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
single = pytest.mark.parametrize("kind", list(KINDS.values())[:5], ids=list(KINDS)[:5])


@pytest.fixture(autouse=True)
def patches() -> Iterator[None]:
    with contextlib.ExitStack() as applied:
        for patch in TORCH_PATCHES:
            applied.enter_context(patch)
        yield
    assert dict(current().bindings) == {} and current().frames == ()


@kinds
def test_a_recompute_repeats_its_own_forward_pass(kind):
    replay = Replay()
    router = Router(replay)
    first, second = microbatch(0), microbatch(1)
    with bound(replay, first):
        output = kind(router, inputs())
    assert dict(current().bindings) == {} and current().frames == ()
    # The backward pass finds other weights, which would choose otherwise, and another microbatch around it.
    router.weight.data.neg_()
    with bound(replay, second):
        output.sum().backward()
        assert current().bindings[replay] is second and current().frames == ()
        router(inputs())
    (was, forward), *recomputes, (later, other) = router.seen
    assert recomputes and (was, later) == (False, False)
    assert all(again and torch.equal(experts, forward) for again, experts in recomputes)
    assert not torch.equal(other, forward)
    assert first.routes.num_native >= 2 and first.routes.num_replayed >= 2


@kinds
def test_gradients_are_those_without_a_checkpoint(kind):
    gradients = []
    for run in (kind, lambda router, hidden: router(hidden)):
        replay = Replay()
        router, hidden = Router(replay), inputs()
        with bound(replay, microbatch(0)):
            output = run(router, hidden)
        output.square().sum().backward()
        gradients.append((hidden.grad, router.weight.grad, router.experts.grad))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


# torch itself allows only one backward pass through selective and composable checkpoints.
@pytest.mark.parametrize("kind", [_other, _to_the_end], ids=["early stop", "to the end"])
def test_autograd_grad_with_the_graph_kept_recomputes_twice(kind):
    """And reads the same in another microbatch's block, and outside of any."""
    replay = Replay()
    router, hidden = Router(replay), inputs()
    with bound(replay, microbatch(0)):
        loss = kind(router, hidden).square().sum()
    with bound(replay, microbatch(1)):
        first = torch.autograd.grad(loss, [hidden, router.weight], retain_graph=True)
    second = torch.autograd.grad(loss, [hidden, router.weight])
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    forward = router.seen[0][1]
    assert [again for again, _ in router.seen] == [False, True, True]
    assert all(torch.equal(experts, forward) for _, experts in router.seen)


def test_the_reentrant_graph_kept_recomputes_twice():
    replay = Replay()
    router = Router(replay)
    with bound(replay, microbatch(0)):
        loss = _reentrant(router, inputs()).sum()
    loss.backward(retain_graph=True)
    with bound(replay, microbatch(1)):
        loss.backward()
    assert [again for again, _ in router.seen] == [False, True, True]
    assert all(torch.equal(experts, router.seen[0][1]) for _, experts in router.seen)


@pytest.mark.parametrize("early_stop", [True, False])
def test_a_backward_pass_inside_of_the_forward_pass(early_stop):
    """Only checkpoints by hooks allow it: the recompute begins before the forward pass has ended."""
    replay = Replay()
    router, after = Router(replay), Router(replay)

    def function(hidden):
        routed = router(hidden)
        (slope,) = torch.autograd.grad(routed.sum(), hidden, create_graph=True)
        return after(routed + slope)

    with bound(replay, microbatch(0)):
        output = checkpoint(function, inputs().clone(), use_reentrant=False, early_stop=early_stop)
        # The recompute is over, and the forward pass went on in its own state.
        assert not after.seen[-1][0]
    router.weight.data.neg_()
    after.weight.data.neg_()
    output.sum().backward()
    for each in (router, after):
        assert {again for again, _ in each.seen} == {False, True}
        assert all(torch.equal(experts, each.seen[0][1]) for _, experts in each.seen)


@single
def test_a_replay_that_was_removed_since(kind):
    replay = Replay()
    with bound(replay, microbatch(0)):
        output = kind(Router(replay), inputs())
    replay.attached = False
    with pytest.raises(CallOrderError, match=r"call remove\(\) after the backward pass"):
        output.sum().backward()


@kinds
@pytest.mark.parametrize("where", ["forward", "recompute"])
def test_after_an_error_nothing_is_left_bound(kind, where):
    replay = Replay()

    class Failing(Router):
        def forward(self, hidden):
            # At its beginning: torch stops most recomputes before the end.
            if current().recomputing == (where == "recompute"):
                raise KeyError(where)
            return super().forward(hidden)

    router = Failing(replay)
    with bound(replay, microbatch(0)):
        if where == "forward":
            with pytest.raises(KeyError):
                kind(router, inputs())
            assert len(current().bindings) == 1 and current().frames == ()
            return
        output = kind(router, inputs())
    with bound(replay, NATIVE):
        with pytest.raises(KeyError):
            output.sum().backward()
        assert dict(current().bindings) == {replay: NATIVE} and current().frames == ()


def test_debug_still_works_and_sees_no_contexts_of_ours():
    """Torch refuses debug=True with any context_fn but its own default."""
    replay = Replay()
    router = Router(replay)
    with bound(replay, microbatch(0)):
        output = checkpoint(router, inputs(), use_reentrant=False, debug=True)
    output.sum().backward()
    assert [again for again, _ in router.seen] == [False, True]


def test_a_users_own_contexts_are_entered_with_ours():
    entered = []

    @contextlib.contextmanager
    def context(name):
        entered.append(name)
        yield

    replay = Replay()
    router = Router(replay)
    with bound(replay, microbatch(0)):
        output = checkpoint(
            router, inputs(), use_reentrant=False, context_fn=lambda: (context("forward"), context("recompute"))
        )
    output.sum().backward()
    assert entered == ["forward", "recompute"]
    assert [again for again, _ in router.seen] == [False, True]


def test_a_function_with_keywords():
    replay = Replay()
    router = Router(replay)
    with bound(replay, microbatch(0)):
        output = checkpoint(lambda hidden, scale: router(hidden) * scale, inputs(), scale=3, use_reentrant=False)
    output.sum().backward()
    assert torch.equal(router.seen[0][1], router.seen[1][1])
