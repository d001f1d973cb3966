"""RunStep from JSON lines: one sequence a line, as any program can write them."""

from __future__ import annotations

import difflib
import gzip
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from router_replay.errors import DataError, InputError, RouterReplayError
from router_replay.masks import RoutingMasks, load
from router_replay.mismatch.responses import Responses
from router_replay.run.recorded_routes import recorded_routes
from router_replay.run.step import RunStep

SUFFIXES = (".jsonl", ".jsonl.gz")
KEYS = (
    *("step", "group", "rollout_logprobs", "trainer_logprobs", "response_mask", "weights"),
    *("rollout_masks", "rollout_routes", "trainer_routes", "routes_valid", "moe_layers"),
)
"""Keys with a meaning; a line may have others, unless they look like one of these misspelt."""


def read_json_lines(path: Path) -> list[RunStep]:
    """The steps of a file, in the order of their numbers.

    A line is a JSON object of one sequence of n tokens:

    - `step`: int, 0 or more; lines of a step need not be together.
    - `rollout_logprobs`: n numbers, nats; null where there is none, as for a prompt's first token.
    - `trainer_logprobs`: n numbers, or an object of them by the name of the trainer's pass.
    - `response_mask`: n times 0, 1, false or true; 1 for the tokens that the rollout sampled.
    - `group`: int or string, equal for the responses to one prompt, in all lines of a step or in none; without it,
      what compares the responses to one prompt is left out of the report.
    - `trainer_routes`: `[n][L][K]` experts that the trainer took by itself; with one of the following two.
    - `rollout_routes`: `[n][L][K]` experts that the rollout took, `routes_valid` n times 0 or 1. Tokens whose
      routes are -1 throughout on one side, as SGLang writes where it has none, are not compared, as those of
      `routes_valid` 0.
    - `rollout_masks`: `meta_info["routing_masks"]` of the answer as it is, or the handles of all turns one behind
      the other. They know their layers; where routes are raw, `moe_layers` may name them.
    - `weights`: an object of n numbers by name, importance weights that the trainer applied.

    Raises:
        DataError: names file, line and key.
    """
    steps: dict[int, list[RunStep]] = {}
    grouped: dict[int, bool] = {}
    for number, text in _lines(path):
        where = f"{path}, line {number}"
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({error}): every line must be one whole object") from error
        try:
            record = _sequence(line, where)
        except DataError:
            raise
        except (RouterReplayError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            # Those that are not this project's are of numbers that no tensor can hold.
            raise DataError(f"{where}: {error}") from error
        has_group = record.responses.group_ids is not None
        if grouped.setdefault(record.step, has_group) != has_group:
            raise DataError(
                f"{where}: some lines of step {record.step} have the key 'group' and others not: all or none"
            )
        steps.setdefault(record.step, []).append(record)
    if not steps:
        raise DataError(f"{path}: holds no line")
    try:
        return [RunStep.join(steps[step]) for step in sorted(steps)]
    except InputError as error:
        raise DataError(f"{path}: {error}") from error


def _loaded(handles: Sequence[Any], where: str) -> list[RoutingMasks]:
    try:
        return [load(handle) for handle in handles]
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    yield number, text
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}): truncated, or foreign") from error


def _sequence(line: Any, where: str) -> RunStep:
    if not isinstance(line, dict):
        raise DataError(f"{where}: a {type(line).__name__}, not a JSON object of one sequence")
    for key in ("step", "rollout_logprobs", "trainer_logprobs", "response_mask"):
        if key not in line:
            raise DataError(f"{where}: lacks the key {key!r}; it has {sorted(line)}")
    for key in line:
        meant = difflib.get_close_matches(key, KEYS, 1, 0.85)
        if meant and key not in KEYS:
            raise DataError(f"{where}: unknown key {key!r}; rename it, to {meant[0]!r} if that is what is meant")
    if type(line["step"]) is not int:
        raise DataError(f"{where}: 'step' must be an integer, got {line['step']!r}")
    mask = _numbers(line["response_mask"], f"{where}: 'response_mask'")
    count = len(mask)
    moe_layers = line.get("moe_layers")
    if moe_layers is not None and not (isinstance(moe_layers, list) and all(type(each) is int for each in moe_layers)):
        raise DataError(f"{where}: 'moe_layers' must be a list of integers, got {str(moe_layers)[:60]}")
    recorded, valid = _raw_routes(line, "rollout_routes", where), None
    if "routes_valid" in line:
        if recorded is None:
            raise InputError("'routes_valid' is of 'rollout_routes', which the line lacks; masks have their own")
        valid = _numbers(line["routes_valid"], f"{where}: 'routes_valid'")
        if not bool(((valid == 0) | (valid == 1)).all()):
            raise InputError("'routes_valid' must hold 0 and 1, or false and true")
        valid = valid.bool()
    if "rollout_masks" in line:
        if recorded is not None:
            raise InputError("the rollout's routes are given twice: 'rollout_masks' and 'rollout_routes'")
        handles = line["rollout_masks"]
        parts = _loaded(handles if isinstance(handles, list) else [handles], where)
        if not parts:
            raise InputError("'rollout_masks' is an empty list: leave the key out where there are none")
        recorded, valid = recorded_routes(parts, count)
        moe_layers = parts[0].geometry.moe_layers
    own = _raw_routes(line, "trainer_routes", where)
    if recorded is not None and own is not None and own.shape == recorded.shape:
        known = ((recorded != -1).flatten(1).any(1)) & ((own != -1).flatten(1).any(1))
        # A length that does not fit is refused below, by name.
        valid = known if valid is None else valid & known if len(valid) == len(known) else valid
    passes, weights = line["trainer_logprobs"], line.get("weights", {})
    return RunStep.of(
        line["step"],
        rollout_logprobs=_numbers(line["rollout_logprobs"], f"{where}: 'rollout_logprobs'"),
        trainer_logprobs=_named(passes if isinstance(passes, dict) else {"trainer": passes}, where, "trainer_logprobs"),
        responses=Responses.packed(mask, [0, count], [_group(line["group"], where)] if "group" in line else None),
        rollout_routes=recorded,
        trainer_routes=own,
        routes_valid=valid,
        moe_layers=moe_layers,
        weights=_named(weights, where, "weights"),
    )


def _numbers(values: Any, what: str) -> Tensor:
    if not isinstance(values, list) or not all(value is None or isinstance(value, (int, float)) for value in values):
        raise DataError(f"{what} must be a list of numbers, got {str(values)[:60]}")
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)


def _named(values: Any, where: str, key: str) -> Mapping[str, Tensor]:
    if not isinstance(values, dict):
        raise DataError(f"{where}: {key!r} must be an object of lists by name, got {str(values)[:60]}")
    return {name: _numbers(each, f"{where}: {key!r} of {name!r}") for name, each in values.items()}


def _raw_routes(line: Mapping[str, Any], key: str, where: str) -> Tensor | None:
    if key not in line:
        return None
    try:
        routes = torch.tensor(line[key])
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{where}: {key!r} must be [tokens][layers][top-k] integers ({error})") from error
    if routes.dim() != 3 or routes.is_floating_point():
        raise DataError(
            f"{where}: {key!r} must be [tokens][layers][top-k] integers, got {list(routes.shape)} {routes.dtype}"
        )
    return routes


def _group(group: Any, where: str) -> int | str:
    # true is an integer for Python.
    if type(group) is int or isinstance(group, str):
        return group
    raise DataError(f"{where}: 'group' must be an integer or a string, got {group!r}")
