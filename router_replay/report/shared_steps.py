"""Steps that come from several files, of which nothing says whether they are of one run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from router_replay.report.table import listed_steps


class SharedSteps:
    """Gathers what `router_replay.run.reading.read_run` calls `on_shared` with."""

    def __init__(self) -> None:
        self._steps: dict[tuple[Path, ...], list[int]] = {}

    def add(self, step: int, paths: tuple[Path, ...]) -> None:
        """Note that `step` is in all of `paths`."""
        self._steps.setdefault(paths, []).append(step)

    def warnings(self) -> Iterator[str]:
        """A sentence for each set of files."""
        for paths, steps in self._steps.items():
            names = [path.name for path in paths]
            if len(set(names)) < len(names):
                names = [f"{path.resolve().parent.name}/{path.name}" for path in paths]
            told = listed_steps(steps)
            come = "comes" if len(steps) == 1 else "come"
            yield (
                f"{told[0].upper()}{told[1:]} {come} from {' and '.join(names)}, and the figures are of all of them"
                " together: right for data-parallel ranks of one run; of two runs, make one report for each."
            )
