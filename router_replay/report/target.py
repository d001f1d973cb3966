"""Where the page may be written: checked before a run is read, which may take minutes."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from router_replay.errors import DataError
from router_replay.run.reading import RUN_SUFFIXES


def require_target(out: Path, files: Sequence[Path]) -> None:
    """Check that `out` may be replaced by the page of the run's `files`; folders above it need not be there yet.

    Raises:
        DataError: `out` is one of the files or is named like one, is a folder, or cannot be written.
    """
    if out.name.endswith(RUN_SUFFIXES):
        raise DataError(
            f"--out {out}: {', '.join(RUN_SUFFIXES)} are endings of a run's files, and the page is HTML: name it"
            " report.html, say"
        )
    if out.resolve() in {path.resolve() for path in files}:
        raise DataError(f"--out {out}: is a file of the run itself, which the page would replace: name another")
    if out.is_dir():
        raise DataError(f"--out {out}: is a folder: name the HTML file in it, such as {out / 'report.html'}")
    folder = next(each for each in out.absolute().parents if each.exists())
    try:
        # Permissions alone do not tell of file systems that are read-only, nor do they hold for root.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DataError(
            f"--out {out}: cannot be written, because nothing can be made in {folder} ({error.strerror}): name a file"
            " in a folder of your own"
        ) from error
