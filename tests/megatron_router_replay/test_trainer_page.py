"""The program on the trainer's page runs as it stands, on Megatron's own schedule."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from cpu_engines.megatron.logprobs import forward_logits
from router_replay.masks.stores import open_store
from tests.megatron_router_replay.batches import dispatched_maps, random_batch
from tests.megatron_router_replay.own_routes import own_masks, wrong_rows

PAGE = Path(__file__).parents[2] / "docs" / "trainer.md"


def test_the_program_on_the_page(build_model, geometry):
    from megatron_router_replay import attach

    model = build_model()
    batches = [random_batch(geometry, (12, 9, 5), seed=seed) for seed in (1, 2)]
    with attach(model) as replay:
        for batch in batches:
            batch.masks = own_masks(model, replay, batch)
            # What a rollout engine with the same routes would have answered.
            for one in batch.masks:
                assert one.valid.all()
    for batch in batches:
        batch.indices = [one.indices() for one in batch.masks]
    store = open_store("inline:")
    logged = []
    steps = []

    class Optimizer:
        def step(self) -> None:
            steps.append("stepped")

    def plain_forward_step(data, chunk):
        each = next(data)
        return forward_logits(chunk, each["token_ids"]), lambda output: (output.mean(), {})

    def loss_func(batch, output):
        return output.square().mean(), {}

    program = re.search(r"<!-- program -->\n```python\n(.*?)```\n<!-- /program -->", PAGE.read_text(), re.S).group(1)
    names = {
        "model_chunks": [model],
        "loss_func": loss_func,
        "plain_forward_step": plain_forward_step,
        "optimizer": Optimizer(),
        "log": logged.append,
    }
    exec(compile(program, str(PAGE), "exec"), names)
    length = batches[0].token_ids.shape[1]
    data = [
        {
            "answers": [{"meta_info": {"routing_masks": [store.put(one)]}} for one in batch.masks],
            "token_ids": batch.token_ids,
            "lengths": batch.lengths,
            "position_ids": torch.arange(length).expand_as(batch.token_ids),
            "attention_mask": torch.ones(1, 1, length, length, dtype=torch.bool).triu(1),
        }
        for batch in batches
    ]
    with dispatched_maps(model) as maps:
        names["train"](data, seq_length=length, micro_batch_size=3)
    names["replay"].remove()
    assert steps == ["stepped"]
    assert logged[0]["places/replayed"] == 2 * 2 * sum(each - 1 for each in batches[0].lengths)
    assert logged[0]["overlap/rollout"] == 1
    # Old log-probabilities, the reference pass and training: two microbatches each.
    assert all(len(seen) == 6 for seen in maps.values())
    last = {layer: seen[-1:] for layer, seen in maps.items()}
    assert wrong_rows(last, batches[1]) == 0
