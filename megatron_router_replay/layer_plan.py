"""Which layers of the whole model route, by its configuration, and which decoder layers of the masks these are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from router_replay.errors import InputError, PairingError, UnsupportedError
from router_replay.masks.geometry import RoutingGeometry

_MOE, _FEED_FORWARD = "E", "-E"


@dataclass(frozen=True)
class LayerPlan:
    """The MoE layers of a whole model, of which a pipeline stage holds some.

    Attributes:
        positions: 0-based layers with a router as Megatron numbers them, ascending.
        geometry: as masks count the decoder's layers: the n-th of `positions` is the n-th of its `moe_layers`.
        setting: what says it: `moe_layer_freq`, or the `hybrid_layer_pattern` of a HybridModel, whose attention,
            Mamba, MLP and MoE layers have numbers of their own.
    """

    positions: tuple[int, ...]
    geometry: RoutingGeometry
    setting: str

    def layer_of(self, position: int) -> int:
        """Decoder layer of the masks whose routes the router at `position` takes."""
        return self.geometry.moe_layers[self.positions.index(position)]

    def counted_as(self, rollout: RoutingGeometry) -> LayerPlan:
        """This plan with the rollout's decoder layers.

        Raises:
            PairingError: the rollout's model is another one.
        """
        if self.setting == "moe_layer_freq":
            rollout.require_same(self.geometry, "the rollout", "this model")
            return self
        own = self.geometry
        differences = [
            f"the rollout has {theirs} {what}, this HybridModel has {ours}"
            for what, theirs, ours in (
                ("MoE layers", rollout.num_moe_layers, own.num_moe_layers),
                ("experts", rollout.num_experts, own.num_experts),
                ("experts per token (top-k)", rollout.top_k, own.top_k),
            )
            if theirs != ours
        ]
        if differences:
            raise PairingError(
                f"{'; '.join(differences)}, by its hybrid_layer_pattern: use masks that were recorded with the same "
                "model architecture"
            )
        return replace(self, geometry=rollout)


def layer_plan(chunks: Sequence[nn.Module]) -> LayerPlan:
    """The plan of the model that all of `chunks` are parts of.

    Raises:
        UnsupportedError: a dense model.
        InputError: a chunk without a Megatron configuration, or chunks of different models.
    """
    first, *others = [_plan_of(chunk) for chunk in chunks]
    for index, other in enumerate(others, start=1):
        if other != first:
            raise InputError(
                f"chunk 0 is of a model with MoE layers {list(first.positions)} ({first.setting}, {first.geometry}), "
                f"chunk {index} of one with {list(other.positions)} ({other.setting}, {other.geometry}): attach each "
                "model on its own"
            )
    return first


def config_of(chunk: nn.Module) -> TransformerConfig:
    """Configuration of the language model in a chunk, inside of any wrappers and beside any vision tower.

    Raises:
        InputError: there is none.
    """
    language_models = [module for module in chunk.modules() if isinstance(module, LanguageModule)]
    for module in (*language_models, *chunk.modules()):
        config = getattr(module, "config", None)
        if isinstance(config, TransformerConfig):
            return config
    raise InputError(
        f"a {type(chunk).__name__} was given whose modules have no TransformerConfig, and which layers of the whole "
        "model route is read there: pass Megatron-Core's model, wrapped or not"
    )


def geometry_of(config: TransformerConfig) -> RoutingGeometry:
    """Geometry of a GPTModel by its configuration, as Megatron reads `moe_layer_freq`.

    Raises:
        UnsupportedError: a dense model.
    """
    frequency = config.moe_layer_freq
    routed = (
        [layer % frequency == 0 for layer in range(config.num_layers)]
        if isinstance(frequency, int)
        else [bool(flag) for flag in frequency]
    )
    moe_layers = tuple(layer for layer, flag in enumerate(routed) if flag) if config.num_moe_experts else ()
    return _geometry(config, len(routed), moe_layers, "moe_layer_freq")


def geometry_of_pattern(config: TransformerConfig, pattern: str) -> RoutingGeometry:
    """Geometry of a HybridModel with the layers `pattern`, where no rollout says how it counts them.

    Hugging Face counts a mixer and the MLP or experts behind it as one decoder layer (Qwen, DeepSeek), and Nemotron-H,
    whose Mamba layers have none behind them, counts each by itself. A pattern of such pairs throughout is read as the
    former, any other as the latter.

    Raises:
        UnsupportedError: a dense model.
    """
    pairs = [pattern[i : i + 2] for i in range(0, len(pattern), 2)]
    paired = all(len(pair) == 2 and pair[0] not in _FEED_FORWARD and pair[1] in _FEED_FORWARD for pair in pairs)
    layers = pairs if paired else list(pattern)
    moe_layers = tuple(layer for layer, kinds in enumerate(layers) if _MOE in kinds)
    return _geometry(config, len(layers), moe_layers, "hybrid_layer_pattern")


def _plan_of(chunk: nn.Module) -> LayerPlan:
    config = config_of(chunk)
    given = next((each for module in chunk.modules() if (each := getattr(module, "hybrid_layer_pattern", None))), None)
    if given is None:
        geometry = geometry_of(config)
        return LayerPlan(geometry.moe_layers, geometry, "moe_layer_freq")
    # '/' begins the layers of multi-token prediction, '|' ends a pipeline stage.
    pattern = given.partition("/")[0].replace("|", "")
    positions = tuple(position for position, kind in enumerate(pattern) if kind == _MOE)
    return LayerPlan(positions, geometry_of_pattern(config, pattern), "hybrid_layer_pattern")


def _geometry(config: TransformerConfig, num_layers: int, moe_layers: tuple[int, ...], setting: str) -> RoutingGeometry:
    if not moe_layers:
        raise UnsupportedError(
            f"none of this model's {num_layers} decoder layers routes tokens (num_moe_experts is"
            f" {config.num_moe_experts}, by {setting}): replay needs a mixture-of-experts model; train without it"
        )
    return RoutingGeometry(num_layers, moe_layers, config.num_moe_experts or 0, config.moe_router_topk)
