"""Gates and their gradients under replay are those of the paper's formula, and reach no expert outside the mask.

    g_i = I_i exp(s_i) / sum_j I_j exp(s_j)      dg_i/ds_j = g_i (delta_ij - g_j) for i, j in I, else 0

(arXiv 2510.11370)
"""

from __future__ import annotations

import pytest
import torch

from cpu_engines.megatron.logprobs import token_logprobs
from megatron_router_replay import attach
from router_replay.masks.masks import RoutingMasks
from tests.megatron_router_replay.batches import random_batch
from tests.megatron_router_replay.router_gradient import LayerProbe, assert_gradient_is_the_formula


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_router_gradient_is_the_formula_in_every_layer(build_model, geometry, dispatcher, dtype, tolerance):
    # Megatron computes gates in float32 whatever the model's dtype: eps 1.2e-7, summed over K = 4 gates and averaged
    # out over rows, bounds the float64 model's relative error by 1e-6; a float32 model adds sums of n <= 80 products
    # (n * eps = 1e-5) on either side of the router.
    model = build_model(dtype=dtype, moe_token_dispatcher_type=dispatcher)
    batch = random_batch(geometry, (12, 9, 5), seed=7)
    probes = {layer: LayerProbe(model.decoder.layers[layer].mlp) for layer in geometry.moe_layers}
    with attach(model, overlap_every=None) as replay, replay.microbatch(batch.masks, batch.layout):
        logprobs = token_logprobs(model, batch.token_ids)
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(8), dtype=logprobs.dtype)
    (logprobs * weights).sum().backward()
    for layer, probe in probes.items():
        probe.close()
        for place, experts in batch.recorded(layer):
            assert set(probe.map[place].nonzero().flatten().tolist()) == experts
        assert_gradient_is_the_formula(probe, tolerance)


def test_unrouted_experts_get_no_gradient(build_model, geometry):
    """Every token of every layer is sent to experts 0..3: the others' weights must stay without a gradient."""
    model, batch = build_model(), random_batch(geometry, (8,), seed=9)
    indices = torch.arange(4).expand(8, geometry.num_moe_layers, 4)
    masks = RoutingMasks.from_indices(
        indices,
        torch.ones(8, dtype=torch.bool),
        start=0,
        geometry=geometry,
        codec="bitset",
        token_ids=batch.token_ids[0],
    )
    with attach(model, overlap_every=None) as replay, replay.microbatch([masks], batch.layout):
        token_logprobs(model, batch.token_ids).sum().backward()
    for layer in geometry.moe_layers:
        for index, expert in enumerate(model.decoder.layers[layer].mlp.experts.local_experts):
            gradient = expert.linear_fc2.weight.grad
            if index < 4:
                assert gradient.abs().max() > 0
            else:
                assert gradient is None or not gradient.any()
        router_gradient = model.decoder.layers[layer].mlp.router.weight.grad
        assert not router_gradient[4:].any()
        assert router_gradient[:4].abs().max() > 0
