"""Conversations as a rollout by the model itself would have given them, without a server."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from cpu_engines.megatron.logprobs import forward_logits
from examples.calculator.game import problems, reference_pieces
from examples.multi_turn_replay.rollout import Conversation
from megatron_router_replay import BatchLayout, Replay
from router_replay.masks import RoutingMasks
from router_replay.replay import join_parts


def own_conversations(
    model: torch.nn.Module,
    replay: Replay,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    group_size: int,
    *,
    top_k: int = 0,
    noise: float = 0.0,
) -> list[Conversation]:
    """Reference conversations whose routes and log-probabilities are the model's own; every second one is rewarded.

    Args:
        top_k: most probable tokens to keep at each sampled one.
        noise: of the logits, another for each response, of which they and the sampled ones' log-probabilities are.
    """
    generator = torch.Generator().manual_seed(11)
    found: list[Conversation] = []
    for number, problem in enumerate(itertools.islice(problems("train", 5), count // group_size)):
        pieces = [(tokenizer.encode(text, add_special_tokens=False), own) for text, own in reference_pieces(problem)]
        ids = [token for piece, _ in pieces for token in piece]
        sampled = [own for piece, own in pieces for _ in piece]
        token_ids = torch.tensor([ids])
        layout = BatchLayout.padded(token_ids, [len(ids)])
        with torch.no_grad(), replay.record(layout) as recorded:
            logits = forward_logits(model, token_ids)[0].float()
        places = [place for place, own in enumerate(sampled) if own]
        (masks,) = join_parts([recorded.part()])
        for response in range(group_size):
            rollout = (logits + noise * torch.randn(logits.shape, generator=generator)).log_softmax(-1)
            best = rollout[torch.tensor(places) - 1].topk(top_k, -1)
            logprobs = [0.0, *rollout[:-1].gather(-1, token_ids[0, 1:, None])[:, 0].tolist()]
            found.append(
                Conversation(
                    token_ids=ids,
                    sampled=sampled,
                    rollout_logprobs=logprobs,
                    masks=masks.cut(len(ids) - 1, ids),
                    num_turns=1,
                    correct=(number + response) % 2 == 0,
                    prefix_cached_tokens=0,
                    masks_bytes=0,
                    top_k=[list(zip(*each, strict=True)) for each in zip(*map(torch.Tensor.tolist, best), strict=True)],
                )
            )
    return found


def with_masks(conversations: Sequence[Conversation], seed: int) -> list[Conversation]:
    """The same with the experts of each token and layer at random."""
    generator = torch.Generator().manual_seed(seed)
    changed = []
    for each in conversations:
        geometry = each.masks.geometry
        shape = (each.masks.num_tokens, geometry.num_moe_layers, geometry.num_experts)
        masks = RoutingMasks.from_indices(
            torch.rand(shape, generator=generator).argsort(-1)[..., : geometry.top_k],
            torch.ones(each.masks.num_tokens, dtype=torch.bool),
            start=0,
            geometry=geometry,
            codec="auto",
            token_ids=each.token_ids,
        )
        changed.append(Conversation(**{**vars(each), "masks": masks}))
    return changed
