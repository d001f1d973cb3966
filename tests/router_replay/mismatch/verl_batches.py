"""Random batches in the form that both this package and verl take: padded, no NaN, as many rows as they please."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from router_replay.mismatch import Responses


@dataclass(frozen=True)
class Batch:
    """Log-probabilities `[B, T]` of three policies, response mask int64, prompt ids and a reward for each row."""

    current: Tensor
    trainer: Tensor
    rollout: Tensor
    mask: Tensor
    index: np.ndarray
    rewards: Tensor

    @property
    def responses(self) -> Responses:
        return Responses.padded(self.mask, torch.tensor(self.index))

    @property
    def rewards_at_the_end(self) -> Tensor:
        """As verl takes them: on each response's last token."""
        later = self.mask.flip(-1).cumsum(-1).flip(-1)
        return self.rewards[:, None] * self.mask * (later == 1)


def random_batch(
    seed: int,
    rows: int = 12,
    width: int = 9,
    *,
    holes: bool = False,
    empty: bool = False,
    noise: float = 0.5,
    dtype: torch.dtype = torch.float64,
) -> Batch:
    """Responses from the left, of any length; `holes` for tokens of others in between, `empty` for rows with none."""
    generator = torch.Generator().manual_seed(seed)
    rollout = -4 * torch.rand(rows, width, generator=generator, dtype=dtype) - 1
    trainer = rollout + noise * torch.randn(rows, width, generator=generator, dtype=dtype)
    current = trainer + 0.3 * torch.randn(rows, width, generator=generator, dtype=dtype)
    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
    mask = torch.arange(width) < lengths
    if holes:
        mask &= (torch.rand(rows, width, generator=generator) < 0.7) | (torch.arange(width) == 0)
    if empty:
        mask[[1, rows - 1]] = False
    index = np.array([3, 3, 8, 5, 8, 3, 8, 5, 3, 8, 5, 3][:rows])
    rewards = torch.rand(rows, generator=generator, dtype=dtype).round(decimals=1)
    return Batch(current, trainer, rollout, mask.long(), index, rewards)
