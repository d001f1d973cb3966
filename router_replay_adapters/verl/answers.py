"""SGLang's answers, in the form in which verl's server reads routes out of them.

verl 0.9.1 was written for a release whose answers hold a tensor of routes. Those of the releases that this package
knows hold base64 text, and the function by which verl would decode it has moved.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import numpy as np
import pybase64
import torch
from torch import Tensor

from router_replay.errors import DataError, PairingError
from router_replay.masks import masks_from_meta_info
from router_replay.masks.geometry import RoutingGeometry
from router_replay_adapters.unknown import UNKNOWN
from router_replay_adapters.verl.packed import PackedRoutes, are_asked_for


def around_generate(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Of `SGLangHttpServer.generate`: it finds routes where it looks for them, `int32 [tokens - 1, layers, K]`.

    They are in SGLang's format: zeros in dense layers, -1 in every MoE layer of a row that is not known. Where the
    server was asked for masks they are PackedRoutes in that array's place.
    """

    @wraps(original)
    async def generate(server: Any, *args: Any, **others: Any) -> Any:
        if not server.config.enable_rollout_routing_replay:
            return await original(server, *args, **others)
        manager = _Readable(server.tokenizer_manager, server.model_config.hf_config)
        # The branch for a server without a tokenizer takes what it finds; the other one cannot be imported.
        config = _Instead(server.config, skip_tokenizer_init=True)
        return await original(_Instead(server, tokenizer_manager=manager, config=config), *args, **others)

    return generate


def around_handle_generating_state(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Of `ToolAgentLoop._handle_generating_state`: a turn in which nothing was sampled keeps the routes before it.

    Its answer has a row of each token all the same, and none of them is known: a sample of one turn must have some.
    """

    @wraps(original)
    async def _handle_generating_state(loop: Any, agent_data: Any, *args: Any, **others: Any) -> Any:
        before = agent_data.routed_experts
        state = await original(loop, agent_data, *args, **others)
        if before is not None and not agent_data.response_ids:
            agent_data.routed_experts = before
        return state

    return _handle_generating_state


class _Instead:
    """An object whose attributes are another's, but for some."""

    def __init__(self, whole: Any, **parts: Any) -> None:
        self._whole = whole
        vars(self).update(parts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)


class _Readable(_Instead):
    """A tokenizer manager whose answers hold routes as tensors."""

    def __init__(self, manager: Any, hf_config: Any) -> None:
        super().__init__(manager)
        self._hf_config = hf_config

    async def generate_request(self, request: Any, *args: Any) -> AsyncGenerator[dict[str, Any], None]:
        async for answer in self._whole.generate_request(request, *args):
            routes: Tensor | PackedRoutes | None
            if are_asked_for():
                # It may read a store.
                routes = await asyncio.to_thread(packed_of, answer, request.input_ids)
            else:
                routes = routes_of(answer, len(request.input_ids), RoutingGeometry.from_hf_config(self._hf_config))
            yield {**answer, "meta_info": {**answer["meta_info"], "routed_experts": routes}}


def packed_of(answer: Mapping[str, Any], prompt_ids: Sequence[int]) -> PackedRoutes | None:
    """The masks of an answer and the tokens that they are of; None where nothing was sampled.

    Raises:
        DataError: tokens without masks.
        PairingError: masks of other tokens.
        StoreError: masks that are not where the answer says.
    """
    output_ids = list(answer.get("output_ids") or ())
    if not output_ids:
        return None
    return PackedRoutes(masks_from_meta_info(answer["meta_info"]), np.array([*prompt_ids, *output_ids], dtype=np.int64))


def routes_of(answer: Mapping[str, Any], num_prompt_tokens: int, geometry: RoutingGeometry) -> Tensor:
    """Routes of all tokens but the last, `int32 [num_prompt_tokens + output tokens - 1, layers, K]`.

    All are unknown where a request was aborted and its answer has none.

    Raises:
        DataError: an answer without routes, or with others than SGLang's.
        PairingError: routes of another number of tokens, or another model's.
    """
    meta_info, num_sampled = answer["meta_info"], len(answer.get("output_ids") or ())
    shape = (num_prompt_tokens + num_sampled - 1, geometry.num_layers, geometry.top_k)
    text = meta_info.get("routed_experts")
    aborted = (meta_info.get("finish_reason") or {}).get("type") == "abort"
    if not num_sampled or (text is None and aborted):
        return torch.full(shape, UNKNOWN, dtype=torch.int32)
    if not isinstance(text, str):
        found = "no routed_experts" if text is None else f"routed_experts that are a {type(text).__name__}, not base64"
        masks = meta_info.get("routing_masks") is not None
        way_out = (
            "its server captures in format 'masks': unset SGLANG_ROUTER_CAPTURE_FORMAT, or set it to 'sglang'"
            if masks
            else "start verl's servers with enable_rollout_routing_replay, and with this package in their environment"
        )
        raise DataError(f"an answer of SGLang to verl has {found}: {way_out}")
    try:
        data = pybase64.b64decode_as_bytearray(text, validate=True)
    except ValueError as error:
        raise DataError(f"meta_info['routed_experts'] is not base64 text: {error}") from error
    if len(data) != 4 * int(np.prod(shape)):
        raise PairingError(
            f"an answer of SGLang to verl has {len(data):,} bytes of routes, but {num_prompt_tokens} tokens of a prompt"
            f" and {num_sampled} sampled ones, all but the last, in {shape[1]} decoder layers of top-{shape[2]} are"
            f" int32 {list(shape)}: verl's hf_config must be that of the model that SGLang serves, and the prompt's"
            " tokens those that it was given"
        )
    return torch.from_numpy(np.frombuffer(data, dtype="<i4").reshape(shape))
