"""Metropolis independence sampling: turn the rollout's samples into a chain whose stationary law is the trainer's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from router_replay.errors import InputError
from router_replay.mismatch.log_ratios import LogRatios, require_log_ratios


@dataclass(frozen=True, eq=False)
class MetropolisChain:
    """What a chain over the samples of each prompt did with them; both tensors in the tokens' shape.

    Attributes:
        accepted: bool, True for response tokens of accepted samples: the loss mask.
        multiplicity: float32, for accepted samples the number of steps that the chain stayed there (at least 1), 0 for
            the others. Over a group the numbers of samples and of steps are equal, so as weights they have mean 1.
    """

    accepted: Tensor
    multiplicity: Tensor


def metropolis_chain(
    ratios: LogRatios,
    *,
    level: Literal["token", "sequence"] = "sequence",
    generator: torch.Generator | None = None,
    uniforms: Tensor | None = None,
) -> MetropolisChain:
    """Metropolis independence sampling over the responses to each prompt: no threshold to tune.

    The samples y_1, y_2, ... are proposals of an independence sampler with proposal law mu and target pi. The chain
    starts at the first; it moves from x to the proposal y with probability min(1, rho(y) / rho(x)), rho = pi / mu, and
    otherwise stays at x. pi is stationary, and the mean of f over the *steps* (samples times `multiplicity`) is
    consistent for E_pi[f]. Source: Hastings, "Monte Carlo sampling methods using Markov chains and their applications"
    (Biometrika 57, 1970); Tierney, "Markov chains for exploring posterior distributions" (Ann. Stat. 22, 1994), on
    independence chains.

    The mask alone, in which every accepted sample counts once, has another law: pi(y) times the probability that the
    chain accepts a proposal at y, normalised (by detailed balance). Use `multiplicity` as the weight where
    unbiasedness matters. Chains as short as a group keep a trace of their start, and long sequences have ratios so
    spread that a chain rarely moves: look at the share that is accepted.

    level "sequence": rho is the ratio of whole responses, and the sequences of a prompt are the proposals.
    level "token": all response tokens of a prompt are the proposals, context and token together; the target is the
    rollout's contexts with the trainer's choice of token, which is also what token-level importance weights correct
    to. Tokens of one response are not independent draws of that pair, so the chain is exact only in its transitions.

    Args:
        generator: of the uniform numbers, on the tensors' device. Ranks that share a batch (tensor, context and
            pipeline parallel) must draw the same: seed it the same, or pass `uniforms`.
        uniforms: in [0, 1), `[S]` or, for tokens, in the tokens' shape: the numbers themselves.

    Returns:
        The chain. Proposals come in the order of the batch, so another order gives another chain of the same law.

    Raises:
        InputError: unknown level, uniforms of another shape or range, or responses whose prompts are not known.
    """
    require_log_ratios(ratios)
    if level not in ("token", "sequence"):
        raise InputError(f"level must be 'token' or 'sequence', got {level!r}")
    responses, ratio = ratios.responses, ratios.token
    shape = (responses.num_sequences,) if level == "sequence" else tuple(ratio.shape)
    if uniforms is None:
        uniforms = torch.rand(shape, generator=generator, device=ratio.device)
    uniforms = uniforms.to(ratio.device)
    if tuple(uniforms.shape) != shape:
        raise InputError(f"uniforms {list(uniforms.shape)} must be {list(shape)}, one for each proposal")
    if not bool(((uniforms >= 0) & (uniforms < 1)).all()):
        raise InputError(
            f"uniforms must be in [0, 1), and go from {float(uniforms.min()):g} to {float(uniforms.max()):g}: draw them"
            " with torch.rand"
        )
    if level == "sequence":
        # A response without tokens is no proposal.
        proposed = responses.lengths > 0
        chain_of = responses.prompts.segment[proposed]
        num_chains = responses.prompts.num_segments
        steps = _run_chains(ratios.sequence[proposed], uniforms[proposed], chain_of, num_chains)
        multiplicity = responses.expand(torch.zeros(shape, device=ratio.device).masked_scatter(proposed, steps))
    else:
        chain_of = responses.prompts.segment[responses.tokens.segment].view(shape)[responses.mask]
        num_chains = responses.prompts.num_segments
        steps = _run_chains(ratio[responses.mask], uniforms[responses.mask], chain_of, num_chains)
        multiplicity = torch.zeros(shape, device=ratio.device).masked_scatter(responses.mask, steps)
    return MetropolisChain(multiplicity > 0, multiplicity)


def _run_chains(log_rho: Tensor, uniforms: Tensor, chain_of: Tensor, num_chains: int) -> Tensor:
    """Steps that each chain stayed at each of its proposals; all `[n]`, in the order of proposing."""
    # One step needs the one before: plain numbers are faster here than tensors of a chain each.
    steps = [0] * len(log_rho)
    state, log_rho_there = [-1] * num_chains, [-math.inf] * num_chains
    proposals = zip(log_rho.tolist(), uniforms.log().tolist(), chain_of.tolist(), strict=True)
    for item, (proposed, log_u, chain) in enumerate(proposals):
        # A chain starts at its first proposal. From a state that the trainer never takes every move is allowed, as the
        # limit of small ratios says.
        if log_rho_there[chain] == -math.inf or log_u < proposed - log_rho_there[chain]:
            state[chain], log_rho_there[chain] = item, proposed
        steps[state[chain]] += 1
    return torch.tensor(steps, dtype=torch.float32, device=log_rho.device)
