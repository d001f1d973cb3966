"""Servers whose store is S3 or Ray: trainers find the same masks behind their handles as others do in the answers."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cpu_engines.sglang.server import Server
from router_replay.errors import DataError
from router_replay.masks import load, open_store
from tests.forked_servers.client import serve
from tests.router_replay.masks.stores import conftest as stores
from tests.sglang_router_capture.requests import generate, masks_of, prompt
from tests.sglang_router_capture.same_requests import FLAGS, masks_of_main_job, masks_of_requests

pytestmark = pytest.mark.timeout(900)

# The real things, as the stores' own tests have them.
s3_url, ray_address = stores.s3_url, stores.ray_address


@dataclass(frozen=True)
class Stored:
    """A server and its store.

    Attributes:
        asked: the store's URL as the server was given it.
        url: as it stands in handles.
    """

    server: Server
    asked: str
    url: str


@pytest.fixture(scope="module", params=["s3", "ray"])
def stored(small_model: Path, request: pytest.FixtureRequest) -> Iterator[Stored]:
    if request.param == "s3":
        asked = url = f"s3://rollouts/{uuid.uuid4().hex}?endpoint_url={request.getfixturevalue('s3_url')}"
        environment = {}
    else:
        # Another Ray may run on this machine; of a job's own, `auto` needs no address.
        environment = {"RAY_ADDRESS": request.getfixturevalue("ray_address")}
        asked, url = "ray:?address=auto", "ray:"
    flags = ("--enable-router-capture", f"--router-capture-store={asked}", *FLAGS)
    with serve(small_model, *flags, environment=environment) as server:
        yield Stored(server, asked, url)


def test_masks_are_those_of_a_server_that_puts_them_into_its_answers(stored: Stored, capture_server: Server) -> None:
    assert masks_of_requests(stored.server) == masks_of_requests(capture_server)


def test_the_main_job_has_the_same_masks(stored: Stored, capture_server: Server, small_model: Path) -> None:
    ours = masks_of_main_job(stored.server, stored.asked, small_model)
    assert ours == masks_of_main_job(capture_server, "inline:", small_model)


def test_handles_are_short_and_what_is_deleted_is_gone(stored: Stored) -> None:
    ids = prompt(510, 150)
    answer = generate(stored.server, ids, 4)
    (handle,) = answer["meta_info"]["routing_masks"]
    assert handle["store"] == stored.url
    assert len(json.dumps(handle)) < 400
    masks_of(answer, ids)
    with open_store(stored.url) as store:
        store.delete(handle)
        assert not store.stat(handle).there
    with pytest.raises(DataError, match="any more"):
        load(handle)
