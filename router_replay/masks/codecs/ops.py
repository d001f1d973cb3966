"""The ops of `torch.ops.routing_masks`: what they are, the libraries with kernels, and plain torch in their place.

    pack                 indices int [..., L, K] -> rows uint8 [..., row_bytes]
    take_rows            a pass's rows out of a staging buffer int16 [max_tokens, L, K or more], which is reset
    unpack_indices       rows -> int32 [..., L, K]
    unpack_layer         one MoE layer of the rows -> int32 [..., K]
    unpack_indices_out   as unpack_indices, into a contiguous tensor that is given: int16, int32 or int64
    unpack_layer_out     as unpack_layer, into a tensor that is given
    unpack_bitset        one MoE layer of the rows -> bool [..., E], the routing map that dispatchers take
    legal_indices        whether indices are K different experts, bool [..., L]
    legal_rows           whether a row's fields are such that `pack` can have written them, bool [..., L]

Indices are uint8, int16, uint16, int32 or int64, of any strides and leading shape; L = MoE layers, K = top-k,
E = experts; `layer_index` is among the L. `router_replay.masks.codecs.reference` says what each of them means.
The ops check shapes and raise RuntimeError; values they check on the CPU only, since elsewhere it would wait for the
device. `Codec` adds errors that name tokens and decoder layers.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from router_replay.errors import DataError
from router_replay.masks.codecs import reference
from router_replay.masks.codecs.registry import CODES
from router_replay.masks.limits import MAX_EXPERTS, MAX_RANK_BITS, MAX_TOP_K

_GEOMETRY = "int num_layers, int num_experts, int top_k, str codec"
_SCHEMAS: dict[Callable[..., object], str] = {
    reference.pack: "pack(Tensor indices, int num_experts, str codec) -> Tensor",
    reference.unpack_indices: f"unpack_indices(Tensor rows, {_GEOMETRY}) -> Tensor",
    reference.unpack_layer: f"unpack_layer(Tensor rows, int layer_index, {_GEOMETRY}) -> Tensor",
    reference.take_rows: (
        "take_rows(Tensor(a!) staging, int first, int last, int end, int num_experts, int top_k, str codec)"
        " -> (Tensor, Tensor)"
    ),
    reference.unpack_indices_out: f"unpack_indices_out(Tensor rows, {_GEOMETRY}, Tensor(a!) out) -> ()",
    reference.unpack_layer_out: f"unpack_layer_out(Tensor rows, int layer_index, {_GEOMETRY}, Tensor(a!) out) -> ()",
    reference.unpack_bitset: f"unpack_bitset(Tensor rows, int layer_index, {_GEOMETRY}) -> Tensor",
    reference.legal_indices: "legal_indices(Tensor indices, int num_experts) -> Tensor",
    reference.legal_rows: f"legal_rows(Tensor rows, {_GEOMETRY}) -> Tensor",
}

# The schemas are defined here and not in the libraries, which only add kernels: the ops are the same with or without
# them, whichever loads.
_library = torch.library.Library("routing_masks", "DEF")


def _fake_pack(indices: Tensor, num_experts: int, codec: str) -> Tensor:
    *leading, num_layers, top_k = indices.shape
    width = reference.row_bytes(codec, num_layers, num_experts, int(top_k))
    return indices.new_empty((*leading, width), dtype=torch.uint8)


def _fake_take_rows(
    staging: Tensor, first: int, last: int, end: int, num_experts: int, top_k: int, codec: str
) -> tuple[Tensor, Tensor]:
    width = reference.row_bytes(codec, staging.shape[1], num_experts, top_k)
    rows = staging.new_empty((last - first, width), dtype=torch.uint8)
    return rows, staging.new_empty(last - first, dtype=torch.bool)


def _fake_unpack_out(*args: object) -> None:
    """Nothing is made: the caller's tensor is written to."""


def _fake_unpack_indices(rows: Tensor, num_layers: int, num_experts: int, top_k: int, codec: str) -> Tensor:
    return rows.new_empty((*rows.shape[:-1], num_layers, top_k), dtype=torch.int32)


def _fake_unpack_layer(
    rows: Tensor, layer_index: int, num_layers: int, num_experts: int, top_k: int, codec: str
) -> Tensor:
    return rows.new_empty((*rows.shape[:-1], top_k), dtype=torch.int32)


def _fake_unpack_bitset(
    rows: Tensor, layer_index: int, num_layers: int, num_experts: int, top_k: int, codec: str
) -> Tensor:
    return rows.new_empty((*rows.shape[:-1], num_experts), dtype=torch.bool)


def _fake_legal_indices(indices: Tensor, num_experts: int) -> Tensor:
    return indices.new_empty(indices.shape[:-1], dtype=torch.bool)


def _fake_legal_rows(rows: Tensor, num_layers: int, num_experts: int, top_k: int, codec: str) -> Tensor:
    return rows.new_empty((*rows.shape[:-1], num_layers), dtype=torch.bool)


_FAKES: dict[str, Callable[..., object]] = {
    "pack": _fake_pack,
    "take_rows": _fake_take_rows,
    "unpack_indices_out": _fake_unpack_out,
    "unpack_layer_out": _fake_unpack_out,
    "unpack_indices": _fake_unpack_indices,
    "unpack_layer": _fake_unpack_layer,
    "unpack_bitset": _fake_unpack_bitset,
    "legal_indices": _fake_legal_indices,
    "legal_rows": _fake_legal_rows,
}


def _define() -> None:
    for in_plain_torch, schema in _SCHEMAS.items():
        name = in_plain_torch.__name__
        _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.register_fake(f"routing_masks::{name}", _FAKES[name], lib=_library)
        # A kernel for a device goes before this one, which is for all devices.
        _library.impl(name, in_plain_torch, "CompositeExplicitAutograd")


# What a library's docstring says that was built from the same lists and limits: see csrc/codes.h.
_BUILT_FOR = (
    f"codecs {', '.join(CODES)}; up to {MAX_EXPERTS} experts, top-{MAX_TOP_K}, ranks of up to {MAX_RANK_BITS} bits"
)


def _load(library: str, needs: str) -> str | None:
    """Load the library of one kind of device; why that is not possible, or None.

    Raises:
        DataError: it was built for other codecs or limits than those of this package.
    """
    try:
        module = importlib.import_module(f"router_replay.masks.codecs.{library}")
    except ModuleNotFoundError:
        return f"{library} was not built when this package was installed, which needs {needs}"
    except ImportError as error:
        return f"{library} does not load with torch {torch.__version__}: {error}"
    if module.__doc__ != _BUILT_FOR:
        # Its kernels are registered by now, so there is no going on without them.
        raise DataError(
            f"{module.__file__} was built from other sources, for {module.__doc__ or 'what it does not say'}, and this"
            f" package is for {_BUILT_FOR}. Build it anew (install the package once more), or delete it to go on in"
            " plain torch; a new codec has to be in the list of csrc/codes.h, too, in the order of registry.py"
        )
    return None


# By device: the library, and what its build needs. Of CUDA there may be several, for torch's of different CUDA majors.
_LIBRARIES = {"cpu": ("_kernels_cpu", "a C++17 compiler")}
if torch.version.cuda is not None:
    _major = torch.version.cuda.partition(".")[0]
    _LIBRARIES["cuda"] = (f"_kernels_cuda{_major}", f"nvcc of CUDA {_major} and a torch with it")


def _is_present(device: str) -> bool:
    if device == "cpu":
        return True
    # torch.cuda counts without starting CUDA, which would break processes that are forked later.
    return (torch.cuda if device == "cuda" else torch.accelerator).device_count() > 0


_define()
OPS = torch.ops.routing_masks
"""The ops, defined as soon as this module is imported."""
MISSING_KERNELS: dict[str, str] = {}
"""Devices ("cpu", "cuda") whose kernels could not be loaded, and why; plain torch runs in their place."""
for _device, (_name, _needs) in _LIBRARIES.items():
    if (_reason := _load(_name, _needs)) is not None:
        MISSING_KERNELS[_device] = _reason
_accelerator = torch.accelerator.current_accelerator()
if _accelerator is not None and _accelerator.type not in _LIBRARIES:
    MISSING_KERNELS[_accelerator.type] = "there are kernels for CPUs and for CUDA devices only"
_missed = [name for name in MISSING_KERNELS if _is_present(name)]
if _missed:
    warnings.warn(
        "routing masks are packed by plain torch, which is right but many times slower, because the kernels are"
        f" missing: {'; '.join(f'{name}: {MISSING_KERNELS[name]}' for name in _missed)}. Install a wheel for this"
        " torch, or build from source beside it.",
        RuntimeWarning,
        stacklevel=2,
    )
