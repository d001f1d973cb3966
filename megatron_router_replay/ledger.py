"""The ledger: every name of Megatron-Core that replay relies on, and the check that the installed one fits."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import megatron.core

from router_replay.errors import SeamError

TESTED_VERSIONS = ("0.19.2",)


@dataclass(frozen=True)
class Seam:
    """One upstream name.

    Attributes:
        path: dotted path, from the module down.
        parameters: names that its signature must contain, in this order; others may stand between them.
        why: what it is needed for.
        until: when this entry can go.
        exact: the signature must hold these parameters and no others.
    """

    path: str
    parameters: tuple[str, ...]
    why: str
    until: str
    exact: bool = False


# What replay needs; checked by attach().
SEAMS: tuple[Seam, ...] = (
    Seam(
        "megatron.core.transformer.moe.router.TopKRouter.routing",
        ("self", "logits"),
        why="hands its attribute router_replay to the top-k function in every forward pass",
        until="never: this is the hook that replay uses",
    ),
    Seam(
        "megatron.core.transformer.moe.moe_utils.topk_routing_with_score_function",
        ("logits", "topk", "score_function", "fused", "router_replay"),
        why="asks router_replay for the experts and computes the gates from the scores that it returns",
        until="never: this is the hook that replay uses",
    ),
    Seam(
        "megatron.core.transformer.moe.router_replay.RouterReplay.get_replay_topk",
        ("self", "scores", "topk", "num_groups", "group_topk", "default_compute_topk"),
        why="is the call that the object put into router_replay answers",
        until="Megatron-Core publishes a protocol for router_replay",
        exact=True,
    ),
    Seam(
        "megatron.core.transformer.moe.router.TopKRouter.__init__",
        ("self", "config", "is_mtp_layer"),
        why="tells the routers of multi-token prediction from those of decoder layers with the same number",
        until="MTP routers count their layers on from the decoder's",
    ),
    Seam(
        "megatron.core.transformer.moe.router.TopKRouter.set_layer_number",
        ("self", "layer_number"),
        why="gives a router its 1-based number in the whole model and forwards it to router_replay",
        until="never: rows are matched to layers by this number",
    ),
    Seam(
        "megatron.core.transformer.transformer_layer.TransformerLayer.__init__",
        ("self", "config", "submodules", "layer_number"),
        why="keeps the layer_number that tells which decoder layers a model chunk holds, dense ones included",
        until="never: the live layers are checked against the rollout's",
    ),
    Seam(
        "megatron.core.transformer.multi_token_prediction.MultiTokenPredictionLayer.__init__",
        ("self", "config", "submodules", "layer_number"),
        why="holds the routers of multi-token prediction, which no rollout recorded",
        until="MTP routers count their layers on from the decoder's",
    ),
    Seam(
        "megatron.core.tensor_parallel.random.CheckpointFunction.forward",
        ("ctx", "run_function", "distribute_saved_activations", "args"),
        why="takes the run_function that is wrapped, so that a recompute sees the masks of its own forward pass",
        until="Megatron-Core lets a caller add state to an activation checkpoint",
        exact=True,
    ),
)

# What averages of parameters need; checked when their sharded state is asked for.
AVERAGE_SEAMS: tuple[Seam, ...] = (
    Seam(
        "megatron.core.optimizer.optimizer.Float16OptimizerWithFloat16Params.__init__",
        ("self", "optimizer", "config", "grad_scaler", "init_state_fn"),
        why="keeps every 16-bit parameter's float32 main parameter as its attribute main_param, which is averaged",
        until="Megatron-Core has a function that returns a parameter's main parameter",
    ),
    Seam(
        "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer._build_model_and_main_param_groups",
        ("gbuf_ranges", "param_gbuf_map", "opt_group_ranges", "config"),
        why="sets main_param_sharded on parameters whose main_param is a slice, which is not averaged",
        until="Megatron-Core has a function that returns a parameter's main parameter",
    ),
    Seam(
        "megatron.core.distributed.DistributedDataParallelConfig",
        ("overlap_param_gather", "use_megatron_fsdp"),
        why="tells, as ddp_config of the wrapper, whether a rank holds its new parameters after optimizer.step()",
        until="never: stale parameters must not be averaged",
    ),
    Seam(
        "megatron.core.distributed.DistributedDataParallel.__init__",
        ("self", "config", "ddp_config", "module"),
        why="keeps ddp_config, and the model that it wraps as its only child, module",
        until="never: stale parameters must not be averaged",
    ),
    Seam(
        "megatron.core.dist_checkpointing.optimizer.get_param_id_to_sharded_param_map",
        ("model_sharded_state_dict", "optim_params_iter"),
        why="finds the sharding of every averaged tensor in the model's sharded state dict",
        until="never: averages are sharded as the parameters are",
    ),
    Seam(
        "megatron.core.dist_checkpointing.optimizer.make_sharded_optimizer_tensor",
        ("model_param", "optim_param", "prefix"),
        why="gives an average the sharding of its parameter",
        until="never: averages are sharded as the parameters are",
    ),
)


def check_seams(seams: Sequence[Seam] = SEAMS) -> None:
    """Refuse an installed Megatron-Core that does not have every seam.

    Raises:
        SeamError: names the dotted path, what was expected, what was found, and the tested versions.
    """
    for seam in seams:
        found = _parameters(seam)
        if not _fits(seam, found):
            expected = ", ".join(seam.parameters)
            raise _refusal(seam, f"expected parameters ({expected}), found ({', '.join(found)})")


def _parameters(seam: Seam) -> tuple[str, ...]:
    return tuple(inspect.signature(_resolve(seam)).parameters)


def _resolve(seam: Seam) -> Any:
    parts = seam.path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            target: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for depth, name in enumerate(parts[cut:], start=cut):
            if not hasattr(target, name):
                raise _refusal(seam, f"expected an attribute {name!r}, found none in {'.'.join(parts[:depth])}")
            target = getattr(target, name)
        return target
    raise _refusal(seam, "expected an importable module, found none")


def _fits(seam: Seam, found: tuple[str, ...]) -> bool:
    if seam.exact:
        return found == seam.parameters
    remaining = iter(found)
    return all(name in remaining for name in seam.parameters)


def _refusal(seam: Seam, difference: str) -> SeamError:
    return SeamError(
        f"{seam.path}: {difference} in megatron-core {megatron.core.__version__} (tested with "
        f"{', '.join(TESTED_VERSIONS)}). This package needs it: it {seam.why}; install a tested version."
    )
