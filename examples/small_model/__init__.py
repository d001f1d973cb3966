"""A small Qwen3-MoE that uses the calculator: its checkpoint, and the program that trains it."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""Hugging Face folder of the model: decoder layer 0 dense, five layers of 32 experts, top-4."""
