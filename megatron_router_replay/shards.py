"""This rank's part of a batch, from Megatron's live process groups."""

from __future__ import annotations

from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from router_replay.errors import PairingError
from router_replay.replay.shards import ContextOrder, Shards


def rank_shards(
    config: TransformerConfig, context_order: ContextOrder = "zigzag", context_size: int | None = None
) -> Shards:
    """What this rank's routers see of a batch, by `megatron.core.parallel_state`; one rank where that is not set up.

    Args:
        config: the model's; it says whether sequence parallelism is on.
        context_order: how the trainer cuts a batch over context-parallel ranks, which Megatron does not record.
        context_size: of this microbatch, where it has one of its own (hybrid or dynamic context parallelism:
            `local_cp_size` in the batch, in Megatron's PackedSeqParams and in verl).

    Raises:
        PairingError: the configuration is of other parallel sizes, or no group of ranks has that `context_size`.
    """
    if not parallel_state.model_parallel_is_initialized():
        _require_size(config, "tensor_model_parallel_size", 1)
        _require_size(config, "context_parallel_size", 1)
        if context_size not in (None, 1):
            raise PairingError(f"{context_size} ranks cannot share a microbatch: {_NOT_INITIALIZED}")
        return Shards(context_order=context_order)
    tensor_size = parallel_state.get_tensor_model_parallel_world_size()
    _require_size(config, "tensor_model_parallel_size", tensor_size)
    if context_size is None:
        context_size = parallel_state.get_context_parallel_world_size()
        context_rank = parallel_state.get_context_parallel_rank()
        _require_size(config, "context_parallel_size", context_size)
    else:
        context_rank = _rank_among(context_size)
    # Without sequence parallelism every tensor-parallel rank routes all places.
    sequence = (tensor_size, parallel_state.get_tensor_model_parallel_rank()) if config.sequence_parallel else (1, 0)
    return Shards(context_size, context_rank, context_order, *sequence)


_NOT_INITIALIZED = "megatron.core.parallel_state is not initialised; call initialize_model_parallel first"


def _require_size(config: TransformerConfig, name: str, size: int) -> None:
    if getattr(config, name) != size:
        initialized = parallel_state.model_parallel_is_initialized()
        raise PairingError(
            f"the model's configuration has {name}={getattr(config, name)}, megatron.core.parallel_state {size}"
            f"{'' if initialized else ' rank, for it is not initialised'}: build the model with the sizes of"
            " initialize_model_parallel, or give Shards by hand where the model has process groups of its own"
        )


def _rank_among(context_size: int) -> int:
    """This rank's number in the group of `context_size` ranks that share its microbatch."""
    if context_size == 1:
        # Such a group exists in some releases only.
        return 0
    # Megatron-LM's main branch says hybrid, its dev branch, which verl needs for this, dynamic.
    find = getattr(parallel_state, "get_dynamic_data_context_parallel_groups", None)
    find = find or parallel_state.get_hybrid_data_context_parallel_groups
    try:
        return find(group_size=context_size).rank()
    except (KeyError, AssertionError) as error:
        ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        raise PairingError(
            f"no group of {context_size} of the {ranks} data- and context-parallel ranks is there to share a"
            " microbatch: initialise parallel_state with hybrid_context_parallel=True and take a power of two"
        ) from error
