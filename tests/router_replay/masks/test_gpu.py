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

from router_replay.errors import InputError
from router_replay.masks import CODEC_NAMES, RoutingGeometry, get_codec
from router_replay.masks.codecs import reference
from router_replay.masks.codecs.ops import MISSING_KERNELS, OPS
from router_replay.masks.codecs.row_codec import check_indices
from tests.router_replay.masks.routes import coded_geometries, random_indices, seeds
from tests.router_replay.masks.test_ops import OP_NAMES, arguments_of, assert_same, strided, ways

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
    buffer = first.cuda()
    OPS.pack(buffer, 128, codec)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = OPS.pack(buffer, 128, codec)
        layer = OPS.unpack_layer(rows, 17, 48, 128, 8, codec)
    buffer.copy_(second)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(rows.cpu(), reference.pack(second, 128, codec))
    assert_same(layer.cpu(), reference.unpack_layer(rows.cpu(), 17, 48, 128, 8, codec))


@pytest.mark.parametrize("op", OP_NAMES)
def test_opcheck(op):
    arguments = tuple(each.cuda() if isinstance(each, torch.Tensor) else each for each in arguments_of(op, "rank"))
    torch.library.opcheck(getattr(OPS, op).default, arguments)


SANITIZED = """
import torch
from router_replay.masks.codecs.ops import OPS
for num_layers, top_k, num_experts in ((1, 1, 1), (7, 2, 8), (9, 8, 128), (3, 10, 512), (2, 22, 512), (5, 64, 70)):
    for num_tokens in (1, 33, 257):
        indices = torch.rand(num_tokens, num_layers, num_experts).argsort(-1)[..., :top_k].cuda()
        OPS.legal_indices(indices, num_experts)
        for codec in ("bitset", "rank", "ordered"):
            arguments = num_layers, num_experts, top_k, codec
            rows = OPS.pack(indices, num_experts, codec)
            for read in (rows, torch.randint_like(rows, 0, 256)):
                OPS.unpack_indices(read, *arguments)
                OPS.unpack_layer(read, num_layers - 1, *arguments)
                OPS.unpack_bitset(read, num_layers - 1, *arguments)
                OPS.legal_rows(read, *arguments)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "initcheck", "racecheck"])
def test_compute_sanitizer(tool):
    sanitizer = shutil.which("compute-sanitizer")
    assert sanitizer, "compute-sanitizer, of the CUDA toolkit, is not on the PATH; without it, deselect this test"
    # Without torch's cache every tensor is an allocation of its own, so that the sanitizer sees its end.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sanitizer, "--tool", tool, "--error-exitcode", "99", sys.executable, "-c", SANITIZED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
