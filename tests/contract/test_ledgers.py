"""The ends' ledgers: whole, readable, and in step with the code, the tests and the package's extras."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from hf_router_replay import ledger as hf
from megatron_router_replay import ledger as megatron
from megatron_router_replay.refusals import SETTINGS as REPLAY_SETTINGS
from router_replay.replay.torch_checkpoint import TORCH_LEDGER
from router_replay.upstream import Attribute, Found, Ledger, Refusal, Seam, check, check_settings, message, require
from router_replay_adapters.refusals import MEGATRON as QUEUES_MEGATRON
from router_replay_adapters.refusals import SETTINGS as QUEUES_SETTINGS
from router_replay_adapters.stacks import ledgers_of
from router_replay_adapters.verl import ledger as verl
from router_replay_adapters.verl.refusals import SETTINGS as VERL_SETTINGS
from sglang_router_capture import ledger as sglang
from sglang_router_capture.refusals import SETTINGS

REPOSITORY = Path(__file__).parents[2]
LEDGERS = (sglang.LEDGER, megatron.LEDGER, megatron.AVERAGES_LEDGER, hf.LEDGER)
# Of what no extra brings: torch itself, what Megatron-Core can do without, and stacks,
# which pin other engines.
STACKS = {name: ledgers_of(name) for name in ("miles", "slime")}
OTHERS = (
    TORCH_LEDGER,
    megatron.TRANSFORMER_ENGINE_LEDGER,
    *STACKS["miles"],
    *STACKS["slime"],
    verl.LEDGER,
)
ROWS = [(ledger, row) for ledger in (*LEDGERS, *OTHERS) for row in (*ledger.seams, *ledger.attributes)]
REFUSALS = [(sglang.LEDGER, row) for row in SETTINGS]
REFUSALS += [(megatron.LEDGER, row) for row in REPLAY_SETTINGS]
REFUSALS += [(QUEUES_MEGATRON, row) for row in QUEUES_SETTINGS]
REFUSALS += [(verl.LEDGER, row) for row in VERL_SETTINGS]
ENDS = {
    "sglang": "sglang_router_capture",
    "megatron-core": "megatron_router_replay",
    "transformer-engine": "megatron_router_replay",
    "transformers": "hf_router_replay",
    "torch": "router_replay/replay",
    "miles-rl": "router_replay_adapters",
    "slime": "router_replay_adapters",
    "verl": "router_replay_adapters/verl",
}
# A clause of its own has a finite verb; "our flags on the command line" or "to a slot" has none.
FINITE = (
    "is|are|has|have|may|must|can|would|keep|asks|tells|tell|takes|gives|keeps|knows|sets|sees|decides|hands|says|read|reads"
    "|holds|carries|belong|reaches|puts|makes|calls|need|teaches|adds|lets|follow|wrote|limits|loses|happens|report|finds|needs|leaves|returns|names|gets"
)
SENTENCES = re.compile(
    r"(?P<path>[\w.]+): expected (that name|that attribute|a function|a function that asks for no parameters"
    r"|parameters \([\w*, ]+\)), found nothing at all\. It is (hooked|wrapped|called|overridden|answered|inherited|read"
    rf"|relied on) by [a-z_]+(\.\w+)+ and needed because (?!to )[\w.()' ,-]*\b({FINITE})\b([\w' ,-]|\w\.\w|\(\))*\."
)


@dataclass(frozen=True)
class Nothing:
    """A release that has none of the names."""

    release: str = "0.19.2"

    def find(self, path: str) -> Found:
        raise LookupError("nothing at all")

    def has_field(self, owner: str, name: str) -> bool:
        return False

    def has_attribute(self, owner: str, name: str) -> bool | None:
        raise LookupError("nothing at all")


def _sentences(ledger: Ledger) -> list[str]:
    releases = ledger.tested + ledger.checked
    found = [str(problem) for release in releases for problem in check(ledger, Nothing(release))]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("ledger", LEDGERS + OTHERS, ids=lambda ledger: f"{ledger.title}, {ledger.subject}")
def test_every_row_reads_as_sentences(ledger: Ledger) -> None:
    sentences = _sentences(ledger)
    named = {place.path for seam in ledger.seams for place in seam.places}
    named |= {f"{row.owner}.{row.name}" for row in ledger.attributes if row.owner is not None}
    assert {sentence.partition(": ")[0].removeprefix(ledger.prefix) for sentence in sentences} == named
    wrong = [sentence for sentence in sentences if not SENTENCES.fullmatch(sentence)]
    assert wrong == []


def test_a_few_sentences_word_by_word() -> None:
    told = [sentence for ledger in LEDGERS for sentence in _sentences(ledger)]
    for sentence in (
        "sglang.srt.mem_cache.allocator.token.TokenToKVPoolAllocator.alloc: expected a function, found nothing at all."
        " It is hooked by hooks.slots.after_alloc and needed because a slot that is handed out has a new occupant.",
        "sglang.srt.managers.schedule_batch.release_req: expected parameters (*, req, req_to_token_pool), found nothing"
        " at all. It is hooked by hooks.requests.before_release_req and needed because a retracted request still"
        " holds its KV slots there.",
        "sglang.srt.runtime_context.get_serving: expected a function that asks for no parameters, found nothing at all."
        " It is called by recorder.Recorder.on_forward_end and needed because every row carries the version of the"
        " weights that computed it.",
        "sglang.srt.layers.moe.utils.install_shared_experts_fusion_decision: expected a function, found nothing at all."
        " It is relied on by hooks.capturer.num_fused_shared_experts and needed because what it decides, and"
        " where it leaves that, is how many columns of shared experts follow the routed ones.",
        "megatron.core.transformer.moe.router.TopKRouter.router_replay: expected that attribute, found nothing at all."
        " It is answered by layer_replay.LayerReplay and needed because the object that chooses the experts is put"
        " there.",
        "megatron.core.distributed.DistributedDataParallelConfig.overlap_param_gather: expected that name, found"
        " nothing at all. It is read by averages.averaged_tensors.find_averaged and needed because it tells whether a"
        " rank holds its new parameters after optimizer.step().",
    ):
        assert sentence in told


def test_the_whole_message() -> None:
    problems = check(megatron.LEDGER, Nothing())[:1]
    assert message(megatron.LEDGER, "0.20.0", problems) == (
        "replay does not fit the installed Megatron-Core 0.20.0 (megatron-core):\n"
        "  megatron.core.transformer.moe.router.TopKRouter: expected that name, found nothing at all. It is read by"
        " live_model.find_routers and needed because the live routers are found by their class.\n"
        "This is tested with Megatron-Core 0.19.2; names and parameters also fit 0.17.1 and 0.18.2. Install one of"
        " these, or train without replay."
    )


@pytest.mark.parametrize(("ledger", "row"), REFUSALS, ids=lambda part: part.path if isinstance(part, Refusal) else "")
def test_every_setting_reads_as_sentences(ledger: Ledger, row: Refusal) -> None:
    release = next(release for release in ledger.tested + ledger.checked if row.expected_in(release))
    sentence, *others = check_settings(ledger, [row], Nothing(release))
    assert [other.split("'")[1] for other in others] == list(row.only_with)
    assert re.fullmatch(
        r"[\w.]+: expected a setting '\w+', found none\. It is read to refuse [\w -]+ and needed because"
        r" [a-zA-Z][^.]*(\.[^.]+)*\.",
        sentence,
    )
    assert re.match(r"(set|use|start|turn) ", row.way_out)


@pytest.mark.parametrize(("ledger", "row"), ROWS, ids=lambda part: getattr(part, "name", ""))
def test_what_uses_a_row_exists(ledger: Ledger, row: Seam | Attribute) -> None:
    module, *names = row.use.rpartition(" ")[2].split(".")
    file = REPOSITORY / ENDS[ledger.distribution] / f"{module}.py"
    while file.parent.is_dir() and not file.is_file() and names:
        file = file.with_suffix("") / f"{names.pop(0)}.py"
    scope: ast.AST = ast.parse(file.read_text())
    for name in names:
        scope = next(part for part in ast.iter_child_nodes(scope) if getattr(part, "name", None) == name)


@pytest.mark.parametrize(
    "attribute",
    [pytest.param(row, id=row.name) for _, row in ROWS if isinstance(row, Attribute)],
)
def test_the_test_that_would_notice_exists(attribute: Attribute) -> None:
    file, _, name = attribute.noticed_by.partition("::")
    tests = ast.parse((REPOSITORY / file).read_text()).body
    assert name in {test.name for test in tests if isinstance(test, ast.FunctionDef)}


def _upstream_imports(package: str, upstream: str) -> Iterator[tuple[str, str]]:
    for file in sorted((REPOSITORY / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == upstream:
                for alias in node.names:
                    yield f"{file.relative_to(REPOSITORY)}:{node.lineno}", f"{node.module}.{alias.name}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.partition(".")[0] == upstream:
                        yield f"{file.relative_to(REPOSITORY)}:{node.lineno}", alias.name


@pytest.mark.parametrize(
    ("package", "upstream", "ledgers"),
    [
        ("sglang_router_capture", "sglang", LEDGERS[:1]),
        ("megatron_router_replay", "megatron", LEDGERS[1:3]),
        ("hf_router_replay", "transformers", LEDGERS[3:]),
        ("router_replay_adapters/verl", "verl", (verl.LEDGER,)),
    ],
)
def test_every_import_has_its_row(package: str, upstream: str, ledgers: tuple[Ledger, ...]) -> None:
    paths = [ledger.prefix + place.path for ledger in ledgers for seam in ledger.seams for place in seam.places]
    imports = list(_upstream_imports(package, upstream))
    assert imports
    without = [(where, name) for where, name in imports if not any(f"{path}.".startswith(f"{name}.") for path in paths)]
    assert without == []


@pytest.mark.parametrize(("stack", "ledgers"), STACKS.items(), ids=STACKS)
def test_every_import_of_a_stack_has_its_row(stack: str, ledgers: tuple[Ledger, ...]) -> None:
    imports = [name for _, name in _upstream_imports("router_replay_adapters", stack)]
    paths = [ledger.prefix + place.path for ledger in ledgers for seam in ledger.seams for place in seam.places]
    assert imports
    assert [name for name in imports if not any(f"{path}.".startswith(f"{name}.") for path in paths)] == []


def test_no_upstream_is_imported_by_what_knows_no_engine() -> None:
    for package in ("router_replay", "router_replay_cli"):
        for upstream in ("sglang", "megatron", "transformers"):
            assert [*_upstream_imports(package, upstream)] == []


@pytest.mark.parametrize("ledger", LEDGERS, ids=lambda ledger: ledger.subject)
def test_extras_accept_what_is_tested_or_checked_and_nothing_older(ledger: Ledger) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extra = {"sglang": "sglang", "megatron-core": "megatron", "transformers": "hf"}[ledger.distribution]
    (requirement,) = [Requirement(text) for text in project["optional-dependencies"][extra]]
    assert requirement.name == ledger.distribution
    releases = [*ledger.checked, *ledger.tested]
    assert [release for release in releases if release not in requirement.specifier] == []
    (lowest,) = [one.version for one in requirement.specifier if one.operator == ">="]
    # A patch release of the lowest one's series may be what was checked.
    oldest = min(releases, key=Version)
    assert oldest == lowest or oldest.startswith(f"{lowest}.")


def test_the_message_of_a_ledger_whose_upstream_was_not_run() -> None:
    ledger = megatron.TRANSFORMER_ENGINE_LEDGER
    assert message(ledger, "3.0", check(ledger, Nothing("3.0"))[:1]).endswith(
        "\nThis is tested with no Transformer Engine; names and parameters fit 1.5, 2.0, 2.9 and 2.18. Install one of"
        " these, or train without replay."
    )


def test_the_installed_torch_is_a_tested_one() -> None:
    require(TORCH_LEDGER)
    assert Version(importlib.metadata.version("torch")).base_version in TORCH_LEDGER.tested


def test_the_lock_has_tested_releases() -> None:
    lines = (REPOSITORY / "constraints" / "engines.txt").read_text().split()
    for ledger in LEDGERS:
        assert f"{ledger.distribution}=={ledger.tested[-1]}" in lines
