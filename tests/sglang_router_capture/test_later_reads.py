"""Rows that the scheduler leaves for another thread to copy: they are those of the moment, whenever they are copied."""

from __future__ import annotations

import asyncio
import threading
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from router_replay.masks import RoutingGeometry, RoutingMasks, get_codec, load, open_store
from sglang_router_capture import answer
from sglang_router_capture import recorder as recorder_module
from sglang_router_capture.mailbox import Mailbox
from sglang_router_capture.options import CaptureOptions
from sglang_router_capture.slot_table import LaterRead, SlotRows, SlotTable
from sglang_router_capture.writer import Writer
from tests.sglang_router_capture.test_writer import SlowStore

GEOMETRY = RoutingGeometry(num_layers=3, moe_layers=(1, 2), num_experts=8, top_k=2)
SLOTS = 6

some_slots = st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=4, unique=True)
changes = st.one_of(
    st.tuples(st.just("release"), some_slots),
    st.tuples(st.just("write"), some_slots),
    st.tuples(st.just("copy"), some_slots),
    st.tuples(st.just("read"), some_slots),
    st.tuples(st.just("gather"), st.integers(0, 5)),
    st.tuples(st.just("forget"), st.integers(0, 5)),
)


def same(ours: SlotRows, theirs: SlotRows) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def change(table: SlotTable, what: str, slots: torch.Tensor, number: int) -> None:
    if what == "release":
        table.release(slots)
    elif what == "write":
        rows = torch.full((len(slots), 2), number % 250, dtype=torch.uint8)
        table.write(slots, rows, torch.arange(len(slots)) % 3 > 0, number)
    else:
        table.copy_from(table, slots, (slots + 1) % SLOTS)


@given(st.lists(changes, max_size=25))
def test_what_is_gathered_is_what_was_there(events: list[tuple[str, Any]]) -> None:
    table = SlotTable(SLOTS, 2)
    reads: list[tuple[LaterRead, SlotRows]] = []
    for number, (what, argument) in enumerate(events):
        if what == "read":
            slots = torch.tensor(argument)
            # A copy by the simple way, which nothing can change any more.
            reads.append((table.read_later(slots), table.read(slots)))
        elif what == "gather" and argument < len(reads):
            reads[argument][0].gather()
        elif what == "forget" and argument < len(reads):
            del reads[argument]
        elif what in ("release", "write", "copy"):
            change(table, what, torch.tensor(argument), number)
    for read, expected in reads:
        assert same(read.gather(), expected)


def test_only_reads_of_what_changes_are_gathered_before_it() -> None:
    table = SlotTable(SLOTS, 2)
    first, second = table.read_later(torch.tensor([0, 1])), table.read_later(torch.tensor([2, 3]))
    # Two rows of two bytes, and two slots of eight.
    assert (first.num_bytes, second.num_bytes) == (20, 20)
    table.release(torch.tensor([4, 5]))
    assert not first.gathered and not second.gathered
    table.release(torch.tensor([1]))
    assert first.gathered and not second.gathered


def test_rows_that_nobody_waits_for_are_not_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    table = SlotTable(SLOTS, 2)
    table.read_later(torch.tensor([0, 1]))

    def refuse(*_: Any) -> None:
        raise AssertionError("rows were copied for nobody")

    monkeypatch.setattr(SlotTable, "read", refuse)
    table.release(torch.tensor([0, 1]))


def test_a_change_waits_for_the_thread_that_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    table = SlotTable(SLOTS, 2)
    change(table, "write", torch.tensor([0, 1, 2]), 7)
    begun, may_go_on = threading.Event(), threading.Event()
    copy = SlotTable.read

    def slowly(self: SlotTable, slots: torch.Tensor) -> SlotRows:
        begun.set()
        assert may_go_on.wait(20)
        return copy(self, slots)

    monkeypatch.setattr(SlotTable, "read", slowly)
    read = table.read_later(torch.tensor([0, 1, 2]))
    gathers = threading.Thread(target=read.gather)
    gathers.start()
    assert begun.wait(20)
    changes = threading.Thread(target=table.release, args=(torch.tensor([1]),))
    changes.start()
    changes.join(0.2)
    assert changes.is_alive()
    may_go_on.set()
    for thread in (gathers, changes):
        thread.join(20)
    _, _, versions = read.gather()
    assert versions.tolist() == [7, 7, 7]
    assert table.versions.tolist()[:3] == [7, -1, 7]


@pytest.fixture
def recorder(tmp_path: Path) -> recorder_module.Recorder:
    made = recorder_module.Recorder(
        GEOMETRY,
        get_codec("bitset"),
        options=CaptureOptions(),
        store=open_store("inline:"),
        num_slots=16,
        max_tokens_per_pass=8,
        num_fused_shared_experts=0,
        device="cpu",
    )
    write(made, range(16), expert=3)
    return made


def write(recorder: recorder_module.Recorder, slots: range, expert: int) -> None:
    rows = recorder.codec.pack(torch.tensor([expert, expert + 1]).expand(len(slots), 2, 2), GEOMETRY)
    version = recorder.weight_versions.number(f"weights {expert}")
    recorder.table.write(torch.tensor(slots), rows, torch.ones(len(slots), dtype=torch.bool), version)


def finished(prompt: int, first_slot: int) -> tuple[Any, Any]:
    """A request as SGLang has it, and its slots."""
    req = SimpleNamespace(
        origin_input_ids=array("q", [prompt, prompt + 1]),
        output_ids=array("q", [6, 7, 8]),
        output_ids_through_stop=array("q", [6, 7, 8]),
        routed_experts_start_len=0,
        kv=SimpleNamespace(req_pool_idx=0),
    )
    return req, SimpleNamespace(req_to_token=torch.arange(first_slot, first_slot + 5, dtype=torch.int32)[None])


class Waiting(Writer):
    """A writer that begins when it is told to."""

    def __init__(self, mailbox: Mailbox) -> None:
        self.may_begin = threading.Event()
        super().__init__(open_store("inline:"), "inline:", mailbox)

    def _make_next(self) -> bool:
        assert self.may_begin.wait(20)
        return super()._make_next()


def test_slots_that_change_hands_at_once_take_no_row_away(
    recorder: recorder_module.Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler's thread copies no row where slots stay, and those that it must where they go."""
    mailbox = Mailbox(tmp_path)
    writer = recorder.writer = Waiting(mailbox)
    copied: list[bool] = []
    copy = SlotTable.read

    def told(self: SlotTable, slots: torch.Tensor) -> SlotRows:
        copied.append(threading.current_thread() is threading.main_thread())
        return copy(self, slots)

    monkeypatch.setattr(SlotTable, "read", told)
    requests = [finished(prompt, slot) for prompt, slot in ((20, 0), (30, 4))]
    for req, pool in requests:
        answer.collect(recorder, req, pool)
        req.origin_input_ids.append(99)
    assert copied == []
    recorder.table.release(torch.tensor([1, 2]))
    write(recorder, range(1, 3), expert=5)
    assert copied == [True]
    writer.may_begin.set()
    for (req, _), prompt in zip(requests, (20, 30), strict=True):
        (ticket,) = answer.handles(req)
        masks: RoutingMasks = load(asyncio.run(mailbox.redeemed(ticket)))
        masks.check_tokens([prompt, prompt + 1, 6, 7, 8])
        assert masks.valid.all()
        assert masks.indices()[:, 0].tolist() == [[3, 4]] * 4
        assert masks.weight_versions == ((0, "weights 3"),)
    assert copied == [True, False]
    assert (recorder.counts.returned, recorder.counts.returned_unrecorded) == (8, 0)
    writer.close()


def test_a_pools_row_that_goes_to_another_request_takes_no_row_away(
    recorder: recorder_module.Recorder, tmp_path: Path
) -> None:
    """Whatever the type of the pool's slots, of which one needs no conversion."""
    mailbox = Mailbox(tmp_path)
    writer = recorder.writer = Waiting(mailbox)
    write(recorder, range(8, 16), expert=5)
    req, pool = finished(20, 0)
    pool.req_to_token = pool.req_to_token.long()
    answer.collect(recorder, req, pool)
    pool.req_to_token += 8
    writer.may_begin.set()
    (ticket,) = answer.handles(req)
    assert load(asyncio.run(mailbox.redeemed(ticket))).indices()[:, 0].tolist() == [[3, 4]] * 4
    writer.close()


def test_kept_rows_join_those_that_were_copied_under_inference_mode(
    recorder: recorder_module.Recorder, tmp_path: Path
) -> None:
    """SGLang's loop runs under it where `SGLANG_ENABLE_TORCH_INFERENCE_MODE` says so, other threads never do."""
    mailbox = Mailbox(tmp_path)
    writer = recorder.writer = Waiting(mailbox)
    with torch.inference_mode():
        req, pool = finished(20, 0)
        answer.keep(recorder, req, pool)
        req.output_ids.append(5)
        req.output_ids_through_stop.append(5)
        pool.req_to_token = torch.arange(8, 14, dtype=torch.int32)[None]
        write(recorder, range(8, 14), expert=5)
        answer.collect(recorder, req, pool)
        recorder.table.release(torch.arange(8, 14))
    writer.may_begin.set()
    (ticket,) = answer.handles(req)
    found = load(asyncio.run(mailbox.redeemed(ticket)))
    assert found.indices()[:, 0].tolist() == [[3, 4]] * 4 + [[5, 6]]
    assert found.weight_versions == ((0, "weights 3"), (4, "weights 5"))
    writer.close()


def test_masks_of_a_store_that_is_behind_are_not_copied(recorder: recorder_module.Recorder, tmp_path: Path) -> None:
    writer = recorder.writer = Waiting(Mailbox(tmp_path))
    writer._most_bytes = 1
    for prompt, slot in ((20, 0), (30, 4)):
        req, pool = finished(prompt, slot)
        answer.collect(recorder, req, pool)
    (refused,) = answer.handles(req)
    assert refused["error"].startswith("the store is behind")
    assert len(recorder.table._waiting()) == 1
    writer.may_begin.set()
    writer.close()


def test_rows_leave_the_table_however_long_the_store_takes(recorder: recorder_module.Recorder, tmp_path: Path) -> None:
    store = SlowStore()
    writer = recorder.writer = Writer(store, "slow:", Mailbox(tmp_path))
    reads: list[LaterRead] = []
    for _ in range(12):
        read = recorder.table.read_later(torch.arange(4))
        reads.append(read)
        writer.submit(lambda read=read: read.gather(), 10)
    for _ in range(400):
        if all(read.gathered for read in reads):
            break
        threading.Event().wait(0.05)
    assert all(read.gathered for read in reads)
    store.may_store.set()
    writer.close()
    assert writer.counts.stored == 12


def test_masks_that_cannot_be_made_are_told_of(tmp_path: Path) -> None:
    mailbox = Mailbox(tmp_path)
    writer = Writer(open_store("inline:"), "inline:", mailbox)

    def fail() -> RoutingMasks:
        raise MemoryError("no room")

    ticket = writer.submit(fail, 10)
    assert asyncio.run(mailbox.redeemed(ticket)) == {
        "store": "inline:",
        "error": "they could not be made: MemoryError: no room",
    }
    writer.close()
    assert (writer.counts.stored, writer.counts.failed, writer.counts.waiting_bytes) == (0, 1, 0)
