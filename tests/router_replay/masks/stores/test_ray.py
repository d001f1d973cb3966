"""The Ray store: who must be connected, who owns, and what frees."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest

from router_replay.errors import DataError, InputError, StoreError
from router_replay.masks import load, open_store
from router_replay.masks.stores.ray import NAMESPACE, RayStore
from tests.router_replay.masks.test_container import assert_same, make_masks


def test_a_process_without_ray_is_told_what_to_call():
    program = (
        "from router_replay.masks import load, open_store\n"
        "from router_replay.errors import CallOrderError\n"
        "from tests.router_replay.masks.test_container import make_masks\n"
        "store = open_store('ray:')\n"
        "handle = dict(store='ray:', id='0' * 48, num_bytes=1, start=0, num_tokens=1, crc32='', node='0')\n"
        "calls = store.prepare, lambda: store.put(make_masks()), lambda: load(handle), lambda: store.delete(handle)\n"
        "for call in calls:\n"
        "    try:\n        call()\n"
        "    except CallOrderError as error:\n        print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert len(lines) == 4 and len(set(lines)) == 1
    assert lines[0].endswith("call ray.init() first, or name its address where masks are written: ray:?address=auto")


def test_objects_are_the_detached_actors_and_freed_when_they_are_deleted(ray_address: str):
    import ray
    from ray.experimental import get_local_object_locations

    store = RayStore("ray:shared")
    store.prepare()
    before = num_objects()
    masks = make_masks(num_tokens=100_000)
    handles = [store.put(masks) for _ in range(3)]
    # What brought them to the actor is freed, too.
    wait_for(before + 3)
    name = f"masks.shared.{handles[0]['node']}"
    assert {"name": name, "namespace": NAMESPACE} in ray.util.list_named_actors(all_namespaces=True)
    (reference,) = ray.get(ray.get_actor(name, namespace=NAMESPACE).find.remote(handles[0]["id"]))
    found = get_local_object_locations([reference])[reference]
    assert found["object_size"] >= handles[0]["num_bytes"] and found["node_ids"] == [handles[0]["node"]]
    del reference, found
    assert_same(load(handles[0]), masks)
    store.delete(handles[0])
    wait_for(before + 2)
    for handle in handles:
        store.delete(handle)
    wait_for(before)


def num_objects() -> int:
    """How many objects lie in the object stores of the cluster."""
    from ray._private.internal_api import memory_summary

    (found,) = re.findall(r"Plasma memory usage \d+ MiB, (\d+) objects", memory_summary(stats_only=True))
    return int(found)


def wait_for(expected: int) -> None:
    deadline = time.monotonic() + 30
    while (found := num_objects()) != expected:
        assert time.monotonic() < deadline, f"{found} objects, not {expected}"
        time.sleep(0.1)


def test_a_store_whose_actor_was_killed_is_an_error_and_starts_anew(ray_address: str):
    import ray

    store = RayStore("ray:killed")
    store.prepare()
    handle = store.put(make_masks())
    actor = ray.get_actor(f"masks.killed.{handle['node']}", namespace=NAMESPACE)
    ray.kill(actor)
    deadline = time.monotonic() + 30
    for call in (lambda: store.put(make_masks()), lambda: load(handle), lambda: store.stat(handle)):
        with pytest.raises(StoreError, match=r"the store 'ray:killed' (could not keep masks|could not be read)"):
            call()
    while True:
        try:
            again = store.put(make_masks(seed=1))
            break
        except StoreError:
            assert time.monotonic() < deadline
    assert_same(load(again), make_masks(seed=1))
    with pytest.raises(DataError, match="nothing is behind"):
        load(handle)


def test_a_bound_above_the_nodes_object_store_is_refused_at_the_start(ray_address: str):
    with pytest.raises(StoreError, match=r"hold up to 1,[0,]+ bytes \(max_bytes\), but this node's object store has"):
        open_store("ray:shared?max_bytes=1TB").prepare()


@pytest.mark.parametrize("node", [None, "", "../x", 5, "A"])
def test_a_handle_without_a_node_is_refused(ray_address: str, node: object):
    handle = {"store": "ray:", "id": "0" * 48, "num_bytes": 1, "start": 0, "num_tokens": 1, "crc32": "", "node": node}
    for method in ("get", "stat", "delete"):
        with pytest.raises(DataError, match="names no node of Ray"):
            getattr(RayStore("ray:"), method)(handle)


def test_a_node_of_another_cluster_has_no_store_here(ray_address: str):
    handle = {"store": "ray:", "id": "0" * 48, "num_bytes": 1, "start": 0, "num_tokens": 1, "crc32": "", "node": "0abc"}
    with pytest.raises(StoreError, match="could not be read: ValueError"):
        load(handle)


@pytest.mark.parametrize("url", ["ray:a/b", "ray:a b", "ray://host:10001", "ray:é", "ray:?name=x"])
def test_a_name_that_is_none_is_refused(url: str):
    with pytest.raises(InputError):
        open_store(url)
