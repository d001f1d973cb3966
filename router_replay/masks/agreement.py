"""How far the trainer's own routes are from those of the rollout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from router_replay.errors import InputError
from router_replay.masks.arguments import as_bools

CHUNK_TOKENS = 8192
"""Tokens that are compared at a time: comparing takes K bytes for every expert of a route."""


@dataclass(frozen=True)
class RouteAgreement:
    """Shares over the tokens that have routes on both sides.

    Attributes:
        num_tokens: tokens that were compared.
        differing_routes: share of (token, layer) pairs whose expert sets differ.
        differing_tokens: share of tokens whose expert set differs in at least one layer.
        differing_by_layer: per layer the share of tokens whose expert sets differ there.
        overlap: per layer the mean of |A and B| / K, 1 where both sides always agree.
    """

    num_tokens: int
    differing_routes: float
    differing_tokens: float
    differing_by_layer: tuple[float, ...]
    overlap: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class RouteTally:
    """Counts from which a `RouteAgreement` follows; those of two batches add up to those of both.

    Attributes:
        top_k: K.
        tokens, differing_tokens: int64 `[1]`.
        differing, shared: int64 `[L]`: tokens whose expert sets differ, and experts that both sides have.
    """

    top_k: int
    tokens: Tensor
    differing_tokens: Tensor
    differing: Tensor
    shared: Tensor

    @classmethod
    def of(cls, *, trainer: Tensor, rollout: Tensor, valid: Tensor | None = None) -> RouteTally:
        """Compare expert sets; arguments and errors as of `compare_routes`, but that there may be no token."""
        for name, routes in (("trainer", trainer), ("rollout", rollout)):
            if not isinstance(routes, Tensor):
                raise InputError(
                    f"the {name}'s routes must be a torch.Tensor [T, L, K], got {type(routes).__name__}:"
                    " torch.as_tensor(...) makes one of an array or a list"
                )
        if trainer.shape != rollout.shape or trainer.dim() < 3:
            raise InputError(
                f"trainer routes {list(trainer.shape)} and rollout routes {list(rollout.shape)} must both be"
                " [T, L, K], or [B, T, L, K]"
            )
        for name, routes in (("trainer", trainer), ("rollout", rollout)):
            if routes.is_floating_point() or routes.dtype == torch.bool:
                raise InputError(f"the {name}'s routes must be expert ids, integers, got {routes.dtype}")
        valid = None if valid is None else as_bools(valid)
        if valid is not None and valid.shape != trainer.shape[:-2]:
            raise InputError(
                f"valid {list(valid.shape)} must have one entry for each token, {list(trainer.shape[:-2])}"
            )
        trainer, rollout = trainer.flatten(0, -3), rollout.flatten(0, -3)
        if valid is not None:
            trainer, rollout = trainer[valid.flatten()], rollout[valid.flatten()]
        for name, routes in (("trainer", trainer), ("rollout", rollout)):
            if routes.numel() and int(routes.min()) < 0:
                raise InputError(
                    f"the {name}'s routes have experts below 0, as SGLang writes for tokens that it has no routes of:"
                    " leave those tokens out by `valid`"
                )
        num_tokens, num_layers, top_k = trainer.shape
        differing_tokens = torch.zeros(1, dtype=torch.int64, device=trainer.device)
        differing, shared = torch.zeros(2, num_layers, dtype=torch.int64, device=trainer.device)
        for ours, theirs in zip(trainer.split(CHUNK_TOKENS), rollout.split(CHUNK_TOKENS), strict=True):
            for name, routes in (("trainer", ours), ("rollout", theirs)):
                in_order = routes.sort(-1).values
                if bool((in_order[..., 1:] == in_order[..., :-1]).any()):
                    raise InputError(f"the {name}'s routes have an expert twice in one layer of a token")
            common = (ours[..., :, None] == theirs[..., None, :]).any(-1).sum(-1)
            differs = common < top_k
            differing_tokens += differs.any(-1).sum()
            differing += differs.sum(0)
            shared += common.sum(0)
        tokens = torch.tensor([num_tokens], device=trainer.device)
        return cls(top_k, tokens, differing_tokens, differing, shared)

    def __add__(self, other: RouteTally) -> RouteTally:
        if (self.top_k, self.differing.shape) != (other.top_k, other.differing.shape):
            raise InputError(
                f"routes of {len(self.differing)} layers and top-{self.top_k} do not add up with routes of"
                f" {len(other.differing)} layers and top-{other.top_k}"
            )
        return self._with_counts(self._counts() + other._counts())

    def all_reduce(self, process_group: dist.ProcessGroup) -> RouteTally:
        """The sum over the ranks of a group; every rank calls it, with the same layers and top-k."""
        counts = self._counts()
        dist.all_reduce(counts, group=process_group)
        return self._with_counts(counts)

    def agreement(self) -> RouteAgreement:
        """Shares of the counts, of all layers together and by layer.

        Raises:
            InputError: no token was compared.
        """
        tokens, differing_tokens = int(self.tokens), int(self.differing_tokens)
        if tokens == 0:
            raise InputError("no token has routes on both sides")
        by_layer = tuple(count / tokens for count in self.differing.tolist())
        return RouteAgreement(
            num_tokens=tokens,
            differing_routes=int(self.differing.sum()) / (tokens * max(len(by_layer), 1)),
            differing_tokens=differing_tokens / tokens,
            differing_by_layer=by_layer,
            overlap=tuple(count / (tokens * self.top_k) for count in self.shared.tolist()),
        )

    def _counts(self) -> Tensor:
        return torch.cat([self.tokens, self.differing_tokens, self.differing, self.shared])

    def _with_counts(self, counts: Tensor) -> RouteTally:
        layers = len(self.differing)
        return RouteTally(self.top_k, *counts.split([1, 1, layers, layers]))


def compare_routes(*, trainer: Tensor, rollout: Tensor, valid: Tensor | None = None) -> RouteAgreement:
    """Compare expert sets; the order of a token's experts does not count.

    Args:
        trainer, rollout: int `[T, L, K]` or `[B, T, L, K]`, K distinct experts each.
        valid: bool `[T]` or `[B, T]`, False for tokens that were not recorded; by default all count.

    Raises:
        InputError: shapes differ, experts below 0 or twice, or no token is left to compare.
    """
    return RouteTally.of(trainer=trainer, rollout=rollout, valid=valid).agreement()
