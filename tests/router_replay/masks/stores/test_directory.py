"""The directory store: mapped files, what a fault leaves behind, bounds of several writers, and URLs."""

from __future__ import annotations

import gc
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from router_replay.errors import InputError, StoreError
from router_replay.masks import Stat, load, open_store, to_bytes
from router_replay.masks.container import map_file
from router_replay.masks.stores.directory import DirectoryStore
from router_replay.masks.stores.handles import new_id
from router_replay.masks.stores.urls import num_bytes
from tests.router_replay.masks.stores.children import put_beyond_a_limit
from tests.router_replay.masks.test_container import assert_same, make_masks


def file_of(folder: Path, handle: dict) -> Path:
    return folder / f"{handle['id']}.safetensors"


def mapped(path: Path) -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]


def test_rows_of_a_local_file_are_its_pages(tmp_path: Path):
    store = DirectoryStore(f"file://{tmp_path}")
    masks = make_masks(num_tokens=10_000)
    handle = store.put(masks)
    path = file_of(tmp_path, handle)
    found = store.get(handle)
    (mapping,) = mapped(path)
    begin, end = (int(each, 16) for each in mapping.split()[0].split("-"))
    assert begin <= found.rows.data_ptr() < end and begin <= found.valid.data_ptr() < end
    # Private: writing into the rows changes neither the file nor what others see.
    found.rows.fill_(0)
    assert_same(load(handle), masks)
    # The file is gone, its pages stay.
    again = load(handle)
    store.delete(handle)
    assert not path.exists()
    assert_same(again, masks)
    assert torch.equal(found.rows, torch.zeros_like(masks.rows))
    del found, again
    gc.collect()
    assert mapped(path) == []


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """While it is written nothing has its name; what is written has no name that a handle could hold."""
    store = DirectoryStore(f"file://{tmp_path}")
    seen = []
    mv = store._fs.mv

    def look(source: str, target: str) -> None:
        seen.append(sorted(path.name for path in tmp_path.iterdir()))
        assert not os.path.exists(target) and map_file(source)
        mv(source, target)

    monkeypatch.setattr(store._fs, "mv", look)
    handle = store.put(make_masks())
    assert seen == [[f"{handle['id']}.partial"]]
    assert [path.name for path in tmp_path.iterdir()] == [file_of(tmp_path, handle).name]


def test_files_have_the_permissions_of_new_files(tmp_path: Path):
    store = DirectoryStore(f"file://{tmp_path}")
    (tmp_path / "new").touch()
    assert file_of(tmp_path, store.put(make_masks())).stat().st_mode == (tmp_path / "new").stat().st_mode


def test_a_put_that_the_system_stops_leaves_nothing_and_others_go_on(tmp_path: Path, processes: BaseContext):
    with processes.Pool(1) as child:  # type: ignore[attr-defined]
        error, rows = child.apply(put_beyond_a_limit, (f"file://{tmp_path}/store", 100_000))
    assert error.startswith(
        f"StoreError: the store 'file://{tmp_path}/store' could not keep masks: OSError: [Errno 27]"
    )
    assert rows == 6
    (left,) = (tmp_path / "store").iterdir()
    assert_same(map_file(left), make_masks())


@pytest.mark.parametrize("place", ["/proc/r3", "{tmp}/file/r3", "{tmp}/file"])
def test_a_place_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path, place: str):
    (tmp_path / "file").write_text("")
    store = open_store(f"file://{place.format(tmp=tmp_path)}")
    with pytest.raises(StoreError, match=r"the store 'file:///.*' is not to be written: \w+Error: "):
        store.prepare()
    with pytest.raises(StoreError, match="could not keep masks"):
        store.put(make_masks())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_bound_above_what_is_free_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(StoreError, match=r"hold up to [\d,]+ bytes \(max_bytes\), but its file system has room for"):
        open_store(f"file://{tmp_path}?max_bytes={2 * free}").prepare()
    usage = shutil._ntuple_diskusage(10_000, 5_000, 5_000)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    # Without one it is half of what is free and what is there already.
    store = DirectoryStore(f"file://{tmp_path}")
    store.prepare()
    handles = [store.put(make_masks()) for _ in range(8)]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2_500
    assert [store.stat(handle).there for handle in handles[-2:]] == [True, True] and store.num_dropped >= 3
    # What the store holds is room that it may have.
    there = sum(path.stat().st_size for path in tmp_path.iterdir())
    open_store(f"file://{tmp_path}?max_bytes={5_000 + there}").prepare()
    with pytest.raises(StoreError):
        open_store(f"file://{tmp_path}?max_bytes={5_001 + there}").prepare()


def test_a_folder_that_is_lost_is_made_again(tmp_path: Path):
    store = DirectoryStore(f"file://{tmp_path}/store?max_bytes=2000")
    handle = store.put(make_masks())
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(StoreError, match="is not on this machine: a handle of a local folder is for processes beside"):
        load(handle)
    assert store.stat(handle) == Stat(there=False)
    for _ in range(2):
        assert_same(load(store.put(make_masks())), make_masks())


def test_files_of_writers_that_are_gone_count_and_go_first(tmp_path: Path):
    size = len(to_bytes(make_masks()))
    left = [DirectoryStore(f"file://{tmp_path}").put(make_masks(seed=seed)) for seed in range(3)]
    # By the time in their ids, whatever the file system says of them.
    os.utime(file_of(tmp_path, left[0]))
    foreign = tmp_path / "README.safetensors"
    foreign.write_bytes(bytes(10 * size))
    store = DirectoryStore(f"file://{tmp_path}?max_bytes={size * 9 // 2}")
    handles = [store.put(make_masks(seed=seed)) for seed in range(2)]
    assert [store.stat(handle).there for handle in [*left, *handles]] == [False, True, True, True, True]
    assert store.num_dropped == 1
    # What is not a store's is not touched and does not count.
    assert foreign.stat().st_size == 10 * size


def test_several_writers_hold_one_bound(tmp_path: Path):
    size = len(to_bytes(make_masks()))
    stores = [DirectoryStore(f"file://{tmp_path}?max_bytes={size * 32}") for _ in range(3)]

    def write(store: DirectoryStore) -> None:
        for _ in range(60):
            store.put(make_masks())
            assert sum(1 for path in tmp_path.iterdir()) <= 32 + 3 * 2 + 3

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, stores))
    there = len(list(tmp_path.iterdir()))
    assert there == 180 - sum(store.num_dropped for store in stores)
    assert 25 <= there <= 32 + 2 * 2


def test_the_partial_file_of_a_killed_writer_is_removed_when_it_is_old(tmp_path: Path):
    old = f"{time.time_ns() - 2 * 3600 * 10**9:016x}{'0' * 32}"
    (tmp_path / f"{old}.partial").write_bytes(b"half")
    (tmp_path / f"{new_id()}.partial").write_bytes(b"half of one that is being written")
    store = DirectoryStore(f"file://{tmp_path}")
    store.put(make_masks())
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".partial", ".safetensors"]
    assert not (tmp_path / f"{old}.partial").exists() and store.num_dropped == 0


def test_a_relative_or_sloppy_url_is_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    urls = {
        DirectoryStore(url).url
        for url in ("file://r3", f"file://{tmp_path}/r3/", f"file://{tmp_path}/x/../r3?max_bytes=1")
    }
    assert urls == {f"file://{tmp_path}/r3"}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///", "names no folder"),
        ("file:/tmp/r3", "is named as file://"),
        ("simplecache::s3://bucket", "is not the URL of a known store|is named as"),
        ("file:///r3?endpoint_url=http://host", "it takes max_bytes, each once"),
        ("s3://bucket?secret=hidden", "it takes endpoint_url, max_bytes, each once. Credentials come from"),
        ("s3://id:hidden@bucket/r3", "holds a password"),
        ("hdfs://host/r3?user=hidden", "it takes max_bytes"),
        ("zip://r3", "fsspec opens no file system for the store URL 'zip://r3'"),
    ],
)
def test_urls_of_no_folder_or_with_secrets_are_refused(url: str, message: str):
    with pytest.raises(InputError, match=message) as caught:
        open_store(url)
    assert "hidden" not in str(caught.value)


def test_s3_that_is_not_there_is_refused_at_the_start_and_while_it_runs(s3_url: str, monkeypatch: pytest.MonkeyPatch):
    no_bucket = open_store(f"s3://not-made/r3?endpoint_url={s3_url}")
    for call in (no_bucket.prepare, lambda: no_bucket.put(make_masks())):
        with pytest.raises(StoreError, match=r"the store 's3://not-made/r3.*bucket does not exist"):
            call()
    handle = open_store(f"s3://rollouts/r3?endpoint_url={s3_url}").put(make_masks())
    nobody = "s3://rollouts/r3?endpoint_url=http://127.0.0.1:9"
    store = open_store(nobody)
    # Its retries have pauses of their own.
    monkeypatch.setattr(type(store._fs), "retries", 1)  # type: ignore[attr-defined]
    moved = {**handle, "store": nobody}
    for call in (store.prepare, lambda: store.put(make_masks()), lambda: load(moved), lambda: store.delete(moved)):
        with pytest.raises(StoreError, match=r"127\.0\.0\.1:9"):
            call()


def test_credentials_come_from_the_environment_and_do_not_travel(s3_url: str, monkeypatch: pytest.MonkeyPatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(
        "fsspec.config.conf", {"s3": {"key": "from-fsspec", "secret": "hidden", "endpoint_url": s3_url}}
    )
    store = open_store("s3://rollouts/configured")
    handle = store.put(make_masks())
    assert handle["store"] == "s3://rollouts/configured" and "hidden" not in json.dumps(handle)
    assert_same(load(handle), make_masks())


@given(st.integers(1, 10**6), st.sampled_from(["", "B", "KB", "MiB", "GB", "GiB", "TiB"]))
def test_sizes_are_read_with_their_units(count: int, unit: str):
    factors = {"": 1, "B": 1, "KB": 10**3, "MiB": 2**20, "GB": 10**9, "GiB": 2**30, "TiB": 2**40}
    assert num_bytes(f"{count}{unit}") == count * factors[unit]


@pytest.mark.parametrize("text", ["", "0", "-1", "GiB", "1 gib", "1e9", "0.4B", "1EB", "1iB", "nan"])
def test_what_is_no_size_is_refused(text: str):
    with pytest.raises(InputError, match="must be a size above 0, such as 64GiB"):
        num_bytes(text)
