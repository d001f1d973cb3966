"""Replay of one attached model: what is bound to its forward passes, and what is checked about them."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor

from router_replay.errors import CallOrderError, InputError, PairingError
from router_replay.masks.arguments import as_integer
from router_replay.masks.batch import RoutingMasksBatch
from router_replay.masks.geometry import RoutingGeometry
from router_replay.masks.masks import RoutingMasks
from router_replay.replay.binding import NATIVE, bound, current
from router_replay.replay.bound_pass import BoundPass
from router_replay.replay.called_ids import require_same_shape
from router_replay.replay.checks import DeviceChecks
from router_replay.replay.comparisons import Comparisons
from router_replay.replay.gate import FreshWeights
from router_replay.replay.layout import BatchLayout, require_layout
from router_replay.replay.metrics import ReplayMetrics
from router_replay.replay.microbatch import MicrobatchRoutes
from router_replay.replay.observe import ObservedRoutes
from router_replay.replay.placement import fingerprint, place
from router_replay.replay.record import RouteRecorder
from router_replay.replay.shards import Shards
from router_replay.replay.torch_checkpoint import TORCH_PATCHES
from router_replay.upstream import Patch


class AttachedReplay(abc.ABC):
    """Replay attached to one model, less what knows a trainer; as a context manager it removes itself at the end.

    A trainer's end puts itself into the model's routers within `_installing`, and answers two questions: which part of
    a batch this rank's routers see, and whether the model's settings are still those that were accepted.

    Attributes:
        geometry: the whole model's, to which masks must fit.
        layers: 0-based decoder layers with a router on this rank.
        observer: where the routes of the current forward pass are recorded, inside `observe`.
    """

    batch_first: ClassVar[bool] = False
    """Whether the routers see a padded batch sequence by sequence, as of `Shards`."""

    spread: ClassVar[bool] = True
    """Whether padding and last tokens without a row take experts that load all alike, as of `place`."""

    def __init__(
        self,
        layers_by_chunk: Sequence[Iterable[int]],
        geometry: RoutingGeometry,
        device: torch.device,
        *,
        with_ids: Sequence[bool],
        overlap_every: int | None,
        tensor_groups: Sequence[dist.ProcessGroup] = (),
        step_groups: Sequence[dist.ProcessGroup] = (),
    ) -> None:
        """Make ready for a model, which is not touched yet.

        Args:
            layers_by_chunk: decoder layers with a router of each model chunk on this rank.
            device: of the routers.
            with_ids: of each chunk, whether token ids are seen when it is called.
            overlap_every: as of `require_overlap_every`.
            tensor_groups, step_groups: as of `DeviceChecks`.
        """
        self.geometry = geometry
        self._chunks = [frozenset(layers) for layers in layers_by_chunk]
        self.layers = tuple(sorted(layer for layers in self._chunks for layer in layers))
        self.observer: ObservedRoutes | None = None
        self._with_ids = [layers for layers, each in zip(self._chunks, with_ids, strict=True) if each]
        self._device = device
        self._num_passes = 0
        self._comparisons = Comparisons(overlap_every, self.layers, len(self._chunks))
        self._checks = DeviceChecks(geometry, device, tensor_groups, step_groups)
        self._metrics = ReplayMetrics(self.layers, geometry.top_k, device)
        self._attached = False
        self._undo = contextlib.ExitStack()

    @contextlib.contextmanager
    def _installing(self, patches: Iterable[Patch] = ()) -> Iterator[contextlib.ExitStack]:
        """Attach: what the block puts on the stack is undone by `remove`, or at once where something raises.

        Args:
            patches: what carries bindings through the trainer's own checkpoints, beside torch's.
        """
        with contextlib.ExitStack() as undo:
            for patch in (*patches, *TORCH_PATCHES):
                undo.enter_context(patch)
            yield undo
            self._undo = undo.pop_all()
        self._attached = True

    @abc.abstractmethod
    def _part(self, layout: BatchLayout, shards: Shards | None) -> Shards:
        """What this rank's routers see of a batch: what a caller said of it, or what the trainer's end finds."""

    @abc.abstractmethod
    def _check_settings(self) -> None:
        """Raise UnsupportedError where a setting was changed so that replay would be ignored or undone."""

    @property
    def attached(self) -> bool:
        """False after `remove`."""
        return self._attached

    def place(
        self,
        masks: Iterable[RoutingMasks | None] | RoutingMasksBatch,
        layout: BatchLayout,
        *,
        fresh: FreshWeights | None = None,
        partial: bool = False,
        valid: bool = True,
        shards: Shards | None = None,
    ) -> MicrobatchRoutes:
        """Put the rows of this rank's places of a microbatch on its device, once for all passes over it.

        May run ahead of time, on the CUDA stream on which the model runs; binding the result costs next to nothing. The
        last token of a sequence that has no valid row takes experts like padding does, since nothing reads what it
        computes: where these are spread over all experts, not for a model with a head that reads it.

        Args:
            masks: one per sequence of the layout, each from token 0; None for a sequence that the trainer is to route
                itself. A list, or a batch or a part of one. Tokens without a valid row take the trainer's own top-k.
            layout: of the whole sequences, as they are before context and sequence parallelism cut them.
            fresh: which weights' routes are fresh enough to be replayed; all by default.
            partial: accept masks that end before the last token but one of their sequence, whose other tokens the
                rollout never saw (an environment's last words, say) and the trainer routes itself.
            valid: whether some row of masks has to be valid. Where a microbatch may be a single sequence, of which the
                server may know no row, pass False: all of it is native.
            shards: what this rank's routers see of the batch, where the trainer's end cannot find it by itself;
                `Shards()` for a layout of this rank's places alone.

        Raises:
            InputError: masks or a layout that are something else, or that cannot be cut for this many ranks.
            PairingError: the masks are not this model's or not this batch's.
        """
        self._require_attached()
        part = self._part(require_layout(layout), shards)
        return place(
            masks,
            layout,
            self.geometry,
            self._device,
            shards=part,
            fresh=fresh,
            partial=partial,
            valid=valid,
            spread=self.spread,
        )

    @contextlib.contextmanager
    def microbatch(
        self,
        masks: Iterable[RoutingMasks | None] | RoutingMasksBatch | MicrobatchRoutes,
        layout: BatchLayout | None = None,
        *,
        fresh: FreshWeights | None = None,
        partial: bool = False,
        valid: bool = True,
        shards: Shards | None = None,
    ) -> Iterator[MicrobatchRoutes]:
        """Replay a microbatch in the one forward pass inside the block, and in its recomputes, whenever these happen.

        Args:
            masks: as of `place`, or what `place` or a recording's `routes` gave.
            layout: as of `place`; not with a placement.
            fresh, partial, valid, shards: as of `place`.

        Yields:
            The rows as bound, with the counts of replayed, native and padding places.

        Raises:
            InputError, PairingError: as of `place`, before anything is computed; or an earlier pass was found to have
                been called with other tokens, or to replay routes that are not these tokens' (see `check`).
            CallOrderError: another block is open; at the end, no whole forward pass ran inside this one.
            UnsupportedError: a setting was changed after `attach`, so that replay would be ignored or undone.
        """
        self._require_attached()
        if isinstance(masks, MicrobatchRoutes):
            if layout is not None or fresh is not None or partial or not valid or shards is not None:
                raise InputError("a placement has its layout already: pass it alone, or masks with their layout")
            routes = masks
            if not routes.are_of(self.geometry):
                raise PairingError(
                    f"this placement is of {routes.geometry}, this model has {self.geometry}: place masks by the replay"
                    " of the model that they are bound to"
                )
        else:
            routes = self.place(masks, require_layout(layout), fresh=fresh, partial=partial, valid=valid, shards=shards)
        self._checks.raise_copied()
        training = torch.is_grad_enabled()
        overlap, compared = self._comparisons.next(training)
        binding = BoundPass(routes, overlap=overlap)
        with self._whole_pass(binding, routes.fingerprint, compared=compared):
            self._metrics.add_pass(routes)
            yield routes
        if binding.overlap is not None and binding.overlap.by_layer:
            self._metrics.add_overlap(routes.source, binding.overlap)
            few = binding.overlap.num_with_hardly_any(self.geometry)
            judged = self._checks.add_overlap(few, len(routes.sample), self._num_passes)
            if training and judged:
                self._comparisons.judged(binding.overlap.by_layer)
            self._checks.copy_to_host()

    @contextlib.contextmanager
    def record(self, layout: BatchLayout, *, shards: Shards | None = None) -> Iterator[RouteRecorder]:
        """Route natively in the one forward pass inside the block, and keep its routes on the device (R2).

        Args:
            layout, shards: as of `place`.

        Yields:
            The recorder; after the block its `routes` can be bound by `microbatch` on this rank, or its `part` be
            joined with those of other ranks to masks (`join_parts`).

        Raises:
            InputError, CallOrderError, UnsupportedError: as of `microbatch`.
        """
        self._require_attached()
        part, number = self._part(require_layout(layout), shards), fingerprint(layout)
        self._checks.raise_copied()
        recorder = RouteRecorder(part.routed(layout), part.called(layout), self.geometry, self._device, number)
        with self._whole_pass(BoundPass(None, recorder=recorder), number):
            yield recorder
        recorder.finish()

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Route natively inside the block, as the stock trainer does: a reference model's passes, an evaluation."""
        self._require_attached()
        with bound(self, NATIVE):
            yield

    @contextlib.contextmanager
    def observe(self) -> Iterator[ObservedRoutes]:
        """Record the experts that the one forward pass inside the block takes, replayed or native."""
        self._require_attached()
        if self.observer is not None:
            raise CallOrderError("this replay is being observed already: observe() blocks do not nest")
        self.observer = ObservedRoutes(self.layers, batch_first=self.batch_first)
        try:
            yield self.observer
        finally:
            self.observer = None

    def check(self) -> None:
        """Wait for the device, and raise what was found wrong since the last check; call it before optimizer.step().

        Every rank of the model calls it, after the same passes: what one rank found is raised on all of them. Where it
        is never called, what a rank found itself is raised when it binds a later microbatch.

        Raises:
            PairingError: the model was called with other token ids than those of the block's layout; hardly any
                replayed expert is the trainer's own choice; or ranks bound different microbatches.
        """
        self._require_attached()
        self._checks.read()

    def metrics(self) -> dict[str, float]:
        """This rank's counts since they were taken last, as of `ReplayMetrics.take`, for a logger. Waits."""
        return self._metrics.take()

    def remove(self) -> None:
        """Put back every object that `attach` replaced; calling it again does nothing.

        What others put in its place since is left there.
        """
        self._attached = False
        self._undo.close()

    @contextlib.contextmanager
    def _whole_pass(self, binding: BoundPass, number: int, *, compared: bool = False) -> Iterator[None]:
        self._check_settings()
        self._num_passes += 1
        with bound(self, binding):
            if compared:
                self._checks.compare_fingerprints(number, self._num_passes)
            yield
        binding.require_whole(self._chunks)
        if self.attached:
            self._check_settings()
        for chunk, layers in enumerate(self._chunks):
            if binding.ran(layers):
                self._checks.count(chunk, number)
        if not binding.ids_compared and any(binding.ran(layers) for layers in self._with_ids):
            self._metrics.add_pass_without_ids()

    def _compare_ids(self, called_with: Tensor) -> None:
        """The model is called with these token ids, `int64 [B, S]`; for `watch`."""
        binding = current().bindings.get(self)
        if not isinstance(binding, BoundPass) or binding.ids_compared:
            return
        binding.ids_compared = True
        expected = binding.called_ids
        if expected is None:
            return
        require_same_shape(called_with, expected)
        self._checks.compare_ids(called_with, expected, self._num_passes)
        self._checks.copy_to_host()

    def _require_attached(self) -> None:
        if not self.attached:
            raise CallOrderError("this replay was removed from its model: attach again")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def require_overlap_every(overlap_every: int | None) -> None:
    """Refuse what is no number of passes after which routes are compared with the trainer's own choice again.

    Raises:
        InputError: neither a positive integer nor None, which is for never.
    """
    if overlap_every is not None and as_integer("overlap_every", overlap_every) < 1:
        raise InputError(f"overlap_every is {overlap_every}, but must be a number of passes, or None for never")
