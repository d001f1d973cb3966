"""The loop: roll out, score, update, export, evaluate; and what of it a trainer of your own would copy."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from examples.grpo.centering import RULES, logprobs_with_top_k, scores_with_top_k
from examples.grpo.engine import Engine
from examples.grpo.figures import (
    dynamics_of,
    packed_responses,
    packed_values,
    rollout_figures,
    run_step,
    update_figures,
)
from examples.grpo.microbatches import Microbatch, microbatches, minibatches
from examples.grpo.settings import Settings
from examples.grpo.state import RunFolder
from examples.grpo.weights import Rendered, in_bfloat16
from examples.multi_turn_replay.rollout import Conversation
from megatron_router_replay import Replay
from router_replay.errors import InputError
from router_replay.masks.agreement import RouteTally
from router_replay.mismatch import (
    FilteredResponses,
    LogRatios,
    LossMetrics,
    SamplerTopK,
    filter_responses,
    grpo_loss,
    gspo_loss,
    masked_importance_weights,
    score_centering_loss,
    truncated_importance_weights,
)
from router_replay.replay.microbatch import MicrobatchRoutes
from router_replay.run import Dynamics, RunStep, write_step


class Updates:
    """The trainer's part of a step: from conversations to new weights."""

    def __init__(self, model: GPTModel, replay: Replay, optimizer: torch.optim.Optimizer, settings: Settings) -> None:
        self.model, self.replay, self.optimizer, self.settings = model, replay, optimizer, settings

    def step(self, number: int, played: Sequence[Conversation], advance: Callable[[], Any]) -> tuple[dict, RunStep]:
        """One step on its conversations: figures for the log, and what `r3 report` draws.

        Where filters leave no conversation the weights stay as they are.

        Args:
            advance: called after every pass over a microbatch.
        """
        filtered = _filtered(played, self.settings)
        if filtered.nothing_left:
            return self._told_of_nothing(number, played, filtered)
        kept = [played[each] for each in filtered.kept]
        groups = [each // self.settings.group_size for each in filtered.kept]
        batches = self._scored(microbatches(kept, groups, self.model, self.replay, self.settings), advance)
        losses: list[LossMetrics] = []
        norms: list[float] = []
        drift: list[RouteTally] = []
        first = (number - 1) * self.settings.minibatches
        for update, minibatch in enumerate(minibatches(batches), start=first):
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.learning_rate * min(1.0, (update + 1) / self.settings.warmup)
            self.optimizer.zero_grad()
            of_minibatch: list[LossMetrics] = self._run(partial(self._training_step, drift, advance), minibatch)
            # These, and the norm, raise what was wrong with a pass while the weights are still those of before.
            self.replay.check()
            LossMetrics.total(of_minibatch).require()
            losses += of_minibatch
            norms.append(float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_gradient)))
            if not math.isfinite(norms[-1]):
                raise InputError(
                    f"the gradient of step {number} has the norm {norms[-1]}, and the weights stay as they were: look"
                    " at the largest ratios of the steps before it. A restart takes the same conversations and comes to"
                    " the same: delete those of this step (rollouts/) to play it anew, or begin a run with a lower rate"
                    " or with --correction TIS"
                )
            self.optimizer.step()
        return self._told(number, played, filtered, batches, losses, norms, drift)

    def _scored(self, batches: Sequence[Microbatch], advance: Callable[[], Any]) -> list[Microbatch]:
        """With the log-probabilities of the old policy, by the routes that training will take, and weights."""
        routes: list[MicrobatchRoutes | None] = []
        own: list[Tensor | None] = []

        def scoring_step(data: Iterator[Microbatch], model: GPTModel) -> tuple[Tensor, Callable]:
            batch = next(data)
            if self.settings.routes == "R2":
                with self.replay.record(batch.layout) as recorder:
                    logprobs, entropies = scores_with_top_k(model, batch.token_ids, batch.top_k)
                routes.append(recorder.routes)
                own.append(None)
            else:
                (logprobs, entropies), taken = self._observed(batch, scores_with_top_k, model)
                routes.append(batch.routes)
                own.append(taken)
            advance()
            return torch.cat([logprobs, entropies[..., None]], -1), lambda output, non_loss_data: output

        with torch.no_grad():
            found = self._run(scoring_step, batches, forward_only=True, collect_non_loss_data=True)
        scored = []
        for number, (batch, scores) in enumerate(zip(batches, found, strict=True)):
            old = scores[..., 0]
            scored.append(
                replace(
                    batch,
                    old=old,
                    old_top_k=scores[..., 1:-1],
                    entropies=scores[..., -1],
                    routes=routes[number],
                    own_routes=own[number],
                    weights=self._weights(LogRatios.of(trainer=old, rollout=batch.rollout, responses=batch.responses)),
                )
            )
        return scored

    def _weights(self, ratios: LogRatios) -> Tensor | None:
        if self.settings.correction == "TIS":
            return truncated_importance_weights(ratios)
        if self.settings.correction == "MIS":
            return masked_importance_weights(ratios)
        return None

    def _training_step(
        self, drift: list[RouteTally], advance: Callable[[], Any], data: Iterator[Microbatch], model: GPTModel
    ) -> tuple[Tensor, Callable]:
        batch = next(data)
        logprobs, taken = self._observed(batch, logprobs_with_top_k, model)
        if taken is not None and batch.own_routes is not None:
            drift.append(RouteTally.of(trainer=taken, rollout=batch.own_routes))
        advance()
        return logprobs, partial(self._loss, batch)

    def _observed[Scores](
        self, batch: Microbatch, score: Callable[[GPTModel, Tensor, SamplerTopK | None], Scores], model: GPTModel
    ) -> tuple[Scores, Tensor | None]:
        """A pass by the routes of a microbatch; with the trainer's own, if it takes these."""
        if batch.routes is not None:
            with self.replay.microbatch(batch.routes):
                return score(model, batch.token_ids, batch.top_k), None
        with self.replay.off(), self.replay.observe() as observed:
            scores = score(model, batch.token_ids, batch.top_k)
        return scores, torch.cat(observed.indices(batch.layout))

    def _loss(self, batch: Microbatch, logprobs: Tensor) -> tuple[Tensor, LossMetrics]:
        assert batch.old is not None
        take = grpo_loss if self.settings.algorithm == "GRPO" else gspo_loss
        shared: dict[str, Any] = {
            "advantages": batch.advantages,
            "responses": batch.responses,
            "denominator": batch.denominator,
        }
        loss, metrics = take(current=logprobs[..., 0], old=batch.old, weights=batch.weights, **shared)
        if batch.top_k is not None:
            rule = RULES[self.settings.correction]
            at_top_k = logprobs[..., 1:]
            loss = loss + score_centering_loss(batch.top_k, current=at_top_k, old=batch.old_top_k, weigh=rule, **shared)
        return loss, metrics

    def _run(self, step: Callable, batches: Sequence[Microbatch], **others: Any) -> list[Any]:
        """One pass over each microbatch, on Megatron's own schedule."""
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(batches),
            model=self.model,
            num_microbatches=len(batches),
            seq_length=max(batch.token_ids.shape[1] for batch in batches),
            micro_batch_size=self.settings.microbatch,
            **others,
        )

    def _told(
        self,
        number: int,
        played: Sequence[Conversation],
        filtered: FilteredResponses,
        batches: Sequence[Microbatch],
        losses: Sequence[LossMetrics],
        norms: Sequence[float],
        drift: Sequence[RouteTally],
    ) -> tuple[dict[str, Any], RunStep]:
        """What the step says of itself; copies may leave it out."""
        kept = [played[each] for each in filtered.kept]

        def packed(name: str) -> Tensor:
            return packed_values([getattr(batch, name) for batch in batches], kept)

        responses = packed_responses(kept, [each // self.settings.group_size for each in filtered.kept])
        ratios = LogRatios.of(trainer=packed("old"), rollout=packed("rollout"), responses=responses)
        figures = rollout_figures(played, filtered, self.settings.group_size) | update_figures(
            ratios,
            entropies=packed("entropies"),
            losses=losses,
            norms=norms,
            drift=drift,
            replayed=self.replay.metrics(),
        )
        weights = {} if self.settings.correction == "none" else {self.settings.correction: packed("weights")}
        dynamics = dynamics_of(figures, filtered, num_tokens=int(responses.mask.sum()))
        return figures, run_step(number, ratios, weights, dynamics)

    def _told_of_nothing(
        self, number: int, played: Sequence[Conversation], filtered: FilteredResponses
    ) -> tuple[dict[str, Any], RunStep]:
        figures = rollout_figures(played, filtered, self.settings.group_size)
        return figures, RunStep.without_tokens(number, dynamics_of(figures, filtered))


def train(
    model: GPTModel,
    replay: Replay,
    checkpoint: Path,
    url: str,
    folder: Path,
    settings: Settings,
    *,
    steps: int,
    concurrency: int,
    log: Callable[[dict[str, Any]], None],
    show: Callable[[int, str], Callable[..., Any]],
    optimizer: torch.optim.Optimizer | None = None,
    for_rollout: Rendered = in_bfloat16,
    for_evaluation: Rendered = in_bfloat16,
) -> None:
    """Train until `steps` steps are done, from where the run in `folder` stands.

    Args:
        model: filled from `checkpoint`, with `replay` attached.
        url: of a server with router capture, into which nobody else loads weights.
        concurrency: conversations that are played at a time.
        log: called with each step's figures.
        show: called with a step and what it does now; what it returns, after each piece of that.
        optimizer: of the model's parameters; AdamW by default. Its rate is that of the settings.
        for_rollout: what the rollout engine is given of the weights when it plays.
        for_evaluation: the same when it is evaluated.

    Raises:
        RolloutError: the server refused something.
        router_replay.errors.InputError: log-probabilities or a gradient that are not finite; of the step nothing is
            kept but its conversations.
        router_replay.errors.RouterReplayError: masks and model do not belong together.
    """
    run = RunFolder(folder)
    if optimizer is None:
        rate, betas = settings.learning_rate, (0.9, 0.98)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=betas, weight_decay=0.0)
    done = run.restore(model, optimizer)
    updates = Updates(model, replay, optimizer, settings)
    engine = Engine(url, model, checkpoint, run, settings, for_rollout, for_evaluation)
    if done < 0:
        figures: dict[str, Any] = {"evaluation": engine.evaluated(0, concurrency)}
        write_step(run.steps, RunStep.without_tokens(0, Dynamics(evaluation=figures["evaluation"])))
        run.save(0, model, optimizer, figures)
        log({"step": 0, **figures})
        done = 0
    for step in range(done + 1, steps + 1):
        began = time.perf_counter()
        played = engine.played(step, concurrency, show(step, "rollout"))
        rolled_out = time.perf_counter()
        figures, record = updates.step(step, played, show(step, "update"))
        figures["seconds"] = {"rollout": rolled_out - began, "update": time.perf_counter() - rolled_out}
        if step % settings.evaluate_every == 0:
            figures["evaluation"] = engine.evaluated(step, concurrency)
        assert record.dynamics is not None
        dynamics = replace(
            record.dynamics, evaluation=figures.get("evaluation"), seconds=sum(figures["seconds"].values())
        )
        write_step(run.steps, replace(record, dynamics=dynamics))
        run.save(step, model, optimizer, figures)
        log({"step": step, **figures})


def _filtered(played: Sequence[Conversation], settings: Settings) -> FilteredResponses:
    flags = {"cut-off": [each.cut_off for each in played], "bad-call": [each.bad_calls > 0 for each in played]}
    return filter_responses(
        [float(each.correct) for each in played],
        [number // settings.group_size for number in range(len(played))],
        flags={reason: flags[reason] for reason in settings.drop if reason in flags},
        one_reward="one-reward" in settings.drop,
    )
