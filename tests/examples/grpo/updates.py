"""Steps of the trainer's part on their own."""

from __future__ import annotations

import torch

from examples.grpo.loop import Updates
from examples.grpo.settings import Settings

SETTINGS = Settings(problems=2, group_size=4, minibatches=1, microbatch=4, warmup=1)


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


def gradients(model, replay, conversations, settings) -> list[torch.Tensor]:
    class Kept(torch.optim.SGD):
        """Leaves weights and gradients as they are."""

        def step(self, closure=None):
            return None

    Updates(model, replay, Kept(model.parameters()), settings).step(1, conversations, lambda: None)
    return [parameter.grad.clone() for parameter in model.parameters()]
