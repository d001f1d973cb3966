"""Recorder: takes each forward pass's routes from the device to the slot table, in the scheduler's order."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sglang.srt.runtime_context import get_serving
from sglang.srt.state_capturer.routed_experts import RoutedExpertsCapturer
from torch import Tensor

from router_replay.errors import CallOrderError
from router_replay.masks import Codec, RoutingGeometry, Store
from sglang_router_capture.counts import RowCounts
from sglang_router_capture.follow.hicache import HiCacheFollower
from sglang_router_capture.log import Log, PassRecord
from sglang_router_capture.options import CaptureOptions
from sglang_router_capture.ranks import OwnTokens, own_tokens
from sglang_router_capture.sglang_format import packed
from sglang_router_capture.slot_table import SlotTable
from sglang_router_capture.staging import Staging
from sglang_router_capture.weight_versions import WeightVersions
from sglang_router_capture.writer import Writer

logger = logging.getLogger(__name__)


class Recorder(RoutedExpertsCapturer):
    """Stands in `sglang.srt.runtime_context.get_resources().experts_capturer` in the place of upstream's capturer.

    From upstream's class it keeps `capture` (one call per MoE layer, ids of logical experts); staging, packing, the
    host table and what is read from it are ours.

    Attributes:
        table: rows of the KV slots on the device.
        log: what happens to slots, in order, on its way to the tables.
        options: what the server was asked for, read once when it started.
        store: where the masks of finished requests go; the recorder closes it.
        writer: what puts them there in the background; None where the answer cannot wait for it, and `store` is asked
            at once.
        weight_versions: which weights the numbers in the tables stand for.
        stream_output: the scheduler's way to answer requests, `(requests, whether with log-probabilities)`; None where
            answers have upstream's own format.
        counts: rows by what became of them.
        hicache: what makes rows follow the KV through HiCache; None where the server has none.
    """

    def __init__(
        self,
        geometry: RoutingGeometry,
        codec: Codec,
        *,
        options: CaptureOptions,
        store: Store,
        num_slots: int,
        max_tokens_per_pass: int,
        num_fused_shared_experts: int,
        device: str,
        layers: tuple[int, ...] | None = None,
    ) -> None:
        # Upstream's __init__ would allocate its own buffers; these are the attributes that its methods read.
        self.num_fused_shared_experts = num_fused_shared_experts
        self.topk_size = geometry.top_k
        self.device_cache = Staging(geometry, max_tokens_per_pass, num_fused_shared_experts, device, layers)
        self.geometry = geometry
        self.codec = codec
        self.options = options
        self.store = store
        self.writer: Writer | None = None
        self.table = SlotTable(num_slots, codec.row_bytes(geometry))
        self.log = Log(device)
        self.counts = RowCounts()
        self.weight_versions = WeightVersions(_servers_name, options.start)
        self.stream_output: Callable[[list[Any], bool], None] | None = None
        self.hicache: HiCacheFollower | None = None
        self._allocator: Any = None
        self._invalid_reported = False

    def follow(self, allocator: Any) -> None:
        """Hear from this KV allocator, whose slots `req_to_token` holds, which slots it hands out."""
        self._allocator = allocator

    def follows(self, allocator: Any) -> bool:
        """Whether this is the KV allocator whose slots the table has rows of."""
        return allocator is self._allocator

    def slots_allocated(self, allocator: Any, slots: Tensor | None) -> None:
        """The allocator handed out slots `int [m]` (None: it had too few)."""
        if self.follows(allocator) and slots is not None and slots.numel():
            self.log.append(self.table.release, slots)

    def on_forward_end(
        self, forward_batch: Any, can_run_graph: bool, cuda_graph_batch: int | None, no_copy_to_cpu: bool = False
    ) -> PassRecord | None:
        """Pack the pass's tokens on the device. See `BaseTopkCapturer.on_forward_end` for the arguments."""
        if self._allocator is None:
            raise CallOrderError(
                "the recorder was not told which KV allocator to follow: the hook on"
                " ModelRunner.init_routed_experts_capturer did not run"
            )
        tokens = own_tokens(forward_batch, can_run_graph, cuda_graph_batch)
        if not len(tokens.slots):
            # Nobody asks for the result of a pass that this rank ran for others alone.
            self.device_cache.reset()
            self.log.settle_what_is_ready()
            return None
        record = self._launch(tokens, self.weight_versions.present)
        if no_copy_to_cpu:
            return record
        record.finalize()
        return None

    def settle(self) -> None:
        """Bring all that is in the log to the tables; the passes in flight are waited for."""
        self.log.settle_all()

    def slots_of(self, req_pool_idx: int, first: int, last: int, req_to_token_pool: Any) -> Tensor:
        """KV slots `int64 [last - first]` of a running request's tokens [first, last)."""
        # A copy, whatever the pool's type: they are read after the pool gave its row to another request.
        return req_to_token_pool.req_to_token[req_pool_idx][first:last].to("cpu", torch.int64, copy=True)

    def get_topk(self, req_pool_idx: int, seqlen: int, req_to_token_pool: Any, start_len: int = 0) -> Tensor:
        """Routes of tokens [start_len, seqlen - 1), packed: upstream's own format is made of them where it is sent."""
        first = min(start_len, seqlen - 1)
        slots = self.slots_of(req_pool_idx, first, seqlen - 1, req_to_token_pool)
        rows, valid, versions = self.table.read(slots)
        self.counts.count_returned(valid, versions)
        return packed(rows, valid, self.geometry, self.codec)

    def destroy(self) -> None:
        """Let the buffers go and close the store; upstream calls it when the server stops."""
        self.log.clear()
        self.table = SlotTable(0, 0)
        self.hicache = None
        if self.writer is not None:
            self.writer.close()
        self.store.close()

    def _launch(self, tokens: OwnTokens, version: int) -> PassRecord:
        last = tokens.first + len(tokens.slots)
        rows, valid = self.device_cache.take_rows(self.codec, tokens.first, last, tokens.end)
        return self.log.launch(partial(self._pass_settled, version), tokens.slots.clone(), rows, valid)

    def _pass_settled(self, version: int, slots: Tensor, rows: Tensor, valid: Tensor) -> None:
        self.table.write(slots, rows, valid, version)
        self.counts.count_written(valid)
        if self._invalid_reported or bool(valid.all()):
            return
        self._invalid_reported = True
        logger.error(
            "router capture: %d of %d tokens of a forward pass have no route in at least one MoE layer. Their rows are"
            " marked invalid. The layer reported no experts, or not %d different ones in [0, %d): the MoE backend in"
            " use does not report them everywhere, or its router chose among NaN. Choose another with"
            " --moe-runner-backend, and look at the logits. Further passes are not reported.",
            int((~valid).sum()),
            len(valid),
            self.geometry.top_k,
            self.geometry.num_experts,
        )


def _servers_name() -> str:
    return get_serving().weight_version or "default"
