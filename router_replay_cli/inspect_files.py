"""The subcommand `r3 inspect`: what files of routing masks hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from router_replay.masks import RoutingMasks

_ROWS_AT_ONCE = 8192


def inspect(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Files of masks, as save_file writes them, or the JSON of a server's answers (.json).",
            show_default=False,
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON for each sequence.")] = False,
    layers: Annotated[bool, typer.Option(help="Show the load of the experts, layer by layer.")] = True,
) -> None:
    """Show what files of routing masks hold.

    For each sequence: its tokens and how many of them have routes, the shape of the model, how rows are packed, the
    weights that computed them, the digest that ties them to their token ids, and how its routes load the experts of
    each layer. A .json file holds what a server sent: an answer, its meta_info, or a list of answers.

    Every file is read whole and checked. One that cannot be read is told, the others are shown, and the exit status
    is 1.
    """
    # Here and not above: --help need not wait for torch.
    from router_replay.errors import RouterReplayError

    failed = False
    for path in files:
        try:
            for name, masks in _masks_in(path):
                found = {"file": name, **describe(masks)}
                typer.echo(json.dumps(found) if as_json else _as_text(found, layers))
        except RouterReplayError as error:
            failed = True
            typer.echo(f"{type(error).__name__}: {error}", err=True)
    if failed:
        raise typer.Exit(1)


def describe(masks: RoutingMasks) -> dict[str, Any]:
    """What masks hold, in plain JSON types.

    Shares are of 1. `expert_load` has an entry for each MoE layer: the decoder layer's index, how many experts a valid
    row chose, the busiest of them, its share of the layer's routes, and that share as a multiple of the mean.
    """
    geometry, valid = masks.geometry, int(masks.valid.sum())
    return {
        "num_tokens": masks.num_tokens,
        "start": masks.start,
        "end": masks.end,
        "num_valid": valid,
        "valid_share": valid / masks.num_tokens if masks.num_tokens else None,
        "unknown_positions": _unknown(masks),
        "geometry": {
            "num_layers": geometry.num_layers,
            "moe_layers": list(geometry.moe_layers),
            "num_experts": geometry.num_experts,
            "top_k": geometry.top_k,
        },
        "codec": masks.codec,
        "bytes_per_token": masks.rows.shape[1],
        "num_bytes": masks.rows.numel(),
        "weight_versions": [list(run) for run in masks.weight_versions],
        "token_digest": masks.token_digest,
        "expert_load": _expert_load(masks),
    }


def _masks_in(path: Path) -> Iterator[tuple[str, RoutingMasks]]:
    from router_replay.errors import DataError, RouterReplayError
    from router_replay.masks import load_file, masks_from_meta_info

    if path.suffix != ".json":
        yield str(path), load_file(path)
        return
    try:
        answers = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
    for number, answer in enumerate(answers if isinstance(answers, list) else [answers]):
        name = f"{path}, answer {number}" if isinstance(answers, list) else str(path)
        try:
            masks = masks_from_meta_info(answer.get("meta_info", answer) if isinstance(answer, dict) else answer)
        except RouterReplayError as error:
            raise DataError(f"{name}: {error}") from error
        yield name, masks


def _unknown(masks: RoutingMasks) -> list[list[int]]:
    """Positions [first, end) of the stretches of rows that are not valid."""
    import torch

    unknown = torch.nn.functional.pad(~masks.valid.cpu(), (1, 1)).int().diff()
    bounds = zip((unknown == 1).nonzero().flatten(), (unknown == -1).nonzero().flatten(), strict=True)
    return [[masks.start + int(first), masks.start + int(end)] for first, end in bounds]


def _expert_load(masks: RoutingMasks) -> list[dict[str, Any]]:
    import torch

    from router_replay.masks import get_codec

    geometry, codec = masks.geometry, get_codec(masks.codec)
    shape = (geometry.num_moe_layers, geometry.num_experts)
    counts = torch.zeros(shape, dtype=torch.int64)
    first_of_layer = torch.arange(shape[0])[:, None] * shape[1]
    for rows in masks.rows[masks.valid].split(_ROWS_AT_ONCE):
        chosen = (codec.unpack_indices(rows, geometry) + first_of_layer).flatten()
        counts += torch.bincount(chosen, minlength=counts.numel()).reshape(shape)
    if not masks.valid.any():
        return []
    most, busiest = counts.max(-1)
    shares = most.double() / counts.sum(-1)
    figures = zip(geometry.moe_layers, (counts > 0).sum(-1).tolist(), busiest.tolist(), shares.tolist(), strict=True)
    return [
        {
            "layer": layer,
            "experts_used": used,
            "busiest_expert": expert,
            "busiest_share": share,
            "busiest_by_mean": share * geometry.num_experts,
        }
        for layer, used, expert, share in figures
    ]


def _as_text(found: dict[str, Any], layers: bool) -> str:
    geometry, runs = found["geometry"], found["weight_versions"]
    share = "" if found["valid_share"] is None else f" ({found['valid_share']:.2%})"
    unknown = found["unknown_positions"]
    stretches = ", ".join(f"[{first}, {end})" for first, end in unknown[:4]) + (", ..." if len(unknown) > 4 else "")
    lines = {
        "tokens": f"{found['num_tokens']:,}, positions [{found['start']}, {found['end']})",
        "valid": f"{found['num_valid']:,}{share}" + (f"; unknown: {stretches}" if unknown else ""),
        "model": f"{len(geometry['moe_layers'])} MoE layers of {geometry['num_layers']}, each token goes to"
        f" {geometry['top_k']} of {geometry['num_experts']} experts",
        "MoE layers": _ranges(geometry["moe_layers"]),
        "codec": f"{found['codec']}, {found['bytes_per_token']:,} bytes a token, {found['num_bytes']:,} in all",
        "weights": ", ".join(f"{version!r} from {position}" for position, version in runs[:4]) or "not named",
        "token digest": found["token_digest"],
    }
    if len(runs) > 4:
        lines["weights"] += f", and {len(runs) - 4} more changes"
    text = [found["file"], *(f"  {name:<14}{value}" for name, value in lines.items())]
    if layers and found["expert_load"]:
        text.append(f"  {'layer':>5} {'experts used':>13} {'busiest':>8} {'its share':>10} {'times the mean':>15}")
        text += [
            f"  {each['layer']:>5} {each['experts_used']:>13} {each['busiest_expert']:>8}"
            f" {each['busiest_share']:>10.2%} {each['busiest_by_mean']:>15.2f}"
            for each in found["expert_load"]
        ]
    return "\n".join(text)


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers, with neighbours as "3 to 7"."""
    starts = [number for number in numbers if number - 1 not in set(numbers)]
    ends = [number for number in numbers if number + 1 not in set(numbers)]
    pairs = zip(starts, ends, strict=True)
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in pairs)
