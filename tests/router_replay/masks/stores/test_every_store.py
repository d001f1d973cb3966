"""What every store does, with the real thing behind it."""

from __future__ import annotations

import json
import re
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing.context import BaseContext
from typing import Any

import pytest

from router_replay.errors import DataError, InputError, StoreError
from router_replay.masks import RoutingMasks, Stat, load, open_store, to_bytes
from tests.router_replay.masks.stores.children import checksum, die_reading, get_many, put_many
from tests.router_replay.masks.stores.conftest import Place, environment
from tests.router_replay.masks.test_container import GEOMETRY, assert_same, make_masks

KEEPING = pytest.mark.parametrize("place", ["file", "memory", "s3", "ray", "http"], indirect=True)
"""All but the inline store, whose masks are in the handle alone."""
ALONE = pytest.mark.parametrize("place", ["file", "memory", "s3", "ray alone", "http"], indirect=True)
"""Likewise, where nobody else puts anything."""
FILES = pytest.mark.parametrize("place", ["file", "memory", "s3", "http"], indirect=True)
SHARED = pytest.mark.parametrize("place", ["inline", "file", "s3", "ray", "http"], indirect=True)
"""Those that other processes see."""

EMPTY = RoutingMasks.from_indices(
    make_masks().indices()[:0], make_masks().valid[:0], start=4, geometry=GEOMETRY, codec="rank", token_ids=range(4)
)


@pytest.mark.parametrize(
    "masks", [make_masks(), make_masks("ordered", num_tokens=300), EMPTY], ids=["few", "many", "0"]
)
def test_what_was_put_is_behind_its_handle_wherever_it_is_read(place: Place, masks: RoutingMasks):
    with place.writer() as store:
        store.prepare()
        handle = json.loads(json.dumps(store.put(masks)))
        assert_same(store.get(handle), masks)
        assert store.stat(handle) == Stat(there=True, num_bytes=len(to_bytes(masks)), num_tokens=len(masks))
    # Masks that were put stay when their writer is closed.
    assert_same(load(handle), masks)
    with open_store(handle["store"]) as reader:
        assert_same(reader.get(handle), masks)
        assert reader.stat(handle) == Stat(there=True, num_bytes=len(to_bytes(masks)), num_tokens=len(masks))


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What stores wrote into the log."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("router_replay.")]


@KEEPING
def test_a_handle_is_small_and_names_the_store_alone(place: Place):
    with place.writer("max_bytes=1MB") as store:
        handle = store.put(make_masks(num_tokens=1000))
    assert set(handle) - {"node"} == {"store", "id", "num_bytes", "start", "num_tokens", "crc32"}
    assert (handle["start"], handle["num_tokens"]) == (3, 1000)
    assert handle["store"] == place.urls[0] and len(json.dumps(handle)) < 350
    assert re.fullmatch("[0-9a-f]{48}", handle["id"])
    assert "secret" not in json.dumps(handle) and "max_bytes" not in json.dumps(handle)


def test_preparing_again_leaves_what_is_there(place: Place):
    with place.writer() as store:
        store.prepare()
        handle = store.put(make_masks())
        store.prepare()
        assert_same(store.get(handle), make_masks())
    if place.files:
        assert place.listed() == [f"{handle['id']}.safetensors"]


def test_handles_do_not_get_mixed_up(place: Place):
    with place.writer() as store:
        parts = [make_masks(seed=1), make_masks(seed=2), make_masks(seed=1)]
        handles = [store.put(part) for part in parts]
    for handle, part in zip(reversed(handles), reversed(parts), strict=True):
        assert_same(load(handle), part)


@KEEPING
def test_deleting_frees_one_and_twice_is_no_error(place: Place):
    with place.writer() as store:
        kept, handle = store.put(make_masks()), store.put(make_masks(num_tokens=3))
        with open_store(handle["store"]) as reader:
            reader.delete(handle)
            reader.delete(handle)
            assert reader.stat(handle) == Stat(there=False, num_bytes=0, num_tokens=0)
        assert store.stat(handle) == Stat(there=False)
        for reads in (store.get, load):
            with pytest.raises(
                DataError, match=f"nothing is behind {handle['id']} .* deleted, or dropped as the oldest"
            ):
                reads(handle)
        assert_same(store.get(kept), make_masks())
    if place.files:
        assert place.listed() == [f"{kept['id']}.safetensors"]


def test_no_masks_are_refused_and_leave_nothing(place: Place):
    with place.writer() as store:
        store.prepare()
        with pytest.raises(InputError, match="expected RoutingMasks, got a dict"):
            store.put({"store": "inline:"})  # type: ignore[arg-type]
    if place.files:
        assert place.listed() == []


@KEEPING
@pytest.mark.parametrize("method", ["get", "stat", "delete"])
def test_every_method_takes_its_own_handles_alone(place: Place, method: str):
    with place.writer() as store:
        handle = store.put(make_masks())
        called = getattr(store, method)
        elsewhere = {**handle, "store": "file:///elsewhere"}
        for foreign in (
            elsewhere,
            {**handle, "store": handle["store"] + "0"},
            None,
            "inline:",
            {},
            {"store": "inline:"},
        ):
            with pytest.raises(DataError, match="not a handle of the store"):
                called(foreign)
        for field in ("id", "num_bytes", "start", "num_tokens", "crc32"):
            with pytest.raises(DataError, match="lacks a field"):
                called({key: value for key, value in handle.items() if key != field})
        with pytest.raises(DataError, match="lacks a field, or has another"):
            called({**handle, "path": "/etc/passwd"})
        outside: list[Any] = [
            f"../store/{handle['id']}",
            "",
            "x" * 48,
            f"{handle['id']}/..",
            f"{handle['id']}\n",
            5,
            None,
        ]
        outside += [handle["id"].upper().replace("0", "A"), handle["id"][1:], f"%2e%2e%2f{handle['id']}"]
        for wrong in outside:
            with pytest.raises(DataError, match="id or crc32"):
                called({**handle, "id": wrong})
        for field in ("num_bytes", "start", "num_tokens"):
            for wrong in (-1, 1.5, "6", None, True):
                with pytest.raises(DataError, match="is no size"):
                    called({**handle, field: wrong})
        assert_same(store.get(handle), make_masks())


@KEEPING
def test_an_id_that_nobody_gave_has_nothing_behind_it(place: Place):
    with place.writer() as store:
        handle = {**store.put(make_masks()), "id": "0" * 48}
        with pytest.raises(DataError, match="nothing is behind"):
            store.get(handle)
        assert store.stat(handle) == Stat(there=False)
        store.delete(handle)


@KEEPING
def test_anothers_container_is_told_from_ones_own(place: Place):
    with place.writer() as store:
        first, second = store.put(make_masks(seed=1)), store.put(make_masks(seed=2))
        swapped = {**first, "id": second["id"]}
        for reads in (store.get, load):
            with pytest.raises(DataError, match=f"masks with CRC-32 {second['crc32']} lie where .*{first['crc32']}"):
                reads(swapped)


@FILES
@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(place: Place, keep: int):
    with place.writer() as store:
        handle = store.put(make_masks())
        place.overwrite(handle, lambda data: data[:keep])
        for reads in (store.get, load):
            with pytest.raises(DataError, match="not a whole safetensors file"):
                reads(handle)
        with pytest.raises(DataError, match=r"bytes, but .* were put: truncated, or replaced"):
            store.stat(handle)
        store.delete(handle)
        assert place.listed() == []


@FILES
def test_a_flipped_bit_is_refused(place: Place):
    with place.writer() as store:
        handle = store.put(make_masks("ordered", num_tokens=40))
        place.overwrite(handle, lambda data: data[:-60] + bytes([data[-60] ^ 1]) + data[-59:])
        with pytest.raises(DataError, match=r"corrupted|contradicts itself"):
            load(handle)


def test_threads_put_and_get_at_once(place: Place):
    def there_and_back(seed: int) -> tuple[dict[str, Any], str]:
        handle = store.put(make_masks(seed=seed, num_tokens=40))
        return handle, checksum(load(handle))

    with place.writer() as store, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(there_and_back, range(24)))
        for seed, (handle, found_checksum) in enumerate(found):
            assert found_checksum == checksum(make_masks(seed=seed, num_tokens=40))
            assert_same(store.get(handle), make_masks(seed=seed, num_tokens=40))
        list(pool.map(store.delete, [handle for handle, _ in found]))
        if place.kind != "inline":
            assert not any(store.stat(handle).there for handle, _ in found)
    if place.files:
        assert place.listed() == []


@SHARED
def test_processes_write_and_read_at_once(place: Place, workers: ProcessPoolExecutor):
    writing = [workers.submit(put_many, place.separate, environment(), seeds) for seeds in (range(3), range(3, 6))]
    handles = [handle for each in writing for handle in each.result()]
    expected = [checksum(make_masks(seed=seed, num_tokens=50)) for seed in range(6)]
    # Two readers of the same handles, beside this one.
    reading = [workers.submit(get_many, handles, environment(), place.ray) for _ in range(2)]
    assert [checksum(load(handle)) for handle in handles] == expected
    assert [each.result() for each in reading] == [expected, expected]
    assert all(handle["store"] == place.urls[0] for handle in handles)


@SHARED
def test_masks_outlive_their_writer_and_a_reader_that_dies(place: Place, processes: BaseContext):
    with processes.Pool(1) as writer:  # type: ignore[attr-defined]
        (handle,) = writer.apply(put_many, (place.separate, environment(), [7]))
    reader = processes.Process(  # type: ignore[attr-defined]
        target=die_reading, args=(handle, environment(), place.ray)
    )
    reader.start()
    reader.join()
    assert reader.exitcode == -9
    assert_same(load(handle), make_masks(seed=7, num_tokens=50))
    with open_store(handle["store"]) as store:
        store.delete(handle)
        assert place.kind == "inline" or not store.stat(handle).there


@ALONE
def test_the_oldest_that_nobody_deleted_goes_first(place: Place, caplog: pytest.LogCaptureFixture):
    size = len(to_bytes(make_masks(num_tokens=500)))
    # Room for four, and a sixteenth that is left free when some are dropped.
    with place.writer(f"max_bytes={size * 9 // 2}") as store:
        store.prepare()
        handles = [store.put(make_masks(num_tokens=500, seed=seed)) for seed in range(3)]
        store.delete(handles[1])
        # Reading marks nothing.
        store.get(handles[0])
        handles += [store.put(make_masks(num_tokens=500, seed=seed)) for seed in range(3, 5)]
        assert [store.stat(handle).there for handle in handles] == [True, False, True, True, True]
        assert store.num_dropped == 0 and not lines(caplog)
        handles.append(store.put(make_masks(num_tokens=500, seed=5)))
        assert [store.stat(handle).there for handle in handles] == [False, False, True, True, True, True]
        assert store.num_dropped == 1
        (line,) = lines(caplog)
        assert "dropped the masks of 1 sequences that nobody had deleted, the oldest; 1 " in line
        handles.append(store.put(make_masks(num_tokens=500, seed=6)))
        assert store.num_dropped == 2
        assert [store.stat(handle).there for handle in handles] == [False, False, False, True, True, True, True]
        with pytest.raises(DataError, match="dropped as the oldest when the store was full"):
            load(handles[0])
        assert_same(load(handles[-1]), make_masks(num_tokens=500, seed=6))


@ALONE
def test_masks_larger_than_the_whole_store_are_refused_and_others_go_on(place: Place):
    with place.writer("max_bytes=3KB") as store:
        handle = store.put(make_masks())
        with pytest.raises(
            StoreError, match=r"these masks have [\d,]+ bytes, the whole store .* at most 3,000 \(max_b"
        ):
            store.put(make_masks(num_tokens=5000))
        assert_same(load(store.put(make_masks(seed=1))), make_masks(seed=1))
        # What does not fit drives nothing out.
        assert_same(load(handle), make_masks())
        assert store.num_dropped == 0


@pytest.mark.parametrize("place", ["file", "memory", "s3", "ray"], indirect=True)
@pytest.mark.parametrize(
    "options", ["max_bytes=", "max_bytes=0", "max_bytes=many", "max_bytes=1&max_bytes=2", "key=s3cret"]
)
def test_options_that_a_store_does_not_have_are_refused(place: Place, options: str):
    with pytest.raises(InputError, match=r"max_bytes") as caught:
        place.writer(options)
    assert "s3cret" not in str(caught.value)
