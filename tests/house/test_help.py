"""Every program of the examples, benchmarks and studies says what it does, before it loads what that takes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.house.repository import ROOT, files_of, module_of

HEAVY = ("torch", "numpy", "transformers", "matplotlib", "sglang", "megatron")

PROGRAMS = sorted(
    module_of(path).removesuffix(".__main__")
    for path in files_of("examples", "benchmarks", "studies")
    if 'if __name__ == "__main__":' in path.read_text()
)

_HELP = """
import json, runpy, sys
module, heavy = sys.argv[1], sys.argv[2:]
sys.argv = [module, "--help"]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
except SystemExit as end:
    print("\\n" + json.dumps({"status": end.code, "loaded": sorted(set(heavy) & set(sys.modules))}))
"""


def test_the_programs_are_found() -> None:
    assert PROGRAMS == [
        "benchmarks.capture",
        "benchmarks.corrections",
        "benchmarks.mask_codec",
        "benchmarks.pause",
        "benchmarks.replay",
        "benchmarks.report",
        "benchmarks.staleness",
        "benchmarks.transport",
        "examples.grpo",
        "examples.multi_turn_replay",
        "examples.small_model.train",
        "studies.stability",
    ]


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_says_what_the_program_does_and_loads_nothing_heavy(program: str) -> None:
    command = [sys.executable, "-c", _HELP, program, *HEAVY]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert run.stdout, run.stderr
    *text, found = run.stdout.splitlines()
    assert json.loads(found) == {"status": 0, "loaded": []}
    # Usage, then what the program does, then a box for each group of options.
    about = [line.strip() for line in text[: next(i for i, line in enumerate(text) if line.startswith("╭"))]]
    assert about[1].startswith("Usage: ")
    sentence = " ".join(filter(None, about[2:]))
    assert len(sentence) > 40 and sentence[0].isupper() and sentence.endswith("."), sentence
    options = "\n".join(text)
    assert "Show this message and exit." in options
