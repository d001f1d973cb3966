"""Reads what ptxas printed during the build of the CUDA kernels from standard input, and writes it as a table.

Exit status 1 where it printed nothing about kernels.
"""

from __future__ import annotations

import re
import subprocess
import sys

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
    r".*?(?P<detail>ChunkReader|IndexReader|, (?:short|int|long)>|\((?!anonymous))"
)
DETAILS = {
    "ChunkReader": "16-byte loads", "IndexReader": "any indices",
    ", short>": "int16", ", int>": "int32", ", long>": "int64", "(": "",
}  # fmt: skip


def main() -> int:
    found = [match.groupdict() for match in KERNEL.finditer(sys.stdin.read())]
    if not found:
        print("no kernel was compiled: is there an nvcc, and a torch with CUDA?", file=sys.stderr)
        return 1
    symbols = "\n".join(each["symbol"] for each in found)
    names = subprocess.run(["c++filt"], input=symbols, capture_output=True, text=True, check=True).stdout.splitlines()
    table = Table(
        "kernel", "code", "arrays of", "variant", "architecture", "registers", "stack", "spill stores", "spill loads",
        title="CUDA kernels: registers and bytes per thread", title_justify="left",
    )  # fmt: skip
    rows = []
    for each, name in zip(found, names, strict=True):
        parts = NAME.search(name)
        if parts is None:
            raise ValueError(f"a kernel of unknown name: {name}")
        code = (parts["code"] or "none").lower() + {"long": " 64 bit", "__int128": " 128 bit", None: ""}[parts["rank"]]
        figures = (each[key] for key in ("registers", "stack", "stores", "loads"))
        kernel = "take" if parts["take"] == "true" else parts["kernel"]
        details = (DETAILS[parts["detail"]], "table" if parts["table"] == "true" else "")
        detail = ", ".join(filter(None, details))
        rows.append((kernel, code, int(parts["k_max"] or 0), detail, each["architecture"], *figures))
    for row in sorted(rows):
        table.add_row(*map(str, row))
    Console(width=110).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
