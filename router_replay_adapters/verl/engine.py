"""Replay by `megatron_router_replay` in verl's Megatron engine, from masks in its batches.

For the policy's engine, while verl's own replay is off: `router_replay.mode` is 'disabled'. An engine that is only for
forward passes, which the reference model's is, stays as it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import wraps
from typing import TYPE_CHECKING, Any

from torch import Tensor

from router_replay.errors import DataError, UnsupportedError
from router_replay.replay import BatchLayout
from router_replay_adapters.verl.packed import KEY, are_asked_for, masks_of

if TYPE_CHECKING:
    from megatron_router_replay import Replay

_replays: weakref.WeakKeyDictionary[Any, Replay] = weakref.WeakKeyDictionary()


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
            return original(engine, iter([batch]), model, *args, **others)
        if masks is None:
            raise DataError(
                f"this run's servers send masks, but a batch of the policy has none under {KEY!r}: what made it has to"
                " keep that field of its samples; unset SGLANG_ROUTER_CAPTURE to train without replay"
            )
        replay = _replay_of(engine)
        with replay.microbatch(masks, _layout(engine, batch["input_ids"], model), partial=True):
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


def _replay_of(engine: Any) -> Replay:
    """The engine's, attached at its first microbatch, when its parameters are where they are used."""
    replay = _replays.get(engine)
    if replay is None:
        _require_supported(engine)
        # Imported here: it loads Megatron, which only this process needs.
        from megatron_router_replay import attach

        replay = _replays[engine] = attach(engine.module)
    return replay


def _require_supported(engine: Any) -> None:
    settings = engine.engine_config
    found = [
        text
        for wrong, text in (
            (engine.enable_routing_replay, "verl's own replay: set megatron.router_replay.mode='disabled'"),
            (not settings.use_remove_padding, "padded batches: set model.use_remove_padding=True"),
            (settings.dynamic_context_parallel, "dynamic context parallelism: set dynamic_context_parallel=False"),
            (
                getattr(engine.tf_config, "experimental_attention_variant", None) == "dsv4_hybrid",
                "an attention whose packs are cut otherwise: train DeepSeek-V4 with verl's own replay",
            ),
        )
        if wrong
    ]
    if found:
        raise UnsupportedError(
            f"masks are replayed in verl's Megatron engine, but not with {'; nor with '.join(found)}"
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
