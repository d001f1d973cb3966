"""Sampling-mask replay: the trainer normalises over the tokens that the sampler's top-p and top-k left."""

from __future__ import annotations

import torch
from torch import Tensor

from router_replay.errors import InputError
from router_replay.mismatch.responses import require_tensors


def apply_sampling_mask(
    logits: Tensor,
    kept_ids: Tensor,
    sampled_ids: Tensor | None = None,
    *,
    vocab_start: int = 0,
    vocab_size: int | None = None,
) -> Tensor:
    """The trainer's logits with -inf for every token that the sampler had cut off.

    With truncated sampling the rollout's policy is renormalised over the tokens that top-p or top-k kept, while the
    trainer normalises over the whole vocabulary: its ratio is off by the mass that was cut off, for every token, even
    with equal weights. Source: DeepSeek-V3.2 (arXiv 2512.02556), section 3.1, "keep sampling mask". Rollout
    log-probabilities must be those of the truncated distribution (vLLM: `logprobs_mode=processed_logprobs`).

    Temperature comes first, as in the sampler: divide the logits by it before.

    Args:
        logits: float `[..., V]`; of one tensor-parallel rank, `[..., V / TP]` with its `vocab_start` and the whole
            `vocab_size`, for Megatron's vocabulary-parallel cross entropy. A bool of this shape is made beside them.
        kept_ids: int `[..., K]`, ids of the whole vocabulary, filled up with -1, from the engine or from
            `kept_token_ids`; where there is nothing but -1, nothing was cut off and all are kept.
        sampled_ids: int `[...]`; if given, each has to be among its row's kept ids.
        vocab_start: id of the first column of `logits`.
        vocab_size: of the whole vocabulary; by default `logits` hold all of it.

    Returns:
        The same shape and dtype; gradients flow to the kept logits only.

    Raises:
        InputError: shapes that do not fit, or a sampled token that its own mask excludes.
    """
    require_tensors(logits=logits, kept_ids=kept_ids)
    if kept_ids.shape[:-1] != logits.shape[:-1]:
        raise InputError(f"kept ids {list(kept_ids.shape)} must be {list(logits.shape[:-1])} and a list of ids")
    vocab_size = logits.shape[-1] if vocab_size is None else vocab_size
    if bool(((kept_ids < -1) | (kept_ids >= vocab_size)).any()):
        raise InputError(
            f"kept ids must be in [0, {vocab_size}), or -1, and go from {int(kept_ids.min())} to {int(kept_ids.max())}:"
            " another tokenizer, or logits of one tensor-parallel rank, for which vocab_size is to be given"
        )
    truncated = (kept_ids >= 0).any(-1)
    if sampled_ids is not None:
        require_tensors(sampled_ids=sampled_ids)
        if sampled_ids.shape != logits.shape[:-1]:
            raise InputError(f"sampled ids {list(sampled_ids.shape)} must be {list(logits.shape[:-1])}")
        missing = truncated & ~(kept_ids == sampled_ids[..., None]).any(-1)
        if bool(missing.any()):
            place = missing.nonzero()[0].tolist()
            raise InputError(
                f"{int(missing.sum())} sampled tokens are not among the tokens that their sampling mask kept; the"
                f" first is token {int(sampled_ids[tuple(place)])} at {place}: mask and tokens are of different"
                " requests or positions"
            )
    column = kept_ids - vocab_start
    here = (kept_ids >= 0) & (column >= 0) & (column < logits.shape[-1])
    # One column more than the vocabulary takes what is not of this rank.
    kept = torch.zeros(*logits.shape[:-1], logits.shape[-1] + 1, dtype=torch.bool, device=logits.device)
    kept.scatter_(-1, column.masked_fill(~here, logits.shape[-1]), True)
    cut = kept[..., :-1].logical_or_(~truncated[..., None]).logical_not_()
    return logits.masked_fill(cut, -torch.inf)


def kept_token_ids(logits: Tensor, *, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Ids that top-k and then top-p keep, as a sampler would: for engines that return logits and no mask.

    top-p keeps the most probable tokens up to and including the one with which their probability, renormalised over
    what top-k left, reaches top_p (Holtzman et al., arXiv 1904.09751). Ties go to the lower id; engines
    differ in that, and some apply both to the untruncated distribution, so prefer the engine's own mask.

    Args:
        logits: `[..., V]`, after temperature.
        top_k: at least 1; None for all.
        top_p: in (0, 1]; None for 1.

    Returns:
        int64 `[..., K]` with the kept ids from most to least probable, filled up with -1 on the right.

    Raises:
        InputError: settings out of range.
    """
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise InputError(f"top_k must be at least 1 and top_p in (0, 1], got {top_k} and {top_p}")
    ordered, ids = torch.sort(logits.detach().double(), descending=True, stable=True, dim=-1)
    width = min(top_k or logits.shape[-1], logits.shape[-1])
    ordered, ids = ordered[..., :width], ids[..., :width]
    kept = ordered > -torch.inf
    if top_p is not None and top_p < 1:
        probs = ordered.softmax(-1)
        # In float64: in float32 a long tail adds up to 1 before it ends.
        kept &= probs.cumsum(-1) - probs < top_p
    return ids.masked_fill(~kept, -1)[..., : max(int(kept.sum(-1).max()), 1)]
