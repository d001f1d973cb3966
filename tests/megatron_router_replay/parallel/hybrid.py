"""Megatron's HybridModel from its local layers: attention, MLP and experts are layers of their own."""

from __future__ import annotations

from unittest import mock

from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.models.hybrid import hybrid_block
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from cpu_engines.megatron import PackedDotProductAttention
from tests.megatron_router_replay.parallel.cases import NUM_EXPERTS, VOCABULARY, Case


def build_hybrid(case: Case, config: TransformerConfig, stage: int | None) -> HybridModel:
    """One chunk of a HybridModel; stages are equal parts of the pattern."""
    size = len(case.hybrid) // (case.pp * case.vpp)
    pattern = "|".join(case.hybrid[start : start + size] for start in range(0, len(case.hybrid), size))
    # The last norm's class is written out there, where every other comes from the specification.
    with mock.patch.object(hybrid_block, "TENorm", WrappedTorchNorm):
        return HybridModel(
            config,
            _stack_spec(),
            vocab_size=VOCABULARY,
            max_sequence_length=256,
            hybrid_layer_pattern=pattern,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            position_embedding_type="rope",
            vp_stage=stage,
        )


def _stack_spec() -> ModuleSpec:
    dense = get_gpt_layer_local_submodules(qk_layernorm=True, normalization="RMSNorm")
    routed = get_gpt_layer_local_submodules(num_experts=NUM_EXPERTS, normalization="RMSNorm")
    dense.self_attention.submodules.core_attention = PackedDotProductAttention
    return ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    input_layernorm=dense.input_layernorm,
                    self_attention=dense.self_attention,
                    self_attn_bda=dense.self_attn_bda,
                ),
            ),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=_mlp_only(dense)),
            moe_layer=ModuleSpec(module=MoETransformerLayer, submodules=_mlp_only(routed)),
        ),
    )


def _mlp_only(layer: TransformerLayerSubmodules) -> TransformerLayerSubmodules:
    return TransformerLayerSubmodules(pre_mlp_layernorm=layer.pre_mlp_layernorm, mlp=layer.mlp, mlp_bda=layer.mlp_bda)
