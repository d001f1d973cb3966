"""SGLang's real server records, Megatron's real layers replay."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from cpu_engines.megatron import CpuDevice, single_process
from cpu_engines.megatron.logprobs import token_logprobs
from cpu_engines.megatron.qwen3_moe import load_qwen3_moe
from cpu_engines.sglang.server import Server
from examples.calculator.game import problems
from examples.multi_turn_replay.replay_report import compare, summarize
from examples.multi_turn_replay.rollout import Conversation, play
from examples.multi_turn_replay.trainer_scores import score
from megatron_router_replay import BatchLayout, attach
from router_replay.errors import PairingError
from router_replay.masks import RoutingMasks, get_codec, masks_from_meta_info
from tests.megatron_router_replay.batches import dispatched_maps
from tests.megatron_router_replay.router_gradient import LayerProbe, assert_gradient_is_the_formula

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def conversations(capture_server: Server, small_model: Path) -> list[Conversation]:
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    return play(capture_server.url, list(islice(problems("held_out", 3), 12)), tokenizer, concurrency=6)


@pytest.fixture(scope="module")
def model(small_model: Path) -> Iterator[torch.nn.Module]:
    with CpuDevice(), single_process():
        yield load_qwen3_moe(small_model).eval()


def _batch(conversations: list[Conversation]) -> tuple[torch.Tensor, BatchLayout, list[RoutingMasks]]:
    sequences = [torch.tensor(each.token_ids) for each in conversations]
    token_ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    layout = BatchLayout.padded(token_ids, [len(sequence) for sequence in sequences])
    return token_ids, layout, [each.masks for each in conversations]


def test_conversations_hit_the_prefix_cache_and_lack_one_row_each(conversations: list[Conversation]) -> None:
    assert all(each.num_turns >= 2 and each.prefix_cached_tokens > 0 for each in conversations)
    for each in conversations:
        assert (each.masks.start, each.masks.end) == (0, len(each.token_ids) - 1)
        assert each.masks.valid.all()


def test_routing_map_is_the_recorded_one_in_every_layer(
    conversations: list[Conversation], model: torch.nn.Module
) -> None:
    token_ids, layout, masks = _batch(conversations)
    with torch.no_grad(), dispatched_maps(model) as maps, attach(model) as replay:
        with replay.off():
            token_logprobs(model, token_ids)
        with replay.microbatch(masks, layout) as routes:
            token_logprobs(model, token_ids)
    assert routes.num_replayed == sum(each.num_tokens for each in masks)
    # The last token of each conversation was never fed back: its place takes any experts, as padding does.
    assert routes.num_native == 0
    assert routes.num_padding == int(layout.is_padding.sum()) + len(conversations)
    assert sorted(maps) == list(masks[0].geometry.moe_layers)
    places = layout.by_sequence(layout.of_tokens(torch.arange(layout.num_places), -1))
    differing = 0
    for layer_index, layer in enumerate(masks[0].geometry.moe_layers):
        native_map, replayed_map = maps[layer]
        for each, here in zip(masks, places, strict=True):
            recorded = get_codec(each.codec).unpack_bitset(each.rows, each.geometry, layer_index)
            assert torch.equal(replayed_map[here[:-1]], recorded)
            # The last sampled token has no row: the trainer's own choice, which is never empty.
            assert int(replayed_map[here[-1]].sum()) == each.geometry.top_k
            differing += int((native_map[here[:-1]] != recorded).any(-1).sum())
    # Without replay some routes differ: the comparison above is not one of the trainer with itself.
    assert differing > 0


def test_the_readmes_trainer_lines_run_as_they_stand(capture_server: Server, model: torch.nn.Module) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    prompts = [[5, 6, 7, 8, 9], [9, 8, 7]]
    answers = [capture_server.generate(ids, 4, return_routed_experts=True, return_logprob=True) for ids in prompts]
    sequences = [
        torch.tensor([*ids, *(token for _, token, *_ in answer["meta_info"]["output_token_logprobs"])])
        for ids, answer in zip(prompts, answers, strict=True)
    ]
    token_ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    width = token_ids.shape[1]
    batch = {
        "answers": answers,
        "token_ids": token_ids,
        "lengths": [len(each) for each in sequences],
        "position_ids": torch.arange(width).expand_as(token_ids),
        "attention_mask": torch.ones(1, 1, width, width, dtype=torch.bool).triu(1),
    }
    namespace = {"model_chunks": model, "loss_func": lambda batch, output: batch}
    exec(compile(block, "README.md", "exec"), namespace)
    with namespace["replay"], torch.no_grad(), dispatched_maps(model) as maps:
        logits, loss_func = namespace["forward_step"](iter([batch]), model)
    assert loss_func(logits) is batch
    assert logits.shape[:2] == token_ids.shape
    masks = masks_from_meta_info(answers[1]["meta_info"])
    for layer_index, layer in enumerate(masks.geometry.moe_layers):
        recorded = masks.indices()[:, layer_index].tolist()
        # Places of sequence 1 of 2 in Megatron's flattened [S, B, H].
        taken = [set(maps[layer][0][2 * position + 1].nonzero().flatten().tolist()) for position in range(len(masks))]
        assert taken == [set(experts) for experts in recorded]


def test_router_gradient_under_a_real_rollouts_masks(conversations: list[Conversation], model: torch.nn.Module) -> None:
    token_ids, layout, masks = _batch(conversations[:4])
    layers = masks[0].geometry.moe_layers
    probes = [LayerProbe(model.decoder.layers[layer].mlp) for layer in layers]
    model.zero_grad()
    with attach(model) as replay, replay.microbatch(masks, layout):
        logprobs = token_logprobs(model, token_ids)
    sampled = torch.zeros_like(logprobs)
    for row, each in zip(sampled, conversations[:4], strict=True):
        row[: len(each.sampled)] = torch.tensor(each.sampled)
    (logprobs * sampled).sum().backward()
    for probe in probes:
        probe.close()
        # A float32 model adds up a few hundred rows on either side of the router: 1e-4 is n * eps for n = 800.
        assert_gradient_is_the_formula(probe, 1e-4)


def test_replay_brings_the_trainer_closer_to_the_rollout(
    conversations: list[Conversation], model: torch.nn.Module
) -> None:
    scores = score(model, conversations)
    figures = summarize(
        conversations, compare(conversations, scores.native_logprobs, scores.replay_logprobs, scores.native_routes)
    )
    assert figures["kl_k3"]["replay"] < figures["kl_k3"]["native"]
    assert figures["route_mismatch"]["rows"] > 0
    assert figures["invalid_rows"] == len(conversations)
    assert figures["bytes_per_token"]["masks"] < figures["bytes_per_token"]["sglang_base64"]


def test_masks_of_another_conversation_are_refused(conversations: list[Conversation], model: torch.nn.Module) -> None:
    # Shorter masks than the sequence would be in order, were they its own.
    shorter, longer = sorted(conversations, key=lambda each: len(each.token_ids))[:: len(conversations) - 1]
    _, layout, _ = _batch([longer])
    with (
        attach(model) as replay,
        pytest.raises(PairingError, match="pair each sequence with its own masks"),
        replay.microbatch([shorter.masks], layout),
    ):
        pass
