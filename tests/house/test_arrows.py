"""What may import what: docs/structure.md as a table, held for every import in every file.

Imports for types and those inside functions count: who needs another's types needs the other.
"""

from __future__ import annotations

import graphlib
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from tests.house.repository import AROUND, PRODUCT, ROOT, Import, files_of, imports_of, module_of

# Of the repository's own packages, those that each may import; itself is understood.
PACKAGES: dict[str, set[str]] = {
    "router_replay": set(),
    "sglang_router_capture": {"router_replay"},
    "megatron_router_replay": {"router_replay"},
    "hf_router_replay": {"router_replay"},
    "router_replay_adapters": {"router_replay", "sglang_router_capture", "megatron_router_replay"},
    "router_replay_cli": {
        "router_replay",
        "sglang_router_capture",
        "megatron_router_replay",
        "hf_router_replay",
        "router_replay_adapters",
    },
    "cpu_engines": {"router_replay.masks"},
    "benchmarks": {*PRODUCT, "cpu_engines"},
    "examples": {*PRODUCT, "cpu_engines", "benchmarks.machine"},
    "studies": {*PRODUCT, "cpu_engines", "examples", "benchmarks.machine", "benchmarks.markdown"},
}

# Of the parts of router_replay, those that each may import.
_BELOW_ALL = {"errors", "files"}
PARTS: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors"},
    "masks": _BELOW_ALL,
    "upstream": _BELOW_ALL,
    "replay": _BELOW_ALL | {"masks", "upstream"},
    "mismatch": _BELOW_ALL | {"masks"},
    "run": _BELOW_ALL | {"masks", "mismatch"},
    "report": _BELOW_ALL | {"masks", "upstream", "replay", "mismatch", "run"},
}

ENGINES = {"sglang", "megatron", "transformers", "ray", "vllm", "verl", "miles", "slime", "nemo_rl", "areal"}
# Of libraries that not everybody has, who may import them.
LIBRARIES: dict[str, set[str]] = {
    "sglang": {"sglang_router_capture"},
    "megatron": {"megatron_router_replay"},
    "transformers": {"hf_router_replay"},
    "matplotlib": {"router_replay.report"},
    "typer": {"router_replay_cli"},
    "rich": {"router_replay_cli"},
    "fsspec": {"router_replay.masks.stores"},
    "ray": {"router_replay.masks.stores.ray"},
    "miles": {"router_replay_adapters.miles", "router_replay_adapters.miles_packed"},
    "slime": {"router_replay_adapters.slime", "router_replay_adapters.slime_packed"},
    # A stack is known to its own adapter.
    "verl": {"router_replay_adapters.verl"},
    "wrapt": {"router_replay_adapters.on_import"},
} | {engine: set() for engine in ENGINES - {"sglang", "megatron", "transformers", "ray", "miles", "slime", "verl"}}


def _within(module: str, packages: Iterable[str]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def broken_packages(imports: Iterable[Import]) -> list[str]:
    """Imports of a package of this repository that the importing one may not know."""
    own = {*PRODUCT, *AROUND}
    return [
        str(each)
        for each in imports
        if (importer := each.module.partition(".")[0]) != (imported := each.target.partition(".")[0])
        and imported in own
        and not _within(each.target, PACKAGES[importer])
    ]


def broken_parts(imports: Iterable[Import]) -> list[str]:
    """Imports between parts of router_replay against the arrows, and parts that the plan does not name."""
    broken = []
    for each in imports:
        root, _, importer = each.module.partition(".")
        target_root, _, imported = each.target.partition(".")
        importer, imported = importer.partition(".")[0], imported.partition(".")[0]
        # The package itself holds only the version.
        if root != "router_replay" or target_root != root or imported in ("", importer, "__version__"):
            continue
        if imported not in PARTS.get(importer, set()):
            broken.append(str(each))
    return broken


def broken_libraries(imports: Iterable[Import]) -> list[str]:
    """Imports of a library by a package that has to do without it."""
    return [
        str(each)
        for each in imports
        if (library := each.target.partition(".")[0]) in LIBRARIES and not _within(each.module, LIBRARIES[library])
    ]


def file_graph(imports: Iterable[Import], modules: set[str]) -> dict[str, set[str]]:
    """Each module to the modules that its file names; a name from a package leads to the package's own file."""
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for each in imports:
        target = each.target
        while target and target not in modules:
            target = target.rpartition(".")[0]
        if target and target != each.module:
            graph[each.module].add(target)
    return graph


def circles(graph: Mapping[str, set[str]]) -> list[str]:
    """Circles of imports, each in the order in which the files import one another."""
    left, found = {module: set(targets) for module, targets in graph.items()}, []
    while True:
        try:
            graphlib.TopologicalSorter(left).prepare()
        except graphlib.CycleError as error:
            importing = error.args[1][::-1]
            found.append(" imports ".join(importing))
            left[importing[0]].discard(importing[1])
        else:
            return found


def _imports(*packages: str) -> list[Import]:
    return [each for path in files_of(*packages) for each in imports_of(path)]


def _assert_none(broken: list[str], rule: str) -> None:
    assert not broken, f"{rule}, but\n  " + "\n  ".join(broken)


def test_every_part_has_a_place_in_the_plan() -> None:
    parts = {path.stem for path in (ROOT / "router_replay").iterdir() if path.is_dir() or path.suffix == ".py"}
    assert parts - {"__init__", "__pycache__"} == set(PARTS)
    assert {*PACKAGES, "tests"} == {*PRODUCT, *AROUND}


def test_packages_import_along_the_arrows() -> None:
    _assert_none(
        broken_packages(_imports(*PACKAGES)),
        "router_replay imports no end, an end router_replay alone, nobody an adapter, and no product what is around it",
    )


def test_parts_of_router_replay_import_along_the_arrows() -> None:
    rule = "masks and upstream stand at the bottom, replay on both, mismatch on masks, run on mismatch, report on all"
    _assert_none(broken_parts(_imports("router_replay")), rule)


def test_libraries_are_imported_where_they_belong() -> None:
    rule = "an engine is known to its own end, drawing to the report, and terminals to the command"
    _assert_none(broken_libraries(_imports(*PRODUCT)), rule)


def test_router_replay_itself_imports_nothing() -> None:
    assert list(imports_of(ROOT / "router_replay" / "__init__.py")) == []


def test_no_circle_between_files() -> None:
    packages = tuple(PACKAGES)
    graph = file_graph(_imports(*packages), {module_of(path) for path in files_of(*packages)})
    _assert_none(circles(graph), "no file imports one that imports it")


# --- the checks themselves ------------------------------------------------------------------------------------------


def _written(root: Path, files: Mapping[str, str]) -> list[Import]:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return [each for path in sorted(root.rglob("*.py")) for each in imports_of(path, root)]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("import megatron_router_replay.attach", 1),
        ("\nfrom megatron_router_replay import attach", 2),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from megatron_router_replay.attach import A", 3),
        ("def f():\n    from megatron_router_replay.attach import A", 2),
        ("import importlib\nA = importlib.import_module('megatron_router_replay.attach')", 2),
    ],
    ids=["import", "from", "types", "function", "by name"],
)
def test_an_import_is_found_wherever_it_stands(tmp_path: Path, text: str, line: int) -> None:
    (broken,) = broken_packages(_written(tmp_path, {"sglang_router_capture/hooks.py": text}))
    assert broken.startswith(
        f"sglang_router_capture/hooks.py:{line}: sglang_router_capture.hooks imports megatron_router_replay"
    )


def test_cpu_engines_may_know_masks_and_no_more(tmp_path: Path) -> None:
    text = "from router_replay.masks.geometry import G\nfrom router_replay.mismatch import M\nimport examples.qwen3_moe"
    found = broken_packages(_written(tmp_path, {"cpu_engines/server.py": text}))
    assert [each.split(" imports ")[1] for each in found] == ["router_replay.mismatch.M", "examples.qwen3_moe"]


def test_parts_are_told_apart(tmp_path: Path) -> None:
    imports = _written(
        tmp_path,
        {
            "router_replay/mismatch/losses.py": "from ..replay import layout\nfrom ..masks import M\nfrom . import R",
            "router_replay/masks/masks.py": "from router_replay import upstream, __version__",
            "router_replay/run/step.py": "from router_replay.mismatch import R\nfrom ..report.page import P",
            "router_replay/novelty.py": "from router_replay.masks import M",
        },
    )
    assert [each.split(": ")[1] for each in broken_parts(imports)] == [
        "router_replay.masks.masks imports router_replay.upstream",
        "router_replay.mismatch.losses imports router_replay.replay.layout",
        "router_replay.novelty imports router_replay.masks.M",
        "router_replay.run.step imports router_replay.report.page.P",
    ]


def test_libraries_are_told_apart(tmp_path: Path) -> None:
    imports = _written(
        tmp_path,
        {
            "router_replay/report/page.py": "import matplotlib.figure",
            "router_replay/run/step.py": "import matplotlib.figure",
            "megatron_router_replay/attach.py": "from megatron.core import parallel_state\nimport sglang",
        },
    )
    assert [each.split(": ")[1] for each in broken_libraries(imports)] == [
        "megatron_router_replay.attach imports sglang",
        "router_replay.run.step imports matplotlib.figure",
    ]


def test_circles_are_named_in_their_order(tmp_path: Path) -> None:
    imports = _written(
        tmp_path,
        {
            "p/__init__.py": "from p.a import A",
            "p/a.py": "from p.b import B",
            "p/b.py": "from p import c",
            "p/c.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.a import A",
            "p/d.py": "from p import A",
            "p/e.py": "from p import e2",
            "p/e2.py": "def f():\n    import p.e",
        },
    )
    modules = {"p", "p.a", "p.b", "p.c", "p.d", "p.e", "p.e2"}
    graph = file_graph(imports, modules)
    # A name from a package is in the package's file, a module in its own.
    assert graph["p.d"] == {"p"} and graph["p.b"] == {"p.c"}
    short, long = sorted((each.split(" imports ") for each in circles(graph)), key=len)
    assert sorted(short) in (["p.e", "p.e", "p.e2"], ["p.e", "p.e2", "p.e2"])
    assert set(long) == {"p.a", "p.b", "p.c"} and len(long) == 4
    assert all(imported in graph[importer] for importer, imported in itertools.pairwise(long))
