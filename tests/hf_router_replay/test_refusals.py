"""What `attach` refuses: models that it does not know, and those that would ignore replay or undo it."""

from __future__ import annotations

import functools
import types

import pytest
import torch
from torch import nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from hf_router_replay import attach
from router_replay.errors import CallOrderError, InputError, PairingError, UnsupportedError
from tests.hf_router_replay.small_models import FAMILIES, batch_of, blocks, build, logits_of, router_of

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_dense_models():
    with pytest.raises(UnsupportedError, match=r"this looks like a dense model \(qwen3\)"):
        attach(Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8)))


@pytest.mark.parametrize("shape", [(0,), (8 * 32,)], ids=["taken apart", "flattened"])
def test_routers_whose_matrix_is_not_there_as_a_whole(shape):
    model = build("qwen3_moe")
    router_of(next(iter(blocks(model).values()))).weight = nn.Parameter(torch.zeros(shape))
    with pytest.raises(UnsupportedError, match=r"a matrix of shape \[\d+\] where \[8, 32\] was expected.*use FSDP2"):
        attach(model)


def test_families_that_are_not_known():
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**SMALL, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2))
    message = (
        "a Qwen2MoeForCausalLM has no router that replay knows.*: known are the families qwen3_moe, .*, gpt_oss of"
    )
    with pytest.raises(UnsupportedError, match=message):
        attach(model)


def test_no_model_of_transformers():
    with pytest.raises(InputError, match="a Linear was given that holds no PreTrainedModel"):
        attach(nn.Linear(2, 2))
    with pytest.raises(InputError, match="got a str: load it first"):
        attach("Qwen/Qwen3-30B-A3B")


def test_models_without_weights():
    with torch.device("meta"):
        model = build("olmoe")
    with pytest.raises(InputError, match="on the meta device: load its weights first"):
        attach(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_replays_of_one_model(family):
    model = build(family)
    with attach(model), pytest.raises(CallOrderError, match="belongs to an attached replay already"):
        attach(model)


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_numbers_of_passes_that_are_none(every):
    with pytest.raises(InputError, match="overlap_every is"):
        attach(build("qwen3_moe"), overlap_every=every)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_experts_per_tok": 2},
            r"configuration routes to 2 of 8 experts, the router of decoder layer 1 to 3 of 8",
        ),
        ({"num_experts": 16}, r"configuration routes to 3 of 16 experts, the router of decoder layer 1 to 3 of 8"),
        ({"mlp_only_layers": []}, r"decoder layers \[0\] are dense in this model"),
        ({"mlp_only_layers": [0, 2]}, r"decoder layers \[2\] are routed in this model only"),
    ],
)
def test_configuration_that_is_not_the_live_model(change, message):
    model = build("qwen3_moe")
    for name, value in change.items():
        setattr(model.config, name, value)
    with pytest.raises(PairingError, match=message):
        attach(model)


def test_a_router_that_was_replaced():
    model = build("qwen3_moe")
    model.model.layers[2].mlp.gate = nn.Linear(32, 8)
    with pytest.raises(PairingError, match=r"decoder layers \[2\] are dense in this model"):
        attach(model)


def _replaced_on_the_object(monkeypatch, module):
    module.forward = types.MethodType(lambda self, hidden: None, module)


def _replaced_on_the_class(monkeypatch, module):
    monkeypatch.setattr(type(module), "forward", lambda self, hidden: None)


def _subclassed(monkeypatch, module):
    module.__class__ = type("Other", (type(module),), {"forward": lambda self, hidden: None})


def _decorated(monkeypatch, module):
    own = type(module).forward
    monkeypatch.setattr(type(module), "forward", functools.wraps(own)(lambda self, hidden: own(self, hidden)))


@pytest.mark.parametrize("change", [_replaced_on_the_object, _replaced_on_the_class, _subclassed, _decorated])
@pytest.mark.parametrize("which", [router_of, lambda block: block], ids=["router", "block"])
@pytest.mark.parametrize("family", FAMILIES)
def test_forwards_that_are_not_transformers_own(family, which, change, monkeypatch):
    """As the hub's kernels put them in (MegaBlocksMoeMLP), and quantisers, and Liger."""
    model = build(family)
    before = [dict(module._forward_hooks) for module in model.modules()]
    block = list(blocks(model).values())[-1]
    change(monkeypatch, which(block))
    with pytest.raises(UnsupportedError, match=r"decoder layer \d has a \w+ (whose|with the) forward"):
        attach(model)
    assert [dict(module._forward_hooks) for module in model.modules()] == before


def test_a_subclass_with_the_same_forward_is_taken():
    model = build("qwen3_moe")
    router = model.model.layers[1].mlp.gate
    router.__class__ = type("Other", (type(router),), {})
    with attach(model):
        pass


def test_a_forward_that_is_replaced_after_attach():
    family = "gpt_oss"
    model, batch = build(family), batch_of(family)
    with attach(model, overlap_every=None) as replay:
        with replay.microbatch(batch.masks, batch.layout):
            logits_of(model, batch)
        _replaced_on_the_object(None, model.model.layers[1].mlp)
        with (
            pytest.raises(UnsupportedError, match=r"layer 1 has a GptOssMLP whose forward was replaced.*use_kernels"),
            replay.microbatch(batch.masks, batch.layout),
        ):
            raise AssertionError("bound")


@pytest.mark.parametrize(("name", "size"), [("tp_size", 2), ("ep_size", 4), ("pp_size", 2)])
def test_parallel_plans_of_transformers(name, size):
    """As `from_pretrained(distributed_config=...)` leaves them, which needs as many ranks."""
    model = build("qwen3_moe")
    model.config.distributed_config = DistributedConfig(**{"tp_size": 4, name: size})
    model._tp_size = size if name == "tp_size" else None
    with pytest.raises(UnsupportedError, match=f"was loaded with {name} {size}: transformers' parallel plans"):
        attach(model)


def test_models_that_were_compiled_before():
    model = build("olmoe")
    model.model.layers[1].compile(backend="eager")
    with pytest.raises(UnsupportedError, match=r"model\.layers\.1 \(OlmoeDecoderLayer\) is compiled: .*attach first"):
        attach(model)
