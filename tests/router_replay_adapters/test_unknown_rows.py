"""Rows that nobody recorded, in the stacks' own replay on Megatron's own router, with the adapters and without."""

from __future__ import annotations

import functools
import gc
import importlib
import logging
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch.utils.checkpoint import checkpoint

from router_replay.errors import CallOrderError, DataError, PairingError, SeamError
from router_replay_adapters import miles as miles_adapter
from router_replay_adapters import slime as slime_adapter
from router_replay_adapters.native_rows import FORWARD, RECOMPUTE
from tests.router_replay_adapters.routers import (
    KNOWN,
    NUM_EXPERTS,
    RECORDED,
    SCORES,
    TOP_K,
    UNKNOWN,
    TopK,
    expected_experts,
    experts_of,
    gradients_of,
    hidden_states,
    own_experts,
    own_topk,
    router,
)
from tests.router_replay_adapters.stacks_here import Miles, Slime, StackHere, applied


@pytest.fixture(params=["miles", "slime"])
def stack(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, pinned_memory: None) -> Iterator[StackHere]:
    """Each of the stacks, with an empty queue for each router."""
    if request.param == "miles":
        made: StackHere = Miles(request.getfixturevalue("miles_replay_base"), miles_adapter.PATCHES)
    else:
        made = Slime(request.getfixturevalue("slime_routing_replay"), slime_adapter.PATCHES, monkeypatch)
    made.set_stage("fallthrough")
    yield made
    made.clear()


@pytest.fixture
def adapted(stack: StackHere) -> Iterator[StackHere]:
    """Each of the stacks with its adapter."""
    with applied(stack.patches):
        yield stack


def _router(stack: StackHere, **settings: object) -> TopKRouter:
    made = router(stack.topk, **settings)
    stack.register(made)
    return made


def test_without_the_adapter_unknown_rows_go_wrong(stack: StackHere) -> None:
    made, states = _router(stack), hidden_states(len(RECORDED))
    stack.record(RECORDED)
    stack.set_stage(FORWARD)
    if stack.name == "slime":
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            made(states)
        return
    experts = experts_of(made(states)[1])
    own = own_experts(made, states)
    # Releases count through all of these rows, or anew in each.
    counted = [set(range(TOP_K * index, TOP_K * (index + 1))) for index in range(len(UNKNOWN))]
    invented = [experts[row] for row in UNKNOWN]
    assert invented in (counted, counted[:1] * len(UNKNOWN))
    assert all(own[row] != chosen for row, chosen in zip(UNKNOWN, invented, strict=True))
    assert [experts[row] for row in KNOWN] == [set(RECORDED[row].tolist()) for row in KNOWN]


@pytest.mark.parametrize("settings", SCORES.values(), ids=SCORES)
def test_unknown_rows_are_native_and_known_ones_replayed(adapted: StackHere, settings: dict[str, object]) -> None:
    made, states = _router(adapted, **settings), hidden_states(len(RECORDED))
    if made.expert_bias is not None:
        made.expert_bias.copy_(torch.linspace(-2, 2, NUM_EXPERTS))
    own = experts_of(made(states)[1])
    assert all(own[row] != set(RECORDED[row].tolist()) for row in KNOWN)
    adapted.record(RECORDED)
    adapted.set_stage(FORWARD)
    probs, routing_map = made(states)
    assert experts_of(routing_map) == expected_experts(own)
    assert torch.equal(probs != 0, routing_map)


def test_routers_that_do_not_ask_are_an_error_at_the_end_of_the_step(adapted: StackHere) -> None:
    """As those of a fused kernel are; the next step begins with empty queues all the same."""
    made, states = _router(adapted), hidden_states(len(RECORDED))
    adapted.record(RECORDED)
    adapted.set_stage(FORWARD)
    made(states)
    adapted.clear()
    adapted.record(RECORDED)
    made(states)
    _router(adapted)
    adapted.record(RECORDED)
    with pytest.raises(CallOrderError, match=f"1 of 2 routers of {adapted.name} did not ask for all experts"):
        adapted.clear()
    adapted.clear()
    adapted.record(RECORDED)
    with pytest.raises(CallOrderError, match=f"1 of 1 routers of {adapted.name} did not ask"):
        adapted.clear()


def test_routers_that_ask_past_the_adapter_are_an_error_at_the_end_of_the_step(stack: StackHere) -> None:
    """As those of a Megatron that got the stack's top-k before `init`; the stack counts what they take."""
    earlier = router(_topk_as_it_is_now(stack))
    with applied(stack.patches):
        stack.register(earlier)
        for _ in range(2):
            stack.record(RECORDED[list(KNOWN)])
            stack.set_stage(FORWARD)
            earlier(hidden_states(len(KNOWN)))
            with pytest.raises(CallOrderError, match=f"1 of 1 routers of {stack.name} took .* past router_replay_adap"):
                stack.clear()
            stack.forget()


def _topk_as_it_is_now(stack: StackHere) -> Callable[[TopK], TopK]:
    if isinstance(stack, Miles):
        return functools.partial(stack.manager.get_topk_fn, return_probs=True)
    assert isinstance(stack, Slime)
    return stack.module.get_routing_replay_compute_topk


def test_a_router_that_asked_in_one_step_has_to_in_the_next(adapted: StackHere) -> None:
    made, states = _router(adapted), hidden_states(len(RECORDED))
    adapted.record(RECORDED)
    adapted.set_stage(FORWARD)
    made(states)
    adapted.clear()
    adapted.record(RECORDED)
    made.routing_replay.pop_forward()
    with pytest.raises(CallOrderError, match=f"1 of 1 routers of {adapted.name} took"):
        adapted.clear()


def test_queues_of_token_positions_end_no_step_of_routers(miles_replay_base: ModuleType, pinned_memory: None) -> None:
    """Miles empties the queues of each of its managers; these have nothing to do with each other."""
    miles = Miles(miles_replay_base, miles_adapter.PATCHES)
    with applied(miles.patches):
        made = _router(miles)
        miles.record(RECORDED)
        miles.set_stage(FORWARD)
        made(hidden_states(len(RECORDED)))
        miles_replay_base.BaseReplayManager().clear_all()
        miles.clear()


def test_passes_that_look_like_recomputes_are_the_step(adapted: StackHere) -> None:
    """As those of a schedule are that runs layers of two microbatches in turns."""
    made, states = _router(adapted), hidden_states(len(RECORDED))
    adapted.record(RECORDED)
    adapted.set_stage(RECOMPUTE)
    made(states)
    adapted.clear()


def test_a_pass_of_old_log_probabilities_is_not_the_step(adapted: StackHere) -> None:
    """A router may ask in evaluation, and not where the captured graph of a training step stands for it."""
    made, states = _router(adapted), hidden_states(len(RECORDED))
    adapted.record(RECORDED)
    adapted.set_stage(FORWARD)
    made(states)
    _rewind(adapted)
    with pytest.raises(CallOrderError, match=f"1 of 1 routers of {adapted.name} did not ask"):
        adapted.clear()


def test_a_recompute_takes_the_experts_of_its_forward_pass(adapted: StackHere) -> None:
    """Two microbatches whose passes overlap, and weights that would choose otherwise in between."""
    made = _router(adapted)
    inputs = [hidden_states(len(RECORDED)), hidden_states(len(RECORDED)).detach().flip(0).requires_grad_()]
    own = [own_experts(made, states) for states in inputs]
    for _ in inputs:
        adapted.record(RECORDED)
    chosen: list[list[set[int]]] = []
    made.register_forward_hook(lambda module, args, output: chosen.append(experts_of(output[1])))
    adapted.set_stage(FORWARD)
    # The pass of old log-probabilities comes first, by other weights.
    with torch.no_grad():
        made.weight.neg_()
        for states in inputs:
            made(states)
        made.weight.neg_()
    _rewind(adapted)
    outputs = [checkpoint(made, states, use_reentrant=True)[0] for states in inputs]
    adapted.set_stage(RECOMPUTE)
    with torch.no_grad():
        made.weight.neg_()
    assert own_experts(made, inputs[0]) != own[0]
    for output in outputs:
        output.square().sum().backward()
    others, forward, recompute = chosen[:2], chosen[2:4], chosen[4:]
    assert forward == [expected_experts(each) for each in own]
    assert recompute == forward
    assert all(before[row] != now[row] for before, now in zip(others, forward, strict=True) for row in UNKNOWN)


def _rewind(stack: StackHere) -> None:
    if isinstance(stack, Miles):
        stack.manager.clear_all_forward()
    else:
        for queue in stack.module.RoutingReplay.all_routing_replays:
            queue.forward_index = 0


def test_a_recompute_whose_forward_pass_nobody_saw_chooses_itself(adapted: StackHere) -> None:
    made, states = _router(adapted), hidden_states(len(RECORDED))
    adapted.record(RECORDED)
    adapted.set_stage(RECOMPUTE)
    assert experts_of(made(states)[1]) == expected_experts(own_experts(made, states))


def test_gradients_are_those_of_the_same_experts_recorded(adapted: StackHere) -> None:
    gradients = []
    experts = RECORDED.clone()
    for whole in (False, True):
        made, states = _router(adapted), hidden_states(len(RECORDED))
        if whole:
            experts[list(UNKNOWN)] = own_topk(made, states)[list(UNKNOWN)].int()
        adapted.record(experts)
        adapted.set_stage(FORWARD)
        gradients.append(gradients_of(made, states))
    for found, expected in zip(*gradients, strict=True):
        assert torch.equal(found, expected)
    assert (gradients[0][2][list(UNKNOWN)] != 0).any(-1).all()


def test_routes_of_the_stacks_own_pass_are_recorded_and_replayed(adapted: StackHere) -> None:
    made, states = _router(adapted), hidden_states(len(RECORDED))
    own = own_experts(made, states)
    for stage in ("fallthrough", "record"):
        adapted.set_stage(stage)
        assert experts_of(made(states)[1]) == own
    with torch.no_grad():
        made.weight.neg_()
    adapted.set_stage(FORWARD)
    assert experts_of(made(states)[1]) == own


def test_a_row_that_is_known_in_part_is_refused(adapted: StackHere) -> None:
    made, states = _router(adapted), hidden_states(len(RECORDED))
    experts = RECORDED.clone()
    experts[2, 3] = -1
    adapted.record(experts)
    adapted.set_stage(FORWARD)
    with pytest.raises(DataError, match=r"row 2 of a microbatch with experts \[5, 1, 15, -1\]"):
        made(states)


@pytest.mark.parametrize("strange", [NUM_EXPERTS, -2])
def test_an_expert_that_the_router_does_not_have_is_refused(adapted: StackHere, strange: int) -> None:
    made, states = _router(adapted), hidden_states(len(RECORDED))
    experts = RECORDED.clone()
    experts[4, 0] = strange
    adapted.record(experts)
    adapted.set_stage(FORWARD)
    with pytest.raises(PairingError, match=rf"row 4 .* \[{strange}, 8, 11, 4\], and the router has experts 0 to 15"):
        made(states)


@pytest.mark.parametrize(
    "twice", [[0, 0, 0, 0], [7, 3, 3, 9], [7, 3, 9, 7], [3, 7, 3, 9]], ids=["zeros", "beside", "ends", "apart"]
)
@pytest.mark.parametrize("stage", [FORWARD, RECOMPUTE])
def test_a_row_with_an_expert_twice_is_refused(adapted: StackHere, stage: str, twice: list[int]) -> None:
    """Zeros are what SGLang's own recorder has where nothing was recorded; they would send a token to expert 0."""
    made, states = _router(adapted), hidden_states(len(RECORDED))
    experts = RECORDED.clone()
    experts[4] = torch.tensor(twice)
    adapted.record(experts)
    adapted.set_stage(stage)
    with pytest.raises(DataError, match=rf"row 4 of a microbatch with experts \{twice}, and a choice of 4 has none"):
        made(states)


def test_slimes_own_padding_is_replayed(
    slime_modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, pinned_memory: None
) -> None:
    """Its rows are consecutive experts, which begin anew behind the last; without a checkout they are a stand-in's.

    miles pads with -1.
    """
    pad = importlib.import_module("slime.backends.megatron_utils.cp_utils")._pad_routed_experts
    known = RECORDED[list(KNOWN)]
    padded = pad(known[:, None].repeat(1, 3, 1), 11, NUM_EXPERTS)
    slime = Slime(importlib.import_module("slime.utils.routing_replay"), slime_adapter.PATCHES, monkeypatch)
    with applied(slime.patches):
        made = _router(slime)
        slime.record(padded[:, 1])
        slime.set_stage(FORWARD)
        assert experts_of(made(hidden_states(len(padded)))[1]) == [set(row) for row in padded[:, 1].tolist()]
        assert [len(set(row)) for row in padded[:, 1].tolist()] == [TOP_K] * len(padded)
        slime.clear()


@pytest.mark.parametrize("more", [1, -3])
def test_rows_of_another_microbatch_are_refused_by_the_stack(adapted: StackHere, more: int) -> None:
    made = _router(adapted)
    adapted.record(RECORDED)
    adapted.set_stage(FORWARD)
    with pytest.raises((AssertionError, ValueError)):
        made(hidden_states(len(RECORDED) + more))


def test_replay_that_is_off_looks_at_no_row(adapted: StackHere) -> None:
    made, states = _router(adapted), hidden_states(len(RECORDED))
    adapted.record(torch.where(RECORDED == 5, -1, RECORDED))
    adapted.set_stage(FORWARD)
    adapted.switch_off()
    assert experts_of(made(states)[1]) == own_experts(made, states)
    assert made.routing_replay.forward_index == 0


def test_a_stage_that_nobody_knows_is_refused(adapted: StackHere) -> None:
    """Under another name, stages of replay would be let through with rows that nobody recorded."""
    made = _router(adapted)
    adapted.record(RECORDED)
    adapted.set_stage("replaying")
    with pytest.raises(SeamError, match=r"is in a stage 'replaying', and its adapter knows replay_forward, "):
        made(hidden_states(len(RECORDED)))


def test_a_queue_that_is_empty_is_the_stacks_to_tell(adapted: StackHere) -> None:
    made = _router(adapted)
    adapted.set_stage(FORWARD)
    with pytest.raises(IndexError):
        made(hidden_states(3))


def test_routes_that_never_arrive_are_told(adapted: StackHere, caplog: pytest.LogCaptureFixture) -> None:
    made, states = _router(adapted), hidden_states(5)
    for rows in (torch.full((5, TOP_K), -1), torch.full((5, TOP_K), -1)):
        adapted.record(rows.int())
    adapted.set_stage(FORWARD)
    with caplog.at_level(logging.WARNING):
        experts = [experts_of(made(states)[1]) for _ in range(2)]
    assert experts == [own_experts(made, states)] * 2
    # Once, and not for every layer of every microbatch.
    (record,) = [each for each in caplog.records if each.name == "router_replay_adapters.native_rows"]
    assert "none of the 5 rows of a microbatch has routes" in record.getMessage()
    assert f"r3 doctor --stack {adapted.name} --server URL" in record.getMessage()


def test_the_queue_stays_the_routers_own(adapted: StackHere) -> None:
    made, states = _router(adapted), hidden_states(len(RECORDED))
    adapted.record(RECORDED)
    adapted.set_stage(FORWARD)
    made(states)
    current = adapted.manager.current if isinstance(adapted, Miles) else adapted.module.ROUTING_REPLAY
    assert current is made.routing_replay
    assert current.forward_index == 1


def test_choices_go_with_the_queue(adapted: StackHere) -> None:
    made, states = _router(adapted), hidden_states(len(RECORDED))
    adapted.record(RECORDED)
    adapted.set_stage(FORWARD)
    made(states)
    recorded = weakref.ref(made.routing_replay.top_indices_list[0])
    adapted.clear()
    gc.collect()
    assert recorded() is None
