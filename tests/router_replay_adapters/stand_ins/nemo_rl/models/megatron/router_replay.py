"""What the tests need of NeMo-RL's module of this name, in our own words: NeMo-RL is on no index.

Names, parameters and what they do are those of NeMo-RL at 7ea279a; `scripts/prove_stack.py` runs the same tests with
NeMo-RL's own module.
"""

from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction


def _with_own_experts(get_replay_topk):
    def wrapped(replay, scores, topk, num_groups=None, group_topk=None, default_compute_topk=None):
        forward = replay.router_replay_action == RouterReplayAction.REPLAY_FORWARD
        if forward:
            experts = replay.target_topk_idx
        elif replay.router_replay_action == RouterReplayAction.REPLAY_BACKWARD:
            experts = replay.replay_backward_list[0]
        else:
            return get_replay_topk(replay, scores, topk, num_groups, group_topk, default_compute_topk)
        own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)[1]
        experts = experts.where(~(experts == -1).all(-1, keepdim=True), own)
        if forward:
            replay.replay_backward_list[-1] = experts
        else:
            replay.replay_backward_list.pop(0)
        return scores.gather(1, experts), experts

    wrapped.of_nemo_rl = True
    return wrapped


def _routers(model):
    return [module for module in model.modules() if getattr(module, "router_replay", None) is not None]


def set_router_replay_forward(model, routed_experts):
    if not hasattr(RouterReplay.get_replay_topk, "of_nemo_rl"):
        RouterReplay.get_replay_topk = _with_own_experts(RouterReplay.get_replay_topk)
    _, _, num_layers, _ = routed_experts.shape
    # Either of all decoder layers, or of those that route.
    dense = 0 if num_layers == model.config.num_layers else model.config.moe_layer_freq.count(0)
    for router in _routers(model):
        experts = routed_experts[0, :, router.layer_number - 1 - dense]
        router.router_replay.set_target_indices(experts.long())
        router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)


def set_router_replay_backward(model):
    for router in _routers(model):
        router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
