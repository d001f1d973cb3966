"""What a run of the main job found: its figures, and a table of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Group
from rich.table import Table

from examples.multi_turn_replay.rollout import Conversation
from router_replay.masks import RouteAgreement, RoutingGeometry, get_codec
from router_replay.mismatch import Diagnostics, LogRatios, Responses, diagnose

REPORTED_TAUS = (1.01, 1.1, 1.5, 2.0)

OWN_ROUTES, REPLAYED = "trainer's own routes", "rollout's routes replayed"
"""The trainer's two passes, as pictures and pages call them."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Trainer against rollout.

    Attributes:
        native: over the sampled tokens, with the trainer's own routes; its `routes` compare these with the recorded
            ones, over tokens that have a recorded route.
        replay: the same with the recorded routes replayed, which were checked already.
        moe_layers: decoder layers (0-based) that route, in the order of the routes' layers.
    """

    native: Diagnostics
    replay: Diagnostics
    moe_layers: tuple[int, ...]

    @property
    def routes(self) -> RouteAgreement:
        """The trainer's own routes against the recorded ones."""
        assert self.native.routes is not None
        return self.native.routes

    @property
    def differing_by_layer(self) -> dict[int, float]:
        """Decoder layer (0-based) to the share of tokens that take other experts there."""
        return dict(zip(self.moe_layers, self.routes.differing_by_layer, strict=True))


def compare(
    conversations: Sequence[Conversation],
    native_logprobs: Sequence[torch.Tensor],
    replay_logprobs: Sequence[torch.Tensor],
    native_routes: Sequence[torch.Tensor],
    taus: Sequence[float] = REPORTED_TAUS,
) -> Comparison:
    """Compare what the trainer computed for each conversation of n tokens with its rollout.

    Args:
        native_logprobs, replay_logprobs: float `[n]` each, in nats.
        native_routes: int `[n, L, K]` each.
        taus: thresholds of F(tau), above 1.
    """
    rollout = torch.cat([torch.tensor(each.rollout_logprobs, dtype=torch.float64) for each in conversations])
    sampled = torch.cat([torch.tensor(each.sampled) for each in conversations])
    recorded = torch.cat([each.masks.indices() for each in conversations])
    valid = torch.cat([each.masks.valid for each in conversations])
    own = torch.cat(
        [routes[: each.masks.num_tokens] for each, routes in zip(conversations, native_routes, strict=True)]
    )
    bounds = [0, *itertools.accumulate(len(each.token_ids) for each in conversations)]
    responses = Responses.packed(sampled, bounds)
    return Comparison(
        native=diagnose(
            LogRatios.of(trainer=torch.cat(list(native_logprobs)), rollout=rollout, responses=responses),
            taus=taus,
            trainer_routes=own,
            rollout_routes=recorded,
            routes_valid=valid,
        ),
        replay=diagnose(
            LogRatios.of(trainer=torch.cat(list(replay_logprobs)), rollout=rollout, responses=responses), taus=taus
        ),
        moe_layers=conversations[0].masks.geometry.moe_layers,
    )


def summarize(conversations: Sequence[Conversation], comparison: Comparison) -> dict[str, Any]:
    """The figures of `demo.json` that follow from the conversations: JSON types only, KL in nats per sampled token."""
    tokens = sum(len(each.token_ids) for each in conversations)
    rows = sum(each.masks.num_tokens for each in conversations)
    valid = sum(int(each.masks.valid.sum()) for each in conversations)
    geometry = conversations[0].masks.geometry
    native, replay = comparison.native, comparison.replay
    return {
        "conversations": len(conversations),
        "turns": sum(each.num_turns for each in conversations),
        "accuracy": sum(each.correct for each in conversations) / len(conversations),
        "tokens": tokens,
        "sampled_tokens": sum(sum(each.sampled) for each in conversations),
        "prefix_cached_tokens": sum(each.prefix_cached_tokens for each in conversations),
        "valid_rows": valid,
        "invalid_rows": tokens - valid,
        "route_mismatch": {
            "rows": comparison.routes.differing_routes,
            "tokens": comparison.routes.differing_tokens,
            "per_layer": {str(layer): share for layer, share in comparison.differing_by_layer.items()},
        },
        "kl_k3": {"native": native.k3, "replay": replay.k3},
        "kl_k1": {"native": native.k1, "replay": replay.k1},
        "f_tau": {
            f"{tau:g}": {"native": native.ratio_tails[tau], "replay": replay.ratio_tails[tau]} for tau in REPORTED_TAUS
        },
        "bytes_per_token": {
            "sglang_base64": sum(_sglang_bytes(each.masks.num_tokens, geometry) for each in conversations) / rows,
            "masks": sum(each.masks_bytes for each in conversations) / rows,
            "masks_rows_only": get_codec(conversations[0].masks.codec).row_bytes(geometry),
        },
    }


def table(report: dict[str, Any]) -> Group:
    """The report for a terminal of 80 columns."""
    rows, sizes = report["route_mismatch"], report["bytes_per_token"]
    compared = Table("trainer against rollout", title="Sampled tokens", title_justify="left")
    for heading in ("native", "replay", "replay / native"):
        compared.add_column(heading, justify="right")
    for name, key in (("KL, k3 (nats per token)", "kl_k3"), ("KL, k1 (nats per token)", "kl_k1")):
        pair = report[key]
        # k1 takes both signs, so a ratio of two of them says nothing.
        compared.add_row(name, f"{pair['native']:.2e}", f"{pair['replay']:.2e}", _ratio(pair) if key == "kl_k3" else "")
    for tau, pair in report["f_tau"].items():
        compared.add_row(f"probability ratio > {tau}", f"{pair['native']:.3%}", f"{pair['replay']:.3%}", _ratio(pair))
    facts = Table("the run", "", title_justify="left")
    facts.columns[1].justify = "right"
    for name, value in (
        ("conversations", f"{report['conversations']:,}"),
        ("turns", f"{report['turns']:,}"),
        ("problems solved", f"{report['accuracy']:.1%}"),
        ("tokens", f"{report['tokens']:,}"),
        ("sampled tokens", f"{report['sampled_tokens']:,}"),
        ("prompt tokens found in the prefix cache", f"{report['prefix_cached_tokens']:,}"),
        ("tokens with a recorded route, replayed", f"{report['valid_rows']:,}"),
        ("tokens without one", f"{report['invalid_rows']:,}"),
        ("native (token, layer) routes that differ", f"{rows['rows']:.2%}"),
        ("tokens with a native route that differs", f"{rows['tokens']:.2%}"),
        ("bytes per token in JSON, masks", f"{sizes['masks']:.1f}"),
        ("bytes per token in JSON, SGLang's format", f"{sizes['sglang_base64']:.1f}"),
    ):
        facts.add_row(name, value)
    return Group(facts, compared)


def _ratio(pair: dict[str, float]) -> str:
    return f"{pair['replay'] / pair['native']:.2f}" if pair["native"] > 0 else ""


def _sglang_bytes(num_rows: int, geometry: RoutingGeometry) -> int:
    # SGLang sends an int32 per expert choice of every decoder layer, dense ones included.
    raw = num_rows * geometry.num_layers * geometry.top_k * 4
    return 4 * -(-raw // 3)
