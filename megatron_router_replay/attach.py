"""Attach replay to a live Megatron model, bind masks to its forward passes, and put everything back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from megatron_router_replay.flex_gates import FlexGates
from megatron_router_replay.layer_plan import config_of
from megatron_router_replay.layer_replay import LayerReplay
from megatron_router_replay.ledger import LEDGER
from megatron_router_replay.live_model import live_layers
from megatron_router_replay.recompute import CHECKPOINT_PATCH
from megatron_router_replay.router_settings import RouterSettings
from router_replay.errors import CallOrderError, InputError
from router_replay.masks.arguments import require_type
from router_replay.masks.geometry import RoutingGeometry
from router_replay.masks.masks import RoutingMasks
from router_replay.replay.binding import NATIVE, bound
from router_replay.replay.layout import BatchLayout
from router_replay.replay.microbatch import MicrobatchRoutes
from router_replay.replay.observe import ObservedRoutes
from router_replay.upstream import require


def attach(model_chunks: nn.Module | Iterable[nn.Module], geometry: RoutingGeometry | None = None) -> Replay:
    """Put a replay into every decoder router of a model.

    Args:
        model_chunks: this rank's model, or its chunks under interleaved pipelining, wrapped (DDP, Float16Module) or
            not.
        geometry: the rollout's, where it is known already, so that a mismatch is found before any training; by
            default the model's own configuration.

    Returns:
        The replay; from now on every forward pass must be inside its `microbatch` or `off`, until `remove`.

    Raises:
        InputError: no model, or two routers with one layer number.
        UnsupportedError: a dense model, or a setting under which replay would be ignored or undone.
        CallOrderError: a replay is attached.
        PairingError: the live layers are not those of the geometry.
        SeamError: the installed Megatron-Core is not one that replay knows.
    """
    require(LEDGER)
    chunks = _chunks(model_chunks)
    if geometry is not None:
        require_type("geometry", geometry, RoutingGeometry)
    own, by_chunk = live_layers(chunks, geometry)
    routers = {layer: router for of_chunk in by_chunk for layer, router in of_chunk.items()}
    for layer, router in routers.items():
        if isinstance(router.router_replay, LayerReplay):
            raise CallOrderError(
                f"the router of decoder layer {layer} belongs to an attached replay already: use that one, or call its "
                "remove() first"
            )
    settings = RouterSettings([config_of(chunk) for chunk in chunks], routers.values())
    flex = FlexGates(chunks, routers.values())
    device = next((parameter.device for chunk in chunks for parameter in chunk.parameters()), torch.device("cpu"))
    return Replay(routers, own, device, (settings, flex))


def _chunks(given: nn.Module | Iterable[nn.Module]) -> list[nn.Module]:
    if isinstance(given, nn.Module):
        return [given]
    several = isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping | Tensor)
    chunks = list(given) if several else []
    wrong = next((each for each in chunks if not isinstance(each, nn.Module)), None)
    if chunks and wrong is None:
        return chunks
    found = "an empty list" if several and not chunks else f"a {type(given if wrong is None else wrong).__name__}"
    raise InputError(
        f"attach takes this rank's live model, a torch.nn.Module, or the list of its chunks, got {found}: build the"
        " model and load its weights first"
    )


class Replay:
    """Replay attached to one model; as a context manager it removes itself at the end.

    Attributes:
        geometry: the whole model's, to which masks must fit.
        layers: 0-based decoder layers with a router in the chunks given.
        observer: where the routes of the current forward pass are recorded, inside `observe`.
    """

    def __init__(
        self,
        routers: dict[int, TopKRouter],
        geometry: RoutingGeometry,
        device: torch.device,
        patches: tuple[RouterSettings, FlexGates],
    ) -> None:
        self.geometry = geometry
        self.layers = tuple(routers)
        self.observer: ObservedRoutes | None = None
        self._routers = routers
        self._device = device
        self._settings, self._flex = patches
        self._originals: dict[int, Any] | None = {layer: router.router_replay for layer, router in routers.items()}
        for layer, router in routers.items():
            router.router_replay = LayerReplay(self, layer)
        self._settings.apply()
        self._flex.apply()
        CHECKPOINT_PATCH.apply()

    @property
    def attached(self) -> bool:
        """False after `remove`."""
        return self._originals is not None

    @contextlib.contextmanager
    def microbatch(
        self, masks: Iterable[RoutingMasks], layout: BatchLayout, *, partial: bool = False
    ) -> Iterator[MicrobatchRoutes]:
        """Replay `masks` in the forward pass inside the block, and in its recomputes, whenever these happen.

        Args:
            masks: one per sequence of the layout, each from token 0; tokens without a valid row take the trainer's
                own top-k.
            layout: the tokens of the microbatch.
            partial: accept masks that end before the last token but one of their sequence, whose other tokens the
                rollout never saw (an environment's last words, say) and the trainer routes itself.

        Yields:
            The rows as bound, with the counts of replayed, native and padding places.

        Raises:
            InputError: masks or a layout that are something else.
            PairingError: the masks are not this model's or not this batch's; raised before anything is computed.
        """
        self._require_attached()
        self._settings.check_now()
        routes = MicrobatchRoutes(masks, layout, self.geometry, self._device, partial=partial)
        with bound(self, routes):
            yield routes

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Route natively inside the block, as stock Megatron does: a reference model's pass, an evaluation."""
        self._require_attached()
        with bound(self, NATIVE):
            yield

    @contextlib.contextmanager
    def observe(self) -> Iterator[ObservedRoutes]:
        """Record the experts that the one forward pass inside the block takes, replayed or native."""
        self._require_attached()
        if self.observer is not None:
            raise CallOrderError("this replay is being observed already: observe() blocks do not nest")
        self.observer = ObservedRoutes(self.layers)
        try:
            yield self.observer
        finally:
            self.observer = None

    def remove(self) -> None:
        """Put back every object that `attach` replaced; calling it again does nothing."""
        if self._originals is None:
            return
        for layer, original in self._originals.items():
            self._routers[layer].router_replay = original
        self._originals = None
        self._settings.remove()
        self._flex.remove()
        CHECKPOINT_PATCH.remove()

    def _require_attached(self) -> None:
        if not self.attached:
            raise CallOrderError("this replay was removed from its model: attach again")

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()
