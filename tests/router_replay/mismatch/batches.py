"""Random batches, padded and packed, and every function of the package on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from router_replay import mismatch
from router_replay.mismatch import Responses
from tests.router_replay.mismatch.pairs import log_ratios


@dataclass(frozen=True, eq=False)
class Batch:
    """Padded `[B, T]` tensors of one batch, or the same packed `[N]`; `rewards` and `group_ids` are `[B]`."""

    responses: Responses
    rollout: Tensor
    trainer: Tensor
    current: Tensor
    rewards: Tensor
    values: Tensor
    uniforms: Tensor

    @property
    def tokens(self) -> dict[str, Tensor]:
        """What has the tokens' shape."""
        return {name: getattr(self, name) for name in ("rollout", "trainer", "current", "values")}


def padded_batch(
    mask: Tensor, group_ids: Tensor, *, seed: int = 0, spread: float = 0.5, dtype: torch.dtype = torch.float64
) -> Batch:
    """Log-probabilities of a rollout, and of a trainer and a current policy that differ by about `spread`."""
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(mask.shape, generator=generator, dtype=torch.float64)

    rollout = -3 * torch.rand(mask.shape, generator=generator, dtype=torch.float64) - 1e-3
    return Batch(
        responses=Responses.padded(mask, group_ids),
        rollout=rollout.to(dtype),
        trainer=(rollout + spread * noise()).clamp(max=0).to(dtype),
        current=(rollout + spread * noise()).clamp(max=0).to(dtype),
        rewards=torch.randn(len(mask), generator=generator, dtype=torch.float64).to(dtype),
        values=noise().to(dtype),
        uniforms=torch.rand(len(mask), generator=generator, dtype=torch.float64),
    )


def pack(batch: Batch, lengths: list[int], group_ids: Tensor) -> Batch:
    """The same batch, packed; `lengths` are those of the sequences, prompt included, padding not."""
    width = batch.responses.mask.shape[1]
    there = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    packed = {name: tensor[there] for name, tensor in batch.tokens.items()}
    return replace(batch, responses=Responses.packed(batch.responses.mask[there], bounds, group_ids), **packed)


def permute(batch: Batch, order: Tensor, group_ids: Tensor) -> Batch:
    """Sequences of a padded batch in another order."""
    moved = {name: tensor[order] for name, tensor in batch.tokens.items()}
    return replace(
        batch,
        responses=Responses.padded(batch.responses.mask[order], group_ids[order]),
        rewards=batch.rewards[order],
        uniforms=batch.uniforms[order],
        **moved,
    )


def _pair(function: Callable[..., Tensor], **options: object) -> Callable[[Batch], Tensor]:
    return lambda batch: function(log_ratios(batch.trainer, batch.rollout, batch.responses), **options)


def gradient_of(loss: Callable[[Batch, Tensor], Tensor]) -> Callable[[Batch], Tensor]:
    """With respect to the current policy's log-probabilities."""

    def gradient(batch: Batch) -> Tensor:
        current = batch.current.clone().requires_grad_()
        loss(batch, current).backward()
        assert current.grad is not None
        return current.grad

    return gradient


def _value(loss: Callable[[Batch, Tensor], Tensor]) -> Callable[[Batch], dict[str, float]]:
    return lambda batch: {"loss": loss(batch, batch.current).item()}


def _balance(batch: Batch, level: str) -> Tensor:
    behaviours = torch.stack([batch.rollout, batch.current])
    shares = torch.tensor([0.25, 0.75])
    return mismatch.balance_heuristic_weights(
        trainer=batch.trainer, behaviours=behaviours, shares=shares, responses=batch.responses, level=level
    )


def _doubly_robust(batch: Batch) -> Tensor:
    weights = mismatch.truncated_importance_weights(log_ratios(batch.trainer, batch.rollout, batch.responses))
    found = mismatch.doubly_robust_advantages(batch.rewards, batch.values, weights, batch.responses)
    return found.advantages + 3 * found.values


def _logits(batch: Batch, seed: Tensor) -> Tensor:
    """A distribution over three tokens at each place, from one number each."""
    return torch.stack([seed, seed.clamp(min=-9).sin(), torch.zeros_like(seed)], -1)


def _read(loss: Callable[..., tuple[Tensor, mismatch.LossMetrics]], *ratios: object, **given: object) -> Tensor:
    """The loss, or what its metrics say of log-probabilities that have none."""
    value, metrics = loss(*ratios, **given)
    metrics.require()
    return value


def _centred(batch: Batch, current: Tensor) -> Tensor:
    """GRPO and the centering of a sampler of whom the sampled token's probability alone is known."""
    responses, advantages = batch.responses, batch.rewards
    ids = torch.zeros_like(batch.rollout[..., None], dtype=torch.int64)
    top_k = mismatch.SamplerTopK.of(token_ids=ids, logprobs=batch.rollout[..., None], responses=responses, vocab_size=1)
    centre = mismatch.score_centering_loss(
        top_k,
        current=current[..., None],
        old=batch.trainer[..., None],
        advantages=advantages,
        responses=responses,
        weigh=mismatch.truncated_weight,
    )
    grpo = _read(mismatch.grpo_loss, current=current, old=batch.trainer, advantages=advantages, responses=responses)
    return grpo + centre


LOSSES: dict[str, Callable[[Batch, Tensor], Tensor]] = {
    "grpo": lambda batch, current: _read(
        mismatch.grpo_loss, current=current, old=batch.trainer, advantages=batch.rewards, responses=batch.responses
    ),
    "grpo, token mean": lambda batch, current: _read(
        mismatch.grpo_loss,
        current=current,
        old=batch.trainer,
        advantages=batch.rewards,
        responses=batch.responses,
        aggregation="token-mean",
    ),
    "gspo": lambda batch, current: _read(
        mismatch.gspo_loss,
        current=current,
        old=batch.trainer,
        advantages=batch.rewards,
        responses=batch.responses,
        clip_low=0.3,
        clip_high=0.3,
    ),
    "grpo, centred": _centred,
    "decoupled": lambda batch, current: _read(
        mismatch.decoupled_loss,
        log_ratios(batch.trainer, batch.rollout, batch.responses),
        current=current,
        advantages=batch.rewards,
    ),
}

PER_TOKEN: dict[str, Callable[[Batch], Tensor]] = {
    "log ratio": lambda batch: mismatch.log_ratio(current=batch.trainer, old=batch.rollout, responses=batch.responses),
    "log ratio, detached": _pair(lambda given: given.token),
    "log ratio, double": _pair(lambda given: given.double),
    "TIS, token": _pair(mismatch.truncated_importance_weights),
    "TIS, sequence": _pair(mismatch.truncated_importance_weights, level="sequence"),
    "TIS, geometric": _pair(mismatch.truncated_importance_weights, level="geometric"),
    "IS, sequence": _pair(mismatch.truncated_importance_weights, level="sequence", cap=float("inf")),
    "MIS, token": _pair(mismatch.masked_importance_weights),
    "MIS, sequence": _pair(mismatch.masked_importance_weights, level="sequence"),
    "MIS, geometric": _pair(mismatch.masked_importance_weights, level="geometric", lower=0.9, upper=1.1),
    "IcePop": _pair(mismatch.icepop_weights),
    "SNIS, tokens of the batch": _pair(mismatch.self_normalized_weights, level="token", over="batch"),
    "SNIS, tokens of a group": _pair(mismatch.self_normalized_weights, level="token", over="group"),
    "SNIS, sequences of the batch": _pair(mismatch.self_normalized_weights, over="batch"),
    "SNIS, sequences of a group": _pair(mismatch.self_normalized_weights, over="group"),
    "balance, token": lambda batch: _balance(batch, "token"),
    "balance, sequence": lambda batch: _balance(batch, "sequence"),
    "veto": _pair(mismatch.catastrophic_token_veto, threshold=0.3),
    "trust region": _pair(mismatch.trust_region_mask, max_k2=0.5, mean_k3=0.1),
    "exact trust region": lambda batch: mismatch.exact_trust_region_mask(
        trainer_logits=_logits(batch, batch.trainer),
        rollout_logits=_logits(batch, batch.rollout),
        responses=batch.responses,
        max_kl=0.02,
        mean_kl=0.01,
    ),
    "off-policy sequences": lambda batch: mismatch.off_policy_sequence_mask(
        log_ratios(batch.current, batch.rollout, batch.responses), batch.rewards, max_kl=0.05
    ),
    "metropolis": lambda batch: (
        mismatch.metropolis_chain(
            log_ratios(batch.trainer, batch.rollout, batch.responses), uniforms=batch.uniforms
        ).multiplicity
    ),
    "optimal token baseline": lambda batch: mismatch.optimal_token_baseline_advantages(
        batch.rewards, batch.trainer, (batch.trainer.exp() + 1) / 2, batch.responses
    ),
    "doubly robust": _doubly_robust,
    **{f"gradient of {name}": gradient_of(loss) for name, loss in LOSSES.items()},
}

PER_SEQUENCE: dict[str, Callable[[Batch], Tensor]] = {
    "group-relative": lambda batch: mismatch.group_relative_advantages(batch.rewards, batch.responses),
}

SCALARS: dict[str, Callable[[Batch], dict[str, float]]] = {
    "diagnostics": lambda batch: mismatch.diagnose(log_ratios(batch.trainer, batch.rollout, batch.responses)).flat(),
    **{name: _value(loss) for name, loss in LOSSES.items()},
}
