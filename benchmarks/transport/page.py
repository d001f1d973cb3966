"""Parts of README.md and docs/transport.md, from the figures that a run of the benchmark wrote."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.markdown import origin, row, rule
from benchmarks.transport.ways import FILE, HOPS, INLINE, NOTHING, STOCK

_README = ("Qwen3-30B-A3B", 32768)
_LARGE = ("DeepSeek-V3", 32768)
_ROLLOUTS = 4096
_MIB = 1 << 20


def sentence(figures: dict[str, Any]) -> str:
    """What README.md says."""
    rows = _rows(_case(figures, *_README))
    cpu_ms, read_mb = (
        {way: of[key] * scale for way, of in rows.items()} for key, scale in (("cpu_s", 1e3), ("bytes_read", 1e-6))
    )
    of_file, of_inline = (_share(rows[way]["cpu_of_stock"]) for way in (FILE, INLINE))
    return (
        f"*The routes of {_README[1]:,} tokens of {_README[0]}, from SGLang's scheduler to the trainer"
        f" ({origin(figures)}): SGLang's own way takes {cpu_ms[STOCK]:.0f} ms of CPU, and the trainer reads"
        f" {read_mb[STOCK]:.1f} MB; with a folder as store {cpu_ms[FILE]:.0f} ms and {read_mb[FILE]:.1f} MB, with the"
        f" masks in the answer {cpu_ms[INLINE]:.0f} ms and {read_mb[INLINE]:.1f} MB; less what a request without routes"
        f" costs ({cpu_ms[NOTHING]:.0f} ms), {of_file} and {of_inline} of SGLang's CPU time.*"
    )


def requests(figures: dict[str, Any]) -> str:
    """The table of single requests, and where it comes from."""
    lines = [
        row("tokens, model", "way", "CPU ms", "of SGLang's", "peak MiB, server", "trainer", "read MB", "of SGLang's"),
        rule(names=2, figures=6),
    ]
    for case in figures["requests"]:
        name = f"{case['tokens']:,}, {case['model']}"
        lines += [row(name, f"`{of['way']}`" if ":" in of["way"] else of["way"], *_cells(of)) for of in case["rows"]]
    return "\n".join([*lines, "", f"{origin(figures)}; medians of {figures['settings']['rounds']} rounds."])


def conversation(figures: dict[str, Any]) -> str:
    """The table of a conversation."""
    (case,) = figures["conversations"]
    lines = [
        row("way", "asked for", "CPU ms", "of SGLang's", "peak MiB, server", "trainer", "read MB", "of SGLang's"),
        rule(names=2, figures=6),
    ]
    lines += [row(of["way"], of["asked"], *_cells(of)) for of in case["rows"]]
    made = f"{case['turns']} turns, {case['tokens']:,} tokens of {case['model']} at the end; {origin(figures)}"
    return "\n".join([*lines, "", f"{made}; medians of {figures['settings']['rounds']} rounds."])


def large_job(figures: dict[str, Any]) -> str:
    """Bytes by hop of a large job's step: those of one rollout, times the number of rollouts."""
    model, tokens = _LARGE
    rows = _rows(_case(figures, model, tokens))
    ways = [way for way in rows if way != NOTHING]
    lines = [row(f"GB of {_ROLLOUTS:,} rollouts of {tokens:,} tokens of {model}", *ways)]
    lines.append(rule(names=1, figures=len(ways)))
    for hop in HOPS:
        lines.append(row(hop, *(f"{rows[way]['bytes_by_hop'][hop] * _ROLLOUTS / 1e9:.1f}" for way in ways)))
    sums = (sum(rows[way]["bytes_by_hop"].values()) * _ROLLOUTS / 1e9 for way in ways)
    return "\n".join([*lines, row("all hops", *(f"{total:.1f}" for total in sums))])


def _cells(of: dict[str, Any]) -> Iterable[str]:
    memory = of["peak_bytes_by_process"]
    trainer = memory["trainer"]
    yield f"{of['cpu_s'] * 1e3:.1f}"
    yield _share(of["cpu_of_stock"])
    yield f"{(sum(memory.values()) - trainer) / _MIB:.0f}"
    yield f"{trainer / _MIB:.0f}"
    yield f"{of['bytes_read'] / 1e6:.2f}"
    yield _share(of["bytes_of_stock"]) if of["way"] != NOTHING else "-"


def _case(figures: dict[str, Any], model: str, tokens: int) -> dict[str, Any]:
    return next(case for case in figures["requests"] if (case["model"], case["tokens"]) == (model, tokens))


def _rows(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {of["way"]: of for of in case["rows"]}


def _share(ratio: float) -> str:
    return f"1/{1 / ratio:.1f}" if 1e-4 < ratio < 0.99 else f"{ratio:.2f}" if ratio >= 0.99 else "-"
