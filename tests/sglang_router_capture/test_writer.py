"""Masks on their way into a store in the background, and their handles on the way to the answer."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
import torch

from router_replay.errors import DataError, InputError
from router_replay.masks import RoutingGeometry, RoutingMasks, load, open_store
from sglang_router_capture import writer as writer_module
from sglang_router_capture.hooks.endpoints import with_handles
from sglang_router_capture.mailbox import Mailbox, new_ticket
from sglang_router_capture.server_folder import ServerFolder
from sglang_router_capture.writer import Writer

GEOMETRY = RoutingGeometry(num_layers=2, moe_layers=(0, 1), num_experts=8, top_k=2)


class SlowStore:
    """Takes masks when it is told to."""

    def __init__(self) -> None:
        self.may_store = threading.Event()
        self.error: Exception | None = None
        self.kept: list[RoutingMasks] = []

    def put(self, masks: RoutingMasks) -> dict[str, Any]:
        self.may_store.wait(20)
        if self.error is not None:
            raise self.error
        self.kept.append(masks)
        return {"store": "slow:", "number": len(self.kept) - 1}


def masks() -> RoutingMasks:
    indices = torch.tensor([[[0, 1], [2, 3]], [[4, 5], [6, 7]]])
    valid = torch.ones(2, dtype=torch.bool)
    return RoutingMasks.from_indices(indices, valid, start=0, geometry=GEOMETRY, codec="auto", token_ids=[1, 2, 3])


async def answers_of(*answers: Any) -> AsyncGenerator[Any, None]:
    for answer in answers:
        yield answer


def answer(*handles: dict[str, Any]) -> dict[str, Any]:
    return {"text": "", "meta_info": {"routing_masks": list(handles)} if handles else {}}


def collected(mailbox: Mailbox, *answers: Any) -> list[Any]:
    async def collect() -> list[Any]:
        return [each async for each in with_handles(answers_of(*answers), mailbox)]

    return asyncio.run(collect())


def test_masks_are_made_when_no_further_request_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of requests that end together are made once the last of them has been noted."""
    monkeypatch.setattr(writer_module, "_QUIET_S", 0.5)
    monkeypatch.setattr(writer_module, "_LONGEST_S", 60.0)
    store = SlowStore()
    store.may_store.set()
    writer = Writer(store, "slow:", Mailbox(tmp_path))
    made: list[float] = []

    def make() -> RoutingMasks:
        made.append(time.monotonic())
        return masks()

    for _ in range(4):
        time.sleep(0.05)
        writer.submit(make, 10)
        last = time.monotonic()
    writer.close()
    assert len(store.kept) == 4 and min(made) > last


def test_masks_are_made_while_requests_go_on_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "_QUIET_S", 60.0)
    store = SlowStore()
    store.may_store.set()
    writer = Writer(store, "slow:", Mailbox(tmp_path))
    made = threading.Event()

    def make() -> RoutingMasks:
        made.set()
        return masks()

    deadline = time.monotonic() + 20
    while not made.wait(0.01):
        assert time.monotonic() < deadline
        writer.submit(make, 10)


def test_a_handle_stands_where_its_ticket_stood(tmp_path: Path) -> None:
    mailbox = Mailbox(tmp_path)
    writer = Writer(open_store("inline:"), "inline:", mailbox)
    tickets = [writer.submit(masks, 10) for _ in range(3)]
    assert len({str(ticket) for ticket in tickets}) == 3
    handle = open_store("inline:").put(masks())
    found = collected(mailbox, answer(tickets[0]), answer(), [answer(tickets[1]), answer(tickets[2])], answer(handle))
    writer.close()
    # What has to wait comes last.
    none, direct, alone, (second, third) = found
    for each in (alone, second, third, direct):
        (got,) = each["meta_info"]["routing_masks"]
        assert torch.equal(load(got).rows, masks().rows)
    assert none == answer()
    assert (writer.counts.stored, writer.counts.failed, writer.counts.waiting_bytes) == (3, 0, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_slow_store_holds_its_own_answer_alone(tmp_path: Path) -> None:
    store, mailbox = SlowStore(), Mailbox(tmp_path)
    writer = Writer(store, "slow:", mailbox)
    began = time.monotonic()
    ticket = writer.submit(masks, 10)
    assert time.monotonic() - began < 5

    async def both() -> list[str]:
        order: list[str] = []

        async def take(name: str, one: dict[str, Any]) -> None:
            async for _ in with_handles(answers_of(one), mailbox):
                order.append(name)

        slow = asyncio.create_task(take("slow", answer(ticket)))
        await take("other", answer())
        store.may_store.set()
        await slow
        return order

    assert asyncio.run(both()) == ["other", "slow"]
    writer.close()
    assert len(store.kept) == 1


def test_nobody_waits_for_a_slow_store_with_a_lock_of_sglangs(tmp_path: Path) -> None:
    """SGLang's generator holds its lock against updates of the weights until it ends, and new requests wait behind."""
    from sglang.srt.utils.aio_rwlock import RWLock

    mailbox = Mailbox(tmp_path)
    ticket = new_ticket()

    async def go() -> list[Any]:
        lock = RWLock()

        async def request() -> AsyncGenerator[Any, None]:
            async with lock.reader_lock:
                yield answer(ticket)

        waiting = asyncio.create_task(anext(with_handles(request(), mailbox)))
        await asyncio.sleep(0.05)
        # An update, and a request after it.
        async with asyncio.timeout(5), lock.writer_lock:
            assert not waiting.done()
        async with asyncio.timeout(5), lock.reader_lock:
            mailbox.post(ticket, {"store": "x"})
        return (await waiting)["meta_info"]["routing_masks"]

    assert asyncio.run(go()) == [{"store": "x"}]


def test_a_server_that_stops_tells_the_answers_that_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "_CLOSING_S", 0.2)
    store, mailbox = SlowStore(), Mailbox(tmp_path)
    writer = Writer(store, "slow:", mailbox)
    tickets = [writer.submit(masks, 10) for _ in range(6)]
    began = time.monotonic()
    writer.close()
    assert time.monotonic() - began < 10
    handles = [each["meta_info"]["routing_masks"][0] for each in collected(mailbox, *map(answer, tickets))]
    assert handles == [{"store": "slow:", "error": "the server stopped before the store had taken them"}] * 6
    store.may_store.set()


def test_handles_that_cannot_be_posted_are_told_of(tmp_path: Path) -> None:
    """Memory that is full has no room for masks in their handle, and still for a name."""
    mailbox = Mailbox(tmp_path, most_bytes=100)
    writer = Writer(open_store("inline:"), "inline:", mailbox)
    (found,) = collected(mailbox, answer(writer.submit(masks, 10)))
    writer.close()
    (handle,) = found["meta_info"]["routing_masks"]
    with pytest.raises(DataError, match="no masks for this answer: their handle did not arrive"):
        load(handle)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_gone_is_not_made_again(tmp_path: Path) -> None:
    mailbox = Mailbox(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="the server's folder is gone"):
        mailbox.post({"ticket": "x"}, {})
    mailbox.post_nothing({"ticket": "x"})
    assert list(tmp_path.iterdir()) == []


def test_what_a_store_does_not_take_is_said_in_its_answer(tmp_path: Path) -> None:
    store, mailbox = SlowStore(), Mailbox(tmp_path)
    store.error = OSError("no space")
    store.may_store.set()
    writer = Writer(store, "slow:", mailbox)
    (found,) = collected(mailbox, answer(writer.submit(masks, 10)))
    assert found["meta_info"]["routing_masks"] == [
        {"store": "slow:", "error": "the store did not take them: OSError: no space"}
    ]
    store.error = None
    (after,) = collected(mailbox, answer(writer.submit(masks, 10)))
    assert after["meta_info"]["routing_masks"] == [{"store": "slow:", "number": 0}]
    writer.close()
    assert (writer.counts.stored, writer.counts.failed) == (1, 1)


def test_what_cannot_be_written_ends_no_thread(tmp_path: Path) -> None:
    """A path that is not UTF-8, in more answers than there are threads."""
    mailbox, store = Mailbox(tmp_path), SlowStore()
    store.may_store.set()
    store.error = OSError("no space left at /masks/\udcff")
    writer = Writer(store, "slow:", mailbox)
    tickets = [writer.submit(masks, 10) for _ in range(8)]
    for found in collected(mailbox, *map(answer, tickets)):
        assert "did not arrive" in found["meta_info"]["routing_masks"][0]["error"]
    store.error = None
    (found,) = collected(mailbox, answer(writer.submit(masks, 10)))
    assert found["meta_info"]["routing_masks"][0]["store"] == "slow:"
    assert (writer.counts.failed, writer.counts.stored, writer.counts.waiting_bytes) == (8, 1, 0)
    writer.close()


def test_a_store_that_is_behind_drops_further_masks(tmp_path: Path) -> None:
    store, mailbox = SlowStore(), Mailbox(tmp_path)
    writer = Writer(store, "slow:", mailbox, most_bytes=100)
    # More than may wait, but nothing waits: it would never be stored otherwise.
    first = writer.submit(masks, 150)
    second = writer.submit(masks, 1)
    assert "ticket" in first
    assert second["error"].startswith("the store is behind: rows of 150 bytes wait for it, at most 100 may")
    store.may_store.set()
    collected(mailbox, answer(first))
    assert "ticket" in writer.submit(masks, 60)
    writer.close()
    assert (writer.counts.stored, writer.counts.dropped, writer.counts.waiting_bytes) == (2, 1, 0)


def test_a_client_that_goes_away_ends_the_servers_generator(tmp_path: Path) -> None:
    closed: list[bool] = []

    async def generator() -> AsyncGenerator[Any, None]:
        try:
            yield answer()
            yield answer({"ticket": "0" * 32})
        finally:
            closed.append(True)

    async def go() -> None:
        answers = with_handles(generator(), Mailbox(tmp_path))
        await anext(answers)
        waiting = asyncio.create_task(anext(answers))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await answers.aclose()

    asyncio.run(go())
    assert closed == [True]


def test_handles_that_nobody_claims_are_removed(tmp_path: Path) -> None:
    mailbox = Mailbox(tmp_path)
    mailbox.post({"ticket": "old"}, {})
    mailbox.post({"ticket": "new"}, {})
    os.utime(tmp_path / "old", (0, 0))
    mailbox._swept -= 7200
    mailbox.post({"ticket": "newer"}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "newer"]


def test_folders_of_killed_servers_are_removed_and_others_stay(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from sglang_router_capture.server_folder import ServerFolder;"
        "ServerFolder('killed', Path(sys.argv[1])).open(); print('open', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    alive = ServerFolder("alive", tmp_path)
    alive.open()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"router-capture-killed", "router-capture-alive"}
    process.kill()
    process.wait()
    process.stdout.close()
    third = ServerFolder("third", tmp_path)
    third.open()
    assert {path.name for path in tmp_path.iterdir()} == {"router-capture-alive", "router-capture-third"}
    for folder in (alive, third):
        assert folder.handles.is_dir() and folder.masks.is_dir()
        assert folder.path.stat().st_mode & 0o077 == 0
        folder.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="which this server's processes share, cannot be made"):
        ServerFolder("x", tmp_path / "missing").open()
