"""The table of stacks: its names exist, and it knows what is missing."""

from __future__ import annotations

import importlib.util
import pkgutil

import pytest

from router_replay.errors import InputError
from router_replay.upstream import Ledger
from router_replay_adapters.stacks import STACKS, Stack, say_at_start

ON = {"SGLANG_ROUTER_CAPTURE": "1", "SGLANG_ROUTER_CAPTURE_FORMAT": "sglang"}


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_a_stack_has_an_adapter_or_says_why_not(stack: Stack) -> None:
    if stack.adapter is None:
        assert stack.remark and not stack.ledgers and not stack.arguments
        return
    assert stack.ledgers and all(name.startswith(stack.adapter) for name in stack.ledgers)
    if importlib.util.find_spec(stack.adapter) is not None:
        assert all(isinstance(pkgutil.resolve_name(name), Ledger) for name in stack.ledgers)


def test_the_path_of_the_flag_leads_to_the_adapters_init() -> None:
    for name in ("miles", "slime"):
        flag, path = STACKS[name].arguments[1].split()
        module, _, function = path.rpartition(".")
        assert flag == "--custom-megatron-init-path"
        assert module == STACKS[name].adapter == f"router_replay_adapters.{name}" and function == "init"


@pytest.mark.parametrize(
    ("environ", "to_set"),
    [
        ({}, ["SGLANG_ROUTER_CAPTURE", "SGLANG_ROUTER_CAPTURE_FORMAT"]),
        ({"SGLANG_ROUTER_CAPTURE": "0", "SGLANG_ROUTER_CAPTURE_FORMAT": "sglang"}, ["SGLANG_ROUTER_CAPTURE"]),
        ({"SGLANG_ROUTER_CAPTURE": "true"}, ["SGLANG_ROUTER_CAPTURE_FORMAT"]),
        ({**ON, "SGLANG_ROUTER_CAPTURE_FORMAT": "masks"}, ["SGLANG_ROUTER_CAPTURE_FORMAT"]),
        (ON, []),
    ],
)
def test_variables_that_are_missing(environ: dict[str, str], to_set: list[str]) -> None:
    assert list(STACKS["miles"].variables_to_set(environ)) == to_set


def test_one_of_several_modules_of_verls_variable_is_enough() -> None:
    name = "VERL_USE_EXTERNAL_MODULES"
    assert list(STACKS["verl-packed"].variables_to_set({})) == [name, "SGLANG_ROUTER_CAPTURE"]
    assert list(STACKS["verl"].variables_to_set({name: "mine,router_replay_adapters.verl"})) == []
    assert list(STACKS["verl"].variables_to_set({name: "router_replay_adapters.verlmine"})) == [name]


@pytest.mark.parametrize(
    "stack", [stack for stack in STACKS.values() if stack.adapter is not None], ids=lambda s: s.name
)
def test_a_format_that_the_stack_does_not_read_is_missing_its_own(stack: Stack) -> None:
    """Also where the stack names no format: servers that are asked for arrays send no masks, nor these arrays."""
    own = {**stack.variables, **ON, "SGLANG_ROUTER_CAPTURE_FORMAT": stack.format}
    assert stack.variables_to_set(own) == {}
    other = "sglang" if stack.format == "masks" else "masks"
    of_another = {**own, "SGLANG_ROUTER_CAPTURE_FORMAT": other}
    assert stack.variables_to_set(of_another) == {"SGLANG_ROUTER_CAPTURE_FORMAT": stack.format}


def test_verls_own_servers_need_no_capture() -> None:
    """A format without it asks for nothing."""
    verl = {"VERL_USE_EXTERNAL_MODULES": "router_replay_adapters.verl"}
    assert STACKS["verl"].variables_to_set({**verl, "SGLANG_ROUTER_CAPTURE_FORMAT": "masks"}) == {}
    assert STACKS["verl"].variables_to_set({**verl, "SGLANG_ROUTER_CAPTURE": "1"}) == {
        "SGLANG_ROUTER_CAPTURE_FORMAT": "sglang"
    }


def test_the_line_of_a_start_names_a_format_of_another_stage(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in ON.items():
        monkeypatch.setenv(name, value)
    say_at_start(STACKS["slime-packed"], asked=True)
    (record,) = caplog.records
    assert "This process lacks SGLANG_ROUTER_CAPTURE_FORMAT=masks:" in record.getMessage()


def test_a_format_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(InputError, match="format 'sgl' is unknown"):
        STACKS["slime"].variables_to_set({**ON, "SGLANG_ROUTER_CAPTURE_FORMAT": "sgl"})


@pytest.mark.parametrize(
    ("given", "to_give"),
    [
        ([], [0, 1]),
        (["--use-rollout-routing-replay"], [1]),
        (["--custom-megatron-init-path", "router_replay_adapters.miles.init"], [0]),
        (["--custom-megatron-init-path=router_replay_adapters.miles.init", "--use-rollout-routing-replay"], []),
        (["--custom-megatron-init-path", "mine.init", "router_replay_adapters.miles.init"], [0, 1]),
    ],
)
def test_arguments_that_are_missing(given: list[str], to_give: list[int]) -> None:
    stack = STACKS["miles"]
    assert stack.arguments_to_give(given) == [stack.arguments[index] for index in to_give]


@pytest.mark.parametrize("name", ["miles", "miles-packed"])
def test_an_argument_with_which_the_adapter_is_never_loaded(name: str) -> None:
    for given in (["--train-backend", "fsdp"], ["--train-backend=fsdp"]):
        assert STACKS[name].arguments_to_take_away(given) == ["--train-backend fsdp"]
    for given in ([], ["--train-backend", "megatron"]):
        assert STACKS[name].arguments_to_take_away(given) == []
    assert STACKS["slime"].arguments_to_take_away(["--train-backend", "fsdp"]) == []


def test_hydras_plus_is_no_part_of_a_name() -> None:
    stack = STACKS["verl"]
    assert stack.arguments_to_give([f"+{stack.arguments[0]}", f"++{stack.arguments[1]}"]) == []
