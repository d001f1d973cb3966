"""The Ray store: containers as objects in Ray's object stores, on the nodes that wrote them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from router_replay.errors import CallOrderError, DataError, InputError, RouterReplayError, StoreError
from router_replay.masks import container
from router_replay.masks.masks import RoutingMasks
from router_replay.masks.stores import handles
from router_replay.masks.stores.bound import require_fits, tell_dropped
from router_replay.masks.stores.handles import Entry, entry_of, require_store
from router_replay.masks.stores.store import Handle, Stat, Store
from router_replay.masks.stores.urls import num_bytes, split_url

NAMESPACE = "router_replay"
"""Ray namespace of the actors that own the objects."""

# An actor answers in a millisecond; the first call waits for its process to start.
_TIMEOUT_SECONDS = 60.0


class RayStore(Store):
    """Keeps containers as objects of an initialised Ray. They outlive their writer.

    `ray:` names the store of the cluster, `ray:NAME` another one in it. On each node that writes, a detached actor
    `masks.NAME.NODE` of the namespace `router_replay` owns its objects: they lie on the node that wrote them, and Ray
    moves one once to the node that reads it. `delete` frees it. An actor ends with its node or the cluster, or by
    `ray.kill`, and what it owns with it.

    Ray is the program's to start: without `ray.init` in this process, every method raises. `ray:?address=auto`, for
    processes whose program knows nothing of Ray, such as SGLang's schedulers, connects by itself; the address does not
    travel in handles.

    **Bounded** on each node, the oldest that nobody deleted first out: `?max_bytes=8GiB`, by default half of the node's
    object store memory. Of several writers' bounds the last one counts.

    Attributes:
        url: as it stands in handles, without options.
        num_dropped: sequences that were removed to make room for those of this writer.

    Raises:
        InputError: a URL with another option, or a name that is not of letters, digits, `_`, `-` and `.`.
    """

    def __init__(self, url: str) -> None:
        self.url, options = split_url(url, {"max_bytes", "address"})
        name = self.url.partition(":")[2]
        if not re.fullmatch(r"[\w.-]*", name, re.ASCII):
            raise InputError(f"store URL {self.url!r}: ray:NAME has a name of letters, digits, '_', '-' and '.'")
        self._address = options.get("address")
        self._max_bytes = num_bytes(options["max_bytes"]) if "max_bytes" in options else None
        self._own: Any = None
        self.num_dropped = 0

    def prepare(self) -> None:
        """Start the actor, unless there is one, and see that Ray has room for `max_bytes`.

        Raises:
            CallOrderError: no Ray is initialised here.
            StoreError: Ray is not to be reached or does not start the actor, or the node's object store is smaller.
        """
        with self._reaching("cannot be prepared"):
            memory = self._memory()
            # Answers as soon as its process runs.
            self._call(self._own_keeper().find, "")
        if self._max_bytes and self._max_bytes > memory:
            raise StoreError(
                f"the store {self.url!r} is to hold up to {self._max_bytes:,} bytes (max_bytes), but this node's"
                f" object store has {memory:,}: start Ray with more object_store_memory, or give a smaller max_bytes"
            )

    def put(self, masks: RoutingMasks) -> dict[str, Any]:
        """Put masks into this node's object store, and give their handle.

        Raises:
            InputError: no masks.
            CallOrderError: no Ray is initialised here.
            StoreError: larger than the whole store, or Ray cannot keep them.
        """
        data = container.to_bytes(masks)
        entry = Entry.new(data, masks)
        with self._reaching("could not keep masks"):
            bound = self._bound()
            require_fits(self.url, len(data), bound)
            # Of an array Ray writes the bytes as they are, and whoever reads it sees them without a copy.
            dropped = self._call(self._own_keeper().keep, entry.id, np.frombuffer(data, np.uint8), bound)
        if dropped:
            self.num_dropped += dropped
            tell_dropped(self.url, bound, dropped, self.num_dropped)
        return {**entry.handle(self.url), "node": self._own_node()}

    def get(self, handle: Handle) -> RoutingMasks:
        """The masks of a handle, copied out of Ray's object store.

        Raises:
            DataError: not a handle of this store, or nothing whole is behind it any more.
            CallOrderError: no Ray is initialised here.
            StoreError: the actor is gone, or Ray lost the object with its node.
        """
        entry, node = self._entry(handle)
        with self._reaching("could not be read"):
            found = self._call(self._keeper(node).find, entry.id)
            if found is None:
                raise handles.gone(entry, self.url)
            data = self._ray().get(found[0], timeout=_TIMEOUT_SECONDS)
        return container.from_bytes(memoryview(data), entry.crc32)

    def delete(self, handle: Handle) -> None:
        """Free the object of a handle, if it is there."""
        entry, node = self._entry(handle)
        with self._reaching("could not free an object"):
            self._call(self._keeper(node).drop, entry.id)

    def stat(self, handle: Handle) -> Stat:
        """What the actor has for a handle."""
        entry, node = self._entry(handle)
        with self._reaching("could not be read"):
            size = self._call(self._keeper(node).size, entry.id)
        return Stat(there=False) if size is None else entry.stat(size, self.url)

    def close(self) -> None:
        """Nothing is open: Ray stays, and so do the actors."""

    def _entry(self, handle: Handle) -> tuple[Entry, str]:
        require_store(handle, self.url)
        node = handle.get("node")
        if not isinstance(node, str) or not re.fullmatch("[0-9a-f]+", node):
            raise DataError(f"a handle of {self.url!r} that names no node of Ray: {str(handle)[:200]!r}")
        return entry_of({key: value for key, value in handle.items() if key != "node"}, self.url), node

    def _ray(self) -> Any:
        try:
            import ray
        except ImportError as error:
            raise InputError(f"the store {self.url!r} needs Ray: pip install 'rollout-routing-replay[ray]'") from error
        if not ray.is_initialized():
            if self._address is None:
                raise CallOrderError(
                    f"the store {self.url!r} is in a Ray that this process is not connected to: call ray.init() first,"
                    " or name its address where masks are written: ray:?address=auto"
                )
            ray.init(self._address, log_to_driver=False, configure_logging=False)
        return ray

    def _own_node(self) -> str:
        return self._ray().get_runtime_context().get_node_id()

    def _actor_name(self, node: str) -> str:
        return ".".join(filter(None, ("masks", self.url.partition(":")[2], node)))

    def _keeper(self, node: str) -> Any:
        return self._ray().get_actor(self._actor_name(node), namespace=NAMESPACE)

    def _own_keeper(self) -> Any:
        if self._own is None:
            ray, node = self._ray(), self._own_node()
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            self._own = (
                ray.remote(_keeper_class())
                .options(
                    name=self._actor_name(node),
                    namespace=NAMESPACE,
                    lifetime="detached",
                    get_if_exists=True,
                    num_cpus=0,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
                )
                .remote()
            )
        return self._own

    def _call(self, method: Any, *arguments: Any) -> Any:
        return self._ray().get(method.remote(*arguments), timeout=_TIMEOUT_SECONDS)

    def _memory(self) -> int:
        own = self._own_node()
        (resources,) = (node["Resources"] for node in self._ray().nodes() if node["NodeID"] == own)
        return int(resources.get("object_store_memory", 0))

    def _bound(self) -> int:
        if self._max_bytes is None:
            self._max_bytes = self._memory() // 2
        return self._max_bytes

    @contextmanager
    def _reaching(self, what: str) -> Iterator[None]:
        try:
            yield
        except RouterReplayError:
            raise
        except Exception as error:
            # The next call looks for the actor again, which may have been started anew.
            self._own = None
            raise StoreError(f"the store {self.url!r} {what}: {type(error).__name__}: {error}") from error


def _keeper_class() -> type:
    # A class inside a function travels by value: the actor's process needs neither this package nor torch.
    class Keeper:
        def __init__(self) -> None:
            self._kept: dict[str, tuple[list[Any], int]] = {}
            self._total = 0

        def keep(self, entry_id: str, data: Any, bound: int) -> int:
            import ray

            dropped = 0
            while self._kept and self._total + len(data) > bound:
                self.drop(next(iter(self._kept)))
                dropped += 1
            # An object belongs to who puts it. In a list the reference itself travels, and not what it names.
            self._kept[entry_id] = [ray.put(data)], len(data)
            self._total += len(data)
            return dropped

        def find(self, entry_id: str) -> list[Any] | None:
            return self._kept.get(entry_id, (None, 0))[0]

        def size(self, entry_id: str) -> int | None:
            return self._kept.get(entry_id, (None, None))[1]

        def drop(self, entry_id: str) -> None:
            _, size = self._kept.pop(entry_id, (None, 0))
            self._total -= size

    return Keeper
