"""The same requests, and the same main job, to servers that differ in their store; what they must have in common."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from cpu_engines.sglang.server import Server
from examples.multi_turn_replay import job, rollout
from examples.multi_turn_replay.__main__ import main
from router_replay.masks import RoutingMasks, open_store, to_bytes
from router_replay.masks.container import stated_crc32
from tests.sglang_router_capture.requests import flush, generate, masks_of, prompt

FLAGS = ("--skip-tokenizer-init", "--max-total-tokens=2048", "--chunked-prefill-size=64")
"""Chunks of the size that `capture_server` has: another one adds the same numbers in another order."""

_CONVERSATIONS = 4

Found = list[tuple[list[int], str]]
"""Token ids, and the checksum of all that the masks hold: rows, valid bits, versions, codec, geometry, digest."""


def checksum(masks: RoutingMasks) -> str:
    """A short text that differs where anything in the masks does."""
    return stated_crc32(to_bytes(masks))


@cache
def masks_of_requests(server: Server) -> Found:
    """What greedy requests one after the other get, from an empty cache: new prompts, and turns that find theirs in it.

    The masks are gone from their store afterwards.
    """
    _start_anew(server)
    found: Found = []
    for seed, length in ((500, 5), (501, 64), (502, 150)):
        ids = prompt(seed, length)
        ids += _masks_of(server, ids, 0, found)
        _masks_of(server, ids + prompt(seed + 50, 7), length, found)
    return found


def _start_anew(server: Server) -> None:
    """Nothing in the cache, and the weights' first name: other tests give them others, and masks hold the names."""
    flush(server)
    server.post("/update_weight_version", {"new_version": "default", "abort_all_requests": False})


def _masks_of(server: Server, ids: list[int], start: int, found: Found) -> list[int]:
    answer = generate(server, ids, 9, routed_experts_start_len=start)
    masks = masks_of(answer, ids)
    assert (masks.start, masks.end) == (start, len(ids) + 8)
    assert masks.valid.all()
    found.append((ids + answer["output_ids"], checksum(masks)))
    (handle,) = answer["meta_info"]["routing_masks"]
    with open_store(handle["store"]) as store:
        store.delete(handle)
    return answer["output_ids"]


@cache
def masks_of_main_job(server: Server, store: str, model: Path) -> Found:
    """What `python -m examples.multi_turn_replay --store STORE` trains on, its server being this one.

    The whole job runs, with Megatron's passes, which fail where a route under replay is not the recorded one. It
    samples greedily and plays one conversation at a time, so that every server samples the same.
    """
    asked: list[str] = []
    played: list[rollout.Conversation] = []
    train = job.train_side

    @contextlib.contextmanager
    def running(model: Path, *flags: str, **others: Any) -> Iterator[Server]:
        asked.extend(flags)
        yield server

    def keep_and_train(model: Path, conversations: list[rollout.Conversation], *others: Any) -> Any:
        played.extend(conversations)
        return train(model, conversations, *others)

    _start_anew(server)
    app = typer.Typer()
    app.command()(main)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as out:
        patch.setattr(job, "serve", running)
        patch.setattr(job, "train_side", keep_and_train)
        patch.setattr(job, "play", partial(rollout.play, sampling=rollout.GREEDY))
        arguments = ["--store", store, "--model", str(model), "--conversations", str(_CONVERSATIONS), "--seed", "5"]
        result = CliRunner().invoke(app, [*arguments, "--concurrency", "1", "--out", out])
        assert result.exit_code == 0, result.output
        assert (Path(out) / "report.html").exists()
    assert f"--router-capture-store={store}" in asked
    assert len(played) == _CONVERSATIONS and all(each.num_turns >= 2 for each in played)
    return [(each.token_ids, checksum(each.masks)) for each in played]
