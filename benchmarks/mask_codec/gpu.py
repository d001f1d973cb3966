"""Throughput of the kernels on a CUDA device, beside a copy of as many bytes and flashinfer's packbits."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.interleaved import median_event_seconds
from router_replay.masks import CODEC_NAMES, Codec, RoutingGeometry, get_codec
from router_replay.masks.codecs.ops import OPS
from sglang_router_capture.staging import Staging

# Rows of a pass: one token decoded, a batch of them, and a prefill that fills the staging buffer.
PASSES = (1, 256, 8192)

# What runs, and how many bytes it has to read and write.
Variants = dict[str, tuple[Callable[[], Any], int]]


class Speed(NamedTuple):
    """Median time of a variant, and the bytes that it has to read and write in it."""

    microseconds: float
    gigabytes_per_second: float


def speeds_on_gpu(geometry: RoutingGeometry, indices: Tensor, rounds: int) -> dict[str, Speed]:
    """Speeds of each variant, medians of `rounds` interleaved rounds.

    Args:
        indices: `int16 [T, L, K]` on the CPU.
    """
    on_device = indices.cuda()
    copied = torch.empty_like(on_device)
    variants: Variants = {
        "device-to-device copy of the indices": (lambda: copied.copy_(on_device), 2 * on_device.nbytes)
    }
    staging = Staging(geometry, max(PASSES), 0, "cuda")
    # Fewer tokens than the buffer holds are there more than once.
    reported = on_device[torch.arange(max(PASSES), device="cuda") % len(on_device)]
    for codec in (codec for codec in map(get_codec, CODEC_NAMES) if codec.can_write(geometry)):
        variants |= _of_codec(codec, geometry, on_device)
        variants |= _of_passes(codec, geometry, staging)
    if importlib.util.find_spec("flashinfer"):
        flashinfer = importlib.import_module("flashinfer")
        mask = torch.zeros((*indices.shape[:2], geometry.num_experts), dtype=torch.bool, device="cuda")
        one_hot = mask.scatter_(-1, on_device.long(), True).view(-1)
        variants["flashinfer.packbits of the one-hot masks"] = (
            lambda: flashinfer.packbits(one_hot, bitorder="little"),
            one_hot.nbytes + one_hot.nbytes // 8,
        )
    seconds = median_event_seconds(
        {name: run for name, (run, _) in variants.items()}, rounds, before=lambda: staging.buffer.copy_(reported)
    )
    return {name: Speed(seconds[name] * 1e6, size / seconds[name] / 1e9) for name, (_, size) in variants.items()}


def _of_codec(codec: Codec, geometry: RoutingGeometry, on_device: Tensor) -> Variants:
    """Packing `int16 [T, L, K]`, and reading the rows."""
    arguments = geometry.num_moe_layers, geometry.num_experts, geometry.top_k, codec.name
    rows = OPS.pack(on_device, geometry.num_experts, codec.name)
    unpacked = OPS.unpack_indices(rows, *arguments)
    layer = OPS.unpack_layer(rows, 0, *arguments)
    one_layer_of_rows = rows.numel() // geometry.num_moe_layers
    return {
        f"{codec.name}: pack": (
            lambda: OPS.pack(on_device, geometry.num_experts, codec.name),
            on_device.nbytes + rows.nbytes,
        ),
        f"{codec.name}: unpack_indices": (
            lambda: OPS.unpack_indices(rows, *arguments),
            rows.nbytes + unpacked.nbytes,
        ),
        f"{codec.name}: unpack_layer": (
            lambda: OPS.unpack_layer(rows, 0, *arguments),
            one_layer_of_rows + layer.nbytes,
        ),
    }


def _of_passes(codec: Codec, geometry: RoutingGeometry, staging: Staging) -> Variants:
    """Rows of a pass out of the staging buffer, all of which is set back, by one op and by several.

    Both have to read what is packed, to write the rows, and to write the buffer.
    """
    variants: Variants = {}
    for num_rows in PASSES:
        size = staging.buffer[:num_rows].nbytes + num_rows * codec.row_bytes(geometry) + staging.buffer.nbytes
        title = f"{num_rows:,} of {len(staging.buffer):,} rows"
        variants[f"{codec.name}: take_rows, {title}"] = (
            lambda num_rows=num_rows: staging.take_rows(codec, 0, num_rows),
            size,
        )
        variants[f"{codec.name}: take and pack, {title}"] = (
            lambda num_rows=num_rows: codec.pack(staging.take(0, num_rows)[0], geometry),
            size,
        )
    return variants
