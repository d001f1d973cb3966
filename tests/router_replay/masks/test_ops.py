"""The kernels behind torch.ops.routing_masks are the reference, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

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
    rows = get_codec(codec).pack(indices, geometry)
    return (rows, 3, 5, 24, 4, codec) if op in ("unpack_layer", "unpack_bitset") else (rows, 5, 24, 4, codec)


OP_NAMES = ("pack", "unpack_indices", "unpack_layer", "unpack_bitset", "legal_indices", "legal_rows")


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
