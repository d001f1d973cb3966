"""What each function of the mismatch costs on one thread, on a batch that is packed and as uneven as they come.

129,036 tokens: one response of 65,536 and 500 sequences of 127, of which 100 are sampled, three to a prompt. A
rectangle of one row for each sequence would have 33 million places. Truncated sampling is of 256 tokens over a
vocabulary of 151,936.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from benchmarks.interleaved import median_seconds
from benchmarks.machine import hardware, versions, write_json
from benchmarks.shown import table
from router_replay import mismatch
from router_replay.mismatch import LogRatios, Responses

LONG, SHORT, PROMPT, NUM_SHORT = 65536, 127, 27, 500
TOKENS, VOCABULARY, SMALL_VOCABULARY = 256, 151936, 64
ROUNDS = 7
TOP_K = 32
LIMIT = 0.5
"""Seconds that a function of the packed batch may take."""


def measure_cost(seed: int, json_file: Path | None) -> None:
    """Print the median time and the peak memory of each function, and write them to `json_file`.

    Raises:
        typer.Exit: with status 1, after all of that, where a function takes longer than it may.
    """
    torch.set_num_threads(1)
    console, report = Console(width=120), {"hardware": hardware(), "versions": versions(), "rounds": ROUNDS}
    of_batch = _functions(seed)
    report["packed"] = _measured(of_batch)
    report["vocabulary"] = _measured(_sampling(seed))
    for name, title in (
        ("packed", f"{LONG + NUM_SHORT * SHORT:,} packed tokens, {LONG:,} of them one response; at most {LIMIT} s"),
        ("vocabulary", f"{TOKENS} tokens over a vocabulary of {VOCABULARY:,}"),
    ):
        shown = (
            table(title, "median ms", "peak MB", "holds") if name == "packed" else table(title, "median ms", "peak MB")
        )
        for function, found in report[name].items():
            figures = [f"{1e3 * found['seconds']:.1f}", f"{found['peak_bytes'] / 1e6:.0f}"]
            holds = ["yes" if found["seconds"] < LIMIT else "NO"] if name == "packed" else []
            shown.add_row(function, *figures, *holds)
        console.print(shown)
    console.print(f"{report['hardware']}, one thread\n{report['versions']}")
    if json_file is not None:
        write_json(report, json_file)
    if any(found["seconds"] >= LIMIT for found in report["packed"].values()):
        raise typer.Exit(1)


def _measured(functions: dict[str, Callable[[], Any]]) -> dict[str, dict[str, float]]:
    seconds = median_seconds(functions, ROUNDS)
    return {name: {"seconds": seconds[name].wall, "peak_bytes": _peak_bytes(run)} for name, run in functions.items()}


def _peak_bytes(run: Callable[[], Any]) -> int:
    """By how much resident memory rises above what it is before; what the allocator kept is given back first."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return max(_status("VmHWM") - before, 0)


def _status(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return 1024 * int(line.split()[1])


def _functions(seed: int) -> dict[str, Callable[[], Any]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([LONG] + [SHORT] * NUM_SHORT)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    mask = torch.ones(int(bounds[-1]), dtype=torch.bool)
    for begin in bounds[:-1].tolist():
        mask[begin : begin + PROMPT] = False
    groups = (torch.arange(len(lengths)) // 3).tolist()
    responses = Responses.packed(mask, bounds, groups)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rollout = -2 * torch.rand(len(mask), generator=generator) - 0.2
    trainer, current = ((rollout + 0.1 * noise(len(mask))).clamp(max=0) for _ in range(2))
    rewards, values = noise(len(lengths)), noise(len(mask))
    squares = torch.rand(len(mask), generator=generator)
    logits = [noise(len(mask), SMALL_VOCABULARY) for _ in range(2)]
    ratios = LogRatios.of(trainer=trainer, rollout=rollout, responses=responses)
    weights = mismatch.truncated_importance_weights(ratios)
    sampler, old = (each.log_softmax(-1) for each in logits)
    listed = sampler.topk(TOP_K)
    given = {"token_ids": listed.indices, "logprobs": listed.values, "responses": responses}
    top_k = mismatch.SamplerTopK.of(**given, vocab_size=SMALL_VOCABULARY)
    at_top_k = old.gather(-1, listed.indices)

    def centred() -> None:
        by_rule = {"old": at_top_k, "weigh": mismatch.truncated_weight, "advantages": rewards, "responses": responses}
        current = (at_top_k - 0.01).requires_grad_()
        mismatch.score_centering_loss(top_k, current=current, **by_rule).backward()

    def backward(loss: Callable[[Tensor], tuple[Tensor, Any]]) -> Callable[[], None]:
        def run() -> None:
            loss(current.clone().requires_grad_())[0].backward()

        return run

    of_mixture: dict[str, Any] = {
        "trainer": trainer,
        "behaviours": torch.stack([rollout, current]),
        "shares": torch.tensor([0.5, 0.5]),
        "responses": responses,
    }
    of_losses = {"advantages": rewards, "responses": responses, "weights": weights}
    return {
        "Responses.packed": lambda: Responses.packed(mask, bounds, groups),
        "LogRatios.of": lambda: LogRatios.of(trainer=trainer, rollout=rollout, responses=responses),
        "LogRatios.of, bad responses dropped": lambda: LogRatios.of(
            trainer=trainer, rollout=rollout, responses=responses, bad_responses="drop"
        ),
        "diagnose": lambda: mismatch.diagnose(ratios),
        "TIS, token": lambda: mismatch.truncated_importance_weights(ratios),
        "TIS, sequence": lambda: mismatch.truncated_importance_weights(ratios, level="sequence"),
        "MIS, geometric": lambda: mismatch.masked_importance_weights(ratios, level="geometric"),
        "IcePop": lambda: mismatch.icepop_weights(ratios),
        "SNIS, tokens of the batch": lambda: mismatch.self_normalized_weights(ratios, level="token", over="batch"),
        "SNIS, tokens of a group": lambda: mismatch.self_normalized_weights(ratios, level="token"),
        "SNIS, sequences of a group": lambda: mismatch.self_normalized_weights(ratios),
        "Metropolis, sequences": lambda: mismatch.metropolis_chain(ratios),
        "Metropolis, tokens": lambda: mismatch.metropolis_chain(ratios, level="token"),
        "balance heuristic, sequences": lambda: mismatch.balance_heuristic_weights(**of_mixture),
        "balance heuristic, tokens": lambda: mismatch.balance_heuristic_weights(**of_mixture, level="token"),
        "token veto": lambda: mismatch.catastrophic_token_veto(ratios),
        "trust region": lambda: mismatch.trust_region_mask(ratios),
        f"exact trust region, {SMALL_VOCABULARY} ids": lambda: mismatch.exact_trust_region_mask(
            trainer_logits=logits[0], rollout_logits=logits[1], responses=responses
        ),
        f"SamplerTopK.of, {TOP_K} ids": lambda: mismatch.SamplerTopK.of(**given, vocab_size=SMALL_VOCABULARY),
        f"score centering and its gradient, {TOP_K} ids": centred,
        "off-policy sequence mask": lambda: mismatch.off_policy_sequence_mask(ratios, rewards),
        "group-relative advantages": lambda: mismatch.group_relative_advantages(rewards, responses),
        "optimal token baseline": lambda: mismatch.optimal_token_baseline_advantages(
            rewards, trainer, squares, responses, weights=weights
        ),
        "doubly robust": lambda: mismatch.doubly_robust_advantages(rewards, values, weights, responses),
        "GRPO and its gradient": backward(lambda given: mismatch.grpo_loss(current=given, old=trainer, **of_losses)),
        "GSPO and its gradient": backward(lambda given: mismatch.gspo_loss(current=given, old=trainer, **of_losses)),
        "decoupled loss and its gradient": backward(
            lambda given: mismatch.decoupled_loss(ratios, current=given, advantages=rewards)
        ),
    }


def _sampling(seed: int) -> dict[str, Callable[[], Any]]:
    """Of distributions as a model has them, a few likely tokens above a long tail, and of nearly flat ones."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(TOKENS, VOCABULARY, generator=generator)
    peaked = 2 * flat
    peaked[:, :200] += 8 + 10 * torch.rand(TOKENS, 200, generator=generator)
    found: dict[str, Callable[[], Any]] = {}
    for name, logits in (("peaked", peaked), ("flat", flat)):
        kept = mismatch.kept_token_ids(logits, top_p=0.9)
        for settings in ({"top_p": 0.9}, {"top_k": 50}):
            said = ", ".join(f"{key} {value}" for key, value in settings.items())
            found[f"kept_token_ids, {name}, {said}"] = lambda logits=logits, settings=settings: mismatch.kept_token_ids(
                logits, **settings
            )
        found[f"apply_sampling_mask, {name}, {kept.shape[-1]:,} kept"] = lambda logits=logits, kept=kept: (
            mismatch.apply_sampling_mask(logits, kept, kept[:, 0])
        )
    return found
