"""What is trained: one small model and its data, in one parallel layout."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

VOCABULARY = 96
NUM_EXPERTS = 8


@dataclass(frozen=True)
class Case:
    """One training step of one small model in one parallel layout.

    Cases with the same `one_rank()` compute the same losses and gradients.

    Attributes:
        tp, cp, ep, pp: tensor (with sequence parallelism), context, expert and pipeline parallel size.
        vpp: model chunks of a pipeline stage.
        etp: tensor parallel size of the experts; None: Megatron's default, `tp`.
        dispatcher: Megatron's `moe_token_dispatcher_type`.
        context_order: which places of a sequence a context-parallel rank has: of 2 CP equal parts of each sequence
            the r-th from either end, or the r-th of CP parts of the whole pack.
        first, last: decoder layers of the first and last pipeline stage, where that is uneven.
        standalone: the embedding and the loss count as layers of their stages.
        stages: a `PipelineParallelLayerLayout`, "Et|tt|tt|tL".
        recompute: Megatron's `recompute_granularity`; "selective" recomputes the MoE layers.
        num_layers: decoder layers; of a hybrid pattern, its length.
        dense: decoder layers without experts, 0-based.
        packed: sequences one behind the other with alignment padding behind each and a tail pad; else a padded batch.
        mtp: multi-token-prediction layers.
        hybrid: a `HybridModel` of this pattern, without bounds of stages; "" for a GPTModel.
        score: `moe_router_score_function`.
        top_k: experts of a token.
        num_microbatches: of all data-parallel ranks together.
        config: fields of `TransformerConfig` that win over what the others say.
    """

    tp: int = 1
    cp: int = 1
    ep: int = 1
    pp: int = 1
    vpp: int = 1
    etp: int | None = None
    dispatcher: Literal["allgather", "alltoall"] = "allgather"
    context_order: Literal["zigzag", "contiguous"] = "zigzag"
    first: int | None = None
    last: int | None = None
    standalone: bool = False
    stages: str = ""
    recompute: Literal["full", "selective"] | None = None
    num_layers: int = 4
    dense: tuple[int, ...] = ()
    packed: bool = False
    mtp: int = 0
    hybrid: str = ""
    score: Literal["softmax", "sigmoid"] = "softmax"
    top_k: int = 2
    num_microbatches: int = 4
    config: tuple[tuple[str, Any], ...] = ()

    @property
    def world_size(self) -> int:
        """The fewest ranks: data parallel ones are there only where experts need more ranks than a dense layer."""
        experts = self.ep * (self.tp if self.etp is None else self.etp)
        return self.pp * max(self.tp * self.cp, experts)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Decoder layers with experts, 0-based."""
        if self.hybrid:
            return tuple(layer for layer, symbol in enumerate(self.hybrid) if symbol == "E")
        return tuple(layer for layer in range(self.num_layers) if layer not in self.dense)

    def one_rank(self) -> Case:
        """The same model and data without any parallelism or recompute."""
        model_and_data = ("num_layers", "dense", "packed", "mtp", "hybrid", "score", "top_k", "num_microbatches")
        return Case(**{name: getattr(self, name) for name in model_and_data})

    def __str__(self) -> str:
        """Names what differs from the defaults: a test's name."""
        parts = [f"{name}={value}" for name, value in self.config]
        for field in dataclasses.fields(self)[:-1]:
            value = getattr(self, field.name)
            if value is True or value in ("alltoall", "contiguous"):
                parts.append(field.name if value is True else value)
            elif value != field.default:
                text = "".join(map(str, value)) if isinstance(value, tuple) else value
                parts.append(f"{field.name}{text}")
        return "-".join(parts) or "one-rank"
