"""Decoding a batch in one call gives what SGLang's loop over its requests gives."""

from __future__ import annotations

import pytest
import torch

from cpu_engines.sglang.server import BATCHED_DECODE, STAND_INS


@pytest.fixture
def both(monkeypatch):
    monkeypatch.syspath_prepend(str(STAND_INS))
    import sglang_cpu_engine
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    one_by_one = TorchNativeAttnBackend._run_sdpa_forward_decode
    # Put back when the test is over.
    monkeypatch.setattr(TorchNativeAttnBackend, "_run_sdpa_forward_decode", one_by_one)
    sglang_cpu_engine.load()
    assert TorchNativeAttnBackend._run_sdpa_forward_decode is one_by_one
    for name, value in BATCHED_DECODE.items():
        monkeypatch.setenv(name, value)
    sglang_cpu_engine.load()
    assert TorchNativeAttnBackend._run_sdpa_forward_decode is not one_by_one
    return one_by_one, TorchNativeAttnBackend._run_sdpa_forward_decode


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 4), (6, 1)])
def test_a_batch_is_what_its_requests_are(both, heads, kv_heads):
    generator = torch.Generator().manual_seed(heads)
    lengths = torch.tensor([1, 17, 5, 40])
    slots = torch.randperm(200, generator=generator)[:160].view(4, 40)
    keys, values = (torch.randn(200, kv_heads, 32, generator=generator) for _ in range(2))
    # What nobody's slot holds must not matter.
    nobodys = torch.ones(200, dtype=torch.bool)
    for row, length in zip(slots, lengths.tolist(), strict=True):
        nobodys[row[:length]] = False
    keys[nobodys], values[nobodys] = torch.nan, torch.nan
    query = torch.randn(4, heads, 32, generator=generator)
    arguments = (keys, values, slots[[2, 0, 3, 1]], torch.tensor([1, 3, 0, 2]), lengths)
    found = [
        each(None, query, torch.empty_like(query), *arguments, scaling=0.17, enable_gqa=heads != kv_heads)
        for each in both
    ]
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    assert found[0].isfinite().all()


def test_windows_are_left_to_the_loop(both):
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend as backend

    query, cache = torch.randn(2, 2, 8), torch.randn(30, 2, 8)
    slots = torch.arange(30).view(2, 15)
    arguments = (cache, cache, slots, torch.tensor([0, 1]), torch.tensor([15, 9]))
    found = [each(backend, query, torch.empty_like(query), *arguments, sliding_window_size=3) for each in both]
    assert torch.equal(*found)
