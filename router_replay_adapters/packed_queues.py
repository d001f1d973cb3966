"""Packed rows in stacks that keep a queue of recorded experts for each router, which are slime and miles.

Masks travel as containers, `uint8` vectors that a stack ships as it ships any array. On the rank a stack's own function
lays out a microbatch; it is given the numbers of rows in the place of experts, and so says which row is in which place.
A queue then holds one layer of the packed rows, which are unpacked where the router takes them.
"""

from __future__ import annotations

import logging
import weakref
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from router_replay.errors import DataError, InputError
from router_replay.masks.container import from_bytes, to_bytes
from router_replay.masks.geometry import RoutingGeometry
from router_replay.masks.masks import RoutingMasks
from router_replay.replay.layout import BatchLayout
from router_replay.replay.microbatch import MicrobatchRoutes
from router_replay.replay.placement import place, to_device
from router_replay_adapters.seldom import Seldom
from router_replay_adapters.trained_rows import require_trained_rows

logger = logging.getLogger(__name__)

KEY = "rollout_routed_experts"
"""What slime and miles call the routes of their samples and batches."""

_NONE = np.zeros(1, dtype=np.uint8)


def container_of(masks: RoutingMasks | None) -> np.ndarray:
    """Masks as a stack ships them, `uint8 [bytes]`; a single zero where a sample has none."""
    # Of a bytearray, since torch takes no array that cannot be written.
    return _NONE.copy() if masks is None else np.frombuffer(bytearray(to_bytes(masks)), dtype=np.uint8)


def masks_of(container: Any) -> RoutingMasks | None:
    """The masks in a container, an array or a tensor on any device.

    Raises:
        DataError: something else, or bytes that were corrupted on their way.
    """
    array = container.cpu().numpy() if isinstance(container, Tensor) else container
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim != 1:
        found = f"a {type(container).__name__}"
        if isinstance(array, np.ndarray):
            found = f"an array {array.dtype} {list(array.shape)}"
        raise DataError(
            f"routes of a sample are {found}, where packed rows belong, a vector of uint8: where this comes from a"
            " server that captures in format 'sglang', unset SGLANG_ROUTER_CAPTURE_FORMAT, or take this stack's adapter"
            " for routes that are not packed"
        )
    return None if np.array_equal(array, _NONE) else from_bytes(array.tobytes())


def after_answer(before: RoutingMasks | None, masks: RoutingMasks, token_ids: Sequence[int]) -> RoutingMasks:
    """A sample's masks after an answer, which has the rows of the whole sample, or those behind some position.

    Args:
        before: of earlier answers; rows of theirs that the answer has, too, are the answer's.
        masks: of this answer.
        token_ids: the whole sample, the answer's tokens included.

    Raises:
        DataError: an answer with rows of a part, and none of the part in front of it.
        PairingError: masks of other tokens, or with a gap between them.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    if masks.start == 0:
        masks.check_tokens(ids)
        return masks
    if not isinstance(before, RoutingMasks):
        raise DataError(
            f"an answer has rows from position {masks.start} on, and its sample has none of those before: take the"
            " masks of every answer of a sample, or ask for all rows, without routed_experts_start_len"
        )
    kept = before if before.end <= masks.start else before.cut(masks.start, ids)
    return RoutingMasks.join([kept, masks], ids)


def require_trained(masks: RoutingMasks | None, num_tokens: int, trained: Sequence[int]) -> None:
    """`require_trained_rows` of a sample that has these masks."""
    way_out = (
        "every answer has to come from a server with SGLANG_ROUTER_CAPTURE=1 that was asked for return_routed_experts,"
        " and its meta_info has to reach the sample"
    )
    require_trained_rows(0 if masks is None else masks.end, num_tokens, trained, way_out)


def geometry_of(args: Namespace) -> RoutingGeometry:
    """The trainer's own model, by the arguments that Megatron has in common with its configuration.

    Raises:
        UnsupportedError: a dense model.
    """
    # Imported here: it loads Megatron, which only trainers need.
    from megatron_router_replay import layer_plan

    config = SimpleNamespace(
        num_layers=args.num_layers,
        moe_layer_freq=args.moe_layer_freq,
        num_moe_experts=args.num_experts,
        moe_router_topk=args.moe_router_topk,
    )
    return layer_plan.geometry_of(cast(Any, config))


def numbered_rows(tokens: Sequence[Tensor]) -> list[Tensor]:
    """What a stack lays out in the place of experts: numbers from 1, `int64 [n - 1, 1, 1]` for each sequence of n.

    They count the tokens of all sequences, of which the last of each has no row. Padding has to come back below 1.
    """
    numbers = torch.arange(1, sum(len(each) for each in tokens) + 1)
    return [part[:-1, None, None] for part in numbers.split([len(each) for each in tokens])]


class PackedQueues:
    """Makes what the queues of one rank hold of its microbatches' packed rows."""

    def __init__(self) -> None:
        self.geometry: RoutingGeometry | None = None
        self._on_device = _OnDevice()
        self._places: Counter[str] = Counter()
        self._warning = Seldom()

    def microbatch(
        self,
        containers: Sequence[Any],
        tokens: Sequence[Tensor],
        numbers: Tensor,
        trained: Sequence[Tensor] | None = None,
    ) -> PackedMicrobatch:
        """Check masks against their tokens and the model, and put rows in this rank's places, on the host.

        Args:
            containers: of each sequence, as of `container_of`.
            tokens: int `[n]` for each sequence, whole; routers are on their device.
            numbers: `numbered_rows(tokens)` as the stack laid them out for this rank.
            trained: the loss mask of each response; None where samples were looked at before.

        Raises:
            DataError: as of `masks_of`, and of `require_trained_rows`.
            PairingError: masks of other tokens or another model.
        """
        assert self.geometry is not None
        layout = BatchLayout.jagged(tokens).at((numbers.flatten() - 1).clamp(min=-1))
        masks = [masks_of(container) for container in containers]
        # A microbatch may be one sequence, and one without a valid row says nothing of a step.
        routes = place(masks, layout, self.geometry, torch.device("cpu"), partial=True, valid=False)
        if trained is not None:
            for one, ids, loss_mask in zip(masks, tokens, trained, strict=True):
                require_trained(one, len(ids), loss_mask.tolist())
        self._tell(routes)
        return PackedMicrobatch(routes, tokens[0].device, self._on_device)

    def _tell(self, routes: MicrobatchRoutes) -> None:
        self._places.update(routes.native_causes)
        self._places["replayed"] += routes.num_replayed
        native, replayed = self._places.total() - self._places["replayed"], self._places["replayed"]
        if not native or not self._warning.due():
            return
        logger.warning(
            "%d of %d places of this rank's microbatches take the routers' own experts: %s",
            native,
            native + replayed,
            ", ".join(f"{count} {cause}" for cause, count in self._places.items() if count and cause != "replayed"),
        )
        self._places.clear()


@dataclass(frozen=True, eq=False)
class PackedMicrobatch:
    """A microbatch's routes, which a stack takes layer by layer, as from a tensor `[places, layers, K]`."""

    routes: MicrobatchRoutes
    device: torch.device
    on_device: _OnDevice

    def __getitem__(self, index: Any) -> PackedLayer:
        """`[:, layer]`, by the decoder's layers.

        Raises:
            InputError: anything else.
        """
        if isinstance(index, tuple) and len(index) == 2 and index[0] == slice(None) and isinstance(index[1], int):
            # A layer that does not route is refused before anything is recorded.
            self.routes.geometry.index_of(index[1])
            return PackedLayer(self, index[1])
        raise InputError(f"packed rows give [:, layer] of a microbatch, and here {index!r} was taken of them")


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """What a router's queue holds: one layer of a microbatch, packed."""

    microbatch: PackedMicrobatch
    layer: int

    @property
    def shape(self) -> tuple[int, int]:
        """Of the experts: places, K."""
        routes = self.microbatch.routes
        return routes.num_places, routes.geometry.top_k

    @property
    def native_places(self) -> Tensor:
        """Places without recorded experts, `int64 [n]` on the device."""
        return self._there().own_places

    def experts(self) -> Tensor:
        """Experts `int32 [places, K]` on the device, unpacked anew; those of native places mean nothing."""
        return self._there().experts(self.layer)

    def materialize_for_routing_replay(self, stage: str) -> Tensor:
        """`experts`, by the name that slime asks for them, in any of its passes."""
        return self.experts()

    def to(self, device: object) -> Tensor:
        """`experts`, as miles takes them to its device, which is where they are."""
        return self.experts()

    def _there(self) -> MicrobatchRoutes:
        return self.microbatch.on_device.of(self.microbatch.routes, self.microbatch.device)


class _OnDevice:
    """The packed rows of one microbatch on the device.

    The layers of a model, or of a chunk of it, are asked for in a row, in forward passes and in recomputes: rows go to
    the device once for each of these, and no more of them are there than one microbatch has.
    """

    def __init__(self) -> None:
        self._host: weakref.ref[MicrobatchRoutes] | None = None
        self._there: MicrobatchRoutes | None = None

    def of(self, routes: MicrobatchRoutes, device: torch.device) -> MicrobatchRoutes:
        if self._there is None or self._host is None or self._host() is not routes:
            self._host = weakref.ref(routes, self._let_go)
            self._there = replace(
                routes, rows=to_device(routes.rows, device), own_places=to_device(routes.own_places, device)
            )
        return self._there

    def _let_go(self, host: weakref.ref[MicrobatchRoutes]) -> None:
        if host is self._host:
            self._host = self._there = None
