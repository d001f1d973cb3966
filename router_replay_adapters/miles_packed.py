"""Routes that stay packed on their way through miles: from its samples to the queues of its routers.

    --custom-generate-function-path router_replay_adapters.miles_packed.generate
    --custom-megatron-init-path router_replay_adapters.miles_packed.init

miles imports it in the process of its rollouts and in every one of its Megatron trainer. Its requests, its split of
samples and microbatches, its layout, queues and passes stay; rows that are unknown are native, as by `miles`.
"""

from __future__ import annotations

import functools
import logging
import os
from argparse import Namespace
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from router_replay.errors import DataError, UnsupportedError
from router_replay.masks import masks_from_meta_info
from router_replay.upstream import Attribute, Ledger, Patch, Seam
from router_replay_adapters import miles
from router_replay_adapters.on_import import wrap_on_import
from router_replay_adapters.packed_queues import (
    KEY,
    PackedLayer,
    PackedQueues,
    after_answer,
    container_of,
    geometry_of,
    masks_of,
    numbered_rows,
)
from router_replay_adapters.refusals import refuse_settings
from router_replay_adapters.stacks import STACKS, say_at_start

logger = logging.getLogger(__name__)

_OWN = "miles carries packed rows"
_TESTS = "tests/router_replay_adapters/test_miles_packed.py"
_FILL = "backends.megatron_utils.actor.fill_replay_data"
_RECORD = "utils.replay_base.Replay.record"
_UPDATE = "Sample.update_from_meta_info"
_LOSS_MASKS = "loss_masks"
_OLDER_ROLLOUT = "MILES_USE_LEGACY_ROLLOUT_V1"


def _ledger(prefix: str, *seams: Seam, attributes: tuple[Attribute, ...] = ()) -> Ledger:
    return Ledger(
        distribution="miles-rl",
        title="miles",
        prefix=prefix,
        subject="the adapter of packed rows for miles",
        tested=(),
        checked=("0.1.0",),
        way_out="take router_replay_adapters.miles.init and format 'sglang', which need less of miles",
        seams=seams,
        attributes=attributes,
    )


SAMPLES = _ledger(
    "miles.utils.types.",
    Seam(
        _UPDATE,
        ("args", "meta_info"),
        "wrapped by miles_packed.around_update_from_meta_info",
        "every answer reaches its sample there, behind its tokens",
        _OWN,
    ),
    attributes=tuple(
        Attribute("Sample", name, "read by miles_packed.around_update_from_meta_info", why, f"{_TESTS}::{test}")
        for name, why, test in (
            ("tokens", "masks are of these", "test_masks_of_other_tokens_are_refused_at_once"),
            ("rollout_routed_experts", "it is where a sample's routes are", "test_a_step_replays_what_was_recorded"),
        )
    ),
)
"""What is needed where samples are made. These are the names of miles' repository at 31f1ca9, as in the others."""

GENERATE = _ledger(
    "miles.rollout.generate_hub.single_turn.",
    Seam("generate", ("input",), "called by miles_packed.generate", "it is how miles generates by itself", _OWN),
)
"""What `generate` needs."""

TRAINER = _ledger(
    "miles.",
    Seam(
        _FILL,
        ("*", "data_iterator", "rollout_data", "data_key", "register_replay_list_func"),
        "wrapped by miles_packed.around_fill_replay_data",
        "it puts the rows of microbatches into this rank's places, and these into queues",
        _OWN,
    ),
    Seam(
        _RECORD,
        ("top_indices",),
        "wrapped by miles_packed.around_record",
        "a queue has to take packed rows as they are",
        _OWN,
    ),
    attributes=(
        Attribute(
            "utils.replay_base.Replay",
            "top_indices_list",
            "read by miles_packed.around_record",
            "it holds what was recorded",
            f"{_TESTS}::test_a_step_replays_what_was_recorded",
        ),
    ),
)
"""What is needed in trainers, beside what `router_replay_adapters.miles` needs."""


def around_update_from_meta_info(original: Callable[..., None]) -> Callable[..., None]:
    """Of `Sample.update_from_meta_info`: an answer's masks are the sample's, as a container in place of an array.

    A container is `uint8 [bytes]`, as of `packed_queues.container_of`, since miles' stores take arrays. An answer that
    sampled tokens and has no masks takes those away that were there, so that the trainer refuses the sample.
    """

    @functools.wraps(original)
    def update_from_meta_info(sample: Any, args: Namespace, meta_info: dict[str, Any]) -> None:
        original(sample, args, meta_info)
        if not getattr(args, "use_rollout_routing_replay", False):
            return
        container = sample.rollout_routed_experts
        before = None if container is None else masks_of(container)
        if meta_info.get("routing_masks"):
            masks = after_answer(before, masks_from_meta_info(meta_info), sample.tokens)
            sample.rollout_routed_experts = container_of(masks)
        elif before is not None and before.end < len(sample.tokens) - 1:
            sample.rollout_routed_experts = None

    return update_from_meta_info


async def generate(input: Any) -> Any:
    """What miles does without a function of its user's: one turn. What counts is that this module is imported.

    A function of one's own imports it, too, and takes answers by miles' own `update_sample_from_response`.

    Raises:
        UnsupportedError: miles' older rollout, whose own generation is another one.
    """
    # As `miles.utils.environ` reads it.
    if int(os.environ.get(_OLDER_ROLLOUT, "0")):
        raise UnsupportedError(
            f"{_OLDER_ROLLOUT} is set, and router_replay_adapters.miles_packed.generate stands for the generation of"
            " miles' newer rollout: give a function of your own that imports this module and calls"
            " miles.rollout.sglang_rollout.generate, or unset the variable"
        )
    from miles.rollout.generate_hub import single_turn

    return await single_turn.generate(input)


_packed = PackedQueues()


class _Numbered:
    """miles' iterator of microbatches, which gives the numbers of rows in the place of packed rows, and keeps these.

    miles itself has a row of every token but the last, or stops; numbers always are as many. So it has to be looked at
    here whether the tokens that teach have rows.
    """

    def __init__(self, iterator: Any) -> None:
        self._iterator = iterator
        self.containers: list[Any] = []
        self.tokens: list[Tensor] = []
        self.loss_masks: list[Tensor] | None = []

    def get_next(self, keys: Iterable[str]) -> dict[str, Any]:
        batch = self._iterator.get_next([*keys, _LOSS_MASKS])
        self.containers, self.tokens, self.loss_masks = batch[KEY], batch["tokens"], batch.pop(_LOSS_MASKS)
        if self.loss_masks is None:
            raise DataError(f"a batch of miles has routes and no {_LOSS_MASKS!r}, which tell what tokens teach")
        return {**batch, KEY: numbered_rows(self.tokens)}

    def reset(self) -> _Numbered:
        self._iterator.reset()
        return self


def around_fill_replay_data(original: Callable[..., None]) -> Callable[..., None]:
    """Of `fill_replay_data`, for routes: the queues get packed layers in place of experts."""

    @functools.wraps(original)
    def fill_replay_data(
        *, data_iterator: list[Any], data_key: str, register_replay_list_func: Callable[..., None], **others: Any
    ) -> None:
        if data_key != KEY:
            original(
                data_iterator=data_iterator,
                data_key=data_key,
                register_replay_list_func=register_replay_list_func,
                **others,
            )
            return
        numbered = _Numbered(data_iterator[0])

        def register(replay_list: list[Any], numbers: Tensor, **more: Any) -> None:
            microbatch = _packed.microbatch(numbered.containers, numbered.tokens, numbers, numbered.loss_masks)
            register_replay_list_func(replay_list, microbatch, **more)

        original(
            data_iterator=[numbered, *data_iterator[1:]],
            data_key=data_key,
            register_replay_list_func=register,
            **others,
        )

    return fill_replay_data


def around_record(original: Callable[..., None]) -> Callable[..., None]:
    """Of `Replay.record`: a packed layer is kept as it is."""

    @functools.wraps(original)
    def record(queue: Any, top_indices: Tensor | PackedLayer) -> None:
        if isinstance(top_indices, PackedLayer):
            queue.top_indices_list.append(top_indices)
        else:
            original(queue, top_indices)

    return record


PATCHES = (
    *miles.PATCHES,
    Patch(TRAINER, _FILL, around_fill_replay_data),
    Patch(TRAINER, _RECORD, around_record),
)
"""What `init` applies."""


def init(args: Namespace) -> None:
    """What miles calls in each process of its trainer, once its process groups are there.

    Args:
        args: miles' own arguments.

    Raises:
        SeamError: the installed miles does not fit the ledgers, or lacks an argument that is looked at.
        UnsupportedError: a dense model, or an argument under which replay would be passed by, or wrong.
    """
    if asked := bool(getattr(args, "use_rollout_routing_replay", False)):
        refuse_settings("miles", args)
        _packed.geometry = geometry_of(args)
    for patch in PATCHES:
        patch.apply()
    say_at_start(STACKS["miles-packed"], asked=asked)


def install() -> None:
    """Keep the masks of answers in samples, in this process; miles has it done by importing this module."""
    wrap_on_import(SAMPLES, SAMPLES.prefix.rstrip("."), {_UPDATE: around_update_from_meta_info}, _tell)


def _tell(module: str) -> None:
    logger.info("router_replay_adapters.miles_packed: wrapped in %s, process %d: %s", module, os.getpid(), _UPDATE)


install()
