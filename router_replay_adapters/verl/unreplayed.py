"""Routes in a batch of the policy that its engine would not replay: an error, where verl trains on without a word."""

from __future__ import annotations

import sys
from typing import Any

from router_replay.errors import DataError, UnsupportedError
from router_replay_adapters.verl.ledger import ENGINE, LEDGER
from router_replay_adapters.verl.packed import KEY

_EXPERTS = "routed_experts"
_ASKED_BY = "actor_rollout_ref.rollout.enable_rollout_routing_replay"


def refuse_experts_without_replay(engine: Any, batch: Any, model: Any) -> None:
    """Of a batch without masks, in a Megatron engine of the policy: its experts need verl's own replay.

    That a run has it says little of a pass: verl's routers replay where the worker's method flagged the batch.

    Args:
        model: the chunk that is called with the batch.

    Raises:
        DataError: the batch has experts, and verl's replay is off, or its routers were told of none.
    """
    if batch.get(_EXPERTS, None) is None:
        return
    if not engine.enable_routing_replay:
        raise DataError(
            f"a batch of the policy has {_EXPERTS!r} and no {KEY!r}, and verl's own replay is off, so that nobody"
            " would replay them: set actor_rollout_ref.actor.megatron.router_replay.mode=R3 for verl's own replay of"
            " them; or, for packed rows, SGLANG_ROUTER_CAPTURE=1 in every process, and no SGLANG_ROUTER_CAPTURE_FORMAT"
            f" in any; take {_ASKED_BY} away to train without replay, and without verl's load-balance metrics"
        )
    from verl.utils.megatron.router_replay_utils import iter_model_routers
    from verl.utils.megatron_utils import unwrap_model

    if any(router.router_replay_action is None for _, router in iter_model_routers(unwrap_model(model))):
        raise DataError(
            f"a batch of the policy has {_EXPERTS!r}, and verl's routers were not told to replay them in this pass: a"
            " worker of your own marks such batches as verl's compute_log_prob and update_actor do, by"
            " tu.assign_non_tensor(data, enable_routing_replay=True)"
        )


def refuse_engine_without_replay(engine: Any, batch: Any) -> None:
    """Of a batch that an engine trains on: the routes of a policy's are replayed in verl's Megatron engine alone.

    VeOmni's has a replay of its own, of experts. A critic is trained on the policy's batches, and replays nothing.

    Raises:
        UnsupportedError: the batch has masks or experts, and the policy's engine replays none.
    """
    found = next((name for name in (KEY, _EXPERTS) if batch.get(name, None) is not None), None)
    if found is None or engine.model_config.model_type != "language_model" or _looks_at_microbatches(engine):
        return
    if found == _EXPERTS and getattr(engine, "enable_routing_replay", False):
        return
    of_veomni = ", or by veomni with its router_replay.mode=R3" if found == _EXPERTS else ""
    raise UnsupportedError(
        f"a batch of the policy has {found!r}, and its engine, verl's {type(engine).__name__}, replays none: train by"
        f" actor_rollout_ref.actor.strategy=megatron{of_veomni}; in a trainer of your own on FSDP, replay masks by"
        f" hf_router_replay; take {_ASKED_BY} away to train without replay"
    )


def _looks_at_microbatches(engine: Any) -> bool:
    """Whether it is a Megatron engine, whose `forward_step` is wrapped; none is where verl did not load these."""
    module = sys.modules.get(f"{LEDGER.prefix}{ENGINE}")
    return module is not None and isinstance(engine, module.MegatronEngineWithLMHead)
