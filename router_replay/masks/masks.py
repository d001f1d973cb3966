"""RoutingMasks: the recorded routes of one sequence."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from router_replay.errors import InputError, PairingError
from router_replay.masks.arguments import as_bools, as_integer, as_tensor, require_type
from router_replay.masks.codecs.row_codec import NO_ROW, choose_codec, get_codec
from router_replay.masks.digest import PrefixDigest, TokenIds, as_token_ids, token_digest
from router_replay.masks.geometry import RoutingGeometry
from router_replay.masks.weight_versions import Runs, joined_runs, require_runs, runs_within

_INDEX_DTYPES = (torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64)


@dataclass(frozen=True, eq=False, repr=False)
class RoutingMasks:
    """Routes of the tokens [start, end) of one sequence.

    Row t - start holds the experts that the forward pass which consumed token t chose. A rollout of n tokens has
    rows up to token n - 2: the last sampled token was never fed back. Pickled they are little more than their rows, and
    come back on the CPU.

    Attributes:
        rows: `uint8 [num_tokens, row_bytes]` on the CPU or a device, as `codec` writes them.
        valid: `bool [num_tokens]`; where False the route is unknown and the row's bytes mean nothing.
        start: position in the sequence of row 0; above 0 in a turn's delta.
        geometry: the routed layers, experts and top-k of the model that was recorded.
        codec: name of the codec of `rows`.
        weight_versions: runs (position, version): from that position on the rows were computed by those weights.
        token_digest: digest of the sequence's token ids [0, end), the whole prefix, since routes depend on all of it.

    Raises:
        InputError: an attribute of another type, a negative start, or runs outside of the rows.
        PairingError: rows, valid, codec and geometry that do not fit each other.
    """

    rows: Tensor
    valid: Tensor
    start: int
    geometry: RoutingGeometry
    codec: str
    weight_versions: Runs
    token_digest: str

    def __post_init__(self) -> None:
        require_type("geometry", self.geometry, RoutingGeometry)
        require_type("codec", self.codec, str)
        require_type("token_digest", self.token_digest, str)
        object.__setattr__(self, "rows", as_tensor("rows", self.rows))
        object.__setattr__(self, "valid", as_bools(self.valid))
        object.__setattr__(self, "start", as_integer("start", self.start))
        get_codec(self.codec).require_row_bytes(self.rows, self.geometry)
        if self.valid.shape != self.rows.shape[:-1] or self.rows.dim() != 2:
            raise PairingError(
                f"valid is {self.valid.dtype} {tuple(self.valid.shape)} and rows are {tuple(self.rows.shape)}: one"
                " sequence has rows [tokens, row_bytes] and valid torch.bool [tokens]"
            )
        if self.start < 0:
            raise InputError(f"start is {self.start}, but a position in a sequence is not negative")
        object.__setattr__(self, "weight_versions", require_runs(self.weight_versions, self.start, self.end))

    @property
    def num_tokens(self) -> int:
        """Number of rows, valid or not."""
        return self.rows.shape[0]

    @property
    def end(self) -> int:
        """Position after the last row."""
        return self.start + self.num_tokens

    def __len__(self) -> int:
        return self.num_tokens

    def __reduce__(self) -> tuple[Any, ...]:
        # As arrays: a tensor is pickled with all of the memory that it is a part of. They come back on the CPU.
        rows, valid = self.rows.cpu().numpy(), self.valid.cpu().numpy()
        fields = (self.start, self.geometry, self.codec, self.weight_versions, self.token_digest)
        return type(self), (rows, valid, *fields)

    def __repr__(self) -> str:
        geometry = self.geometry
        return (
            f"RoutingMasks({self.num_tokens} tokens [{self.start}, {self.end}), {int(self.valid.sum())} valid,"
            f" {geometry.num_moe_layers} MoE layers of {geometry.top_k} of {geometry.num_experts} experts,"
            f" codec {self.codec!r}, {self.rows.numel():,} bytes)"
        )

    def __getitem__(self, rows: slice) -> RoutingMasks:
        """`masks[a:]`, without the first `a` rows: a turn's delta.

        `start` moves by `a`. The digest stays, since it covers the tokens [0, end); the weights of the first row that
        is left stay named.

        Raises:
            InputError: anything else than `[a:]` with a >= 0, which would need another digest.
        """
        try:
            first = operator.index(rows.start or 0) if isinstance(rows, slice) and rows.stop is None else -1
        except TypeError:
            first = -1
        if first < 0 or rows.step not in (None, 1):
            text = "masks[a:b:c]" if isinstance(rows, slice) else "masks[i]"
            raise InputError(
                f"{text} with {rows!r}: only masks[a:] with a >= 0 keeps the digest of all tokens up to the last row."
                " For a sequence that was cut short to n tokens use masks.cut(n, token_ids); the experts of single rows"
                " are in masks.indices()"
            )
        start = self.start + min(first, self.num_tokens)
        return replace(
            self,
            rows=self.rows[first:],
            valid=self.valid[first:],
            start=start,
            weight_versions=runs_within(self.weight_versions, start, self.end),
        )

    def cut(self, n: int, token_ids: TokenIds) -> RoutingMasks:
        """Masks of the sequence's first `n` tokens, for a response that was cut short: rows [start, min(end, n)).

        Runs of `weight_versions` that begin at `n` or later are left out; those before it stay as they are.

        Args:
            n: length of the sequence that is left, prompt included.
            token_ids: `int [m]`, m >= end: the sequence as it was before the cut. The old digest is checked against
                them, then the new one made.

        Raises:
            InputError: `n` is no integer, or below `start`, where no row would be left of these.
            PairingError: the masks are of other tokens, or the ids are already cut.
        """
        n = as_integer("n", n)
        if n < self.start:
            raise InputError(
                f"cut to {n} tokens, but these masks begin at position {self.start}: leave them out altogether"
            )
        ids = as_token_ids(token_ids)
        if len(ids) < self.end:
            raise PairingError(
                f"masks cover tokens [{self.start}, {self.end}), but only {len(ids)} token ids are given: pass those of"
                " the sequence as it was before the cut, from which the new digest is made"
            )
        self.check_tokens(ids)
        end = min(self.end, n)
        return replace(
            self,
            rows=self.rows[: end - self.start],
            valid=self.valid[: end - self.start],
            weight_versions=runs_within(self.weight_versions, self.start, end),
            token_digest=token_digest(ids[:end]),
        )

    def indices(self) -> Tensor:
        """Expert indices `int32 [num_tokens, L, K]`; rows that are not valid hold -1."""
        return get_codec(self.codec).unpack_valid(self.rows, self.valid, self.geometry)

    def check_tokens(self, token_ids: TokenIds) -> None:
        """Refuse the pairing with a sequence whose first `end` token ids are not those that were recorded.

        Args:
            token_ids: `int [n]`, n >= end: the whole sequence, prompt included.

        Raises:
            InputError: text, floats, bools, or ids of several sequences.
            PairingError: fewer tokens than rows, or other tokens.
        """
        self.check_prefix(as_token_ids(token_ids), PrefixDigest())

    def check_prefix(self, ids: np.ndarray, known: PrefixDigest) -> PrefixDigest:
        """As `check_tokens`, where the digest of some of the first ids is known, so that these are not hashed again.

        Args:
            ids: `int64 [n]`, as `as_token_ids` gives them.
            known: of `ids[:known.length]`.

        Returns:
            The digest of `ids[:end]`.
        """
        if len(ids) < self.end:
            raise PairingError(
                f"masks cover tokens [{self.start}, {self.end}), but the sequence has only {len(ids)} tokens: pair each"
                " sequence with its own masks; of one that was cut short to n tokens take masks.cut(n, token_ids)"
            )
        digest = known.grown(ids, self.end)
        if (found := digest.hexdigest()) != self.token_digest:
            raise PairingError(
                f"masks were recorded for a sequence whose first {self.end} token ids have digest {self.token_digest},"
                f" the sequence given has {found}: pair each sequence with its own masks, and pass the token ids of"
                " the rollout unchanged (not text tokenized again)"
            )
        return digest

    @classmethod
    def from_indices(
        cls,
        indices: Tensor | np.ndarray,
        valid: Tensor | np.ndarray,
        *,
        start: int,
        geometry: RoutingGeometry,
        codec: str,
        token_ids: TokenIds,
        weight_versions: Runs = (),
    ) -> RoutingMasks:
        """Masks from expert indices `int [num_tokens, L, K]`; rows that are not valid may hold anything.

        Args:
            valid: `bool [num_tokens]`.
            token_ids: `int [n]`, n >= start + num_tokens, from which the digest is made.
            codec: a codec's name, or 'auto' for the smallest.

        Raises:
            InputError: an argument of another type or shape, a valid row with an index out of range or an expert twice.
            PairingError: fewer token ids than rows, or indices, `valid` and geometry that do not fit each other.
        """
        indices, valid = as_tensor("indices", indices), as_bools(valid)
        require_type("geometry", geometry, RoutingGeometry)
        require_type("codec", codec, str)
        if indices.dtype not in _INDEX_DTYPES or indices.dim() != 3:
            raise InputError(
                f"indices are {indices.dtype} {list(indices.shape)}, but must be integers [tokens, MoE layers, top-k]"
            )
        if valid.shape != indices.shape[:1]:
            raise PairingError(f"valid is {list(valid.shape)}, but there are indices of {len(indices)} tokens")
        chosen = choose_codec(codec, geometry)
        end = as_integer("start", start) + indices.shape[0]
        ids = as_token_ids(token_ids)
        if len(ids) < end:
            raise PairingError(f"rows up to position {end} were given with only {len(ids)} token ids")
        unknown = ~valid
        if bool(unknown.any()):
            placeholder = torch.arange(geometry.top_k, device=indices.device).to(indices.dtype)
            indices = torch.where(valid[:, None, None], indices, placeholder)
        rows = chosen.pack(indices, geometry)
        rows[unknown] = NO_ROW
        return cls(rows, valid, start, geometry, chosen.name, weight_versions, token_digest(ids[:end]))

    @classmethod
    def join(cls, parts: Iterable[RoutingMasks], token_ids: TokenIds) -> RoutingMasks:
        """Put the deltas of consecutive turns together: each part begins where the one before it ends.

        Every token id is hashed once, however many parts there are. `Rollout` collects the parts of a conversation.

        Args:
            parts: in order of position; the first may begin anywhere.
            token_ids: `int [n]`, n >= the last part's end; every part is checked against them.

        Raises:
            InputError: no parts, or parts that are no masks.
            PairingError: a part was recorded for other tokens, another model or with another codec; parts out of order,
                with a gap or an overlap; rows of unknown weights after rows of known ones.
        """
        parts, ids = _parts(parts), as_token_ids(token_ids)
        first, digest = parts[0], PrefixDigest()
        for number, part in enumerate(parts):
            digest = part.check_prefix(ids, digest)
            require_same_rows(first, part, "part 0", f"part {number}")
            if number:
                _require_adjacent(parts[number - 1], part, number)
        return replace(
            first,
            rows=torch.cat([part.rows for part in parts]),
            valid=torch.cat([part.valid for part in parts]),
            weight_versions=joined_runs([(part.weight_versions, part.start, part.valid) for part in parts]),
            token_digest=parts[-1].token_digest,
        )


def require_same_rows(first: RoutingMasks, other: RoutingMasks, ours: str, theirs: str) -> None:
    """Raise PairingError unless both are rows of one model and one codec; `ours` and `theirs` name the two."""
    first.geometry.require_same(other.geometry, ours, theirs)
    if other.codec != first.codec:
        raise PairingError(
            f"{ours} has codec {first.codec!r}, {theirs} has {other.codec!r}: rows that are put together need one codec"
        )


def _parts(parts: Any) -> list[RoutingMasks]:
    if isinstance(parts, RoutingMasks):
        raise InputError("join takes a list of masks, got one RoutingMasks: pass [masks], or use the masks as they are")
    if isinstance(parts, Mapping) or not isinstance(parts, Iterable):
        raise InputError(f"join takes a list of RoutingMasks, got a {type(parts).__name__}; {_LOADED}")
    found = list(parts)
    if not found:
        raise InputError("no masks to join")
    for number, part in enumerate(found):
        if not isinstance(part, RoutingMasks):
            raise InputError(f"part {number} to join is a {type(part).__name__}, not RoutingMasks; {_LOADED}")
    return found


_LOADED = "of an answer take masks_from_meta_info(meta_info), of a handle load(handle)"


def _require_adjacent(before: RoutingMasks, part: RoutingMasks, number: int) -> None:
    if part.start == before.end:
        return
    found = f"part {number - 1} ends at position {before.end}, part {number} begins at {part.start}: "
    if (part.start, part.end) < (before.start, before.end):
        raise PairingError(
            found + "the parts are out of order: sorted(parts, key=lambda part: (part.start, part.end)) puts them right"
        )
    if part.start < before.end:
        found += f"drop the rows that are there twice by masks[{before.end - part.start}:] of part {number}, or "
    raise PairingError(found + "ask for each delta with routed_experts_start_len at the end of the masks before it")
