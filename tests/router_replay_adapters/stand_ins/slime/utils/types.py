"""What the adapter needs of slime's module of this name, in our own words; see `routing_replay` beside it."""

from dataclasses import dataclass, field


@dataclass
class Sample:
    tokens: list = field(default_factory=list)
    response: str = ""
    response_length: int = 0
    reward: float | None = None
    loss_mask: list | None = None
    rollout_log_probs: list | None = None
    rollout_routed_experts: object = None
    remove_sample: bool = False
    index: int | None = None
    rollout_id: int | None = None
    metadata: dict = field(default_factory=dict)

    def append_response_tokens(
        self,
        args=None,
        *,
        tokens=None,
        log_probs=None,
        trainable=True,
        meta_info=None,
        text=None,
        update_terminal_info=True,
    ):
        assert meta_info is None or "routed_experts" not in meta_info, "this stand-in decodes no arrays"
        tokens = list(tokens or ())
        before = [1] * self.response_length if self.loss_mask is None else self.loss_mask
        self.tokens = [*self.tokens, *tokens]
        self.response_length += len(tokens)
        self.loss_mask = [*before, *([int(trainable)] * len(tokens))]
