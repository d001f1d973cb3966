"""RoutingMasks <-> safetensors: tensors `rows` and `valid`, the small fields in `__metadata__`; bytes or a file."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from router_replay.errors import DataError, InputError, RouterReplayError
from router_replay.files import write_whole
from router_replay.masks.codecs.row_codec import get_codec
from router_replay.masks.geometry import RoutingGeometry
from router_replay.masks.masks import RoutingMasks

FORMAT = "routing_masks"
FORMAT_VERSION = "1"


def save_file(masks: RoutingMasks, path: str | PathLike[str]) -> None:
    """Write masks into an ordinary safetensors file, which is there whole or not at all.

    Args:
        path: the file, of any name; its folder is made where it is missing, and a file of that name is replaced.

    Raises:
        InputError: `masks` are no RoutingMasks, or `path` is a folder.
        OSError: the folder or the file cannot be written.
    """
    data, target = to_bytes(masks), _path(path, "save_file(masks, path)")
    if target.is_dir():
        raise InputError(f"{target} is a folder: name the file in it, {target / 'masks.safetensors'} for example")
    write_whole(target, lambda partial: partial.write_bytes(data))


def load_file(path: str | PathLike[str]) -> RoutingMasks:
    """Read masks from a file written by `save_file`.

    Raises:
        InputError: `path` is no path.
        DataError: no such file, a folder, a file that cannot be read, or one that `from_bytes` refuses.
    """
    source = _path(path, "load_file(path); of a handle take load(handle), of bytes from_bytes(data)")
    try:
        data = source.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{source}: no such file; masks are written there by save_file(masks, path)") from None
    except IsADirectoryError:
        raise DataError(f"{source} is a folder: name one of the files in it") from None
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror}") from error
    try:
        return from_bytes(data)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


def map_file(path: str | PathLike[str], crc32: str | None = None) -> RoutingMasks:
    """The masks in a local file, whose rows are its pages in memory and not a copy of them.

    The mapping is private: writing into the rows changes no file. They stay when the file is removed or another one is
    renamed onto it, and are lost, with the process, when somebody truncates it in place, which no store does.

    Args:
        crc32: checksum that the file must say it has, `stated_crc32` of the bytes that were written.

    Raises:
        FileNotFoundError: no such file.
        OSError: a file that cannot be read.
        DataError: a file that `from_bytes` refuses, or one with another checksum.
    """
    source = _path(path, "map_file(path)")
    try:
        # Opened first, for errors that say more than the library's own.
        with source.open("rb"), safe_open(source, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
    except (SafetensorError, ValueError) as error:
        raise DataError(f"{source} is not a whole safetensors file ({error}): truncated, or foreign") from error
    try:
        return _checked(tensors, metadata, crc32)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


def stated_crc32(data: bytes) -> str:
    """The checksum that a container of `to_bytes` says it has, over everything else in it."""
    return _metadata(data)["crc32"]


def to_bytes(masks: RoutingMasks) -> bytes:
    """Masks as the bytes of an ordinary safetensors file, which any tool that knows safetensors can open.

    Raises:
        InputError: no RoutingMasks.
    """
    if not isinstance(masks, RoutingMasks):
        raise InputError(
            f"expected RoutingMasks, got a {type(masks).__name__}: of an answer take masks_from_meta_info(meta_info),"
            " of a handle load(handle)"
        )
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


def from_bytes(data: bytes | bytearray | memoryview, crc32: str | None = None) -> RoutingMasks:
    """Read masks written by `to_bytes`, and check that the valid rows are rows that the codec can have written.

    Args:
        crc32: checksum that the container must say it has, `stated_crc32` of the bytes that were written.

    Raises:
        InputError: a path or text in the place of bytes.
        DataError: truncated or foreign bytes, a format version that this code does not know, corrupted rows, or masks
            with another checksum.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        way_out = "of a file take load_file(path), of a handle load(handle)"
        raise InputError(f"from_bytes takes the bytes of a container, got a {type(data).__name__}: {way_out}")
    data = bytes(data)
    try:
        tensors = safetensors.torch.load(data)
        metadata = _metadata(data)
    except (SafetensorError, ValueError, struct.error) as error:
        raise DataError(
            f"these {len(data)} bytes are not a whole safetensors file ({error}): truncated in transfer, or foreign"
        ) from error
    return _checked(tensors, metadata, crc32)


def _checked(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], crc32: str | None) -> RoutingMasks:
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
    if crc32 not in (None, found):
        raise DataError(f"masks with CRC-32 {found} lie where those with {crc32} were put: they are another sequence's")
    return masks


def _path(path: str | PathLike[str], expected: str) -> Path:
    try:
        return Path(path)
    except TypeError:
        raise InputError(f"a {type(path).__name__} is no path: {expected}") from None


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
