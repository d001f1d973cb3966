"""The kernels behind torch.ops.routing_masks are the reference, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from router_replay.errors import InputError, PairingError
from router_replay.masks import CODEC_NAMES, RoutingGeometry, get_codec
from router_replay.masks.codecs import reference
from router_replay.masks.codecs.ops import MISSING_KERNELS, OPS
from tests.router_replay.masks.routes import coded_geometries, geometries, random_indices, seeds


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(found, expected), f"first differs at {(found != expected).nonzero()[0].tolist()}"


def strided(tensor: Tensor, way: str) -> Tensor:
    """The same values in memory that is laid out another way."""
    if way == "reversed dimensions":
        dims = tuple(reversed(range(tensor.dim())))
        return tensor.permute(dims).contiguous().permute(dims)
    if way == "every second":
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] * 2 + 3), 77).to(tensor.dtype)
        wide[..., 1 : 1 + 2 * tensor.shape[-1] : 2] = tensor
        return wide[..., 1 : 1 + 2 * tensor.shape[-1] : 2]
    return tensor


def refused_at_first_false(legal: Tensor, run: Callable[[], Tensor], layer_index: int | None = None) -> None:
    """`run` refuses, by token and layer, the first False of `bool [T, L]`; of one layer, if `layer_index` is given."""
    illegal = ~legal
    if layer_index is not None:
        illegal &= torch.arange(legal.shape[1]) == layer_index
    if not illegal.any():
        run()
        return
    token, layer = illegal.nonzero()[0].tolist()
    with pytest.raises(RuntimeError, match=f"token {token}, MoE layer {layer}: "):
        run()


ways = st.sampled_from(["as it is", "reversed dimensions", "every second"])


def test_these_are_the_kernels() -> None:
    assert "cpu" not in MISSING_KERNELS


@given(
    coded_geometries(), st.lists(st.integers(0, 3), max_size=3), st.sampled_from(reference.INDEX_DTYPES), ways, seeds
)
@settings(max_examples=150, deadline=None)
def test_every_op_is_the_reference(coded, leading, dtype, way, seed):
    geometry, codec = coded
    num_layers, num_experts, top_k = geometry.num_moe_layers, geometry.num_experts, geometry.top_k
    if num_experts > 256 and dtype == torch.uint8:
        dtype = torch.int32
    indices = random_indices(geometry, torch.Size(leading).numel(), seed).reshape(*leading, num_layers, top_k).to(dtype)
    rows = OPS.pack(strided(indices, way), num_experts, codec)
    assert_same(rows, reference.pack(indices, num_experts, codec))
    assert rows.is_contiguous()
    read = strided(rows, way), num_layers, num_experts, top_k, codec
    assert_same(OPS.unpack_indices(*read), reference.unpack_indices(*read))
    for layer_index in {0, num_layers // 2, num_layers - 1}:
        of_layer = read[0], layer_index, *read[1:]
        assert_same(OPS.unpack_layer(*of_layer), reference.unpack_layer(*of_layer))
        assert_same(OPS.unpack_bitset(*of_layer), reference.unpack_bitset(*of_layer))
    assert bool(OPS.legal_rows(*read).all())
    assert bool(OPS.legal_indices(strided(indices, way), num_experts).all())


@given(coded_geometries(), st.lists(st.integers(0, 3), max_size=2), st.sampled_from(reference.OUT_DTYPES), seeds)
@settings(max_examples=60, deadline=None)
def test_indices_in_the_dtype_that_is_asked_for(coded, leading, dtype, seed):
    geometry, codec = coded
    arguments = geometry.num_moe_layers, geometry.num_experts, geometry.top_k, codec
    flat = get_codec(codec).pack(random_indices(geometry, torch.Size(leading).numel(), seed), geometry)
    rows = flat.reshape(*leading, flat.shape[1])
    expected, layer_index = reference.unpack_indices(rows, *arguments).to(dtype), geometry.num_moe_layers // 2
    for implementation in (OPS, reference):
        out = torch.full(expected.shape, -7, dtype=dtype)
        implementation.unpack_indices_out(rows, *arguments, out)
        assert_same(out, expected)
        of_layer = torch.full_like(expected[..., layer_index, :], -7, memory_format=torch.contiguous_format)
        implementation.unpack_layer_out(rows, layer_index, *arguments, of_layer)
        assert_same(of_layer, expected[..., layer_index, :])


def test_a_codec_writes_to_the_buffer_that_is_given():
    geometry, codec = RoutingGeometry(3, (0, 2), 60, 4), get_codec("rank")
    rows = codec.pack(random_indices(geometry, 6, 0), geometry)
    expected = codec.unpack_indices(rows, geometry)
    for dtype in reference.OUT_DTYPES:
        assert_same(codec.unpack_indices(rows, geometry, dtype=dtype), expected.to(dtype))
        assert_same(codec.unpack_layer(rows, geometry, 1, dtype=dtype), expected[:, 1].to(dtype))
        buffer = torch.full((10, 2, 4), -7, dtype=dtype)
        given_buffer = buffer[2:8]
        assert codec.unpack_indices(rows, geometry, out=given_buffer) is given_buffer
        assert_same(given_buffer, expected.to(dtype))
        assert bool((buffer[:2] == -7).all()) and bool((buffer[8:] == -7).all())
        codec.unpack_layer(rows, geometry, 0, dtype=dtype, out=buffer[:6, 0].contiguous())
    for out, error, words in [
        (torch.zeros(5, 2, 4, dtype=torch.int32), PairingError, r"out is \(5, 2, 4\), .* are \(6, 2, 4\)"),
        (torch.zeros(6, 2, 4), InputError, "int16, torch.int32 or torch.int64, not as torch.float32"),
        (torch.zeros(6, 2, 4, dtype=torch.int32, device="meta"), InputError, "out is on meta and the rows on cpu"),
        (torch.zeros(2, 6, 4, dtype=torch.int32).transpose(0, 1), InputError, r"strides \(4, 24, 1\).*contiguous"),
    ]:
        with pytest.raises(error, match=words):
            codec.unpack_indices(rows, geometry, out=out)
    with pytest.raises(InputError, match=r"torch.int16, but out is torch.int32: leave one"):
        codec.unpack_indices(rows, geometry, dtype=torch.int16, out=torch.zeros(6, 2, 4, dtype=torch.int32))
    with pytest.raises(InputError, match=r"not as torch.uint8"):
        codec.unpack_layer(rows, geometry, 0, dtype=torch.uint8)
    rows[4] = 0xFF
    with pytest.raises(InputError, match="token 4, decoder layer 0"):
        codec.unpack_indices(rows, geometry, dtype=torch.int16)


@pytest.mark.parametrize("num_tokens", [0, 1, 40])
def test_rows_of_no_bytes_are_read(num_tokens):
    """There is one set of all experts, which codec 'rank' writes in no bits; such a tensor has no memory."""
    rows = OPS.pack(torch.arange(5).expand(num_tokens, 9, 5), 5, "rank")
    assert rows.shape == (num_tokens, 0)
    assert_same(OPS.unpack_indices(rows, 9, 5, 5, "rank"), torch.arange(5).int().repeat(num_tokens, 9, 1))
    assert_same(OPS.unpack_layer(rows, 8, 9, 5, 5, "rank"), torch.arange(5).int().repeat(num_tokens, 1))
    assert bool(OPS.unpack_bitset(rows, 8, 9, 5, 5, "rank").all()) and bool(OPS.legal_rows(rows, 9, 5, 5, "rank").all())


@st.composite
def passes(draw: st.DrawFn) -> tuple[RoutingGeometry, str, Tensor, int, int, int]:
    """Arguments of take_rows: a buffer in which some layers did not report, or wrongly, and a rank's tokens in it."""
    geometry, codec = draw(coded_geometries(max_experts=300))
    written = draw(st.integers(0, 12))
    indices = random_indices(geometry, written, draw(seeds))
    staging = staged(indices, written + draw(st.integers(0, 3)), draw(st.integers(0, 2)))
    for wrong in draw(st.lists(st.sampled_from([-1, geometry.num_experts, 32767, -32768, 0]), max_size=3)):
        if written:
            at = draw(st.integers(0, written - 1)), draw(st.integers(0, geometry.num_moe_layers - 1))
            staging[(*at, draw(st.integers(0, geometry.top_k - 1)))] = wrong
    first = draw(st.integers(0, written))
    last = draw(st.integers(first, written))
    return geometry, codec, staging, first, last, draw(st.integers(0, len(staging) + 1) | st.just(2**62))


@given(passes())
@settings(max_examples=150, deadline=None)
def test_a_pass_is_taken_as_by_the_reference(case):
    geometry, codec, staging, first, last, end = case
    arguments = first, last, end, geometry.num_experts, geometry.top_k, codec
    taken = staging[first:last, :, : geometry.top_k].long()
    legal = reference.legal_indices(taken, geometry.num_experts)
    expected_valid = legal.all(-1) & (end >= len(staging) or bool((staging[end:][:1] == -1).all()))
    for implementation in (OPS, reference):
        buffer = staging.clone()
        rows, valid = implementation.take_rows(buffer, *arguments)
        assert_same(valid, expected_valid)
        assert bool((buffer == -1).all()) and rows.is_contiguous()
        assert_same(rows[legal.all(-1)], reference.pack(taken[legal.all(-1)], geometry.num_experts, codec))
        assert_same(rows, reference.take_rows(staging.clone(), *arguments)[0])


@given(coded_geometries(max_experts=80), st.integers(1, 4), ways, seeds)
@settings(max_examples=120, deadline=None)
def test_illegal_rows_are_the_references(coded, num_tokens, way, seed):
    geometry, codec = coded
    arguments = geometry.num_moe_layers, geometry.num_experts, geometry.top_k
    rows = OPS.pack(random_indices(geometry, num_tokens, seed), geometry.num_experts, codec)
    random = torch.randint(0, 256, rows.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    rows = torch.where(torch.arange(num_tokens)[:, None] >= num_tokens // 2, random, rows)
    legal = OPS.legal_rows(strided(rows, way), *arguments, codec)
    assert_same(legal, reference.legal_rows(rows, *arguments, codec))
    for implementation in (OPS, reference):
        refused_at_first_false(legal, lambda of=implementation: of.unpack_indices(rows, *arguments, codec))
        for layer_index in range(geometry.num_moe_layers):
            of_layer = rows, layer_index, *arguments, codec
            refused_at_first_false(legal, lambda of=implementation, at=of_layer: of.unpack_layer(*at), layer_index)
            refused_at_first_false(legal, lambda of=implementation, at=of_layer: of.unpack_bitset(*at), layer_index)


@given(geometries(max_experts=80), st.integers(1, 4), st.sampled_from(reference.INDEX_DTYPES[1:]), ways, seeds)
@settings(max_examples=60, deadline=None)
def test_illegal_indices_are_the_references(geometry, num_tokens, dtype, way, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (num_tokens, geometry.num_moe_layers, geometry.top_k)
    indices = torch.randint(0, geometry.num_experts + 1, shape, generator=generator).to(dtype)
    legal = OPS.legal_indices(strided(indices, way), geometry.num_experts)
    assert_same(legal, reference.legal_indices(indices, geometry.num_experts))
    for implementation in (OPS, reference):
        refused_at_first_false(legal, lambda of=implementation: of.pack(indices, geometry.num_experts, "bitset"))


@given(coded_geometries(max_experts=200), st.integers(0, 70), seeds)
@settings(max_examples=60, deadline=None)
def test_every_byte_of_an_output_is_written(coded, num_tokens, seed):
    """Torch fills what it allocates with a sentinel here: 255 for uint8, the largest number for int32."""
    geometry, codec = coded
    indices = random_indices(geometry, num_tokens, seed)
    expected = reference.pack(indices, geometry.num_experts, codec)
    read = expected, geometry.num_moe_layers, geometry.num_experts, geometry.top_k, codec
    torch.use_deterministic_algorithms(True)
    try:
        assert bool((torch.empty(9, dtype=torch.uint8) == 255).all())
        assert_same(OPS.pack(indices, geometry.num_experts, codec), expected)
        unpacked = OPS.unpack_indices(*read)
        mask = OPS.unpack_bitset(expected, 0, *read[1:])
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(unpacked, reference.unpack_indices(*read))
    assert_same(mask, reference.unpack_bitset(expected, 0, *read[1:]))


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_threads_do_not_change_a_bit(codec):
    geometry = RoutingGeometry(7, tuple(range(7)), 60, 6)
    indices = random_indices(geometry, 5000, seed=0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = OPS.pack(indices, 60, codec)
        torch.set_num_threads(4)
        assert_same(OPS.pack(indices, 60, codec), alone)
        assert_same(OPS.unpack_indices(alone, 7, 60, 6, codec), reference.unpack_indices(alone, 7, 60, 6, codec))
        indices[[4000, 4321], [6, 2], 1] = 60
        assert (~OPS.legal_indices(indices, 60)).nonzero().tolist() == [[4000, 6], [4321, 2]]
    finally:
        torch.set_num_threads(threads)


def arguments_of(op: str, codec: str) -> tuple:
    geometry = RoutingGeometry(5, (0, 1, 2, 3, 4), 24, 4)
    indices = random_indices(geometry, 6, seed=1).reshape(2, 3, 5, 4)
    if op == "pack":
        return indices, 24, codec
    if op == "legal_indices":
        return indices, 24
    if op == "take_rows":
        return staged(indices.flatten(0, 1), 9, 1), 1, 6, 8, 24, 4, codec
    rows = get_codec(codec).pack(indices, geometry)
    layer_index = (3,) if op in ("unpack_layer", "unpack_layer_out", "unpack_bitset") else ()
    outs = {
        "unpack_indices_out": (torch.zeros(2, 3, 5, 4, dtype=torch.int16),),
        "unpack_layer_out": (torch.zeros(2, 3, 4, dtype=torch.int64),),
    }
    return (rows, *layer_index, 5, 24, 4, codec, *outs.get(op, ()))


def staged(indices: Tensor, max_tokens: int, num_shared: int) -> Tensor:
    """The staging buffer after a pass of these tokens, `int16 [max_tokens, L, K + num_shared]`."""
    num_tokens, num_layers, top_k = indices.shape
    staging = torch.full((max_tokens, num_layers, top_k + num_shared), -1, dtype=torch.int16)
    staging[:num_tokens] = 99
    staging[:num_tokens, :, :top_k] = indices
    return staging


OP_NAMES = (
    "pack",
    "take_rows",
    "unpack_indices",
    "unpack_layer",
    "unpack_indices_out",
    "unpack_layer_out",
    "unpack_bitset",
    "legal_indices",
    "legal_rows",
)


@pytest.mark.parametrize("codec", CODEC_NAMES)
@pytest.mark.parametrize("op", OP_NAMES)
def test_opcheck(op, codec):
    torch.library.opcheck(getattr(OPS, op).default, arguments_of(op, codec))


def test_a_compiled_function_packs_and_unpacks():
    geometry = RoutingGeometry(5, (0, 1, 2, 3, 4), 24, 4)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def there_and_back(indices: Tensor) -> Tensor:
        return OPS.unpack_layer(OPS.pack(indices, 24, "rank"), 2, 5, 24, 4, "rank") + 1

    for num_tokens in (3, 8):
        indices = random_indices(geometry, num_tokens, seed=num_tokens)
        assert torch.equal(there_and_back(indices), indices[:, 2].sort(-1).values.int() + 1)


BITSETS = torch.zeros(2, 9, dtype=torch.uint8), 3, 24, 4, "bitset"


@pytest.mark.parametrize("implementation", [OPS, reference], ids=["kernels", "reference"])
@pytest.mark.parametrize(
    ("op", "arguments", "words"),
    [
        ("pack", (torch.zeros(2, 3, 4), 24, "rank"), "uint8, int16, uint16, int32 or int64"),
        ("pack", (torch.zeros(2, 3, 4, dtype=torch.int8), 24, "rank"), "uint8, int16, uint16, int32 or int64"),
        ("pack", (torch.zeros(2, 3, 4, dtype=torch.int32), 24, "zip"), "unknown codec 'zip'"),
        ("pack", (torch.arange(5).expand(2, 3, 5), 4, "bitset"), "top-k 5 of (only )?4"),
        ("pack", (torch.arange(5).expand(0, 3, 5), 4, "bitset"), "top-k 5 of (only )?4"),
        ("pack", (torch.arange(5).expand(2, 3, 5), 1025, "bitset"), "1025 experts.* 1024"),
        ("pack", (torch.arange(65).expand(2, 3, 65), 128, "bitset"), "top-k 65.* 64"),
        ("pack", (torch.arange(5), 8, "bitset"), "MoE layers, top-k"),
        ("pack", (torch.zeros(2, 0, 4, dtype=torch.int32), 8, "bitset"), "0 MoE layers"),
        ("legal_indices", (torch.zeros(2, 3, 4), 24), "uint8, int16, uint16, int32 or int64"),
        ("legal_indices", (torch.zeros(2, 3, 4, dtype=torch.bool), 24), "uint8, int16, uint16, int32 or int64"),
        ("unpack_indices", (torch.tensor(3, dtype=torch.uint8), 3, 24, 4, "bitset"), "uint8"),
        ("pack", (torch.arange(23).expand(1, 1, 23), 512, "rank"), "128 bits.*23 of 512"),
        ("take_rows", (torch.zeros(4, 3, 4, dtype=torch.int32), 0, 2, 4, 24, 4, "rank"), "int16"),
        ("take_rows", (torch.zeros(4, 3, dtype=torch.int16), 0, 2, 4, 24, 3, "rank"), "int16"),
        ("take_rows", (torch.zeros(3, 4, 4, dtype=torch.int16).transpose(0, 1), 0, 2, 4, 24, 4, "rank"), "contiguous"),
        ("take_rows", (torch.zeros(4, 3, 4, dtype=torch.int16), 0, 2, 4, 24, 5, "rank"), "4 columns, but top-k is 5"),
        ("take_rows", (torch.zeros(4, 3, 4, dtype=torch.int16), 3, 2, 4, 24, 4, "rank"), r"\[3, 2\).* of 4"),
        ("take_rows", (torch.zeros(4, 3, 4, dtype=torch.int16), 0, 5, 5, 24, 4, "rank"), r"\[0, 5\).* of 4"),
        ("take_rows", (torch.zeros(4, 3, 4, dtype=torch.int16), -1, 2, 4, 24, 4, "rank"), r"\[-1, 2\).* of 4"),
        ("take_rows", (torch.zeros(4, 3, 4, dtype=torch.int16), 0, 2, -1, 24, 4, "rank"), "a pass of -1"),
        ("take_rows", (torch.zeros(4, 3, 4, dtype=torch.int16), 0, 2, 4, 24, 4, "zip"), "unknown codec 'zip'"),
        ("take_rows", (torch.zeros(4, 1, 23, dtype=torch.int16), 0, 2, 4, 512, 23, "rank"), "128 bits.*23 of 512"),
        ("unpack_indices_out", (*BITSETS, torch.zeros(2, 3, 3, dtype=torch.int32)), "another shape"),
        ("unpack_indices_out", (*BITSETS, torch.zeros(2, 3, dtype=torch.int32)), "another shape"),
        ("unpack_indices_out", (*BITSETS, torch.zeros(2, 3, 4)), "int16, int32 or int64"),
        ("unpack_indices_out", (*BITSETS, torch.zeros(2, 3, 4, dtype=torch.uint8)), "int16, int32 or int64"),
        ("unpack_indices_out", (*BITSETS, torch.zeros(2, 4, 3, dtype=torch.int32).transpose(1, 2)), "contiguous"),
        ("unpack_indices", (torch.zeros(2, 7, dtype=torch.uint8), 3, 24, 4, "bitset"), "7.*9"),
        ("unpack_indices", (torch.zeros(2, 9), 3, 24, 4, "bitset"), "uint8"),
        (
            "unpack_layer",
            (torch.zeros(2, 9, dtype=torch.uint8), 3, 3, 24, 4, "bitset"),
            "layer_index 3 is none of the 3",
        ),
        (
            "unpack_bitset",
            (torch.zeros(2, 9, dtype=torch.uint8), -1, 3, 24, 4, "bitset"),
            "layer_index -1 is none of the 3",
        ),
    ],
)
def test_what_does_not_fit_is_refused(implementation, op, arguments, words):
    with pytest.raises(RuntimeError, match=words):
        getattr(implementation, op)(*arguments)
