"""Sampling-mask replay: the trainer normalises over the tokens that the sampler's top-p and top-k left."""

from __future__ import annotations

import torch
from torch import Tensor

from router_replay.errors import InputError
from router_replay.mismatch.arguments import require_tensors
from router_replay.mismatch.segments import Segments

_PLACES = 800_000
"""Places of rows of which copies in float64 are in memory at a time, on the CPU; 32 times as many on a GPU.

Copies of many more would be given back to the system, and asked for anew, each time.
"""
_HEAD = 256
"""How many of the most probable tokens are ordered at first: more than top-p leaves of most distributions."""
_BITS = 12
"""A histogram of the logits has 2^12 bins, and so has that of one of its bins."""
_REACH = 64.0
"""Nats below the highest logit that the histogram tells apart: what is below has no probability to speak of."""


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

    Temperature comes first, as in the sampler: divide the logits by it before. It waits for the device once.

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
    truncated = (kept_ids >= 0).any(-1)
    missing = torch.zeros_like(truncated)
    if sampled_ids is not None:
        require_tensors(sampled_ids=sampled_ids)
        if sampled_ids.shape != logits.shape[:-1]:
            raise InputError(f"sampled ids {list(sampled_ids.shape)} must be {list(logits.shape[:-1])}")
        missing = truncated & ~(kept_ids == sampled_ids[..., None]).any(-1)
    outside = ((kept_ids < -1) | (kept_ids >= vocab_size)).any()
    # One transfer from the device.
    any_outside, any_missing = torch.stack([outside, missing.any()]).tolist()
    if any_outside:
        raise InputError(
            f"kept ids must be in [0, {vocab_size}), or -1, and go from {int(kept_ids.min())} to {int(kept_ids.max())}:"
            " another tokenizer, or logits of one tensor-parallel rank, for which vocab_size is to be given"
        )
    if any_missing and sampled_ids is not None:
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

    Where many are kept, the least probable of them is looked for in histograms, and none but its like are ordered: a
    row costs some passes over it, however many it keeps. It waits for the device, since the result's shape hangs on it.

    Args:
        logits: `[..., V]`, after temperature.
        top_k: at least 1; None for all.
        top_p: in (0, 1]; None for 1.

    Returns:
        int64 `[..., K]` with the kept ids, rising, filled up with -1 on the right.

    Raises:
        InputError: settings out of range, or logits that hold NaN or +inf.
    """
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise InputError(f"top_k must be at least 1 and top_p in (0, 1], got {top_k} and {top_p}")
    require_tensors(logits=logits)
    vocab = logits.shape[-1]
    rows = logits.detach().reshape(-1, vocab)
    places = _PLACES * (1 if rows.device.type == "cpu" else 32)
    size, width = max(1, places // max(vocab, 1 << _BITS)), min(top_k or vocab, vocab)
    kept = [_kept(block, width, 1.0 if top_p is None else top_p) for block in rows.split(size) if len(block)]
    longest = max((block.shape[-1] for block in kept), default=1)
    found = torch.full((len(rows), longest), -1, device=rows.device)
    for block, ids in zip(found.split(size), kept, strict=False):
        block[:, : ids.shape[-1]] = ids
    return found.view(*logits.shape[:-1], longest)


def _kept(rows: Tensor, width: int, top_p: float) -> Tensor:
    """Of a few rows `[R, V]`, of which top-k leaves `width`; int64 `[R, K]`, with a K of their own."""
    highest = rows.amax(-1, keepdim=True)
    if bool((highest.isnan() | (highest == torch.inf)).any()):
        raise InputError("logits hold NaN or +inf: they are of no distribution")
    if width == rows.shape[-1]:
        return _ids(_nucleus(rows, highest, top_p))
    ids = _largest(rows, width)
    if top_p == 1:
        return ids
    values = rows.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)
    among = _ids(_nucleus(values, highest, top_p))
    return ids.gather(-1, among.clamp(min=0)).masked_fill(among < 0, -1)


def _largest(rows: Tensor, width: int) -> Tensor:
    """Ids of the `width` largest above -inf of each row, of equal ones the lower ids; rising, filled up with -1."""
    # One more shows whether the last of them has its like among those that are left out.
    values, ids = rows.topk(width + 1, dim=-1)
    last = values[:, width - 1, None]
    if not bool((values[:, width:] == last).any() | (last == -torch.inf).any()):
        return ids[:, :width].sort(-1).values
    like = rows == last
    lacking = width - (rows > last).sum(-1, keepdim=True)
    return _ids(((rows > last) | (like & (like.cumsum(-1) <= lacking))) & (rows > -torch.inf))


def _nucleus(rows: Tensor, highest: Tensor, top_p: float) -> Tensor:
    """What top-p keeps of rows `[R, V]`, whose largest values are `highest` `[R, 1]`; bool `[R, V]`.

    The kept are all that is before the first bin at which probabilities, added up from the most probable on, reach
    top_p; of that bin all that is before the first of *its* bins; and of this one what order says.
    """
    if top_p == 1:
        return rows > -torch.inf
    # In float64: in float32 a long tail adds up to 1 before it ends. A row of nothing but -inf has no highest.
    below = rows.double() - highest.double().masked_fill(highest == -torch.inf, 0)
    weights = below.exp()
    limit = top_p * weights.sum(-1)
    if (kept := _nucleus_in_head(rows, highest, limit)) is not None:
        return kept
    spread = (-below.amin(-1, keepdim=True)).clamp(1e-300, _REACH)
    num_bins, num_fine = 1 << _BITS, 1 << 2 * _BITS
    fine = below.mul_(-num_fine / spread).clamp_(max=num_fine - 1).to(torch.int32)
    row = torch.arange(len(rows), device=rows.device)
    cell = (fine >> _BITS).add_((num_bins * row[:, None]).int())
    before = _sums(cell.flatten(), weights.flatten(), len(rows))
    last = _reached(before, limit)
    edge = (num_bins * row + last).int()[:, None]
    kept = cell < edge
    at = (cell == edge).flatten().nonzero()[:, 0]
    flat, row = kept.view(-1), at // rows.shape[-1]

    weight, within = weights.flatten()[at], fine.flatten()[at] % num_bins
    ahead = before.gather(1, last[:, None])
    before = ahead + _sums(num_bins * row + within, weight, len(rows))
    last = _reached(before, limit)
    flat[at[within < last[row]]] = True

    there = within == last[row]
    at, row, weight = at[there], row[there], weight[there]
    values = rows.flatten()[at]
    order = values.argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]
    at, row, weight, values = at[order], row[order], weight[order], values[order]
    of_row = Segments(row, torch.zeros_like(last).index_add_(0, row, torch.ones_like(row)))
    already = before.gather(1, last[:, None])[row, 0] + of_row.running_sum(weight) - weight
    flat[at[(already < limit[row]) & (values > -torch.inf)]] = True
    return kept


def _nucleus_in_head(rows: Tensor, highest: Tensor, limit: Tensor) -> Tensor | None:
    """As of `_nucleus`, if it is so small in every row that a few of the largest show it, as it mostly is."""
    # No weight is above 1.
    if bool((limit > _HEAD).any()):
        return None
    values, ids = rows.topk(min(_HEAD, rows.shape[-1]), dim=-1)
    weights = (values.double() - highest.double()).exp()
    kept = weights.cumsum(-1) - weights < limit[:, None]
    # One is left out in the head, and is less than all that are kept.
    ends = kept[:, :-1] & ~kept[:, 1:] & (values[:, :-1] > values[:, 1:])
    if not bool(ends.any(-1).all()):
        return None
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, ids, kept)


def _sums(cell: Tensor, weights: Tensor, num_rows: int) -> Tensor:
    """Weights before each bin of each row, `[R, bins]`, of items in cells `bins * row + bin`."""
    sums = weights.new_zeros(num_rows << _BITS).index_add_(0, cell, weights).view(num_rows, -1).cumsum(-1)
    return torch.nn.functional.pad(sums[:, :-1], (1, 0))


def _reached(before: Tensor, limit: Tensor) -> Tensor:
    """The last bin before which the limit is not reached, int64 `[R]`."""
    return ((before < limit[:, None]).sum(-1) - 1).clamp(min=0)


def _ids(kept: Tensor) -> Tensor:
    """Where `[R, V]` holds, rising, filled up with -1 to the longest row; int64 `[R, K]`."""
    counts = kept.sum(-1, keepdim=True)
    longest = max(int(counts.max()), 1)
    place = torch.arange(longest, device=kept.device)
    begin = kept.shape[-1] * torch.arange(len(kept), device=kept.device)[:, None]
    ids = torch.full((len(kept), longest), -1, device=kept.device)
    return ids.masked_scatter_(place < counts, kept.flatten().nonzero()).sub_(begin).clamp_(min=-1)
