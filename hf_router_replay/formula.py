"""Whether the formula by which replay computes gates is that of the installed router, tried out when it is attached.

A release that computes gates in another way has the same names and signatures. So a router of the same class and the
same settings, with small random weights on the CPU, gives gates for random hidden states, and what replay makes of the
same logits and experts must be these, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_router_replay.ledger import LEDGER
from hf_router_replay.live_model import LiveRouter
from router_replay.errors import SeamError
from router_replay.upstream import Installed

NUM_STATES = 16
"""Hidden states on which gates are compared."""


def require_formula(router: LiveRouter) -> None:
    """Refuse a router whose gates are others than those that replay would compute.

    Raises:
        SeamError: naming its class, the installed release and those that are tested.
    """
    generator = torch.Generator().manual_seed(0)
    twin = _twin(router, generator)
    hidden = torch.randn(NUM_STATES, router.module.hidden_dim, generator=generator).to(twin.weight.dtype)
    with torch.no_grad():
        output = router.stock.forward(twin, hidden)
        found = _difference(router, twin, output)
    if found:
        raise SeamError(
            f"{LEDGER.subject} does not fit {router.stock.__module__}.{router.stock.__name__} of transformers"
            f" {Installed(LEDGER.distribution).release}: {found}. This is {LEDGER.releases}. Install one of these, or"
            f" {LEDGER.way_out}."
        )


def _difference(router: LiveRouter, twin: Any, output: object) -> str | None:
    if not isinstance(output, tuple) or len(output) != 3 or not all(isinstance(each, Tensor) for each in output):
        return "its forward was expected to return logits, gates and experts, and returns something else"
    logits, gates, experts = output
    shapes = [list(each.shape) for each in output]
    num_experts, top_k = router.module.num_experts, router.module.top_k
    if shapes != [[NUM_STATES, num_experts], [NUM_STATES, top_k], [NUM_STATES, top_k]]:
        return f"its forward returns shapes {shapes} for {NUM_STATES} places, {num_experts} experts and top-{top_k}"
    ours = router.family.gates(twin, logits, experts)
    if ours.dtype != gates.dtype or not torch.equal(ours, gates):
        return "its gates are not those that the family's known formula gives for the same logits and experts"
    return None


def _twin(router: LiveRouter, generator: torch.Generator) -> Any:
    """A router with the settings of `router`, and weights of its own, whole and on the CPU."""
    twin: Any = nn.Module.__new__(router.stock)
    nn.Module.__init__(twin)
    settings = {name: value for name, value in vars(router.module).items() if not name.startswith("_")}
    vars(twin).update({name: value for name, value in settings.items() if name != "training"})
    scale = router.module.hidden_dim**-0.5
    for name, parameter in router.module.named_parameters(recurse=False):
        twin.register_parameter(name, nn.Parameter(_random(parameter, scale, generator)))
    for name, buffer in router.module.named_buffers(recurse=False):
        twin.register_buffer(name, _random(buffer, 0.1, generator))
    return twin


def _random(like: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    return (torch.randn(like.shape, generator=generator) * scale).to(like.dtype)
