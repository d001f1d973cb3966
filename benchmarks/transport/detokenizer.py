"""The detokenizer's process: SGLang's own, without text."""

from __future__ import annotations

from typing import Any

import zmq
from sglang.srt.managers.detokenizer_manager import DetokenizerManager
from sglang.srt.managers.io_struct import BatchStrOutput, BatchTokenIDOutput, sock_recv, sock_send
from sglang.srt.utils.network import get_zmq_socket

from benchmarks.counted_socket import CountedSocket
from benchmarks.transport.scheduler import trim
from benchmarks.transport.ways import HOPS, SCHEDULED, TRIM, WRITTEN, Places


class _Detokenizer(DetokenizerManager):
    def __init__(self) -> None:
        """Nothing of the manager's is needed but what it does with a batch."""

    def _decode_batch_token_id_output(self, recv_obj: BatchTokenIDOutput) -> list[str]:
        return [""] * len(recv_obj.rids)


def run(places: Places, hops: Any, ready: Any) -> None:
    """Take batches from the scheduler to the server, until the process ends.

    Args:
        hops: shared; bytes by hop, to which those of each batch are added.
    """
    manager = _Detokenizer()
    context = zmq.Context(2)
    scheduled: Any = CountedSocket(get_zmq_socket(context, zmq.PULL, places.socket("scheduled"), True))
    written: Any = CountedSocket(get_zmq_socket(context, zmq.PUSH, places.socket("written"), False))
    ready.send("ready")
    while True:
        batch: BatchTokenIDOutput = sock_recv(scheduled)
        if batch.rids == [TRIM]:
            trim()
        answers: BatchStrOutput = manager.handle_batch_token_id_out(batch)
        sock_send(written, answers)
        for hop, socket in ((SCHEDULED, scheduled), (WRITTEN, written)):
            hops[HOPS.index(hop)] += socket.num_bytes
            socket.num_bytes = 0
        # Nothing of this batch is held until the next.
        del batch, answers
