"""Which differences of the environment imports cannot have seen."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager

# Variables that no library looks for when it loads, in C or among all that there are, as OMP_ or TQDM_ are looked for:
# what tests give their servers, and what SGLang's main process sets before it spawns. Any other difference counts.
_READ_BY_NAME = (
    "AWS_", "CUDA_DEVICE_MAX_", "CUTE_DSL_", "DG_JIT_", "NCCL_", "PROMETHEUS_", "PYTEST_", "RAY_", "SGLANG_", "TLLM_",
    "TRITON_", "TRTLLM_",
)  # fmt: skip


@contextmanager
def noting_what_is_read() -> Iterator[set[str]]:
    """Fill a set with the names of all variables that are asked for, found or not, or set, within the block."""
    names: set[str] = set()
    read, before = os._Environ.__getitem__, dict(os.environ)

    def read_and_note(variables: os._Environ, name: str) -> str:
        names.add(name)
        return read(variables, name)

    os._Environ.__getitem__ = read_and_note
    try:
        yield names
    finally:
        os._Environ.__getitem__ = read
        names.update(changes(before, os.environ))


def changes(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, str | None]:
    """What makes one environment the other: variables and their values, None for those to be removed."""
    names = before.keys() | after.keys()
    return {name: after.get(name) for name in names if before.get(name) != after.get(name)}


def unseen(names: Set[str], read: Set[str]) -> bool:
    """Whether imports that have read some variables are the same if those of `names` differ."""
    return all(name.startswith(_READ_BY_NAME) for name in names) and not names & read


def apply(differences: Mapping[str, str | None]) -> None:
    """Make `os.environ` what it is to be; only what differs, since a process's title is found by its first variable."""
    for name, value in differences.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
