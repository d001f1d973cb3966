"""The repository's Python files, their modules and their imports, as the tests of the house read them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]

PRODUCT = (
    "router_replay",
    "sglang_router_capture",
    "megatron_router_replay",
    "hf_router_replay",
    "router_replay_adapters",
    "router_replay_cli",
)
"""What goes into the wheel."""

AROUND = ("cpu_engines", "examples", "benchmarks", "studies", "tests")
"""What stays in the repository."""


@dataclass(frozen=True)
class Import:
    """One imported module or name, by its absolute dotted name, and where it stands."""

    module: str
    file: str
    line: int
    target: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.module} imports {self.target}"


def files_of(*packages: str) -> list[Path]:
    """Every Python file of top-level packages, in a fixed order."""
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def module_of(path: Path, root: Path = ROOT) -> str:
    """Dotted name of a file: a package's is that of its folder."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree_of(path: Path) -> ast.Module:
    """The file's syntax, parsed once."""
    return ast.parse(path.read_text(), filename=str(path))


def imports_of(path: Path, root: Path = ROOT) -> Iterator[Import]:
    """Every import of a file: at its top, under TYPE_CHECKING, inside functions, and by `import_module("a.b")`.

    `from a import b` gives `a.b`, whether `b` is a module or a name in one; relative imports are made absolute.
    """
    module = module_of(path, root)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree_of(path)):
        for target in _targets(node, package):
            yield Import(module, str(path.relative_to(root)), node.lineno, target)


def _targets(node: ast.AST, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, *filter(None, [node.module])])
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        first = node.args[0] if node.args else None
        if name in ("import_module", "__import__") and isinstance(first, ast.Constant) and isinstance(first.value, str):
            return [first.value]
    return []
