"""What callers get wrong at the boundary ends in a typed error that says what to pass instead."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from router_replay.errors import DataError, InputError, PairingError
from router_replay.masks import (
    RoutingGeometry,
    RoutingMasks,
    from_bytes,
    load,
    masks_from_meta_info,
    open_store,
    save_file,
    to_bytes,
    token_digest,
)
from tests.router_replay.masks.test_routing_masks import GEOMETRY, TOKENS, make_masks

HANDLE = open_store("inline:").put(make_masks())
NO_IDS = [
    ("some text", "a str of text"),
    (["1", "2"], "a list of text"),
    (b"\1\2", "a bytes of text"),
    ([1.0, 2.0], "a list of float64"),
    (torch.tensor(TOKENS).float(), "a Tensor of float32"),
    (torch.tensor(TOKENS).bfloat16(), "BFloat16"),
    ([True, False], "a list of bool"),
    (torch.ones(20, dtype=torch.bool), "a Tensor of bool"),
    (None, "a NoneType of objects"),
    ((token for token in TOKENS), "a generator of objects"),
    ({"input_ids": TOKENS}, r"pass the token ids in it \(its input_ids\)"),
    (torch.tensor([TOKENS]), r"shape \[1, 20\].*of a batch pass one row"),
    ([TOKENS, TOKENS], r"shape \[2, 20\].*of a batch pass one row"),
    ([TOKENS, TOKENS[:3]], "of which no array can be made"),
    (torch.tensor(5), r"shape \[\], but must be those of one sequence"),
    ([2**63], "has 9223372036854775808, which is no token id"),
    ([2**70], "a list of objects"),
]


@pytest.mark.parametrize(("token_ids", "says"), NO_IDS, ids=str)
@pytest.mark.parametrize("call", ["token_digest", "check_tokens", "from_indices", "join", "cut"])
def test_what_is_no_list_of_token_ids(call, token_ids, says):
    masks = make_masks()
    calls = {
        "token_digest": lambda: token_digest(token_ids),
        "check_tokens": lambda: masks.check_tokens(token_ids),
        "from_indices": lambda: RoutingMasks.from_indices(
            masks.indices(), masks.valid, start=0, geometry=GEOMETRY, codec="auto", token_ids=token_ids
        ),
        "join": lambda: RoutingMasks.join([masks], token_ids),
        "cut": lambda: masks.cut(5, token_ids),
    }
    with pytest.raises(InputError, match=rf"token_ids.*{says}"):
        calls[call]()


@pytest.mark.parametrize(
    ("meta_info", "says"),
    [
        (None, 'expected the dictionary answer."meta_info".*, got a NoneType; .*look for its error'),
        ([], "list of 0, not one meta_info: a request with n > 1 and a batched request"),
        ([{"meta_info": {}}] * 3, "list of 3.*for answer in answers"),
        ({"text": "", "meta_info": {"routing_masks": [HANDLE]}}, 'a whole answer.*pass answer."meta_info"'),
        (HANDLE, r"a handle, not a meta_info: pass it to load\(handle\)"),
        ('{"meta_info": {}}', r"got a str; this is the answer's JSON: pass json.loads\(text\)"),
        (b"{}", r"got a bytes; this is the answer's JSON"),
        (7, "got a int"),
    ],
)
def test_what_is_no_meta_info(meta_info, says):
    with pytest.raises(InputError, match=says):
        masks_from_meta_info(meta_info)


@pytest.mark.parametrize("data", ["/tmp/masks", Path("/tmp/masks"), None, 5, HANDLE])
def test_what_is_no_bytes(data):
    with pytest.raises(InputError, match=rf"got a {type(data).__name__}: of a file take load_file\(path\)"):
        from_bytes(data)


def test_bytes_of_other_types_are_read():
    masks = make_masks()
    for data in (bytearray(to_bytes(masks)), memoryview(to_bytes(masks))):
        assert torch.equal(from_bytes(data).rows, masks.rows)


@pytest.mark.parametrize(
    ("handle", "says"),
    [
        ([HANDLE], "pass one handle of the list at a time"),
        ("masks.safetensors", r"load_file\(path\)"),
        (Path("masks.safetensors"), r"load_file\(path\)"),
        (make_masks(), "masks already"),
        ({"routing_masks": [HANDLE]}, r"masks_from_meta_info\(meta_info\)"),
        ({"meta_info": {"routing_masks": [HANDLE]}}, r"masks_from_meta_info\(meta_info\)"),
        ({"store": "cloud:actor"}, "another release: use the same at both ends"),
        ({"store": "inline"}, "another release"),
        ({"store": "inline:/somewhere"}, "store cannot be opened.*'inline:/somewhere'"),
        (5, r'pass meta_info\["routing_masks"\]\[0\]'),
    ],
    ids=str,
)
def test_what_is_no_handle(handle, says):
    with pytest.raises(DataError, match=says):
        load(handle)


@pytest.mark.parametrize(
    ("valid", "says"),
    [
        ([True] * 10, r"valid is a list .*torch.tensor\(valid, dtype=torch.bool\)"),
        (torch.ones(10), r"valid is torch.float32 \[10\].*torch.bool \[tokens\].*valid.bool\(\)"),
        (np.ones(10), r"valid is torch.float64 \[10\]"),
        (torch.ones(10, dtype=torch.int64), "valid is torch.int64"),
        (None, "valid is None"),
    ],
)
def test_what_is_no_valid(valid, says):
    masks = make_masks()
    with pytest.raises(InputError, match=says):
        replace(masks, valid=valid)
    with pytest.raises(InputError, match=says):
        RoutingMasks.from_indices(masks.indices(), valid, start=0, geometry=GEOMETRY, codec="auto", token_ids=TOKENS)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rows": make_masks().rows.tolist()}, r"rows is a list .*torch.tensor\(rows\)"),
        ({"rows": None}, "rows is None"),
        ({"rows": np.array(["a"])}, "rows is a numpy array of <U1"),
        ({"geometry": {"num_layers": 5}}, "geometry is a dict .*must be a RoutingGeometry"),
        ({"geometry": None}, "geometry is None"),
        ({"start": 0.0}, "start is a float .*must be an integer"),
        ({"start": "0"}, "start is a str"),
        ({"start": False}, "start is a bool"),
        ({"codec": ["rank"]}, "codec is a list"),
        ({"codec": None}, "codec is None"),
        ({"token_digest": b"0"}, "token_digest is a bytes"),
        ({"weight_versions": "a"}, "weight_versions is a, but must be pairs"),
        ({"weight_versions": None}, "weight_versions is None, but must be pairs"),
        ({"weight_versions": ((0.5, "a"),)}, r"weight_versions is \(\(0.5, 'a'\),\), but must be pairs"),
        ({"weight_versions": ((0, 7),)}, "names the weights 7, a int, but a version is text"),
    ],
    ids=str,
)
def test_masks_of_wrong_attributes(change, says):
    with pytest.raises(InputError, match=says):
        replace(make_masks(), **change)


def test_attributes_of_numpy_are_taken():
    masks = make_masks(2, 10, ((2, "a"),))
    rows, valid = masks.rows.numpy().copy(), masks.valid.numpy().copy()
    rows.flags.writeable = False
    same = replace(masks, rows=rows, valid=valid, start=np.int64(2), weight_versions=[(np.int32(2), "a")])
    assert torch.equal(same.rows, masks.rows) and torch.equal(same.valid, masks.valid)
    assert type(same.start) is int and same.weight_versions == ((2, "a"),)
    made = RoutingMasks.from_indices(
        masks.indices().numpy(), valid, start=2, geometry=GEOMETRY, codec="bitset", token_ids=np.array(TOKENS)
    )
    assert torch.equal(made.rows, masks.rows) and made.token_digest == masks.token_digest


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"indices": torch.zeros(10, 3, 3)}, InputError, r"indices are torch.float32 \[10, 3, 3\].*must be integers"),
        ({"indices": torch.zeros(10, 3, 3, dtype=torch.bool)}, InputError, "indices are torch.bool"),
        ({"indices": torch.zeros(10, 9, dtype=torch.int64)}, InputError, r"\[tokens, MoE layers, top-k\]"),
        ({"indices": [[[1]]]}, InputError, "indices is a list"),
        ({"valid": torch.ones(9, dtype=torch.bool)}, PairingError, r"valid is \[9\], .* indices of 10 tokens"),
        ({"geometry": {}}, InputError, "geometry is a dict"),
        ({"codec": None}, InputError, "codec is None"),
        ({"start": 1.0}, InputError, "start is a float"),
    ],
    ids=str,
)
def test_masks_made_of_wrong_arguments(change, error, says):
    masks = make_masks()
    given = {"indices": masks.indices(), "valid": masks.valid, "start": 0, "geometry": GEOMETRY, "codec": "auto"}
    with pytest.raises(error, match=says):
        RoutingMasks.from_indices(**{**given, "token_ids": TOKENS, **change})


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        (make_masks(), r"got one RoutingMasks: pass \[masks\]"),
        ([HANDLE], r"part 0 to join is a dict, .*load\(handle\)"),
        ([make_masks(0, 5), HANDLE], r"part 1 to join is a dict, .*load\(handle\)"),
        (HANDLE, r"got a dict; .*load\(handle\)"),
        (None, "got a NoneType"),
        ("ab", "part 0 to join is a str"),
        (iter(()), "no masks to join"),
    ],
    ids=str,
)
def test_what_cannot_be_joined(parts, says):
    with pytest.raises(InputError, match=says):
        RoutingMasks.join(parts, TOKENS)


def test_a_generator_of_parts_is_joined():
    parts = [make_masks(0, 4), make_masks(4, 9)]
    assert torch.equal(RoutingMasks.join((part for part in parts), TOKENS).rows, make_masks(0, 9).rows)


def test_parts_in_the_wrong_order_are_told_how_to_be_sorted():
    parts = [make_masks(5, 9), make_masks(9, 9), make_masks(0, 5)]
    with pytest.raises(
        PairingError, match=r"ends at position 9, part 2 begins at 0.*out of order: sorted\(parts, key="
    ):
        RoutingMasks.join(parts, TOKENS)
    with pytest.raises(PairingError, match="out of order"):
        RoutingMasks.join([parts[2], make_masks(7, 9), make_masks(5, 7)][1:], TOKENS)
    in_order = sorted(parts, key=lambda part: (part.start, part.end))
    assert torch.equal(RoutingMasks.join(in_order, TOKENS).rows, make_masks(0, 9).rows)


def test_a_gap_is_no_question_of_order_and_an_overlap_can_be_dropped():
    with pytest.raises(PairingError, match="begins at 6: ask for each delta with routed_experts_start_len"):
        RoutingMasks.join([make_masks(0, 5), make_masks(6, 9)], TOKENS)
    parts = [make_masks(0, 5), make_masks(3, 9)]
    with pytest.raises(PairingError, match=r"drop the rows that are there twice by masks\[2:\] of part 1"):
        RoutingMasks.join(parts, TOKENS)
    assert RoutingMasks.join([parts[0], parts[1][2:]], TOKENS).end == 9


@pytest.mark.parametrize("masks", [HANDLE, None, b"bytes"])
def test_only_masks_are_written(tmp_path, masks):
    with pytest.raises(InputError, match="expected RoutingMasks, got a"):
        to_bytes(masks)
    with pytest.raises(InputError, match="expected RoutingMasks, got a"):
        save_file(masks, tmp_path / "masks")
    with pytest.raises(InputError, match="expected RoutingMasks, got a"):
        open_store("inline:").put(masks)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ((5.0, (1, 2), 8, 2), "num_layers is a float"),
        ((5, (1, 2), "8", 2), "num_experts is a str"),
        ((5, (1, 2), 8, None), "top_k is None"),
        ((5, None, 8, 2), "moe_layers is None, but must be the indices"),
        ((5, "12", 8, 2), "moe_layers is '12'"),
        ((5, (1, 2.0), 8, 2), "a layer of moe_layers is a float"),
        ((5, (False, True), 8, 2), "a layer of moe_layers is a bool"),
    ],
)
def test_a_geometry_of_other_things_than_integers(fields, says):
    with pytest.raises(InputError, match=says):
        RoutingGeometry(*fields)


@pytest.mark.parametrize("config", [None, "Qwen/Qwen3-30B-A3B", Path("/models/qwen")])
def test_what_is_no_configuration(config):
    with pytest.raises(InputError, match=r"must be a configuration or its dictionary: take .*AutoConfig"):
        RoutingGeometry.from_hf_config(config)
