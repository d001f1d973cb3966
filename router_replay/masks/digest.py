"""Digest of token ids: what ties masks to the tokens that they were recorded for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def token_digest(token_ids: Sequence[int] | np.ndarray | Tensor) -> str:
    """BLAKE2b (128 bits, hexadecimal) of the token ids as little-endian int64."""
    if isinstance(token_ids, Tensor):
        token_ids = token_ids.detach().to(device="cpu", dtype=torch.int64).numpy()
    data = np.ascontiguousarray(token_ids, dtype="<i8")
    return hashlib.blake2b(data.tobytes(), digest_size=16).hexdigest()
