"""What the adapter needs of slime's module of this name, in our own words: slime is on no index.

Names, parameters and what they do are those of slime at 624b824; `scripts/prove_stack.py` runs the same tests with
slime's own module.
"""

import os
from typing import ClassVar

ROUTING_REPLAY = None


def set_routing_replay(replay):
    global ROUTING_REPLAY
    ROUTING_REPLAY = replay


def _compute_topk_for_current_router(old_compute_topk, scores, topk, num_groups=None, group_topk=None):
    return old_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)


def _experts(recorded, stage):
    lazy = hasattr(recorded, "materialize_for_routing_replay")
    return recorded.materialize_for_routing_replay(stage) if lazy else recorded


class RoutingReplay:
    all_routing_replays: ClassVar[list] = []

    def __init__(self):
        self.clear()
        RoutingReplay.all_routing_replays.append(self)

    def record(self, top_indices):
        lazy = hasattr(top_indices, "materialize_for_routing_replay")
        self.top_indices_list.append(top_indices if lazy else top_indices.clone())

    def pop_forward(self):
        self.forward_index += 1
        return _experts(self.top_indices_list[self.forward_index - 1], "forward")

    def pop_backward(self):
        self.backward_index += 1
        return _experts(self.top_indices_list[self.backward_index - 1], "backward")

    def clear(self):
        self.forward_index = self.backward_index = 0
        self.top_indices_list = []

    @staticmethod
    def clear_all_forward():
        for replay in RoutingReplay.all_routing_replays:
            replay.forward_index = 0

    @staticmethod
    def clear_all():
        for replay in RoutingReplay.all_routing_replays:
            replay.clear()


def get_routing_replay_compute_topk(old_compute_topk):
    def compute_topk(scores, topk, num_groups=None, group_topk=None):
        stage = os.environ["ROUTING_REPLAY_STAGE"] if os.environ.get("ENABLE_ROUTING_REPLAY") == "1" else "fallthrough"
        if stage in ("replay_forward", "replay_backward"):
            pop = ROUTING_REPLAY.pop_forward if stage == "replay_forward" else ROUTING_REPLAY.pop_backward
            experts = pop()
            assert experts.shape == (scores.shape[0], topk)
            return scores.gather(1, experts), experts
        chosen = _compute_topk_for_current_router(
            old_compute_topk, scores, topk, num_groups=num_groups, group_topk=group_topk
        )
        if stage == "record":
            ROUTING_REPLAY.record(chosen[1])
        return chosen

    return compute_topk


def register_routing_replay(module):
    module.routing_replay = RoutingReplay()
    module.register_forward_pre_hook(lambda *_: set_routing_replay(module.routing_replay))
