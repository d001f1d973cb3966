"""Packed rows from miles' answers to Megatron's own routers, by miles' own samples, layout and queues."""

from __future__ import annotations

import asyncio
import importlib
import logging
import pickle
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter

from router_replay.errors import DataError, PairingError, SeamError, UnsupportedError
from router_replay.masks import RoutingGeometry
from router_replay_adapters import miles as miles_adapter
from router_replay_adapters import miles_packed
from router_replay_adapters.packed_queues import KEY, container_of, masks_of
from tests.router_replay_adapters.packed_batches import (
    BATCH,
    LAYOUTS,
    MODEL,
    MOE_LAYERS,
    MULTIPLE,
    NUM_LAYERS,
    Recorded,
    places_of,
    require_a_step,
    require_rows,
    routers_of,
)
from tests.router_replay_adapters.routers import NUM_EXPERTS, TOP_K
from tests.router_replay_adapters.stacks_here import MEGATRON_ARGS, Miles, remove
from tests.router_replay_adapters.stand_ins import miles_replay_data as stand_in
from tests.router_replay_adapters.stand_ins.miles_replay_data import DataIterator
from tests.stack_packages import checkout

ARGS = Namespace(
    **MEGATRON_ARGS,
    num_layers=NUM_LAYERS,
    moe_layer_freq=[0, 1, 1, 1],
    num_experts=NUM_EXPERTS,
    moe_router_topk=TOP_K,
    use_rollout_routing_replay=True,
    use_rollout_indexer_replay=False,
    data_pad_size_multiplier=MULTIPLE,
    qkv_format="thd",
    sequence_parallel=False,
    allgather_cp=False,
    sglang_speculative_algorithm=None,
    use_miles_router=False,
)


@dataclass
class Here:
    """miles' modules, as they are imported in this process, and its queues with a router of Megatron for each."""

    stack: Miles
    types: ModuleType
    endpoint: ModuleType
    layout: ModuleType
    actor: ModuleType
    register: Callable[..., None]
    routers: list[TopKRouter]

    def sample(self, of: Recorded, prompt: int = 1) -> Any:
        """A sample of which `prompt` tokens were not sampled, with what its answer said."""
        made = self.types.Sample()
        self.answer(made, of.tokens[:prompt], of.tokens[prompt:], of.meta_info())
        return made

    def answer(self, sample: Any, prompt: list[int], sampled: list[int], meta: dict[str, Any]) -> None:
        output = {"text": "text", "meta_info": {**meta, "output_token_logprobs": [(0.0, each) for each in sampled]}}
        made = self.endpoint.update_sample_from_response(ARGS, sample, payload={"input_ids": prompt}, output=output)
        asyncio.run(made)

    def fill(self, samples: list[Any], microbatches: list[list[int]], **args: Any) -> dict[str, Any]:
        """What miles does with the routes of a batch before a step, by its own function; returns the batch."""
        # Its shards are pickled by Ray.
        routes = pickle.loads(pickle.dumps([sample.rollout_routed_experts for sample in samples]))
        # miles has tensors on the rank, and no sample without routes.
        data = {
            "tokens": [torch.tensor(sample.tokens) for sample in samples],
            KEY: [torch.from_numpy(each) for each in routes],
            "loss_masks": [torch.ones(len(sample.tokens) - 1, dtype=torch.int) for sample in samples],
        }
        self.fill_data(data, microbatches, **args)
        return data

    def fill_data(self, data: dict[str, Any], microbatches: list[list[int]], **args: Any) -> None:
        manager = self.stack.manager
        self.actor.fill_replay_data(
            args=Namespace(**{**vars(ARGS), **args}),
            models=MODEL,
            data_iterator=[DataIterator(data, microbatches)],
            num_microbatches=[len(microbatches)],
            rollout_data=data,
            data_key=KEY,
            replay_list=manager.replays,
            register_replay_list_func=self.register,
            if_sp_region=True,
            indices_are_token_positions=False,
        )


def _set_ranks(layout: ModuleType, context: tuple[int, int] = (1, 0), tensor: tuple[int, int] = (1, 0)) -> None:
    groups = {name: SimpleNamespace(size=size, rank=rank) for name, (size, rank) in (("cp", context), ("tp", tensor))}
    layout.set_parallel_state(SimpleNamespace(**groups))


@pytest.fixture(scope="module")
def modules(miles_replay_base: ModuleType) -> dict[str, Any]:
    """Those of miles' modules that routes pass on their way; of its actor, which cannot be imported here, one name."""
    utils = importlib.import_module("miles.backends.megatron_utils.replay_utils")
    layout: ModuleType = stand_in
    fill = stand_in.fill_replay_data
    if checkout("miles") is not None:
        layout = importlib.import_module("miles.backends.training_utils.parallel")
        fill = importlib.import_module("miles.backends.training_utils.replay_data").fill_replay_data
    actor = ModuleType("miles.backends.megatron_utils.actor")
    actor.fill_replay_data = fill
    return {
        "types": importlib.import_module("miles.utils.types"),
        "endpoint": importlib.import_module("miles.rollout.generate_utils.generate_endpoint_utils"),
        "register": getattr(utils, "register_replay_list_moe", None) or utils._register_replay_list_moe,
        "layout": layout,
        "actor": actor,
    }


@pytest.fixture
def bare(
    miles_replay_base: ModuleType,
    modules: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    pinned_memory: None,
) -> Iterator[Here]:
    """Miles without what `init` does."""
    monkeypatch.setitem(sys.modules, modules["actor"].__name__, modules["actor"])
    if not hasattr(modules["types"].Sample.update_from_meta_info, "__wrapped__"):
        miles_packed.install()
    _set_ranks(modules["layout"])
    stack = Miles(miles_replay_base, miles_packed.PATCHES)
    stack.set_stage("fallthrough")
    yield Here(stack, **modules, routers=routers_of(stack))
    stack.clear()


@pytest.fixture
def here(bare: Here) -> Iterator[Here]:
    """Miles with the adapter."""
    miles_packed.init(ARGS)
    # What is given to a router was wrapped before.
    bare.stack.manager.replays = []
    bare.routers = routers_of(bare.stack)
    yield bare
    remove(miles_packed.PATCHES)


def test_a_step_replays_what_was_recorded(here: Here) -> None:
    samples = [here.sample(one) for one in BATCH]
    assert all(sample.rollout_routed_experts.dtype == np.uint8 for sample in samples)
    require_a_step(here.stack, here.routers, lambda picked: here.fill(samples, picked), here.stack.manager.replays)


def test_without_the_adapter_miles_knows_no_packed_rows(bare: Here) -> None:
    with pytest.raises(AssertionError):
        bare.fill([bare.sample(BATCH[0])], [[0]])


@pytest.mark.parametrize(("context", "tensor", "args"), LAYOUTS.values(), ids=LAYOUTS)
def test_every_rank_gets_the_rows_of_its_places(here: Here, context: int, tensor: int, args: dict[str, Any]) -> None:
    samples = [here.sample(one) for one in BATCH]
    seen: set[int] = set()
    for context_rank in range(context):
        for tensor_rank in range(tensor):
            _set_ranks(here.layout, (context, context_rank), (tensor, tensor_rank))
            here.stack.forget()
            assert KEY not in here.fill(samples, [[0, 1, 2, 3]], **args)
            ids = places_of(BATCH, args, context, context_rank, tensor)
            if args.get("sequence_parallel"):
                share = len(ids) // tensor
                ids = ids[tensor_rank * share : (tensor_rank + 1) * share]
            require_rows([layer for (layer,) in (each.top_indices_list for each in here.stack.manager.replays)], ids)
            seen.update(token for token in ids if token >= 0)
    assert seen == {token for one in BATCH for token in one.tokens[:-1]}


def test_other_things_that_miles_replays_are_left_alone(here: Here) -> None:
    positions = torch.arange(24, dtype=torch.int32).view(8, 1, 3)
    data = {"tokens": [torch.tensor(BATCH[0].tokens)], "rollout_indexer_topk": [positions]}
    registered = []
    here.actor.fill_replay_data(
        args=ARGS,
        models=MODEL,
        data_iterator=[DataIterator(data, [[0]])],
        num_microbatches=[1],
        rollout_data=data,
        data_key="rollout_indexer_topk",
        replay_list=[],
        register_replay_list_func=lambda replay_list, given, models: registered.append(given),
        if_sp_region=False,
        indices_are_token_positions=False,
    )
    assert torch.equal(registered[0][:8], positions)
    queue = here.stack.module.Replay()
    queue.record(positions[:, 0])
    assert torch.equal(queue.pop_forward(), positions[:, 0])


def test_the_next_answer_has_all_rows_or_those_behind_them(here: Here) -> None:
    whole = BATCH[2]
    sample = here.types.Sample()
    first = Recorded(whole.tokens[:6], whole.experts[:5], whole.valid[:5])
    here.answer(sample, whole.tokens[:2], whole.tokens[2:6], first.meta_info())
    sample.tokens = whole.tokens[:9]
    here.answer(sample, sample.tokens, whole.tokens[9:], whole.meta_info())
    assert masks_of(sample.rollout_routed_experts).end == 12
    # By itself miles never asks for a part, and forgets what was there.
    with pytest.raises(DataError, match="rows from position 9 on, and its sample has none"):
        here.answer(sample, [], [], whole.meta_info(start=9))


def test_masks_of_other_tokens_are_refused_at_once(here: Here) -> None:
    with pytest.raises(PairingError):
        here.answer(here.types.Sample(), [7, 8], BATCH[0].tokens[2:], BATCH[0].meta_info())


def test_an_answer_without_masks_leaves_no_older_ones_behind(here: Here) -> None:
    """As miles' older rollout has it, which does not take them away by itself."""
    sample = here.sample(BATCH[0])
    container = sample.rollout_routed_experts
    aborted = {"finish_reason": {"type": "abort"}}
    sample.update_from_meta_info(ARGS, aborted)
    assert sample.rollout_routed_experts is container
    sample.tokens = [*sample.tokens, 7]
    sample.update_from_meta_info(ARGS, aborted)
    assert sample.rollout_routed_experts is None
    with pytest.raises(TypeError, match="NoneType"):
        here.fill([here.sample(BATCH[1]), sample], [[0, 1]])


def test_runs_without_replay_keep_what_miles_makes_of_answers(here: Here) -> None:
    sample = here.types.Sample(tokens=BATCH[0].tokens)
    off = Namespace(**{**vars(ARGS), "use_rollout_routing_replay": False})
    sample.update_from_meta_info(off, BATCH[0].meta_info())
    assert sample.rollout_routed_experts is None


def _one(of: Recorded, container: np.ndarray, untaught: int = 0) -> dict[str, Any]:
    """A batch of one sample whose last tokens do not teach."""
    loss_mask = torch.ones(len(of.tokens) - 1, dtype=torch.int)
    loss_mask[len(loss_mask) - untaught :] = 0
    return {"tokens": [torch.tensor(of.tokens)], KEY: [container], "loss_masks": [loss_mask]}


def test_tokens_that_teach_have_rows(here: Here) -> None:
    """As where a generate function of one's own adds sampled tokens to a sample without their answer."""
    short = container_of(BATCH[0].masks(end=6))
    with pytest.raises(DataError, match="teaches its token 8, and has routes of 6 of the 8 tokens in front of it"):
        here.fill_data(_one(BATCH[0], short), [[0]])
    here.fill_data(_one(BATCH[0], short, untaught=2), [[0]])
    unmasked = _one(BATCH[0], short)
    del unmasked["loss_masks"]
    with pytest.raises(DataError, match="routes and no 'loss_masks'"):
        here.fill_data(unmasked, [[0]])


@pytest.mark.parametrize(
    ("container", "error", "message"),
    [
        (
            np.zeros((8, NUM_LAYERS, TOP_K), np.int32),
            DataError,
            r"an array int32 \[8, 4, 4\], where packed",
        ),
        (container_of(BATCH[0].masks())[:-1], DataError, "truncated"),
        (container_of(BATCH[1].masks()), PairingError, "masks of sequence 0"),
        (
            container_of(BATCH[0].masks(geometry=RoutingGeometry(NUM_LAYERS, MOE_LAYERS, NUM_EXPERTS + 1, TOP_K))),
            PairingError,
            "17 experts",
        ),
    ],
    ids=["array", "truncated", "other tokens", "other model"],
)
def test_what_belongs_to_another_batch_is_refused(
    here: Here, container: np.ndarray, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        here.fill_data(_one(BATCH[0], container), [[0]])


def test_miles_generates_as_by_itself(modules: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    async def generate(input: object) -> str:
        asked.append(input)
        return "output"

    turn = ModuleType("miles.rollout.generate_hub.single_turn")
    turn.generate = generate
    monkeypatch.setitem(sys.modules, turn.__name__, turn)
    monkeypatch.setattr(importlib.import_module("miles.rollout.generate_hub"), "single_turn", turn, raising=False)
    assert asyncio.run(miles_packed.generate("input")) == "output"
    monkeypatch.setenv("MILES_USE_LEGACY_ROLLOUT_V1", "1")
    with pytest.raises(UnsupportedError, match="MILES_USE_LEGACY_ROLLOUT_V1 is set"):
        asyncio.run(miles_packed.generate("input"))
    assert asked == ["input"]


def test_one_line_at_the_start(bare: Here, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("SGLANG_ROUTER_CAPTURE", "1")
    monkeypatch.delenv("SGLANG_ROUTER_CAPTURE_FORMAT", raising=False)
    own = bare.actor.fill_replay_data
    with caplog.at_level(logging.INFO):
        miles_packed.init(ARGS)
        miles_packed.init(ARGS)
    assert bare.actor.fill_replay_data.__wrapped__ is own
    remove(miles_packed.PATCHES * 2)
    assert bare.actor.fill_replay_data is own
    lines = [each.getMessage() for each in caplog.records if each.name.startswith("router_replay_adapters")]
    assert len(lines) == 2
    assert lines[0].startswith("router_replay_adapters.miles_packed is on (miles, with packed rows")


def test_what_does_not_fit_stops_the_start(bare: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match="none of this model's 4 decoder layers routes"):
        miles_packed.init(Namespace(**{**vars(ARGS), "num_experts": None}))

    def other(data: object) -> None: ...

    monkeypatch.setattr(bare.actor, "fill_replay_data", other)
    with pytest.raises(SeamError, match=r"fill_replay_data: expected parameters"):
        miles_packed.init(ARGS)
    remove(miles_adapter.PATCHES)
