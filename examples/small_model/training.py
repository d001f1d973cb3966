"""The small model's configuration, its training, and the checkpoint folder with its card."""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
from collections import deque
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from examples.calculator.game import Problem, problems, reference_pieces
from examples.calculator.tokenizer import build_tokenizer
from examples.small_model.card import Report, model_card
from examples.small_model.episodes import solve

IGNORED = -100
BALANCE_COEFFICIENT = 0.01
WARMUP_STEPS = 100
BATCHES_PER_SORT = 8
EVALUATION_SEED, FINAL_SEED = 1, 2

console = Console()


def build_config(tokenizer: PreTrainedTokenizerFast, dense_layers: int) -> Qwen3MoeConfig:
    """Six layers, the first `dense_layers` without experts: with one, MoE and decoder layer numbers never agree."""
    return Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=tokenizer.model_max_length,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        mlp_only_layers=list(range(dense_layers)),
        moe_intermediate_size=32,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        router_aux_loss_coef=BALANCE_COEFFICIENT,
        # Wide enough that the first routing decisions are not ties: router logits start with a deviation of about 0.6.
        initializer_range=0.05,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def encode_reference(tokenizer: PreTrainedTokenizerFast, problem: Problem) -> tuple[Tensor, Tensor]:
    """Token ids and labels, both int64 [num_tokens]; labels are IGNORED where the model is not the author."""
    ids: list[int] = []
    labels: list[int] = []
    for text, is_model in reference_pieces(problem):
        piece = tokenizer.encode(text)
        ids += piece
        labels += piece if is_model else [IGNORED] * len(piece)
    return torch.tensor(ids), torch.tensor(labels)


def balance_loss(router_logits: Tensor, real: Tensor, top_k: int) -> Tensor:
    """Load-balancing loss of one layer (arXiv 2101.03961, eq. 4), 1 when the experts are used evenly.

    `router_logits` is float [num_tokens, num_experts]; `real` is bool [num_tokens], False for padding.
    """
    probabilities = router_logits[real].softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(top_k).indices, 1.0 / top_k)
    return probabilities.shape[1] * (chosen.mean(0) * probabilities.mean(0)).sum()


@torch.inference_mode()
def expert_use(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, batch: Sequence[Problem]
) -> list[tuple[int, float]]:
    """`Report.expert_use` over the reference conversations of `batch`."""
    ids = [encode_reference(tokenizer, problem)[0] for problem in batch]
    output = model(input_ids=pad_sequence(ids, batch_first=True), output_router_logits=True, use_cache=False)
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).flatten().bool()
    result = []
    for logits in output.router_logits:
        chosen = logits.flatten(0, -2)[mask].topk(model.config.num_experts_per_tok).indices
        share = chosen.flatten().bincount(minlength=model.config.num_experts) / chosen.numel()
        used = int((share * len(share) >= 0.1).sum())
        result.append((used, float(torch.special.entr(share).sum() / math.log(len(share)))))
    return result


def train(
    model: Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    evaluate_every: int,
    stop_accuracy: float,
    seed: int,
) -> list[tuple[int, float, float]]:
    """Supervised training on reference conversations, in place; `Report.curve`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / WARMUP_STEPS) * (0.55 + 0.45 * math.cos(math.pi * min(1.0, step / steps))),
    )
    stream = problems("train", seed)
    held_out = list(islice(problems("held_out", EVALUATION_SEED), 256))
    generator = torch.Generator().manual_seed(seed)
    waiting: list[tuple[Tensor, Tensor]] = []
    losses: deque[float] = deque(maxlen=evaluate_every)
    curve: list[tuple[int, float, float]] = []
    columns = (
        TextColumn("loss {task.fields[loss]:.3f} accuracy {task.fields[accuracy]:.2f}"),
        *(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("train", total=steps, loss=math.nan, accuracy=math.nan)
        for step in range(1, steps + 1):
            if not waiting:
                # Batches of similar length: little is spent on padding.
                examples = [encode_reference(tokenizer, next(stream)) for _ in range(batch_size * BATCHES_PER_SORT)]
                examples.sort(key=lambda example: len(example[0]))
                order = torch.randperm(BATCHES_PER_SORT, generator=generator).tolist()
                waiting = [examples[i * batch_size : (i + 1) * batch_size] for i in order]
            ids, labels = zip(*waiting.pop(), strict=True)
            ids = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
            labels = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
            # No attention mask: padding is on the right, where causal attention keeps it out of sight.
            output = model(input_ids=ids, labels=labels, output_router_logits=True, use_cache=False)
            real = (ids != tokenizer.pad_token_id).flatten()
            answer_loss = torch.nn.functional.cross_entropy(
                output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
            )
            balance = sum(
                balance_loss(logits.flatten(0, -2), real, model.config.num_experts_per_tok)
                for logits in output.router_logits
            )
            (answer_loss + BALANCE_COEFFICIENT * balance).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(answer_loss.item())
            progress.update(bar, advance=1, loss=losses[-1])
            if step % evaluate_every == 0 or step == steps:
                rounded = copy.deepcopy(model).to(torch.bfloat16).float()
                accuracy = sum(solve(rounded, tokenizer, held_out, seed)) / len(held_out)
                curve.append((step, sum(losses) / len(losses), accuracy))
                progress.update(bar, accuracy=accuracy)
                console.print(f"step {step}: loss {curve[-1][1]:.4f}, held-out accuracy {accuracy:.3f}")
                if accuracy >= stop_accuracy:
                    break
    return curve


def save(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the bfloat16 checkpoint, its tokenizer and its generation settings into `folder`."""
    stored = copy.deepcopy(model).to(torch.bfloat16)
    stored.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    stored.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers 5 reads the older names of these two fields as well, and other readers know only those.
    config = json.loads((folder / "config.json").read_text())
    config["num_experts"] = config.pop("num_local_experts")
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def train_checkpoint(
    out: Path,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    evaluate_every: int,
    stop_accuracy: float,
    final_problems: int,
    dense_layers: int,
    threads: int,
    seed: int,
) -> None:
    """Train, save and evaluate; `out` appears, or is replaced, only when all of it is there.

    Arguments are those of `python -m examples.small_model.train`.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(max_length=2048)
    # The plain loop over experts: on a CPU, the batched kernels are no faster for experts as narrow as these.
    model = Qwen3MoeForCausalLM._from_config(build_config(tokenizer, dense_layers), experts_implementation="eager")
    start = time.perf_counter()
    curve = train(
        model,
        tokenizer,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        evaluate_every=evaluate_every,
        stop_accuracy=stop_accuracy,
        seed=seed,
    )
    minutes = (time.perf_counter() - start) / 60

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    save(model, tokenizer, partial)
    stored = Qwen3MoeForCausalLM.from_pretrained(partial, dtype=torch.float32, experts_implementation="eager")
    batch = list(islice(problems("held_out", FINAL_SEED), final_problems))
    solved = solve(stored, tokenizer, batch, seed)
    by_operations = {}
    for operations in sorted({len(problem.steps) for problem in batch}):
        results = [correct for problem, correct in zip(batch, solved, strict=True) if len(problem.steps) == operations]
        by_operations[operations] = (sum(results), len(results))
    report = Report(
        steps=curve[-1][0],
        batch_size=batch_size,
        seed=seed,
        minutes=minutes,
        loss=curve[-1][1],
        curve=curve,
        accuracy=sum(solved) / len(solved),
        accuracy_by_operations=by_operations,
        expert_use=expert_use(stored, tokenizer, batch[:128]),
    )
    (partial / "README.md").write_text(model_card(stored, report))
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    console.print(f"{out}: accuracy {report.accuracy:.3f} on {len(batch)} held-out problems, {minutes:.1f} minutes")
