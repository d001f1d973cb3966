"""The families of models of transformers whose routers replay knows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hf_router_replay.gates import (
    Gates,
    float32_softmax_gates,
    normalized_softmax_gates,
    sigmoid_gates,
    softmax_gates,
    softmax_of_chosen_gates,
)


@dataclass(frozen=True)
class Family:
    """One folder of `transformers.models`.

    Attributes:
        name: of the folder.
        router: class of its routers, which give logits `[n, E]`, gates `[n, K]` and experts `int64 [n, K]`.
        block: class of its MoE layers, which hand a router's gates and experts to their experts.
        gates: what a router computes of its logits at given experts.
    """

    name: str
    router: str
    block: str
    gates: Gates

    @property
    def module(self) -> str:
        """Dotted path of the modeling file below `transformers`."""
        return f"models.{self.name}.modeling_{self.name}"

    def has(self, cls: type, name: str) -> bool:
        """Whether `cls` is this family's class of that name."""
        return (cls.__module__, cls.__name__) == (f"transformers.{self.module}", name)


FAMILIES = (
    Family("qwen3_moe", "Qwen3MoeTopKRouter", "Qwen3MoeSparseMoeBlock", softmax_gates),
    Family("qwen3_next", "Qwen3NextTopKRouter", "Qwen3NextSparseMoeBlock", softmax_gates),
    Family("qwen3_5_moe", "Qwen3_5MoeTopKRouter", "Qwen3_5MoeSparseMoeBlock", normalized_softmax_gates),
    Family("olmoe", "OlmoeTopKRouter", "OlmoeSparseMoeBlock", softmax_gates),
    Family("mixtral", "MixtralTopKRouter", "MixtralSparseMoeBlock", float32_softmax_gates),
    Family("glm4_moe", "Glm4MoeTopkRouter", "Glm4MoeMoE", sigmoid_gates),
    Family("deepseek_v3", "DeepseekV3TopkRouter", "DeepseekV3MoE", sigmoid_gates),
    Family("gpt_oss", "GptOssTopKRouter", "GptOssMLP", softmax_of_chosen_gates),
)
"""By their model types."""


def family_of(module: nn.Module) -> tuple[Family, type[nn.Module]] | None:
    """Family of a router, and transformers' own class of it, also where FSDP2 or somebody else made a subclass."""
    for cls in type(module).__mro__:
        for family in FAMILIES:
            if issubclass(cls, nn.Module) and family.has(cls, family.router):
                return family, cls
    return None
