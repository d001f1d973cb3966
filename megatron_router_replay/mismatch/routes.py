"""How far the trainer's own routes are from those of the rollout."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RouteAgreement:
    """Shares over the tokens that have routes on both sides.

    Attributes:
        num_tokens: tokens that were compared.
        differing_routes: share of (token, layer) pairs whose expert sets differ.
        differing_tokens: share of tokens whose expert set differs in at least one layer.
        overlap: per layer the mean of |A and B| / K, 1 where both sides always agree.
    """

    num_tokens: int
    differing_routes: float
    differing_tokens: float
    overlap: tuple[float, ...]


def compare_routes(trainer: Tensor, rollout: Tensor, valid: Tensor | None = None) -> RouteAgreement:
    """Compare expert sets; the order of a token's experts does not count.

    Args:
        trainer, rollout: int ``[T, L, K]``, K distinct experts each.
        valid: bool ``[T]``, False for tokens that were not recorded; by default all count.

    Raises:
        ValueError: shapes differ, or no token is left to compare.
    """
    if trainer.shape != rollout.shape or trainer.dim() != 3:
        raise ValueError(
            f"trainer routes {list(trainer.shape)} and rollout routes {list(rollout.shape)} must both be [T, L, K]"
        )
    if valid is not None:
        if valid.shape != trainer.shape[:1]:
            raise ValueError(f"valid {list(valid.shape)} must have one entry for each of {trainer.shape[0]} tokens")
        trainer, rollout = trainer[valid], rollout[valid]
    if trainer.shape[0] == 0:
        raise ValueError("no token has routes on both sides")
    shared = (trainer[..., :, None] == rollout[..., None, :]).any(-1).sum(-1).double()
    top_k = trainer.shape[-1]
    differs = shared < top_k
    return RouteAgreement(
        num_tokens=trainer.shape[0],
        differing_routes=float(differs.double().mean()),
        differing_tokens=float(differs.any(-1).double().mean()),
        overlap=tuple((shared.mean(0) / top_k).tolist()),
    )
