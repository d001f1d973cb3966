"""Router gradients of live MoE layers against the formula, in float64 and by two ways."""

from __future__ import annotations

import torch
from torch import Tensor


class LayerProbe:
    """Input, output, gradient of the output, and router logits of one live MoE layer."""

    def __init__(self, mlp: torch.nn.Module) -> None:
        self.mlp = mlp
        self.handles = [mlp.register_forward_hook(self._keep), mlp.router.register_forward_hook(self._keep_map)]
        gating = mlp.router.gating

        def keep_logits(hidden: Tensor) -> Tensor:
            self.logits = gating(hidden)
            self.logits.retain_grad()
            return self.logits

        mlp.router.gating = keep_logits

    def _keep(self, module, args, output) -> None:
        self.input = args[0].detach().reshape(-1, args[0].shape[-1]).double()
        self.output = output[0]
        self.output.retain_grad()

    def _keep_map(self, module, args, output) -> None:
        self.probs, self.map = (value.detach() for value in output)

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        del self.mlp.router.gating


def _expert_outputs(mlp: torch.nn.Module, hidden: Tensor) -> Tensor:
    """SwiGLU of every expert for every row, float64 `[rows, E, H]`."""
    outputs = []
    for expert in mlp.experts.local_experts:
        gate, up = (hidden @ expert.linear_fc1.weight.detach().double().T).chunk(2, dim=-1)
        outputs.append((gate * gate.sigmoid() * up) @ expert.linear_fc2.weight.detach().double().T)
    return torch.stack(outputs, dim=1)


def assert_gradient_is_the_formula(probe: LayerProbe, tolerance: float) -> None:
    """After backward: gates and the router weight's gradient of one layer are those of the formula in float64.

    Args:
        tolerance: relative error of Megatron's figures; autograd's in float64 must be within 1e-12 of the formula's.
    """
    router, mask = probe.mlp.router, probe.map
    upstream = probe.output.grad.reshape(probe.input.shape).double()
    outputs = _expert_outputs(probe.mlp, probe.input)

    by_autograd = router.weight.detach().double().requires_grad_()
    scores = probe.input @ by_autograd.T
    gates = torch.where(mask, scores.exp(), 0.0)
    gates = gates / gates.sum(-1, keepdim=True)
    (torch.einsum("te,teh->th", gates, outputs) * upstream).sum().backward()

    gates = gates.detach()
    pull = torch.einsum("teh,th->te", outputs, upstream)
    score_gradient = gates * (pull - (gates * pull).sum(-1, keepdim=True))
    by_formula = score_gradient.T @ probe.input

    assert by_formula.norm() > 0
    assert _relative(by_autograd.grad, by_formula) < 1e-12
    assert _relative(router.weight.grad.double(), by_formula) < tolerance
    assert _relative(probe.probs.double(), gates) < tolerance
    logits_gradient = probe.logits.grad.reshape(mask.shape)
    assert (logits_gradient[~mask] == 0).all()
    # Behind the last attention, rows that the loss does not read get nothing.
    reached = mask & (upstream != 0).any(-1, keepdim=True)
    assert (logits_gradient[reached] != 0).float().mean() > 0.5


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()
