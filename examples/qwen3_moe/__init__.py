"""Qwen3-MoE with dense layers for SGLang: start a server with `SGLANG_EXTERNAL_MODEL_PACKAGE=` and `SGLANG_MODELS`."""

SGLANG_MODELS = "examples.qwen3_moe.sglang_models"
"""Dotted name of the package, as SGLang and `cpu_engines.sglang.server.serve` take it."""
