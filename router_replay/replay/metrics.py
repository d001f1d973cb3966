"""What a trainer logs of replay: how many places were replayed, and how far the routes are the trainer's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from router_replay.replay.microbatch import MicrobatchRoutes
from router_replay.replay.overlap import OverlapSample


class ReplayMetrics:
    """Counts since they were taken last, of this rank's places and layers.

    Counts of places are kept on the host. What was shared with the trainer's own choice is summed on the device.
    """

    def __init__(self, layers: Iterable[int], top_k: int, device: torch.device) -> None:
        self._layers = tuple(layers)
        self._top_k = top_k
        self._device = device
        self._places: Counter[str] = Counter()
        self._passes_without_ids = 0
        self._overlap: dict[str, Tensor] = {}

    def add_pass(self, routes: MicrobatchRoutes) -> None:
        """A microbatch is bound to a pass."""
        self._places["replayed"] += routes.num_replayed
        self._places["padding"] += routes.num_padding
        for cause, places in routes.native_causes.items():
            self._places[f"native ({cause})"] += places

    def add_pass_without_ids(self) -> None:
        """A pass of the first stage whose input ids were not seen: the model was called with embeddings."""
        self._passes_without_ids += 1

    def add_overlap(self, source: str, sample: OverlapSample) -> None:
        """Of routes of this `MicrobatchRoutes.source`, what some places share with the trainer's own choice."""
        if source not in self._overlap:
            # In training it is written to as well, which an inference tensor would refuse.
            with torch.inference_mode(False):
                self._overlap[source] = torch.zeros(2, len(self._layers), dtype=torch.int64, device=self._device)
        sums = self._overlap[source]
        for layer, shared in sample.by_layer.items():
            column = self._layers.index(layer)
            sums[0, column] += shared.sum()
            sums[1, column] += len(shared)

    def take(self) -> dict[str, float]:
        """All of it by name, and begin anew. Waits for the device.

        - "places/replayed", "places/padding", "places/native (cause)": counts of places, each pass for itself.
        - "passes/input ids not seen": passes of the first stage that was called with embeddings in place of token ids,
          which could not be compared with those of the layout; only where there are any.
        - "overlap/rollout", "overlap/rollout/layer N": share of a place's replayed experts that the trainer would have
          chosen itself, over all sampled passes and by decoder layer.
        - "overlap/recorded", ...: the same of routes that the trainer recorded (R2): what is missing to 1 is how far
          the present policy's routes have drifted from the old one's.
        """
        taken: dict[str, float] = {f"places/{kind}": float(count) for kind, count in sorted(self._places.items())}
        if self._passes_without_ids:
            taken["passes/input ids not seen"] = float(self._passes_without_ids)
        for source, sums in sorted(self._overlap.items()):
            shared, places = sums.tolist()
            if sum(places):
                taken[f"overlap/{source}"] = sum(shared) / (sum(places) * self._top_k)
            for layer, common, compared in zip(self._layers, shared, places, strict=True):
                if compared:
                    taken[f"overlap/{source}/layer {layer}"] = common / (compared * self._top_k)
        self._places.clear()
        self._passes_without_ids = 0
        self._overlap.clear()
        return taken
