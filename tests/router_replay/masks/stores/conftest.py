"""The real thing behind every store: a folder, an S3 server, a Ray, an HTTP server; and processes that use them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import fsspec
import pytest

from router_replay.masks import Store
from tests.router_replay.masks.stores.children import open_writer
from tests.router_replay.masks.stores.masks_server import serving

# One attempt, where a client of S3 would make five with growing pauses; the server knows no other keys.
S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "an-id",
    "AWS_SECRET_ACCESS_KEY": "a-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "1",
}


@dataclass(frozen=True)
class Place:
    """Where a store is, and how one gets at what is in it by another way.

    Attributes:
        urls: what `open_writer` takes; the first one stands in handles.
        ray: address of the Ray that readers must be connected to.
        files: URL of the folder of files, where it has one.
    """

    kind: str
    urls: tuple[str, ...]
    ray: str | None = None
    files: str | None = None

    def writer(self, options: str = "") -> Store:
        """A store to put into, with options of its URL."""
        return open_writer([*self.urls[:-1], with_options(self.urls[-1], options)])

    @property
    def separate(self) -> tuple[str, ...]:
        """URLs by which a process writes that does not share this one's connections."""
        return (with_options(self.urls[0], f"address={self.ray}"),) if self.ray else self.urls

    def listed(self) -> list[str]:
        """Names of all files in the folder."""
        fs, root = self._folder()
        fs.invalidate_cache()
        return sorted(name.rpartition("/")[2] for name in fs.find(root))

    def overwrite(self, handle: dict[str, Any], change: Callable[[bytes], bytes]) -> None:
        """Change the bytes behind a handle."""
        fs, root = self._folder()
        path = f"{root}/{handle['id']}.safetensors"
        data = change(fs.cat_file(path))
        # As a new file: changing one in place would kill whoever has mapped it.
        fs.rm_file(path)
        fs.pipe_file(path, data)

    def _folder(self) -> tuple[Any, str]:
        assert self.files is not None
        place, _, query = self.files.partition("?")
        return fsspec.core.url_to_fs(place, **dict(each.split("=") for each in query.split("&") if each))


def environment() -> dict[str, str]:
    """What other processes need to reach these servers: keys of S3, and how this process came into its Ray."""
    return S3_ENVIRONMENT | {name: value for name, value in os.environ.items() if name.startswith("RAY_")}


def with_options(url: str, options: str) -> str:
    """A URL with more options."""
    return f"{url}{'&' if '?' in url else '?'}{options}" if options else url


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    """Address of an S3 server that has a bucket named `rollouts`."""
    from moto.server import ThreadedMotoServer

    # A line for each request.
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    before = {name: os.environ.get(name) for name in S3_ENVIRONMENT}
    os.environ.update(S3_ENVIRONMENT)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    fsspec.filesystem("s3", endpoint_url=url).mkdir("rollouts")
    yield url
    server.stop()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """Address of a small Ray on this machine, to which this process is connected."""
    import ray

    ray.init(num_cpus=1, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="session")
def processes() -> BaseContext:
    """Processes that are forked from one that has imported what they need, and nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.router_replay.masks.stores.children"])
    return context


@pytest.fixture(scope="session")
def workers(processes: BaseContext) -> Iterator[ProcessPoolExecutor]:
    """Two processes."""
    with ProcessPoolExecutor(2, mp_context=processes) as pool:
        yield pool


@pytest.fixture(params=["inline", "file", "memory", "s3", "ray", "http"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A store of every kind, which is empty, except where it is Ray's."""
    name, kind = uuid.uuid4().hex, request.param
    with ExitStack() as stack:
        if kind == "inline":
            yield Place(kind, ("inline:",))
        elif kind == "file":
            yield Place(kind, (url := f"file://{tmp_path}/store",), files=url)
        elif kind == "memory":
            yield Place(kind, (url := f"memory://{name}",), files=url)
        elif kind == "s3":
            url = f"s3://rollouts/{name}?endpoint_url={request.getfixturevalue('s3_url')}"
            yield Place(kind, (url,), files=url)
        elif kind.startswith("ray"):
            address = request.getfixturevalue("ray_address")
            # An actor's process takes its time to start: those who can share one.
            yield Place("ray", (f"ray:{name}" if kind == "ray alone" else "ray:shared",), ray=address)
        else:
            server = stack.enter_context(serving(directory := f"file://{tmp_path}/store"))
            yield Place(kind, (server.url, directory), files=directory)
