"""Multi-turn rollout in SGLang, log-probabilities in a trainer, with and without routing replay.

    python -m examples.multi_turn_replay

Plays conversations with a calculator over HTTP, so that every turn but the first finds its prefix in the KV cache;
gets each finished conversation's routing masks; computes the log-probabilities of the sampled tokens in Megatron's
GPTModel, or in a model of Hugging Face, with its own routes and with the recorded ones; prints a table and writes
`demo.json`, `mismatch.png`, the files of a run in `mismatch/` and the page about them, `report.html`.

The server runs on the GPU where there is one, else on the CPU. The trainer's passes always run on the CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from examples.small_model import CHECKPOINT


def main(
    server: Annotated[
        str | None, typer.Option(help="URL of a running SGLang server with --enable-router-capture.")
    ] = None,
    model: Annotated[Path, typer.Option(help="Qwen3-MoE checkpoint folder; that of --server, too.")] = CHECKPOINT,
    store: Annotated[
        str, typer.Option(help="Where the server started here puts masks, as --router-capture-store takes it.")
    ] = "inline:",
    conversations: Annotated[int, typer.Option(min=1, help="How many to play.")] = 256,
    group_size: Annotated[int, typer.Option(min=1, help="Conversations about each problem: a prompt's group.")] = 4,
    concurrency: Annotated[int, typer.Option(min=1, help="Conversations at a time.")] = 16,
    seed: Annotated[int, typer.Option(help="Chooses the problems, and seeds the server started here.")] = 0,
    trainer: Annotated[
        Literal["megatron", "hf"], typer.Option(help="Megatron-Core, or Hugging Face's transformers.")
    ] = "megatron",
    trainer_dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of the trainer's weights.")
    ] = "float32",
    out: Annotated[Path, typer.Option(help="Folder of the files that are written.")] = Path("report"),
) -> None:
    """Play conversations in SGLang, and compare a trainer's log-probabilities with and without routing replay."""
    # Here and not above: `--help` need not wait for torch and transformers.
    from examples.multi_turn_replay.job import run

    run(
        server=server,
        model=model,
        store=store,
        conversations=conversations,
        group_size=group_size,
        concurrency=concurrency,
        seed=seed,
        trainer=trainer,
        trainer_dtype=trainer_dtype,
        out=out,
    )


if __name__ == "__main__":
    typer.run(main)
