"""A small upstream in a folder: read by import and by source, it has to look the same."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from router_replay.upstream import Installed, Ledger, Reader, Seam, Source

FILES = {
    "fake_engine/__init__.py": "from .core import run as start\n",
    "fake_engine/base.py": (
        "class Base:\n"
        "    size: int\n"
        "    def stub(self, *args, **kwargs): raise NotImplementedError\n"
        "    def shared(self, first, second): ...\n"
    ),
    "fake_engine/core.py": (
        "import enum\n"
        "from dataclasses import dataclass\n"
        "from . import base\n"
        "from .base import Base as Parent\n"
        "try:\n"
        "    from fake_engine.fast import speed\n"
        "except ImportError:\n"
        "    def speed(value): ...\n"
        "class Kind(enum.Enum):\n"
        "    SLOW = 1\n"
        "@dataclass\n"
        "class Config:\n"
        "    depth: int\n"
        "    width: int = 3\n"
        "class Engine(Parent):\n"
        "    def __init__(self, config, *, device='cpu'):\n"
        "        self.config = config\n"
        "    def step(self, batch, graph=False): ...\n"
        "    @classmethod\n"
        "    def build(cls, args): ...\n"
        "    @staticmethod\n"
        "    def flags(parser): ...\n"
        "    @property\n"
        "    def ids(self): return []\n"
        "class Other(base.Base): ...\n"
        "def run(batch, /, graph, *extra, device, level=1, **more): ...\n"
        "go = run\n"
        "VALUE = 3\n"
    ),
    "fake_engine/exports.py": "from fake_engine.core import *\n",
    "fake_engine-1.2.3.dist-info/METADATA": "Metadata-Version: 2.1\nName: fake-engine\nVersion: 1.2.3\n",
    "fake_engine-1.2.3.dist-info/RECORD": "",
}

LEDGER = Ledger(
    distribution="fake-engine",
    title="Fake Engine",
    prefix="fake_engine.",
    subject="the test",
    tested=("1.2.3",),
    checked=("1.2.2",),
    way_out="do without",
    seams=(),
)


def ledger_of(*seams: Seam) -> Ledger:
    """A ledger of these rows alone."""
    return replace(LEDGER, seams=seams)


def seam(where: str, parameters: tuple[str, ...] | None, use: str = "called by tests.here") -> Seam:
    """A row with that path."""
    return Seam(where, parameters, use, "the test says so", "never")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The upstream's folder, on the path of imports."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "fake_engine"]:
        del sys.modules[name]


@pytest.fixture(params=["import", "source"])
def reader(folder: Path, request: pytest.FixtureRequest) -> Reader:
    """Both readers of it in turn."""
    return Installed("fake-engine") if request.param == "import" else Source(folder, "fake-engine")
