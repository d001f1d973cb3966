"""A server that serves its masks itself: answers carry handles, and trainers get the rows by HTTP."""

from __future__ import annotations

import contextlib
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from cpu_engines.sglang.server import Server
from router_replay.errors import DataError
from router_replay.masks import load, open_store
from router_replay.masks.stores.http import HttpStore
from router_replay.masks.stores.served import ROUTE
from sglang_router_capture import http
from sglang_router_capture.server_folder import ServerFolder
from tests.forked_servers.client import serve
from tests.sglang_router_capture.oracle import assert_rows_are_of
from tests.sglang_router_capture.requests import generate, masks_of, prompt
from tests.sglang_router_capture.same_requests import FLAGS, masks_of_main_job, masks_of_requests

pytestmark = pytest.mark.timeout(900)

KEY = "a-key-of-the-tests"


@pytest.fixture(scope="module")
def server(small_model: Path) -> Iterator[Server]:
    with serve(small_model, "--enable-router-capture", "--router-capture-store=http:", *FLAGS) as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stored") / "r3"


@pytest.fixture(scope="module")
def folder_server(small_model: Path, folder: Path) -> Iterator[Server]:
    """A server behind an API key, whose store is a folder; this process's requests have the key meanwhile."""
    flags = (f"--router-capture-store=file://{folder}", f"--api-key={KEY}", *FLAGS)
    with serve(small_model, "--enable-router-capture", *flags) as server:
        opener = urllib.request.build_opener()
        opener.addheaders = [("Authorization", f"Bearer {KEY}")]
        urllib.request.install_opener(opener)
        try:
            yield server
            kept = handle_of(generate(server, prompt(511, 20), 4))
        finally:
            urllib.request.install_opener(urllib.request.build_opener())
    # The folder is the operator's, and outlives the server, as do the masks in it.
    with open_store(kept["store"]) as store:
        assert store.get(kept).valid.all()
        store.delete(kept)
        assert not store.stat(kept).there


def handle_of(answer: dict[str, Any]) -> dict[str, Any]:
    (handle,) = answer["meta_info"]["routing_masks"]
    return handle


def folder_of(server: Server) -> ServerFolder:
    """What the server's processes share."""
    (lock,) = [
        path
        for path in ServerFolder("x").path.parent.glob("router-capture-*/lock")
        if server.pid in {process.pid for process in psutil.process_iter() if _holds(process, path)}
    ]
    return ServerFolder(lock.parent.name.removeprefix("router-capture-"))


def _holds(process: psutil.Process, path: Path) -> bool:
    with contextlib.suppress(psutil.Error):
        return any(Path(opened.path) == path for opened in process.open_files())
    return False


def status_of(server: Server) -> dict[str, Any]:
    with urllib.request.urlopen(server.url + http.PATH, timeout=60) as answer:
        (found,) = json.load(answer)["schedulers"]
    return found["store"]


def test_a_trainer_gets_the_rows_by_http_and_lets_them_go(server: Server, small_model: Path) -> None:
    reference = Qwen3MoeForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    ids = prompt(1, 150)
    answer = generate(server, ids, 12)
    handle = handle_of(answer)
    assert handle["store"] == server.url
    # A handle is some words, whatever the length of the sequence.
    assert len(json.dumps(handle)) < 300
    masks = masks_of(answer, ids)
    assert_rows_are_of(reference, masks, ids + answer["output_ids"])
    with HttpStore(server.url) as store:
        assert store.stat(handle).num_tokens == len(masks) == 161
        store.delete(handle)
        assert not store.stat(handle).there
    with pytest.raises(DataError, match="any more"):
        load(handle)


def test_parts_of_a_container_and_ids_that_are_none(server: Server) -> None:
    handle = handle_of(generate(server, prompt(2, 20), 4))
    url = server.url + ROUTE + handle["id"]
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": "bytes=8-15"}), timeout=60) as part:
        assert part.status == 206
        assert part.headers["Content-Range"] == f"bytes 8-15/{handle['num_bytes']}"
        found = part.read()
    with urllib.request.urlopen(url, timeout=60) as whole:
        assert whole.read()[8:16] == found
    for other in ("0" * 48, "..%2F..%2Fetc%2Fpasswd", "x"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(server.url + ROUTE + other, timeout=60)
        assert caught.value.code == 404


def test_every_answer_has_its_own_masks(server: Server) -> None:
    """Several choices, a batch, streams and many at once."""
    ids = prompt(3, 30)
    before = status_of(server)["stored"]
    choices = generate(server, ids, 6, sampling_params={"n": 2, "temperature": 1.0})
    batch = server.post(
        "/generate",
        {
            "input_ids": [prompt(4, 12), prompt(5, 25)],
            "sampling_params": {"max_new_tokens": 5, "ignore_eos": True},
            "return_routed_experts": True,
        },
    )
    for answer, asked in ((choices[0], ids), (choices[1], ids), (batch[0], prompt(4, 12)), (batch[1], prompt(5, 25))):
        assert masks_of(answer, asked).valid.all()
    # SGLang sends the prompt of several choices once more, whose answer nobody reads.
    assert status_of(server)["stored"] == before + 4
    prompts = [prompt(10 + number, 10 + number) for number in range(12)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda ids: _streamed(server, ids), prompts))
    for asked, answer in zip(prompts, answers, strict=True):
        assert len(masks_of(answer, asked)) == len(asked) + 7
    assert status_of(server) == {
        "url": server.url, "stored": before + 16, "failed": 0, "dropped": 0, "waiting_bytes": 0, "evicted": 0,
    }  # fmt: skip
    assert list(folder_of(server).handles.iterdir()) == []


def _streamed(server: Server, ids: list[int]) -> dict[str, Any]:
    """The last chunk of a stream; only that one has masks."""
    body = {
        "input_ids": ids, "stream": True, "return_routed_experts": True,
        "sampling_params": {"max_new_tokens": 8, "ignore_eos": True, "temperature": 0},
    }  # fmt: skip
    request = urllib.request.Request(
        server.url + "/generate", json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as lines:
        chunks = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    assert [chunk["meta_info"].get("routing_masks") for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    return chunks[-1]


def test_masks_by_http_are_those_in_answers(server: Server, capture_server: Server, small_model: Path) -> None:
    before = set(folder_of(server).masks.iterdir())
    assert masks_of_requests(server) == masks_of_requests(capture_server)
    by_http = masks_of_main_job(server, server.url, small_model)
    assert by_http == masks_of_main_job(capture_server, "inline:", small_model)
    # Trainers let go of what they have read.
    assert set(folder_of(server).masks.iterdir()) == before


def test_masks_in_files_are_those_in_answers(
    folder_server: Server, folder: Path, capture_server: Server, small_model: Path
) -> None:
    assert masks_of_requests(folder_server) == masks_of_requests(capture_server)
    in_files = masks_of_main_job(folder_server, f"file://{folder}", small_model)
    assert in_files == masks_of_main_job(capture_server, "inline:", small_model)
    assert list(folder.iterdir()) == []


def test_a_store_that_stops_taking_masks_is_told_of_and_nothing_else_stops(folder_server: Server, folder: Path) -> None:
    """The folder is taken away, and comes back."""
    ids = prompt(6, 12)
    handle = handle_of(generate(folder_server, ids, 4))
    assert handle["store"] == f"file://{folder}"
    assert load(handle).valid.all()
    away = folder.rename(folder.with_name("away"))
    folder.write_text("no folder")
    second = generate(folder_server, ids, 4)
    assert len(second["output_ids"]) == 4
    assert handle_of(second)["error"].startswith("the store did not take them: StoreError: ")
    with pytest.raises(DataError, match="the server has no masks for this answer: the store did not take them"):
        load(handle_of(second))
    folder.unlink()
    away.rename(folder)
    assert load(handle_of(generate(folder_server, ids, 4))).valid.all()
    assert "masks of a request were not stored, and its answer says so" in folder_server.log()
    assert load(handle).valid.all()


def test_an_api_key_guards_masks_as_all_else(tmp_path: Path) -> None:
    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from sglang.srt.utils.auth import add_api_key_middleware

    from router_replay.masks.stores.directory import DirectoryStore
    from router_replay.masks.stores.served import ServedDirectory
    from tests.sglang_router_capture.test_writer import masks

    served = ServedDirectory("http://testserver", DirectoryStore(f"file://{tmp_path}"))
    served.prepare()
    handle = served.put(masks())
    app = FastAPI()
    http.add_masks_route(app, served)
    add_api_key_middleware(app, api_key=KEY, admin_api_key=None)
    client = TestClient(app)
    assert client.get(ROUTE + handle["id"]).status_code == 401
    assert client.delete(ROUTE + handle["id"]).status_code == 401
    got = client.get(ROUTE + handle["id"], headers={"Authorization": f"Bearer {KEY}"})
    assert len(got.content) == handle["num_bytes"]
    assert client.head(ROUTE + handle["id"]).status_code == 401
