"""KV that comes back from the hierarchical cache was not computed by a forward pass: its rows are not valid."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from cpu_engines.sglang.server import HICACHE_FLAGS
from router_replay.masks import NO_ROW
from tests.sglang_router_capture.requests import generate, masks_of, prompt
from tests.small_model import serve

pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize("page_size", [1, 16])
def test_rows_of_loaded_kv_are_invalid_and_the_others_right(small_model: Path, page_size: int) -> None:
    flags = ("--skip-tokenizer-init", "--max-total-tokens=640", "--hicache-write-policy=write_through", *HICACHE_FLAGS)
    flags += (f"--page-size={page_size}",)
    prompts = [prompt(seed, 200) for seed in range(4)]
    with serve(small_model, "--enable-router-capture", *flags) as server:
        first = []
        for ids in prompts:
            first.append(masks_of(generate(server, ids, 4), ids))
            # The write-through copy to the host runs beside the requests.
            time.sleep(1)
        loaded = 0
        for ids, before in zip(prompts, first, strict=True):
            answer = generate(server, ids, 4)
            after = masks_of(answer, ids)
            from_host = answer["meta_info"]["cached_tokens_details"]["host"]
            loaded += from_host
            assert int((~after.valid).sum()) == from_host
            computed = after.valid
            assert torch.equal(after.rows[computed], before.rows[computed])
            # Nothing of the slot's previous owner.
            assert (after.rows[~computed] == NO_ROW).all()
            assert (after.indices()[~computed] == -1).all()
    assert loaded >= 200
