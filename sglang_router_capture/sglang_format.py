"""Routes in SGLang's own format, packed on their way from the scheduler to the process that writes the answer.

Of Qwen3-30B a token is 336 bytes of packed rows and 1,536 bytes in that format. The scheduler, which computes nothing
meanwhile, gathers and sends the first; who writes the answer makes the second of it.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import torch
from torch import Tensor

from router_replay.masks import Codec, RoutingGeometry, get_codec

_LENGTH_BYTES = 4


def packed(rows: Tensor, valid: Tensor, geometry: RoutingGeometry, codec: Codec) -> Tensor:
    """Rows that say themselves what they are, as one tensor `uint8 [n]`.

    Args:
        rows: `uint8 [tokens, row_bytes]`.
        valid: `bool [tokens]`.
    """
    header = json.dumps({"codec": codec.name, "tokens": len(rows), **asdict(geometry)}).encode()
    # No whole number of int32: whoever takes it for what SGLang sends, since nobody unpacked it, cannot read it.
    header += b" " * ((1 - _LENGTH_BYTES - len(header) - len(rows) * (rows.shape[1] + 1)) % 4)
    head = len(header).to_bytes(_LENGTH_BYTES, "little") + header
    return torch.cat([torch.frombuffer(bytearray(head), dtype=torch.uint8), valid.view(torch.uint8), rows.flatten()])


def is_packed(routes: object) -> bool:
    """Whether these are packed; SGLang's own are int32."""
    return isinstance(routes, Tensor) and routes.dtype == torch.uint8


def unpacked(routes: Tensor) -> Tensor:
    """What `packed` packed, as SGLang sends it: `int32 [tokens, decoder layers, K]`.

    Dense layers are zeros, as SGLang sends them. A row that is not valid is -1 in every MoE layer: SGLang would send
    zeros or another request's experts there.
    """
    end = _LENGTH_BYTES + int.from_bytes(bytes(routes[:_LENGTH_BYTES].tolist()), "little")
    header = json.loads(bytes(routes[_LENGTH_BYTES:end].tolist()))
    tokens, codec = header.pop("tokens"), get_codec(header.pop("codec"))
    geometry = RoutingGeometry(**{**header, "moe_layers": tuple(header["moe_layers"])})
    valid = routes[end : end + tokens].view(torch.bool)
    rows = routes[end + tokens :].view(tokens, codec.row_bytes(geometry))
    experts = codec.unpack_valid(rows, valid, geometry)
    if geometry.num_moe_layers == geometry.num_layers:
        return experts
    full = torch.zeros((tokens, geometry.num_layers, geometry.top_k), dtype=torch.int32)
    full[:, list(geometry.moe_layers)] = experts
    return full
