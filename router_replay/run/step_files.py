"""RunStep <-> a safetensors file: the tensors under their names, the small fields in `__metadata__`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from router_replay.errors import DataError, InputError
from router_replay.files import write_whole
from router_replay.masks.agreement import RouteTally
from router_replay.masks.arguments import as_integer, require_type
from router_replay.mismatch.responses import Responses
from router_replay.run.dynamics import Dynamics
from router_replay.run.groups import group_numbers
from router_replay.run.step import RunStep
from router_replay.run.step_tally import StepTally
from router_replay.run.tally_files import PREFIX, from_file, to_file

FORMAT = "r3_run_step"
FORMAT_VERSION = "2"
READ_VERSIONS = ("1", FORMAT_VERSION)
"""Version 1 has tokens and no tallies."""

_PASS, _WEIGHTS, _COUNT = "trainer_logprobs.", "weights.", "route_counts."
_REQUIRED = ("rollout_logprobs", "response_mask", "cu_seqlens")
_OPTIONAL = ("group_ids", "rollout_routes", "trainer_routes", "routes_valid")
_COUNTS = ("tokens", "differing_tokens", "differing", "shared")


def write_step(folder: Path, record: RunStep, *, part: int = 0, tokens: bool = True) -> Path:
    """Write a step, or this rank's part of it, for the report; a reader never sees half of it.

    Routes are stored as counts, a few bytes a layer, not token by token. Beside the tokens stand tallies of them, which
    are all that the report reads: it takes as long for millions of tokens as for a few.

    Args:
        folder: made where it is missing; one folder for each run.
        tokens: False leaves the tokens out, and so most of the file. Then the report has F(tau) of no other tau than
            `router_replay.run.step_tally.TAUS`, and compares the responses to one prompt only if they are in one part.
        part: number of the part where several data-parallel ranks each write their own sequences of one step. Equal
            group ids are one prompt over all parts, so they must be numbered over all ranks.

    Returns:
        The file: `step-00000012.safetensors`, or `step-00000012.part-0003.safetensors` for part 3.

    Raises:
        InputError: a part below 0.
        OSError: the folder cannot be written.
    """
    require_type("the step to write", record, RunStep)
    if as_integer("part", part) < 0:
        raise InputError(f"a part's number is 0 or more, got {part}")
    tensors, tallied = to_file(StepTally.of(record, part=part))
    if tokens:
        tensors |= {
            "rollout_logprobs": record.rollout_logprobs,
            "response_mask": record.responses.mask,
            "cu_seqlens": record.responses.cu_seqlens,
            **{_PASS + name: values for name, values in record.trainer_logprobs.items()},
            **{_WEIGHTS + name: values for name, values in record.weights.items()},
        }
    if tokens and record.responses.group_ids is not None:
        tensors["group_ids"] = group_numbers(record.responses.group_ids)
    metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, "step": str(record.step), "part": str(part)}
    metadata |= tallied
    # The file's own order is the alphabet's.
    metadata["passes"] = json.dumps(list(record.trainer_logprobs))
    if record.routes is not None:
        tensors |= {_COUNT + name: getattr(record.routes, name) for name in _COUNTS}
        metadata["top_k"] = str(record.routes.top_k)
    if record.moe_layers is not None:
        metadata["moe_layers"] = json.dumps(record.moe_layers)
    if record.dynamics is not None:
        metadata["dynamics"] = record.dynamics.to_json()
    # Parts of one tensor may share memory, which safetensors refuses.
    whole = {name: values.clone(memory_format=torch.contiguous_format) for name, values in tensors.items()}
    path = Path(folder) / f"step-{record.step:08d}{f'.part-{part:04d}' if part else ''}.safetensors"
    write_whole(path, lambda partial: safetensors.torch.save_file(whole, partial, metadata))
    return path


def read_place(path: Path) -> tuple[int, int]:
    """Step and part of a file, from its header alone.

    Raises:
        DataError: not a file of `write_step`, or of a version that this code does not know.
    """
    return _place(path, _open(path)[0])


def read_step(path: Path) -> RunStep:
    """Read a file of `write_step`, or one that holds raw routes in place of their counts.

    Tensors, and those of them that need not be there in brackets: `rollout_logprobs`, `trainer_logprobs.NAME` and
    [`weights.NAME`] float `[N]`; `response_mask` bool or 0/1 `[N]`; `cu_seqlens` int `[S + 1]`;
    [`group_ids`] int `[S]`; [`rollout_routes` and `trainer_routes`] int `[N, L, K]`, [`routes_valid`] bool
    `[N]`. Metadata: `format`, `format_version`, `step`, [`part`], [`moe_layers`, a JSON list], [`passes`,
    the names of the trainer's passes in the order in which they shall be shown, a JSON list], [`dynamics`, a JSON
    object as of `Dynamics.to_json`]. A file that has `dynamics` may be without passes, if it is without tokens.

    Raises:
        DataError: truncated or foreign files, other versions, keys that are missing or unknown, shapes that do not
            fit.
    """
    metadata, tensors, _ = _open(path, lambda name: not name.startswith(PREFIX))
    step, _ = _place(path, metadata)
    if "tally" in metadata and not any(name in tensors for name in _REQUIRED):
        raise DataError(
            f"{path}: has the tallies of step {step} and not its tokens, which write_step(tokens=False) leaves out:"
            " what reads tokens needs a run that was written with them; r3 report needs none"
        )
    missing = [name for name in _REQUIRED if name not in tensors]
    passes = {name.removeprefix(_PASS): tensors[name] for name in tensors if name.startswith(_PASS)}
    if missing or not (passes or "dynamics" in metadata):
        raise DataError(
            f"{path}: lacks {', '.join(missing) or 'trainer_logprobs.NAME of any pass'}; it has {sorted(tensors)}."
            " Write the file with router_replay.run.write_step"
        )
    known = {*_REQUIRED, *_OPTIONAL, *(_COUNT + name for name in _COUNTS)}
    unknown = [name for name in tensors if name not in known and not name.startswith((_PASS, _WEIGHTS))]
    if unknown:
        raise DataError(
            f"{path}: unknown tensors {unknown}; known are {', '.join(sorted(known))}, {_PASS}NAME and {_WEIGHTS}NAME"
        )
    try:
        layers: Any = json.loads(metadata.get("moe_layers", "null"))
        order = [name for name in json.loads(metadata.get("passes", "[]")) if name in passes]
        record = RunStep.of(
            step,
            rollout_logprobs=tensors["rollout_logprobs"],
            trainer_logprobs={name: passes[name] for name in dict.fromkeys([*order, *passes])},
            responses=Responses.packed(tensors["response_mask"], tensors["cu_seqlens"], tensors.get("group_ids")),
            rollout_routes=tensors.get("rollout_routes"),
            trainer_routes=tensors.get("trainer_routes"),
            routes_valid=tensors.get("routes_valid"),
            moe_layers=layers,
            weights={name.removeprefix(_WEIGHTS): tensors[name] for name in tensors if name.startswith(_WEIGHTS)},
            dynamics=Dynamics.from_json(metadata["dynamics"]) if "dynamics" in metadata else None,
        )
        return _with_counts(record, metadata, tensors)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{path}: step {step} contradicts itself: {error}") from error


def read_tally(path: Path) -> tuple[StepTally | None, bool]:
    """The tallies of a file of `write_step`, and whether it has the tokens, too; of these none is read.

    Returns:
        None in place of tallies where there are none that this release can take: the file is of an earlier one, or of
        a later one that counts other things.

    Raises:
        DataError: truncated or foreign files, other versions, or tallies that contradict themselves.
    """
    metadata, tensors, names = _open(path, lambda name: name.startswith((PREFIX, _COUNT)))
    step, _ = _place(path, metadata)
    try:
        routes, moe_layers = _counted_routes(metadata, tensors)
        order = json.loads(metadata.get("passes", "[]"))
        dynamics = Dynamics.from_json(metadata["dynamics"]) if "dynamics" in metadata else None
        tallies = {name: values for name, values in tensors.items() if name.startswith(PREFIX)}
        found = from_file(
            step, tuple(order), metadata, tallies, routes=routes, moe_layers=moe_layers, dynamics=dynamics
        )
    except (KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{path}: step {step} contradicts itself: {error}") from error
    return found, "rollout_logprobs" in names


def _with_counts(record: RunStep, metadata: dict[str, str], tensors: dict[str, Tensor]) -> RunStep:
    routes, moe_layers = _counted_routes(metadata, tensors)
    if routes is None:
        return record
    if record.routes is not None:
        raise InputError("routes are given twice: as they are, and as counts")
    return replace(record, routes=routes, moe_layers=moe_layers)


def _counted_routes(
    metadata: dict[str, str], tensors: dict[str, Tensor]
) -> tuple[RouteTally | None, tuple[int, ...] | None]:
    counts = {name: tensors[_COUNT + name] for name in _COUNTS if _COUNT + name in tensors}
    if not counts:
        return None, None
    if len(counts) < len(_COUNTS) or "top_k" not in metadata:
        raise InputError(
            f"counts of routes need {', '.join(_COUNT + name for name in _COUNTS)} and the metadata top_k;"
            f" there are {sorted(counts)}"
        )
    # Counts that were written with other shapes would be added up into nonsense.
    num_layers = len(counts["shared"])
    shapes = [tuple(counts[name].shape) for name in _COUNTS]
    if shapes != [(1,), (1,), (num_layers,), (num_layers,)]:
        raise InputError(f"counts of routes must be [1], [1], [L] and [L], got {shapes}")
    routes = RouteTally(int(metadata["top_k"]), **{name: values.long() for name, values in counts.items()})
    layers: Any = json.loads(metadata.get("moe_layers", "null"))
    moe_layers = None if layers is None else tuple(int(layer) for layer in layers)
    if moe_layers is not None and len(moe_layers) != num_layers:
        raise InputError(f"moe_layers names {len(moe_layers)} decoder layers, the routes have {num_layers}")
    return routes, moe_layers


def _open(
    path: Path, wanted: Callable[[str], bool] = lambda name: False
) -> tuple[dict[str, str], dict[str, Tensor], list[str]]:
    """Metadata, the tensors that are wanted, and the names of all."""
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in names if wanted(name)}
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: not a whole safetensors file ({error}): truncated, or foreign") from error
    if metadata.get("format") != FORMAT:
        raise DataError(
            f"{path}: a safetensors file of format {metadata.get('format')!r}, not {FORMAT!r}: write a run's steps with"
            " router_replay.run.write_step"
        )
    if metadata.get("format_version") not in READ_VERSIONS:
        raise DataError(
            f"{path}: format version {metadata.get('format_version')!r}; this release reads the versions"
            f" {' and '.join(READ_VERSIONS)}: make the report with the release that wrote the file"
        )
    return metadata, tensors, names


def _place(path: Path, metadata: dict[str, str]) -> tuple[int, int]:
    try:
        return int(metadata["step"]), int(metadata.get("part", "0"))
    except (KeyError, ValueError) as error:
        raise DataError(f"{path}: the metadata's step and part must be integers: {error!r}") from error
