"""RunStep <-> a safetensors file: the tensors under their names, the small fields in `__metadata__`."""

from __future__ import annotations

import json
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
from router_replay.run.groups import group_numbers
from router_replay.run.step import RunStep

FORMAT = "r3_run_step"
FORMAT_VERSION = "1"

_PASS, _WEIGHTS, _COUNT = "trainer_logprobs.", "weights.", "route_counts."
_REQUIRED = ("rollout_logprobs", "response_mask", "cu_seqlens")
_OPTIONAL = ("group_ids", "rollout_routes", "trainer_routes", "routes_valid")
_COUNTS = ("tokens", "differing_tokens", "differing", "shared")


def write_step(folder: Path, record: RunStep, *, part: int = 0) -> Path:
    """Write a step, or this rank's part of it, for the report; a reader never sees half of it.

    Routes are stored as counts, a few bytes a layer, not token by token.

    Args:
        folder: made where it is missing; one folder for each run.
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
    tensors = {
        "rollout_logprobs": record.rollout_logprobs,
        "response_mask": record.responses.mask,
        "cu_seqlens": record.responses.cu_seqlens,
        **{_PASS + name: values for name, values in record.trainer_logprobs.items()},
        **{_WEIGHTS + name: values for name, values in record.weights.items()},
    }
    if record.responses.group_ids is not None:
        tensors["group_ids"] = group_numbers(record.responses.group_ids)
    metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, "step": str(record.step), "part": str(part)}
    # The file's own order is the alphabet's.
    metadata["passes"] = json.dumps(list(record.trainer_logprobs))
    if record.routes is not None:
        tensors |= {_COUNT + name: getattr(record.routes, name) for name in _COUNTS}
        metadata["top_k"] = str(record.routes.top_k)
    if record.moe_layers is not None:
        metadata["moe_layers"] = json.dumps(record.moe_layers)
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
    the names of the trainer's passes in the order in which they shall be shown, a JSON list].

    Raises:
        DataError: truncated or foreign files, other versions, keys that are missing or unknown, shapes that do not
            fit.
    """
    metadata, tensors = _open(path, read=True)
    step, _ = _place(path, metadata)
    missing = [name for name in _REQUIRED if name not in tensors]
    passes = {name.removeprefix(_PASS): tensors[name] for name in tensors if name.startswith(_PASS)}
    if missing or not passes:
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
        )
        return _with_counts(record, metadata, tensors, layers)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{path}: step {step} contradicts itself: {error}") from error


def _with_counts(record: RunStep, metadata: dict[str, str], tensors: dict[str, Tensor], layers: Any) -> RunStep:
    counts = {name: tensors[_COUNT + name] for name in _COUNTS if _COUNT + name in tensors}
    if not counts:
        return record
    if record.routes is not None:
        raise InputError("routes are given twice: as they are, and as counts")
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
    moe_layers = None if layers is None else tuple(int(layer) for layer in layers)
    return replace(record, routes=routes, moe_layers=moe_layers)


def _open(path: Path, *, read: bool = False) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()} if read else {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: not a whole safetensors file ({error}): truncated, or foreign") from error
    if metadata.get("format") != FORMAT:
        raise DataError(
            f"{path}: a safetensors file of format {metadata.get('format')!r}, not {FORMAT!r}: write a run's steps with"
            " router_replay.run.write_step"
        )
    if metadata.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{path}: format version {metadata.get('format_version')!r}; this release reads version {FORMAT_VERSION!r}:"
            " make the report with the release that wrote the file"
        )
    return metadata, tensors


def _place(path: Path, metadata: dict[str, str]) -> tuple[int, int]:
    try:
        return int(metadata["step"]), int(metadata.get("part", "0"))
    except (KeyError, ValueError) as error:
        raise DataError(f"{path}: the metadata's step and part must be integers: {error!r}") from error
