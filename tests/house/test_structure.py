"""docs/structure.md names every folder and file of the product, and none that is not there."""

from __future__ import annotations

import re
from pathlib import Path

from tests.house.repository import AROUND, PRODUCT, ROOT

PAGE = ROOT / "docs" / "structure.md"

QUOTED = re.compile(r"`([^`]+)`")
# Folders at the top that hold no work: a build's, tools', what the demo writes.
NO_ROOMS = {"build", "dist", "report", "shared", "__pycache__"}


def tables(text: str) -> dict[str, set[str]]:
    """Folder of each row in the tables of folders, to the Python files that the row names."""
    rows = {}
    for line in text.partition("## Files")[2].partition("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for folder in QUOTED.findall(cells[0]):
            assert folder.endswith("/"), f"{folder} in the first column is no folder"
            rows[folder.rstrip("/")] = {name for name in QUOTED.findall(cells[-1]) if name.endswith(".py")}
    return rows


def folders_of(package: str, root: Path = ROOT) -> dict[str, set[str]]:
    """Every folder of a package with Python files, and these files; an `__init__.py` goes without saying."""
    found: dict[str, set[str]] = {}
    for path in (root / package).rglob("*.py"):
        found.setdefault(str(path.parent.relative_to(root)), set()).add(path.name)
    return {folder: names - {"__init__.py"} for folder, names in found.items()}


def test_every_file_of_the_product_is_on_the_page_and_no_other() -> None:
    named = {folder: files for folder, files in tables(PAGE.read_text()).items() if folder.split("/")[0] in PRODUCT}
    there = {folder: files for package in PRODUCT for folder, files in folders_of(package).items()}
    not_named = {f"{folder}/{name}" for folder in there for name in there[folder] - named.get(folder, set())}
    gone = {f"{folder}/{name}" for folder in named for name in named[folder] - there.get(folder, set())}
    assert not not_named and not gone, (
        f"docs/structure.md does not name {sorted(not_named)}, and names {sorted(gone)}, which are not there"
    )
    assert set(named) == set(there)


def test_every_folder_at_the_top_is_on_the_page() -> None:
    there = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    there = {name for name in there - NO_ROOMS if not name.endswith(".egg-info")}
    named = {folder for folder in tables(PAGE.read_text()) if "/" not in folder}
    assert there == named
    assert {*PRODUCT, *AROUND} <= named


def test_every_file_and_folder_in_the_text_is_there() -> None:
    """The two trips name files by the end of their path; one that nobody has any more was renamed."""
    text = PAGE.read_text()
    there = [f"/{path.relative_to(ROOT)}" for folder in (*PRODUCT, *AROUND) for path in (ROOT / folder).rglob("*")]
    there += [f"/{path.name}" for path in ROOT.iterdir()]
    for name in QUOTED.findall(text):
        if name.endswith((".py", "/")):
            assert any(each.endswith("/" + name.rstrip("/")) for each in there), f"{name} is nowhere"


def test_links_of_the_page_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)", PAGE.read_text())
    assert links
    assert [link for link in links if not (PAGE.parent / link).exists()] == []


def test_examples_readme_names_every_folder() -> None:
    readme = (ROOT / "examples" / "README.md").read_text()
    named = set(re.findall(r"^\| `([^`]+)/`", readme, re.MULTILINE))
    assert named == {path.name for path in (ROOT / "examples").iterdir() if path.is_dir() and path.name[0] != "_"}


def test_tests_mirror_the_packages() -> None:
    """A folder of tests is that of a package, down to its folders, or one of those that belong to no single one."""
    of_none = {"tests/end_to_end", "tests/house", "tests/docs", "tests/contract", "tests/soak"}
    # How some servers of these start.
    of_none |= {"tests/forked_servers"}
    # One model in every layout, for the whole of megatron_router_replay.
    of_none |= {"tests/megatron_router_replay/parallel"}
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py")}
    strangers = [
        str(folder)
        for folder in folders
        if str(folder) not in of_none and not (ROOT / folder.relative_to("tests")).is_dir()
    ]
    assert strangers == []
    tested = {parent for folder in folders for parent in (folder, *folder.parents)}
    packages = (*PRODUCT, "cpu_engines", "examples", "benchmarks", "studies")
    assert [package for package in packages if Path("tests", package) not in tested] == []


def test_tables_are_read_as_they_are_written() -> None:
    text = "`no.py`\n## Files\n| folder | files |\n|---|---|\n| `a/` | `b.py`: with `c`; `d.py` |\n"
    text += "| `x/`, `y/` | z |\n## On\n| `q/` | |"
    assert tables(text) == {"a": {"b.py", "d.py"}, "x": set(), "y": set()}
