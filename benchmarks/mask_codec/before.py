"""This codec on the CPU beside that of another commit: one process each, which take turns."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from benchmarks.interleaved import Seconds, in_turns, median_of
from benchmarks.mask_codec.models import MODELS

ROOT = Path(__file__).parents[2]
PROCESS = Path(__file__).with_name("codec_process.py")
COMPARED = ("Qwen3-30B-A3B", "DeepSeek-V3", "Qwen3-Next-80B")
RUNS = ("pack", "unpack", "unpack, layer by layer", "both")

Figures = dict[str, dict[str, dict[str, Seconds]]]
"""Median times of "before" and "now", by model and run."""


def compare(before: str, tokens: int, rounds: int, threads: int) -> Figures:
    """Median times of both codecs for `tokens` tokens of each of COMPARED.

    Args:
        before: a commit of this repository, which is built under `build/`, or a folder that holds the package with its
            kernels built.

    Raises:
        typer.BadParameter: `before` is neither, or writes other rows than this codec, so that times tell nothing.
    """
    figures: Figures = {}
    with CodecProcess.started(checkout(before), threads) as old, CodecProcess.started(ROOT, threads) as new:
        for name in COMPARED:
            layers, top_k, experts = MODELS[name]
            routes = {"layers": layers, "experts": experts, "top_k": top_k, "tokens": tokens}
            if old.ask(routes) != new.ask(routes):
                raise typer.BadParameter(f"--before {before} writes other rows of {name} than this codec")
            variants = {
                (run, which): lambda process=process, run=run: Seconds(**process.ask({"run": run}))
                for run in RUNS
                for which, process in (("before", old), ("now", new))
            }
            medians = {key: median_of(times) for key, times in in_turns(variants, rounds, lambda run: run()).items()}
            figures[name] = {run: {which: medians[run, which] for which in ("before", "now")} for run in RUNS}
    return figures


def checkout(before: str) -> Path:
    """The folder with the package of `before`, its kernels built for the CPU."""
    if Path(before).is_dir():
        return Path(before).resolve()
    found = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", f"{before}^{{commit}}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if found.returncode != 0:
        raise typer.BadParameter(f"--before {before} is neither a folder nor a commit of {ROOT}")
    commit = found.stdout.strip()
    folder = ROOT / "build" / f"codec-{commit[:12]}"
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        try:
            _build(commit, partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _build(commit: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
    build = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder, env={**os.environ, "ROUTING_MASKS_KERNELS": "cpu"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if build.returncode != 0:
        raise typer.BadParameter(f"the kernels of {commit} do not build:\n{build.stderr[-2000:]}")


class CodecProcess:
    """A process that packs and unpacks by the package of one folder: see `codec_process.py`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        """Ask this process."""
        self._process = process

    @classmethod
    @contextlib.contextmanager
    def started(cls, folder: Path, threads: int) -> Iterator[CodecProcess]:
        """For the block, a process with the package in `folder`.

        Raises:
            typer.BadParameter: there is no package with kernels for the CPU.
        """
        program = f"import runpy; runpy.run_path({str(PROCESS)!r})['main']({threads})"
        if not (folder / "router_replay").is_dir():
            raise typer.BadParameter(f"{folder} holds no package router_replay")
        # -P: what is imported comes from PYTHONPATH, and not from the folder that this was started in.
        command = [sys.executable, "-P", "-c", program]
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder
        )
        try:
            asked = cls(process)
            first = asked.answer()
            if first["missing"] is not None:
                raise typer.BadParameter(f"no kernels in {folder}: {first['missing']}")
            yield asked
        finally:
            process.kill()
            process.wait()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request."""
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line that the process writes."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the codec's process ended with status {self._process.wait()}; it says why above")
        return json.loads(line)
