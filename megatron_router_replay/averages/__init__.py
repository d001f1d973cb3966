"""Averages of a Megatron model's parameters over training steps, for evaluation, rollouts or a proximal policy."""

from megatron_router_replay.averages.ema import ExponentialMovingAverage

__all__ = ["ExponentialMovingAverage"]
