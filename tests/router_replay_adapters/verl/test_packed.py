"""Masks in verl's rollout and batches: cut, put end to end, padded, split and sent, and still the same."""

from __future__ import annotations

import asyncio
import inspect
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from router_replay.errors import DataError, InputError, PairingError
from router_replay.masks import RoutingGeometry, RoutingMasks, to_bytes
from router_replay_adapters.verl.packed import KEY, PackedRoutes, masks_of
from tests.megatron_router_replay.batches import Batch, random_batch

# isort: split
from verl.protocol import DataProto, pad_dataproto_to_divisor, unpad_dataproto
from verl.utils import tensordict_utils as tu
from verl.workers.utils.padding import left_right_2_no_padding

GEOMETRY = RoutingGeometry(num_layers=4, moe_layers=(1, 2, 3), num_experts=16, top_k=4)
LENGTHS = (12, 9, 5, 7)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return random_batch(GEOMETRY, LENGTHS, seed=1, codec="rank")


def ids_of(batch: Batch, sequence: int) -> np.ndarray:
    return batch.token_ids[sequence, : batch.lengths[sequence]].numpy()


def same(one: RoutingMasks | None, other: RoutingMasks | None) -> bool:
    if one is None or other is None:
        return one is other
    fields = ("start", "geometry", "codec", "weight_versions", "token_digest")
    return (
        torch.equal(one.rows, other.rows)
        and torch.equal(one.valid, other.valid)
        and all(getattr(one, name) == getattr(other, name) for name in fields)
    )


def all_same(found: Any, expected: Any) -> bool:
    return len(found) == len(expected) and all(map(same, found, expected))


def sent(masks: RoutingMasks | None) -> bytes | None:
    """What a sample of verl has of them."""
    return None if masks is None else to_bytes(masks)


@pytest.fixture
def data(batch: Batch) -> DataProto:
    """A batch as verl's agent loop makes it: prompts of 4 places padded on the left, responses on the right."""
    given = [sent(each) for each in batch.masks]
    given[2] = None
    masks = np.empty(len(given), dtype=object)
    masks[:] = given
    prompts, width = 4, 4 + 10
    input_ids, attention_mask = torch.zeros(2, len(given), width, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        prompt = min(prompts, length - 1) - row % 2
        first = prompts - prompt
        input_ids[row, first : first + length] = batch.token_ids[row, :length]
        attention_mask[row, first : first + length] = 1
    tensors = {
        "prompts": input_ids[:, :prompts],
        "responses": input_ids[:, prompts:],
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "response_mask": attention_mask[:, prompts:],
        "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),
    }
    return DataProto.from_dict(tensors=tensors, non_tensors={KEY: masks})


def masks_in(data: DataProto) -> list[RoutingMasks | None]:
    found = data.non_tensor_batch[KEY]
    assert found.dtype == object and found.shape == (len(data),)
    masks = masks_of(found)
    assert masks is not None
    return masks


def test_a_batch_is_padded_split_joined_and_sent(data: DataProto, batch: Batch) -> None:
    expected = [batch.masks[0], batch.masks[1], None, batch.masks[3]]
    padded, added = pad_dataproto_to_divisor(data, 3)
    assert added == 2 and all_same(masks_in(padded), [*expected, *expected[:2]])
    parts = [pickle.loads(pickle.dumps(part)) for part in padded.chunk(3)]
    assert [len(part) for part in parts] == [2, 2, 2]
    assert all_same(masks_in(parts[1]), expected[2:])
    joined = unpad_dataproto(DataProto.concat(parts), added)
    assert all_same(masks_in(joined), expected)
    assert all_same(masks_in(data.repeat(2, interleave=True)), [each for each in expected for _ in range(2)])
    assert all_same(masks_in(data[[3, 0]]), [expected[3], expected[0]])
    joined.reorder(torch.tensor([3, 2, 1, 0]))
    assert all_same(masks_in(joined), expected[::-1])


def test_what_the_trainers_ranks_get(data: DataProto, batch: Batch) -> None:
    """As the trainer sends a batch: a TensorDict without padding, in chunks, then microbatches of these."""
    expected = [batch.masks[0], batch.masks[1], None, batch.masks[3]]
    bare = left_right_2_no_padding(data.to_tensordict())
    chunks = [pickle.loads(pickle.dumps(chunk)) for chunk in tu.chunk_tensordict(bare, 2)]
    for chunk, of_chunk in zip(chunks, (expected[:2], expected[2:]), strict=True):
        assert all_same(masks_of(chunk.get(KEY)), of_chunk)
        for each, ids in zip(of_chunk, chunk["input_ids"].unbind(), strict=True):
            if each is not None:
                each.check_tokens(ids)
    whole = tu.concat_tensordict(chunks)
    assert all_same(masks_of(whole.get(KEY)), expected)
    picked = tu.index_select_tensor_dict(whole, [3, 1])
    assert all_same(masks_of(picked.get(KEY)), [expected[3], expected[1]])
    assert all_same(masks_of(picked.to("cpu").get(KEY)), [expected[3], expected[1]])
    assert masks_of(TensorDict({}, batch_size=[2]).get(KEY, None)) is None


def test_samples_of_the_other_trainer(batch: Batch) -> None:
    """It sends a list of samples' dictionaries, which become one TensorDict."""
    expected = [batch.masks[0], None, batch.masks[1]]
    joined = tu.list_of_dict_to_tensordict([{"input_ids": torch.arange(3), KEY: sent(each)} for each in expected])
    assert all_same(masks_of(joined.get(KEY)), expected)


def test_cut_to_what_is_left_of_a_sequence(batch: Batch) -> None:
    routes = PackedRoutes(batch.masks[0], ids_of(batch, 0))
    assert same(routes[:20].masks, batch.masks[0]) and same(routes[: len(routes)].masks, batch.masks[0])
    assert same(routes[:7].masks, batch.masks[0].cut(7, ids_of(batch, 0)))
    routes[:7].masks.check_tokens(ids_of(batch, 0)[:7])
    assert routes.numpy() is routes


def test_parts_of_a_resumed_rollout_are_put_end_to_end(batch: Batch) -> None:
    """As `FullyAsyncLLMServerClient.generate` does: the second answer has all rows, of which the new ones are taken."""
    whole, ids = batch.masks[0], ids_of(batch, 0)
    first = PackedRoutes(whole.cut(7, ids), ids[:8])
    second = PackedRoutes(whole, ids)
    found = np.concatenate([first, second[-4:]])
    assert isinstance(found, PackedRoutes) and same(found.masks, whole)
    found.masks.check_tokens(ids)
    with pytest.raises(PairingError, match="part 1 begins at"):
        np.concatenate([first, second[-3:]])
    with pytest.raises(TypeError):
        np.concatenate([np.zeros((2, 3, 4)), second])


def test_what_verl_does_not_do_is_refused(batch: Batch) -> None:
    routes = PackedRoutes(batch.masks[0], ids_of(batch, 0))
    for wrong in (3, slice(2, 5), slice(None, 5, 2), slice(-3, None, 2), slice(None, -1)):
        with pytest.raises(InputError, match="verl takes"):
            routes[wrong]
    with pytest.raises(PairingError, match="digest"):
        PackedRoutes(batch.masks[0], ids_of(batch, 0)[::-1].copy())


def test_something_else_in_a_batch_is_refused(batch: Batch) -> None:
    """Also masks themselves, which TransferQueue would make a dictionary."""
    for wrong, name in ((1, "int"), (batch.masks[0], "RoutingMasks"), ({}, "dict")):
        with pytest.raises(DataError, match=f"a batch of verl has a {name} under 'routing_masks'"):
            masks_of([None, sent(batch.masks[0]), wrong])
    with pytest.raises(DataError, match="truncated"):
        masks_of([to_bytes(batch.masks[0])[:-1]])


def test_a_sample_that_fills_up_a_batch_has_no_masks(batch: Batch) -> None:
    from verl.trainer.ppo import padding_utils

    import router_replay_adapters.verl  # noqa: F401

    source = {KEY: sent(batch.masks[0]), "position_ids": torch.arange(LENGTHS[0])}
    template, _ = padding_utils.construct_minimal_padding_template(source, {}, 0)
    assert template[KEY] is None and source[KEY] is not None
    bare, _ = padding_utils.construct_minimal_padding_template({"position_ids": torch.arange(LENGTHS[0])}, {}, 0)
    assert KEY not in bare
    stock, _ = inspect.unwrap(padding_utils.construct_minimal_padding_template)(source, {}, 0)
    assert stock[KEY] == source[KEY]


def test_they_go_through_a_sample(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput

    import router_replay_adapters.verl  # noqa: F401

    monkeypatch.setenv("SGLANG_ROUTER_CAPTURE", "1")
    ids = ids_of(batch, 0).tolist()
    output = AgentLoopOutput(
        prompt_ids=ids[:4],
        response_ids=ids[4:],
        response_mask=[1] * len(ids[4:]),
        routed_experts=PackedRoutes(batch.masks[0], ids_of(batch, 0))[: len(ids)],
        metrics=AgentLoopMetrics(),
    )
    found = output.as_dict()
    assert all_same(masks_of([found[KEY]]), [batch.masks[0]]) and "routed_experts" not in found
    assert output.routed_experts is not None
    whole = output.routed_experts
    output.routed_experts = whole[: len(ids) - 2]
    with pytest.raises(DataError, match=f"teaches its token {len(ids) - 1}, and has routes of {len(ids) - 2} of"):
        output.as_dict()
    output.routed_experts = None
    output.response_mask = [1] + [0] * len(ids[5:])
    with pytest.raises(DataError, match="sampled tokens and no routes"):
        output.as_dict()
    output.response_mask = [0] * len(ids[4:])
    assert output.as_dict()[KEY] is None
    output.routed_experts = np.zeros((3, 4, 4))
    with pytest.raises(DataError, match="routes that are a ndarray"):
        output.as_dict()
    assert KEY not in inspect.unwrap(AgentLoopOutput.as_dict)(output)


def test_they_go_through_padded_samples_into_a_batch(
    batch: Batch, worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput

    import router_replay_adapters.verl  # noqa: F401

    monkeypatch.setenv("SGLANG_ROUTER_CAPTURE", "1")
    expected: list[RoutingMasks | None] = [batch.masks[0], None, batch.masks[1]]
    padded = []
    for row, masks in zip((0, 2, 1), expected, strict=True):
        ids = ids_of(batch, row)
        output = AgentLoopOutput(
            prompt_ids=ids[:4].tolist(),
            response_ids=ids[4:].tolist(),
            response_mask=[int(masks is not None)] * len(ids[4:]),
            routed_experts=None if masks is None else PackedRoutes(masks, ids),
            metrics=AgentLoopMetrics(),
        )
        padded.append(asyncio.run(worker._agent_loop_postprocess(output, False, raw_prompt=[])))
        assert padded[-1].routed_experts is None
    joined = worker._postprocess(padded)
    assert "routed_experts" not in joined.batch and all_same(masks_in(joined), expected)


def test_masks_that_begin_later_are_not_cut_from_the_front(batch: Batch) -> None:
    routes = PackedRoutes(batch.masks[0], ids_of(batch, 0))
    assert same(routes[-20:].masks, batch.masks[0])
    later = routes[-4:]
    assert later.masks.start == len(routes) - 4
    with pytest.raises(InputError, match="verl takes"):
        later[:2]
    with pytest.raises(InputError, match="verl takes"):
        routes[4:]


def test_only_what_verl_does_is_answered_by_numpy(batch: Batch) -> None:
    routes = PackedRoutes(batch.masks[0], ids_of(batch, 0))
    for wrong in (
        lambda: np.stack([routes, routes]),
        lambda: np.concatenate([routes], axis=0),
        lambda: np.concatenate([routes], 0),
    ):
        with pytest.raises(TypeError):
            wrong()
