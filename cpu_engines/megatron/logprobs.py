"""Log-probabilities of given tokens from a Megatron GPTModel, for padded and packed batches."""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


def forward_logits(model: GPTModel, token_ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Logits `[B, S, V]` of `token_ids [B, S]`, every token attending to those before it in its sequence.

    Args:
        token_ids: int64. Padding goes behind a sequence, where causal attention keeps it unseen.
        cu_seqlens: bounds `int32 [N + 1]` of N sequences packed into `token_ids [1, T]`, from 0 to T; needs a
            model whose core attention supports packed batches.
    """
    length = token_ids.shape[1]
    packed = None
    if cu_seqlens is not None:
        longest = int(cu_seqlens.diff().max())
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
    position_ids = torch.arange(length, device=token_ids.device).expand_as(token_ids)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=token_ids.device).triu(1)
    return model(token_ids, position_ids, mask, packed_seq_params=packed)


def token_logprobs(
    model: GPTModel, token_ids: Tensor, cu_seqlens: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """Log-probability of each token given those before it, in nats.

    Args:
        token_ids, cu_seqlens: as in `forward_logits`.
        temperature: divides the logits, as the sampler of the rollout did.

    Returns:
        float `[B, S]` in at least float32: place t holds the log-probability of token t. The first token of every
        sequence has none, and holds 0; a padding token's value has no meaning.
    """
    logits = forward_logits(model, token_ids, cu_seqlens)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    chosen = wide[:, :-1].log_softmax(-1).gather(-1, token_ids[:, 1:, None]).squeeze(-1)
    logprobs = torch.nn.functional.pad(chosen, (1, 0))
    if cu_seqlens is None:
        return logprobs
    first = torch.zeros_like(logprobs, dtype=torch.bool)
    first[0, cu_seqlens[:-1].long()] = True
    return logprobs.masked_fill(first, 0.0)
