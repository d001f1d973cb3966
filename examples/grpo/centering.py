"""Score centering in the loop: the sampler's top-k beside the tokens, the trainer's log-probabilities of both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from cpu_engines.megatron.logprobs import (
    forward_logits,
    token_entropies,
    token_logprobs,
    token_logprobs_and_entropies,
)
from examples.multi_turn_replay.rollout import Conversation
from router_replay.mismatch import Responses, SamplerTopK, logprobs_at, masked_weight, truncated_weight

RULES = {"none": None, "TIS": truncated_weight, "MIS": masked_weight}
"""What each correction makes of one ratio: as the loss weighs a sampled token, centering weighs any."""


def top_k_of(played: Sequence[Conversation], responses: Responses, count: int, vocab_size: int) -> SamplerTopK | None:
    """Of conversations that are padded as `responses` are; None where none was asked for.

    Raises:
        router_replay.errors.InputError: as of `SamplerTopK.of`.
    """
    if count == 0:
        return None
    shape = (*responses.mask.shape, count)
    ids, logprobs = torch.full(shape, -1), torch.zeros(shape)
    for row, each in enumerate(played):
        places = torch.tensor(each.sampled).nonzero()[:, 0]
        pairs = torch.tensor(each.top_k, dtype=torch.float64).view(len(places), count, 2)
        logprobs[row, places], ids[row, places] = pairs[..., 0].float(), pairs[..., 1].long()
    device = responses.mask.device
    return SamplerTopK.of(
        token_ids=ids.to(device), logprobs=logprobs.to(device), responses=responses, vocab_size=vocab_size
    )


def logprobs_with_top_k(model: GPTModel, token_ids: Tensor, top_k: SamplerTopK | None) -> Tensor:
    """Of each token, and of the sampler's top-k in its place, given those before it: `[B, S, 1 + K]`."""
    if top_k is None:
        return token_logprobs(model, token_ids)[..., None]
    return _of_logits(forward_logits(model, token_ids), token_ids, top_k)


def scores_with_top_k(model: GPTModel, token_ids: Tensor, top_k: SamplerTopK | None) -> tuple[Tensor, Tensor]:
    """The same from one forward pass, and `[B, S]` entropies of the distributions that the tokens are drawn from."""
    if top_k is None:
        logprobs, entropies = token_logprobs_and_entropies(model, token_ids)
        return logprobs[..., None], entropies
    logits = forward_logits(model, token_ids)
    return _of_logits(logits, token_ids, top_k), token_entropies(logits)


def _of_logits(logits: Tensor, token_ids: Tensor, top_k: SamplerTopK) -> Tensor:
    ids = torch.cat([token_ids[..., None], top_k.token_ids], -1)
    # A place's logits are of the token behind it, and the last one's of none.
    following = torch.nn.functional.pad(ids[:, 1:], (0, 0, 0, 1), value=-1)
    return torch.nn.functional.pad(logprobs_at(logits, following)[:, :-1], (0, 0, 1, 0))
