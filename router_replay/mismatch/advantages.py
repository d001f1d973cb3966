"""Advantages: relative to the prompt's group, with the optimal token baseline, or doubly robust."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from router_replay.errors import InputError
from router_replay.mismatch.arguments import require_tensors
from router_replay.mismatch.parts import Joined
from router_replay.mismatch.ranks import together
from router_replay.mismatch.responses import Responses, require_responses
from router_replay.mismatch.segments import Segments


def group_relative_advantages(rewards: Tensor, responses: Responses, *, divide_by_std: bool = True) -> Tensor:
    """GRPO: A_i = (R_i - mean(R)) / (std(R) + 1e-6) over the responses to one prompt.

    Source: DeepSeekMath (arXiv 2402.03300), section 4.1.2. Without the division: Dr. GRPO (arXiv 2503.20783), which
    shows that it favours prompts whose rewards hardly differ. The standard deviation is the sample's (n - 1). A group
    of one has advantage 0. Responses without a response token count in their group's mean, and so do those that
    `LogRatios.of` dropped: their rewards were drawn as the others'.

    Args:
        rewards: one per response, `[S]`.

    Returns:
        `[S]`, at least float32; 0 where all of a group's rewards are equal.

    Raises:
        InputError: rewards of another shape, or responses whose prompts are not known.
    """
    require_responses(responses)
    require_tensors(rewards=rewards)
    if rewards.shape != (responses.num_sequences,):
        raise InputError(f"rewards {list(rewards.shape)} must be [{responses.num_sequences}], one for each sequence")
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    rewards, groups = rewards.to(responses.mask.device, torch.float64), responses.prompts
    centred = rewards - groups.of_items(groups.sum(rewards) / groups.counts)
    if not divide_by_std:
        return centred.to(dtype)
    # Of equal rewards rounding leaves differences of its own, and a deviation of their size to divide them by.
    centred = centred.masked_fill(groups.of_items(groups.max(rewards) == -groups.max(-rewards)), 0)
    std = (groups.sum(centred.square()) / (groups.counts - 1).clamp(min=1)).sqrt()
    return (centred / (groups.of_items(std) + 1e-6)).to(dtype)


def optimal_token_baseline_advantages(
    rewards: Tensor,
    logprobs: Tensor,
    sum_squared_probs: Tensor,
    responses: Responses,
    *,
    weights: Tensor | None = None,
) -> Tensor:
    """Optimal token baseline: A_it = G_it - B_t with B_t = sum_i W_it G_it / sum_i W_it over a prompt's responses.

    W_it = sum_{j <= t} w_ij^2 ||s_ij||^2 is the energy that the gradient has gathered up to token t, and
    ||s||^2 = 1 - 2 p + sum_v p_v^2 the squared norm of the gradient of log p with respect to the logits, which the
    forward pass knows. With that proxy B_t has the least variance among baselines that depend on the prompt and
    on t. Source: Li et al., "The optimal token baseline: variance reduction for long-horizon LLM-RL" (PMLR 306, 2026).

    t counts response tokens, tokens of others in between do not. A group of one has baseline 0, and so have the tokens
    that only the group's longest response reaches, where the baseline would be that response's own return and the
    advantage 0.

    Args:
        rewards: per token, tokens' shape, or per response `[S]` (given at its last token).
        logprobs: of the sampled tokens under the policy that is differentiated, tokens' shape.
        sum_squared_probs: sum over the vocabulary of p_v^2 at each token, tokens' shape.
        weights: importance weights that the gradient is multiplied by, tokens' shape.

    Returns:
        Detached, tokens' shape, at least float32.

    Raises:
        InputError: shapes that differ, or responses whose prompts are not known.
    """
    require_responses(responses)
    given = {"logprobs": logprobs, "sum_squared_probs": sum_squared_probs}
    given |= {} if weights is None else {"weights": weights}
    per_sequence = _is_per_sequence(rewards, responses, **given)
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    logprobs = logprobs.detach().double()
    # (1 - p)^2 plus the squares of the others: of a token that was all but certain nothing is left of 1 - 2 p + sum p^2
    # but rounding, of either sign, and the baseline would be no mean.
    others = sum_squared_probs.detach().double() - (2 * logprobs).exp()
    energy = torch.expm1(logprobs).square() + others.clamp(min=0)
    if weights is not None:
        energy = energy * weights.detach().double().square()
    groups, (whole, joined) = responses.prompts, responses.whole()
    tokens, mask = whole.tokens, whole.mask
    reward = _at_last_tokens(rewards, whole) if per_sequence else _flat(rewards, whole, joined)
    returns = tokens.running_sum(reward, reverse=True)
    gathered = tokens.running_sum(_flat(energy, whole, joined))
    # A cell for every group and t; the last is for what is no response token.
    longest = groups.max(whole.lengths.double()).long()
    begin = groups.of_items(longest.cumsum(0) - longest)
    cell = (tokens.of_items(begin) + _number(whole)).masked_fill(~mask, len(mask))
    cells = Segments.of(cell, len(mask) + 1)
    energies = cells.sum(gathered)
    # A sampled token of probability 1 has no gradient and no energy: nothing to reduce, baseline 0.
    defined = (cells.counts > 1) & (energies > 0)
    baseline = (cells.sum(gathered * returns) / energies.masked_fill(~defined, 1)).masked_fill(~defined, 0)
    advantages = (returns - cells.of_items(baseline)).masked_fill(~mask, 0)
    return joined.own(advantages).to(dtype)


@dataclass(frozen=True, eq=False)
class DoublyRobust:
    """Both detached, in the tokens' shape, 0 for all but response tokens.

    Attributes:
        values: V_DR, the corrected estimate of the trainer's value before each token.
        advantages: r_t + discount * V_DR(t + 1) - V(t), to be weighted by the token's ratio in a gradient, as any.
    """

    values: Tensor
    advantages: Tensor


def doubly_robust_advantages(
    rewards: Tensor,
    values: Tensor,
    weights: Tensor,
    responses: Responses,
    *,
    action_values: Tensor | None = None,
    discount: float = 1.0,
) -> DoublyRobust:
    """Doubly robust off-policy values: V_DR(t) = V(t) + rho_t (r_t + discount V_DR(t+1) - Q(t)), V_DR(T) = 0.

    V(t) estimates the value of the context before token t, Q(t) that of taking the sampled token there. If the ratios
    are right, V_DR is unbiased for any Q, with V(t) = sum_a pi(a) Q(a) or, without action values, V in Q's place. If Q
    is right, and V its mean under pi, V_DR is unbiased for any ratios. Source: Jiang and Li, "Doubly robust off-policy
    value evaluation for reinforcement learning" (ICML 2016, arXiv 1511.03722), eq. 10.

    Without `action_values` V(t) stands for Q(t); that is V-trace (arXiv 1802.01561) without its truncation, has the
    first of the two protections only, and is what a critic of contexts can give. Truncated weights bias the
    correction towards V, not towards 0, which is what makes this better than truncated weights on returns.

    Args:
        rewards: per token, tokens' shape, or per response `[S]` (given at its last token).
        values: V, tokens' shape.
        weights: rho_t, token importance weights, tokens' shape.
        action_values: Q of the sampled tokens, tokens' shape.
        discount: per response token; tokens of others between them do not discount.

    Raises:
        InputError: shapes that differ.
    """
    require_responses(responses)
    action_values = values if action_values is None else action_values
    per_sequence = _is_per_sequence(rewards, responses, values=values, weights=weights, action_values=action_values)
    whole, joined = responses.whole()
    tokens, mask = whole.tokens, whole.mask
    dtype = torch.promote_types(values.dtype, torch.float32)
    reward = _at_last_tokens(rewards, whole) if per_sequence else _flat(rewards, whole, joined)
    value, action_value, weight = (_flat(each, whole, joined) for each in (values, action_values, weights))
    # Backwards over the tokens; those of others hand on what comes after them.
    through = (~mask).double()
    next_value = tokens.next_of(tokens.recurrence(through, value, reverse=True))
    # V_DR - V, and not V_DR: where Q is right that is 0, whatever the products of the weights.
    error = weight * (reward + discount * next_value - action_value)
    correction = tokens.recurrence((discount * weight).where(mask, through), error, reverse=True)
    corrected = (value + correction).masked_fill(~mask, 0)
    advantages = reward + discount * (next_value + tokens.next_of(correction)) - value
    advantages = advantages.masked_fill(~mask, 0)
    return DoublyRobust(values=joined.own(corrected).to(dtype), advantages=joined.own(advantages).to(dtype))


def _is_per_sequence(rewards: Tensor, responses: Responses, **of_tokens: Tensor) -> bool:
    """Whether rewards are `[S]`, of tensors whose shapes fit; on all ranks of a context group, or raised on all."""

    def checked() -> bool:
        responses.require(**of_tokens)
        return responses.is_per_sequence(rewards=rewards)

    return together(checked, responses.context_group)


def _at_last_tokens(rewards: Tensor, whole: Responses) -> Tensor:
    """As of `_flat`: rewards `[S]` put at each response's last token."""
    last = _number(whole) == whole.tokens.of_items(whole.lengths) - 1
    return whole.expand(rewards.detach().double()).masked_fill(~last, 0)


def _flat(values: Tensor, whole: Responses, joined: Joined) -> Tensor:
    """Of all tokens of whole sequences, detached, float64 `[n]`, 0 for all but response tokens."""
    return joined.gather(values.detach().double()).masked_fill(~whole.mask, 0)


def _number(whole: Responses) -> Tensor:
    """How many response tokens of its sequence are before each one, int64 `[n]`; of other tokens anything."""
    before = whole.lengths.cumsum(0) - whole.lengths
    return whole.mask.cumsum(0) - 1 - whole.tokens.of_items(before)
