"""Where the kernels are missing, plain torch packs, and one warning says why."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import router_replay

PACKS_AND_SAYS_WHAT_IS_MISSING = """
import sys
# An editable installation would find the libraries in the source tree.
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
import torch
from router_replay.masks import RoutingGeometry, get_codec
from router_replay.masks.codecs.ops import MISSING_KERNELS, OPS
geometry = RoutingGeometry(3, (0, 1, 2), 24, 4)
indices = torch.rand(5, 3, 24).argsort(-1)[..., :4]
for name in ("bitset", "rank", "ordered"):
    codec = get_codec(name)
    rows = codec.pack(indices, geometry)
    assert torch.equal(codec.unpack_indices(rows, geometry).sort(-1).values, indices.sort(-1).values.int())
try:
    OPS.pack(indices * 0, 24, "rank")
except RuntimeError as error:
    assert "token 0, MoE layer 0" in str(error)
else:
    raise SystemExit("illegal indices were packed")
print(sorted(MISSING_KERNELS))
"""


WITH_A_FOURTH_CODEC = """
from router_replay.masks.codecs.registry import CODES
from hypothetical import BytesCode
CODES["bytes"] = BytesCode()
codec = get_codec("bytes")
rows = codec.pack(indices, geometry)
assert rows.shape == (5, 3 * 4 * 2) and torch.equal(codec.unpack_indices(rows, geometry), indices.int())
assert torch.equal(codec.unpack_layer(rows, geometry, 1), indices[:, 1].int())
"""


ON_ANOTHER_ACCELERATOR = """
import torch
torch.version.cuda = None
torch.accelerator.current_accelerator = lambda: torch.device("xpu")
torch.accelerator.device_count = lambda: 1
"""


def run(folder: Path, before: str = "", after: str = "", *, check: bool = True) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", before + PACKS_AND_SAYS_WHAT_IS_MISSING + after],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=check,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a copy of the package without its libraries."""
    shutil.copytree(
        Path(router_replay.__file__).parent,
        tmp_path / "router_replay",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    return tmp_path


def test_without_the_libraries(folder: Path) -> None:
    done = run(folder)
    assert "cpu" in done.stdout
    assert done.stderr.count("RuntimeWarning") == 1
    assert (
        "cpu: _kernels_cpu was not built when this package was installed, which needs a C++17 compiler" in done.stderr
    )


def test_a_codec_without_kernels_works_where_there_are_none(folder: Path) -> None:
    shutil.copy(Path(__file__).with_name("hypothetical.py"), folder)
    assert "cpu" in run(folder, after=WITH_A_FOURTH_CODEC).stdout


@pytest.mark.parametrize(
    ("says", "found"),
    [
        ("", "what it does not say"),
        ("codecs bitset, rank; up to 1024 experts, top-64, ranks of up to 128 bits", "codecs bitset, rank; up to 1024"),
        (
            "codecs bitset, rank, ordered; up to 512 experts, top-64, ranks of up to 128 bits",
            "codecs bitset, rank, ordered; up to 512",
        ),
    ],
)
def test_a_library_of_other_sources_is_not_used(folder: Path, says: str, found: str) -> None:
    library = folder / "router_replay" / "masks" / "codecs" / "_kernels_cpu.py"
    library.write_text(f"__doc__ = {says!r}\n")
    done = run(folder, check=False)
    assert done.returncode != 0
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f"router_replay.errors.DataError: {library} was built from other sources, for {found}")
    assert "this package is for codecs bitset, rank, ordered; up to 1024 experts, top-64, ranks of up to 128" in error
    assert "Build it anew" in error


def test_with_a_library_that_does_not_load(folder: Path) -> None:
    (folder / "router_replay" / "masks" / "codecs" / "_kernels_cpu.abi3.so").write_bytes(b"no library")
    done = run(folder)
    assert done.stderr.count("RuntimeWarning") == 1
    assert "cpu: _kernels_cpu does not load with torch" in done.stderr
    assert "file too short" in done.stderr or "invalid ELF header" in done.stderr


def test_on_an_accelerator_that_has_no_kernels() -> None:
    done = run(Path(router_replay.__file__).parents[1], ON_ANOTHER_ACCELERATOR)
    assert done.stdout.strip() == "['xpu']"
    assert done.stderr.count("RuntimeWarning") == 1
    assert "xpu: there are kernels for CPUs and for CUDA devices only" in done.stderr


def test_with_the_libraries_there_is_no_warning() -> None:
    done = run(Path(router_replay.__file__).parents[1])
    assert done.stdout.strip() in ("[]", "['cuda']")
    assert "RuntimeWarning" not in done.stderr
