"""The container and the handles: what is written comes back, and nothing else is taken for it."""

from __future__ import annotations

import base64
import json
from dataclasses import fields, replace

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router_replay.errors import DataError, InputError
from router_replay.masks import (
    CODEC_NAMES,
    RoutingGeometry,
    RoutingMasks,
    from_bytes,
    load,
    load_file,
    save_file,
    to_bytes,
)
from router_replay.masks.stores.inline import InlineStore
from tests.router_replay.masks.routes import coded_geometries, random_indices, seeds

GEOMETRY = RoutingGeometry(5, (1, 2, 4), 17, 3)


def make_masks(codec="bitset", geometry=GEOMETRY, num_tokens=6, seed=0, start=3):
    valid = torch.arange(num_tokens) % 4 != 2
    end = start + num_tokens
    return RoutingMasks.from_indices(
        random_indices(geometry, num_tokens, seed),
        valid,
        start=start,
        geometry=geometry,
        codec=codec,
        token_ids=range(end),
        weight_versions=tuple((start + row, f"step {row} é") for row in range(0, num_tokens, 2)),
    )


def assert_same(masks: RoutingMasks, expected: RoutingMasks) -> None:
    for field in fields(RoutingMasks):
        value, wanted = getattr(masks, field.name), getattr(expected, field.name)
        assert torch.equal(value, wanted) if isinstance(wanted, torch.Tensor) else value == wanted, field.name


def tampered(data: bytes, metadata: dict | None = None, **tensors: torch.Tensor) -> bytes:
    """The file with some metadata (None: left out) and tensors replaced, as another program might write it."""
    length = int.from_bytes(data[:8], "little")
    present = json.loads(data[8 : 8 + length])["__metadata__"]
    changed = {key: value for key, value in {**present, **(metadata or {})}.items() if value is not None}
    return safetensors.torch.save({**safetensors.torch.load(data), **tensors}, changed)


@given(coded_geometries(), st.integers(0, 5), seeds, st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_round_trip(coded, num_tokens, seed, start):
    geometry, codec = coded
    masks = make_masks(codec, geometry, num_tokens, seed, start)
    assert_same(from_bytes(to_bytes(masks)), masks)
    handle = json.loads(json.dumps(InlineStore().put(masks)))
    assert_same(load(handle), masks)


def test_rows_of_any_strides_are_written():
    masks = make_masks()
    wide = torch.zeros(masks.num_tokens, 50, dtype=torch.uint8)
    wide[:, 3 : 3 + masks.rows.shape[1]] = masks.rows
    assert_same(from_bytes(to_bytes(replace(masks, rows=wide[:, 3 : 3 + masks.rows.shape[1]]))), masks)


def test_any_safetensors_tool_opens_it(tmp_path):
    masks = make_masks("ordered")
    path = tmp_path / "masks.safetensors"
    path.write_bytes(to_bytes(masks))
    with safetensors.safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == ["rows", "valid"]
        assert torch.equal(file.get_tensor("rows"), masks.rows)
        assert torch.equal(file.get_tensor("valid"), masks.valid)
        metadata = file.metadata()
    assert (metadata["format"], metadata["format_version"]) == ("routing_masks", "1")
    assert (metadata["codec"], metadata["start"]) == ("ordered", "3")
    assert json.loads(metadata["geometry"]) == [5, 17, 3, [1, 2, 4]]
    assert metadata["token_digest"] == masks.token_digest


def test_truncated_at_every_byte():
    data = to_bytes(make_masks())
    for length in range(len(data)):
        with pytest.raises(DataError):
            from_bytes(data[:length])
    with pytest.raises(DataError):
        from_bytes(data + b"\0")


@given(st.integers(0, 10**6), st.integers(0, 7))
@settings(max_examples=300, deadline=None)
def test_a_flipped_bit_never_changes_a_route_nor_raises_anything_else(position, bit):
    masks = make_masks()
    data = bytearray(to_bytes(masks))
    data[position % len(data)] ^= 1 << bit
    try:
        read = from_bytes(bytes(data))
    except DataError:
        return
    # What passes differs nowhere: the checksum covers the fields and the tensors.
    assert torch.equal(read.rows, masks.rows) and torch.equal(read.valid, masks.valid)
    assert (read.start, read.codec, read.geometry) == (masks.start, masks.codec, masks.geometry)
    assert (read.weight_versions, read.token_digest) == (masks.weight_versions, masks.token_digest)


def test_another_file_is_named():
    foreign = safetensors.torch.save({"weight": torch.zeros(2)}, {"format": "pt"})
    with pytest.raises(DataError, match=r"format 'pt' with tensors \['weight'\], not 'routing_masks'"):
        from_bytes(foreign)
    with pytest.raises(DataError, match="format None"):
        from_bytes(safetensors.torch.save({"weight": torch.zeros(2)}))
    with pytest.raises(DataError, match="not a whole safetensors file"):
        from_bytes(b"PK\x03\x04 something else altogether")


def test_an_unknown_version_is_named():
    with pytest.raises(DataError, match=r"version '2'.*reads version '1'"):
        from_bytes(tampered(to_bytes(make_masks()), {"format_version": "2"}))


@pytest.mark.parametrize("field", ["codec", "geometry", "start", "token_digest", "weight_versions"])
def test_a_missing_field_is_named(field):
    with pytest.raises(DataError, match=f"lacks or garbles a field.*{field}"):
        from_bytes(tampered(to_bytes(make_masks()), {field: None}))


@pytest.mark.parametrize(
    "metadata",
    [
        {"codec": "zip"},
        {"codec": "ordered"},
        {"geometry": "[5,17,3]"},
        {"geometry": "5"},
        {"geometry": "{"},
        {"geometry": '[5,17,3,["a"]]'},
        {"geometry": '[5,17,"3",[1,2,4]]'},
        {"geometry": "[5,17,3,[1,2,5]]"},
        {"geometry": "[5,18,3,[1,2,4]]"},
        {"geometry": "[5,17,4,[1,2,4]]"},
        {"start": "three"},
        {"start": "-3"},
        {"weight_versions": "[[3]]"},
        {"weight_versions": "[[99,1]]"},
        {"weight_versions": "7"},
    ],
)
def test_garbled_fields_are_refused(metadata):
    with pytest.raises(DataError):
        from_bytes(tampered(to_bytes(make_masks()), metadata))


def test_tensors_that_do_not_fit_are_refused():
    masks = make_masks()
    data = to_bytes(masks)
    for tensors in ({"rows": masks.rows[:-1]}, {"rows": masks.rows.int()}, {"valid": masks.valid.to(torch.uint8)}):
        with pytest.raises(DataError):
            from_bytes(tampered(data, **tensors))


def test_corrupted_rows_are_refused():
    masks = make_masks()
    assert masks.valid.any() and not masks.valid.all()
    for token, valid in enumerate(masks.valid.tolist()):
        rows = masks.rows.clone()
        rows[token, 0] ^= 1
        data = tampered(to_bytes(masks), rows=rows)
        if valid:
            with pytest.raises(DataError, match="contradicts itself"):
                from_bytes(data)
        else:
            with pytest.raises(DataError, match="CRC-32"):
                from_bytes(data)


@pytest.mark.parametrize(
    "metadata",
    [
        {"geometry": "[5,17.0,3,[1,2,4]]"},
        {"geometry": "[5,17,3,[1,2,1e400]]"},
        {"geometry": "[true,17,1,[0]]"},
        {"weight_versions": "[" * 100_000},
    ],
)
def test_numbers_and_nesting_that_no_writer_makes_are_refused(metadata):
    with pytest.raises(DataError, match="lacks or garbles"):
        from_bytes(tampered(to_bytes(make_masks()), metadata))


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_masks_that_claim_an_unknown_row_are_refused(codec):
    """A row that is not valid is filled with `NO_ROW`, which makes no legal row; zeros would, for 'rank'."""
    masks = make_masks(codec)
    with pytest.raises(DataError, match="contradicts itself"):
        from_bytes(tampered(to_bytes(masks), valid=torch.ones_like(masks.valid)))


@pytest.mark.parametrize("handle", [None, "inline", {}, {"store": "s3"}, {"store": []}, {"stor": "inline"}, []])
def test_what_is_no_handle_is_refused(handle):
    with pytest.raises(DataError, match=r"known store \(.*inline"):
        load(handle)


@pytest.mark.parametrize("data", [None, 5, "###", "abc", "é", b"\xff", ""])
def test_an_inline_handle_without_a_container_is_refused(data):
    with pytest.raises(DataError):
        load({"store": "inline:", "data": data})
    with pytest.raises(DataError):
        load({"store": "inline:"})


def test_an_inline_handle_is_the_container_in_base64():
    masks = make_masks()
    handle = InlineStore().put(masks)
    assert_same(from_bytes(base64.b64decode(handle["data"], validate=True)), masks)
    with pytest.raises(DataError, match="truncated"):
        load({**handle, "data": handle["data"][: len(handle["data"]) // 8 * 4]})


@pytest.mark.parametrize("as_text", [True, False])
def test_a_file_is_the_container(tmp_path, as_text):
    masks = make_masks()
    path = tmp_path / "made" / "by rank 0" / "masks.bin"
    save_file(masks, str(path) if as_text else path)
    # Not the same bytes as `to_bytes(masks)`: safetensors writes its metadata in any order.
    assert_same(from_bytes(path.read_bytes()), masks)
    assert_same(load_file(str(path) if as_text else path), masks)
    save_file(masks[2:], path)
    assert_same(load_file(path), masks[2:])
    assert list(path.parent.iterdir()) == [path]


def test_what_cannot_be_written_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "masks"
    save_file(make_masks(), path)
    before = path.read_bytes()
    with pytest.raises(InputError, match="expected RoutingMasks"):
        save_file(None, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match=r"is a folder: name the file in it, .*masks.safetensors"):
        save_file(make_masks(), tmp_path)
    with pytest.raises(InputError, match=r"a NoneType is no path: save_file\(masks, path\)"):
        save_file(make_masks(), None)
    with pytest.raises(OSError, match="masks"):
        save_file(make_masks(), path / "below a file")


def test_files_that_hold_no_masks_are_named(tmp_path):
    for name, content, says in (
        ("foreign", b"text", "not a whole safetensors file"),
        ("cut", to_bytes(make_masks())[:-1], "truncated"),
        ("other", safetensors.torch.save({"weight": torch.zeros(2)}), r"tensors \['weight'\], not 'routing_masks'"),
        ("empty", b"", "these 0 bytes are not a whole"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{tmp_path / name}: .*{says}"):
            load_file(tmp_path / name)
    with pytest.raises(DataError, match=rf"{tmp_path / 'nowhere'}: no such file; .* save_file\(masks, path\)"):
        load_file(tmp_path / "nowhere")
    with pytest.raises(DataError, match=rf"{tmp_path} is a folder: name one of the files"):
        load_file(tmp_path)
    with pytest.raises(DataError, match="cannot be read: Not a directory"):
        load_file(tmp_path / "foreign" / "below a file")
    for no_path in (None, 5, InlineStore().put(make_masks()), make_masks()):
        with pytest.raises(InputError, match=rf"a {type(no_path).__name__} is no path: load_file\(path\); of a handle"):
            load_file(no_path)
