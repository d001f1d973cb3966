"""The table of docs/stock-replay.md: in which case and for which use Megatron's RouterReplay and ours are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tests.megatron_router_replay.parallel.cases import Case
from tests.megatron_router_replay.parallel.stock import Mistake, Use

HYBRID = "*E*-*E*E"
PACKED_RECOMPUTED: dict[str, Any] = {"packed": True, "recompute": "full"}
BY = ("guide", "hand", "ours")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        group, what: its heading, and what is done.
        case: what is trained.
        missing, mistake: as of `Use`.
        by: whose replay is run; the guide has nothing to cut by hand where the mistake is another one.
        flex: DeepEP's dispatcher, whose kernels need GPUs: what it is told to send.
    """

    group: str
    what: str
    case: Case
    missing: Literal["0..K-1", "-1"] | None = None
    mistake: Mistake = ""
    by: tuple[Literal["guide", "hand", "ours"], ...] = BY
    flex: bool = False

    def uses(self) -> list[Use]:
        return [Use(by, self.missing, self.mistake) for by in self.by]


GUIDE = ("guide", "ours")
LAYOUTS, RECOMPUTE, MODELS = "parallel layouts", "full recompute", "models"
TOKENS, MISTAKES = "tokens without a row", "mistakes and traps"

ROWS = (
    Row("one rank", "padded batch", Case()),
    Row("one rank", "packed, alignment padding and a tail pad", Case(packed=True)),
    Row(LAYOUTS, "TP 2 with sequence parallelism", Case(tp=2)),
    Row(LAYOUTS, "CP 2 zigzag, padded", Case(cp=2)),
    Row(LAYOUTS, "CP 2 zigzag, packed", Case(cp=2, packed=True)),
    Row(LAYOUTS, "EP 2, allgather", Case(ep=2)),
    Row(LAYOUTS, "EP 2, all-to-all", Case(ep=2, dispatcher="alltoall")),
    Row(LAYOUTS, "PP 2", Case(pp=2)),
    Row(LAYOUTS, "PP 2 x VPP 2", Case(pp=2, vpp=2)),
    Row(RECOMPUTE, "one microbatch", Case(recompute="full", num_microbatches=1)),
    Row(RECOMPUTE, "PP 2, four microbatches (1F1B)", Case(pp=2, recompute="full")),
    Row(RECOMPUTE, "PP 2 x VPP 2, four microbatches (interleaved)", Case(pp=2, vpp=2, recompute="full")),
    Row(
        RECOMPUTE,
        "PP 2, without setting REPLAY_BACKWARD",
        Case(pp=2, recompute="full"),
        mistake="without REPLAY_BACKWARD",
        by=GUIDE,
    ),
    Row(MODELS, "first layer dense", Case(dense=(0,))),
    Row(
        MODELS,
        "PP 2 x VPP 2, dense layers, packed, recomputed",
        Case(pp=2, vpp=2, dense=(0, 2), **PACKED_RECOMPUTED),
    ),
    Row(MODELS, "HybridModel", Case(hybrid=HYBRID)),
    Row(MODELS, "multi-token prediction", Case(mtp=1)),
    Row(MODELS, "fused router", Case(config=(("moe_router_fusion", True),))),
    Row(MODELS, "flex dispatcher (DeepEP), gates that underflow to 0", Case(), by=GUIDE, flex=True),
    Row(MODELS, "a second model in the process", Case(), mistake="another model"),
    Row(TOKENS, "a third of the rows missing: experts 0 to K-1", Case(), missing="0..K-1", by=GUIDE),
    Row(TOKENS, "a third of the rows missing: -1", Case(), missing="-1", by=GUIDE),
    Row(MISTAKES, "rows end to end, batch packed with padding", Case(packed=True), mistake="end to end", by=GUIDE),
    Row(MISTAKES, "rows sequence by sequence, as `[B, S]`", Case(), mistake="[B, S] order", by=GUIDE),
    Row(MISTAKES, "rows of the next microbatch", Case(), mistake="next microbatch", by=GUIDE),
    Row(MISTAKES, "set once, around the schedule", Case(), mistake="around the schedule", by=GUIDE),
)
