"""Which decoder layers of a model route tokens, and among how many experts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from typing import Any

from router_replay.errors import InputError, PairingError, UnsupportedError
from router_replay.masks.arguments import as_integer
from router_replay.masks.hf_config import Reader, config_reader, routed_layers
from router_replay.masks.limits import MAX_EXPERTS, MAX_TOP_K

_NUM_LAYERS_KEYS = ("num_hidden_layers", "num_layers")
_NUM_EXPERTS_KEYS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_TOP_K_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
)


@dataclass(frozen=True)
class RoutingGeometry:
    """Shape of one token's routes. Experts and top-k are those of every routed layer: no released model varies them.

    Attributes:
        num_layers: decoder layers of the model, dense ones included, MTP layers excluded.
        moe_layers: 0-based indices of the decoder layers with a router, ascending. Masks store these layers only;
            a layer's index in this tuple is its `layer_index` wherever rows are read.
        num_experts: routed experts per MoE layer (logical experts: before any placement of replicas).
        top_k: experts chosen per token, shared experts excluded.
    """

    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_experts", "top_k"):
            object.__setattr__(self, name, as_integer(name, getattr(self, name)))
        if not isinstance(self.moe_layers, Iterable) or isinstance(self.moe_layers, str):
            raise InputError(f"moe_layers is {self.moe_layers!r}, but must be the indices of the layers that route")
        layers = tuple(as_integer("a layer of moe_layers", layer) for layer in self.moe_layers)
        object.__setattr__(self, "moe_layers", layers)
        if not layers:
            raise UnsupportedError(
                f"no decoder layer of this model routes tokens (0 of {self.num_layers}): routes exist only in"
                " mixture-of-experts models; turn capture and replay off for a dense model"
            )
        if list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= self.num_layers:
            raise InputError(
                f"moe_layers {layers} must be ascending, distinct and within [0, {self.num_layers}) decoder layers"
            )
        if not 1 <= self.top_k <= self.num_experts:
            raise InputError(f"top_k is {self.top_k}, but must be between 1 and num_experts {self.num_experts}")
        if self.num_experts > MAX_EXPERTS or self.top_k > MAX_TOP_K:
            raise UnsupportedError(
                f"top-{self.top_k} of {self.num_experts} experts: routing masks are built for up to {MAX_EXPERTS}"
                f" experts and top-{MAX_TOP_K}; raise the limit in router_replay/masks/limits.py and build from source"
            )

    @property
    def num_moe_layers(self) -> int:
        """Number of layers that masks store."""
        return len(self.moe_layers)

    def index_of(self, layer: int) -> int:
        """Index of decoder layer `layer` (0-based) among the layers that masks store.

        Raises:
            PairingError: if that layer has no router in this geometry.
        """
        try:
            return self.moe_layers.index(layer)
        except ValueError:
            raise PairingError(
                f"decoder layer {layer} has no routes here: the routed layers are {self.moe_layers}"
            ) from None

    def require_same(self, other: RoutingGeometry, ours: str, theirs: str) -> None:
        """Raise PairingError unless `other` is this geometry; `ours` and `theirs` name the two sides."""
        if self == other:
            return
        differences = [
            f"{ours} has {mine} {what}, {theirs} has {yours}"
            for what, mine, yours in (
                ("decoder layers", self.num_layers, other.num_layers),
                ("MoE layers", self.num_moe_layers, other.num_moe_layers),
                ("experts", self.num_experts, other.num_experts),
                ("experts per token (top-k)", self.top_k, other.top_k),
            )
            if mine != yours
        ]
        only_ours = sorted(set(self.moe_layers) - set(other.moe_layers))
        only_theirs = sorted(set(other.moe_layers) - set(self.moe_layers))
        if only_ours:
            differences.append(f"decoder layers {only_ours} route in {ours} but not in {theirs}")
        if only_theirs:
            differences.append(f"decoder layers {only_theirs} route in {theirs} but not in {ours}")
        raise PairingError("; ".join(differences) + ". Use masks that were recorded with the same model architecture.")

    @classmethod
    def from_hf_config(cls, config: Any) -> RoutingGeometry:
        """Geometry of a Hugging Face model configuration (an object or its dictionary, text part of a composite one).

        Raises:
            InputError: no configuration, one that lacks a needed field, or one whose fields disagree about which
                layers route.
            UnsupportedError: a dense model, or one whose routing is not learned (hash routing) or not the same in every
                layer.
        """
        if config is None or isinstance(config, str | PathLike):
            raise InputError(
                f"config is {config!r}, but must be a configuration or its dictionary: take"
                " transformers.AutoConfig.from_pretrained(path), or the JSON of the model's config.json"
            )
        get = config_reader(config)
        num_layers = _first(get, _NUM_LAYERS_KEYS) or len(get("layers_block_type") or ())
        if not num_layers:
            raise InputError("the configuration has no num_hidden_layers: pass the text model's configuration")
        if get("zero_expert_num"):
            raise UnsupportedError(
                f"the router of this model also chooses among {get('zero_expert_num')} experts without weights"
                " (zero_expert_num); routing replay does not cover such models"
            )
        num_experts = _first(_same_in_every_layer(get, num_layers), _NUM_EXPERTS_KEYS)
        top_k = _first(_same_in_every_layer(get, num_layers), _TOP_K_KEYS)
        if not num_experts or not top_k:
            raise UnsupportedError(
                f"this looks like a dense model ({get('model_type') or 'model_type unknown'}): none of"
                f" {', '.join(_NUM_EXPERTS_KEYS)} with one of {', '.join(_TOP_K_KEYS)} is set in its configuration;"
                " turn capture and replay off for a dense model"
            )
        return cls(num_layers, routed_layers(get, num_layers), num_experts, top_k)


def _same_in_every_layer(get: Reader, num_layers: int) -> Reader:
    """A reader that takes a list of one number per layer (HunYuan-MoE) for that number."""

    def read(key: str) -> Any:
        value = get(key)
        if not isinstance(value, list | tuple):
            return value
        if len(value) != num_layers or len(set(value)) != 1:
            raise UnsupportedError(
                f"{key} is {value}: masks are for models with one number of experts and one top-k in all of their"
                f" {num_layers} decoder layers"
            )
        return value[0]

    return read


def _first(get: Reader, keys: tuple[str, ...]) -> int | None:
    found = {key: value for key in keys if isinstance(value := get(key), int)}
    if len(set(found.values())) > 1:
        raise InputError(f"the configuration contradicts itself: {found} should be one number")
    return next(iter(found.values()), None)
