"""What the ranks of process groups do together: raise the same error, and add up, with gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from router_replay.errors import InputError, RouterReplayError


def together[Result](local: Callable[[], Result], *groups: dist.ProcessGroup | None) -> Result:
    """The result of `local`, or the same error on every rank of the groups if it fails on one of them.

    An error that is raised on one rank leaves the others in their next collective, to wait for it until that times out.
    Every rank of the groups calls this, and waits for the others and for the device; groups that are None have no other
    ranks. Of two groups that cross, such as data and context parallel, the error reaches all ranks of both. Nothing in
    `local` may be a collective: the others are not in it.

    Raises:
        RouterReplayError: of the class that was raised, with the first rank that did and what it said. An error of
            another kind, such as memory that has run out, is RouterReplayError itself, with its name. Without groups
            it is raised as it is.
    """
    if all(group is None for group in groups):
        return local()
    problem: Exception | None = None
    try:
        result = local()
    except Exception as error:
        problem = error
    found = {rank: each for rank, each in of_all(_said(problem), *groups).items() if each is not None}
    if found:
        (rank, (kind, text)), *others = found.items()
        also = f" (others on ranks {[each[0] for each in others]})" if others else ""
        raise kind(f"on rank {rank}{also}: {text}") from problem
    return result


def of_all[Item](item: Item, *groups: dist.ProcessGroup | None) -> dict[int, Item]:
    """One of each rank of the groups, by global rank, rising; by anything that pickle takes.

    Every rank calls, and waits for the others and for the device. Of two groups that cross it is that of all ranks of
    both, the same on each. Without a group it is that of rank 0.

    Raises:
        InputError: this rank is not in one of the groups, whose ranks do not wait for it.
    """
    joined = [group for group in groups if group is not None]
    for group in joined:
        if dist.get_rank(group) < 0:
            raise InputError(
                f"rank {dist.get_rank()} is not in a process group that it was given: pass the group"
                " that this rank belongs to, or None where it has no others to wait for"
            )
    found = {dist.get_rank() if joined else 0: item}
    for group in joined:
        found = {rank: each for of_rank in gathered(found, group) for rank, each in of_rank.items()}
    return dict(sorted(found.items()))


def _said(problem: Exception | None) -> tuple[type[RouterReplayError], str] | None:
    if problem is None:
        return None
    if isinstance(problem, RouterReplayError):
        return type(problem), str(problem)
    return RouterReplayError, f"{type(problem).__qualname__}: {problem}"


def gathered[Item](item: Item, group: dist.ProcessGroup) -> list[Item]:
    """One of each rank of the group, by anything that pickle takes; waits for the device."""
    items: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(items, item, group=group)
    return items


def summed(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the group's ranks, the same on each; every rank's gradient is that of its own addend.

    What follows is computed alike on every rank: the gradient is of one copy of it, not of all.
    """
    return _Summed.apply(values, group)


def shared(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Values that every rank has alike, on their way to what each rank has a part of; gradients are summed back."""
    return _Shared.apply(values, group)


def maximum(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The maximum over the group's ranks, detached."""
    found = values.detach().clone()
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return found


def rows_of_all(rows: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """`[n, ...]` of each rank, whose n are the `sizes`, behind each other; detached."""
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        found = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(found, group=group)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        found = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(found, group=ctx.group)
        return found, None
