"""Qwen3-MoE with dense layers, for SGLang."""
