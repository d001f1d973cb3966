"""Tables of the docs say what the code says."""

from __future__ import annotations

import ast
import math
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from router_replay.masks import RoutingGeometry, get_codec

ROOT = Path(__file__).parents[2]
SUPPORT = tomllib.loads((ROOT / "docs" / "support.toml").read_text())
SIZES = re.findall(
    r"^\| ([\w.-]+) \| (\d+) \u00d7 (\d+) of (\d+) \| (.*) \|$", (ROOT / "docs/mask-format.md").read_text(), re.M
)


def test_support_refusals_and_releases_are_those_of_the_code():
    command = [sys.executable, "-W", "ignore", "scripts/docs_tables.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "node", sorted({node for end in SUPPORT.values() for kind in ("tested", "refused") for node in end[kind].values()})
)
def test_what_is_said_to_be_tested_has_its_test(node: str):
    path, _, name = node.partition("::")
    functions = [each.name for each in ast.parse((ROOT / path).read_text()).body if isinstance(each, ast.FunctionDef)]
    assert name in functions


def test_every_model_of_the_table_of_sizes_is_read():
    assert len(SIZES) == 6


@pytest.mark.parametrize(("model", "layers", "top_k", "experts", "cells"), SIZES)
def test_bytes_per_token_are_the_codecs(model: str, layers: str, top_k: str, experts: str, cells: str):
    num_layers, k, e = int(layers), int(top_k), int(experts)
    geometry = RoutingGeometry(num_layers, tuple(range(num_layers)), e, k)
    *sizes, bound = [float(cell.strip("* ").replace(",", "")) for cell in cells.split("|")]
    # SGLang sends int32 in base64; the dense layers that it sends, too, are not counted here.
    assert sizes[0] == pytest.approx(num_layers * k * 4 * 4 / 3, abs=1)
    assert sizes[1:] == [get_codec(name).row_bytes(geometry) for name in ("bitset", "ordered", "rank")]
    assert bound == pytest.approx(num_layers * math.log2(math.comb(e, k)) / 8, abs=0.05)
