"""Letting a model go, with the process groups that it was built on."""

from __future__ import annotations

import gc
from collections.abc import Iterable

from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding


def release(wrapped: Iterable[DistributedDataParallel]) -> None:
    """Undo what would keep models alive for ever, and with them the threads of their process groups, which keep waking.

    Hooks of gradient accumulators refer to the wrapper, whose dispatchers keep the graph that ends in them: a circle
    that the garbage collector cannot see; rotary embeddings are keys in a cache of their own class. The models are of
    no use afterwards.
    """
    for each in wrapped:
        vars(each).clear()
    RotaryEmbedding.forward.cache_clear()
    gc.collect()
