"""Random batches with random masks, for either trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from router_replay.masks.geometry import RoutingGeometry
from router_replay.masks.masks import RoutingMasks
from router_replay.replay import BatchLayout


@dataclass
class Batch:
    """Padded token ids, and per sequence its masks and the indices they were made from.

    Attributes:
        batch_first: whether routers see the padded batch sequence by sequence, else step by step.
    """

    token_ids: Tensor
    lengths: tuple[int, ...]
    masks: list[RoutingMasks]
    indices: list[Tensor]
    geometry: RoutingGeometry
    batch_first: bool = False

    @property
    def layout(self) -> BatchLayout:
        return BatchLayout.padded(self.token_ids, self.lengths)

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32)

    @property
    def packed_ids(self) -> Tensor:
        return torch.cat([self.token_ids[i, :n] for i, n in enumerate(self.lengths)])[None]

    @property
    def packed_layout(self) -> BatchLayout:
        return BatchLayout.packed(self.packed_ids, self.cu_seqlens)

    def place(self, sequence: int, position: int) -> int:
        """Place of a token in the flattened [S, B, H], or [B, S, H]."""
        if self.batch_first:
            return sequence * self.token_ids.shape[1] + position
        return position * len(self.lengths) + sequence

    def recorded(self, layer: int) -> Iterator[tuple[int, set[int]]]:
        """(place, experts) for every token of a padded batch whose mask row is valid."""
        layer_index = self.geometry.moe_layers.index(layer)
        for sequence, (one, indices) in enumerate(zip(self.masks, self.indices, strict=True)):
            for position in one.valid.nonzero().flatten().tolist():
                yield self.place(sequence, position), set(indices[position, layer_index].tolist())

    def native(self) -> list[int]:
        """Places of a padded batch whose tokens have no valid mask row, but for the last token of each sequence."""
        return [
            self.place(sequence, position)
            for sequence, (one, length) in enumerate(zip(self.masks, self.lengths, strict=True))
            for position in range(length - 1)
            if position >= one.num_tokens or not one.valid[position]
        ]

    def unread(self) -> list[int]:
        """Places of a padded batch behind the end of their sequence, and of its last token, which was not fed back."""
        width = self.token_ids.shape[1]
        return [self.place(i, position) for i, n in enumerate(self.lengths) for position in range(n - 1, width)]


def random_indices(geometry: RoutingGeometry, num_tokens: int, generator: torch.Generator) -> Tensor:
    """Distinct experts `[num_tokens, L, K]` in random order."""
    shape = (num_tokens, geometry.num_moe_layers, geometry.num_experts)
    return torch.rand(shape, generator=generator).argsort(-1)[..., : geometry.top_k]


def random_batch(
    geometry: RoutingGeometry,
    lengths: Sequence[int],
    seed: int,
    codec: str = "bitset",
    invalid: float = 1 / 3,
    batch_first: bool = False,
) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(0, 96, (len(lengths), max(lengths)), generator=generator)
    masks, all_indices = [], []
    for sequence, length in enumerate(lengths):
        indices = random_indices(geometry, length - 1, generator)
        valid = torch.rand(length - 1, generator=generator) >= invalid
        masks.append(
            RoutingMasks.from_indices(
                indices,
                valid,
                start=0,
                geometry=geometry,
                codec=codec,
                token_ids=token_ids[sequence, :length],
                weight_versions=((0, "v0"),),
            )
        )
        all_indices.append(indices)
    return Batch(token_ids, tuple(lengths), masks, all_indices, geometry, batch_first)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
