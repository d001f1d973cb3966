"""AReaL's own client, asked for generations and for what it reads of answers; a program, run by `client_reads`.

It has a process of its own: AReaL sets up the logging of the whole process when it is imported.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.stack_packages import ROOT, areal, beside


@dataclass(frozen=True)
class Read:
    """What AReaL makes of one answer.

    Attributes:
        tokens: that were sampled.
        rows: `[tokens, layers * K]`, nested lists.
    """

    tokens: list[int]
    rows: list[list[int]]


def client_reads(
    address: str, prompts: list[list[int]], max_new_tokens: int, answers: list[dict[str, Any]], folder: Path
) -> tuple[list[Read], list[Read]]:
    """What AReaL reads of a server's answers to prompts, which it asks for greedily, and of answers that are given.

    Args:
        address: `host:port` of a server.
        max_new_tokens: as many are sampled.
        folder: for files of this call.
    """
    asked = {"address": address, "prompts": prompts, "max_new_tokens": max_new_tokens, "answers": answers}
    source, target = folder / "asked.json", folder / "read.json"
    source.write_text(json.dumps(asked))
    command = [sys.executable, "-m", __name__, str(source), str(target)]
    subprocess.run(command, cwd=ROOT, env=beside(areal()), check=True, timeout=600)
    generated, read = json.loads(target.read_text())
    return [Read(**each) for each in generated], [Read(**each) for each in read]


def main(source: Path, target: Path) -> None:
    """Do what `client_reads` says."""
    from areal.api.cli_args import GenerationHyperparameters, InferenceEngineConfig
    from areal.api.io_struct import ModelRequest
    from areal.engine.sglang_remote import RemoteSGLangEngine, SGLangBackend

    asked = json.loads(source.read_text())
    engine = RemoteSGLangEngine(InferenceEngineConfig(backend="sglang:d1", return_routed_experts=True))
    engine.initialize(engine_id="0", addr=asked["address"], train_data_parallel_size=1)
    settings = GenerationHyperparameters(max_new_tokens=asked["max_new_tokens"], greedy=True, ignore_eos=True)

    async def generate() -> list[Any]:
        return [
            await engine.agenerate(ModelRequest(rid=str(number), input_ids=token_ids, gconfig=settings.new()))
            for number, token_ids in enumerate(asked["prompts"])
        ]

    try:
        results = asyncio.run(generate())
    finally:
        engine.destroy()
    read = [SGLangBackend().parse_generation_response(answer) for answer in asked["answers"]]
    target.write_text(json.dumps([[_read(each) for each in results], [_read(each) for each in read]]))


def _read(result: Any) -> dict[str, Any]:
    return {"tokens": result.output_tokens, "rows": result.routed_experts.tolist()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
