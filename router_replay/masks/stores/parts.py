"""Handles of several parts: one sequence whose rows several servers recorded, such as a prefill's and a decode's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import numpy as np

from router_replay.errors import DataError, InputError, PairingError
from router_replay.masks.masks import RoutingMasks
from router_replay.masks.stores import load, open_store
from router_replay.masks.stores.handles import require_store
from router_replay.masks.stores.store import Handle, Stat, Store
from router_replay.masks.weight_versions import Runs

URL = "parts:"


def handle_of_parts(parts: Sequence[Handle], token_digests: Sequence[str]) -> dict[str, Any]:
    """One handle of several, each of rows of the same sequence.

    Args:
        parts: handles of any stores; of rows that several hold, the first one that holds a valid one gives it.
        token_digests: for each part, the `token_digest` of the sequence's tokens up to that part's end, made from the
            whole sequence by who knows it, the server that ends it, and not copied from the parts: it is what ties them
            to one sequence.

    Raises:
        InputError: no parts, or not as many digests.
    """
    if not parts or len(parts) != len(token_digests):
        raise InputError(f"a handle of {len(parts)} parts with {len(token_digests)} token digests: each part needs one")
    return {"store": URL, "parts": [dict(part) for part in parts], "token_digests": list(token_digests)}


class PartsStore(Store):
    """Gets, deletes and stats the parts of such handles, each in its own store, and merges what it gets."""

    def __init__(self, url: str = URL) -> None:
        if url != URL:
            raise InputError(f"store URL {url!r}: handles of several parts have the store {URL!r}")

    def put(self, masks: RoutingMasks) -> dict[str, Any]:
        """Refuse: parts are put into stores of their own.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"masks are not put into {URL!r}: put each part into a store, then handle_of_parts(handles, ..)"
        )

    def prepare(self) -> None:
        """Refuse, as `put` does.

        Raises:
            InputError: always.
        """
        raise InputError(f"nothing is written into {URL!r}: it only names parts in other stores")

    def get(self, handle: Handle) -> RoutingMasks:
        """The parts of a handle, merged.

        A part's digest covers its own prefix of the sequence alone, and the merged masks keep that of the longest part.
        Without the token ids, which are not here, what ties a shorter part to the same sequence is the digest that the
        handle's maker stated for it: each part must have its own.

        Raises:
            DataError: not such a handle, or a part that cannot be got.
            StoreError: a part's store cannot be reached now.
            PairingError: a part of other tokens than the handle says, or parts that `merged` refuses.
        """
        parts = [load(part) for part in _parts(handle)]
        for number, (part, digest) in enumerate(zip(parts, handle["token_digests"], strict=True)):
            if part.token_digest != digest:
                raise PairingError(
                    f"part {number} was recorded for tokens of digest {part.token_digest}, but the sequence of this"
                    f" handle has {digest} up to position {part.end}: it is another sequence's"
                )
        return merged(parts)

    def delete(self, handle: Handle) -> None:
        """Let all parts go."""
        for part in _parts(handle):
            with open_store(part["store"]) as store:
                store.delete(part)

    def stat(self, handle: Handle) -> Stat:
        """Sums over the parts, if all of them are there; rows that several hold are counted in each."""
        stats = []
        for part in _parts(handle):
            with open_store(part["store"]) as store:
                stats.append(store.stat(part))
        if not all(stat.there for stat in stats):
            return Stat(there=False)
        return Stat(True, sum(stat.num_bytes for stat in stats), sum(stat.num_tokens for stat in stats))

    def close(self) -> None:
        """Nothing is open."""


def merged(parts: Sequence[RoutingMasks]) -> RoutingMasks:
    """The rows of all parts of one sequence: of a position that several have, the first part whose row is valid.

    The result has the digest of the part that ends last. That shorter parts are of a prefix of the same tokens cannot
    be seen here (their digests cover less): call `check_tokens` of each first where the token ids are known. Of parts
    that end at the same position the digests are compared.

    Raises:
        PairingError: parts of another model or codec; a gap between them; two that end together and are of other
            tokens; rows of unknown weights after rows of known ones.
    """
    return reduce(_merge, parts)


def _merge(first: RoutingMasks, second: RoutingMasks) -> RoutingMasks:
    first.geometry.require_same(second.geometry, "one part", "the other")
    if first.codec != second.codec:
        raise PairingError(f"one part has codec {first.codec!r}, the other {second.codec!r}")
    if first.end == second.end and first.token_digest != second.token_digest:
        raise PairingError(
            f"two parts end at position {first.end}, with the token digests {first.token_digest} and"
            f" {second.token_digest}: they are of two sequences"
        )
    if max(first.start, second.start) > min(first.end, second.end):
        raise PairingError(
            f"parts of the tokens [{first.start}, {first.end}) and [{second.start}, {second.end}): nobody has the rows"
            " between them"
        )
    start, end = min(first.start, second.start), max(first.end, second.end)
    rows = first.rows.new_zeros(end - start, first.rows.shape[1])
    valid = first.valid.new_zeros(end - start)
    # int64 [tokens], places in `names`, -1 where nobody named the weights.
    names, versions = (
        [version for part in (first, second) for _, version in part.weight_versions],
        np.full(len(valid), -1),
    )
    for part, num_before in ((second, len(first.weight_versions)), (first, 0)):
        place = slice(part.start - start, part.end - start)
        # What the other part knows stays where this one knows nothing.
        taken = part.valid | ~valid[place]
        rows[place][taken] = part.rows[taken]
        valid[place] |= part.valid
        numbers = _numbers(part)
        versions[place][taken.numpy()] = np.where(numbers < 0, -1, numbers + num_before)[taken.numpy()]
    return replace(
        first,
        rows=rows,
        valid=valid,
        start=start,
        weight_versions=_runs(versions, valid.numpy(), names, start),
        token_digest=(first if first.end >= second.end else second).token_digest,
    )


def _numbers(part: RoutingMasks) -> np.ndarray:
    """For each row its run's place in `weight_versions`, -1 before the first."""
    begins = [position for position, _ in part.weight_versions]
    return np.searchsorted(begins, np.arange(part.start, part.end), side="right") - 1


def _runs(versions: np.ndarray, valid: np.ndarray, names: Sequence[str], start: int) -> Runs:
    """Runs of rows that computed the valid ones; the others were computed by nobody."""
    computed = np.flatnonzero(valid)
    numbers = versions[computed]
    begins = np.flatnonzero(np.diff(numbers, prepend=-2))
    runs: list[tuple[int, str]] = []
    for position, number in zip(computed[begins] + start, numbers[begins], strict=True):
        if number >= 0 and (not runs or runs[-1][1] != names[number]):
            runs.append((int(position), names[number]))
        elif number < 0 and runs:
            raise PairingError(
                f"nobody named the weights that computed the rows from position {position} on, but those before have a"
                " name, which would seem to be theirs"
            )
    return tuple(runs)


def _parts(handle: Handle) -> list[Handle]:
    require_store(handle, URL)
    parts, digests = handle.get("parts"), handle.get("token_digests")
    if not isinstance(parts, list) or not isinstance(digests, list) or not parts or len(parts) != len(digests):
        raise DataError(f"a handle of several parts without `parts` and as many `token_digests`: {str(handle)[:200]!r}")
    for part in parts:
        # One level is enough, and a handle that goes on for ever is none.
        if not isinstance(part, Mapping) or not isinstance(part.get("store"), str) or part["store"] == URL:
            raise DataError(f"a part of a handle that is not a handle itself: {str(part)[:80]!r}")
    return parts
