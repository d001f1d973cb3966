"""Runs take turns by pieces, block after block, and the study is over when each has its last step."""

from __future__ import annotations

from studies.stability.protocol import ARMS, FIRST, LATER, PIECE, SEEDS, STEPS, Run, blocks
from studies.stability.schedule import claimed, pieces


def test_the_first_runs_are_the_four_arms_of_one_seed_and_all_are_there_once():
    made = blocks()
    assert [run.name for run in made[0]] == [f"{arm.name}-{SEEDS[0]}" for arm in FIRST]
    names = [run.name for block in made for run in block]
    assert len(names) == len(set(names)) == len(SEEDS) * len(ARMS)
    assert [run.seed for block in made[len(SEEDS) :] for run in block] == [s for s in SEEDS for _ in LATER]


def test_problems_are_those_of_the_seed_in_every_arm():
    settings = [arm.settings(1) for arm in ARMS.values()]
    assert {each.seed for each in settings} == {1}
    assert len({(each.problems, each.group_size, each.operations, each.learning_rate) for each in settings}) == 1


def test_runs_of_a_block_take_turns_until_all_are_done():
    steps: dict[str, int] = {}
    order = []
    while (piece := next(pieces(blocks(), lambda run: steps.get(run.name, 0)), None)) is not None:
        run, until = piece
        assert 0 < until - steps.get(run.name, 0) <= PIECE
        steps[run.name] = until
        order.append(run)
    assert set(steps.values()) == {STEPS}
    in_block = len(FIRST) * STEPS // PIECE
    assert {run.seed for run in order[:in_block]} == {SEEDS[0]}
    assert [run.arm.name for run in order[:8]] == 2 * [arm.name for arm in FIRST]


def test_a_run_that_was_killed_in_a_piece_ends_that_piece():
    first = blocks()[0][0]
    assert next(pieces(blocks(), lambda run: 3 if run == first else PIECE)) == (first, PIECE)


def test_a_run_ends_with_its_last_step():
    short = Run(FIRST[0], 0, num_steps=PIECE + 2)
    assert list(pieces([[short]], lambda run: PIECE)) == [(short, PIECE + 2)]
    assert not list(pieces([[short]], lambda run: PIECE + 2))


def test_two_processes_share_the_runs(tmp_path):
    block = blocks()[0]

    def unfinished():
        return pieces([block], lambda run: 0)

    with claimed(unfinished(), tmp_path) as first:
        with claimed(unfinished(), tmp_path) as second:
            assert (first, second) == ((block[0], PIECE), (block[1], PIECE))
        with claimed(unfinished(), tmp_path) as again:
            assert again == second
    with claimed(unfinished(), tmp_path) as freed:
        assert freed == first


def test_there_is_nothing_to_go_on_with_where_others_have_all(tmp_path):
    one = [[blocks()[0][0]]]
    with claimed(pieces(one, lambda run: 0), tmp_path), claimed(pieces(one, lambda run: 0), tmp_path) as second:
        assert second is None
