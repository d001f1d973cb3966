"""Packed rows from slime's answers to Megatron's own routers, by slime's own samples, layout and queues."""

from __future__ import annotations

import gc
import logging
import weakref
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter

from router_replay.errors import DataError, InputError, PairingError, SeamError, UnsupportedError
from router_replay.masks import RoutingGeometry, RoutingMasks
from router_replay.upstream import Patch
from router_replay_adapters import slime_packed
from router_replay_adapters.packed_queues import KEY, PackedQueues, container_of, masks_of
from tests.router_replay_adapters.packed_batches import (
    BATCH,
    LAYOUTS,
    MODEL,
    MOE_LAYERS,
    MULTIPLE,
    NUM_LAYERS,
    Recorded,
    places_of,
    recorded,
    require_a_step,
    require_rows,
    routers_of,
)
from tests.router_replay_adapters.routers import NUM_EXPERTS, TOP_K
from tests.router_replay_adapters.stacks_here import MEGATRON_ARGS, Slime, remove

ARGS = Namespace(
    **MEGATRON_ARGS,
    num_layers=NUM_LAYERS,
    moe_layer_freq=[0, 1, 1, 1],
    num_experts=NUM_EXPERTS,
    moe_router_topk=TOP_K,
    use_rollout_routing_replay=True,
    data_pad_size_multiplier=MULTIPLE,
    sequence_parallel=False,
    allgather_cp=False,
    custom_reward_post_process_path=None,
    # For slime's own conversion.
    advantage_estimator="ppo",
    rewards_normalization=False,
    reward_key=None,
    sglang_speculative_algorithm=None,
)


@dataclass
class Here:
    """slime's modules, as they are imported in this process, and its queues with a router of Megatron for each."""

    stack: Slime
    types: ModuleType
    rollout: ModuleType
    actor: ModuleType
    data: ModuleType
    routers: list[TopKRouter]

    def sample(self, of: Recorded, prompt: int = 1, **fields: Any) -> Any:
        """A sample of which `prompt` tokens were not sampled, with what its answer said."""
        made = self.types.Sample(tokens=of.tokens[:prompt], reward=1.0, index=of.tokens[0], **fields)
        self.answer(made, of.tokens[prompt:], of.meta_info())
        return made

    def answer(self, sample: Any, tokens: list[int], meta: dict[str, Any] | None) -> None:
        sample.append_response_tokens(ARGS, tokens=tokens, log_probs=[0.0] * len(tokens), meta_info=meta)

    def rollout_data(self, data: dict[str, Any]) -> dict[str, Any]:
        """What a rank is given of a converted batch."""
        given = {key: data[key] for key in ("tokens", KEY)}
        self.rollout.tensorize_rollout_data_for_training(given)
        return given

    def fill(self, rollout_data: dict[str, Any], microbatches: list[list[int]], **args: Any) -> None:
        """What slime does with the routes of a batch before a step, by its own method."""
        actor = SimpleNamespace(args=Namespace(**{**vars(ARGS), **args}), model=MODEL)
        iterator = [self.data.DataIterator(rollout_data, microbatches)]
        self.actor.MegatronTrainRayActor.fill_routing_replay(actor, iterator, [len(microbatches)], rollout_data)

    def queues(self) -> list[list[Any]]:
        """Of each router what is recorded."""
        return [each.top_indices_list for each in self.stack.module.RoutingReplay.all_routing_replays]


@pytest.fixture
def bare(
    slime_routing_replay: ModuleType,
    slime_modules: dict[str, ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    pinned_memory: None,
) -> Iterator[Here]:
    """Slime without what `init` does."""
    if not hasattr(slime_modules["types"].Sample.append_response_tokens, "__wrapped__"):
        slime_packed.install()
    stack = Slime(slime_routing_replay, slime_packed.PATCHES, monkeypatch)
    stack.set_stage("fallthrough")
    made = Here(stack, **slime_modules, routers=routers_of(stack))
    yield made
    stack.clear()


@pytest.fixture
def here(bare: Here) -> Iterator[Here]:
    """Slime with the adapter."""
    slime_packed.init(ARGS)
    yield bare
    remove(slime_packed.PATCHES)


def test_a_step_replays_what_was_recorded(here: Here) -> None:
    samples = [here.sample(one) for one in BATCH]
    assert all(isinstance(sample.rollout_routed_experts, RoutingMasks) for sample in samples)
    data = here.rollout_data(slime_packed.convert(ARGS, samples))
    queues = here.stack.module.RoutingReplay.all_routing_replays
    require_a_step(here.stack, here.routers, lambda microbatches: here.fill(data, microbatches), queues)
    assert KEY not in data


def test_without_the_adapter_slime_knows_no_packed_rows(bare: Here) -> None:
    data = bare.rollout_data({"tokens": [BATCH[0].tokens], KEY: [container_of(BATCH[0].masks())]})
    with pytest.raises(AssertionError):
        bare.fill(data, [[0]])


@pytest.mark.parametrize(("context", "tensor", "args"), LAYOUTS.values(), ids=LAYOUTS)
def test_every_rank_gets_the_rows_of_its_places(
    here: Here, monkeypatch: pytest.MonkeyPatch, context: int, tensor: int, args: dict[str, Any]
) -> None:
    seen: set[int] = set()
    for context_rank in range(context):
        for tensor_rank in range(tensor):
            for name, value in (
                ("context_parallel_world_size", context),
                ("context_parallel_rank", context_rank),
                ("tensor_model_parallel_world_size", tensor),
                ("tensor_model_parallel_rank", tensor_rank),
            ):
                monkeypatch.setattr(parallel_state, f"get_{name}", lambda value=value, **_: value)
            here.stack.forget()
            samples = [here.sample(one) for one in BATCH]
            here.fill(here.rollout_data(slime_packed.convert(ARGS, samples)), [[0, 1, 2, 3]], **args)
            ids = places_of(BATCH, args, context, context_rank, tensor)
            if args.get("sequence_parallel"):
                share = len(ids) // tensor
                ids = ids[tensor_rank * share : (tensor_rank + 1) * share]
            require_rows([layer for (layer,) in here.queues()], ids)
            seen.update(token for token in ids if token >= 0)
    assert seen == {token for one in BATCH for token in one.tokens[:-1]}


def test_samples_without_masks_and_tokens_behind_them_are_native(here: Here) -> None:
    """The last turn's tool output was never in the rollout, and of a sample that failed there is nothing."""
    tool = here.sample(BATCH[2])
    tool.append_response_tokens(ARGS, tokens=[350, 351, 352], trainable=False)
    failed = here.types.Sample(tokens=BATCH[0].tokens[:4], reward=0.0, index=0)
    here.fill(here.rollout_data(slime_packed.convert(ARGS, [tool, failed])), [[0, 1]])
    native = here.queues()[0][0].native_places.tolist()
    unknown = (~BATCH[2].valid).nonzero().flatten().tolist()
    # What the rollout sampled last was fed back, and its row is not known; then come the tool's tokens but the last.
    assert native == [*unknown, 12, 13, 14, 16, 17, 18]


def test_sequences_without_a_valid_row_are_native_and_told_of(
    here: Here, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Which microbatch they are in decides nothing."""
    new = PackedQueues()
    new.geometry = slime_packed._packed.geometry
    monkeypatch.setattr(slime_packed, "_packed", new)
    unknown = recorded(6, 700)
    samples = [here.sample(Recorded(unknown.tokens, unknown.experts, torch.zeros(5, dtype=torch.bool)))]
    samples.append(here.sample(BATCH[2]))
    data = here.rollout_data(slime_packed.convert(ARGS, samples))
    with caplog.at_level(logging.WARNING):
        here.fill(data, [[0], [1]])
    assert here.queues()[0][0].native_places.tolist() == [0, 1, 2, 3, 4]
    (line,) = [each.getMessage() for each in caplog.records if each.name.endswith("packed_queues")]
    assert line == "5 of 5 places of this rank's microbatches take the routers' own experts: 5 invalid"


def test_turns_that_ask_for_what_is_new_are_joined(here: Here) -> None:
    whole = recorded(12, 500)
    sample = here.types.Sample(tokens=whole.tokens[:2])
    first = Recorded(whole.tokens[:6], whole.experts[:5], whole.valid[:5])
    here.answer(sample, whole.tokens[2:6], first.meta_info())
    sample.append_response_tokens(ARGS, tokens=whole.tokens[6:9], trainable=False)
    # The server has the row of the token that the first answer ended with, and repeats one.
    here.answer(sample, whole.tokens[9:], whole.meta_info(start=4))
    masks = sample.rollout_routed_experts
    assert (masks.start, masks.end) == (0, 11)
    assert torch.equal(masks.rows, whole.masks().rows)
    assert masks.token_digest == whole.masks().token_digest
    # An answer with all rows stands for itself: a prompt that was resumed under other weights was computed anew.
    here.answer(
        sample, [600], Recorded([*whole.tokens, 600], whole.experts[[0] * 12], whole.valid[[0] * 12]).meta_info()
    )
    assert sample.rollout_routed_experts.num_tokens == 12


def test_a_part_without_its_beginning_is_refused(here: Here) -> None:
    sample = here.types.Sample(tokens=BATCH[0].tokens[:5])
    with pytest.raises(DataError, match="rows from position 3 on, and its sample has none"):
        here.answer(sample, BATCH[0].tokens[5:], BATCH[0].meta_info(start=3))


def test_masks_of_other_tokens_are_refused_at_once(here: Here) -> None:
    sample = here.types.Sample(tokens=[7, 8])
    with pytest.raises(PairingError):
        here.answer(sample, BATCH[0].tokens[2:], BATCH[0].meta_info())


def test_answers_that_sampled_nothing_and_chunks_change_no_masks(here: Here) -> None:
    sample = here.sample(BATCH[0])
    before = sample.rollout_routed_experts
    here.answer(sample, [], {"finish_reason": {"type": "abort"}})
    here.answer(sample, [], {"finish_reason": {"type": "abort"}, "routing_masks": []})
    assert sample.rollout_routed_experts is before


def test_the_batch_is_slimes_own_but_for_its_routes(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [here.sample(one) for one in BATCH]
    data = slime_packed.convert(ARGS, samples)
    assert data["tokens"] == [one.tokens for one in BATCH]
    assert data["rewards"] == [1.0] * len(BATCH)
    for container, sample, one in zip(data[KEY], samples, BATCH, strict=True):
        assert container.dtype == np.uint8 and container.ndim == 1
        assert torch.equal(masks_of(container).rows, one.masks().rows)
        # The sample keeps its own.
        assert isinstance(sample.rollout_routed_experts, RoutingMasks)
    rewards = Namespace(**{**vars(ARGS), "custom_reward_post_process_path": f"{__name__}.twice"})
    assert slime_packed.convert(rewards, samples)["rewards"] == [2.0] * len(BATCH)


def twice(args: Namespace, samples: list[Any]) -> tuple[list[float], list[float]]:
    return [sample.reward for sample in samples], [2 * sample.reward for sample in samples]


def test_tokens_that_teach_need_routes(here: Here) -> None:
    one = BATCH[2]
    for end, mask in ((0, None), (11, None), (11, [0] * 11 + [1]), (5, [0, 0, 0, 0, 0, 1] + [0] * 6)):
        sample = here.types.Sample(tokens=one.tokens, response_length=12, loss_mask=mask, reward=0.0, index=1)
        sample.rollout_routed_experts = one.masks(end=end) if end else None
        last = 12 if mask is None else mask.index(1) + 1
        with pytest.raises(DataError, match=rf"teaches its token {last}, and has routes of {end} of the {last} tokens"):
            slime_packed.convert(ARGS, [sample])
        sample.rollout_routed_experts = one.masks(end=last)
        slime_packed.convert(ARGS, [sample])


def test_samples_that_teach_nothing_need_no_routes(here: Here) -> None:
    removed = here.types.Sample(tokens=[1, 2, 3], response_length=2, remove_sample=True, reward=0.0, index=1)
    masked = here.types.Sample(tokens=[1, 2, 3], response_length=2, loss_mask=[0, 0], reward=0.0, index=2)
    data = slime_packed.convert(ARGS, [removed, masked])
    assert [masks_of(each) for each in data[KEY]] == [None, None]


def test_samples_whose_tokens_were_changed_are_refused(here: Here) -> None:
    cut = here.sample(BATCH[2])
    cut.tokens, cut.response_length, cut.loss_mask = cut.tokens[:8], 7, [1] * 7
    with pytest.raises(PairingError, match="the sequence has only 8 tokens"):
        slime_packed.convert(ARGS, [cut])
    cut.rollout_routed_experts = cut.rollout_routed_experts.cut(8, BATCH[2].tokens)
    here.fill(here.rollout_data(slime_packed.convert(ARGS, [cut])), [[0]])


def test_arrays_of_experts_are_refused(here: Here) -> None:
    sample = here.types.Sample(tokens=[1, 2, 3], response_length=2, reward=0.0, index=1)
    sample.rollout_routed_experts = torch.zeros(2, NUM_LAYERS, TOP_K, dtype=torch.int32)
    with pytest.raises(DataError, match="routes that are a Tensor, where RoutingMasks belong"):
        slime_packed.convert(ARGS, [sample])
    with pytest.raises(DataError, match=r"an array int32 \[2, 4, 4\], where packed rows belong"):
        here.fill({"tokens": [torch.tensor([1, 2, 3])], KEY: [sample.rollout_routed_experts]}, [[0]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"geometry": RoutingGeometry(NUM_LAYERS, MOE_LAYERS, NUM_EXPERTS + 1, TOP_K)}, "17 experts"),
        ({"token_ids": list(range(9))}, "masks of sequence 0"),
    ],
)
def test_routes_of_another_model_or_other_tokens_are_refused(here: Here, changes: dict[str, Any], message: str) -> None:
    container = torch.from_numpy(np.array(container_of(BATCH[0].masks(**changes))))
    with pytest.raises(PairingError, match=message):
        here.fill({"tokens": [torch.tensor(BATCH[0].tokens)], KEY: [container]}, [[0]])


def test_a_layer_that_does_not_route_is_refused(here: Here) -> None:
    tokens = [torch.tensor(BATCH[0].tokens)]
    container = container_of(BATCH[0].masks())
    packed = slime_packed._packed.microbatch([container], tokens, torch.arange(1, 9))
    with pytest.raises(PairingError, match="decoder layer 0 has no routes"):
        packed[:, 0]
    with pytest.raises(InputError, match=r"give \[:, layer\]"):
        packed[1:, 1]


def test_rows_are_on_the_device_for_one_microbatch_at_a_time(here: Here) -> None:
    data = here.rollout_data(slime_packed.convert(ARGS, [here.sample(one) for one in BATCH]))
    here.fill(data, [[0, 1], [2, 3]])
    slot = slime_packed._packed._on_device
    (first, second), (of_next_layer, *_), *_ = here.queues()
    there = []
    for layer in (first, of_next_layer, second, first):
        layer.materialize_for_routing_replay("forward")
        there.append(slot._there)
    assert there[0] is there[1] and there[2] is not there[1] and there[3] is not there[2]
    host = weakref.ref(first.microbatch.routes)
    del first, second, of_next_layer, layer, there, _
    here.stack.forget()
    gc.collect()
    assert host() is None
    assert slot._there is None


def test_one_line_at_the_start(bare: Here, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("SGLANG_ROUTER_CAPTURE", "1")
    monkeypatch.delenv("SGLANG_ROUTER_CAPTURE_FORMAT", raising=False)
    with caplog.at_level(logging.INFO):
        slime_packed.init(ARGS)
        slime_packed.init(ARGS)
    wrapped = bare.actor.prepare_routed_experts_for_routing_replay
    for _ in range(2):
        remove(slime_packed.PATCHES)
    assert bare.actor.prepare_routed_experts_for_routing_replay is wrapped.__wrapped__
    assert not hasattr(wrapped.__wrapped__, "__wrapped__")
    lines = [each.getMessage() for each in caplog.records if each.name.startswith("router_replay_adapters")]
    assert len(lines) == 2
    assert lines[0].startswith("router_replay_adapters.slime_packed is on (slime, with packed rows")


def test_what_does_not_fit_stops_the_start(bare: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match="none of this model's 4 decoder layers routes"):
        slime_packed.init(Namespace(**{**vars(ARGS), "num_experts": None}))

    def other(experts: object, tokens: object) -> None: ...

    monkeypatch.setattr(bare.actor, "prepare_routed_experts_for_routing_replay", other)
    with pytest.raises(SeamError, match=r"prepare_routed_experts_for_routing_replay: expected parameters"):
        slime_packed.init(ARGS)
    remove(slime_packed.slime.PATCHES)
    monkeypatch.setattr(bare.types.Sample, "append_response_tokens", other)
    with pytest.raises(SeamError, match=r"Sample.append_response_tokens: expected parameters"):
        Patch(slime_packed.SAMPLES, "Sample.append_response_tokens", slime_packed.around_append_response_tokens).apply()
