"""Builds the kernels of csrc/; everything else about the package is in pyproject.toml.

Both libraries use LibTorch's stable ABI and nothing of Python, so that one wheel serves every Python from 3.12 on and
every torch from 2.10 on; the CUDA library needs a torch of the CUDA major version that it was built with.

ROUTING_MASKS_KERNELS: "cuda" (fail without nvcc), "cpu" (leave CUDA out), "none" (plain torch only). By default what
there is a compiler for is built: without one for C++ nothing, and CUDA where torch and nvcc have it. A compiler that is
there and fails, fails the build. TORCH_CUDA_ARCH_LIST: architectures, by default those of A100, H100 and B200, and PTX
for later ones.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path


def find_cuda() -> None:
    """Tell torch's build where CUDA is; by itself it takes the folder above nvcc's, and nvcc may be a wrapper."""
    nvcc = shutil.which("nvcc")
    if nvcc and not os.environ.get("CUDA_HOME") and not os.environ.get("CUDA_PATH"):
        dry_run = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
        )
        if top := re.search(r"TOP=(.+)", dry_run.stderr):
            os.environ["CUDA_HOME"] = str(Path(top[1].strip()).resolve())


find_cuda()

import torch  # noqa: E402, after find_cuda: cpp_extension looks for CUDA as soon as it is imported
from setuptools import setup  # noqa: E402
from torch.utils import cpp_extension  # noqa: E402
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402

ABI3 = "cp312"
LIMITS = runpy.run_path(str(Path(__file__).parent / "router_replay" / "masks" / "limits.py"))
MACROS = [
    ("TORCH_TARGET_VERSION", "0x020a000000000000"),
    ("ROUTING_MASKS_MAX_EXPERTS", str(LIMITS["MAX_EXPERTS"])),
    ("ROUTING_MASKS_MAX_TOP_K", str(LIMITS["MAX_TOP_K"])),
    ("ROUTING_MASKS_MAX_RANK_BITS", str(LIMITS["MAX_RANK_BITS"])),
]
CUDA_MAJOR = (torch.version.cuda or "").partition(".")[0]
# What the libraries are made of, beside their sources: a change of any of it builds them anew.
INPUTS = ["setup.py", "router_replay/masks/limits.py", *sorted(str(path) for path in Path("csrc").glob("*.h"))]
CXX_FLAGS = ["-O3", "-g0", "-std=c++17", "-Wall", "-Wextra", "-Wno-attributes", "-Wno-unused-parameter"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-DUSE_CUDA", "--resource-usage", "--threads=0"]


def kernels_wanted() -> list[str]:
    """Of "cpu" and "cuda", those to build."""
    asked = os.environ.get("ROUTING_MASKS_KERNELS", "auto")
    if asked not in ("auto", "cuda", "cpu", "none"):
        sys.exit(f"ROUTING_MASKS_KERNELS is {asked!r}: use cuda, cpu or none, or leave it unset")
    if asked == "none":
        return []
    if missing := why_no_compiler():
        go_on_unless_asked_for("building no kernels: plain torch packs, which takes many times longer", asked, missing)
        return []
    if asked == "cpu":
        return ["cpu"]
    if missing := why_no_cuda():
        go_on_unless_asked_for("building the kernels for the CPU only", asked, missing)
        return ["cpu"]
    return ["cpu", "cuda"]


def go_on_unless_asked_for(what: str, asked: str, missing: str) -> None:
    """Say what is built instead and why, or stop where the kernels were asked for by name."""
    if asked != "auto":
        sys.exit(f"ROUTING_MASKS_KERNELS={asked}, but {missing}")
    print(f"rollout-routing-replay: {what}, because {missing}", file=sys.stderr)


def why_no_compiler() -> str | None:
    """What is missing to build for the CPU, if anything is."""
    # setuptools brings distutils, as soon as it is imported itself.
    from distutils.ccompiler import new_compiler
    from distutils.sysconfig import customize_compiler

    compiler = new_compiler()
    customize_compiler(compiler)
    program = compiler.compiler_so_cxx[0]
    if shutil.which(program):
        return None
    return f"there is no C++ compiler ({program} is not there or not on the PATH; CXX may name another)"


def why_no_cuda() -> str | None:
    """What is missing to build for CUDA, if anything is."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if cpp_extension.CUDA_HOME is None:
        return "there is no nvcc (on the PATH, or under CUDA_HOME)"
    release = nvcc_release()
    if release is None:
        # torch takes a folder for CUDA's that may hold its runtime alone.
        return f"there is no nvcc in {cpp_extension.CUDA_HOME}, and none on the PATH"
    if str(release[0]) != CUDA_MAJOR:
        return (
            f"nvcc is of CUDA {release[0]}, and torch {torch.__version__} of CUDA {CUDA_MAJOR}: to build beside the"
            " torch that is installed, and not beside the newest, use --no-build-isolation"
        )
    return None


def nvcc_release() -> tuple[int, int] | None:
    """Major and minor release of the nvcc that torch's build calls."""
    nvcc = Path(cpp_extension.CUDA_HOME, "bin", "nvcc")
    if not nvcc.is_file():
        return None
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.(\d+)", version)
    return (int(release[1]), int(release[2])) if release else None


def architectures() -> str:
    """Those to build for by default: A100, H100 and B200, and PTX of the last for later ones."""
    # compute_100 came with CUDA 12.8.
    return "8.0 9.0 10.0+PTX" if nvcc_release() >= (12, 8) else "8.0 9.0+PTX"


def extension(kernels: str):
    """The library for one kind of device, as a Python module without contents: its import registers the kernels.

    Its name has the CUDA major version, so that a torch of another one does not load it.
    """
    build, source = (CppExtension, "mask_codec_cpu.cpp") if kernels == "cpu" else (CUDAExtension, "mask_codec_cuda.cu")
    name = f"_kernels_{kernels}" if kernels == "cpu" else f"_kernels_{kernels}{CUDA_MAJOR}"
    if kernels == "cuda":
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures())
    return build(
        f"router_replay.masks.codecs.{name}",
        [f"csrc/{source}"],
        define_macros=[*MACROS, ("ROUTING_MASKS_MODULE", name)],
        depends=INPUTS,
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        # torch's build names more libraries than are used.
        extra_link_args=["-Wl,--as-needed"],
        py_limited_api=True,
    )


setup(
    ext_modules=[extension(kernels) for kernels in kernels_wanted()],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=False)},
    options={"bdist_wheel": {"py_limited_api": ABI3}},
)
