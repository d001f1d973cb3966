"""Throughput of the kernels on a CUDA device, beside a copy of as many bytes and flashinfer's packbits."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.interleaved import median_event_seconds
from router_replay.masks import CODEC_NAMES, RoutingGeometry, get_codec
from router_replay.masks.codecs.ops import OPS


def gigabytes_per_second(geometry: RoutingGeometry, indices: Tensor, rounds: int) -> dict[str, float]:
    """Bytes read and written per second by each variant, medians of `rounds` interleaved rounds.

    Args:
        indices: `int16 [T, L, K]` on the CPU.
    """
    on_device = indices.cuda()
    arguments = geometry.num_moe_layers, geometry.num_experts, geometry.top_k
    copied = torch.empty_like(on_device)
    variants: dict[str, tuple[Callable[[], Any], int]] = {
        "device-to-device copy of the indices": (lambda: copied.copy_(on_device), 2 * on_device.nbytes)
    }
    for codec in (name for name in CODEC_NAMES if get_codec(name).can_write(geometry)):
        rows = OPS.pack(on_device, geometry.num_experts, codec)
        unpacked = OPS.unpack_indices(rows, *arguments, codec)
        layer = OPS.unpack_layer(rows, 0, *arguments, codec)
        one_layer_of_rows = rows.numel() // geometry.num_moe_layers
        variants[f"{codec}: pack"] = (
            lambda codec=codec: OPS.pack(on_device, geometry.num_experts, codec),
            on_device.nbytes + rows.nbytes,
        )
        variants[f"{codec}: unpack_indices"] = (
            lambda codec=codec, rows=rows: OPS.unpack_indices(rows, *arguments, codec),
            rows.nbytes + unpacked.nbytes,
        )
        variants[f"{codec}: unpack_layer"] = (
            lambda codec=codec, rows=rows: OPS.unpack_layer(rows, 0, *arguments, codec),
            one_layer_of_rows + layer.nbytes,
        )
    if importlib.util.find_spec("flashinfer"):
        flashinfer = importlib.import_module("flashinfer")
        mask = torch.zeros((*indices.shape[:2], geometry.num_experts), dtype=torch.bool, device="cuda")
        one_hot = mask.scatter_(-1, on_device.long(), True).view(-1)
        variants["flashinfer.packbits of the one-hot masks"] = (
            lambda: flashinfer.packbits(one_hot, bitorder="little"),
            one_hot.nbytes + one_hot.nbytes // 8,
        )
    seconds = median_event_seconds({name: run for name, (run, _) in variants.items()}, rounds)
    return {name: num_bytes / seconds[name] / 1e9 for name, (_, num_bytes) in variants.items()}
