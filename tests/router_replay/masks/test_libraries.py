"""The built libraries: there is one for CUDA where nvcc is, and they need nothing but the stable interfaces."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import router_replay.masks.codecs
from router_replay.masks.codecs.registry import CODES
from router_replay.masks.limits import MAX_EXPERTS, MAX_RANK_BITS, MAX_TOP_K

LIBRARIES = {
    path.name.split(".")[0]: path for path in Path(router_replay.masks.codecs.__file__).parent.glob("_kernels_*.so")
}
CUDA = f"_kernels_cuda{(torch.version.cuda or '').partition('.')[0]}"

# LibTorch's stable C functions, CUDA's runtime, the one function of Python's limited API, what every library has, and
# the parts of libstdc++ that torch's libraries bring for systems where it is older.
ALLOWED = re.compile(r"(aoti_torch_|torch_|cuda[A-Z]|__cuda[A-Z]|PyModuleDef_Init$|_ITM_|__gmon_start__$|_ZNK?St|_ZSt)")
# libc and libstdc++ keep their own promises, by versions of symbols.
VERSIONED = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_")


def undefined_symbols(library: Path) -> list[str]:
    listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    return [name for line in listed.stdout.splitlines() if not VERSIONED.search(name := line.split()[-1])]


def test_cuda_is_built_for_a100_h100_and_b200_where_nvcc_is() -> None:
    expected = {"_kernels_cpu"}
    if shutil.which("nvcc") and torch.version.cuda:
        expected.add(CUDA)
    assert set(LIBRARIES) == expected
    for name in expected - {"_kernels_cpu"}:
        library = LIBRARIES[name].read_bytes()
        assert [each for each in (80, 90, 100) if f"sm_{each}".encode() not in library] == []


@pytest.mark.parametrize("name", sorted(LIBRARIES))
def test_only_stable_interfaces_are_used(name: str) -> None:
    undefined = undefined_symbols(LIBRARIES[name])
    assert {"torch_library_impl", "PyModuleDef_Init"} <= set(undefined)
    assert [symbol for symbol in undefined if not ALLOWED.match(symbol)] == []


@pytest.mark.parametrize("name", sorted(LIBRARIES))
def test_a_library_says_which_codecs_and_limits_it_is_built_for(name: str) -> None:
    docstring = importlib.import_module(f"router_replay.masks.codecs.{name}").__doc__
    assert docstring is not None
    assert f"codecs {', '.join(CODES)}; up to {MAX_EXPERTS} experts, top-{MAX_TOP_K}, " in docstring
    assert docstring.endswith(f"ranks of up to {MAX_RANK_BITS} bits")


@pytest.mark.parametrize("name", sorted(LIBRARIES))
def test_the_libraries_name_says_that_any_python_may_load_it(name: str) -> None:
    assert LIBRARIES[name].name == f"{name}.abi3.so"
    needed = subprocess.run(["readelf", "-d", LIBRARIES[name]], capture_output=True, text=True, check=True).stdout
    assert "libpython" not in needed
    assert "libtorch_python" not in needed
