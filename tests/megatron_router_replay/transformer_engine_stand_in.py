"""What Megatron's te_checkpoint leads to: the two forms of Transformer Engine's checkpoint, without its states.

As there, the reentrant form keeps its function in an autograd function, and the other one asks for two contexts; both
are looked up in the module at every call.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


class _CheckpointFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run_function: Callable,
        distribute_saved_activations: bool,
        get_rng_state_tracker: Callable | None,
        tp_group: Any,
        context_fn: Callable | None,
        kwargs: dict[str, Any],
        *args: Any,
    ) -> Any:
        ctx.run_function, ctx.kwargs = run_function, kwargs
        ctx.others = [None if torch.is_tensor(arg) else arg for arg in args]
        ctx.save_for_backward(*(arg if torch.is_tensor(arg) else None for arg in args))
        with torch.no_grad():
            return run_function(*args, **kwargs)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor | None) -> Any:
        inputs = [
            other if saved is None else saved.detach().requires_grad_(saved.requires_grad)
            for saved, other in zip(ctx.saved_tensors, ctx.others, strict=True)
        ]
        with torch.enable_grad():
            outputs = ctx.run_function(*inputs, **ctx.kwargs)
        outputs = (outputs,) if torch.is_tensor(outputs) else outputs
        pairs = [(out, slope) for out, slope in zip(outputs, slopes, strict=True) if torch.is_tensor(out)]
        pairs = [(out, slope) for out, slope in pairs if out.requires_grad]
        torch.autograd.backward([out for out, _ in pairs], [slope for _, slope in pairs])
        return (*[None] * 6, *(each.grad if torch.is_tensor(each) else None for each in inputs))


def get_activation_recompute_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    return contextlib.nullcontext(), contextlib.nullcontext()


def checkpoint(
    function: Callable,
    *args: Any,
    distribute_saved_activations: bool = False,
    get_rng_state_tracker: Callable | None = None,
    tp_group: Any = None,
    use_reentrant: bool = True,
    **kwargs: Any,
) -> Any:
    if use_reentrant:
        return _CheckpointFunction.apply(
            function, distribute_saved_activations, get_rng_state_tracker, tp_group, None, kwargs, *args
        )
    forward_context, recompute_context = get_activation_recompute_contexts()
    numbers = itertools.count()
    recomputed: list[Tensor] = []

    def again() -> None:
        def keep(tensor: Tensor) -> Tensor:
            recomputed.append(tensor.detach())
            return tensor

        with torch.enable_grad(), recompute_context, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            function(*args, **kwargs)

    def pack(tensor: Tensor) -> int:
        return next(numbers)

    def unpack(index: int) -> Tensor:
        if not recomputed:
            again()
        return recomputed[index]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack), forward_context:
        return function(*args, **kwargs)
