"""Recorder: takes each forward pass's routes from the device to the slot table, in the scheduler's order."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from sglang.srt.runtime_context import get_serving
from sglang.srt.state_capturer.routed_experts import RoutedExpertsCapturer
from torch import Tensor

from router_replay.errors import CallOrderError
from router_replay.masks import Codec, RoutingGeometry, Store
from sglang_router_capture.log import Log, PassRecord
from sglang_router_capture.options import CaptureOptions
from sglang_router_capture.slot_table import SlotTable
from sglang_router_capture.staging import Staging

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
        self.table = SlotTable(num_slots, codec.row_bytes(geometry))
        self.log = Log(device)
        self._allocator: Any = None
        self._versions: list[str] = []
        self._invalid_reported = False

    def follow(self, allocator: Any) -> None:
        """Hear from this KV allocator, whose slots `req_to_token` holds, which slots it hands out."""
        self._allocator = allocator

    def slots_allocated(self, allocator: Any, slots: Tensor | None) -> None:
        """The allocator handed out slots `int [m]` (None: it had too few)."""
        if allocator is self._allocator and slots is not None and slots.numel():
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
        slots = forward_batch.out_cache_loc_virtual
        if slots is None:
            slots = forward_batch.out_cache_loc
        indices, valid = self.device_cache.take(0, slots.shape[0])
        version = self._version_number(get_serving().weight_version)
        rows = self.codec.pack(indices, self.geometry)
        record = self.log.launch(partial(self._pass_settled, version), slots.clone(), rows, valid)
        if no_copy_to_cpu:
            return record
        record.finalize()
        return None

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
        self.log.clear()
        self.table = SlotTable(0, 0)
        self.store.close()

    def _version_number(self, name: str | None) -> int:
        name = name or "default"
        if not self._versions or self._versions[-1] != name:
            self._versions.append(name)
        return len(self._versions) - 1

    def _pass_settled(self, version: int, slots: Tensor, rows: Tensor, valid: Tensor) -> None:
        self.table.write(slots, rows, valid, version)
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
