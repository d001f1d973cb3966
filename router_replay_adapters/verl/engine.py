"""Replay by `megatron_router_replay` in verl's Megatron engine, from masks in its batches.

For the policy's engine, while verl's own replay is off: `router_replay.mode` is 'disabled'. An engine that is only for
forward passes, which the reference model's is, stays as it is.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any

from torch import Tensor

from router_replay.errors import DataError, UnsupportedError
from router_replay.replay import BatchLayout
from router_replay.replay.placement import NATIVE_CAUSES
from router_replay.upstream import refuse
from router_replay_adapters.seldom import Seldom
from router_replay_adapters.verl.ledger import LEDGER
from router_replay_adapters.verl.packed import KEY, are_asked_for, masks_of
from router_replay_adapters.verl.refusals import SETTINGS
from router_replay_adapters.verl.unreplayed import refuse_engine_without_replay, refuse_experts_without_replay

if TYPE_CHECKING:
    from megatron_router_replay import Replay

logger = logging.getLogger(__name__)

_replays: weakref.WeakKeyDictionary[Any, Replay] = weakref.WeakKeyDictionary()
_nothing_replayed = Seldom()


def around_forward_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of `MegatronEngineWithLMHead.forward_step`: the microbatch's masks are bound to its pass, and to recomputes."""

    @wraps(original)
    def forward_step(engine: Any, batch_iter: Iterator[Any], model: Any, *args: Any, **others: Any) -> Any:
        if engine.engine_config.forward_only:
            return original(engine, batch_iter, model, *args, **others)
        batch = next(batch_iter)
        masks = masks_of(batch.get(KEY, None))
        # Masks that are there are replayed whatever this process' environment says.
        if masks is None and not are_asked_for():
            refuse_experts_without_replay(engine, batch, model)
            return original(engine, iter([batch]), model, *args, **others)
        if masks is None:
            raise DataError(
                f"this run's servers send masks, but a batch of the policy has none under {KEY!r}: what made it has to"
                " keep that field of its samples; unset SGLANG_ROUTER_CAPTURE to train without replay"
            )
        replay = _replay_of(engine, model)
        layout = _layout(engine, batch["input_ids"], model)
        # A microbatch may be one sequence, and one without a valid row says nothing of a step.
        with replay.microbatch(masks, layout, partial=True, valid=False):
            return original(engine, iter([batch]), model, *args, **others)

    return forward_step


def around_optimizer_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of `MegatronEngine.optimizer_step`: what was found wrong on the device is raised before weights change."""

    @wraps(original)
    def optimizer_step(engine: Any, *args: Any, **others: Any) -> Any:
        replay = _replays.get(engine)
        if replay is not None:
            replay.check()
        return original(engine, *args, **others)

    return optimizer_step


def around_train_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of `BaseEngine.train_batch`: what replay logs is among the metrics of the step, as `router_replay/...`.

    It is every engine's; one of the policy that replays nothing is an error where its batch has routes.
    """

    @wraps(original)
    def train_batch(engine: Any, data: Any, *args: Any, **others: Any) -> Any:
        refuse_engine_without_replay(engine, data)
        outputs = original(engine, data, *args, **others)
        replay = _replays.get(engine)
        if replay is not None:
            # Taken on every rank: they begin anew.
            taken = replay.metrics()
            _tell_if_nothing_is_known(taken)
            if engine.is_mp_src_rank_with_outputs():
                outputs["metrics"].update(_named(_shares(taken)))
        return outputs

    return train_batch


def _named(metrics: Mapping[str, float]) -> dict[str, list[float]]:
    """As verl has metrics, in lists as those of microbatches are: it puts them end to end, and logs their mean."""
    return {f"router_replay/{name}": [value] for name, value in metrics.items()}


def _tell_if_nothing_is_known(metrics: Mapping[str, float]) -> None:
    """Warn, now and then, of a mini-batch whose rows are all unknown, which trains as without replay."""
    invalid = metrics.get("places/native (invalid)", 0.0)
    if invalid and not metrics.get("places/replayed", 0.0) and _nothing_replayed.due():
        logger.warning(
            "none of the %d places with a row in this rank's mini-batch has a valid one, so that it was trained without"
            " replay; where that goes on, see r3 doctor --stack verl-packed --server URL",
            invalid,
        )


def _shares(metrics: Mapping[str, float]) -> dict[str, float]:
    """Shares of the places that are no padding, by what they took, and `overlap/rollout` where it was looked at.

    All of the former every time: what a rank leaves out is no 0 in the mean over ranks.
    """
    kinds = ("replayed", *(f"native ({cause})" for cause in NATIVE_CAUSES))
    counts = {kind: metrics.get(f"places/{kind}", 0.0) for kind in kinds}
    whole = sum(counts.values()) or 1.0
    overlap = {name: value for name, value in metrics.items() if name == "overlap/rollout"}
    return {**{kind: count / whole for kind, count in counts.items()}, **overlap}


def _replay_of(engine: Any, model: Any) -> Replay:
    """The engine's, attached at its first microbatch, when its parameters are where they are used."""
    replay = _replays.get(engine)
    if replay is None:
        _require_supported(engine, model)
        # Imported here: it loads Megatron, which only this process needs.
        from megatron_router_replay import attach

        replay = _replays[engine] = attach(engine.module)
    return replay


def _require_supported(engine: Any, model: Any) -> None:
    from verl.utils.megatron_utils import unwrap_model

    refuse(LEDGER, SETTINGS, engine.engine_config)
    cut = engine._get_context_parallel_layout(unwrap_model(model))
    if cut != "zigzag":
        raise UnsupportedError(
            f"masks are replayed in verl's Megatron engine, but not in packs that are cut in a {cut} way, as those of"
            " DeepSeek-V4's attention are: train it with verl's own replay"
        )


def _layout(engine: Any, input_ids: Tensor, model: Any) -> BatchLayout:
    """Of the pack that verl makes of jagged input ids: its own function says where sequences begin in it."""
    from verl.models.mcore.util import preprocess_thd_engine
    from verl.utils.megatron_utils import unwrap_model

    settings = engine.engine_config
    _, parameters, _ = preprocess_thd_engine(
        input_ids,
        pre_process=False,
        use_fp8_padding=unwrap_model(model).config.fp8 in ("e4m3", "hybrid"),
        pad_to_length_bucket=settings.pad_to_length_bucket if settings.pad_to_length else None,
    )
    return BatchLayout.jagged(input_ids, cu_seqlens=parameters.cu_seqlens_q_padded)
