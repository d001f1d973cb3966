"""The loop: roll out, score, update, export, evaluate; and what of it a trainer of your own would copy."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from transformers import AutoTokenizer

from examples.grpo.centering import RULES, logprobs_with_top_k, top_k_of
from examples.grpo.rollouts import evaluate, read_rollouts, roll_out, write_rollouts
from examples.grpo.settings import Settings
from examples.grpo.state import RunFolder
from examples.grpo.weights import Rendered, export, in_bfloat16, push
from examples.multi_turn_replay.rollout import Conversation
from megatron_router_replay import BatchLayout, Replay
from router_replay.mismatch import (
    FilteredResponses,
    LogRatios,
    LossMetrics,
    Responses,
    SamplerTopK,
    diagnose,
    filter_responses,
    group_relative_advantages,
    grpo_loss,
    gspo_loss,
    masked_importance_weights,
    score_centering_loss,
    truncated_importance_weights,
)
from router_replay.replay.microbatch import MicrobatchRoutes
from router_replay.run import RunStep, write_step


@dataclass(frozen=True, eq=False)
class Microbatch:
    """B conversations of up to T tokens, padded behind: what one forward pass takes, and what its loss needs.

    Attributes:
        token_ids: int64 `[B, T]`.
        layout: the same for replay.
        responses: which tokens the rollout sampled.
        rollout: log-probabilities of the tokens by the rollout engine, nats, `[B, T]`.
        advantages: `[B]`.
        routes: whose experts the passes take; None for the trainer's own in each.
        top_k: the rollout engine's most probable tokens, where scores are centred.
        old: log-probabilities by the trainer's weights before the step, `[B, T]`.
        old_top_k: the same of `top_k`, `[B, T, K]`.
        weights: of the loss, `[B, T]`, or None.
        denominator: of the sum over its conversations: those of the minibatch, over the number of its microbatches,
            since Megatron takes the mean over these.
    """

    token_ids: Tensor
    layout: BatchLayout
    responses: Responses
    rollout: Tensor
    advantages: Tensor
    routes: MicrobatchRoutes | None = None
    top_k: SamplerTopK | None = None
    old_top_k: Tensor | None = None
    old: Tensor | None = None
    weights: Tensor | None = None
    denominator: float = 1.0


class Updates:
    """The trainer's part of a step: from conversations to new weights."""

    def __init__(self, model: GPTModel, replay: Replay, optimizer: torch.optim.Optimizer, settings: Settings) -> None:
        self.model, self.replay, self.optimizer, self.settings = model, replay, optimizer, settings

    def step(
        self, number: int, played: Sequence[Conversation], advance: Callable[[], Any]
    ) -> tuple[dict, RunStep | None]:
        """One step on its conversations: figures for the log, and what `r3 report` draws.

        Where filters leave no conversation the weights stay as they are, and there is nothing to draw.

        Args:
            advance: called after every pass over a microbatch.
        """
        filtered = _filtered(played, self.settings)
        if filtered.nothing_left:
            return self._figures_of_rollout(played, filtered), None
        kept = [played[each] for each in filtered.kept]
        groups = [each // self.settings.group_size for each in filtered.kept]
        batches = self._scored(self._microbatches(kept, groups), advance)
        metrics: list[LossMetrics] = []
        norms: list[float] = []
        first = (number - 1) * self.settings.minibatches
        for update, minibatch in enumerate(self._minibatches(batches), start=first):
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.learning_rate * min(1.0, (update + 1) / self.settings.warmup)
            self.optimizer.zero_grad()
            of_minibatch: list[LossMetrics] = self._run(partial(self._training_step, advance), minibatch)
            # Both raise what was wrong with a pass, while the weights are still those of before.
            self.replay.check()
            LossMetrics.total(of_minibatch).require()
            metrics += of_minibatch
            norms.append(float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_gradient)))
            self.optimizer.step()
        ratios = _ratios(kept, batches, groups)
        figures = self._figures_of_rollout(played, filtered) | self._figures(ratios, metrics, norms)
        return figures, _run_step(number, ratios)

    def _microbatches(self, played: Sequence[Conversation], groups: Sequence[int]) -> list[Microbatch]:
        """In the order of the conversations, so that each minibatch has whole groups unless filters took some."""
        rewards = torch.tensor([float(each.correct) for each in played])
        advantages = group_relative_advantages(rewards, _responses(played, groups))
        made = []
        for first in range(0, len(played), self.settings.microbatch):
            part = slice(first, first + self.settings.microbatch)
            token_ids = _padded([each.token_ids for each in played[part]], torch.int64)
            layout = BatchLayout.padded(token_ids, [len(each.token_ids) for each in played[part]])
            routes = None
            if self.settings.routes == "R3":
                routes = self.replay.place([each.masks for each in played[part]], layout)
            responses = Responses.padded(_padded([each.sampled for each in played[part]], torch.bool))
            made.append(
                Microbatch(
                    token_ids=token_ids,
                    layout=layout,
                    responses=responses,
                    rollout=_padded([each.rollout_logprobs for each in played[part]], torch.float32),
                    advantages=advantages[part],
                    routes=routes,
                    top_k=top_k_of(played[part], responses, self.settings.score_centering, self.model.vocab_size),
                )
            )
        return made

    def _scored(self, batches: Sequence[Microbatch], advance: Callable[[], Any]) -> list[Microbatch]:
        """With the log-probabilities of the old policy, by the routes that training will take, and weights."""
        recorded: list[MicrobatchRoutes | None] = []

        def scoring_step(data: Iterator[Microbatch], model: GPTModel) -> tuple[Tensor, Callable]:
            batch = next(data)
            if self.settings.routes == "R2":
                with self.replay.record(batch.layout) as recorder:
                    logprobs = logprobs_with_top_k(model, batch.token_ids, batch.top_k)
                recorded.append(recorder.routes)
            else:
                with self._routes_of(batch):
                    logprobs = logprobs_with_top_k(model, batch.token_ids, batch.top_k)
                recorded.append(batch.routes)
            advance()
            return logprobs, lambda output, non_loss_data: output

        with torch.no_grad():
            old = self._run(scoring_step, batches, forward_only=True, collect_non_loss_data=True)
        denominators = [
            sum(len(each.token_ids) for each in minibatch) / len(minibatch)
            for minibatch in self._minibatches(batches)
            for _ in minibatch
        ]
        scored = []
        for batch, logprobs, routes, denominator in zip(batches, old, recorded, denominators, strict=True):
            sampled, top_k = logprobs[..., 0], logprobs[..., 1:]
            weights = self._weights(LogRatios.of(trainer=sampled, rollout=batch.rollout, responses=batch.responses))
            scored.append(
                replace(batch, old=sampled, old_top_k=top_k, routes=routes, weights=weights, denominator=denominator)
            )
        return scored

    def _minibatches(self, batches: Sequence[Microbatch]) -> Iterator[tuple[Microbatch, ...]]:
        """As many as the settings say, or one for each microbatch where filters left fewer."""
        return itertools.batched(batches, -(-len(batches) // self.settings.minibatches))

    def _weights(self, ratios: LogRatios) -> Tensor | None:
        if self.settings.correction == "TIS":
            return truncated_importance_weights(ratios)
        if self.settings.correction == "MIS":
            return masked_importance_weights(ratios)
        return None

    def _training_step(
        self, advance: Callable[[], Any], data: Iterator[Microbatch], model: GPTModel
    ) -> tuple[Tensor, Callable]:
        batch = next(data)
        with self._routes_of(batch):
            logprobs = logprobs_with_top_k(model, batch.token_ids, batch.top_k)
        advance()
        return logprobs, partial(self._loss, batch)

    def _routes_of(self, batch: Microbatch) -> contextlib.AbstractContextManager[Any]:
        return self.replay.off() if batch.routes is None else self.replay.microbatch(batch.routes)

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

    def _figures_of_rollout(self, played: Sequence[Conversation], filtered: FilteredResponses) -> dict[str, Any]:
        groups = torch.tensor([each.correct for each in played]).view(-1, self.settings.group_size)
        return {
            "reward": sum(each.correct for each in played) / len(played),
            # Such groups have no advantages, and a step of nothing else has no gradient.
            "groups_of_one_reward": float((groups.all(1) | ~groups.any(1)).float().mean()),
            "response_tokens": sum(sum(each.sampled) for each in played) / len(played),
            **filtered.flat(),
        }

    def _figures(self, ratios: LogRatios, metrics: Sequence[LossMetrics], norms: Sequence[float]) -> dict[str, Any]:
        sampled = ratios.responses.mask
        return {
            # Of the rollout's distribution, estimated by its own samples.
            "entropy": -float(ratios.rollout[sampled].mean()),
            "gradient_norm": max(norms),
            **diagnose(ratios).flat(),
            **LossMetrics.total(metrics).flat(),
            **self.replay.metrics(),
        }


class Engine:
    """The rollout engine, as the loop uses it."""

    def __init__(
        self,
        url: str,
        model: GPTModel,
        checkpoint: Path,
        run: RunFolder,
        settings: Settings,
        for_rollout: Rendered,
        for_evaluation: Rendered,
    ) -> None:
        self._url, self._model, self._checkpoint, self._run, self._settings = url, model, checkpoint, run, settings
        self._for_rollout, self._for_evaluation = for_rollout, for_evaluation
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self._pushed = ""

    def played(self, step: int, concurrency: int, advance: Callable[[Conversation], Any]) -> list[Conversation]:
        """A step's conversations by the weights of now; those of a step that was interrupted are there already."""
        kept = self._run.rollouts(step)
        if not kept.exists():
            version = self.push(step - 1, self._for_rollout)
            write_rollouts(
                kept, roll_out(self._url, self._settings, step, version, self._tokenizer, advance, concurrency)
            )
        return read_rollouts(kept)

    def evaluated(self, step: int, concurrency: int) -> float:
        """Share of held-out problems that the weights after a step solve."""
        self.push(step, self._for_evaluation)
        return evaluate(self._url, self._settings, self._tokenizer, concurrency)

    def push(self, step: int, rendered: Rendered) -> str:
        """Have the weights of now, those after a step, in the engine; their version's name."""
        version = f"{self._run.path.name}-{step}"
        if rendered is not self._for_rollout:
            version += "-evaluated"
        if version != self._pushed:
            export(self._model, self._checkpoint, self._run.weights, rendered)
            push(self._url, self._run.weights, version)
            self._pushed = version
        return version


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
        for_rollout: what the rollout engine is given of the weights when it plays.
        for_evaluation: the same when it is evaluated.

    Raises:
        RolloutError: the server refused something.
        router_replay.errors.RouterReplayError: masks and model do not belong together.
    """
    run = RunFolder(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    done = run.restore(model, optimizer)
    updates = Updates(model, replay, optimizer, settings)
    engine = Engine(url, model, checkpoint, run, settings, for_rollout, for_evaluation)
    if done < 0:
        figures: dict[str, Any] = {"evaluation": engine.evaluated(0, concurrency)}
        run.save(0, model, optimizer, figures)
        log({"step": 0, **figures})
        done = 0
    for step in range(done + 1, steps + 1):
        began = time.perf_counter()
        played = engine.played(step, concurrency, show(step, "rollout"))
        rolled_out = time.perf_counter()
        figures, run_step = updates.step(step, played, show(step, "update"))
        figures["seconds"] = {"rollout": rolled_out - began, "update": time.perf_counter() - rolled_out}
        if step % settings.evaluate_every == 0:
            figures["evaluation"] = engine.evaluated(step, concurrency)
        if run_step is not None:
            write_step(run.steps, run_step)
        run.save(step, model, optimizer, figures)
        log({"step": step, **figures})


def _run_step(number: int, ratios: LogRatios) -> RunStep:
    return RunStep.of(
        number, rollout_logprobs=ratios.rollout, trainer_logprobs={"old": ratios.trainer}, responses=ratios.responses
    )


def _filtered(played: Sequence[Conversation], settings: Settings) -> FilteredResponses:
    flags = {"cut-off": [each.cut_off for each in played], "bad-call": [each.bad_calls > 0 for each in played]}
    return filter_responses(
        [float(each.correct) for each in played],
        [number // settings.group_size for number in range(len(played))],
        flags={reason: flags[reason] for reason in settings.drop if reason in flags},
        one_reward="one-reward" in settings.drop,
    )


def _ratios(played: Sequence[Conversation], batches: Sequence[Microbatch], groups: Sequence[int]) -> LogRatios:
    """Of the old policy over the rollout's, of all conversations of the step."""
    lengths = [len(each.token_ids) for each in played]
    rows = [row for batch in batches if batch.old is not None for row in batch.old]
    return LogRatios.of(
        trainer=torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)]),
        rollout=torch.tensor([logprob for each in played for logprob in each.rollout_logprobs]),
        responses=_responses(played, groups),
    )


def _responses(played: Sequence[Conversation], groups: Sequence[int]) -> Responses:
    mask = torch.tensor([flag for each in played for flag in each.sampled])
    bounds = [0, *itertools.accumulate(len(each.token_ids) for each in played)]
    return Responses.packed(mask, bounds, groups)


def _padded(rows: Sequence[Sequence[Any]], dtype: torch.dtype) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], batch_first=True)
