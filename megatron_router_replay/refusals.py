"""Settings of Megatron-Core under which replay would silently do nothing, or be undone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import megatron.core
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_router_replay.ledger import TESTED_VERSIONS
from router_replay.errors import SeamError, UnsupportedError

# (flag, the values that replay accepts, what would happen otherwise)
_LIMITS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("moe_router_fusion", lambda value: not value, "the fused router never asks for replayed experts; set it to False"),
    (
        "moe_expert_capacity_factor",
        lambda value: value is None,
        "tokens over an expert's capacity are dropped after the replay; set it to None",
    ),
    (
        "moe_router_load_balancing_type",
        lambda value: not {"sinkhorn", "quantile_balancing"} & set([value] if isinstance(value, str) else value),
        "this balancing chooses its experts without asking for replayed ones; use aux_loss, seq_aux_loss or none",
    ),
    (
        "moe_router_force_load_balancing",
        lambda value: not value,
        "gates would come from random logits; set it to False",
    ),
    (
        "moe_router_force_biased",
        lambda value: value is None,
        "gates would come from biased logits; set it to None",
    ),
    (
        "moe_token_dispatcher_type",
        lambda value: value in ("allgather", "alltoall"),
        "it chooses the experts with the largest gates once more, and a replayed expert whose gate is 0 in float32 is"
        " swapped for another; use allgather or alltoall",
    ),
    (
        "cuda_graph_impl",
        lambda value: value in (None, "none"),
        "a captured router repeats the routes of the capture; set it to 'none'",
    ),
    (
        "overlap_moe_expert_parallel_comm",
        lambda value: not value,
        "its schedule runs layers of two microbatches in turns, outside of their forward_step; set it to False",
    ),
    (
        "mlp_chunks_for_training",
        lambda value: value in (None, 1),
        "the router sees a sequence in chunks and rows cannot be told apart; set it to 1",
    ),
)

_SINCE_0_18 = {"mlp_chunks_for_training"}


def check_config(config: TransformerConfig) -> None:
    """Refuse a configuration that replay cannot honour.

    Raises:
        UnsupportedError: names the flag, its value, the reason and the way out.
        SeamError: the installed Megatron-Core has no flag of a name that is checked here.
    """
    for flag, accepts, reason in _LIMITS:
        if flag in _SINCE_0_18 and not hasattr(config, flag):
            continue
        if not hasattr(config, flag):
            raise SeamError(
                f"the configuration of the installed Megatron-Core {megatron.core.__version__} has no {flag}, which"
                f" decides whether replay works: expected that name, tested with {', '.join(TESTED_VERSIONS)};"
                " install one of these"
            )
        value = getattr(config, flag)
        if not accepts(value):
            raise UnsupportedError(f"{flag} is {value!r}, with which replay does not work: {reason}")
    quantised = getattr(config, "fp8", None) or getattr(config, "fp4", None)
    if quantised and config.recompute_granularity is not None:
        raise UnsupportedError(
            f"recompute_granularity is {config.recompute_granularity!r} with {quantised!r} quantisation: Transformer "
            "Engine's own checkpoint recomputes then, and masks do not follow it; turn recompute or fp8/fp4 off"
        )
