"""Ranks of one model: which of them answers requests, and which tokens of a pass are a rank's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from sglang.srt.layers.dp_attention import get_dp_local_slice_cpu, is_dp_attention_enabled
from sglang.srt.state_capturer.routed_experts import RoutedExpertsCapturer
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where a rank stands among those that run one model.

    Attributes:
        stage: of the pipeline, from 0.
        num_stages: of the pipeline.
        answers: whether its scheduler sends answers; the only one of its attention group that needs rows.
        num_gathered: number of ranks whose tokens a MoE layer of this one sees.
        alignment: each rank's tokens are padded to a multiple of it.
    """

    stage: int = 0
    num_stages: int = 1
    answers: bool = True
    num_gathered: int = 1
    alignment: int = 1

    @classmethod
    def of(cls, parallel: Any) -> Place:
        """The place that `sglang.srt.runtime_context.get_parallel()` tells."""
        gathers = is_dp_attention_enabled()
        return cls(
            stage=parallel.pp_rank,
            num_stages=parallel.pp_size,
            # SGLang's schedulers decide by the same three who talks to the tokenizer.
            answers=parallel.pp_rank == 0 and parallel.attn_tp_rank == 0 and parallel.attn_cp_rank == 0,
            num_gathered=parallel.attn_dp_size if gathers else 1,
            alignment=parallel.attn_tp_size if gathers else 1,
        )

    def max_tokens_per_pass(self, own: int) -> int:
        """Most tokens that a MoE layer sees where a rank's own are `own` at most."""
        return -(-own // self.alignment) * self.alignment * self.num_gathered


class OwnTokens(NamedTuple):
    """Which rows of a pass's MoE layers are this rank's.

    Attributes:
        slots: `int [n]`, KV slots of this rank's tokens, whose rows are [first, first + n).
        first: first of them among all rows of the pass.
        end: number of rows of the pass, all ranks' and padding included; None where it is not known.
    """

    slots: Tensor
    first: int
    end: int | None


def own_tokens(forward_batch: Any, can_run_graph: bool, cuda_graph_batch: int | None) -> OwnTokens:
    """This rank's tokens of a pass that is over; arguments as of `BaseTopkCapturer.on_forward_end`.

    Under attention data parallelism a MoE layer sees the tokens of all ranks, in the order of the ranks, each rank's
    followed by padding: to the length of the longest, to the size of a graph, or to a multiple of the attention's
    tensor parallel size. A rank without requests has padding only.
    """
    slots = forward_batch.out_cache_loc_virtual
    if slots is None:
        slots = forward_batch.out_cache_loc
    if not is_dp_attention_enabled():
        return OwnTokens(slots, 0, None)
    # Padding a batch leaves its slots padded, too; a decode graph pads copies.
    if forward_batch._original_num_tokens is not None:
        slots = slots[: forward_batch._original_num_tokens]
    lengths = forward_batch.global_num_tokens_cpu
    # The size that SGLang hands over is the decode graph's, and may be that of an earlier pass. A prefill's graph keeps
    # the lengths that the batch was padded to, also where this rank decodes or idles beside a rank that extends.
    in_decode_graph = (
        can_run_graph and forward_batch._original_num_tokens is None and not forward_batch.forward_mode.is_extend()
    )
    first, _ = get_dp_local_slice_cpu(forward_batch, in_decode_graph, cuda_graph_batch)
    end = cuda_graph_batch * len(lengths) if in_decode_graph and cuda_graph_batch is not None else sum(lengths)
    return OwnTokens(slots, first, end)


class OtherRank(RoutedExpertsCapturer):
    """Stands in the recorder's place on a rank that answers no request: it keeps nothing.

    Something has to stand there: SGLang picks the kernels of some routers by whether there is a capturer, and the ranks
    of one layer must pick the same.
    """

    def __init__(self) -> None:
        # Upstream's __init__ would allocate its buffers.
        pass

    def capture(self, layer_id: int, topk_indices: Tensor) -> None:
        """A layer's choice, which the answering rank makes as well."""

    def on_forward_end(
        self, forward_batch: Any, can_run_graph: bool, cuda_graph_batch: int | None, no_copy_to_cpu: bool = False
    ) -> None:
        """Nothing to tell."""

    def get_topk(self, req_pool_idx: int, seqlen: int, req_to_token_pool: Any, start_len: int = 0) -> None:
        """Nothing to answer."""

    def destroy(self) -> None:
        """Nothing to let go."""
