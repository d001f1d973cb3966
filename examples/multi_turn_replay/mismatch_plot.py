"""The picture of a run: tails of the probability ratio, and where routes differ. The report's plots, side by side."""

from __future__ import annotations

from pathlib import Path

from examples.multi_turn_replay.replay_report import OWN_ROUTES, REPLAYED, Comparison
from router_replay.files import write_whole
from router_replay.report import style
from router_replay.report.ratio_plots import draw_tails
from router_replay.report.step_plots import draw_layers


def plot_mismatch(comparison: Comparison, path: Path) -> None:
    """Write the picture: F(tau) of the sampled tokens, and the share of differing routes by decoder layer.

    Args:
        comparison: made with as many taus as the curve shall have points.
    """
    figure = style.new_figure(11, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    draw_tails(left, {OWN_ROUTES: comparison.native, REPLAYED: comparison.replay})
    count = comparison.native.num_tokens
    left.set_title(f"How many of {count:,} sampled tokens have a ratio\nof probabilities, trainer to rollout, beyond τ",
                   fontsize=style.FONT + 1, loc="left")  # fmt: skip
    draw_layers(right, comparison.routes, comparison.moe_layers)
    right.set_title("Tokens for which the trainer's router\nchooses other experts than the rollout's",
                    fontsize=style.FONT + 1, loc="left")  # fmt: skip
    write_whole(path, lambda partial: figure.savefig(partial, dpi=130, metadata={"Software": None}))
