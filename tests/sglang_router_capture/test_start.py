"""What must not start does not start, and says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

from cpu_engines.sglang.server import ServerDiedError
from cpu_engines.sglang.server import serve as serve_with_own_models
from tests.sglang_router_capture.probe import renaming
from tests.small_model import serve

pytestmark = pytest.mark.timeout(900)

ON = "--enable-router-capture"
RENAMED = {
    "hooked": ("sglang.srt.mem_cache.allocator.token.TokenToKVPoolAllocator.alloc", (ON,), {}),
    # Upstream can do without it: nothing but the ledger stops this server, whose command line asks for nothing.
    "called": ("sglang.srt.state_capturer.base.BaseTopkCapturer.get_topk", (), {"SGLANG_ROUTER_CAPTURE": "1"}),
    # Upstream's own modules import it, too.
    "imported": ("sglang.srt.runtime_context.get_serving", (ON,), {}),
}


@pytest.fixture(scope="module")
def died(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], ServerDiedError]]:
    """How the servers of these tests ended. Two start at a time: they get no further than imports."""
    dense = tmp_path_factory.mktemp("dense")
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=256,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(dense)

    def renamed(path: str, flags: tuple[str, ...], variables: dict[str, str]) -> ServerDiedError:
        with (
            pytest.raises(ServerDiedError) as caught,
            serve(small_model, *flags, "--skip-tokenizer-init", environment=renaming(path) | variables),
        ):
            pass
        return caught.value

    def embedding() -> ServerDiedError:
        with pytest.raises(ServerDiedError) as caught, serve(small_model, ON, "--is-embedding"):
            pass
        return caught.value

    def of_a_dense_model() -> ServerDiedError:
        with pytest.raises(ServerDiedError) as caught, serve_with_own_models(dense, ON, "--skip-tokenizer-init"):
            pass
        return caught.value

    with ThreadPoolExecutor(2) as pool:
        ends = {name: pool.submit(renamed, *case) for name, case in RENAMED.items()}
        ends |= {"embedding": pool.submit(embedding), "dense": pool.submit(of_a_dense_model)}
        yield lambda name: ends[name].result()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hooked", ("TokenToKVPoolAllocator.alloc: expected a function, found nothing of that name but what",)),
        (
            "called",
            ("BaseTopkCapturer.get_topk: expected parameters (req_pool_idx, seqlen, ", "found nothing of that name"),
        ),
        (
            "imported",
            (
                "get_serving: expected a function that asks for no parameters",
                "found nothing of that name (cannot import name 'get_serving'",
            ),
        ),
    ],
    ids=RENAMED,
)
def test_renamed_seam_stops_the_server(
    died: Callable[[str], ServerDiedError], name: str, words: tuple[str, ...]
) -> None:
    end = died(name)
    assert end.status not in (0, None)
    for part in ("router capture does not fit the installed SGLang", *words, "tested with SGLang"):
        assert part in end.log


def test_what_cannot_be_captured_stops_the_server(died: Callable[[str], ServerDiedError]) -> None:
    end = died("embedding")
    assert end.status not in (0, None)
    assert "router capture cannot run where --is-embedding is True" in end.log


def test_dense_model_is_refused(died: Callable[[str], ServerDiedError]) -> None:
    end = died("dense")
    assert end.status not in (0, None)
    assert "router capture: this looks like a dense model (qwen3)" in end.log
    assert "turn capture and replay off" in end.log
