"""Metropolis independence sampling: turn the rollout's samples into a chain whose stationary law is the trainer's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from router_replay.errors import InputError
from router_replay.mismatch.log_ratios import LogRatios, require_log_ratios
from router_replay.mismatch.ranks import together
from router_replay.mismatch.segments import Segments


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
        generator: of the uniform numbers, on the tensors' device. Ranks that share a batch (tensor and pipeline
            parallel) must draw the same: seed it the same, or pass `uniforms`. Those of a `context_group` take the
            numbers of its first rank.
        uniforms: in [0, 1), `[S]`, of which those of the first rank of a `context_group` count, or for tokens in the
            tokens' shape: the numbers themselves. Their range is checked, for which the device is waited for; numbers
            that are drawn here need none of that.

    Returns:
        The chain. Proposals come in the order of the batch, so another order gives another chain of the same law.

    Raises:
        InputError: unknown level, uniforms of another shape or range, or responses whose prompts are not known.
    """
    require_log_ratios(ratios)
    if level not in ("token", "sequence"):
        raise InputError(f"level must be 'token' or 'sequence', got {level!r}")
    responses, ratio = ratios.responses, ratios.token
    prompts, group = responses.prompts, responses.context_group
    shape = (responses.num_sequences,) if level == "sequence" else tuple(ratio.shape)
    if uniforms is not None:
        given = uniforms
        uniforms = together(lambda: _in_range(given, shape), group).to(ratio.device)
    if level == "sequence":
        if uniforms is None:
            uniforms = torch.rand(shape, generator=generator, device=ratio.device)
        # A response without tokens is no proposal.
        steps = _run_chains(ratios.sequence, _of_first(uniforms, group), responses.lengths > 0, prompts)
        multiplicity = responses.expand(steps)
    else:
        whole, joined = responses.whole()
        if uniforms is None:
            # Those of all ranks' tokens: two ranks whose generators are alike would draw the same for other tokens.
            uniforms = _of_first(torch.rand(whole.mask.shape, generator=generator, device=ratio.device), group)
        else:
            uniforms = joined.gather(uniforms)
        of_token = Segments.of(whole.tokens.of_items(prompts.segment), prompts.num_segments)
        steps = _run_chains(joined.gather(ratio), uniforms, whole.mask, of_token)
        multiplicity = joined.own(steps)
    return MetropolisChain(multiplicity > 0, multiplicity)


def _of_first(uniforms: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Those of the group's first rank."""
    if group is None:
        return uniforms
    uniforms = uniforms.clone()
    dist.broadcast(uniforms, group=group, group_src=0)
    return uniforms


def _in_range(given: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(given.shape) != shape:
        raise InputError(f"uniforms {list(given.shape)} must be {list(shape)}, one for each proposal")
    if not bool(((given >= 0) & (given < 1)).all()):
        raise InputError(
            f"uniforms must be in [0, 1), and go from {float(given.min()):g} to {float(given.max()):g}: draw them"
            " with torch.rand"
        )
    return given


def _run_chains(log_rho: Tensor, uniforms: Tensor, proposed: Tensor, chains: Segments) -> Tensor:
    """Steps that each chain stayed at each of its proposals, float32; all `[n]`, in the order of proposing.

    A chain at x moves to the first proposal y after it with log rho(y) - log u > log rho(x), so that where it goes
    from each x does not hang on how it came there: all these moves are found at once, and then followed by doubling,
    in O(n log n), with no step that waits for the one before on the host.
    """
    order = torch.arange(len(log_rho), device=log_rho.device) if chains.order is None else chains.order
    log_rho, uniforms, proposed = log_rho[order].double(), uniforms[order].double(), proposed[order]
    chain, end = chains.segment[order], chains.counts.cumsum(0)
    # From a state that the trainer never takes every move is allowed, as the limit of small ratios says, and from any
    # other none to one: that is below every finite number, and above the log rho of a state of that kind.
    lowest = torch.finfo(torch.float64).min
    bound = (log_rho - uniforms.log()).masked_fill(log_rho == -torch.inf, lowest).masked_fill(~proposed, -torch.inf)
    next_state = _first_above(bound, log_rho, end[chain])
    # Proposals before each item; a chain starts at its first, and stays where it is to its end if it finds no other.
    before = torch.nn.functional.pad(proposed.long().cumsum(0), (1, 0))
    start = proposed & (before[:-1] == before[end - chains.counts][chain])
    # One place more than there are items is where all chains come to rest.
    rest = len(log_rho)
    jump = torch.nn.functional.pad(next_state.masked_fill(next_state == end[chain], rest), (0, 1), value=rest)
    visited = torch.nn.functional.pad(start.long(), (0, 1))
    for _ in range(rest.bit_length()):
        visited = visited.index_add(0, jump, visited).clamp(max=1)
        jump = jump[jump]
    steps = (before[next_state] - before[:-1]) * visited[:-1]
    return torch.empty_like(steps).index_copy(0, order, steps).float()


def _first_above(values: Tensor, limits: Tensor, ends: Tensor) -> Tensor:
    """For each item j the first k after it with values_k > limits_j, or ends_j if there is none before; all `[n]`."""
    # Maxima of 1, 2, 4, ... items from each on; halves of the longest are skipped as long as nothing in them is above.
    maxima = [torch.nn.functional.pad(values, (0, 1), value=-torch.inf)]
    while (span := 1 << (len(maxima) - 1)) < len(values):
        half = maxima[-1]
        maxima.append(torch.maximum(half, torch.nn.functional.pad(half[span:], (0, span), value=-torch.inf)))
    found = torch.arange(1, len(values) + 1, device=values.device)
    for level in reversed(range(len(maxima))):
        skipped = found + (1 << level)
        found = skipped.where((skipped <= ends) & (maxima[level][found] <= limits), found)
    return found
