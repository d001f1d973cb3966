"""The digest of token ids, which ties masks to the tokens that they were recorded for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from router_replay.errors import InputError

TokenIds = Sequence[int] | np.ndarray | Tensor

_EXPECTED = "pass the token ids of the rollout, integers [n], as a list, an array or a tensor; no text, floats or bools"


def token_digest(token_ids: TokenIds) -> str:
    """BLAKE2b (128 bits, hexadecimal) of the token ids as little-endian int64.

    Args:
        token_ids: `int [n]` of one sequence.

    Raises:
        InputError: text, floats, bools, or ids of several sequences.
    """
    ids = as_token_ids(token_ids)
    return PrefixDigest().grown(ids, len(ids)).hexdigest()


class PrefixDigest:
    """The digest of a sequence's first `length` token ids, from which that of a longer prefix follows.

    It does not change: `grown` gives another, and hashes only the ids that are new.
    """

    def __init__(self) -> None:
        self.length = 0
        self._hash = hashlib.blake2b(digest_size=16)

    def grown(self, ids: np.ndarray, length: int) -> PrefixDigest:
        """The digest of `ids[:length]`, where `ids`, `int64 [n]`, begin with those that this one is of.

        A shorter prefix is hashed from its beginning.
        """
        longer = PrefixDigest()
        begin = 0
        if length >= self.length:
            longer._hash, begin = self._hash.copy(), self.length
        longer._hash.update(np.ascontiguousarray(ids[begin:length], dtype="<i8"))
        longer.length = length
        return longer

    def hexdigest(self) -> str:
        """As of `token_digest`."""
        return self._hash.hexdigest()


def as_token_ids(token_ids: TokenIds) -> np.ndarray:
    """Token ids of one sequence as `int64 [n]`, on the host.

    Raises:
        InputError: text, floats, bools, or ids of several sequences.
    """
    if isinstance(token_ids, Mapping):
        raise InputError(f"token_ids is a {type(token_ids).__name__}: pass the token ids in it (its input_ids)")
    found = f"token_ids is a {type(token_ids).__name__}"
    try:
        ids = token_ids.detach().cpu().numpy() if isinstance(token_ids, Tensor) else np.asarray(token_ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{found} of which no array can be made ({error}): {_EXPECTED}") from error
    # An empty list has no integer in it that would tell numpy its type.
    if ids.dtype.kind not in "iu" and ids.shape != (0,):
        held = {"U": "text", "S": "text", "O": "objects"}.get(ids.dtype.kind, ids.dtype.name)
        raise InputError(f"{found} of {held}: {_EXPECTED}")
    if ids.ndim != 1:
        raise InputError(
            f"token_ids has the shape {list(ids.shape)}, but must be those of one sequence, [n]: of a batch pass one"
            " row without its padding, with the masks of that row"
        )
    if ids.dtype.kind == "u" and ids.size and int(ids.max()) > np.iinfo(np.int64).max:
        raise InputError(f"token_ids has {int(ids.max())}, which is no token id: they are below 2**63")
    return ids.astype(np.int64, copy=False)
