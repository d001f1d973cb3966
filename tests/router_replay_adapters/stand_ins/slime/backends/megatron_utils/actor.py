"""What the adapter needs of slime's module of this name, in our own words; see `utils.routing_replay`."""

import torch
from megatron.core import parallel_state

from slime.backends.megatron_utils.cp_utils import _pad_routed_experts
from slime.utils.routing_replay import RoutingReplay


def _padded(experts, multiple, num_experts):
    return _pad_routed_experts(experts, -len(experts) % multiple, num_experts)


def prepare_routed_experts_for_routing_replay(
    rollout_routed_experts, tokens, *, num_experts, data_pad_size_multiplier, sequence_parallel, allgather_cp
):
    context, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    assert [len(experts) for experts in rollout_routed_experts] == [len(each) - 1 for each in tokens]
    whole = [_padded(experts, len(experts) + 1, num_experts) for experts in rollout_routed_experts]
    multiple = tensor * data_pad_size_multiplier
    if allgather_cp:
        mine = _padded(torch.cat(whole), multiple * context, num_experts).chunk(context)[rank]
    else:
        if context > 1:
            parts = [_padded(each, 2 * context, num_experts).chunk(2 * context) for each in whole]
            whole = [part for of_one in parts for part in (of_one[rank], of_one[2 * context - 1 - rank])]
        mine = _padded(torch.cat(whole), multiple, num_experts)
    return mine.chunk(tensor)[parallel_state.get_tensor_model_parallel_rank()] if sequence_parallel else mine


class MegatronTrainRayActor:
    def fill_routing_replay(self, data_iterator, num_microbatches, rollout_data):
        if "rollout_routed_experts" not in rollout_data:
            raise ValueError("rollout_routed_experts is required")
        (config,) = [model.module.config for model in self.model]
        layers = [layer for layer in range(config.num_layers) if config.moe_layer_freq[layer]]
        data_iterator[0].reset()
        for _ in range(sum(num_microbatches)):
            batch = data_iterator[0].get_next(["rollout_routed_experts", "tokens"])
            experts = prepare_routed_experts_for_routing_replay(
                batch["rollout_routed_experts"],
                batch["tokens"],
                num_experts=self.args.num_experts,
                data_pad_size_multiplier=self.args.data_pad_size_multiplier,
                sequence_parallel=self.args.sequence_parallel,
                allgather_cp=self.args.allgather_cp,
            )
            for queue, layer in zip(RoutingReplay.all_routing_replays, layers, strict=True):
                queue.record(experts[:, layer])
        del rollout_data["rollout_routed_experts"]
        data_iterator[0].reset()
