"""The tables of docs/corrections.md, from the figures that a run of the benchmark wrote."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.markdown import origin, row, rule

_FIGURES = {"k3": "k3", "f_tau_2": "F(2)", "ess_token": "ESS, token", "ess_sequence": "ESS, sequence"}
_ON_POLICY = ("on-policy, small error", "on-policy", "on-policy, 4 times the rate")
_WAY = "on-policy"
_OF_TOKENS = ("token TIS, 2", "IcePop, 0.5 to 5", "token MIS, 0.5 to 2", "score centering", "sequence TIS, 2")
_OF_THE_WAY = ("none", "token TIS, 2", "token MIS, 0.5 to 2", "sequence TIS, 2", "sequence IS", "score centering")


def bias(figures: Mapping[str, Any]) -> str:
    """Bias of the gradient by correction and scenario, under the mismatch that each scenario has."""
    scenarios = figures["gradients"]
    lines = [row("", *scenarios), rule(names=1, figures=len(scenarios))]
    for name, title in _FIGURES.items():
        lines.append(row(title, *(_spread(of["mismatch"][name], ".2g") for of in scenarios.values())))
    for correction in _corrections(figures):
        lines.append(row(correction, *(shown_bias(of["corrections"][correction]) for of in scenarios.values())))
    return "\n".join([*lines, "", _origin(figures)])


def left(figures: Mapping[str, Any]) -> str:
    """Which share of a seed's bias some corrections leave."""
    scenarios = figures["gradients"]
    lines = [row("", *scenarios), rule(names=1, figures=len(scenarios))]
    for correction in _OF_TOKENS:
        found = (of["corrections"][correction]["left"] for of in scenarios.values())
        lines.append(row(correction, *(_spread(each, ".2f") for each in found)))
    return "\n".join(lines)


def noise(figures: Mapping[str, Any]) -> str:
    """Noise of the gradient of a batch."""
    scenarios = figures["gradients"]
    lines = [row("", *scenarios), rule(names=1, figures=len(scenarios))]
    for correction in _corrections(figures):
        found = (of["corrections"][correction]["noise"] for of in scenarios.values())
        lines.append(row(correction, *(_spread(each, ".1f") for each in found)))
    return "\n".join(lines)


def on_policy(figures: Mapping[str, Any]) -> str:
    """Rewards that training reaches on rollouts of the present weights."""
    return _reached(figures, _ON_POLICY)


def off_policy(figures: Mapping[str, Any]) -> str:
    """Rewards that training reaches with several updates of a rollout, and on old ones."""
    return _reached(figures, [name for name in figures["training"] if name not in _ON_POLICY])


def way(figures: Mapping[str, Any]) -> str:
    """Rewards on the way, on-policy, under an error that is the same in every step."""
    of = figures["training"][_WAY]
    parts = len(of["control"]["points"]) - 1
    rollouts = (figures["settings"]["rollouts"] * part // parts for part in range(1, parts + 1))
    lines = [row("", *(f"{number} rollouts" for number in rollouts)), rule(names=1, figures=parts)]
    arms = {"control": of["control"]} | {name: of["corrections"][name]["same error"] for name in _OF_THE_WAY}
    lines += [row(name, *(_spread(each, ".2f") for each in arm["points"][1:])) for name, arm in arms.items()]
    return "\n".join(lines)


def shown_bias(of: Mapping[str, Mapping[str, float]]) -> str:
    """A bias with its range, or below what it is known to, twice the resolution, if it is not above that."""
    resolved = 2 * of["resolution"]["median"]
    return f"<{resolved:.2f}" if of["bias"]["median"] < resolved else _spread(of["bias"], ".2f")


def _reached(figures: Mapping[str, Any], regimes: Iterable[str]) -> str:
    shown = {name: figures["training"][name] for name in regimes}
    columns = [(name, kind) for name, of in shown.items() for kind in of["settings"]["kinds"]]
    lines = [row("", *(f"{name}: {kind}" for name, kind in columns)), rule(names=1, figures=len(columns))]
    for title, form in (("k3", "k3"), ("ESS, sequence", "ess_sequence")):
        cells = (
            _spread(shown[name]["mismatch"][form], ".2g") if kind == "same error" else "" for name, kind in columns
        )
        lines.append(row(f"{title}, at the start", *cells))
    lines.append(row("control", *(_spread(shown[name]["control"]["points"][-1], ".2f") for name, _ in columns)))
    for correction in _corrections(figures):
        arms = (shown[name]["corrections"][correction][kind] for name, kind in columns)
        cells = (f"{_spread(arm['points'][-1], '.2f')}; {arm['near']}, {arm['better']}" for arm in arms)
        lines.append(row(correction, *cells))
    return "\n".join(lines)


def _corrections(figures: Mapping[str, Any]) -> Iterable[str]:
    return next(iter(figures["gradients"].values()))["corrections"]


def _spread(of: Mapping[str, float], form: str) -> str:
    return f"{of['median']:{form}} ({of['lowest']:{form}} to {of['highest']:{form}})"


def _origin(figures: Mapping[str, Any]) -> str:
    settings = figures["settings"]
    return (
        f"{origin(figures, 'torch')}; {len(settings['seeds'])} seeds, {settings['batches']} batches,"
        f" {settings['rollouts']} rollouts."
    )
