"""Gates and their gradients under replay are those of each family's formula, and reach no expert outside the mask."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hf_router_replay import attach
from hf_router_replay.live_model import find_routers
from router_replay.masks.masks import RoutingMasks
from tests.hf_router_replay.small_models import (
    FAMILIES,
    HIDDEN,
    NUM_EXPERTS,
    SIGMOID,
    batch_of,
    blocks,
    build,
    logits_of,
    loss_of,
    router_of,
    router_outputs,
)
from tests.random_batches import gradients

families = pytest.mark.parametrize("family", FAMILIES)
# Each family as it comes, and, of those that let a configuration choose, the other way.
FORMULAS = [(family, {}) for family in FAMILIES]
FORMULAS += [(family, {"norm_topk_prob": False}) for family in ("qwen3_moe", "qwen3_next", "glm4_moe", "deepseek_v3")]
FORMULAS.append(("olmoe", {"norm_topk_prob": True}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "settings"), FORMULAS)
def test_gates_at_own_experts_are_the_routers_own(family, settings, dtype):
    model = build(family, dtype=dtype, **settings)
    router = next(iter(find_routers(model).values()))
    hidden = torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(3)).to(dtype)
    logits, gates, experts = router.module(hidden)
    ours = router.family.gates(router.module, logits, experts)
    assert ours.dtype == gates.dtype
    assert torch.equal(ours, gates)


class Probe:
    """Input, output and gradient of the output of one live MoE layer."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.handle = block.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
        self.input = args[0].detach().reshape(-1, HIDDEN).double()
        self.output = output[0] if isinstance(output, tuple) else output
        self.output.retain_grad()


def dense_gates(family: str, router: nn.Module, scores: Tensor, mask: Tensor, norm: bool) -> Tensor:
    """Gates of all experts `[n, E]`, 0 outside of the mask: the papers' formulas."""
    if family == "gpt_oss":
        gates = torch.where(mask, scores.exp(), 0.0)
        return gates / gates.sum(-1, keepdim=True)
    if family in SIGMOID:
        gates = torch.where(mask, 1 / (1 + (-scores).exp()), 0.0)
        return 1.5 * (gates / gates.sum(-1, keepdim=True) if norm else gates)
    gates = torch.where(mask, scores.exp() / scores.exp().sum(-1, keepdim=True), 0.0)
    return gates / gates.sum(-1, keepdim=True) if norm else gates


@pytest.mark.parametrize(("family", "settings"), FORMULAS)
def test_router_gradient_is_the_formula_in_every_layer(family, settings):
    """Against a mixture of all experts in float64, in which the mask is written out."""
    norm = settings.get("norm_topk_prob", family != "olmoe")
    model, batch = build(family, **settings), batch_of(family)
    probes = {layer: Probe(block) for layer, block in blocks(model).items()}
    with (
        attach(model, overlap_every=None) as replay,
        router_outputs(model) as outputs,
        replay.microbatch(batch.masks, batch.layout),
    ):
        loss = loss_of(logits_of(model, batch), batch)
    loss.backward()
    for layer, probe in probes.items():
        router = router_of(probe.block)
        ((_, gates, experts),) = outputs[layer]
        mask = torch.zeros(len(experts), NUM_EXPERTS, dtype=torch.bool).scatter(1, experts, True)
        weight = router.weight.detach().double().requires_grad_()
        bias = router.bias.detach().double() if family == "gpt_oss" else 0.0
        dense = dense_gates(family, router, probe.input @ weight.T + bias, mask, norm)
        alone = copy.deepcopy(probe.block.experts).double()
        ones = torch.ones(len(experts), 1, dtype=torch.float64)
        with torch.no_grad():
            each = torch.stack([alone(probe.input, ones.long() * expert, ones) for expert in range(NUM_EXPERTS)], 1)
        mixed = torch.einsum("te,teh->th", dense, each)
        (mixed * probe.output.grad.reshape(-1, HIDDEN).double()).sum().backward()
        # Sums of 32 products in float32 on either side of the router.
        torch.testing.assert_close(gates.double(), dense.detach().gather(1, experts), rtol=1e-5, atol=1e-7)
        assert weight.grad.norm() > 0
        assert (router.weight.grad.double() - weight.grad).norm() < 1e-4 * weight.grad.norm()


@families
def test_unrouted_experts_get_no_gradient(family):
    """Every token of every layer is sent to experts 0 to 2."""
    model, batch = build(family), batch_of(family)
    geometry, length = batch.geometry, batch.token_ids.shape[1]
    indices = torch.arange(3).expand(length, geometry.num_moe_layers, 3)
    masks = [
        RoutingMasks.from_indices(
            indices, torch.ones(length, dtype=torch.bool), start=0, geometry=geometry, codec="bitset", token_ids=ids
        )
        for ids in batch.token_ids
    ]
    batch.lengths = (length,) * 3
    with attach(model, overlap_every=None) as replay, replay.microbatch(masks, batch.layout):
        loss_of(logits_of(model, batch), batch).backward()
    for block in blocks(model).values():
        gradient = block.experts.down_proj.grad.flatten(1).abs().amax(1)
        assert (gradient[:3] > 0).all() and not gradient[3:].any()


@families
def test_gradients_at_own_routes_are_stock(family):
    """Bit for bit, in every parameter."""
    stock, model, batch = build(family), build(family), batch_of(family)
    loss_of(logits_of(stock, batch), batch).backward()
    with attach(model) as replay:
        with replay.record(batch.layout) as recorded, torch.no_grad():
            logits_of(model, batch)
        with replay.microbatch(recorded.routes):
            loss = loss_of(logits_of(model, batch), batch)
        loss.backward()
    expected, found = gradients(stock), gradients(model)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
