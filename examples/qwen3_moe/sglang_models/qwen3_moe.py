"""Qwen3-MoE whose dense layers SGLang builds as dense.

SGLang 0.5.23 takes every layer of a Qwen3-MoE checkpoint for a sparse one, whatever `mlp_only_layers` and
`decoder_sparse_step` say, and serves a checkpoint with dense layers with experts that were never loaded. No released
Qwen3-MoE has dense layers; this project's small model has one, so that no layer mapping in it is the identity.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.models import qwen3_moe
from sglang.srt.utils import add_prefix

from router_replay.masks import RoutingGeometry


class _DenseMLP(qwen3_moe.Qwen3MoeMLP):
    # The decoder layer calls its MLP as it calls the sparse block, which takes the batch too.
    def forward(self, x: torch.Tensor, forward_batch: Any) -> torch.Tensor:
        return super().forward(x)


class _DecoderLayer(qwen3_moe.Qwen3MoeDecoderLayer):
    def __init__(self, config: Any, layer_id: int, **kwargs: Any) -> None:
        super().__init__(config, layer_id, **kwargs)
        if layer_id in RoutingGeometry.from_hf_config(config).moe_layers:
            return
        if self.is_layer_sparse:
            # Before 0.5.22 SGLang asks nobody, and has built experts here.
            self.is_layer_sparse = False
            self.mlp = qwen3_moe.Qwen3MoeMLP(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                hidden_act=config.hidden_act,
                quant_config=kwargs.get("quant_config"),
                prefix=add_prefix("mlp", kwargs.get("prefix", "")),
            )
        self.mlp.__class__ = _DenseMLP

    @staticmethod
    def stage_facts(config: Any, layer_id: int) -> tuple[Any, Any]:
        routed = RoutingGeometry.from_hf_config(config).moe_layers
        return (
            qwen3_moe.declare_attn(),
            qwen3_moe.declare_ffn(sparse=layer_id in routed, next_layer_sparse=layer_id + 1 in routed),
        )


class Qwen3MoeForCausalLM(qwen3_moe.Qwen3MoeForCausalLM):
    """SGLang's model, with dense layers where the configuration has them."""

    def __init__(self, config: Any, quant_config: QuantizationConfig | None = None, prefix: str = "") -> None:
        super().__init__(config, quant_config, prefix)
        self.model = qwen3_moe.Qwen3MoeModel(
            config, quant_config, prefix=add_prefix("model", prefix), decoder_layer_type=_DecoderLayer
        )


EntryClass = Qwen3MoeForCausalLM
