"""The page that goes with the small model's checkpoint: what its training measured."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch
import transformers
from transformers import Qwen3MoeForCausalLM

DENSE_LAYER_NOTE = """
SGLang 0.5.23 gives every decoder layer of `Qwen3MoeForCausalLM` experts, whatever `mlp_only_layers` says: as released,
it drops the dense layer's weights without a warning, leaves that layer's experts uninitialised, and its outputs are
not this model's.
"""


@dataclass(frozen=True)
class Report:
    """What one training run measured; accuracies are shares of held-out problems solved at temperature 1."""

    steps: int
    batch_size: int
    seed: int
    minutes: float
    loss: float
    curve: list[tuple[int, float, float]]
    """`(step, loss, accuracy)` of each evaluation during training."""
    accuracy: float
    accuracy_by_operations: dict[int, tuple[int, int]]
    """Operations in the problem -> (solved, problems)."""
    expert_use: list[tuple[int, float]]
    """Per MoE layer: experts with at least a tenth of an even share, and the entropy of the shares (1 is even)."""


def model_card(model: Qwen3MoeForCausalLM, report: Report) -> str:
    """Markdown text of the checkpoint's README."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    config = model.config
    by_operations = "\n".join(
        f"| {operations} | {solved} of {count} | {solved / count:.3f} |"
        for operations, (solved, count) in sorted(report.accuracy_by_operations.items())
    )
    use = "\n".join(
        f"| {layer} | {used} of {config.num_experts} | {entropy:.3f} |"
        for layer, (used, entropy) in enumerate(report.expert_use, start=len(config.mlp_only_layers))
    )
    curve = "\n".join(f"| {step} | {loss:.4f} | {accuracy:.3f} |" for step, loss, accuracy in report.curve)
    problems_played = sum(count for _, count in report.accuracy_by_operations.values())
    return f"""# A small Qwen3-MoE that uses a calculator

Trained from scratch by `python -m examples.small_model.train`, which also wrote this page from what it measured.
The task, with an example conversation, is in `examples/calculator/game.py`. It is meant as a start for reinforcement
learning: it knows the format of the conversation and solves some problems and not others.

| | |
|---|---|
| parameters | {parameters:,}, bfloat16 |
| layers | {config.num_hidden_layers}; dense: {config.mlp_only_layers}, the others with {config.num_experts} experts, \
top-{config.num_experts_per_tok} |
| tokenizer | {config.vocab_size} tokens: printable ASCII characters and role markers |
| training | {report.steps} steps of {report.batch_size} conversations, seed {report.seed}, \
{report.minutes:.1f} minutes on {torch.get_num_threads()} CPU thread(s) |
| loss | {report.loss:.4f} nats per token that the model writes (mean of the last steps before the last evaluation) |
| **accuracy** | **{report.accuracy:.3f}** of {problems_played} held-out problems, whole episodes at temperature 1 |
| versions | torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()} |

The accuracy is of the weights as stored (rounded to bfloat16), computed in float32.
{DENSE_LAYER_NOTE if config.mlp_only_layers else ""}
| operations in the problem | solved | accuracy |
|---|---|---|
{by_operations}

Experts over the held-out reference conversations: those that take at least a tenth of an even share of the
assignments, and the entropy of the shares over its maximum.

| decoder layer | experts in use | entropy |
|---|---|---|
{use}

During training, on 256 held-out problems:

| step | loss | accuracy |
|---|---|---|
{curve}
"""
