"""Bindings in `torch.utils.checkpoint`, reentrant or not.

`checkpoint` itself is imported by value all over the place, so what it looks up in its own module is wrapped.
"""

from __future__ import annotations

from router_replay.replay.checkpoint import carried_by_forward, carried_by_generator
from router_replay.upstream import At, Ledger, Patch, Seam

_UNTIL = "torch lets a caller add state to every activation checkpoint"
_MODULES = ("utils.checkpoint", "distributed._composable.checkpoint_activation")
_GENERATORS = tuple(
    Seam(
        (
            At(f"{module}._checkpoint_without_reentrant_generator_impl", ">=2.14"),
            At(f"{module}._checkpoint_without_reentrant_generator", "<2.14"),
        ),
        ("fn",),
        "wrapped by checkpoint.carried_by_generator",
        "its fn is what a recompute calls, which has to see the masks of its own forward pass",
        _UNTIL,
    )
    for module in _MODULES
)

TORCH_LEDGER = Ledger(
    distribution="torch",
    title="PyTorch",
    prefix="torch.",
    subject="replay in activation checkpoints",
    tested=("2.14.1",),
    checked=("2.13.0",),
    way_out="train without replay",
    seams=(
        Seam(
            "utils.checkpoint.CheckpointFunction.forward",
            ("ctx", "run_function"),
            "wrapped by checkpoint.carried_by_forward",
            "its run_function is what a recompute calls, which has to see the masks of its own forward pass",
            _UNTIL,
        ),
        *_GENERATORS,
    ),
)
"""What bindings need of torch, private names among it."""

TORCH_PATCHES = (
    Patch(TORCH_LEDGER, "utils.checkpoint.CheckpointFunction.forward", carried_by_forward),
    *(Patch(TORCH_LEDGER, seam.name, carried_by_generator) for seam in _GENERATORS),
)
"""What every trainer's replay applies while it is attached; one set of objects in a process."""
