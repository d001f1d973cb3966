"""The microbatches of a step, as a host has them: whole sequences, on every stage and rank alike."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_router_replay import BatchLayout
from router_replay.masks.geometry import RoutingGeometry
from router_replay.masks.masks import RoutingMasks
from tests.megatron_router_replay.batches import random_batch
from tests.megatron_router_replay.parallel.cases import NUM_EXPERTS, Case

# Every length divides by twice the context-parallel and the tensor-parallel size of all cases.
ALIGNMENT = 8
PADDED_LENGTHS = ((16, 11), (9, 16), (16, 16), (5, 16))
# Of different numbers of sequences, one of them full to its bound; all packs end in a tail pad.
PACKED_LENGTHS = ((9, 7, 3), (8, 16, 5), (20, 3), (6, 10, 8))
PACK_SIZE = 40
# Keeps the loss of one microbatch in the order of one.
LOSS_SCALE = 1 / 16


@dataclass(frozen=True)
class Microbatch:
    """One microbatch of the whole batch.

    Attributes:
        index: among the microbatches of all data-parallel ranks.
        token_ids, labels, position_ids: int64 `[B, S]`; packed batches have B = 1.
        weights: float64 `[B, S]`, the loss of each place; 0 where a place has no next token.
        mtp_mask: float64 `[B, S]`, places that count in the loss of multi-token prediction.
        bounds: where the sequences of a pack begin and end, the tail pad last; None for a padded batch.
        masks: one per sequence.
        indices: experts that the masks were made from, int64 `[num_tokens, L, K]` per sequence.
        layout: of whole sequences.
    """

    index: int
    token_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    weights: Tensor
    mtp_mask: Tensor
    bounds: tuple[int, ...] | None
    masks: list[RoutingMasks]
    indices: list[Tensor]
    layout: BatchLayout

    def place(self, sequence: int, position: int) -> int:
        """Place of a token among those of the whole microbatch, flattened from `[S, B]`."""
        if self.bounds is not None:
            return self.bounds[sequence] + position
        return position * self.token_ids.shape[0] + sequence

    def is_read(self) -> Tensor:
        """Places whose output something reads, `bool [S * B]`: not padding, nor the last token of a sequence."""
        read = torch.zeros(self.token_ids.numel(), dtype=torch.bool)
        for sequence, masks in enumerate(self.masks):
            read[[self.place(sequence, position) for position in range(masks.num_tokens)]] = True
        return read

    def recorded(self, layer_index: int) -> Iterator[tuple[int, list[int]]]:
        """(place, experts) of every token with a valid row, for the MoE layer of that ordinal."""
        for sequence, (masks, indices) in enumerate(zip(self.masks, self.indices, strict=True)):
            for position in masks.valid.nonzero().flatten().tolist():
                yield self.place(sequence, position), sorted(indices[position, layer_index].tolist())


def geometry(case: Case) -> RoutingGeometry:
    """The whole model's."""
    return RoutingGeometry(len(case.hybrid) or case.num_layers, case.moe_layers, NUM_EXPERTS, case.top_k)


def microbatches(case: Case) -> list[Microbatch]:
    """All of a step's, the same for all cases with one `one_rank()`."""
    return [_microbatch(case, index) for index in range(case.num_microbatches)]


def columns(case: Case, microbatch: Microbatch, cp_rank: int) -> Tensor:
    """Columns of `[B, S]` that a context-parallel rank has, in its order."""
    length = microbatch.token_ids.shape[1]
    if case.cp == 1 or case.context_order == "contiguous":
        return torch.arange(length).chunk(case.cp)[cp_rank]
    parts = []
    for start, end in itertools.pairwise(microbatch.bounds or (0, length)):
        chunks = torch.arange(start, end).chunk(2 * case.cp)
        parts += [chunks[cp_rank], chunks[2 * case.cp - 1 - cp_rank]]
    return torch.cat(parts)


def places(case: Case, microbatch: Microbatch, cp_rank: int, tp_rank: int) -> Tensor:
    """Places of the whole microbatch, flattened from `[S, B]`, that are the rows of a router's input on a rank."""
    batch, length = microbatch.token_ids.shape
    own = torch.arange(length * batch).view(length, batch)[columns(case, microbatch, cp_rank)]
    return own.chunk(case.tp)[tp_rank].flatten()


def _microbatch(case: Case, index: int) -> Microbatch:
    lengths = (PACKED_LENGTHS if case.packed else PADDED_LENGTHS)[index % 4]
    batch = random_batch(geometry(case), lengths, seed=index)
    generator = torch.Generator().manual_seed(1000 + index)
    if case.packed:
        rooms = [-(-length // ALIGNMENT) * ALIGNMENT for length in lengths]
        whole = (0, *torch.tensor(rooms).cumsum(0).tolist(), PACK_SIZE)
        starts, shape = whole[:-2], (1, PACK_SIZE)
    else:
        width = batch.token_ids.shape[1]
        whole, rooms = None, [width] * len(lengths)
        starts, shape = tuple(row * width for row in range(len(lengths))), (len(lengths), width)
    # Padding has token ids, too, and routes.
    ids = torch.randint(0, 96, shape, generator=generator)
    labels, weights = torch.zeros_like(ids), torch.zeros(shape).double()
    mtp_mask = _mtp_mask(shape, starts, rooms, lengths)
    random_weights = torch.randn(shape, generator=generator, dtype=torch.float64)
    positions = torch.arange(shape[1]).expand(shape).clone()
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        tokens = slice(start, start + length)
        ids.view(-1)[tokens] = batch.token_ids[row, :length]
        labels.view(-1)[start : start + length - 1] = batch.token_ids[row, 1:length]
        weights.view(-1)[start : start + length - 1] = random_weights.view(-1)[start : start + length - 1]
        if case.packed:
            positions.view(-1)[tokens] = torch.arange(length)
    layout = BatchLayout.padded(ids, lengths) if whole is None else BatchLayout.packed(ids, whole, lengths)
    return Microbatch(index, ids, labels, positions, weights, mtp_mask, whole, batch.masks, batch.indices, layout)


def _mtp_mask(shape: tuple[int, int], starts: Sequence[int], rooms: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Ones for some tokens that the two context-parallel ranks of a zigzag have as many of.

    Megatron divides the loss of multi-token prediction by the places that count on the rank, and averages over the
    ranks. Of the four parts of a sequence the first is the first rank's, the second is the other's; the last token and
    padding do not count, since what they compute is nobody's. Each one stands behind its place: Megatron shifts the
    mask back by one, as it does the labels.
    """
    mask = torch.zeros(shape, dtype=torch.float64)
    for start, room, length in zip(starts, rooms, lengths, strict=True):
        part = room // 4
        count = max(0, min(part, length - 1 - part))
        for first in (start, start + part):
            mask.view(-1)[first + 1 : first + 1 + count] = 1
    assert mask.sum() > 0
    return mask
