"""What the adapter needs of slime's module of this name, in our own words; see `utils.routing_replay`."""

import torch


def _pad_routed_experts(experts, pad, num_experts):
    filler = torch.arange(pad * experts[0].numel(), dtype=experts.dtype) % num_experts
    return torch.cat([experts, filler.view(pad, *experts.shape[1:])])
