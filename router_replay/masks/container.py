"""RoutingMasks <-> safetensors bytes: tensors `rows` and `valid`, the small fields in `__metadata__`."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping

import safetensors.torch
import torch
from safetensors import SafetensorError

from router_replay.errors import DataError, RouterReplayError
from router_replay.masks.codecs.row_codec import get_codec
from router_replay.masks.geometry import RoutingGeometry
from router_replay.masks.masks import RoutingMasks

FORMAT = "routing_masks"
FORMAT_VERSION = "1"


def to_bytes(masks: RoutingMasks) -> bytes:
    """Masks as an ordinary safetensors file, which any tool that knows safetensors can open."""
    geometry = masks.geometry
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "codec": masks.codec,
        "geometry": _dense_json([geometry.num_layers, geometry.num_experts, geometry.top_k, geometry.moe_layers]),
        "start": str(masks.start),
        "token_digest": masks.token_digest,
        "weight_versions": _dense_json(masks.weight_versions),
    }
    tensors = {"rows": masks.rows.cpu().contiguous(), "valid": masks.valid.cpu().contiguous()}
    metadata["crc32"] = _checksum(tensors, metadata)
    return safetensors.torch.save(tensors, metadata)


def from_bytes(data: bytes) -> RoutingMasks:
    """Read masks written by `to_bytes`, and check that the valid rows are rows that the codec can have written.

    Raises:
        DataError: truncated or foreign bytes, a format version that this code does not know, or corrupted rows.
    """
    try:
        tensors = safetensors.torch.load(data)
        metadata = _metadata(data)
    except (SafetensorError, ValueError, struct.error) as error:
        raise DataError(
            f"these {len(data)} bytes are not a whole safetensors file ({error}): truncated in transfer, or foreign"
        ) from error
    if metadata.get("format") != FORMAT:
        raise DataError(
            f"a safetensors file of format {metadata.get('format')!r} with tensors {sorted(tensors)}, not {FORMAT!r}"
        )
    if metadata.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"format version {metadata.get('format_version')!r}: this version of router_replay.masks reads version"
            f" {FORMAT_VERSION!r}; use the same release at both ends"
        )
    try:
        num_layers, num_experts, top_k, moe_layers = json.loads(metadata["geometry"])
        if not all(type(number) is int for number in (num_layers, num_experts, top_k, *moe_layers)):
            raise TypeError(f"geometry {metadata['geometry']} has numbers that are not integers")
        masks = RoutingMasks(
            rows=tensors["rows"],
            valid=tensors["valid"],
            start=int(metadata["start"]),
            geometry=RoutingGeometry(num_layers, tuple(moe_layers), num_experts, top_k),
            codec=metadata["codec"],
            weight_versions=tuple((int(position), str(version)) for position, version in _runs(metadata)),
            token_digest=metadata["token_digest"],
        )
        get_codec(masks.codec).check_rows(masks.rows, masks.geometry, masks.valid)
    except RouterReplayError as error:
        raise DataError(f"a {FORMAT} file contradicts itself: {error}") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DataError(f"a {FORMAT} file lacks or garbles a field: {error!r}; it was written wrongly") from error
    if metadata.get("crc32") != (found := _checksum(tensors, metadata)):
        raise DataError(
            f"masks were written with CRC-32 {metadata.get('crc32')}, those read have {found}: corrupted in transfer or"
            " on disk"
        )
    return masks


def _checksum(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    # Most flipped bits of a packed row give another legal row, so the codec alone cannot see them.
    fields = sorted((key, value) for key, value in metadata.items() if key != "crc32")
    checksum = zlib.crc32(_dense_json(fields).encode())
    for name in ("rows", "valid"):
        checksum = zlib.crc32(tensors[name].numpy().data, checksum)
    return f"{checksum:08x}"


def _metadata(data: bytes) -> Mapping[str, str]:
    # safetensors offers the metadata of files by path only; the layout is 8 bytes of length, then JSON.
    (length,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + length]).get("__metadata__") or {}


def _runs(metadata: Mapping[str, str]) -> list[list]:
    return json.loads(metadata["weight_versions"])


def _dense_json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
