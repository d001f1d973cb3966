"""Settings of verl's Megatron engine under which masks would be put in the wrong places, or replayed by nobody."""

from __future__ import annotations

from router_replay.upstream import Refusal
from router_replay_adapters.verl.ledger import ENGINE_CONFIG

_CONFIG = f"{ENGINE_CONFIG}.McoreEngineConfig"

SETTINGS = (
    Refusal(
        "replay by verl itself",
        f"{_CONFIG}.router_replay",
        lambda value: value.mode == "disabled",
        "its routers would take the place of this package's",
        "set megatron.router_replay.mode='disabled'",
    ),
    Refusal(
        "padded batches",
        f"{_CONFIG}.use_remove_padding",
        bool,
        "rows are put into the places of a pack",
        "set model.use_remove_padding=True",
    ),
    Refusal(
        "dynamic context parallelism",
        f"{_CONFIG}.dynamic_context_parallel",
        lambda value: not value,
        "it cuts each microbatch for another number of ranks",
        "set megatron.dynamic_context_parallel=False",
    ),
)
"""What is refused when masks are to be replayed."""
