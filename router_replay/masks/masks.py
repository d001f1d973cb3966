"""RoutingMasks: the recorded routes of one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from router_replay.errors import InputError, PairingError
from router_replay.masks.codecs.row_codec import NO_ROW, choose_codec, get_codec
from router_replay.masks.digest import token_digest
from router_replay.masks.geometry import RoutingGeometry

TokenIds = Sequence[int] | Tensor


@dataclass(frozen=True, eq=False)
class RoutingMasks:
    """Routes of the tokens [start, end) of one sequence.

    Row t - start holds the experts that the forward pass which consumed token t chose. A rollout of n tokens has
    rows up to token n - 2: the last sampled token was never fed back.

    Attributes:
        rows: `uint8 [num_tokens, row_bytes]` on the CPU or a device, as `codec` writes them.
        valid: `bool [num_tokens]`; where False the route is unknown and the row's bytes mean nothing.
        start: position in the sequence of row 0; above 0 in a turn's delta.
        geometry: the routed layers, experts and top-k of the model that was recorded.
        codec: name of the codec of `rows`.
        weight_versions: runs (position, version): from that position on the rows were computed by those weights.
        token_digest: digest of the sequence's token ids [0, end), the whole prefix, since routes depend on all of it.
    """

    rows: Tensor
    valid: Tensor
    start: int
    geometry: RoutingGeometry
    codec: str
    weight_versions: tuple[tuple[int, str], ...]
    token_digest: str

    def __post_init__(self) -> None:
        get_codec(self.codec).require_row_bytes(self.rows, self.geometry)
        if self.valid.dtype != torch.bool or self.valid.shape != self.rows.shape[:-1] or self.rows.dim() != 2:
            raise PairingError(
                f"valid is {self.valid.dtype} {tuple(self.valid.shape)} and rows are {tuple(self.rows.shape)}: one"
                " sequence has rows [tokens, row_bytes] and valid torch.bool [tokens]"
            )
        if self.start < 0:
            raise InputError(f"start is {self.start}, but a position in a sequence is not negative")
        positions = [position for position, _ in self.weight_versions]
        if positions != sorted(set(positions)) or any(not self.start <= p < self.end for p in positions):
            raise InputError(
                f"weight_versions begin at positions {positions}, which must ascend within [{self.start}, {self.end})"
            )

    @property
    def num_tokens(self) -> int:
        """Number of rows, valid or not."""
        return self.rows.shape[0]

    @property
    def end(self) -> int:
        """Position after the last row."""
        return self.start + self.num_tokens

    def indices(self) -> Tensor:
        """Expert indices `int32 [num_tokens, L, K]`; rows that are not valid hold -1."""
        return get_codec(self.codec).unpack_valid(self.rows, self.valid, self.geometry)

    def check_tokens(self, token_ids: TokenIds) -> None:
        """Refuse the pairing with a sequence whose first `end` token ids are not those that were recorded.

        Args:
            token_ids: `int [n]`, n >= end: the whole sequence, prompt included.

        Raises:
            PairingError: fewer tokens than rows, or other tokens.
        """
        if len(token_ids) < self.end:
            raise PairingError(
                f"masks cover tokens [{self.start}, {self.end}), but the sequence has only {len(token_ids)} tokens:"
                " pair each sequence with its own masks"
            )
        found = token_digest(token_ids[: self.end])
        if found != self.token_digest:
            raise PairingError(
                f"masks were recorded for a sequence whose first {self.end} token ids have digest {self.token_digest},"
                f" the sequence given has {found}: pair each sequence with its own masks, and pass the token ids of"
                " the rollout unchanged (not text tokenized again)"
            )

    @classmethod
    def from_indices(
        cls,
        indices: Tensor,
        valid: Tensor,
        *,
        start: int,
        geometry: RoutingGeometry,
        codec: str,
        token_ids: TokenIds,
        weight_versions: tuple[tuple[int, str], ...] = (),
    ) -> RoutingMasks:
        """Masks from expert indices `int [num_tokens, L, K]`; rows that are not valid may hold anything.

        Args:
            token_ids: `int [n]`, n >= start + num_tokens, from which the digest is made.
            codec: a codec's name, or 'auto' for the smallest.

        Raises:
            InputError: a valid row with an index out of range or an expert twice.
            PairingError: fewer token ids than rows.
        """
        chosen = choose_codec(codec, geometry)
        end = start + indices.shape[0]
        if len(token_ids) < end:
            raise PairingError(f"rows up to position {end} were given with only {len(token_ids)} token ids")
        unknown = ~valid
        if bool(unknown.any()):
            placeholder = torch.arange(geometry.top_k, device=indices.device).to(indices.dtype)
            indices = torch.where(valid[:, None, None], indices, placeholder)
        rows = chosen.pack(indices, geometry)
        rows[unknown] = NO_ROW
        return cls(rows, valid, start, geometry, chosen.name, weight_versions, token_digest(token_ids[:end]))

    @classmethod
    def join(cls, parts: Sequence[RoutingMasks], token_ids: TokenIds) -> RoutingMasks:
        """Put the deltas of consecutive turns together: each part begins where the one before it ends.

        Args:
            parts: in order of position; the first may begin anywhere.
            token_ids: `int [n]`, n >= the last part's end; every part is checked against them.

        Raises:
            PairingError: a part was recorded for other tokens.
            PairingError: parts of different models or codecs.
            PairingError: a gap, an overlap, or rows of unknown weights after rows of known ones.
        """
        if not parts:
            raise InputError("no masks to join")
        first = parts[0]
        for number, part in enumerate(parts):
            part.check_tokens(token_ids)
            first.geometry.require_same(part.geometry, "part 0", f"part {number}")
            if part.codec != first.codec:
                raise PairingError(f"part 0 has codec {first.codec!r}, part {number} has {part.codec!r}")
            if number and part.start != parts[number - 1].end:
                raise PairingError(
                    f"part {number - 1} ends at position {parts[number - 1].end}, part {number} begins at {part.start}:"
                    " ask for each delta with routed_experts_start_len at the end of the masks before it"
                )
        runs: list[tuple[int, str]] = []
        for number, part in enumerate(parts):
            stated_from = part.weight_versions[0][0] if part.weight_versions else part.end
            if runs and bool(part.valid[: stated_from - part.start].any()):
                raise PairingError(
                    f"part {number} does not say which weights computed its valid rows before position {stated_from},"
                    " but parts before it do: joined, those rows would seem to be theirs"
                )
            for position, version in part.weight_versions:
                if not runs or runs[-1][1] != version:
                    runs.append((position, version))
        return replace(
            first,
            rows=torch.cat([part.rows for part in parts]),
            valid=torch.cat([part.valid for part in parts]),
            weight_versions=tuple(runs),
            token_digest=parts[-1].token_digest,
        )
