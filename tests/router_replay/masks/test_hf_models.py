"""Geometry against the models that Transformers builds: the layers that really hold experts."""

from __future__ import annotations

import importlib

import pytest
import torch

from router_replay.errors import InputError, UnsupportedError
from router_replay.masks import RoutingGeometry

# (module, text model, settings besides the number of layers)
MODELS = [
    ("qwen2_moe", "Qwen2MoeModel", {"decoder_sparse_step": 2}),
    ("qwen3_moe", "Qwen3MoeModel", {"mlp_only_layers": [0, 3]}),
    ("qwen3_moe", "Qwen3MoeModel", {"decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    ("qwen3_next", "Qwen3NextModel", {"mlp_only_layers": [1]}),
    ("qwen3_5_moe", "Qwen3_5MoeTextModel", {}),
    ("qwen3_vl_moe", "Qwen3VLMoeTextModel", {}),
    ("deepseek_v2", "DeepseekV2Model", {"first_k_dense_replace": 1, "num_experts_per_tok": 6}),
    ("deepseek_v3", "DeepseekV3Model", {}),
    ("deepseek_v32", "DeepseekV32Model", {}),
    ("glm4_moe", "Glm4MoeModel", {}),
    ("glm4_moe_lite", "Glm4MoeLiteModel", {}),
    ("glm_moe_dsa", "GlmMoeDsaModel", {}),
    ("ernie4_5_moe", "Ernie4_5_MoeModel", {"moe_layer_interval": 2, "moe_layer_start_index": 2}),
    ("ernie4_5_moe", "Ernie4_5_MoeModel", {"moe_layer_end_index": 3}),
    ("llama4", "Llama4TextModel", {"interleave_moe_layer_step": 2}),
    ("llama4", "Llama4TextModel", {"moe_layers": [0, 5]}),
    ("mixtral", "MixtralModel", {}),
    ("gpt_oss", "GptOssModel", {}),
    ("olmoe", "OlmoeModel", {}),
    ("phimoe", "PhimoeModel", {}),
    ("granitemoehybrid", "GraniteMoeHybridModel", {}),
    ("minimax_m2", "MiniMaxM2Model", {}),
    ("jamba", "JambaModel", {"expert_layer_period": 3, "expert_layer_offset": 2}),
    ("afmoe", "AfmoeModel", {"num_dense_layers": 2}),
    ("lfm2_moe", "Lfm2MoeModel", {"layer_types": ["conv", "full_attention"] * 3}),
    ("mimo_v2_flash", "MiMoV2FlashModel", {}),
    ("step3p7", "Step3p7TextModel", {"moe_layers_enum": "2,4,5"}),
    ("exaone_moe", "ExaoneMoeModel", {}),
    ("kimi_linear", "KimiLinearModel", {}),
    ("glm5_next", "Glm5NextTextModel", {}),
    ("nemotron_h", "NemotronHModel", {"hybrid_override_pattern": "MEM*E-"}),
    ("gemma4", "Gemma4TextModel", {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2}),
]


def _model_and_config(module: str, name: str, settings: dict) -> tuple[torch.nn.Module, object]:
    model_class = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), name)
    if name == "Gemma4TextModel":
        settings = {**settings, "moe_intermediate_size": 32}
    config = model_class.config_class(num_hidden_layers=6, **settings)
    with torch.device("meta"):
        return model_class(config), config


@pytest.mark.parametrize(("module", "name", "settings"), MODELS)
def test_geometry_is_that_of_the_model_built(module, name, settings):
    model, config = _model_and_config(module, name, settings)
    routed = [
        number
        for number, layer in enumerate(model.layers)
        if any(path.split(".")[-1] == "experts" for path, _ in layer.named_modules())
    ]
    experts = {
        parameter.shape[0]
        for path, parameter in model.named_parameters()
        if path.endswith(("experts.gate_up_proj", "experts.up_proj")) and "shared" not in path
    }
    assert routed
    for source in (config, config.to_dict()):
        geometry = RoutingGeometry.from_hf_config(source)
        assert geometry.moe_layers == tuple(routed)
        assert geometry.num_layers == len(model.layers)
        assert {geometry.num_experts} == experts


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        ("llama", "LlamaConfig", "dense model"),
        ("qwen3", "Qwen3Config", "dense model"),
        ("gemma4", "Gemma4TextConfig", "dense model"),
        ("deepseek_v4", "DeepseekV4Config", "hash of the token id"),
        ("longcat_flash", "LongcatFlashConfig", "contradicts itself|without weights"),
    ],
)
def test_models_that_cannot_be_replayed_are_refused(module, name, message):
    config = getattr(importlib.import_module(f"transformers.models.{module}.configuration_{module}"), name)()
    for source in (config, config.to_dict()):
        with pytest.raises((UnsupportedError, InputError), match=message):
            RoutingGeometry.from_hf_config(source)
