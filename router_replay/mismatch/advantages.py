"""Advantages: relative to the prompt's group, with the optimal token baseline, or doubly robust."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from router_replay.errors import InputError
from router_replay.mismatch.responses import Responses, require_responses, require_tensors


def group_relative_advantages(rewards: Tensor, responses: Responses, *, divide_by_std: bool = True) -> Tensor:
    """GRPO: A_i = (R_i - mean(R)) / (std(R) + 1e-6) over the responses to one prompt.

    Source: DeepSeekMath (arXiv 2402.03300), section 4.1.2. Without the division: Dr. GRPO (arXiv 2503.20783), which
    shows that it favours prompts whose rewards hardly differ. The standard deviation is the sample's (n - 1). A group
    of one has advantage 0. Responses without a response token count in their group's mean.

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
    rewards = rewards.to(responses.mask.device)
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    groups = responses.prompts
    count = groups.spread(torch.ones_like(rewards, dtype=dtype)).sum(-1)
    mean = groups.spread(rewards.to(dtype)).sum(-1) / count
    centred = rewards.to(dtype) - mean[groups.segment]
    if not divide_by_std:
        return centred
    # Of equal rewards rounding leaves differences of its own, and a deviation of their size to divide them by.
    lowest, highest = (groups.spread(sign * rewards.to(dtype), -torch.inf).amax(-1) for sign in (-1, 1))
    centred = centred.masked_fill((highest == -lowest)[groups.segment], 0)
    std = (groups.spread(centred.square()).sum(-1) / (count - 1).clamp(min=1)).sqrt()
    return centred / (std[groups.segment] + 1e-6)


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
    responses.require(logprobs=logprobs, sum_squared_probs=sum_squared_probs)
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    token_rewards = per_token_rewards(rewards, responses).detach().to(dtype)
    logprobs = logprobs.detach().to(dtype)
    # (1 - p)^2 plus the squares of the others: of a token that was all but certain nothing is left of 1 - 2 p + sum p^2
    # but rounding, of either sign, and the baseline would be no mean.
    others = sum_squared_probs.detach().to(dtype) - (2 * logprobs).exp()
    energy = torch.expm1(logprobs).square() + others.clamp(min=0)
    if weights is not None:
        responses.require(weights=weights)
        energy = energy * weights.detach().to(dtype).square()
    returns = responses.rectangle(token_rewards).flip(-1).cumsum(-1).flip(-1)
    gathered = responses.rectangle(energy).cumsum(-1)
    # Columns of a group's responses are lined up by the number of response tokens before them.
    mask = responses.rectangle(responses.mask)
    number = mask.long().cumsum(-1) - 1
    width = mask.shape[-1]
    cell = (responses.prompts.segment[:, None] * width + number)[mask]
    sums = returns.new_zeros(3, responses.prompts.num_segments * width)
    sums[0].index_add_(0, cell, (gathered * returns)[mask])
    sums[1].index_add_(0, cell, gathered[mask])
    sums[2].index_add_(0, cell, torch.ones_like(returns)[mask])
    # A sampled token of probability 1 has no gradient and no energy: nothing to reduce, baseline 0.
    defined = (sums[2] > 1) & (sums[1] > 0)
    baseline = torch.where(defined, sums[0] / sums[1].masked_fill(~defined, 1), 0)
    advantages = torch.zeros_like(returns)
    advantages[mask] = returns[mask] - baseline[cell]
    return responses.tokens.gather(advantages).view(responses.mask.shape)


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
    responses.require(values=values, weights=weights, action_values=action_values)
    dtype = torch.promote_types(values.dtype, torch.float32)
    token_rewards = per_token_rewards(rewards, responses)
    reward, value, action_value, weight, mask = (
        responses.rectangle(each.detach().to(dtype))
        for each in (token_rewards, values, action_values, weights, responses.mask)
    )
    corrected, advantages = torch.zeros_like(value), torch.zeros_like(value)
    after = value.new_zeros(len(value))
    for column in reversed(range(value.shape[-1])):
        there = mask[:, column] > 0
        target = reward[:, column] + discount * after
        before = value[:, column] + weight[:, column] * (target - action_value[:, column])
        advantages[:, column] = torch.where(there, target - value[:, column], 0)
        after = torch.where(there, before, after)
        corrected[:, column] = torch.where(there, before, 0)
    shape = responses.mask.shape
    gather = responses.tokens.gather
    return DoublyRobust(values=gather(corrected).view(shape), advantages=gather(advantages).view(shape))


def per_token_rewards(rewards: Tensor, responses: Responses) -> Tensor:
    """Rewards in the tokens' shape: as they are, or `[S]` put at each response's last token."""
    if not responses.is_per_sequence(rewards=rewards):
        return rewards
    mask = responses.rectangle(responses.mask)
    last = mask & (mask.flip(-1).long().cumsum(-1).flip(-1) == 1)
    return responses.tokens.gather(rewards[:, None] * last).view(responses.mask.shape)
