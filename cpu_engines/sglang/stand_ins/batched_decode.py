"""Attention of SGLang's `torch_native` backend for a decode batch in one call, in place of one for each request."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def supply() -> None:
    """Let `TorchNativeAttnBackend` decode so; what it does for encoders and sliding windows stays its own."""
    # Imported here: of all servers, only those that were asked for it need this.
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    one_by_one = TorchNativeAttnBackend._run_sdpa_forward_decode

    @functools.wraps(one_by_one)
    def batched(
        self: TorchNativeAttnBackend,
        query: Tensor,
        output: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        req_to_token: Tensor,
        req_pool_indices: Tensor,
        seq_lens: Tensor,
        encoder_lens: Tensor | None = None,
        **others: object,
    ) -> Tensor:
        if encoder_lens is not None or others.get("sliding_window_size") is not None or others.get("is_cross_attn"):
            return one_by_one(
                self, query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, encoder_lens, **others
            )
        slots, real = _slots(req_to_token, req_pool_indices, seq_lens)
        found = scaled_dot_product_attention(
            query[:, :, None],
            k_cache[slots].transpose(1, 2).to(query.dtype),
            v_cache[slots].transpose(1, 2).to(query.dtype),
            attn_mask=real[:, None, None],
            enable_gqa=others.get("enable_gqa", False),
            scale=others.get("scaling"),
        )
        output[:] = found[:, :, 0]
        return output

    TorchNativeAttnBackend._run_sdpa_forward_decode = batched


def _slots(req_to_token: Tensor, req_pool_indices: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
    """KV slots of B requests, int `[B, L]`, and which of them are theirs, bool `[B, L]`; the rest repeats the first."""
    places = torch.arange(int(seq_lens.max()), device=req_to_token.device)
    slots = req_to_token[req_pool_indices, : len(places)]
    real = places < seq_lens[:, None]
    # A slot of nobody's might hold a NaN, which no mask takes out of a sum.
    return torch.where(real, slots, slots[:, :1]), real
