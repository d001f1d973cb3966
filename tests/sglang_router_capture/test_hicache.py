"""HiCache in SGLang's real server: rows go to the host, to storage and back with their KV, and outlive the server."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cpu_engines.sglang.server import HICACHE_FLAGS, Server
from router_replay.masks import NO_ROW, RoutingMasks
from tests.forked_servers.client import serve
from tests.sglang_router_capture.requests import generate, masks_of, prompt

pytestmark = pytest.mark.timeout(900)

# Two of the prompts fit on the device, all of them in host memory.
FLAGS = ("--skip-tokenizer-init", "--max-total-tokens=640", "--chunked-prefill-size=128", *HICACHE_FLAGS)
STORAGE_FLAGS = (
    "--page-size=16",
    "--hicache-write-policy=write_back",
    "--hicache-mem-layout=page_first_direct",
    "--hicache-storage-backend=file",
    "--hicache-storage-prefetch-policy=wait_complete",
    '--hicache-storage-backend-extra-config={"prefetch_threshold": 16}',
)
# No two share a prefix, with each other or with the server's own first request.
PROMPTS = [[40 + seed, *prompt(seed, 249)] for seed in range(6)]
OF_NO_CAPTURE = [[50 + seed, *prompt(20 + seed, 249)] for seed in range(6)]
FIRST, SECOND = "weights of the first server", "weights of the second server"


class Recorded:
    """Rows of one sequence as its forward passes gave them: (number of the first token, rows)."""

    def __init__(self) -> None:
        self.passes: list[tuple[int, Tensor]] = []

    def check_cached(self, answer: dict, masks: RoutingMasks) -> None:
        """Every row is valid, and those of cached tokens are what a pass recorded for them, byte for byte."""
        assert masks.valid.all()
        cached = answer["meta_info"]["cached_tokens"]
        recorded = torch.zeros(cached, dtype=torch.bool)
        for first, rows in self.passes:
            span = slice(first, min(first + len(rows), cached))
            recorded[span] |= (masks.rows[span] == rows[: max(span.stop - first, 0)]).all(1)
        assert recorded.all()

    def check(self, answer: dict, masks: RoutingMasks) -> None:
        """The same, and keep what this request computed."""
        self.check_cached(answer, masks)
        cached = answer["meta_info"]["cached_tokens"]
        self.passes.append((cached, masks.rows[cached:]))


def _from(tier: str, answer: dict) -> int:
    return (answer["meta_info"]["cached_tokens_details"] or {}).get(tier, 0)


def _travel(server: Server, *, twice: bool = False) -> list[tuple[list[int], Recorded]]:
    """Conversations of three turns that push each other out, and the rows of each, which come to the host and back
    twice: those of decode steps, too.
    """
    conversations = [(list(ids), Recorded()) for ids in PROMPTS]
    for turn in range(3):
        for number, (ids, recorded) in enumerate(conversations):
            # A policy that selects copies what is asked for a second time.
            for _ in range(2 if twice and turn == 0 else 1):
                answer = generate(server, ids, 4)
                recorded.check(answer, masks_of(answer, ids))
            assert (_from("host", answer) > 0) == (turn > 0)
            ids += answer["output_ids"] + prompt(100 * turn + number, 9)
            # The copy to the host runs beside the requests.
            time.sleep(0.2)
    return conversations


@contextlib.contextmanager
def _capture_server(small_model: Path, *flags: str, folder: Path | None = None) -> Iterator[Server]:
    environment = {} if folder is None else {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(folder)}
    with serve(small_model, "--enable-router-capture", *FLAGS, *flags, environment=environment) as server:
        assert "router capture: rows follow the KV through HiCache" in server.log()
        yield server


@pytest.mark.parametrize(
    ("page_size", "policy", "layout"),
    [(1, "write_through", "layer_first"), (64, "write_through_selective", "page_first_direct")],
)
def test_rows_follow_the_kv_to_the_host_and_back(small_model: Path, page_size: int, policy: str, layout: str) -> None:
    flags = (f"--page-size={page_size}", f"--hicache-write-policy={policy}", f"--hicache-mem-layout={layout}")
    with _capture_server(small_model, *flags) as server:
        conversations = _travel(server, twice=policy == "write_through_selective")
        # All at once, each behind a prefix that was recorded before.
        prompts = [ids[:200] + prompt(80 + number, 30) for number, (ids, _) in enumerate(conversations)]
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(pool.map(lambda ids: generate(server, ids, 20), prompts))
    for (_, recorded), ids, answer in zip(conversations, prompts, answers, strict=True):
        recorded.check_cached(answer, masks_of(answer, ids))
    assert sum(_from("host", answer) for answer in answers) > 0


def _num_pages(folder: Path) -> int:
    return sum(".router_rows" not in file.name for file in folder.glob("*.bin"))


def _store_all(server: Server, folder: Path, num_pages: int, first_token: int) -> None:
    """Push all KV out of the device and into storage; wait until more than `num_pages` pages are there.

    Pages are stored in the order in which they leave the device: the prompts that push, which nobody sent before, come
    after what they push.
    """
    for number in range(4):
        generate(server, [first_token + number, *prompt(200 + number, 249)], 2)
    deadline = time.monotonic() + 60
    while (there := _num_pages(folder)) <= num_pages:
        assert time.monotonic() < deadline, f"{there} of {num_pages} pages are stored"
        time.sleep(1)


def _name_weights(server: Server, name: str) -> None:
    server.post("/update_weight_version", {"new_version": name, "abort_all_requests": False})


def test_rows_outlive_their_server_beside_the_pages(small_model: Path, tmp_path: Path) -> None:
    """A server with capture and one without fill a folder; a third one, with capture, reads both one's pages."""
    with _capture_server(small_model, *STORAGE_FLAGS, folder=tmp_path) as server:
        _name_weights(server, FIRST)
        conversations = _travel(server)
        # The last answer's last token and the tokens of a turn that did not come have no KV.
        num_pages = sum((len(ids) - 10) // 16 for ids, _ in conversations)
        _store_all(server, tmp_path, num_pages, 90)
    environment = {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(tmp_path)}
    num_pages = _num_pages(tmp_path) + sum(len(ids) // 16 for ids in OF_NO_CAPTURE)
    with serve(small_model, *FLAGS, *STORAGE_FLAGS, environment=environment) as server:
        for ids in OF_NO_CAPTURE:
            server.generate(ids, 2)
        _store_all(server, tmp_path, num_pages, 94)
    with _capture_server(small_model, *STORAGE_FLAGS, folder=tmp_path) as server:
        _name_weights(server, SECOND)
        for ids, recorded in conversations:
            answer = generate(server, ids, 4)
            masks, from_storage = masks_of(answer, ids), _from("storage", answer)
            assert from_storage >= 240, (answer["meta_info"]["cached_tokens_details"], server.log()[-3000:])
            recorded.check(answer, masks)
            assert masks.weight_versions == ((0, FIRST), (from_storage, SECOND))
        for ids in OF_NO_CAPTURE:
            answer = generate(server, ids, 4)
            masks, from_storage = masks_of(answer, ids), _from("storage", answer)
            assert from_storage >= 240
            assert not masks.valid[:from_storage].any()
            assert masks.valid[from_storage:].all()
            assert (masks.rows[:from_storage] == NO_ROW).all()
        for ids, recorded in conversations:
            answer = generate(server, ids, 4)
            # From wherever the KV comes by now: the device, the host or storage again.
            assert answer["meta_info"]["cached_tokens"] >= 240
            recorded.check(answer, masks_of(answer, ids))
        assert server.log().count("nobody has recorded the KV that was read") == 1
