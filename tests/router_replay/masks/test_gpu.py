"""The kernels on a CUDA device: the reference bit for bit, on any stream, and nothing out of bounds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from router_replay.errors import InputError
from router_replay.masks import CODEC_NAMES, RoutingGeometry, get_codec
from router_replay.masks.codecs import reference
from router_replay.masks.codecs.ops import MISSING_KERNELS, OPS
from router_replay.masks.codecs.row_codec import check_indices
from tests.router_replay.masks.routes import coded_geometries, random_indices, seeds
from tests.router_replay.masks.test_ops import OP_NAMES, arguments_of, assert_same, passes, staged, strided, ways

pytestmark = pytest.mark.gpu


def test_these_are_the_kernels() -> None:
    assert MISSING_KERNELS == {}


@given(coded_geometries(), st.integers(0, 300), st.sampled_from(reference.INDEX_DTYPES), ways, seeds)
@settings(max_examples=150, deadline=None)
def test_every_op_is_the_reference(coded, num_tokens, dtype, way, seed):
    geometry, codec = coded
    if geometry.num_experts > 256 and dtype == torch.uint8:
        dtype = torch.int32
    indices = random_indices(geometry, num_tokens, seed).to(dtype)
    rows = OPS.pack(strided(indices.cuda(), way), geometry.num_experts, codec)
    assert_same(rows.cpu(), reference.pack(indices, geometry.num_experts, codec))
    arguments = geometry.num_moe_layers, geometry.num_experts, geometry.top_k, codec
    read = rows.cpu()
    wide = torch.full((num_tokens, read.shape[1] + 3), 77, dtype=torch.uint8, device="cuda")
    wide[:, 1:-2] = rows
    for on_device in (rows, wide[:, 1:-2], strided(rows, way)):
        assert_same(OPS.unpack_indices(on_device, *arguments).cpu(), reference.unpack_indices(read, *arguments))
    layer_index = seed % geometry.num_moe_layers
    layer, mask = OPS.unpack_layer(rows, layer_index, *arguments), OPS.unpack_bitset(rows, layer_index, *arguments)
    assert_same(layer.cpu(), reference.unpack_layer(read, layer_index, *arguments))
    assert_same(mask.cpu(), reference.unpack_bitset(read, layer_index, *arguments))
    get_codec(codec).check_rows(rows, geometry)
    check_indices(indices.cuda(), geometry)


@given(passes())
@settings(max_examples=100, deadline=None)
def test_a_pass_is_taken_as_by_the_reference(case):
    geometry, codec, staging, first, last, end = case
    arguments = first, last, end, geometry.num_experts, geometry.top_k, codec
    rows, valid = reference.take_rows(staging.clone(), *arguments)
    buffer = staging.cuda()
    found_rows, found_valid = OPS.take_rows(buffer, *arguments)
    assert_same(found_rows.cpu(), rows)
    assert_same(found_valid.cpu(), valid)
    assert bool((buffer == -1).all())


@pytest.fixture(scope="module")
def many_tokens() -> tuple[Tensor, int, int, Tensor, Tensor]:
    """Staging of two tiles for each block, the last one short: `(staging, first, last, rows, valid)`, by the reference.

    About 21,000 rows on an H100. A tile has five of them, and there are 16 blocks for each multiprocessor.
    """
    second_tile = 5 * 16 * torch.cuda.get_device_properties(0).multi_processor_count
    first, num_rows = 1000, 2 * second_tile - 7
    last = first + num_rows
    geometry = RoutingGeometry(48, tuple(range(48)), 128, 8)
    # A prime number of different rows: a block's second tile has not those of its first.
    indices = random_indices(geometry, 1999, seed=2).short().repeat(last // 1999 + 2, 1, 1)
    staging = staged(indices[: last + 1000], last + 1500, 0)
    # Of the first block in its second tile, of the second in its first, and in the short one.
    illegal = [3 + second_tile, 7, 77 + second_tile, num_rows - 1]
    for row, wrong in zip(illegal, [-1, 128, 32767, -1], strict=True):
        staging[first + row, 17, 3] = wrong
    rows, valid = reference.take_rows(staging.clone(), first, last, len(staging), 128, 8, "rank")
    assert (~valid).nonzero().flatten().tolist() == sorted(illegal)
    return staging, first, last, rows, valid


@pytest.mark.parametrize(("end", "wrote_more"), [(0, False), (-1, True), (-5000, True), (500, False)])
def test_a_pass_of_many_tokens_is_taken(many_tokens, end, wrote_more):
    """`end` is given from the last row that was written: inside the rows that are taken, or behind them."""
    staging, first, last, expected, legal = many_tokens
    buffer = staging.cuda()
    rows, valid = OPS.take_rows(buffer, first, last, last + 1000 + end, 128, 8, "rank")
    assert_same(rows.cpu(), expected)
    assert_same(valid.cpu(), torch.zeros_like(legal) if wrote_more else legal)
    assert bool((buffer == -1).all())


def test_many_tokens_are_packed(many_tokens):
    staging, first, last, expected, _ = many_tokens
    assert_same(OPS.pack(staging[first:last].cuda(), 128, "rank").cpu(), expected)


@pytest.mark.parametrize("codec", CODEC_NAMES)
@pytest.mark.parametrize(
    ("num_layers", "num_experts", "top_k"), [(300, 128, 8), (48, 512, 10), (48, 512, 16), (48, 512, 22)]
)
def test_int16_there_and_back(num_layers, num_experts, top_k, codec):
    """More layers than a block has threads; loads of 16 bytes or none; ranks of one word and of two; K above 16."""
    geometry = RoutingGeometry(num_layers, tuple(range(num_layers)), num_experts, top_k)
    indices = random_indices(geometry, 83, seed=3).short()
    expected = reference.pack(indices, num_experts, codec)
    assert_same(OPS.pack(indices.cuda(), num_experts, codec).cpu(), expected)
    staging = staged(indices, 97, 0)
    staging[41, num_layers - 1, top_k - 1] = staging[41, num_layers - 1, 0]
    for end in (5, 41, 80, 83, 97):
        arguments = 11, 79, end, num_experts, top_k, codec
        rows, valid = reference.take_rows(staging.clone(), *arguments)
        buffer = staging.cuda()
        found_rows, found_valid = OPS.take_rows(buffer, *arguments)
        assert_same(found_rows.cpu(), rows)
        assert_same(found_valid.cpu(), valid)
        assert bool((buffer == -1).all())
    read = num_layers, num_experts, top_k, codec
    unpacked, on_device = reference.unpack_indices(expected, *read), expected.cuda()
    for dtype in reference.OUT_DTYPES:
        out = torch.full(unpacked.shape, -7, dtype=dtype, device="cuda")
        OPS.unpack_indices_out(on_device, *read, out)
        assert_same(out.cpu(), unpacked.to(dtype))
        of_layer = torch.full((len(expected), top_k), -7, dtype=dtype, device="cuda")
        OPS.unpack_layer_out(on_device, num_layers - 1, *read, of_layer)
        assert_same(of_layer.cpu(), unpacked[:, -1].to(dtype))


@pytest.mark.parametrize("codec", CODEC_NAMES)
@pytest.mark.parametrize(("num_experts", "top_k"), [(128, 8), (512, 10), (1024, 16), (60, 5), (128, 1)])
def test_many_rows_are_read(num_experts, top_k, codec):
    """Several tiles for each warp, of rows that begin and results that go anywhere; the largest table that there is."""
    num_layers, num_rows = 7, 120_001
    geometry = RoutingGeometry(num_layers, tuple(range(num_layers)), num_experts, top_k)
    read = num_layers, num_experts, top_k, codec
    # A prime number of different rows, some of which nobody packed.
    different = reference.pack(random_indices(geometry, 499, seed=4), num_experts, codec)
    different[7::50] = torch.randint(0, 256, different[7::50].shape, dtype=torch.uint8)
    expected = reference.unpack_indices(different.cuda(), *read).repeat(num_rows // 499 + 1, 1, 1)[:num_rows]
    rows = different.repeat(num_rows // 499 + 1, 1)[:num_rows]
    for lead, gap in [(0, 0), (1, 0), (3, 5)]:
        flat = torch.zeros(lead + num_rows * (rows.shape[1] + gap), dtype=torch.uint8)
        on_device = flat.cuda()[lead:].view(num_rows, -1)[:, : rows.shape[1]]
        on_device.copy_(rows)
        for dtype in reference.OUT_DTYPES:
            memory = torch.full((lead + expected.numel() + 8,), -7, dtype=dtype, device="cuda")
            out = memory[lead:-8].view(expected.shape)
            OPS.unpack_indices_out(on_device, *read, out)
            assert_same(out, expected.to(dtype))
            assert bool((memory[:lead] == -7).all()) and bool((memory[-8:] == -7).all())
            of_layer = torch.full((num_rows, top_k), -7, dtype=dtype, device="cuda")
            OPS.unpack_layer_out(on_device, 5, *read, of_layer)
            assert_same(of_layer, expected[:, 5].to(dtype))
        maps = torch.zeros(num_rows, num_experts + 1, dtype=torch.bool, device="cuda")
        maps.scatter_(1, expected[:, 6].long(), True)
        assert_same(OPS.unpack_bitset(on_device, 6, *read), maps[:, :num_experts].contiguous())


@given(coded_geometries(max_experts=80), st.integers(1, 40), seeds)
@settings(max_examples=60, deadline=None)
def test_bytes_that_no_pack_wrote_are_found_and_read_as_no_expert(coded, num_tokens, seed):
    geometry, codec = coded
    arguments = geometry.num_moe_layers, geometry.num_experts, geometry.top_k, codec
    width = get_codec(codec).row_bytes(geometry)
    rows = torch.randint(0, 256, (num_tokens, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    legal = OPS.legal_rows(rows.cuda(), *arguments).cpu()
    assert_same(legal, reference.legal_rows(rows, *arguments))
    for layer_index in range(geometry.num_moe_layers):
        # On the device the reference does not refuse either, and reads K times E from an illegal field.
        found = OPS.unpack_layer(rows.cuda(), layer_index, *arguments)
        assert_same(found, reference.unpack_layer(rows.cuda(), layer_index, *arguments))
    if not legal.all():
        token, layer_index = (~legal).nonzero()[0].tolist()
        with pytest.raises(InputError, match=f"token {token}, decoder layer {geometry.moe_layers[layer_index]}: "):
            get_codec(codec).check_rows(rows.cuda(), geometry)


@pytest.mark.parametrize("codec", CODEC_NAMES)
@pytest.mark.parametrize("wrong", [60, -1, "twice"])
def test_illegal_indices_are_located_and_marked(codec, wrong):
    geometry = RoutingGeometry(9, (1, 4, 7), 60, 4)
    indices = random_indices(geometry, 500, seed=0)
    indices[321, 1, 3] = indices[321, 1, 0] if wrong == "twice" else wrong
    rows = get_codec(codec).pack(indices.cuda(), geometry)
    with pytest.raises(InputError, match="token 321, decoder layer 4: "):
        check_indices(indices.cuda(), geometry)
    with pytest.raises(InputError, match="token 321, decoder layer 4: "):
        get_codec(codec).check_rows(rows, geometry)
    assert_same(rows, reference.pack(indices.cuda(), 60, codec))


@pytest.mark.parametrize("op", OP_NAMES)
def test_no_op_waits_for_the_device(op):
    arguments = [each.cuda() if isinstance(each, torch.Tensor) else each for each in arguments_of(op, "rank")]
    torch.cuda.set_sync_debug_mode("error")
    try:
        getattr(OPS, op)(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_the_current_stream_is_used(codec):
    geometry = RoutingGeometry(48, tuple(range(48)), 128, 8)
    indices = random_indices(geometry, 3000, seed=1).int()
    expected = reference.pack(indices, 128, codec)
    late = torch.zeros_like(indices, device="cuda")
    source = indices.cuda()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # Only an op on this stream sees what is copied after the wait.
        torch.cuda._sleep(200_000_000)
        late.copy_(source)
        rows = OPS.pack(late, 128, codec)
        unpacked = OPS.unpack_indices(rows, 48, 128, 8, codec)
    stream.synchronize()
    assert_same(rows.cpu(), expected)
    assert_same(unpacked.cpu(), reference.unpack_indices(expected, 48, 128, 8, codec))


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_a_cuda_graph_replays(codec):
    geometry = RoutingGeometry(48, tuple(range(48)), 128, 8)
    first, second = (random_indices(geometry, 64, seed=seed).to(torch.int16) for seed in (0, 1))
    buffer, staging = first.cuda(), staged(first, 70, 0).cuda()
    pass_ = 3, 61, 64, 128, 8, codec
    OPS.pack(buffer, 128, codec)
    OPS.take_rows(staging, *pass_)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = OPS.pack(buffer, 128, codec)
        layer = OPS.unpack_layer(rows, 17, 48, 128, 8, codec)
        taken, valid = OPS.take_rows(staging, *pass_)
    buffer.copy_(second)
    staging.copy_(staged(second, 70, 0))
    graph.replay()
    torch.cuda.synchronize()
    assert_same(rows.cpu(), reference.pack(second, 128, codec))
    assert_same(layer.cpu(), reference.unpack_layer(rows.cpu(), 17, 48, 128, 8, codec))
    expected = reference.take_rows(staged(second, 70, 0), *pass_)
    assert_same(taken.cpu(), expected[0])
    assert_same(valid.cpu(), expected[1])
    assert bool(valid.all()) and bool((staging == -1).all())


@pytest.mark.parametrize("op", OP_NAMES)
def test_opcheck(op):
    arguments = tuple(each.cuda() if isinstance(each, torch.Tensor) else each for each in arguments_of(op, "rank"))
    torch.library.opcheck(getattr(OPS, op).default, arguments)


# All tensors are made on the CPU: few other kernels than these run, so that the tools take seconds and find ours.
SANITIZED = """
import torch
from router_replay.masks.codecs.ops import OPS

def routes(num_tokens, num_layers, top_k, num_experts):
    return torch.rand(num_tokens, num_layers, num_experts).argsort(-1)[..., :top_k]

def take(indices, num_shared, num_experts, codec):
    num_tokens, num_layers, top_k = indices.shape
    staging = torch.full((num_tokens + 5, num_layers, top_k + num_shared), -1, dtype=torch.int16)
    staging[:num_tokens, :, :top_k] = indices
    first, last = num_tokens // 4, num_tokens - num_tokens // 4
    # Before, inside and behind what is taken, and behind the buffer; then no row is taken.
    for end in (num_tokens // 8, num_tokens // 2, num_tokens, num_tokens + 5):
        OPS.take_rows(staging.cuda(), first, last, end, num_experts, top_k, codec)
    OPS.take_rows(staging.cuda(), last, last, num_tokens, num_experts, top_k, codec)

CODECS = "bitset", "rank", "ordered"
for num_tokens, num_layers, top_k, num_experts in (
    (1, 1, 1, 1), (257, 1, 1, 1), (257, 7, 2, 8), (33, 9, 8, 128), (33, 3, 10, 512), (33, 3, 16, 512), (33, 2, 22, 512),
    (33, 5, 64, 70), (9, 300, 8, 128), (33, 2, 16, 1024), (65, 3, 3, 60),
):
    wide = routes(num_tokens, num_layers, top_k, num_experts)
    narrow = wide.short()
    # The second can be loaded 16 bytes at a time where K is 8 or 16, the third begins beside such an address.
    behind_one = torch.cat([narrow.new_zeros(1), narrow.flatten()]).cuda()[1:].view(narrow.shape)
    given = wide.cuda(), narrow.cuda(), behind_one
    for indices in given:
        OPS.legal_indices(indices, num_experts)
    for codec in CODECS:
        for indices in given:
            rows = OPS.pack(indices, num_experts, codec)
        for num_shared in (0, 1):
            take(narrow, num_shared, num_experts, codec)
        arguments = num_layers, num_experts, top_k, codec
        for read in (rows, torch.randint(0, 256, rows.shape, dtype=torch.uint8).cuda()):
            OPS.unpack_indices(read, *arguments)
            OPS.unpack_layer(read, num_layers - 1, *arguments)
            OPS.unpack_bitset(read, num_layers - 1, *arguments)
            OPS.legal_rows(read, *arguments)
            for dtype in (torch.int16, torch.int32, torch.int64):
                out = torch.empty(narrow.shape, dtype=dtype, device="cuda")
                OPS.unpack_indices_out(read, *arguments, out)
                out = torch.empty((num_tokens, top_k), dtype=dtype, device="cuda")
                OPS.unpack_layer_out(read, num_layers - 1, *arguments, out)
                beside = torch.empty(narrow.numel() + 1, dtype=dtype, device="cuda")[1:].view(narrow.shape)
                OPS.unpack_indices_out(read, *arguments, beside)

# A tile is one row here, and there are more of them than blocks: see many_tokens.
blocks = 16 * torch.cuda.get_device_properties(0).multi_processor_count
many = routes(2 * blocks + 33, 256, 1, 2).short()
for codec in CODECS:
    OPS.pack(many.cuda(), 2, codec)
    OPS.take_rows(many.cuda(), 8, blocks + 41, 2 * blocks, 2, 1, codec)
    # More tiles of 32 fields than warps.
    OPS.unpack_indices(OPS.pack(many.cuda(), 2, codec), 256, 2, 1, codec)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer(tool):
    sanitizer = shutil.which("compute-sanitizer")
    assert sanitizer, "compute-sanitizer, of the CUDA toolkit, is not on the PATH; without it, deselect this test"
    # Without torch's cache every tensor is an allocation of its own, so that the sanitizer sees its end.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sanitizer, "--tool", tool, "--error-exitcode", "99", sys.executable, "-c", SANITIZED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
