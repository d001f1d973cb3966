"""Log-probabilities of chosen tokens from logits over a vocabulary, at the cost of one copy of the logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from router_replay.errors import InputError
from router_replay.mismatch.arguments import require_tensors


def logprobs_at(
    logits: Tensor,
    token_ids: Tensor,
    *,
    vocab_start: int = 0,
    tensor_group: dist.ProcessGroup | None = None,
    chunk_tokens: int = 1024,
) -> Tensor:
    """Log-probabilities of several tokens at each place, normalised over the whole vocabulary.

    Beside the logits there is never more than their gradient, in their dtype, and a chunk of tokens in float32; a
    log-softmax and its gather hold three times as much. It does not wait for the device. Temperature comes first, as in
    the sampler: divide the logits by it before.

    Args:
        logits: float `[..., V]`, contiguous (others are copied); under tensor parallelism this rank's columns,
            `[..., V / TP]`.
        token_ids: int `[..., K]`, ids of the whole vocabulary, the sampled token's among them where it is wanted, too;
            -1 fills up rows.
        vocab_start: id of the first column of `logits`.
        tensor_group: the ranks that hold the other columns, each with the same `token_ids`. Every rank calls this, and
            has the same result; each has the gradient of its own columns, for a loss that all of them compute alike, as
            with Megatron's vocabulary-parallel cross entropy.
        chunk_tokens: places of which float32 copies are in memory at a time.

    Returns:
        `[..., K]`, at least float32, with a gradient to `logits`: 0 where the id is -1, and NaN, as is then the loss,
        where it is another one that no rank has.

    Raises:
        InputError: shapes that do not fit, or ids that are no integers.
    """
    require_tensors(logits=logits, token_ids=token_ids)
    if not logits.is_floating_point() or logits.dim() < 1 or token_ids.shape[:-1] != logits.shape[:-1]:
        raise InputError(
            f"token ids {list(token_ids.shape)} must be a list of ids for each row of the logits {list(logits.shape)},"
            f" which must be floating point, got {logits.dtype}"
        )
    if token_ids.is_floating_point() or token_ids.dtype == torch.bool:
        raise InputError(f"token ids must be integers, got {token_ids.dtype}")
    if chunk_tokens < 1:
        raise InputError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    flat = logits.reshape(-1, logits.shape[-1])
    ids = token_ids.reshape(len(flat), token_ids.shape[-1]).long()
    found = _LogprobsAt.apply(flat, ids, vocab_start, tensor_group, chunk_tokens)
    return found.view(token_ids.shape)


class _LogprobsAt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, vocab_start: int, group: dist.ProcessGroup | None, chunk: int
    ) -> Tensor:
        column = ids - vocab_start
        here = (ids >= 0) & (column >= 0) & (column < logits.shape[-1])
        column = column.masked_fill(~here, 0)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        picked, found = logits.gather(-1, column).to(dtype).masked_fill(~here, 0), here.to(dtype)
        highest = torch.cat([rows.amax(-1) for rows in logits.split(chunk)]).to(dtype)
        if group is not None:
            dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
        pairs = zip(logits.split(chunk), highest.split(chunk), strict=True)
        total = torch.cat([(rows.to(dtype) - by[:, None]).exp_().sum(-1) for rows, by in pairs])
        if group is not None:
            for summed in (total, picked, found):
                dist.all_reduce(summed, group=group)
        normalizer = total.log() + highest
        ctx.save_for_backward(logits, column, here, found, normalizer)
        ctx.chunk = chunk
        unknown = torch.where(ids == -1, 0.0, torch.nan).to(dtype)
        return torch.where(found > 0, picked - normalizer[:, None], unknown)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, column, here, found, normalizer = ctx.saved_tensors
        of_found = gradients[0].masked_fill(found == 0, 0)
        of_all, of_here = of_found.sum(-1, keepdim=True), of_found.masked_fill(~here, 0)
        gradient = torch.empty_like(logits)
        for first in range(0, len(logits), ctx.chunk):
            part = slice(first, first + ctx.chunk)
            rows = (logits[part].to(normalizer.dtype) - normalizer[part, None]).exp_().mul_(-of_all[part])
            # Rows that nothing hangs on may hold anything, NaN included.
            rows.masked_fill_(of_all[part] == 0, 0)
            gradient[part] = rows.scatter_add_(-1, column[part], of_here[part])
        return gradient, None, None, None, None
