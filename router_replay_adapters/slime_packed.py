"""Routes that stay packed on their way through slime: from its samples to the queues of its routers.

    --custom-convert-samples-to-train-data-path router_replay_adapters.slime_packed.convert
    --custom-megatron-init-path router_replay_adapters.slime_packed.init

slime imports it in the process of its rollouts and in every one of its Megatron trainer. Its requests, its split of
samples and microbatches, its layout, queues and passes stay; rows that are unknown are native, as by `slime`.
"""

from __future__ import annotations

import copy
import logging
import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from router_replay.errors import DataError
from router_replay.masks import masks_from_meta_info
from router_replay.masks.masks import RoutingMasks
from router_replay.upstream import Attribute, Ledger, Patch, Seam, require
from router_replay_adapters import slime
from router_replay_adapters.on_import import wrap_on_import
from router_replay_adapters.packed_queues import (
    KEY,
    PackedMicrobatch,
    PackedQueues,
    after_answer,
    container_of,
    geometry_of,
    numbered_rows,
    require_trained,
)
from router_replay_adapters.refusals import refuse_settings
from router_replay_adapters.stacks import STACKS, say_at_start

logger = logging.getLogger(__name__)

_OWN = "slime carries packed rows"
_TESTS = "tests/router_replay_adapters/test_slime_packed.py"
_PREPARE = "actor.prepare_routed_experts_for_routing_replay"
_APPEND = "Sample.append_response_tokens"
_MANAGER = "RolloutManager"


def _ledger(module: str, *seams: Seam, attributes: tuple[Attribute, ...] = ()) -> Ledger:
    return Ledger(
        distribution="slime",
        title="slime",
        prefix=f"slime.{module}.",
        subject="the adapter of packed rows for slime",
        tested=(),
        checked=("0.3.1",),
        way_out="take router_replay_adapters.slime.init and format 'sglang', which need less of slime",
        seams=seams,
        attributes=attributes,
    )


SAMPLES = _ledger(
    "utils.types",
    Seam(
        _APPEND,
        ("args", "*", "meta_info"),
        "wrapped by slime_packed.around_append_response_tokens",
        "every answer reaches its sample there",
        _OWN,
    ),
    attributes=tuple(
        Attribute("Sample", name, "read by slime_packed.convert", why, f"{_TESTS}::{test}")
        for name, why, test in (
            ("tokens", "masks are of these", "test_masks_of_other_tokens_are_refused_at_once"),
            ("rollout_routed_experts", "it is where a sample's routes are", "test_a_step_replays_what_was_recorded"),
            ("loss_mask", "tokens that teach need rows", "test_tokens_that_teach_need_routes"),
            ("response_length", "it is the length of a mask that was never made", "test_tokens_that_teach_need_routes"),
            ("remove_sample", "such a sample teaches nothing", "test_samples_that_teach_nothing_need_no_routes"),
        )
    ),
)
"""What is needed where samples are made. These are the names of slime's repository at 624b824, as in the others."""

CONVERSION = _ledger(
    "ray.rollout",
    Seam(
        f"{_MANAGER}._convert_samples_to_train_data",
        ("samples",),
        "called by slime_packed.convert",
        "it makes everything of a batch but its routes",
        _OWN,
    ),
    Seam(
        f"{_MANAGER}._post_process_rewards",
        ("samples",),
        "called by slime_packed.convert",
        "the conversion calls it",
        _OWN,
    ),
    Seam("load_function", ("path",), "called by slime_packed.convert", "slime finds its user's functions by it", _OWN),
)
"""What is needed where samples become batches."""

TRAINER = _ledger(
    "backends.megatron_utils",
    Seam(
        _PREPARE,
        (
            "rollout_routed_experts",
            "tokens",
            "*",
            "num_experts",
            "data_pad_size_multiplier",
            "sequence_parallel",
            "allgather_cp",
        ),
        "wrapped by slime_packed.around_prepare",
        "it puts the rows of a microbatch into this rank's places",
        _OWN,
    ),
    Seam(
        "cp_utils._pad_routed_experts",
        ("experts", "pad", "num_experts"),
        "relied on by slime_packed.around_prepare",
        "padding is numbered modulo that many experts, so that by one it is 0",
        _OWN,
    ),
)
"""What is needed in trainers, beside what `router_replay_adapters.slime` needs."""

QUEUES = _ledger(
    "utils.routing_replay",
    Seam(
        "RoutingReplay.record",
        ("top_indices",),
        "relied on by packed_queues.PackedLayer",
        "it keeps what gives experts by a method of its own as it is",
        _OWN,
    ),
)
"""What slime's queues have to take."""


def around_append_response_tokens(original: Callable[..., None]) -> Callable[..., None]:
    """Of `Sample.append_response_tokens`: an answer's masks are the sample's, as `RoutingMasks` in place of an array.

    They may be in any store; those of an answer that has rows from some position on go behind those that are there.
    """

    @wraps(original)
    def append_response_tokens(sample: Any, args: Any = None, **others: Any) -> None:
        original(sample, args, **others)
        meta_info = others.get("meta_info")
        # Chunks of a stream, and answers without a sampled token, have none.
        if meta_info and meta_info.get("routing_masks"):
            masks = masks_from_meta_info(meta_info)
            sample.rollout_routed_experts = after_answer(sample.rollout_routed_experts, masks, sample.tokens)

    return append_response_tokens


def convert(args: Namespace, samples: Sequence[Any]) -> dict[str, Any]:
    """Slime's own conversion of samples to a batch, in which routes are containers of masks.

    Returns:
        slime's own fields, and `rollout_routed_experts`: `uint8 [bytes]` for each sample.

    Raises:
        DataError: a sample with routes that are no masks, or one that teaches tokens without routes.
        PairingError: masks of other tokens than the sample's.
        SeamError: the installed slime does not fit the ledger.
    """
    require(CONVERSION)
    routes = [container_of(_routes_of(sample)) for sample in samples]
    bare = [copy.copy(sample) for sample in samples]
    for sample in bare:
        sample.rollout_routed_experts = None
    return {**_own_conversion(args, bare), KEY: routes}


def _routes_of(sample: Any) -> RoutingMasks | None:
    masks = sample.rollout_routed_experts
    if masks is not None and not isinstance(masks, RoutingMasks):
        raise DataError(
            f"a sample of slime has routes that are a {type(masks).__name__}, where RoutingMasks belong: set"
            " SGLANG_ROUTER_CAPTURE=1 for all servers, without SGLANG_ROUTER_CAPTURE_FORMAT, and let answers reach"
            " samples by Sample.append_response_tokens"
        )
    if masks is not None:
        masks.check_tokens(sample.tokens)
    if not sample.remove_sample:
        trained = [1] * sample.response_length if sample.loss_mask is None else sample.loss_mask
        require_trained(masks, len(sample.tokens), trained)
    return masks


def _own_conversion(args: Namespace, samples: list[Any]) -> dict[str, Any]:
    """What slime makes of samples without routes, by the method of an actor that cannot be reached from here."""
    from slime.ray.rollout import RolloutManager, load_function

    reward_path = getattr(args, "custom_reward_post_process_path", None)
    manager = SimpleNamespace(
        args=args,
        custom_convert_samples_to_train_data_func=None,
        custom_reward_post_process_func=None if reward_path is None else load_function(reward_path),
    )
    manager._post_process_rewards = partial(_function(RolloutManager._post_process_rewards), manager)
    return _function(RolloutManager._convert_samples_to_train_data)(manager, samples)


def _function(method: Any) -> Callable[..., Any]:
    # Ray puts an object in the place of the class, whose methods are bound to it.
    return getattr(method, "__func__", method)


_packed = PackedQueues()


def around_prepare(original: Callable[..., Tensor]) -> Callable[..., PackedMicrobatch]:
    """Of `prepare_routed_experts_for_routing_replay`: what comes back gives packed layers in place of experts."""

    @wraps(original)
    def prepare(
        rollout_routed_experts: Sequence[Any], tokens: Sequence[Tensor], *, num_experts: int, **layout: Any
    ) -> PackedMicrobatch:
        # It pads with numbers up to that of experts: by one alone they are 0.
        numbers = original(numbered_rows(tokens), tokens, num_experts=1, **layout)
        return _packed.microbatch(rollout_routed_experts, tokens, numbers)

    return prepare


PATCHES = (*slime.PATCHES, Patch(TRAINER, _PREPARE, around_prepare))
"""What `init` applies."""


def init(args: Namespace) -> None:
    """What slime calls in each process of its trainer, once its process groups are there.

    Args:
        args: slime's own arguments.

    Raises:
        SeamError: the installed slime does not fit the ledgers, or lacks an argument that is looked at.
        UnsupportedError: a dense model, or an argument under which replay would be passed by, or wrong.
    """
    if asked := bool(getattr(args, "use_rollout_routing_replay", False)):
        refuse_settings("slime", args)
        _packed.geometry = geometry_of(args)
    require(QUEUES)
    for patch in PATCHES:
        patch.apply()
    say_at_start(STACKS["slime-packed"], asked=asked)


def install() -> None:
    """Keep the masks of answers in samples, in this process; slime has it done by importing this module."""
    wrap_on_import(SAMPLES, SAMPLES.prefix.rstrip("."), {_APPEND: around_append_response_tokens}, _tell)


def _tell(module: str) -> None:
    logger.info("router_replay_adapters.slime_packed: wrapped in %s, process %d: %s", module, os.getpid(), _APPEND)


install()
