"""Ranks as processes of their own, by a script that is given its rank and a folder that all share."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path


def run_ranks(script: Path, folder: Path, num_ranks: int = 2) -> None:
    """Run a script once for each rank; the last words of all of them where one fails."""
    command = [sys.executable, "-W", "ignore", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    logs = [folder / f"log{rank}.txt" for rank in range(num_ranks)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            arguments = [*command, str(rank), str(folder)]
            processes.append(subprocess.Popen(arguments, env=environment, stdout=file, stderr=subprocess.STDOUT))
    try:
        # A rank that failed leaves the others waiting for it.
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert not any(codes) and None not in codes, "\n".join(log.read_text()[-3000:] for log in logs)
