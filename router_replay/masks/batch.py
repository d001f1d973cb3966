"""Masks of many sequences: as a list, and as one tensor of rows."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, overload

import torch
from torch import Tensor

from router_replay.errors import InputError, PairingError
from router_replay.masks.arguments import as_bools, as_integer, as_tensor, require_type
from router_replay.masks.codecs.row_codec import get_codec
from router_replay.masks.geometry import RoutingGeometry
from router_replay.masks.masks import RoutingMasks, require_same_rows
from router_replay.masks.weight_versions import Runs, require_runs


@dataclass(frozen=True, eq=False, repr=False)
class RoutingMasksBatch:
    """Masks of n sequences, their rows end to end, so that they go to a device by one copy.

    `batch[i]` is sequence i's RoutingMasks, or None where it has none; `batch[a:b]` a batch of some of them. Both share
    the rows' memory; iterating gives what a list of masks would. Pickled it is little more than its rows, and comes
    back on the CPU.

    Attributes:
        rows: `uint8 [total, row_bytes]` on the CPU or a device, as `codec` writes them.
        valid: `bool [total]` as of RoutingMasks, on the CPU wherever the rows are.
        cu_seqlens: `int64 [n + 1]` on the CPU: rows [cu_seqlens[i], cu_seqlens[i + 1]) are those of sequence i.
        starts: n positions in their sequences of the first rows.
        geometry, codec: of all rows.
        weight_versions, token_digests: of each sequence, as of RoutingMasks; the digest is None where a sequence has no
            masks.

    Raises:
        InputError, PairingError: as of RoutingMasks, or attributes that are not those of n sequences.
    """

    rows: Tensor
    valid: Tensor
    cu_seqlens: Tensor
    starts: tuple[int, ...]
    geometry: RoutingGeometry
    codec: str
    weight_versions: tuple[Runs, ...]
    token_digests: tuple[str | None, ...]

    def __post_init__(self) -> None:
        require_type("geometry", self.geometry, RoutingGeometry)
        require_type("codec", self.codec, str)
        object.__setattr__(self, "rows", as_tensor("rows", self.rows))
        object.__setattr__(self, "valid", as_bools(self.valid).cpu())
        bounds = as_tensor("cu_seqlens", self.cu_seqlens).cpu()
        object.__setattr__(self, "cu_seqlens", bounds)
        get_codec(self.codec).require_row_bytes(self.rows, self.geometry)
        if self.valid.shape != self.rows.shape[:-1] or self.rows.dim() != 2:
            raise PairingError(
                f"valid is {self.valid.dtype} {tuple(self.valid.shape)} and rows are {tuple(self.rows.shape)}: a batch"
                " has rows [total, row_bytes] and valid torch.bool [total]"
            )
        if bounds.dtype != torch.int64 or bounds.dim() != 1 or not len(bounds):
            raise InputError(f"cu_seqlens is {bounds.dtype} {list(bounds.shape)}, but must be int64 [sequences + 1]")
        if int(bounds[0]) != 0 or int(bounds[-1]) != len(self.rows) or bool((bounds.diff() < 0).any()):
            raise PairingError(f"cu_seqlens {bounds.tolist()} must rise from 0 to the {len(self.rows)} rows")
        for name in ("starts", "weight_versions", "token_digests"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if len(getattr(self, name)) != len(self):
                raise PairingError(
                    f"{name} has {len(getattr(self, name))} entries, cu_seqlens is of {len(self)} sequences"
                )
        self._check_sequences()

    def _check_sequences(self) -> None:
        starts = tuple(as_integer("a start", start) for start in self.starts)
        object.__setattr__(self, "starts", starts)
        by_sequence = zip(starts, self.lengths, self.weight_versions, self.token_digests, strict=True)
        versions = []
        for index, (start, length, runs, digest) in enumerate(by_sequence):
            if start < 0:
                raise InputError(f"start of sequence {index} is {start}, but a position in a sequence is not negative")
            if digest is None and (start or length):
                raise PairingError(f"sequence {index} has {length} rows from {start} on, but no digest of its tokens")
            if digest is not None:
                require_type(f"token_digest of sequence {index}", digest, str)
            versions.append(require_runs(runs, start, start + length))
        object.__setattr__(self, "weight_versions", tuple(versions))

    @classmethod
    def of(cls, masks: Iterable[RoutingMasks | None]) -> RoutingMasksBatch:
        """One RoutingMasks a sequence, or None for a sequence that has none, as a batch; their rows are copied.

        Raises:
            InputError: something else than masks, or none at all.
            PairingError: masks of several models, codecs or devices.
        """
        listed = list_of_masks_or_none(masks)
        given = [(index, one) for index, one in enumerate(listed) if one is not None]
        if not given:
            raise InputError(f"none of {len(listed)} sequences has masks, so that there is no model that they are of")
        first_index, first = given[0]
        for index, one in given:
            require_same_rows(first, one, f"sequence {first_index}", f"sequence {index}")
            if one.rows.device != first.rows.device:
                raise PairingError(
                    f"rows of sequence {first_index} are on {first.rows.device}, of sequence {index} on"
                    f" {one.rows.device}: make the batch on the CPU and move it by batch.to(device)"
                )
        return cls(
            rows=torch.cat([one.rows for _, one in given]),
            valid=torch.cat([one.valid.cpu() for _, one in given]),
            cu_seqlens=_bounds([0 if one is None else len(one) for one in listed]),
            starts=tuple(0 if one is None else one.start for one in listed),
            geometry=first.geometry,
            codec=first.codec,
            weight_versions=tuple(() if one is None else one.weight_versions for one in listed),
            token_digests=tuple(None if one is None else one.token_digest for one in listed),
        )

    @cached_property
    def checksums(self) -> tuple[int, ...]:
        """CRC-32 of each sequence's rows, by which ranks tell that they were given the same masks."""
        return tuple(row_checksum(rows) for rows in self.rows.split(self.lengths))

    @property
    def lengths(self) -> list[int]:
        """Rows of each sequence."""
        return self.cu_seqlens.diff().tolist()

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    def __iter__(self) -> Iterator[RoutingMasks | None]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        without = self.token_digests.count(None)
        return (
            f"RoutingMasksBatch({len(self)} sequences, {without} without masks, {len(self.rows)} tokens,"
            f" {int(self.valid.sum())} valid, codec {self.codec!r}, {self.rows.numel():,} bytes on {self.rows.device})"
        )

    @overload
    def __getitem__(self, index: int) -> RoutingMasks | None: ...
    @overload
    def __getitem__(self, index: slice) -> RoutingMasksBatch: ...
    def __getitem__(self, index: int | slice) -> RoutingMasks | RoutingMasksBatch | None:
        """A sequence's masks, or a batch of some sequences.

        Raises:
            InputError: a sequence that is not there.
        """
        if not isinstance(index, slice):
            return self._sequence(self._number(index))
        chosen = range(len(self))[index]
        if chosen.step != 1:
            return self.select(chosen)
        first, last = self.cu_seqlens[[chosen.start, max(chosen.stop, chosen.start)]].tolist()
        return self._of_sequences(chosen, self.rows[first:last], self.valid[first:last])

    def select(self, sequences: Iterable[int]) -> RoutingMasksBatch:
        """A batch of the sequences of these numbers, in their order, a number as often as it is there; copies rows.

        Raises:
            InputError: a sequence that is not there.
        """
        chosen = [self._number(one) for one in sequences]
        rows, valid = self.rows.split(self.lengths), self.valid.split(self.lengths)
        return self._of_sequences(
            chosen,
            torch.cat([self.rows[:0], *(rows[one] for one in chosen)]),
            torch.cat([self.valid[:0], *(valid[one] for one in chosen)]),
        )

    def pin_memory(self) -> RoutingMasksBatch:
        """The batch with its rows in pinned memory, from which a copy to the device does not wait."""
        return replace(self, rows=self.rows.pin_memory())

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> RoutingMasksBatch:
        """The batch with its rows on a device, by one copy; everything else stays on the host, where it is read."""
        # Now, where the rows are on the host.
        checksums = self.checksums
        moved = replace(self, rows=self.rows.to(device, non_blocking=non_blocking))
        vars(moved)["checksums"] = checksums
        return moved

    def _number(self, index: Any) -> int:
        number = as_integer("the number of a sequence", index)
        if not -len(self) <= number < len(self):
            raise InputError(f"there is no sequence {number} in a batch of {len(self)}")
        return number % len(self)

    def _sequence(self, index: int) -> RoutingMasks | None:
        digest = self.token_digests[index]
        if digest is None:
            return None
        first, last = self.cu_seqlens[index : index + 2].tolist()
        return RoutingMasks(
            rows=self.rows[first:last],
            valid=self.valid[first:last],
            start=self.starts[index],
            geometry=self.geometry,
            codec=self.codec,
            weight_versions=self.weight_versions[index],
            token_digest=digest,
        )

    def _of_sequences(self, chosen: Iterable[int], rows: Tensor, valid: Tensor) -> RoutingMasksBatch:
        chosen, lengths = list(chosen), self.lengths
        part = replace(
            self,
            rows=rows,
            valid=valid,
            cu_seqlens=_bounds([lengths[one] for one in chosen]),
            starts=tuple(self.starts[one] for one in chosen),
            weight_versions=tuple(self.weight_versions[one] for one in chosen),
            token_digests=tuple(self.token_digests[one] for one in chosen),
        )
        if "checksums" in vars(self):
            vars(part)["checksums"] = tuple(self.checksums[one] for one in chosen)
        return part

    def __reduce__(self) -> tuple[Any, ...]:
        values = [getattr(self, field.name) for field in fields(self)]
        # As arrays: a tensor is pickled with all of the memory that it is a part of.
        return type(self), tuple(one.cpu().numpy() if isinstance(one, Tensor) else one for one in values)


def row_checksum(rows: Tensor) -> int:
    """CRC-32 of one sequence's rows; reads them back from a device."""
    return zlib.crc32(rows.cpu().contiguous().numpy())


def _bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def list_of_masks(masks: Iterable[RoutingMasks]) -> list[RoutingMasks]:
    """Masks of several sequences as a list, from any iterable.

    Raises:
        InputError: one RoutingMasks alone, a handle, or an iterable of something else.
    """
    listed = list_of_masks_or_none(masks)
    for index, one in enumerate(listed):
        if one is None:
            raise InputError(f"masks of sequence {index} are None: {_WAY_OUT}")
    return [one for one in listed if one is not None]


def list_of_masks_or_none(masks: Iterable[RoutingMasks | None]) -> list[RoutingMasks | None]:
    """As `list_of_masks`, but None may stand for a sequence that has no masks."""
    if isinstance(masks, RoutingMasks | str | bytes | Mapping) or not isinstance(masks, Iterable):
        raise InputError(f"masks of a microbatch are a list, got {_kind(masks)} alone: {_WAY_OUT}")
    listed = list(masks)
    for index, one in enumerate(listed):
        if one is not None and not isinstance(one, RoutingMasks):
            raise InputError(f"masks of sequence {index} are {_kind(one)}: {_WAY_OUT}")
    return listed


_WAY_OUT = "pass a list with one RoutingMasks for each sequence, as masks_from_meta_info gives them"


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
