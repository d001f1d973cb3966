"""Weights that change on the real server: every row is that of the weights that it is said to be of."""

from __future__ import annotations

import base64
import copy
import itertools
import shutil
import urllib.error
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3MoeForCausalLM

from cpu_engines.sglang.server import Server
from router_replay.masks import RoutingMasks
from tests.sglang_router_capture.oracle import assert_rows_are_of, imposed
from tests.sglang_router_capture.requests import flush, generate, masks_of, prompt
from tests.sglang_router_capture.underway import control, underway

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def old(small_model: Path) -> Qwen3MoeForCausalLM:
    """The weights that the server starts with."""
    return Qwen3MoeForCausalLM.from_pretrained(small_model, dtype=torch.float32)


@pytest.fixture(scope="module")
def new(old: Qwen3MoeForCausalLM) -> Qwen3MoeForCausalLM:
    """Weights that route every token to other experts: each router has its experts in another order."""
    changed = copy.deepcopy(old)
    for name, weight in changed.named_parameters():
        if name.endswith("mlp.gate.weight"):
            weight.data = weight.data.roll(5, 0)
    return changed


@pytest.fixture(scope="module")
def new_folder(small_model: Path, new: Qwen3MoeForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("new") / "checkpoint"
    shutil.copytree(small_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = tmp_path_factory.mktemp("weights")
    copy.deepcopy(new).to(torch.bfloat16).save_pretrained(weights)
    shutil.copy(weights / "model.safetensors", folder)
    return folder


@pytest.fixture
def server(capture_server: Server, small_model: Path) -> Iterator[Server]:
    """The server with the old weights, called 'old' for this test, and an empty cache."""
    flush(capture_server)
    control(capture_server, "/update_weight_version", new_version="old", abort_all_requests=False)
    yield capture_server
    _update(capture_server, small_model, weight_version="default")


def _update(server: Server, folder: Path, **fields: Any) -> None:
    control(server, "/update_weights_from_disk", model_path=str(folder), **fields)


def _is_unnamed(name: str, said: str = "old") -> bool:
    base, _, rest = name.partition("+")
    return base == said and bool(rest) and "incomplete" not in rest


def _routers(model: Qwen3MoeForCausalLM) -> list[tuple[str, Tensor]]:
    return [
        (name, weight.detach().to(torch.bfloat16))
        for name, weight in model.named_parameters()
        if name.endswith("mlp.gate.weight")
    ]


def test_update_from_disk_with_flush_and_name(
    server: Server, old: Qwen3MoeForCausalLM, new: Qwen3MoeForCausalLM, new_folder: Path
) -> None:
    ids = prompt(600, 90)
    before = generate(server, ids, 5)
    masks = masks_of(before, ids)
    assert masks.weight_versions == ((0, "old"),)
    assert_rows_are_of(old, masks, ids + before["output_ids"])
    _update(server, new_folder, weight_version="7", flush_cache=True)
    after = generate(server, ids, 5)
    assert after["meta_info"]["cached_tokens"] == 0
    masks = masks_of(after, ids)
    assert masks.weight_versions == ((0, "7"),)
    assert_rows_are_of(new, masks, ids + after["output_ids"])


def test_updates_that_nobody_names_are_told_apart_in_a_cached_prefix(
    server: Server, old: Qwen3MoeForCausalLM, new: Qwen3MoeForCausalLM, small_model: Path, new_folder: Path
) -> None:
    """Three turns under three weights, no flush: each turn's rows are still those of the pass that computed them."""
    ids, parts, cached = prompt(610, 60), [], [0]
    folders = (None, new_folder, small_model)
    for turn, folder in enumerate(folders):
        if folder is not None:
            _update(server, folder, flush_cache=False)
        answer = generate(server, ids, 6)
        parts.append(masks_of(answer, ids))
        assert answer["meta_info"]["cached_tokens"] == cached[-1]
        whole, cached = ids + answer["output_ids"], [*cached, parts[-1].end]
        ids = whole + prompt(620 + turn, 30)
    for before, after in itertools.pairwise(parts):
        assert torch.equal(before.rows, after.rows[: before.end])
        assert after.valid.all()
    runs = parts[-1].weight_versions
    assert [position for position, _ in runs] == cached[:3]
    names = [name for _, name in runs]
    assert names[0] == "old" and _is_unnamed(names[1]) and _is_unnamed(names[2]) and names[1] != names[2]
    assert_rows_are_of(old, parts[0], whole)
    _assert_rows_over_cached(new, old, parts[1], whole, cached[1], cached[1])


def test_a_failed_update_has_a_name_of_its_own(server: Server, old: Qwen3MoeForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(urllib.error.HTTPError, match="400"):
        _update(server, tmp_path, weight_version="7")
    ids = prompt(630, 40)
    answer = generate(server, ids, 5)
    masks = masks_of(answer, ids)
    ((_, name),) = masks.weight_versions
    assert name.startswith("old+") and "-incomplete-" in name
    assert_rows_are_of(old, masks, ids + answer["output_ids"])


def test_updates_in_parts_from_tensors(server: Server, old: Qwen3MoeForCausalLM, new: Qwen3MoeForCausalLM) -> None:
    """Between the parts requests are answered, by weights that are neither the old nor the new ones."""
    from sglang.srt.utils import MultiprocessingSerializer

    torch.multiprocessing.set_sharing_strategy("file_system")
    ids, seen = prompt(640, 40), []
    routers = _routers(new)
    control(server, "/begin_weight_update")
    for part in (routers[:2], routers[2:]):
        data = base64.b64encode(MultiprocessingSerializer.serialize(part)).decode()
        fields = {"serialized_named_tensors": [data], "flush_cache": False, "weight_version": "9"}
        control(server, "/update_weights_from_tensor", **fields)
        ((_, name),) = masks_of(generate(server, [*ids, len(seen)], 3), [*ids, len(seen)]).weight_versions[-1:]
        seen.append(name)
    control(server, "/end_weight_update")
    assert all("-incomplete-" in name for name in seen) and len({*seen}) == 2
    flush(server)
    answer = generate(server, ids, 5)
    masks = masks_of(answer, ids)
    assert masks.weight_versions == ((0, "9"),)
    assert_rows_are_of(new, masks, ids + answer["output_ids"])


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_an_update_in_a_pause_splits_the_rows_of_a_request(
    server: Server, old: Qwen3MoeForCausalLM, new: Qwen3MoeForCausalLM, new_folder: Path, mode: str
) -> None:
    prompts = [prompt(650 + number, 40 + 9 * number) for number in range(2)]
    with underway(server, prompts, 60, tokens=8) as streams:
        control(server, "/pause_generation", mode=mode)
        _update(server, new_folder, flush_cache=False)
        control(server, "/continue_generation")
    for ids, stream in zip(prompts, streams, strict=True):
        answer = stream.result()
        masks, whole = masks_of(answer, ids), ids + answer["output_ids"]
        (_, first), (border, second) = masks.weight_versions
        assert first == "old" and _is_unnamed(second)
        assert len(ids) + 8 - 1 <= border < masks.end
        assert_rows_are_of(old, masks.cut(border, whole), whole)
        # Retracted requests are computed anew, but for their prompts, which are still cached.
        _assert_rows_over_cached(new, old, masks, whole, len(ids) if mode == "retract" else border, border)


def _assert_rows_over_cached(
    model: Qwen3MoeForCausalLM,
    cached: Qwen3MoeForCausalLM,
    masks: RoutingMasks,
    token_ids: list[int],
    computed: int,
    border: int,
) -> None:
    """Rows from `border` on are those that `model` computes over the KV that other weights have computed.

    Args:
        masks: from position 0 on.
        computed: KV of the tokens before it is that of `cached`, whose rows are in `masks`.
    """
    hybrid = copy.deepcopy(model)
    for dtype in (torch.float32, torch.bfloat16):
        filled = _keys_and_values(cached, masks.cut(computed, token_ids), token_ids[:computed], dtype)
        for name, module in hybrid.named_modules():
            if name in filled:
                module.register_forward_hook(partial(_filled_in, filled[name], dtype))
    assert_rows_are_of(hybrid, masks[border:], token_ids)


def _keys_and_values(
    model: Qwen3MoeForCausalLM, masks: RoutingMasks, token_ids: list[int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Outputs of the key and value projections by name, of a run that takes the recorded experts."""
    ran, found = copy.deepcopy(model), {}
    for parameter in ran.parameters():
        parameter.data = parameter.data.to(dtype)
    for name, module in ran.named_modules():
        if name.endswith(("k_proj", "v_proj")):
            module.register_forward_hook(lambda _, __, output, name=name: found.update({name: output}))
    with torch.no_grad(), imposed(ran, masks):
        ran(torch.tensor([token_ids]))
    return found


def _filled_in(filled: Tensor, dtype: torch.dtype, module: Any, inputs: Any, output: Tensor) -> Tensor | None:
    return torch.cat([filled, output[:, filled.shape[1] :]], dim=1) if output.dtype == dtype else None
