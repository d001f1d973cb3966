"""Arguments under which routers of slime and miles take no recorded experts, or under which these are undone.

Most are settings of the Megatron-Core that a stack brings, and are among its arguments by the same name.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

from router_replay.errors import UnsupportedError
from router_replay.upstream import Ledger, Refusal, refuse

MEGATRON = Ledger(
    distribution="megatron-core",
    title="Megatron-Core",
    prefix="megatron.core.",
    subject="replay by a stack's own queues",
    tested=("0.19.2",),
    checked=("0.16.1", "0.17.1", "0.18.2"),
    way_out="take the adapter's --custom-megatron-init-path away and let no server answer with unknown rows",
    seams=(),
)
"""Whose settings these are. Stacks bring a commit or a fork of it, of which the number says little."""

_CONFIG = "transformer.transformer_config.TransformerConfig"
_CAPTURED = "a captured router repeats the routes of the capture"

SETTINGS = (
    Refusal(
        "fused routers",
        f"{_CONFIG}.moe_router_fusion",
        lambda value: not value,
        "a fused router asks for no recorded experts",
        "turn it off",
        flag="--moe-router-fusion",
    ),
    Refusal(
        "sinkhorn and quantile balancing",
        f"{_CONFIG}.moe_router_load_balancing_type",
        lambda value: not {"sinkhorn", "quantile_balancing"} & set([value] if isinstance(value, str) else value),
        "this balancing chooses its experts without asking for recorded ones",
        "use aux_loss, seq_aux_loss or none",
        flag="--moe-router-load-balancing-type",
    ),
    Refusal(
        "CUDA graphs",
        f"{_CONFIG}.cuda_graph_impl",
        lambda value: value in (None, "none"),
        _CAPTURED,
        "set it to none",
        flag="--cuda-graph-impl",
        releases=">=0.16",
    ),
    *(
        Refusal(
            "CUDA graphs by an older name",
            f"{_CONFIG}.{name}",
            lambda value: not value,
            _CAPTURED,
            "turn it off",
            flag=f"--{name.replace('_', '-')}",
            releases="<0.20",
        )
        for name in ("enable_cuda_graph", "external_cuda_graph")
    ),
    Refusal(
        "expert capacity limits",
        f"{_CONFIG}.moe_expert_capacity_factor",
        # Megatron takes a negative one for none, once it has made a configuration of its arguments.
        lambda value: value is None or value < 0,
        "tokens over an expert's capacity are dropped after the replay",
        "turn it off",
        flag="--moe-expert-capacity-factor",
    ),
    Refusal(
        "forced load balancing",
        f"{_CONFIG}.moe_router_force_load_balancing",
        lambda value: not value,
        "gates would come from random logits",
        "turn it off",
        flag="--moe-router-force-load-balancing",
    ),
    Refusal(
        "forced router biases",
        f"{_CONFIG}.moe_router_force_biased",
        lambda value: value is None,
        "gates would come from biased logits",
        "turn it off",
        flag="--moe-router-force-biased",
        releases=">=0.17",
    ),
    Refusal(
        "flex dispatchers of HybridEP and NCCL EP",
        f"{_CONFIG}.moe_flex_dispatcher_backend",
        lambda value: value in (None, "deepep"),
        "whether a replayed expert whose gate is 0 is kept is decided in kernels that were not looked into",
        "set it to deepep, also where it is not used",
        flag="--moe-flex-dispatcher-backend",
        releases=">=0.16",
    ),
)
"""What `refuse_settings` refuses of them; `releases` are those of Megatron-Core itself."""


def refuse_settings(stack: str, args: Namespace) -> None:
    """Refuse a stack's arguments under which routers take no recorded experts, or those of other tokens.

    Raises:
        UnsupportedError: such an argument.
        SeamError: arguments without one that is looked at here: one that is gone would pass for one that is off.
    """
    # A fork may have a name before the release that it is numbered by, or no longer.
    rows = [replace(row, releases="") for row in SETTINGS if not row.releases or hasattr(args, row.setting)]
    refuse(replace(MEGATRON, subject=f"replay by {stack}'s own queues"), rows, args)
    padded, of_several = getattr(args, "qkv_format", "thd") == "bshd", getattr(args, "micro_batch_size", 1) != 1
    if padded and of_several:
        raise UnsupportedError(
            f"replay by {stack}'s own queues cannot run where --qkv-format is bshd and --micro-batch-size is"
            f" {args.micro_batch_size}: {stack} lays rows out sequence by sequence, where the model's routers see"
            " position by position; take a micro-batch size of 1, or thd"
        )
