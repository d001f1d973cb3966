"""A conversation's rows, collected turn by turn, are those that the server has of its whole sequence."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router_replay.errors import CallOrderError, DataError, InputError, PairingError
from router_replay.masks import Rollout, RoutingGeometry, RoutingMasks, Turn, token_digest
from router_replay.masks.digest import PrefixDigest
from router_replay.masks.stores.inline import InlineStore

GEOMETRY = RoutingGeometry(num_layers=3, moe_layers=(1, 2), num_experts=8, top_k=2)


class Server:
    """Computes a token once for each sequence in front of it, by the weights of that time, and keeps its row."""

    def __init__(self) -> None:
        self.weights = 0
        self._rows: dict[tuple[int, ...], tuple[torch.Tensor, bool, str]] = {}

    def masks(self, ids: list[int], start: int, end: int | None = None, *, codec: str = "rank") -> RoutingMasks:
        end = len(ids) - 1 if end is None else end
        found = [self._row(tuple(ids[: position + 1])) for position in range(end)]
        wanted = found[start:]
        runs: list[tuple[int, str]] = []
        for position, (_, valid, version) in enumerate(wanted, start):
            if valid and (not runs or runs[-1][1] != version):
                runs.append((position, version))
        return RoutingMasks.from_indices(
            torch.stack([row for row, _, _ in wanted]) if wanted else torch.zeros(0, 2, 2, dtype=torch.int64),
            torch.tensor([valid for _, valid, _ in wanted], dtype=torch.bool),
            start=start,
            geometry=GEOMETRY,
            codec=codec,
            token_ids=ids,
            weight_versions=tuple(runs),
        )

    def answer(self, prompt: list[int], output: list[int], fields: dict[str, Any], earlier: int = 0) -> dict[str, Any]:
        ids = prompt + output
        assert fields["return_routed_experts"] and 0 <= fields["routed_experts_start_len"] <= len(prompt)
        # As the server does: no position after the last computed token.
        start = max(min(fields["routed_experts_start_len"], len(ids) - 1) - earlier, 0)
        masks = self.masks(ids, start)
        return {"finish_reason": {"type": "stop"}, "routing_masks": [InlineStore().put(masks)]}

    def _row(self, ids: tuple[int, ...]) -> tuple[torch.Tensor, bool, str]:
        if ids not in self._rows:
            generator = torch.Generator().manual_seed(hash((*ids, self.weights)) % 2**63)
            experts = torch.rand(2, 8, generator=generator).argsort(-1)[:, :2]
            valid = len(ids) == 1 or bool(torch.rand(1, generator=generator) < 0.8)
            self._rows[ids] = (experts, valid, f"step {self.weights}")
        return self._rows[ids]


def require_same(masks: RoutingMasks, whole: RoutingMasks) -> None:
    assert torch.equal(masks.rows, whole.rows) and torch.equal(masks.valid, whole.valid)
    for field in ("start", "geometry", "codec", "weight_versions", "token_digest"):
        assert getattr(masks, field) == getattr(whole, field)


NOT_SAMPLED = {"finish_reason": {"type": "abort", "message": "Abort before prefill"}}
tokens = st.lists(st.integers(0, 2), min_size=1, max_size=4)
steps = st.one_of(
    st.tuples(st.just("turn"), tokens, tokens, st.integers(0, 3)),
    st.tuples(st.just("without output"), tokens),
    st.tuples(st.just("lost answer"), tokens),
    st.tuples(st.just("nothing sampled"), tokens),
    st.tuples(st.just("refused answer"), tokens),
    st.tuples(st.just("whole again"), tokens, tokens),
    st.tuples(st.just("roll back"), st.integers(1, 30)),
    st.tuples(st.just("edit"), st.integers(0, 30), st.integers(0, 2)),
    st.tuples(st.just("fork"), st.booleans()),
    st.tuples(st.just("pickle")),
    st.tuples(st.just("new weights")),
)


@given(tokens, st.lists(steps, max_size=12))
@settings(max_examples=150, deadline=None)
def test_whatever_happens_the_joined_rows_are_those_of_the_whole_sequence(ids, happened):
    server, rollout = Server(), Rollout()
    # Of each conversation that was left behind by a fork, too.
    others: list[tuple[Rollout, list[int]]] = []
    answered: list[int] = []
    for what, *details in happened:
        if what in ("turn", "without output", "whole again"):
            prompt, before = [*ids, *details[0]], rollout.end
            output = [] if what == "without output" else details[1]
            fields = rollout.request_fields(prompt, whole=what == "whole again")
            earlier = details[2] if what == "turn" else 0
            turn = rollout.add(server.answer(prompt, output, fields, earlier), output)
            ids = answered = prompt + output
            assert turn.asked_from == fields["routed_experts_start_len"] and turn.is_delta == (turn.start > 0)
            # No row is asked for twice: all that the last sequence has in common with this one are kept.
            assert what == "whole again" or turn.num_new <= max(len(ids) - 1 - turn.asked_from, 0)
            assert turn.asked_from <= before
        elif what == "lost answer":
            rollout.request_fields([*ids, *details[0]])
        elif what == "nothing sampled":
            prompt = [*ids, *details[0]]
            rollout.request_fields(prompt)
            assert rollout.add(NOT_SAMPLED, []).num_new == 0
        elif what == "refused answer":
            prompt = [*ids, *details[0]]
            fields = rollout.request_fields(prompt)
            other = [*prompt[:-1], prompt[-1] + 1]
            with pytest.raises(PairingError):
                rollout.add(server.answer(other, [0, 0], fields), [0, 0])
        elif what == "roll back":
            ids = ids[: details[0]]
        elif what == "edit":
            ids = [details[1] if position == details[0] else token for position, token in enumerate(ids)]
        elif what == "fork":
            rollout, left = (rollout.fork(), rollout) if details[0] else (rollout, rollout.fork())
            others.append((left, answered))
        elif what == "pickle":
            rollout = pickle.loads(pickle.dumps(rollout))
        else:
            server.weights += 1
    for each, sequence in [(rollout, answered), *others]:
        assert each.token_ids.tolist() == sequence
        if each.end:
            # Also the last token's where nothing was sampled behind it and an earlier turn's pass had computed it.
            assert each.end in (len(sequence) - 1, len(sequence))
            require_same(each.join(), server.masks(sequence, 0, each.end))
            each.join().check_tokens(sequence)
        else:
            with pytest.raises(CallOrderError, match="no rows were collected yet"):
                each.join()


def test_every_turn_asks_for_new_rows_only():
    server, rollout, ids = Server(), Rollout(), [1, 2]
    asked = []
    for turn in range(4):
        fields = rollout.request_fields(ids)
        asked.append(fields["routed_experts_start_len"])
        assert rollout.add(server.answer(ids, [0, 1], fields), [0, 1]).is_delta == (turn > 0)
        ids = [*ids, 0, 1, 2]
    # All but the last sampled token of a turn, which the next turn's pass computes.
    assert asked == [0, 3, 6, 9]


def test_a_retry_with_another_output_keeps_the_prompts_rows():
    server, rollout, prompt = Server(), Rollout(), [1, 2, 0, 1]
    rollout.add(server.answer(prompt, [0, 0, 0], rollout.request_fields(prompt)), [0, 0, 0])
    fields = rollout.request_fields(prompt)
    assert fields["routed_experts_start_len"] == 4
    assert rollout.add(server.answer(prompt, [0, 1, 2], fields), [0, 1, 2]) == Turn(4, 4, 6, 2)
    require_same(rollout.join(), server.masks([*prompt, 0, 1, 2], 0))


def test_rows_that_are_there_are_not_replaced_by_those_of_a_later_pass():
    """KV that was evicted is computed anew, by a pass that sampled nothing of the turns before."""
    server, rollout, ids = Server(), Rollout(), [1, 2, 0]
    rollout.request_fields(ids)
    rollout.add(server.masks([*ids, 1], 0), [1])
    first = rollout.join()
    recomputing = Server()
    recomputing.weights = 7
    later = [*ids, 1, 2]
    whole = recomputing.masks([*later, 0], 0)
    rollout.request_fields(later)
    assert rollout.add(whole, [0]) == Turn(3, 0, 5, 2)
    joined = rollout.join()
    assert torch.equal(joined.rows[:3], first.rows) and not torch.equal(
        joined.rows, recomputing.masks([*later, 0], 0).rows
    )
    rollout.request_fields(later, whole=True)
    rollout.add(whole, [0])
    require_same(rollout.join(), whole)


def test_ids_may_be_changed_after_the_request_was_made():
    server, rollout = Server(), Rollout()
    prompt = np.array([1, 2, 0])
    rollout.request_fields(prompt)
    prompt[:] = 5
    rollout.add(server.masks([1, 2, 0, 1], 0), [1])
    rollout.token_ids[:] = 9
    rollout.join().check_tokens([1, 2, 0, 1])


@pytest.mark.parametrize(
    ("answer", "output", "error", "says"),
    [
        (
            lambda server: server.masks([1, 2, 0, 1, 1, 2], 4),
            [2],
            PairingError,
            "begin at position 4, .* from position 3",
        ),
        (lambda server: server.masks([1, 2, 0, 1, 1, 2, 2, 2], 3), [2], PairingError, "only 6 tokens"),
        (lambda server: server.masks([1, 2, 0, 1, 2, 2], 3), [2], PairingError, "unchanged"),
        (
            lambda server: server.masks([1, 2, 0, 1, 1, 2], 3, codec="ordered"),
            [2],
            PairingError,
            "the turns before has codec 'rank', this answer has 'ordered'.*whole=True",
        ),
        (
            lambda server: replace(server.masks([1, 2, 0, 1, 1, 2], 3), valid=torch.ones(2).bool(), weight_versions=()),
            [2],
            PairingError,
            "does not say which weights.*whole=True",
        ),
        (
            lambda server: replace(server.masks([1, 2, 0, 1, 1, 2], 3), geometry=RoutingGeometry(4, (1, 2), 8, 2)),
            [2],
            PairingError,
            "the turns before has 3 decoder layers, this answer has 4",
        ),
        (lambda server: {"finish_reason": {"type": "stop"}}, [2], DataError, "no routing masks"),
        (lambda server: {"finish_reason": {"type": "stop"}}, [], DataError, "no routing masks"),
        (lambda server: NOT_SAMPLED, [2], DataError, "no routing masks"),
        (lambda server: {"meta_info": {}}, [2], InputError, r'answer\["meta_info"\]'),
        (lambda server: server.masks([1, 2, 0, 1, 1, 2], 3), "2", InputError, "text"),
    ],
)
def test_a_refused_answer_changes_nothing(answer, output, error, says):
    server, rollout = Server(), Rollout()
    rollout.request_fields([1, 2, 0])
    rollout.add(server.masks([1, 2, 0, 1], 0), [1])
    before = rollout.join()
    rollout.request_fields([1, 2, 0, 1, 1])
    with pytest.raises(error, match=says):
        rollout.add(answer(server), output)
    require_same(rollout.join(), before)
    # The request is still open, so that the right answer can follow.
    rollout.add(server.masks([1, 2, 0, 1, 1, 2], 3), [2])
    require_same(rollout.join(), server.masks([1, 2, 0, 1, 1, 2], 0))


def test_an_answer_needs_a_request():
    server, rollout = Server(), Rollout()
    with pytest.raises(CallOrderError, match="request_fields"):
        rollout.add(server.masks([1, 2], 0), [2])
    rollout.request_fields([1])
    rollout.add(server.masks([1, 2], 0), [2])
    with pytest.raises(CallOrderError, match="request_fields"):
        rollout.add(server.masks([1, 2], 0), [2])


def test_joining_hashes_every_token_once(monkeypatch):
    """However many turns there are."""
    ids = list(range(50))
    masks = Server().masks(ids, 0)
    parts = [masks.cut(end, ids)[end - 1 :] for end in range(1, 50)]
    hashed = []
    original = PrefixDigest.grown

    def grown(self, ids, length):
        hashed.append(length - self.length)
        return original(self, ids, length)

    monkeypatch.setattr(PrefixDigest, "grown", grown)
    joined = RoutingMasks.join(parts, ids)
    assert sum(hashed) == 49
    monkeypatch.undo()
    assert joined.token_digest == token_digest(ids[:49])
    require_same(joined, masks)
