"""What other processes do with stores: a writer that ends, readers, one that dies. It imports no pytest."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Mapping, Sequence
from typing import Any

from router_replay.errors import RouterReplayError
from router_replay.masks import RoutingMasks, Store, load, open_store, to_bytes
from router_replay.masks.container import stated_crc32
from router_replay.masks.stores.directory import DirectoryStore
from router_replay.masks.stores.served import ServedDirectory
from tests.router_replay.masks.test_container import make_masks


def open_writer(urls: Sequence[str]) -> Store:
    """A store to put into: by its own URL, or a server's by the server's and its directory's."""
    return open_store(urls[0]) if len(urls) == 1 else ServedDirectory(urls[0], DirectoryStore(urls[1]))


def checksum(masks: RoutingMasks) -> str:
    """A short text that differs where anything in the masks does."""
    return stated_crc32(to_bytes(masks))


def put_many(urls: Sequence[str], environment: Mapping[str, str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Handles of masks that this process put."""
    os.environ.update(environment)
    with open_writer(urls) as store:
        return [store.put(make_masks(seed=seed, num_tokens=50)) for seed in seeds]


def get_many(handles: Sequence[Mapping[str, Any]], environment: Mapping[str, str], ray: str | None) -> list[str]:
    """Checksums of what this process finds behind handles."""
    os.environ.update(environment)
    if ray:
        _connect(ray)
    return [checksum(load(handle)) for handle in handles]


def die_reading(handle: Mapping[str, Any], environment: Mapping[str, str], ray: str | None) -> None:
    """Hold masks, and be killed."""
    os.environ.update(environment)
    if ray:
        _connect(ray)
    masks = load(handle)
    assert len(masks)
    os.kill(os.getpid(), signal.SIGKILL)


def put_beyond_a_limit(url: str, num_bytes: int) -> tuple[str, int]:
    """The error of a put that the system stops in the middle of the file, and the rows of one put after that."""
    with open_store(url) as store:
        store.prepare()
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
        try:
            store.put(make_masks(num_tokens=50_000))
        except RouterReplayError as error:
            return f"{type(error).__name__}: {error}", len(load(store.put(make_masks())))
        return "no error", 0


def _connect(address: str) -> None:
    import ray

    if not ray.is_initialized():
        ray.init(address, log_to_driver=False, configure_logging=False)
