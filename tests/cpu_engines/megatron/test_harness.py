"""The CPU harness is scoped: what it replaces is put back."""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from cpu_engines.megatron import CpuDevice, PackedDotProductAttention, single_process
from cpu_engines.megatron.logprobs import forward_logits


def _touched() -> list[object]:
    names = ("current_device", "Stream", "Event", "current_stream", "stream", "synchronize")
    return [
        *(vars(torch.cuda)[name] for name in names),
        vars(torch.Tensor).get("record_stream"),
        megatron_random._get_cuda_rng_state,
        megatron_random._set_cuda_rng_state,
        vars(megatron_random.CudaRNGStatesTracker)["fork"],
        vars(WrappedTorchNorm)["__new__"],
    ]


def test_device_is_put_back():
    before = _touched()
    device = CpuDevice()
    device.apply()
    device.apply()
    # The folder's own CpuDevice is in place already; only its functions are new objects each time.
    functions = [(now, then) for now, then in zip(_touched(), before, strict=True) if not isinstance(then, type)]
    assert len(functions) == 9 and all(now is not then for now, then in functions)
    assert torch.zeros(1, device="cuda").device.type == "cpu"
    assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.zeros(1).type(torch.int64).dtype == torch.int64
    device.remove()
    device.remove()
    assert all(now is then for now, then in zip(_touched(), before, strict=True))


def test_a_second_world_is_refused():
    with pytest.raises(RuntimeError, match=r"already initialised with 1 rank\(s\)"), single_process():
        pass


def test_packed_attention_is_megatrons_own_per_sequence(build_model, batch):
    """Each sequence of a pack alone gives the very same logits: no token sees another sequence."""
    model = build_model(core_attention=PackedDotProductAttention)
    stock = build_model(core_attention=None)
    packed = forward_logits(model, batch.packed_ids, batch.cu_seqlens)[0]
    for index, part in enumerate(packed.split(batch.lengths)):
        alone = forward_logits(stock, batch.token_ids[index : index + 1, : batch.lengths[index]])[0]
        # Sums of at most 80 terms in 8 products of 4 layers, reordered by the other matrix shapes.
        torch.testing.assert_close(part, alone, rtol=0, atol=80 * 8 * 4 * torch.finfo(torch.float32).eps)
