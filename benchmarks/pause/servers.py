"""Servers that are measured: SGLang's own capture, and this package with one store after the other."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.mask_codec.models import MODELS
from benchmarks.pause.probe import router_capture_pause as probe
from cpu_engines.sglang.server import STAND_IN_PLUGIN, Server, serve

STOCK, INLINE, FILE, SLOW = "SGLang's own", "inline:", "file:", "file:, slow"
VARIANTS = (STOCK, INLINE, FILE, SLOW)
VOCABULARY = 1000

_PLUGINS = f"{STAND_IN_PLUGIN},router_capture_pause"


@dataclass(frozen=True)
class Sizes:
    """What a server is sent.

    Attributes:
        tokens: of a long request.
        together: long requests that end at once.
        single: long requests in a round that end alone.
        window: seconds after an end in which others are looked at.
        interval: seconds between short requests.
        slow: seconds that the slow store takes for a request.
    """

    tokens: int
    together: int
    single: int
    window: float
    interval: float
    slow: float

    @property
    def new_tokens(self) -> int:
        """That a long request samples: enough for all of a batch to run before the first of them ends."""
        return 32

    @property
    def own_tokens(self) -> int:
        """Of each long request, after the prefix that they have in common."""
        return 16


@dataclass(frozen=True)
class Measured:
    """A running server, and the file in which its scheduler writes what it took."""

    server: Server
    records: Path

    def lines(self, since: float) -> list[dict[str, Any]]:
        """What was recorded since then, by the clock of `time.monotonic`, as `router_capture_pause.measure` says."""
        # The last line may be half there.
        whole, _, _ = self.records.read_text().rpartition("\n")
        found = [json.loads(line) for line in whole.splitlines()]
        return [each for each in found if each["at"] >= since]


@contextlib.contextmanager
def running(variant: str, model: str, sizes: Sizes) -> Iterator[Measured]:
    """A server of a kind, whose model routes as a released one does.

    Args:
        variant: one of `VARIANTS`.
        model: of `benchmarks.mask_codec.models.MODELS`.
    """
    # The masks are read here, too.
    probe.supply_slow_store()
    with tempfile.TemporaryDirectory(prefix="router-capture-pause-") as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(_config(model, sizes)))
        records = folder / "records.jsonl"
        records.touch()
        # In memory: the disk is not what is measured.
        masks = Path(tempfile.mkdtemp(prefix="router-capture-pause-", dir="/dev/shm"))
        environment = {
            "PYTHONPATH": str(Path(probe.__file__).parent),
            probe.RECORDS: str(records),
            probe.LONG: str(sizes.tokens // 2),
            probe.SLOW_SECONDS: str(sizes.slow),
            **({"SGLANG_PLUGINS": _PLUGINS} if variant == STOCK else {}),
        }
        try:
            with serve(
                folder,
                "--skip-tokenizer-init",
                "--load-format=dummy",
                "--random-seed=0",
                "--chunked-prefill-size=4096",
                f"--context-length={sizes.tokens + 1024}",
                f"--max-total-tokens={sizes.tokens + 16384}",
                f"--max-running-requests={sizes.together + 32}",
                *_flags(variant, masks),
                model_package="benchmarks.pause.sglang_models",
                environment=environment,
                timeout_s=900,
            ) as server:
                yield Measured(server, records)
        finally:
            shutil.rmtree(masks, ignore_errors=True)


def _flags(variant: str, masks: Path) -> tuple[str, ...]:
    if variant == STOCK:
        return ("--enable-return-routed-experts",)
    url = {INLINE: "inline:", FILE: f"file://{masks}", SLOW: f"{probe.SLOW}://{masks}"}[variant]
    return ("--enable-router-capture", f"--router-capture-store={url}")


def _config(model: str, sizes: Sizes) -> dict[str, Any]:
    layers, top_k, num_experts = MODELS[model]
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "float32",
        "num_hidden_layers": layers,
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "hidden_size": 32,
        "intermediate_size": 32,
        "moe_intermediate_size": 32,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": sizes.tokens + 1024,
        "tie_word_embeddings": False,
    }
