"""The program on the trainer's page runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from hf_router_replay import attach, join_parts
from router_replay.masks.stores import open_store
from tests.hf_router_replay.small_models import attention_mask, batch_of, build, computed_experts, logits_of, wrong_rows

PAGE = Path(__file__).parents[2] / "docs" / "trainer.md"


def test_the_program_on_the_page():
    model, batches = build("qwen3_moe"), [batch_of("qwen3_moe", seed) for seed in (1, 2)]
    with attach(model) as replay, torch.no_grad():
        for batch in batches:
            with replay.record(batch.layout) as recorded:
                logits_of(model, batch)
            batch.masks = join_parts([recorded.part()])
            batch.indices = [one.indices() for one in batch.masks]
    store, steps = open_store("inline:"), []

    class Optimizer:
        def step(self) -> None:
            steps.append("stepped")

    program = re.search(r"<!-- hf program -->\n```python\n(.*?)```\n<!-- /hf program -->", PAGE.read_text(), re.S)
    names = {
        "model": model,
        "loss_func": lambda batch, output: output.logits.square().mean(),
        "optimizer": Optimizer(),
    }
    exec(compile(program.group(1), str(PAGE), "exec"), names)
    data = [
        {
            "answers": [{"meta_info": {"routing_masks": [store.put(one)]}} for one in batch.masks],
            "input_ids": batch.token_ids,
            "attention_mask": attention_mask(batch),
        }
        for batch in batches
    ]
    with computed_experts(model) as seen:
        names["train"](data)
    assert names["replay"].metrics()["overlap/rollout"] == 1
    names["replay"].remove()
    assert steps == ["stepped"]
    assert wrong_rows(seen, batches[1]) == 0
