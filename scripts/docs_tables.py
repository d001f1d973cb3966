"""Write the parts of README.md and docs/ that say what is supported and measured, from the code and the demo's report.

    python scripts/docs_tables.py           # write them
    python scripts/docs_tables.py --check   # say which are out of date, and fail if any is

A table stands between `<!-- name -->` and `<!-- /name -->`; the names are those of `TABLES`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Of the folders here the packages alone are installed.
sys.path.insert(0, str(ROOT))
from benchmarks.markdown import row, rule  # noqa: E402

TAUS = ("1.01", "1.1")
ENDS = {
    "sglang": "SGLang, the rollout",
    "megatron": "Megatron-Core, the trainer",
    "hf": "Hugging Face, the trainer",
    "stacks": "training stacks, by adapters",
    "models": "models",
}


def main() -> None:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a table is out of date")
    check = parser.parse_args().check
    stale = [path for path in sorted({path for path, _ in TABLES}) if (ROOT / path).read_text() != filled(path)]
    for path in stale:
        if not check:
            (ROOT / path).write_text(filled(path))
        print(f"{path}: {'out of date; run python scripts/docs_tables.py' if check else 'written'}")
    sys.exit(bool(check and stale))


def filled(path: str) -> str:
    """The page as it is with its tables as they should be."""
    text = (ROOT / path).read_text()
    for page, name in TABLES:
        if page == path:
            begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
            pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
            if len(pattern.findall(text)) != 1:
                sys.exit(f"{path}: there must be one table between {begin} and {end}")
            table = TABLES[page, name]()
            text = pattern.sub(lambda _, table=table, begin=begin, end=end: f"{begin}\n{table}\n{end}", text)
    return text


def support() -> str:
    """The matrix of the README: a row for each end, one for stacks, and one for models."""
    known = tomllib.loads((ROOT / "docs" / "support.toml").read_text())
    lines = [row("", "tested", "refused", "untested"), rule(names=4, figures=0)]
    for end, title in ENDS.items():
        refused = dict.fromkeys([*known[end]["refused"], *(each.feature for each in refusals(end))])
        untested = [f"{name} ({note})" if note else name for name, note in known[end]["untested"].items()]
        lines.append(row(f"**{title}**", "; ".join(known[end]["tested"]), "; ".join(refused), "; ".join(untested)))
    return "\n".join(lines)


def refusals(end: str) -> Sequence:
    """Rows of an end's own table of settings that it refuses; not every end has one."""
    if end == "sglang":
        from sglang_router_capture.refusals import SETTINGS

        return SETTINGS
    if end == "megatron":
        from megatron_router_replay.refusals import SETTINGS

        return SETTINGS
    return ()


def features(end: str) -> str:
    """Every feature of an end by itself: what holds of it, and the test or the reason."""
    known = tomllib.loads((ROOT / "docs" / "support.toml").read_text())[end]
    lines = [row("feature", "is", "shown by, or because"), rule(names=3, figures=0)]
    lines += [row(name, "right", _link(test)) for name, test in known["tested"].items()]
    lines += [row(name, "refused", _link(test)) for name, test in known["refused"].items()]
    of_settings = {each.feature: f"{each.reason}; `test_what_cannot_be_captured_is_refused`" for each in refusals(end)}
    lines += [row(name, "refused", why) for name, why in of_settings.items()]
    lines += [row(name, "not run", note) for name, note in known["untested"].items()]
    return "\n".join(lines)


def _link(test: str) -> str:
    file, _, name = test.partition("::")
    return f"[{name}](../{file})"


def reasons(end: str) -> str:
    """A table of an end's refusals: what, the setting, and why."""
    lines = [row("refused", "setting", "because"), rule(names=3, figures=0)]
    seen: set[str] = set()
    for each in refusals(end):
        if each.feature not in seen:
            setting = each.flag if " " in each.flag else f"`{each.flag or each.setting}`"
            lines.append(row(each.feature, setting, f"{each.reason}; {each.way_out}"))
        seen.add(each.feature)
    return "\n".join(lines)


def releases() -> str:
    """Which releases of the engines are tested, and which only checked."""
    from hf_router_replay.ledger import LEDGER as HF
    from megatron_router_replay.ledger import LEDGER as MEGATRON
    from sglang_router_capture.ledger import LEDGER as SGLANG

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = [
        row("", "tests of the engine ran with", "names and parameters checked against", "extra"),
        rule(names=4, figures=0),
    ]
    for ledger, extra in ((SGLANG, "sglang"), (MEGATRON, "megatron"), (HF, "hf")):
        checked = ", ".join(ledger.checked) or "no other"
        lines.append(row(ledger.title, ", ".join(ledger.tested), checked, f"`{extras[extra][0]}`"))
    return "\n".join(lines)


def figures() -> str:
    """Figures of the demo's run whose report is docs/demo.json; docs/mismatch.png is the picture of the same run."""
    run = json.loads((ROOT / "docs" / "demo.json").read_text())
    routes, k3 = run["route_mismatch"], run["kl_k3"]
    tails = [f"{tau} times from {run['f_tau'][tau]['native']:.2%} to {run['f_tau'][tau]['replay']:.2%}" for tau in TAUS]
    return (
        f"*One run of `make demo` ({run['date']}, {run['hardware']['cores']} cores of {run['hardware']['cpu']}, SGLang"
        f" {run['versions']['sglang']} in bfloat16, Megatron-Core {run['versions']['megatron-core']} in"
        f" {run['trainer_dtype']}, the same weights; {run['conversations']} conversations, {run['sampled_tokens']:,}"
        f" sampled tokens). Left alone, the trainer takes other experts for {routes['rows']:.1%} of (token, layer)"
        f" pairs, and in some layer of {routes['tokens']:.1%} of the tokens. Replay takes KL (k3) from"
        f" {k3['native']:.2e} to {k3['replay']:.2e} nats per token, and the share of tokens whose probability is off by"
        f" more than {' and by more than '.join(tails)}. Another run has other conversations:"
        " how far figures vary, and what larger models show, is in [docs/corrections.md](docs/corrections.md).*"
    )


def measured(benchmark: str, part: str) -> str:
    """What a benchmark's page makes of the figures of the run that is committed."""
    page = importlib.import_module(f"benchmarks.{benchmark}.page")
    return getattr(page, part)(json.loads((ROOT / "benchmarks" / "results" / f"{benchmark}.json").read_text()))


def studied(part: str) -> str:
    """What the stability study's page makes of the results that are committed."""
    return getattr(importlib.import_module("studies.stability.page"), part)()


TABLES: dict[tuple[str, str], Callable[[], str]] = {
    ("README.md", "support"): support,
    ("README.md", "figures"): figures,
    ("README.md", "transport"): lambda: measured("transport", "sentence"),
    ("docs/transport.md", "requests"): lambda: measured("transport", "requests"),
    ("docs/transport.md", "conversation"): lambda: measured("transport", "conversation"),
    ("docs/transport.md", "large job"): lambda: measured("transport", "large_job"),
    ("docs/transport.md", "pause"): lambda: measured("pause", "pauses"),
    ("docs/corrections.md", "bias"): lambda: measured("corrections", "bias"),
    ("docs/corrections.md", "left"): lambda: measured("corrections", "left"),
    ("docs/corrections.md", "noise"): lambda: measured("corrections", "noise"),
    ("docs/corrections.md", "on-policy"): lambda: measured("corrections", "on_policy"),
    ("docs/corrections.md", "way"): lambda: measured("corrections", "way"),
    ("docs/corrections.md", "off-policy"): lambda: measured("corrections", "off_policy"),
    ("docs/engine-support.md", "features"): lambda: features("sglang"),
    ("docs/server.md", "refusals"): lambda: reasons("sglang"),
    ("docs/trainer.md", "refusals"): lambda: reasons("megatron"),
    ("docs/install.md", "releases"): releases,
    ("docs/corrections.md", "staleness"): lambda: measured("staleness", "table"),
    ("docs/stability.md", "arms"): lambda: studied("table"),
    ("docs/stability.md", "evaluations"): lambda: studied("evaluations"),
    ("docs/stability.md", "beside"): lambda: studied("beside"),
}

if __name__ == "__main__":
    main()
