"""Masks from what engines return by themselves: SGLang's `routed_experts`, and vLLM's."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from router_replay.errors import DataError, InputError, PairingError
from router_replay.masks.arguments import as_integer, require_type
from router_replay.masks.client import require_meta_info
from router_replay.masks.digest import TokenIds, as_token_ids
from router_replay.masks.geometry import RoutingGeometry
from router_replay.masks.masks import RoutingMasks
from router_replay.masks.weight_versions import Runs


def masks_from_sglang(
    meta_info: Mapping[str, Any],
    token_ids: TokenIds,
    geometry: RoutingGeometry,
    *,
    start: int = 0,
    codec: str = "auto",
    weight_versions: Runs = (),
) -> RoutingMasks:
    """Masks from SGLang's own `meta_info["routed_experts"]`, as of 0.5.23.

    That is base64 of `int32 [n - 1 - start, decoder layers, K]`, as `state_capturer/routed_experts.py` gathers it:
    zeros in dense layers, and zeros in rows that nobody wrote. Rows with a MoE layer of zeros alone, or of -1 (from a
    server with --router-capture-format sglang), are not valid. With K = 1, where expert 0 is a choice, those are rows
    with zeros in all layers.

    SGLang says nothing about the tokens that its rows belong to: that they are these can be told by their number only.
    Its own capture also returns rows of other tokens where KV arrives without a forward pass (HiCache, for one), and
    nothing in the answer tells.

    Args:
        token_ids: `int [n]`, prompt and output.
        geometry: of the model; which of SGLang's layers route is not in the answer.
        start: the request's `routed_experts_start_len`.
        codec: as of `RoutingMasks.from_indices`; 'auto' does not keep the router's column order.
        weight_versions: which weights computed the rows, where the caller knows it; the answer does not say.

    Raises:
        InputError: what is no `meta_info`, no token ids, no geometry.
        DataError: no routes in it, text that is not base64, or experts that this model does not have.
        PairingError: another number of routes than these tokens and this model have, or routes in a dense layer.
    """
    require_meta_info(meta_info, "routed_experts", "masks_from_sglang")
    require_type("geometry", geometry, RoutingGeometry)
    ids, start = as_token_ids(token_ids), _position(start)
    text = meta_info.get("routed_experts")
    if not isinstance(text, str):
        found = "no routed_experts" if text is None else f"routed_experts that are a {type(text).__name__}, not base64"
        way_out = "the request must say return_routed_experts: true, the server --enable-return-routed-experts"
        if meta_info.get("routing_masks"):
            way_out = "it has routing_masks, which masks_from_meta_info(meta_info) reads"
        raise DataError(f"the answer has {found}: {way_out}")
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise DataError(f"meta_info['routed_experts'] is not base64 text: {error}") from error
    # As SGLang does: no position after the last computed token.
    first, end = min(start, max(len(ids) - 1, 0)), max(len(ids) - 1, 0)
    shape = (end - first, geometry.num_layers, geometry.top_k)
    if len(data) != 4 * shape[0] * shape[1] * shape[2]:
        raise PairingError(
            f"the answer has {len(data):,} bytes of routes, but tokens [{first}, {end}) of {len(ids)} in"
            f" {shape[1]} decoder layers of top-{shape[2]} are int32 {list(shape)}, {4 * int(np.prod(shape)):,} bytes:"
            " pass prompt and output, the model's geometry and the request's routed_experts_start_len as start"
        )
    routes = np.frombuffer(data, dtype="<i4").reshape(shape)
    return _masks(routes, ids, first, geometry, codec, weight_versions)


def masks_from_vllm(
    output: Any,
    geometry: RoutingGeometry,
    *,
    index: int = 0,
    start: int = 0,
    codec: str = "auto",
    weight_versions: Runs = (),
) -> RoutingMasks:
    """Masks from a finished `vllm.RequestOutput` of an engine with `enable_return_routed_experts`.

    vLLM returns arrays of integers `[tokens, layers, K]`, by release:

    - `outputs[i].routed_experts` alone is of the whole sequence (0.14 on, and again where rows are kept by KV block);
    - with `prompt_routed_experts` beside it (0.21) that has the prompt's rows, and the former those that follow.

    Layers are the MoE layers, or all decoder layers. There are rows for all tokens but the last, or one more, which is
    left out: the last sampled token was not fed back. Any other number is refused, since vLLM does not say which rows
    are missing (after a preemption, or where its cache lost them). Rows with a MoE layer of -1 (a cached prefix in
    0.21) or of zeros alone are not valid; with K = 1 rows with zeros in all layers. Sources:
    `docs/training/routed_experts_replay.md` of 0.21, `vllm/outputs.py` and `aux_output_connector/` of vLLM. With expert
    load balancing (EPLB) its numbers may be those of replicas and not of experts.

    Args:
        output: its `prompt_token_ids`, `outputs[i].token_ids` and routes are read.
        geometry: of the model.
        index: of the completion, where n > 1.
        start: the request's `routed_experts_prompt_start`, the position of the first row.
        codec, weight_versions: as of `masks_from_sglang`.

    Raises:
        InputError: no RequestOutput, or no such completion in it.
        DataError: no routes in it, arrays of another form, or experts that this model does not have.
        PairingError: another number of routes than its tokens and this model have, or routes in a dense layer.
    """
    require_type("geometry", geometry, RoutingGeometry)
    start = _position(start)
    prompt_ids, completions = getattr(output, "prompt_token_ids", None), getattr(output, "outputs", None)
    if prompt_ids is None or completions is None:
        raise InputError(
            f"a {type(output).__name__} has no prompt_token_ids and outputs: pass a finished vllm.RequestOutput, as it"
            " is"
        )
    completion = next((one for one in completions if one.index == index), None)
    if completion is None:
        raise InputError(f"no completion {index!r} in this output: there are {[one.index for one in completions]}")
    ids = np.concatenate([as_token_ids(prompt_ids), as_token_ids(list(completion.token_ids))])
    of_prompt = _as_routes("prompt_routed_experts", getattr(output, "prompt_routed_experts", None), geometry)
    routes = _as_routes("routed_experts", getattr(completion, "routed_experts", None), geometry)
    if of_prompt is not None:
        expected = max(len(prompt_ids) - start, 0)
        if len(of_prompt) != expected:
            raise PairingError(
                f"prompt_routed_experts has {len(of_prompt)} rows, but the prompt has {len(prompt_ids)} tokens,"
                f" {expected} of them from position {start} on"
            )
        routes = of_prompt if routes is None else np.concatenate([of_prompt, routes])
    if routes is None:
        raise DataError(
            "the output has no routed_experts: the engine needs enable_return_routed_experts=True, and only finished"
            " requests have them; of one that was preempted vLLM may have lost them"
        )
    rows = max(len(ids) - 1 - start, 0)
    # One more row is the last token's only where it is known which token the first one is of: an engine that does not
    # know a start of 1 would return as many.
    more = rows + 1 if start == 0 or of_prompt is not None else rows
    if len(routes) not in (rows, more):
        raise PairingError(
            f"the output has routes of {len(routes)} tokens, but {len(prompt_ids)} of the prompt and"
            f" {len(completion.token_ids)} sampled ones have {rows} from position {start} on (all but the last): which"
            " are missing is not known, so route this sequence natively (None in the place of its masks)"
        )
    return _masks(routes[:rows], ids, start, geometry, codec, weight_versions)


def _position(start: Any) -> int:
    start = as_integer("start", start)
    if start < 0:
        raise InputError(f"start is {start}, but a position in a sequence is not negative")
    return start


def _as_routes(name: str, value: Any, geometry: RoutingGeometry) -> np.ndarray | None:
    if value is None:
        return None
    routes = np.asarray(value)
    if routes.dtype.kind not in "iu" or routes.ndim != 3:
        raise DataError(f"{name} is {routes.dtype} {list(routes.shape)}, but must be integers [tokens, layers, top-k]")
    if routes.shape[1] not in (geometry.num_moe_layers, geometry.num_layers) or routes.shape[2] != geometry.top_k:
        raise PairingError(
            f"{name} is of {routes.shape[1]} layers and top-{routes.shape[2]}, this model has {geometry.num_moe_layers}"
            f" MoE layers among {geometry.num_layers} decoder layers and top-{geometry.top_k}"
        )
    return routes


def _masks(
    routes: np.ndarray, ids: np.ndarray, start: int, geometry: RoutingGeometry, codec: str, weight_versions: Runs
) -> RoutingMasks:
    """Masks of routes `int [T, MoE layers or decoder layers, K]`; layers that nobody wrote make a row not valid."""
    if routes.shape[1] != geometry.num_moe_layers:
        dense = sorted(set(range(geometry.num_layers)) - set(geometry.moe_layers))
        wrong = [layer for layer in dense if bool((routes[:, layer] > 0).any())]
        if wrong:
            raise PairingError(
                f"decoder layers {wrong} have routes in the answer, but are dense in this geometry, whose MoE layers"
                f" are {list(geometry.moe_layers)}: pass the geometry of the model that the engine ran"
            )
        routes = routes[:, list(geometry.moe_layers)]
    unknown = (routes == -1).all(-1).any(-1)
    zeros = (routes == 0).all(-1)
    unknown |= zeros.any(-1) if geometry.top_k > 1 else zeros.all(-1)
    try:
        return RoutingMasks.from_indices(
            # A copy that can be written to, in a type that all codecs take.
            torch.from_numpy(routes.astype(np.int32)),
            torch.from_numpy(~unknown),
            start=start,
            geometry=geometry,
            codec=codec,
            token_ids=ids,
            weight_versions=weight_versions,
        )
    except InputError as error:
        raise DataError(
            f"routes that are not of this model, of {geometry.num_experts} experts and top-{geometry.top_k}: {error}"
        ) from error
