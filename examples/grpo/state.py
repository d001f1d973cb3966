"""What a run goes on from after a kill: the last whole step's weights and optimizer, and its lines of figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from router_replay.files import write_whole
from router_replay.run.dynamics import number_to_json


class RunFolder:
    """The files of a run.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def rollouts(self, step: int) -> Path:
        """Where a step's conversations are kept."""
        return self.path / "rollouts" / f"step-{step:06d}.jsonl.gz"

    @property
    def steps(self) -> Path:
        """The folder of which `r3 report` draws the mismatch."""
        return self.path / "mismatch"

    @property
    def weights(self) -> Path:
        """The checkpoint that the rollout engine was last told to load."""
        return self.path / "weights"

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, figures: dict[str, Any]) -> None:
        """A step is over: its line of figures, and the state after it, in this order."""
        lines = [line for line in self.figures() if line["step"] < step]
        text = "".join(
            json.dumps(_finite(line), allow_nan=False) + "\n" for line in [*lines, {"step": step, **figures}]
        )
        write_whole(self.path / "figures.jsonl", lambda partial: partial.write_text(text))
        state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        write_whole(self.path / "state.pt", lambda partial: torch.save(state, partial))
        # What the step was made of is needed no more.
        self.rollouts(step).unlink(missing_ok=True)

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Load the state after the last whole step; its number, or -1 of a run that has none."""
        path = self.path / "state.pt"
        if not path.exists():
            return -1
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])

    def figures(self) -> list[dict[str, Any]]:
        """The lines so far; one of a step whose state was not saved is written anew."""
        path = self.path / "figures.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _finite(value: Any) -> Any:
    """The same as JSON can hold it: a gradient norm may be infinite."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return number_to_json(value) if isinstance(value, float) else value
