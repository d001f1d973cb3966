"""Route comparison, counted by hand."""

from __future__ import annotations

import pytest
import torch

from router_replay.errors import InputError
from router_replay.masks import RouteTally, compare_routes

TRAINER = torch.tensor([[[0, 1], [2, 3]], [[0, 1], [2, 3]], [[0, 1], [2, 3]], [[4, 5], [6, 7]]])
ROLLOUT = torch.tensor([[[1, 0], [3, 2]], [[0, 2], [2, 3]], [[0, 1], [4, 5]], [[-1, -1], [-1, -1]]])


def test_routes_are_compared_as_sets():
    found = compare_routes(trainer=TRAINER, rollout=ROLLOUT, valid=torch.tensor([True, True, True, False]))
    # Token 0 differs in order only, token 1 in one expert of layer 0, token 2 in both of layer 1.
    assert found.num_tokens == 3
    assert found.differing_routes == pytest.approx(2 / 6)
    assert found.differing_tokens == pytest.approx(2 / 3)
    assert found.differing_by_layer == pytest.approx((1 / 3, 1 / 3))
    assert found.overlap == pytest.approx((5 / 6, 4 / 6))


def test_all_tokens_count_by_default():
    assert compare_routes(trainer=TRAINER, rollout=TRAINER).overlap == (1.0, 1.0)
    assert compare_routes(trainer=TRAINER, rollout=TRAINER).num_tokens == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TRAINER, ROLLOUT[:, :1]), r"\[4, 2, 2\] and rollout routes \[4, 1, 2\]"),
        ((TRAINER, ROLLOUT, torch.ones(3, dtype=torch.bool)), r"valid \[3\] must have one entry for each token, \[4\]"),
        ((TRAINER, ROLLOUT, torch.zeros(4, dtype=torch.bool)), "no token has routes on both sides"),
        ((TRAINER, ROLLOUT), "the rollout's routes have experts below 0, .* leave those tokens out by `valid`"),
        ((TRAINER // 2, TRAINER), "the trainer's routes have an expert twice in one layer"),
        ((TRAINER.tolist(), ROLLOUT), r"the trainer's routes must be a torch.Tensor \[T, L, K\], got list"),
        ((TRAINER, ROLLOUT.numpy()), "the rollout's routes must be a torch.Tensor .*, got ndarray"),
    ],
)
def test_compare_routes_refuses(arguments, message):
    with pytest.raises(InputError, match=message):
        compare_routes(**dict(zip(("trainer", "rollout", "valid"), arguments, strict=False)))


def test_tallies_of_parts_add_up_to_that_of_the_whole():
    valid = torch.tensor([True, True, True, False])
    given = {"trainer": TRAINER, "rollout": ROLLOUT, "valid": valid}
    parts = [RouteTally.of(**{name: each[at : at + 2] for name, each in given.items()}) for at in (0, 2)]
    assert (parts[0] + parts[1]).agreement() == compare_routes(**given)
    nothing = RouteTally.of(trainer=TRAINER[:0], rollout=ROLLOUT[:0])
    assert (nothing + RouteTally.of(**given)).agreement() == compare_routes(**given)
    padded = {name: each.unflatten(0, (2, 2)) for name, each in given.items()}
    assert compare_routes(**padded) == compare_routes(**given)
    with pytest.raises(InputError, match="2 layers and top-2 do not add up with routes of 1 layers"):
        nothing + RouteTally.of(trainer=TRAINER[:, :1], rollout=TRAINER[:, :1])


def test_many_tokens_are_compared_part_by_part(monkeypatch):
    torch.manual_seed(0)
    ours, theirs = (torch.rand(50, 3, 16).topk(4).indices for _ in range(2))
    whole = compare_routes(trainer=ours, rollout=theirs)
    monkeypatch.setattr("router_replay.masks.agreement.CHUNK_TOKENS", 7)
    assert compare_routes(trainer=ours, rollout=theirs) == whole
    sets = [
        [(set(a) & set(b)) for a, b in zip(*row, strict=True)]
        for row in zip(ours.tolist(), theirs.tolist(), strict=True)
    ]
    assert whole.overlap == pytest.approx([sum(len(row[layer]) for row in sets) / 200 for layer in range(3)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"valid": torch.tensor([1, 1, 0, 1])}, r"valid is torch.int64 \[4\], but must be torch.bool"),
        ({"valid": torch.ones(4)}, "valid is torch.float32"),
        ({"valid": [True] * 4}, "valid is a list"),
        ({"trainer": torch.rand(4, 2, 3)}, "the trainer's routes must be expert ids, integers, got torch.float32"),
    ],
)
def test_what_is_no_validity_and_no_route(change, message):
    routes = torch.rand(4, 2, 8).topk(3).indices
    with pytest.raises(InputError, match=message):
        compare_routes(**{"trainer": routes, "rollout": routes, **change})
