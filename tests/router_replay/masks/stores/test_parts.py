"""Handles of several parts: what is merged, what can be checked, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from router_replay.errors import DataError, InputError, PairingError
from router_replay.masks import RoutingGeometry, RoutingMasks, Stat, load, open_store, token_digest
from router_replay.masks.stores.parts import handle_of_parts, merged
from tests.router_replay.masks.routes import random_indices
from tests.router_replay.masks.test_container import GEOMETRY, assert_same

TOKENS = list(range(100, 140))


def part(start: int, end: int, *, seed: int = 0, valid: list[bool] | None = None, runs=(), tokens=TOKENS, codec="rank"):
    return RoutingMasks.from_indices(
        random_indices(GEOMETRY, len(TOKENS), seed)[start:end],
        torch.ones(end - start, dtype=torch.bool) if valid is None else torch.tensor(valid, dtype=torch.bool),
        start=start,
        geometry=GEOMETRY,
        codec=codec,
        token_ids=tokens,
        weight_versions=runs,
    )


def version_of(masks: RoutingMasks, position: int) -> str | None:
    before = [version for begin, version in masks.weight_versions if begin <= position]
    return before[-1] if before else None


def digests(*ends: int) -> list[str]:
    return [token_digest(TOKENS[:end]) for end in ends]


def test_a_prefills_and_a_decodes_rows_are_one_sequences(tmp_path: Path):
    prefill, decode = part(0, 25, runs=((0, "a"),)), part(25, 39, runs=((25, "b"),))
    handles = [open_store(f"file://{tmp_path}").put(prefill), open_store("inline:").put(decode)]
    handle = handle_of_parts(handles, digests(25, 39))
    whole = load(handle)
    assert_same(whole, RoutingMasks.join([prefill, decode], TOKENS))
    with open_store(handle["store"]) as store:
        sizes = [len(each) for each in (prefill, decode)]
        assert store.stat(handle).num_tokens == sum(sizes) and store.stat(handle).there
        store.delete(handle)
        store.delete(handle)
        assert store.stat(handle) == Stat(there=False)
    with pytest.raises(DataError, match="nothing is behind"):
        load(handle)
    assert list(tmp_path.iterdir()) == []


SPANS = st.tuples(st.integers(0, 38), st.integers(0, 38)).map(lambda ends: (min(ends), max(ends) + 1))


@given(st.data())
def test_of_every_position_the_first_valid_row_is_taken(data: st.DataObject):
    parts = []
    for number, (start, end) in enumerate(data.draw(st.lists(SPANS, min_size=1, max_size=4))):
        valid = data.draw(st.lists(st.booleans(), min_size=end - start, max_size=end - start))
        # Of each part every row has a version, of its own or shared, so that whose row it is can be seen in it.
        begins = sorted({start, *data.draw(st.sets(st.integers(start, end - 1), max_size=3))})
        names = data.draw(
            st.lists(st.sampled_from(["a", "b", f"p{number}"]), min_size=len(begins), max_size=len(begins))
        )
        parts.append(part(start, end, seed=number, valid=valid, runs=tuple(zip(begins, names, strict=True))))
    reached = parts[0].start, parts[0].end
    for each in parts[1:]:
        if each.start > reached[1] or each.end < reached[0]:
            with pytest.raises(PairingError, match="nobody has the rows between"):
                merged(parts)
            return
        reached = min(reached[0], each.start), max(reached[1], each.end)
    whole = merged(parts)
    assert (whole.start, whole.end) == (min(each.start for each in parts), max(each.end for each in parts))
    whole.check_tokens(TOKENS)
    for position in range(whole.start, whole.end):
        having = [each for each in parts if each.start <= position < each.end and each.valid[position - each.start]]
        row = position - whole.start
        assert bool(whole.valid[row]) == bool(having)
        if having:
            assert torch.equal(whole.rows[row], having[0].rows[position - having[0].start])
            assert version_of(whole, position) == version_of(having[0], position)


def test_a_part_of_other_tokens_is_refused_though_it_is_shorter():
    """Its digest covers its own prefix alone, which the longer part's says nothing of."""
    other = part(0, 25, tokens=[7, *TOKENS[1:]])
    decode = part(25, 39)
    store = open_store("inline:")
    handle = handle_of_parts([store.put(other), store.put(decode)], digests(25, 39))
    with pytest.raises(
        PairingError, match=rf"part 0 was recorded for tokens of digest {other.token_digest}, .* another"
    ):
        load(handle)
    # Without what the handle's maker stated, nothing tells.
    assert merged([other, decode]).token_digest == decode.token_digest


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (part(26, 39), r"\[0, 25\) and \[26, 39\): nobody has the rows between them"),
        (part(20, 39, codec="ordered"), "codec 'rank', the other 'ordered'"),
        (part(5, 25, tokens=[7, *TOKENS[1:]]), "two parts end at position 25"),
        (part(25, 39), "nobody named the weights that computed the rows from position 25"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(second: RoutingMasks, message: str):
    first = part(0, 25, runs=((0, "a"),))
    with pytest.raises(PairingError, match=message):
        merged([first, second])


def test_parts_of_other_models_are_refused():
    geometry = RoutingGeometry(5, (0, 2, 4), 17, 3)
    with pytest.raises(PairingError, match="one part"):
        merged([part(0, 25), replace(part(25, 39), geometry=geometry)])


def test_merging_leaves_the_parts_as_they_are():
    first, second = part(0, 25, valid=[False] * 25), part(10, 39, seed=1)
    before = first.rows.clone(), second.rows.clone()
    merged([first, second])
    assert torch.equal(first.rows, before[0]) and torch.equal(second.rows, before[1]) and not first.valid.any()


@pytest.mark.parametrize(
    "change",
    [
        {"parts": []},
        {"parts": None},
        {"parts": [None, None]},
        {"token_digests": ["x"]},
        {"token_digests": None},
        {"parts": [{"store": "parts:"}, {"store": "parts:"}]},
        {"parts": [{"store": 5}, {"store": "inline:"}]},
    ],
)
@pytest.mark.parametrize("method", ["get", "stat", "delete"])
def test_what_is_no_handle_of_parts_is_refused(change: dict, method: str):
    handle = handle_of_parts([open_store("inline:").put(part(0, 9))] * 2, digests(9, 9))
    with pytest.raises(DataError, match=r"a handle of several parts without|a part of a handle that is not"):
        getattr(open_store("parts:"), method)({**handle, **change})


def test_parts_are_not_put_and_each_needs_a_digest():
    store = open_store("parts:")
    for call in (store.prepare, lambda: store.put(part(0, 9))):
        with pytest.raises(InputError, match="'parts:'"):
            call()
    with pytest.raises(InputError, match="'parts:'"):
        open_store("parts:x")
    for handles, stated in (([], []), ([open_store("inline:").put(part(0, 9))], [])):
        with pytest.raises(InputError, match="each part needs one"):
            handle_of_parts(handles, stated)
