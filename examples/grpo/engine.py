"""The rollout engine, as the loop uses it: weights in, conversations and scores out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core.models.gpt import GPTModel
from transformers import AutoTokenizer

from examples.grpo.rollouts import evaluate, read_rollouts, roll_out, write_rollouts
from examples.grpo.settings import Settings
from examples.grpo.state import RunFolder
from examples.grpo.weights import Rendered, export, push
from examples.multi_turn_replay.rollout import Conversation


class Engine:
    """A server, and which weights it has.

    Args:
        for_rollout: what it is given of the weights when it plays.
        for_evaluation: the same when it is evaluated.
    """

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
        version = self.push(step, self._for_evaluation)
        return evaluate(self._url, self._settings, version, self._tokenizer, concurrency)

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
