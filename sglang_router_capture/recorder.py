"""Recorder: takes each forward pass's routes from the device to the slot table, in the scheduler's order."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.runtime_context import get_serving
from sglang.srt.state_capturer.routed_experts import RoutedExpertsCapturer
from torch import Tensor

from router_replay.errors import CallOrderError
from router_replay.masks import Codec, RoutingGeometry, Store
from sglang_router_capture.options import CaptureOptions
from sglang_router_capture.slot_table import SlotTable
from sglang_router_capture.staging import Staging

logger = logging.getLogger(__name__)


@dataclass
class PassRecord:
    """What one forward pass tells the slot table, on its way from the device to the host.

    Upstream treats it as it treats `TopkCaptureOutput`: `map_device_tensors` copies it with the step's own result,
    `finalize` runs once that copy is done.

    Attributes:
        released: `int64 [m]` slots that the allocator handed out since the pass before.
        slots: `int64 [n]` slots that the pass wrote.
        rows: `uint8 [n, row_bytes]`.
        valid: `bool [n]`: every MoE layer reported K different experts.
        version: number of the weights that ran.
        settled: it is in the slot table.
    """

    recorder: Recorder
    released: Tensor
    slots: Tensor
    rows: Tensor
    valid: Tensor
    version: int
    settled: bool = False

    def map_device_tensors(self, copy: Callable[[Tensor], Tensor]) -> None:
        """Replace the device tensors by what `copy` makes of them."""
        self.released, self.slots = copy(self.released), copy(self.slots)
        self.rows, self.valid = copy(self.rows), copy(self.valid)

    def finalize(self) -> None:
        """Put the pass, and every earlier one whose result was dropped, into the slot table."""
        self.recorder.settle(self)


class Recorder(RoutedExpertsCapturer):
    """Stands in `sglang.srt.runtime_context.get_resources().experts_capturer` in the place of upstream's capturer.

    From upstream's class it keeps `capture` (one call per MoE layer, ids of logical experts); staging, packing, the
    host table and what is read from it are ours.

    Slots change hands while passes are in flight: with the overlap schedule the extra step of a finished request
    ends after its slot has been given away. Allocations and passes are therefore kept in one sequence, in the order in
    which the scheduler thread issued them, and reach the table in that order; nobody's late write survives the
    allocation that follows it.

    Attributes:
        options: what the server was asked for, read once when it started.
        store: where the masks of finished requests go; the recorder closes it.
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
    ) -> None:
        # Upstream's __init__ would allocate its own buffers; these are the attributes that its methods read.
        self.num_fused_shared_experts = num_fused_shared_experts
        self.topk_size = geometry.top_k
        self.device_cache = Staging(geometry, max_tokens_per_pass, num_fused_shared_experts, device)
        self.geometry = geometry
        self.codec = codec
        self.options = options
        self.store = store
        self.table = SlotTable(num_slots, codec.row_bytes(geometry), pin=device == "cuda")
        self._allocator: Any = None
        self._released: list[Tensor] = []
        self._in_flight: deque[PassRecord] = deque()
        self._versions: list[str] = []
        self._invalid_reported = False

    def follow(self, allocator: Any) -> None:
        """Hear from this KV allocator, whose slots `req_to_token` holds, which slots it hands out."""
        self._allocator = allocator

    def slots_allocated(self, allocator: Any, slots: Tensor | None) -> None:
        """The allocator handed out slots `int [m]` (None: it had too few)."""
        if allocator is self._allocator and slots is not None and slots.numel():
            self._released.append(slots.detach().clone())

    def on_forward_end(
        self, forward_batch: Any, can_run_graph: bool, cuda_graph_batch: int | None, no_copy_to_cpu: bool = False
    ) -> PassRecord | None:
        """Pack the pass's tokens on the device. See `BaseTopkCapturer.on_forward_end` for the arguments."""
        if self._allocator is None:
            raise CallOrderError(
                "the recorder was not told which KV allocator to follow: the hook on"
                " ModelRunner.init_routed_experts_capturer did not run"
            )
        slots = forward_batch.out_cache_loc_virtual
        if slots is None:
            slots = forward_batch.out_cache_loc
        indices, valid = self.device_cache.take(0, slots.shape[0])
        record = PassRecord(
            recorder=self,
            released=torch.cat(self._released) if self._released else slots.new_empty(0),
            slots=slots.clone(),
            rows=self.codec.pack(indices, self.geometry),
            valid=valid,
            version=self._version_number(get_serving().weight_version),
        )
        for handed_out in self._released:
            # Made on the scheduler's stream and read on the forward's: the memory must not be reused in between.
            if handed_out.is_cuda:
                handed_out.record_stream(torch.cuda.current_stream())
        self._released = []
        self._in_flight.append(record)
        if no_copy_to_cpu:
            return record
        record.finalize()
        return None

    def settle(self, record: PassRecord) -> None:
        """Bring the passes up to and including `record` into the table, in order."""
        while not record.settled:
            oldest = self._in_flight.popleft()
            # A pass whose result the scheduler dropped was never copied: the copy then waits for the device here.
            oldest.map_device_tensors(lambda tensor: tensor.cpu())
            self.table.release(oldest.released)
            self.table.write(oldest.slots, oldest.rows, oldest.valid, oldest.version)
            oldest.settled = True
            self._report_invalid(oldest)

    def slots_of(self, req_pool_idx: int, first: int, last: int, req_to_token_pool: Any) -> Tensor:
        """KV slots `int64 [last - first]` of a running request's tokens [first, last)."""
        return req_to_token_pool.req_to_token[req_pool_idx][first:last].cpu().long()

    def version_name(self, number: int) -> str:
        """Weight version, as the server names it, behind a number in the table."""
        return self._versions[number]

    def get_topk(self, req_pool_idx: int, seqlen: int, req_to_token_pool: Any, start_len: int = 0) -> Tensor:
        """Routes in upstream's own format, `int32 [tokens, decoder layers, K]` for tokens [start_len, seqlen - 1).

        Dense layers are zeros, as upstream sends them. A row that is not valid is -1 in every MoE layer: upstream would
        send zeros or another request's experts there.
        """
        first = min(start_len, seqlen - 1)
        slots = self.slots_of(req_pool_idx, first, seqlen - 1, req_to_token_pool)
        rows, valid, _ = self.table.read(slots)
        full = torch.zeros((len(slots), self.geometry.num_layers, self.geometry.top_k), dtype=torch.int32)
        full[:, list(self.geometry.moe_layers)] = self.codec.unpack_valid(rows, valid, self.geometry)
        return full

    def destroy(self) -> None:
        """Let the buffers go and close the store; upstream calls it when the server stops."""
        self._in_flight.clear()
        self.table = SlotTable(0, 0, pin=False)
        self.store.close()

    def _version_number(self, name: str | None) -> int:
        name = name or "default"
        if not self._versions or self._versions[-1] != name:
            self._versions.append(name)
        return len(self._versions) - 1

    def _report_invalid(self, record: PassRecord) -> None:
        if self._invalid_reported or bool(record.valid.all()):
            return
        self._invalid_reported = True
        logger.error(
            "router capture: %d of %d tokens of a forward pass have no route in at least one MoE layer. Their rows are"
            " marked invalid. The layer reported no experts, or not %d different ones in [0, %d): the MoE backend in"
            " use does not report them everywhere, or its router chose among NaN. Choose another with"
            " --moe-runner-backend, and look at the logits. Further passes are not reported.",
            int((~record.valid).sum()),
            len(record.valid),
            self.geometry.top_k,
            self.geometry.num_experts,
        )
