"""A request's masks go into the recorder's store, whichever it is; nothing reads the environment on the way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.runtime_context import get_resources

from router_replay.masks import RoutingGeometry, RoutingMasks, Stat, Store, get_codec, load
from router_replay.masks.stores import STORES
from sglang_router_capture import answer, hooks
from sglang_router_capture import recorder as recorder_module
from sglang_router_capture.options import CaptureOptions
from sglang_router_capture.sglang_format import unpacked

GEOMETRY = RoutingGeometry(num_layers=3, moe_layers=(1, 2), num_experts=8, top_k=2)
KEPT: dict[str, RoutingMasks] = {}


class DictionaryStore(Store):
    """Keeps masks in this process."""

    def __init__(self, url: str) -> None:
        self.url, self.closed = url, False

    def put(self, masks: RoutingMasks) -> dict[str, Any]:
        KEPT[str(len(KEPT))] = masks
        return {"store": self.url, "key": str(len(KEPT) - 1)}

    def get(self, handle: Any) -> RoutingMasks:
        return KEPT[handle["key"]]

    def delete(self, handle: Any) -> None:
        KEPT.pop(handle["key"], None)

    def stat(self, handle: Any) -> Stat:
        return Stat(handle["key"] in KEPT)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> recorder_module.Recorder:
    KEPT.clear()
    monkeypatch.setitem(STORES, "dictionary", f"{__name__}:DictionaryStore")
    made = _recorder(CaptureOptions())
    monkeypatch.setattr(get_resources(), "experts_capturer", made)
    return made


def _recorder(options: CaptureOptions) -> recorder_module.Recorder:
    made = recorder_module.Recorder(
        GEOMETRY,
        get_codec("bitset"),
        options=options,
        store=DictionaryStore("dictionary:one"),
        num_slots=8,
        max_tokens_per_pass=8,
        num_fused_shared_experts=0,
        device="cpu",
    )
    rows = made.codec.pack(torch.tensor([3, 5]).expand(4, 2, 2), GEOMETRY)
    made.table.write(torch.arange(4), rows, torch.ones(4, dtype=torch.bool), made.weight_versions.number("7"))
    return made


def _finished(asked: bool = True) -> tuple[Any, Any]:
    req = SimpleNamespace(
        origin_input_ids=[4, 5],
        output_ids=[6, 7],
        output_ids_through_stop=[6, 7],
        routed_experts_start_len=0,
        return_routed_experts=asked,
        sampling_params=SimpleNamespace(max_new_tokens=2, n=1),
        kv=SimpleNamespace(req_pool_idx=0),
    )
    return req, SimpleNamespace(req_to_token=torch.arange(8).reshape(1, 8))


def _collect(req: Any, pool: Any) -> list[str]:
    """The names of what upstream was asked to do."""
    called: list[str] = []
    hooks.requests.around_collect(lambda *_: called.append("collect"), SimpleNamespace(req_to_token_pool=pool), req)
    return called


@pytest.mark.usefixtures("recorder")
def test_masks_go_through_whatever_store_the_recorder_has() -> None:
    req, pool = _finished()
    assert _collect(req, pool) == []
    (handle,) = answer.handles(req)
    assert handle == {"store": "dictionary:one", "key": "0"}
    assert answer.handles(req) == []
    masks = load(handle)
    masks.check_tokens([4, 5, 6, 7])
    assert masks.indices()[:, 0].tolist() == [[3, 5]] * 3 and masks.weight_versions == ((0, "7"),)


def test_the_store_closes_with_the_recorder(recorder: recorder_module.Recorder) -> None:
    assert not recorder.store.closed
    recorder.destroy()
    assert recorder.store.closed


@pytest.mark.usefixtures("recorder")
def test_a_request_does_not_read_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the environment was parsed anew")

    monkeypatch.setattr(CaptureOptions, "from_environment", refuse)
    req, pool = _finished()
    hooks.requests.before_release_req(req=req, req_to_token_pool=pool)
    assert _collect(req, pool) == [] and len(answer.handles(req)) == 1
    assert hooks.requests.after_get_output_streamer_class(_Streamer, None).has_additional_customized_info


@pytest.mark.usefixtures("recorder")
def test_a_request_that_did_not_ask_leaves_nothing() -> None:
    req, pool = _finished(asked=False)
    assert _collect(req, pool) == []
    assert answer.handles(req) == [] and not KEPT


@pytest.mark.usefixtures("recorder")
@pytest.mark.parametrize(("choices", "num_handles"), [(1, 1), (2, 0)])
def test_a_prompt_that_only_fills_the_cache_leaves_nothing(choices: int, num_handles: int) -> None:
    """SGLang sends it before the choices; a single request for no token has an answer that somebody reads."""
    req, pool = _finished()
    req.sampling_params = SimpleNamespace(max_new_tokens=0, n=choices)
    assert _collect(req, pool) == []
    assert len(answer.handles(req)) == len(KEPT) == num_handles


@pytest.mark.parametrize("format_", ["sglang", None])
def test_upstreams_format_and_upstreams_capturer_stay_upstreams(
    monkeypatch: pytest.MonkeyPatch, format_: str | None
) -> None:
    KEPT.clear()
    capturer = _recorder(CaptureOptions(format_)) if format_ else None
    monkeypatch.setattr(get_resources(), "experts_capturer", capturer)
    req, pool = _finished()
    hooks.requests.before_release_req(req=req, req_to_token_pool=pool)
    assert _collect(req, pool) == ([] if format_ else ["collect"])
    assert answer.handles(req) == [] and not KEPT
    if format_:
        assert unpacked(req.routed_experts)[:, 1:].tolist() == [[[3, 5]] * 2] * 3
    assert hooks.requests.after_get_output_streamer_class(_Streamer, None) is None


class _Streamer:
    __slots__ = ()

    def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list]:
        return {}


def test_a_scheduler_that_was_to_capture_and_has_no_recorder_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_resources(), "experts_capturer", None)
    monkeypatch.setenv("SGLANG_ROUTER_CAPTURE", "1")
    with pytest.raises(SystemExit, match="answers would lack their masks without a word"):
        hooks.requests.after_get_output_streamer_class(_Streamer, None)
