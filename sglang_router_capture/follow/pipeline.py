"""Pipeline parallelism: each stage's layers of a pass travel with SGLang's own messages to the stage that answers.

The first stage answers, and alone has a table. It keeps its own layers of a pass until the pass's result comes back to
it; the others put theirs into the message that goes on to the next stage anyway, and the last one into the result's.
Rows arrive when the sampled tokens do, and the log keeps the order in which the first stage launched its passes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sglang.srt.state_capturer.routed_experts import RoutedExpertsCapturer
from torch import Tensor

from router_replay.masks import RoutingGeometry
from sglang_router_capture.log import PassRecord
from sglang_router_capture.ranks import OtherRank, OwnTokens, own_tokens
from sglang_router_capture.recorder import Recorder
from sglang_router_capture.staging import Staging

PASS_KEY = "router_capture_pass"
ROWS_KEY = "router_capture_rows"

# A token's row in a message: its KV slot, whether all of its layers reported, and the experts of the layers so far.
_SLOT_BYTES = 8
_HEAD_BYTES = _SLOT_BYTES + 1


@dataclass
class _Waiting:
    """A pass of the first stage whose result is not back yet: its number, and this stage's part of it."""

    number: int
    slots: Tensor
    indices: Tensor
    valid: Tensor
    record: PassRecord | None = None
    rows: Tensor | None = None


class FirstStage(Recorder):
    """The recorder of a pipeline's first stage: a pass is whole when its result comes back from the last one."""

    def __init__(self, geometry: RoutingGeometry, *others: Any, **named: Any) -> None:
        super().__init__(geometry, *others, **named)
        self._num_launched = 0
        self._waiting: deque[_Waiting] = deque()
        self._latest: int | None = None

    def on_forward_end(
        self, forward_batch: Any, can_run_graph: bool, cuda_graph_batch: int | None, no_copy_to_cpu: bool = False
    ) -> None:
        """Keep this stage's layers, under the pass's number."""
        self._latest = None
        super().on_forward_end(forward_batch, can_run_graph, cuda_graph_batch, no_copy_to_cpu=True)

    def outgoing(self) -> dict[str, Any]:
        """What goes to the next stage with the latest pass: its number."""
        return {} if self._latest is None else {PASS_KEY: self._latest}

    def returned(self, number: int | None, message: Tensor | None) -> None:
        """A pass's result is back.

        Args:
            number: of the pass; None where the pass had none, since it had no tokens.
            message: `uint8 [tokens, bytes]` as the last stage sent it; None where it sent none.
        """
        while number is not None and self._waiting and self._waiting[0].number <= number:
            waiting = self._waiting.popleft()
            # The results of others were dropped, and their tokens have no rows.
            if waiting.number == number and message is not None:
                self._complete(waiting, message)
            if waiting.record is not None:
                waiting.record.finalize()

    def settle(self) -> None:
        """Only where no pass is on its way through the stages: nothing hastens it, and its rows would be lost."""
        if not self._waiting:
            super().settle()

    def destroy(self) -> None:
        """Also forget the passes that are under way."""
        self._waiting.clear()
        super().destroy()

    def _launch(self, tokens: OwnTokens, version: int) -> PassRecord:
        indices, valid = self.device_cache.take(tokens.first, tokens.first + len(tokens.slots), tokens.end)
        waiting = _Waiting(self._num_launched, tokens.slots.clone(), indices, valid)
        waiting.record = self.log.launch(partial(self._settle, waiting, version))
        self._waiting.append(waiting)
        self._latest = waiting.number
        self._num_launched += 1
        return waiting.record

    def _complete(self, waiting: _Waiting, message: Tensor) -> None:
        """Pack the layers of all stages, and bring them to the host: the result is waited for in any case."""
        layers = self.geometry.num_moe_layers - waiting.indices.shape[1]
        if message.shape != (len(waiting.slots), _HEAD_BYTES + 2 * layers * self.geometry.top_k):
            return
        slots, valid, indices = _read(message, self.geometry.top_k)
        # Every stage hands out the same slots. Where one did not, the row is another token's.
        valid = valid & waiting.valid & (slots == waiting.slots)
        rows = self.codec.pack(torch.cat([waiting.indices, indices], dim=1), self.geometry)
        waiting.rows, waiting.valid, waiting.slots = rows.cpu(), valid.cpu(), waiting.slots.cpu()

    def _settle(self, waiting: _Waiting, version: int) -> None:
        if waiting.rows is None:
            self.table.release(waiting.slots.cpu())
        else:
            self._pass_settled(version, waiting.slots, waiting.rows, waiting.valid)


class LaterStage(OtherRank):
    """Stands in the recorder's place on the stages after the first: it passes its layers on, and keeps nothing.

    Attributes:
        device_cache: where the layers of a pass leave their choice.
        num_fused_shared_experts: read by upstream's capture.
        topk_size: read by upstream's capture.
    """

    def __init__(self, staging: Staging, geometry: RoutingGeometry, num_fused_shared_experts: int) -> None:
        self.device_cache = staging
        self.num_fused_shared_experts = num_fused_shared_experts
        self.topk_size = geometry.top_k
        self._received: dict[str, Any] = {}
        self._outgoing: dict[str, Any] = {}

    # A rank that keeps nothing drops what its layers report; this one stages it, as the recorder does.
    capture = RoutedExpertsCapturer.capture

    def received(self, number: int | None, message: Tensor | None) -> None:
        """What came from the stage before, with the batch that runs next; arguments as of `FirstStage.returned`."""
        self._received = {PASS_KEY: number, ROWS_KEY: message}

    def on_forward_end(
        self, forward_batch: Any, can_run_graph: bool, cuda_graph_batch: int | None, no_copy_to_cpu: bool = False
    ) -> None:
        """Add this stage's layers to those that came, on the device and on the forward's stream."""
        tokens = own_tokens(forward_batch, can_run_graph, cuda_graph_batch)
        indices, valid = self.device_cache.take(tokens.first, tokens.first + len(tokens.slots), tokens.end)
        before, self._received = self._received, {}
        message: Tensor | None = before.get(ROWS_KEY)
        if message is not None:
            if message.is_cuda:
                # Made on the stream of the messages: the memory must not be reused before this one has read it.
                message.record_stream(torch.cuda.current_stream())
            if len(message) == len(valid):
                slots, valid_before, indices_before = _read(message, self.topk_size)
                valid = valid & valid_before & (slots == tokens.slots)
                indices = torch.cat([indices_before, indices], dim=1)
        self._outgoing = {PASS_KEY: before.get(PASS_KEY), ROWS_KEY: _message(tokens.slots, valid, indices)}

    def outgoing(self) -> dict[str, Any]:
        """What goes to the next stage with the latest pass, or to the first stage with its result."""
        outgoing, self._outgoing = self._outgoing, {}
        return outgoing


def _message(slots: Tensor, valid: Tensor, indices: Tensor) -> Tensor:
    """`uint8 [n, bytes]` of slots `int [n]`, valid `bool [n]` and indices `int16 [n, L, K]`: NCCL sends no int16."""
    parts = (slots.long()[:, None].view(torch.uint8), valid[:, None].view(torch.uint8))
    return torch.cat([*parts, indices.flatten(1).contiguous().view(torch.uint8)], dim=1)


def _read(message: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slots `int64 [n]`, valid `bool [n]` and indices `int16 [n, L, K]` of a message."""
    # One row alone counts as contiguous wherever it begins, and could not be viewed as wider integers.
    slots = message[:, :_SLOT_BYTES].clone(memory_format=torch.contiguous_format).view(torch.int64)
    indices = message[:, _HEAD_BYTES:].clone(memory_format=torch.contiguous_format).view(torch.int16)
    experts = indices.unflatten(1, (indices.shape[1] // top_k, top_k))
    return slots.flatten(), message[:, _SLOT_BYTES] == 1, experts
