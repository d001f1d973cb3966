"""The ranks that one model is spread over, as Megatron's `parallel_state` has them."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_router_replay.shards import rank_shards
from router_replay.replay.shards import ContextOrder, Shards


class ModelGroups:
    """Groups of more than one rank that a model shares its work with.

    Attributes:
        context_group: of context parallelism, or None.
        tensor_groups: of tensor and context parallelism, whose ranks run the same microbatch at the same time.
        step_groups: these, and that of pipeline stages.
    """

    def __init__(self, config: TransformerConfig, context_order: ContextOrder) -> None:
        self._config, self._context_order = config, context_order
        self.context_group: dist.ProcessGroup | None = None
        self.tensor_groups: list[dist.ProcessGroup] = []
        self.step_groups: list[dist.ProcessGroup] = []
        if not parallel_state.model_parallel_is_initialized():
            return
        tensor, context, pipeline = (
            group if group.size() > 1 else None
            for group in (
                parallel_state.get_tensor_model_parallel_group(),
                parallel_state.get_context_parallel_group(),
                parallel_state.get_pipeline_model_parallel_group(),
            )
        )
        self.context_group = context
        self.tensor_groups = [group for group in (tensor, context) if group is not None]
        self.step_groups = [group for group in (tensor, context, pipeline) if group is not None]

    def shards(self, context_size: int | None) -> Shards:
        """What this rank's routers see of a batch that `context_size` ranks share, by default all of the group."""
        return rank_shards(self._config, self._context_order, context_size)
