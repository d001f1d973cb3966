"""The oracle of rows: another implementation of the model, in float32, on the same tokens, with near-ties told apart.

No share of wrong rows is tolerated. Every row must name, in every layer, the experts that Hugging Face's model chooses
in float32, or differ from them only where the router's logits are so close that the engine's bfloat16 decides. A row of
another token, or one whose layers are exchanged, replaces experts that are far ahead of those it names.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from router_replay.masks import RoutingMasks


def assert_rows_are_of(model: Qwen3MoeForCausalLM, masks: RoutingMasks, token_ids: Sequence[int]) -> None:
    """Every row of `masks` is valid and the routing of its token in `model`.

    The recorded experts are imposed on both reference runs, layer by layer, so that a near-tie that fell the other way
    in one layer does not make the next layers other ones: what is left between them is rounding alone.

    Args:
        model: the checkpoint that the engine serves, in float32.
        masks: rows of positions [start, end).
        token_ids: the sequence, at least `end` tokens.

    Raises:
        AssertionError: naming the worst position and layer, and by how much the logits forbid it.
    """
    invalid = (~masks.valid).nonzero().flatten()
    assert not len(invalid), f"{len(invalid)} rows are not valid, the first of position {masks.start + int(invalid[0])}"
    gaps, bounds = gaps_and_bounds(model, masks, token_ids)
    wrong = gaps > bounds
    if wrong.any():
        row, layer = divmod(int((gaps / bounds).argmax()), gaps.shape[1])
        raise AssertionError(
            f"{int(wrong.any(1).sum())} of {len(gaps)} rows are not those of their tokens; the worst, of position"
            f" {masks.start + row}, names an expert of layer {masks.geometry.moe_layers[layer]} whose logit is"
            f" {gaps[row, layer]:.3f} below that of one that it leaves out, where rounding explains"
            f" {bounds[layer]:.3f}"
        )


def gaps_and_bounds(model: Qwen3MoeForCausalLM, masks: RoutingMasks, token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """By how much the logits of the reference contradict each row, and how much rounding can explain.

    If no logit of the engine is farther than d from the reference's, an expert that it took is at most 2 d below one
    that it left out. For d stands the farthest logit, of all tokens and experts, of Hugging Face's own run in bfloat16:
    it rounds as often as the engine, only at other places.

    Returns:
        `(gaps float32 [num_tokens, MoE layers], bounds float32 [MoE layers])`; a gap is 0 where the sets are equal.
    """
    assert len(token_ids) >= masks.end, f"{len(token_ids)} tokens for rows up to position {masks.end}"
    rounded = copy.deepcopy(model)
    # Parameters alone: buffers of the position embedding stay in float32 in an engine, too.
    for parameter in rounded.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    exact = _router_logits(model, masks, token_ids)
    bounds = 2 * (_router_logits(rounded, masks, token_ids) - exact).abs().amax((0, 2))
    logits = exact[masks.start : masks.end]
    taken = torch.zeros(logits.shape, dtype=torch.bool).scatter(-1, masks.indices().long(), True)
    worst_taken = logits.masked_fill(~taken, torch.inf).amin(-1)
    best_left_out = logits.masked_fill(taken, -torch.inf).amax(-1)
    return (best_left_out - worst_taken).clamp(min=0), bounds


def _router_logits(model: Qwen3MoeForCausalLM, masks: RoutingMasks, token_ids: Sequence[int]) -> Tensor:
    """Router logits `float32 [tokens, MoE layers, experts]` of a run that takes the recorded experts."""
    with torch.no_grad(), imposed(model, masks):
        output = model(torch.tensor([list(token_ids[: masks.end])]), output_router_logits=True)
    return torch.stack([layer.float() for layer in output.router_logits], dim=1)


@contextlib.contextmanager
def imposed(model: Qwen3MoeForCausalLM, masks: RoutingMasks) -> Iterator[None]:
    """Let the model take the recorded experts in every layer, for the length of a `with` block."""
    routers = [module for module in model.modules() if isinstance(module, Qwen3MoeTopKRouter)]
    assert len(routers) == masks.geometry.num_moe_layers
    recorded = masks.indices().long()
    handles = []
    for layer, router in enumerate(routers):

        def impose(router: Qwen3MoeTopKRouter, inputs: tuple, output: tuple, layer: int = layer) -> tuple:
            logits, weights, indices = output
            # The rows before `start` are nobody's business here: the reference chooses them itself.
            experts = indices.clone()
            experts[masks.start : masks.end] = recorded[:, layer]
            chosen = logits.float().softmax(-1).gather(-1, experts)
            assert router.norm_topk_prob
            return logits, (chosen / chosen.sum(-1, keepdim=True)).to(weights.dtype), experts

        handles.append(router.register_forward_hook(impose))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
