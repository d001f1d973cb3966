"""The hooks on SGLang: its calling conventions made one call of ours each, by what they hook."""

from sglang_router_capture.hooks import capturer, requests, slots, start
from sglang_router_capture.hooks.registry import HOOKS

__all__ = ["HOOKS", "capturer", "requests", "slots", "start"]
