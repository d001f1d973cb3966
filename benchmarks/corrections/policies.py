"""Recurrent policies small enough that every response can be listed, and rewards of whole responses.

A response is `LENGTH` tokens of a vocabulary of `VOCABULARY`. The next token's distribution hangs on the whole prefix:

    h_0 = tanh(start[prompt]),    h_{t+1} = tanh(h_t recur + embed[token_t] + start[prompt]),    logits_t = h_t out

Many policies are computed at once, in *lanes*: every parameter and every result has a first dimension of lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

VOCABULARY, LENGTH, PROMPTS, HIDDEN = 3, 7, 4, 8
RESPONSES = VOCABULARY**LENGTH

SHAPES = ((PROMPTS, HIDDEN), (VOCABULARY, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, VOCABULARY))
"""Of a lane's parameters, in the order of the fields of `Policies`."""

_SCALES = (0.7, 1.0, HIDDEN**-0.5, 1.2 * HIDDEN**-0.5)
_SOLVED = 0.25


@dataclass(frozen=True, eq=False)
class Policies:
    """Parameters of L policies, float64, each `[L, *shape]` with its shape of `SHAPES`."""

    start: Tensor
    embed: Tensor
    recur: Tensor
    out: Tensor

    @classmethod
    def random(cls, generators: Sequence[torch.Generator]) -> Policies:
        """One lane of each generator, so that a lane does not hang on which others there are."""
        return cls(*(scale * each for scale, each in zip(_SCALES, normal(generators, *SHAPES), strict=True)))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The parameters, in the order of `SHAPES`."""
        return self.start, self.embed, self.recur, self.out

    def map(self, function: Callable[[Tensor], Tensor]) -> Policies:
        """The policies whose parameters are the function's of these."""
        return Policies(*(function(each) for each in self.tensors))

    def trainable(self) -> Policies:
        """A copy whose parameters take gradients."""
        return self.map(lambda each: each.detach().clone().requires_grad_())

    def with_errors(self, errors: Sequence[Tensor]) -> Policies:
        """The policies with every weight off by a relative error, `[L, *shape]` each, as quantised weights are."""
        pairs = zip(self.tensors, errors, strict=True)
        return Policies(*(each.detach() * (1 + error) for each, error in pairs))

    def log_distributions(self, tokens: Tensor) -> Tensor:
        """Log-probabilities of every next token along responses: `[L, P * n, T]`, by prompt, to `[L, P * n, T, V]`."""
        start = self.start.repeat_interleave(tokens.shape[1] // PROMPTS, 1)
        hidden, states = torch.tanh(start), []
        for place in range(LENGTH):
            states.append(hidden)
            hidden = self._next(hidden, tokens[..., place], start)
        return (torch.stack(states, 2).flatten(1, 2) @ self.out).log_softmax(-1).unflatten(1, tokens.shape[1:])

    def sample(self, uniforms: Tensor) -> Tensor:
        """Responses by numbers in [0, 1), both `[L, P * n, T]`, by prompt."""
        start = self.start.repeat_interleave(uniforms.shape[1] // PROMPTS, 1)
        hidden, tokens = torch.tanh(start), []
        for place in range(LENGTH):
            cumulated = (hidden @ self.out).softmax(-1).cumsum(-1)
            tokens.append((uniforms[..., place, None] > cumulated[..., :-1]).sum(-1))
            hidden = self._next(hidden, tokens[-1], start)
        return torch.stack(tokens, 2)

    def probabilities(self) -> Tensor:
        """Of every response to each prompt, `[L, P, V^T]`, in the order of `all_responses`."""
        start = self.start[:, :, None]
        hidden, log_probs = torch.tanh(start), self.start.new_zeros(*self.start.shape[:2], 1)
        for place in range(LENGTH):
            if place:
                moved = (hidden @ self.recur[:, None] + start)[:, :, :, None] + self.embed[:, None, None]
                hidden = torch.tanh(moved).flatten(2, 3)
            log_next = (hidden @ self.out[:, None]).log_softmax(-1)
            log_probs = (log_probs[..., None] + log_next).flatten(2)
        return log_probs.exp()

    def _next(self, hidden: Tensor, token: Tensor, start: Tensor) -> Tensor:
        embedded = self.embed.gather(1, token[..., None].expand(-1, -1, HIDDEN))
        return torch.tanh(hidden @ self.recur + embedded + start)


def normal(generators: Sequence[torch.Generator], *shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal draws, float64 `[L, *shape]` for each shape, of one generator for each lane."""
    lanes = [[torch.randn(shape, generator=each, dtype=torch.float64) for shape in shapes] for each in generators]
    return [torch.stack(drawn) for drawn in zip(*lanes, strict=True)]


def all_responses() -> Tensor:
    """Every response, int64 `[V^T, T]`, in the order of their digits."""
    return torch.cartesian_prod(*[torch.arange(VOCABULARY)] * LENGTH)


def random_rewards(generators: Sequence[torch.Generator], policies: Policies) -> Tensor:
    """Rewards of every response to each prompt, 0 or 1, `[L, P, V^T]`.

    A token is good or not by its prompt, its place and the token before it, half of them at random; a response is
    rewarded if so many of its tokens are good that at most a quarter of what the policy samples is: what a token is
    worth hangs on those before and after it.
    """
    shape = (PROMPTS, LENGTH, VOCABULARY + 1, VOCABULARY)
    good = torch.stack([torch.rand(shape, generator=each) < 0.5 for each in generators])
    tokens = all_responses()
    before = torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=VOCABULARY)
    counts = torch.stack([good[:, :, at, before[:, at], tokens[:, at]] for at in range(LENGTH)]).sum(0)
    # Shares of responses with at least 0, 1, ... T + 1 good tokens; of T + 1 there are none.
    reached = counts[..., None] >= torch.arange(LENGTH + 2)
    shares = (policies.probabilities().detach()[..., None] * reached).sum(-2)
    threshold = (shares > _SOLVED).sum(-1, keepdim=True)
    return (counts >= threshold).double()


def expected_rewards(policies: Policies, rewards: Tensor) -> Tensor:
    """Mean over prompts of the expectation over all responses, `[L]`, with a gradient to the parameters."""
    return (policies.probabilities() * rewards).sum(-1).mean(-1)


def gradients(policies: Policies, rewards: Tensor) -> Tensor:
    """Of `expected_rewards`, exact: `[L, number of a lane's parameters]`."""
    trainable = policies.trainable()
    expected_rewards(trainable, rewards).sum().backward()
    return flat_gradients(trainable)


def flat_gradients(policies: Policies) -> Tensor:
    """What a backward pass left at the parameters, `[L, number of a lane's parameters]`."""
    found = [each.grad for each in policies.tensors]
    assert all(each is not None for each in found)
    return torch.cat([each.flatten(1) for each in found if each is not None], 1)


def rewards_of(rewards: Tensor, tokens: Tensor) -> Tensor:
    """Rewards of sampled responses `[L, P * n, T]`, by prompt: `[L, P * n]`."""
    return rewards.gather(2, _prefixes(tokens, LENGTH)).flatten(1)


def values(policies: Policies, rewards: Tensor, tokens: Tensor) -> Tensor:
    """Expected reward of each prefix of responses, before its next token: `[L, P * n, T]`, by prompt, to the same."""
    probabilities, found = policies.probabilities().detach(), []
    for place in range(LENGTH):
        shape = (VOCABULARY**place, VOCABULARY ** (LENGTH - place))
        rewarded, reached = (each.unflatten(2, shape).sum(-1) for each in (probabilities * rewards, probabilities))
        found.append((rewarded / reached).gather(2, _prefixes(tokens, place)).flatten(1))
    return torch.stack(found, 2)


def _prefixes(tokens: Tensor, length: int) -> Tensor:
    """Numbers of responses' prefixes of a length, `[L, P, n]`."""
    digits = VOCABULARY ** torch.arange(length - 1, -1, -1)
    return (tokens[..., :length] * digits).sum(-1).unflatten(1, (PROMPTS, -1))
