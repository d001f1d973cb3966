"""What must not start does not start, and says why."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

from cpu_engines.sglang.server import ServerDiedError
from tests.sglang_router_capture.probe import renaming
from tests.small_model import serve

pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize(
    ("renamed", "words", "flags", "variables"),
    [
        (
            "sglang.srt.mem_cache.allocator.token.TokenToKVPoolAllocator.alloc",
            ("TokenToKVPoolAllocator.alloc: expected a function, found nothing of that name but what",),
            ("--enable-router-capture",),
            {},
        ),
        # Upstream can do without it: nothing but the ledger stops this server, whose command line asks for nothing.
        (
            "sglang.srt.state_capturer.base.BaseTopkCapturer.get_topk",
            ("BaseTopkCapturer.get_topk: expected parameters (req_pool_idx, seqlen, ", "found nothing of that name"),
            (),
            {"SGLANG_ROUTER_CAPTURE": "1"},
        ),
        # Upstream's own modules import it, too.
        (
            "sglang.srt.runtime_context.get_serving",
            (
                "get_serving: expected a function that asks for no parameters",
                "found nothing of that name (cannot import name 'get_serving'",
            ),
            ("--enable-router-capture",),
            {},
        ),
    ],
    ids=["hooked", "called", "imported"],
)
def test_renamed_seam_stops_the_server(
    small_model: Path, renamed: str, words: tuple[str, ...], flags: tuple[str, ...], variables: dict[str, str]
) -> None:
    environment = renaming(renamed) | variables
    with (
        pytest.raises(ServerDiedError) as caught,
        serve(small_model, *flags, "--skip-tokenizer-init", environment=environment),
    ):
        pass
    assert caught.value.status not in (0, None)
    for part in ("router capture does not fit the installed SGLang", *words, "tested with SGLang"):
        assert part in caught.value.log


def test_what_cannot_be_captured_stops_the_server(small_model: Path) -> None:
    with (
        pytest.raises(ServerDiedError) as caught,
        serve(small_model, "--enable-router-capture", "--is-embedding"),
    ):
        pass
    assert caught.value.status not in (0, None)
    assert "router capture cannot run where --is-embedding is True" in caught.value.log


def test_dense_model_is_refused(tmp_path: Path) -> None:
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=256,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    with (
        pytest.raises(ServerDiedError) as caught,
        serve(tmp_path, "--enable-router-capture", "--skip-tokenizer-init"),
    ):
        pass
    assert caught.value.status not in (0, None)
    assert "router capture: this looks like a dense model (qwen3)" in caught.value.log
    assert "turn capture and replay off" in caught.value.log
