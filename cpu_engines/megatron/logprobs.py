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
    distributions = _log_distributions(forward_logits(model, token_ids, cu_seqlens), temperature)
    return _at_their_tokens(_chosen(distributions, token_ids), cu_seqlens)


def token_logprobs_and_entropies(
    model: GPTModel, token_ids: Tensor, cu_seqlens: Tensor | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The same from one forward pass, and the entropies in nats of the distributions that the tokens are drawn from.

    Returns:
        Both as of `token_logprobs`.
    """
    distributions = _log_distributions(forward_logits(model, token_ids, cu_seqlens), temperature)
    chosen, entropies = _chosen(distributions, token_ids), _entropies(distributions)
    return _at_their_tokens(chosen, cu_seqlens), _at_their_tokens(entropies, cu_seqlens)


def token_entropies(logits: Tensor, cu_seqlens: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """The entropies of `token_logprobs_and_entropies`, from `forward_logits`."""
    return _at_their_tokens(_entropies(_log_distributions(logits, temperature)), cu_seqlens)


def _log_distributions(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities `[B, S - 1, V]` of every next token, in at least float32."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return wide[:, :-1].log_softmax(-1)


def _chosen(distributions: Tensor, token_ids: Tensor) -> Tensor:
    return distributions.gather(-1, token_ids[:, 1:, None]).squeeze(-1)


def _entropies(distributions: Tensor) -> Tensor:
    return torch.special.entr(distributions.exp()).sum(-1)


def _at_their_tokens(of_next: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Values `[B, S - 1]` of next tokens at the places `[B, S]` of these; 0 at the first of every sequence."""
    values = torch.nn.functional.pad(of_next, (1, 0))
    if cu_seqlens is None:
        return values
    first = torch.zeros_like(values, dtype=torch.bool)
    first[0, cu_seqlens[:-1].long()] = True
    return values.masked_fill(first, 0.0)
