"""Settings of Megatron-Core under which replay would silently do nothing, or be undone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_router_replay.ledger import LEDGER
from router_replay.upstream import Refusal, refuse

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

_CONFIG = "transformer.transformer_config.TransformerConfig"

SETTINGS = (
    Refusal(
        "expert capacity limits",
        f"{_CONFIG}.moe_expert_capacity_factor",
        lambda value: value is None,
        "tokens over an expert's capacity are dropped after the replay",
        "set it to None",
    ),
    Refusal(
        "sinkhorn and quantile balancing",
        f"{_CONFIG}.moe_router_load_balancing_type",
        lambda value: not {"sinkhorn", "quantile_balancing"} & set([value] if isinstance(value, str) else value),
        "this balancing chooses its experts without asking for replayed ones",
        "use aux_loss, seq_aux_loss or none",
    ),
    Refusal(
        "forced load balancing",
        f"{_CONFIG}.moe_router_force_load_balancing",
        lambda value: not value,
        "gates would come from random logits",
        "set it to False",
    ),
    Refusal(
        "forced router biases",
        f"{_CONFIG}.moe_router_force_biased",
        lambda value: value is None,
        "gates would come from biased logits",
        "set it to None",
    ),
    Refusal(
        "flex dispatchers of HybridEP and NCCL EP",
        f"{_CONFIG}.moe_flex_dispatcher_backend",
        lambda value: value == "deepep",
        "whether a replayed expert whose gate is 0 is kept is decided in kernels that were not looked into",
        "set it to 'deepep', also where it is not used",
    ),
    Refusal(
        "CUDA graphs",
        f"{_CONFIG}.cuda_graph_impl",
        lambda value: value in (None, "none"),
        "a captured router repeats the routes of the capture",
        "set it to 'none'",
    ),
    Refusal(
        "combined 1F1B",
        f"{_CONFIG}.overlap_moe_expert_parallel_comm",
        lambda value: not value,
        "its schedule runs layers of two microbatches in turns, outside of their forward_step",
        "set it to False",
    ),
    Refusal(
        "MLPs in chunks",
        f"{_CONFIG}.mlp_chunks_for_training",
        lambda value: value in (None, 1),
        "the router sees a sequence in chunks and rows cannot be told apart",
        "set it to 1",
        releases=">=0.18",
    ),
)
"""What `attach` refuses."""


def check_config(config: TransformerConfig) -> None:
    """Refuse a configuration that replay cannot honour.

    Raises:
        UnsupportedError: names the flag, its value, the reason and the way out.
        SeamError: the installed Megatron-Core has no flag of a name that is checked here.
    """
    refuse(LEDGER, SETTINGS, config)
