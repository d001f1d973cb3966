"""Packed routes on their way through verl's rollout: one RoutingMasks where verl has an array of experts.

verl cuts that array, and puts what a resumed rollout adds behind it; then each sample's masks go on in
`non_tensor_batch["routing_masks"]`, or under that key in what a sample's `as_dict` gives: as the bytes of a container,
since TransferQueue makes a dictionary of any dataclass.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np

from router_replay.errors import DataError, InputError
from router_replay.masks.container import from_bytes, to_bytes
from router_replay.masks.masks import RoutingMasks
from router_replay_adapters.verl.padding import require_trained
from sglang_router_capture.options import CaptureOptions

KEY = "routing_masks"


def are_asked_for() -> bool:
    """Whether the servers of this run send masks: by the environment, which all processes of verl share."""
    options = CaptureOptions.from_environment()
    return options is not None and options.format == "masks"


@dataclass(frozen=True)
class PackedRoutes:
    """Masks that answer to what verl does with an array `[tokens - 1, layers, K]` of one rollout.

    Attributes:
        masks: from token 0 on, or a part of it.
        token_ids: `int64 [n]`, prompt and output, which the masks are checked against.
    """

    masks: RoutingMasks
    token_ids: np.ndarray

    def __post_init__(self) -> None:
        self.masks.check_tokens(self.token_ids)

    def __len__(self) -> int:
        return len(self.masks)

    def numpy(self) -> PackedRoutes:
        """Itself: as much of an array as verl needs."""
        return self

    def __getitem__(self, rows: Any) -> PackedRoutes:
        """`[:n]`, what is left of a sequence of n tokens, or `[-n:]`, its last n rows.

        Raises:
            InputError: anything else.
        """
        if isinstance(rows, slice) and rows.step is None:
            if rows.start is None and rows.stop is not None and rows.stop >= 0 and self.masks.start == 0:
                return PackedRoutes(self.masks.cut(rows.stop, self.token_ids), self.token_ids)
            if rows.stop is None and rows.start is not None and rows.start < 0:
                return PackedRoutes(self.masks[max(len(self) + rows.start, 0) :], self.token_ids)
        raise InputError(f"verl takes [:n] or [-n:] of a rollout's routes, and here {rows!r} was taken of {self.masks}")

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Put parts end to end by `np.concatenate`, as verl does with those of a rollout that was resumed."""
        if function is not np.concatenate or len(args) != 1 or kwargs:
            return NotImplemented
        (parts,) = args
        if not all(isinstance(part, PackedRoutes) for part in parts):
            return NotImplemented
        token_ids = parts[-1].token_ids
        return PackedRoutes(RoutingMasks.join([part.masks for part in parts], token_ids), token_ids)


def around_as_dict(original: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """Of `AgentLoopOutput.as_dict`: masks stand beside the tensors, and not as one."""

    @wraps(original)
    def as_dict(output: Any) -> dict[str, Any]:
        if not are_asked_for():
            return original(output)
        data, bare = _taken_out(output)
        return {**original(bare), KEY: data}

    return as_dict


def around_agent_loop_postprocess(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Of `AgentLoopWorker._agent_loop_postprocess`: masks are an extra field, which goes to `non_tensor_batch`."""

    @wraps(original)
    async def _agent_loop_postprocess(worker: Any, output: Any, *args: Any, **others: Any) -> Any:
        if not are_asked_for():
            return await original(worker, output, *args, **others)
        data, bare = _taken_out(output)
        padded = await original(worker, bare, *args, **others)
        padded.extra_fields[KEY] = data
        return padded

    return _agent_loop_postprocess


def around_construct_minimal_padding_template(
    original: Callable[..., tuple[dict[str, Any], Any]],
) -> Callable[..., tuple[dict[str, Any], Any]]:
    """Of `construct_minimal_padding_template`: one that fills up a batch has no masks of the one that it copies."""

    @wraps(original)
    def construct_minimal_padding_template(*args: Any, **others: Any) -> tuple[dict[str, Any], Any]:
        sample, tag = original(*args, **others)
        if KEY in sample:
            sample[KEY] = None
        return sample, tag

    return construct_minimal_padding_template


def _taken_out(output: Any) -> tuple[bytes | None, Any]:
    """A sample's masks as bytes, and the sample without them; None where no token was sampled.

    Raises:
        DataError: the sample has routes of another kind, or sampled tokens and no routes of them.
    """
    routes = output.routed_experts
    if routes is None and any(output.response_mask):
        raise DataError(
            "this run's servers send masks, but a sample of verl has sampled tokens and no routes: set"
            " actor_rollout_ref.rollout.enable_rollout_routing_replay=True, and keep `routed_experts` of the server's"
            " output in an agent loop of your own; unset SGLANG_ROUTER_CAPTURE to train without replay"
        )
    if routes is None:
        return None, output
    if not isinstance(routes, PackedRoutes):
        raise DataError(
            f"this run's servers send masks, but a sample of verl has routes that are a {type(routes).__name__}: unset"
            " SGLANG_ROUTER_CAPTURE where the rollout is not SGLang with this package"
        )
    require_trained(routes.masks.end, output)
    return to_bytes(routes.masks), output.model_copy(update={"routed_experts": None})


def masks_of(values: Sequence[Any] | None) -> list[RoutingMasks | None] | None:
    """Masks of a microbatch, from what its batch has under the key; None where it has none.

    Raises:
        DataError: something else than bytes of masks there.
    """
    if values is None:
        return None
    listed = [getattr(value, "data", value) for value in values]
    wrong = next((one for one in listed if one is not None and not isinstance(one, bytes)), None)
    if wrong is not None:
        raise DataError(
            f"a batch of verl has a {type(wrong).__name__} under {KEY!r}, where the bytes of masks belong"
            " (router_replay.masks.to_bytes)"
        )
    return [None if data is None else from_bytes(data) for data in listed]
