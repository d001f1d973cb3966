"""Staging: where the MoE layers of one forward pass leave their top-k ids, on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from router_replay.errors import PairingError
from router_replay.masks import Codec, RoutingGeometry
from router_replay.masks.codecs.ops import OPS
from router_replay.masks.codecs.reference import UNWRITTEN


class Staging:
    """Device buffer `int16 [max_tokens, L, K + shared]`, unwritten entries negative.

    The layers write inside CUDA graphs, so the buffer's address never changes. After each pass all of it is set back to
    unwritten, the rows of a graph's padding too: a layer that reports nothing in the next pass then shows, and does not
    leave the routes of earlier tokens.

    Stands where `sglang.srt.state_capturer.base.BaseDeviceCache` stood; `buffer` and `capture` are the names by which
    upstream's capturer uses it.

    Args:
        max_tokens: most tokens that a MoE layer sees in one pass, other ranks' and padding included.
        layers: the MoE layers that run here, in their order; L is their number. All of the model's where it is None.
    """

    def __init__(
        self,
        geometry: RoutingGeometry,
        max_tokens: int,
        num_shared_experts: int,
        device: str,
        layers: tuple[int, ...] | None = None,
    ) -> None:
        width = geometry.top_k + num_shared_experts
        self._layers = geometry.moe_layers if layers is None else layers
        self.buffer = torch.full((max_tokens, len(self._layers), width), UNWRITTEN, dtype=torch.int16, device=device)
        self._geometry = geometry
        self._index_of = {layer: index for index, layer in enumerate(self._layers)}

    def capture(self, layer_id: int, topk_indices: Tensor) -> None:
        """Take one layer's ids `int [tokens, K + shared]`; `layer_id` is the 0-based decoder layer."""
        if layer_id not in self._index_of:
            raise PairingError(
                f"decoder layer {layer_id} routes in the running model, but by its configuration only layers"
                f" {self._layers} do: routes of this model cannot be attributed to layers"
            )
        self.buffer[: topk_indices.shape[0], self._index_of[layer_id]] = topk_indices

    def take_rows(self, codec: Codec, first: int, last: int, end: int | None = None) -> tuple[Tensor, Tensor]:
        """Rows of the pass's tokens [first, last), and set the buffer back, for a model whose layers all run here.

        No host sync, and one kernel on CUDA where `end` is not given, else two.

        Args:
            end: as of `take`.

        Returns:
            `(rows uint8 [n, row_bytes], valid bool [n])`: where a layer reported no expert, one out of range or one
            twice, `valid` is False and the row's field of that layer is illegal wherever the codec has such a field.

        Raises:
            PairingError: only a part of the model's MoE layers is here, so that there is no whole row.
        """
        if self._layers != self._geometry.moe_layers:
            raise PairingError(
                f"a row holds decoder layers {self._geometry.moe_layers}, but only {self._layers} run here: call"
                " `take`, and pack when the indices of all layers are together"
            )
        end = len(self.buffer) if end is None else end
        num_experts, top_k = self._geometry.num_experts, self._geometry.top_k
        return OPS.take_rows(self.buffer, first, last, end, num_experts, top_k, codec.name)

    def take(self, first: int, last: int, end: int | None = None) -> tuple[Tensor, Tensor]:
        """Routes of the pass's tokens [first, last), and set the buffer back. No host sync.

        Args:
            end: number of rows that the pass's layers wrote, if it is known. Where they wrote more, the rows are not
                laid out as the caller thinks, and none is valid.

        Returns:
            `(indices int16 [n, L, K], valid bool [n])`: where a layer reported no expert, one out of range or one
            twice, `valid` is False and the indices are those of some legal row.
        """
        top_k, num_experts = self._geometry.top_k, self._geometry.num_experts
        taken = self.buffer[first:last, :, :top_k]
        # A stage of a pipeline may have dense layers only.
        valid = taken.new_ones(len(taken), dtype=torch.bool)
        if self._layers:
            valid = OPS.legal_indices(taken, num_experts).all(-1)
        if end is not None and end < len(self.buffer):
            valid &= (self.buffer[end] == UNWRITTEN).all()
        legal = torch.arange(top_k, dtype=torch.int16, device=taken.device)
        indices = torch.where(valid[:, None, None], taken, legal)
        self.reset()
        return indices, valid

    def reset(self) -> None:
        """Forget what layers reported."""
        self.buffer.fill_(UNWRITTEN)
