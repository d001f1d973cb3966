"""The hooks on SGLang: its calling conventions made one call of ours each, by what they hook."""

from sglang_router_capture.hooks import capturer, endpoints, hicache, parallel, requests, slots, start, status, weights
from sglang_router_capture.hooks.registry import HOOKS

__all__ = ["HOOKS", "capturer", "endpoints", "hicache", "parallel", "requests", "slots", "start", "status", "weights"]
