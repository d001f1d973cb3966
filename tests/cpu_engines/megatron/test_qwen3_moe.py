"""A Hugging Face Qwen3-MoE in Megatron computes the same logits and takes the same experts.

Tolerance. A float32 sum of n products is off by at most gamma_n = n u / (1 - n u) of the sum of their magnitudes, u
= 2^-24 (Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1). Along the longest path from the
embedding to a logit the sums follow each other, so that to first order n is the total of their lengths: per layer
the projections (hidden size three times, heads * head_dim, the MLP's width), two RMS norms and two head norms, the
attention scores and their softmax over S keys (S twice), the gate's E logits and K experts; at the end one norm and
the output product. A logit is a product of the final norm's output x, ||x|| = sqrt(hidden), with a row w of the
output matrix, so magnitudes are bounded by sqrt(hidden) * max ||w||. Residual branches of a pre-norm model are
normalised again, so an error does not grow from layer to layer beyond that sum. Each side is compared with float64,
so each may be off by gamma_n, and the two from one another by twice that. A wrong weight, rotary base or
interleaving is off by the size of the logits themselves, about a thousand tolerances.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cpu_engines.megatron.logprobs import forward_logits, token_logprobs
from cpu_engines.megatron.qwen3_moe import CheckpointError, load_qwen3_moe
from megatron_router_replay import BatchLayout, attach
from router_replay.masks.geometry import RoutingGeometry


def _hugging_face(folder: Path, dtype: torch.dtype):
    """The Hugging Face model, with float64 in place of the float32 that it pins its norms and router softmax to."""
    from transformers import Qwen3MoeForCausalLM

    model = Qwen3MoeForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", experts_implementation="eager"
    )
    if dtype == torch.float64:
        for module in model.modules():
            if type(module).__name__ == "Qwen3MoeRMSNorm":
                module.forward = lambda x, norm=module: (
                    norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
                )
    return model.eval()


def _hugging_face_pass(model, token_ids: Tensor) -> tuple[Tensor, dict[int, Tensor], float]:
    """Logits, chosen experts by layer, and the smallest gap between the logits of a chosen and a rejected expert."""
    gates: dict[int, tuple[Tensor, Tensor]] = {}
    for index, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(
                lambda m, a, out, index=index: gates.__setitem__(index, (out[0], out[2]))
            )
    with torch.no_grad():
        logits = model(token_ids).logits
    best = [(scores.topk(chosen.shape[1] + 1).values, chosen) for scores, chosen in gates.values()]
    gap = min((scores[:, -2] - scores[:, -1]).min().item() for scores, _ in best)
    return logits, {index: chosen for index, (_, chosen) in gates.items()}, gap


def _rounding_bound(config: dict, output_weight: Tensor, length: int) -> float:
    hidden, heads, head_dim = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    geometry = RoutingGeometry.from_hf_config(config)
    width = max(config["intermediate_size"], config["moe_intermediate_size"])
    per_layer = 3 * hidden + heads * head_dim + width + 2 * hidden + 2 * head_dim + 2 * length
    per_layer += geometry.num_experts + geometry.top_k
    n = config["num_hidden_layers"] * per_layer + 2 * hidden
    unit = 2.0**-24
    gamma = n * unit / (1 - n * unit)
    return gamma * hidden**0.5 * output_weight.double().norm(dim=1).max().item()


def _compare(folder: Path, token_ids: Tensor, record_property) -> None:
    config = json.loads((folder / "config.json").read_text())
    truth, _, gap = _hugging_face_pass(_hugging_face(folder, torch.float64), token_ids)
    hf_logits, hf_routes, _ = _hugging_face_pass(_hugging_face(folder, torch.float32), token_ids)
    model = load_qwen3_moe(folder)
    lengths = [token_ids.shape[1]] * token_ids.shape[0]
    layout = BatchLayout.padded(token_ids, lengths)
    with torch.no_grad(), attach(model) as replay, replay.off(), replay.observe() as observed:
        logits = forward_logits(model, token_ids)
        bound = _rounding_bound(config, model.output_layer.weight.detach(), token_ids.shape[1])
    errors = {
        "bound": bound,
        "Megatron float32": (logits - truth).abs().max().item(),
        "Hugging Face float32": (hf_logits - truth).abs().max().item(),
        "between": (logits - hf_logits).abs().max().item(),
        "smallest gap of the router": gap,
        "largest logit": truth.abs().max().item(),
    }
    for name, value in errors.items():
        record_property(name, value)
    assert errors["Megatron float32"] < bound, errors
    assert errors["Hugging Face float32"] < bound, errors
    assert errors["between"] < 2 * bound, errors
    # Otherwise the comparison of experts below would hang on a rounding.
    assert gap > 10 * errors["between"], errors
    assert errors["largest logit"] > 100 * bound, errors

    routes = torch.stack(observed.indices(layout)).sort(-1).values
    theirs = torch.stack([hf_routes[layer] for layer in replay.layers], dim=1).view(routes.shape).sort(-1).values
    assert torch.equal(routes, theirs)


def test_random_model_computes_what_hugging_face_does(checkpoint, record_property):
    token_ids = torch.randint(0, 96, (3, 40), generator=torch.Generator().manual_seed(11))
    _compare(checkpoint, token_ids, record_property)


def test_trained_model_computes_what_hugging_face_does(small_model, record_property):
    vocabulary = json.loads((small_model / "config.json").read_text())["vocab_size"]
    token_ids = torch.randint(0, vocabulary, (4, 48), generator=torch.Generator().manual_seed(21))
    _compare(small_model, token_ids, record_property)


def test_token_logprobs_are_those_of_the_logits(build_model, batch):
    model = build_model()
    logits = forward_logits(model, batch.token_ids)
    found = token_logprobs(model, batch.token_ids, temperature=0.5)
    assert torch.equal(found[:, 0], torch.zeros(3))
    for sequence, position in ((0, 1), (1, 8), (2, 4)):
        distribution = (logits[sequence, position - 1].double() / 0.5).softmax(-1)
        expected = distribution[batch.token_ids[sequence, position]].log()
        assert found[sequence, position].item() == pytest.approx(expected.item(), abs=1e-5)


def test_packed_logprobs_start_at_zero_in_every_sequence(build_model, batch):
    found = token_logprobs(build_model(), batch.packed_ids, batch.cu_seqlens)
    assert (found[0] == 0).nonzero().flatten().tolist() == [0, 12, 21]


@pytest.fixture
def editable(checkpoint, tmp_path):
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


def _edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


GATE = "model.layers.2.mlp.gate.weight"


def test_missing_and_surplus_tensors_are_listed(editable):
    _edit_tensors(editable, lambda t: t.update({"model.extra": t.pop(GATE)}))
    with pytest.raises(CheckpointError) as caught:
        load_qwen3_moe(editable)
    for part in (
        f"not found ['{GATE}']",
        "no parameter takes ['model.extra']",
        "['decoder.layers.2.mlp.router.weight']",
    ):
        assert part in str(caught.value)


def test_parameters_that_no_tensor_fills_are_listed(editable):
    with pytest.raises(CheckpointError, match=r"fills \['decoder.layers.0.*linear_qkv.bias'"):
        load_qwen3_moe(editable, add_qkv_bias=True)


def test_another_shape_is_refused(editable):
    _edit_tensors(editable, lambda t: t.update({GATE: t[GATE][:8].clone()}))
    with pytest.raises(CheckpointError, match=r"has shape \(16, 48\) in Megatron, but .* make \(8, 48\)"):
        load_qwen3_moe(editable)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("norm_topk_prob", False),
        ("tie_word_embeddings", True),
        ("model_type", "qwen2_moe"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
    ],
)
def test_settings_that_megatron_would_compute_otherwise(editable, key, value):
    config = json.loads((editable / "config.json").read_text()) | {key: value}
    (editable / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config.json (has norm|has tie|has model|scales its rotary)"):
        load_qwen3_moe(editable)
