"""Prints what the build of the CUDA kernels came to, as a table: `kernel_resources.py FOLDER <LOG`.

Registers, stack and spills are what ptxas printed, LOG; instructions are counted in the library under FOLDER by
cuobjdump, of the CUDA toolkit or of triton's wheel, and left open where there is none. Exit status 1 where nothing was
printed about kernels.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

KERNEL = re.compile(
    r"Compiling entry function '(?P<symbol>\S+)' for '(?P<architecture>sm_\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)
# routing_masks::(anonymous namespace)::pack_kernel<true, false, routing_masks::RankCode<8, unsigned long, ...>,
# routing_masks::(anonymous namespace)::ChunkReader<8> >(...)
NAME = re.compile(
    r"(?P<kernel>\w+)_kernel(?:<(?:(?P<table>true|false), (?P<take>true|false), )?"
    r"(?:routing_masks::(?P<code>\w+)Code<)?(?P<k_max>\d+)(?:, unsigned (?P<rank>\w+))?)?"
)
DETAILS = {"ChunkReader<": "16-byte loads", "IndexReader": "any indices", "EstimatePlan<": "table"}
# Of cuobjdump's listing: the architecture, a kernel's symbol, and an instruction with its address before it.
LISTING = re.compile(
    r"^arch = (?P<architecture>sm_\w+)|Function : (?P<symbol>\S+)|^\s+/\*[0-9a-f]{4,}\*/\s+(?P<code>.*);", re.M
)


def main() -> int:
    """Print the table; the exit status."""
    found = [match.groupdict() for match in KERNEL.finditer(sys.stdin.read())]
    if not found:
        print("no kernel was compiled: is there an nvcc, and a torch with CUDA?", file=sys.stderr)
        return 1
    counts = count_instructions(Path(sys.argv[1]))
    symbols = "\n".join(each["symbol"] for each in found)
    names = subprocess.run(["c++filt"], input=symbols, capture_output=True, text=True, check=True).stdout.splitlines()
    table = Table(
        "kernel", "code", "arrays of", "variant", "architecture", "registers", "instructions", "stack", "spill stores",
        "spill loads", title="CUDA kernels: registers and bytes per thread", title_justify="left",
    )  # fmt: skip
    rows = []
    for each, name in zip(found, names, strict=True):
        parts = NAME.search(name)
        if parts is None:
            raise ValueError(f"a kernel of unknown name: {name}")
        code = (parts["code"] or "none").lower() + {"long": " 64 bit", "__int128": " 128 bit", None: ""}[parts["rank"]]
        number = counts.get((each["architecture"], each["symbol"]), "-") if counts else "-"
        figures = (each["registers"], number, each["stack"], each["stores"], each["loads"])
        kernel = "take" if parts["take"] == "true" else parts["kernel"]
        details = [detail for sign, detail in DETAILS.items() if sign in name]
        detail = ", ".join([*details, *(["table"] if parts["table"] == "true" else [])])
        rows.append((kernel, code, int(parts["k_max"] or 0), detail, each["architecture"], *figures))
    for row in sorted(rows, key=lambda row: row[:5]):
        table.add_row(*map(str, row))
    Console(width=130).print(table)
    if counts is None:
        print("instructions are not counted: there is no cuobjdump, on the PATH, under CUDA_HOME or in triton's wheel")
    return 0


def count_instructions(folder: Path) -> Counter[tuple[str, str]] | None:
    """Instructions by architecture and symbol, without the padding behind a kernel's end; None without cuobjdump."""
    program = find_cuobjdump()
    if program is None:
        return None
    counts: Counter[tuple[str, str]] = Counter()
    for library in folder.rglob("_kernels_cuda*.so"):
        # It calls nvdisasm, which is beside it.
        path = f"{Path(program).parent}{os.pathsep}{os.environ['PATH']}"
        listed = subprocess.run(
            [program, "-sass", library], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True
        )
        architecture = symbol = ""
        for match in LISTING.finditer(listed.stdout):
            architecture, symbol = match["architecture"] or architecture, match["symbol"] or symbol
            if match["code"] and not match["code"].startswith("NOP"):
                counts[architecture, symbol] += 1
    return counts


def find_cuobjdump() -> str | None:
    """Path of the program, if there is one."""
    triton = importlib.util.find_spec("triton")
    folders = [os.environ.get("PATH", ""), str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"))]
    if triton is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


if __name__ == "__main__":
    sys.exit(main())
