"""The trainer's tests and these run the same layers on the same random checkpoint."""

from tests.megatron_router_replay.conftest import batch, build_model, checkpoint, geometry, megatron

__all__ = ["batch", "build_model", "checkpoint", "geometry", "megatron"]
