"""Which decoder layers route, read from the fields that Hugging Face configurations use for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from router_replay.errors import InputError, UnsupportedError

Reader = Callable[[str], Any]


def config_reader(config: Any) -> Reader:
    """A getter for a configuration object or dictionary, looking into `text_config` of composite models first."""

    def read(source: Any, key: str) -> Any:
        return source.get(key) if isinstance(source, Mapping) else getattr(source, key, None)

    inner = read(config, "text_config")
    return lambda key: read(config if inner is None else inner, key)


def routed_layers(get: Reader, num_layers: int) -> tuple[int, ...]:
    """Indices (0-based) of the decoder layers that route, by every rule that the configuration states.

    A configuration may state several rules; they must agree. With no rule at all every layer routes (Mixtral).

    Raises:
        InputError: two rules disagree, a per-layer list has another length than the model, or layers route by a
            hash of the token id, which leaves nothing to record.
    """
    hash_layers = get("num_hash_layers") or get("n_hash_layers") or list(get("mlp_layer_types") or ()).count("hash_moe")
    if hash_layers:
        raise UnsupportedError(
            f"{hash_layers} layers of this model route by a hash of the token id, not by a learned router; routing"
            " replay does not cover such models"
        )
    stated = {rule.__name__.strip("_"): layers for rule in _RULES if (layers := rule(get, num_layers)) is not None}
    if not stated:
        return tuple(range(num_layers))
    if len(set(stated.values())) > 1:
        raise InputError(
            "the configuration contradicts itself about which decoder layers route: "
            + "; ".join(f"{name} says {list(layers)}" for name, layers in stated.items())
        )
    return next(iter(stated.values()))


def _per_layer(name: str, values: Any, num_layers: int, routes: Callable[[Any], bool]) -> tuple[int, ...]:
    if len(values) != num_layers:
        raise InputError(f"{name} lists {len(values)} layers, but the model has {num_layers} decoder layers")
    return tuple(layer for layer, value in enumerate(values) if routes(value))


def _mlp_layer_types(get: Reader, num_layers: int) -> tuple[int, ...] | None:
    kinds = get("mlp_layer_types")
    if kinds is None:
        return None
    unknown = sorted(set(kinds) - {"dense", "sparse", "moe"})
    if unknown:
        raise InputError(f"mlp_layer_types names {unknown}; known are 'dense', 'sparse' and 'moe'")
    return _per_layer("mlp_layer_types", kinds, num_layers, lambda kind: kind != "dense")


def _moe_layer_freq(get: Reader, num_layers: int) -> tuple[int, ...] | None:
    """DeepSeek: an interval after `first_k_dense_replace` dense layers; MiMo and Megatron: a 0/1 list."""
    freq, first = get("moe_layer_freq"), get("first_k_dense_replace")
    if isinstance(freq, list | tuple):
        return _per_layer("moe_layer_freq", freq, num_layers, bool)
    if freq is None and first is None:
        return None
    return tuple(layer for layer in range(num_layers) if layer >= (first or 0) and layer % (freq or 1) == 0)


def _decoder_sparse_step(get: Reader, num_layers: int) -> tuple[int, ...] | None:
    """Qwen2-MoE and Qwen3-MoE: every `decoder_sparse_step`-th layer but those of `mlp_only_layers`."""
    step, dense = get("decoder_sparse_step"), get("mlp_only_layers")
    if step is None and dense is None:
        return None
    if step is not None and step < 1:
        return ()
    return tuple(layer for layer in range(num_layers) if layer not in (dense or ()) and (layer + 1) % (step or 1) == 0)


def _moe_layers(get: Reader, num_layers: int) -> tuple[int, ...] | None:
    """Llama 4: a list of layers, or an interval that the list was made from."""
    layers, step = get("moe_layers"), get("interleave_moe_layer_step")
    if isinstance(layers, list | tuple):
        return tuple(sorted(layers))
    if step is None:
        return None
    return tuple(range(step - 1, num_layers, step)) if step > 0 else ()


def _moe_layers_enum(get: Reader, num_layers: int) -> tuple[int, ...] | None:
    """Step-3: a comma-separated string (or a list) of layer indices."""
    listed = get("moe_layers_enum")
    if listed is None:
        return None
    parts = listed.split(",") if isinstance(listed, str) else listed
    return tuple(sorted(int(part) for part in parts))


def _moe_layer_interval(get: Reader, num_layers: int) -> tuple[int, ...] | None:
    """ERNIE 4.5: every `moe_layer_interval`-th layer between a start and an end index, the end included."""
    interval = get("moe_layer_interval")
    if interval is None:
        return None
    start, end = get("moe_layer_start_index") or 0, get("moe_layer_end_index")
    last = num_layers - 1 if end is None or end == -1 else end
    return tuple(layer for layer in range(num_layers) if (layer + 1) % interval == 0 and start <= layer <= last)


def _num_dense_layers(get: Reader, num_layers: int) -> tuple[int, ...] | None:
    """LFM2-MoE, AFMoE: that many dense layers come first."""
    dense = get("num_dense_layers")
    return None if dense is None else tuple(range(dense, num_layers))


def _expert_layer_period(get: Reader, num_layers: int) -> tuple[int, ...] | None:
    """Jamba: layers at an offset within a period."""
    period, offset = get("expert_layer_period"), get("expert_layer_offset")
    if period is None:
        return None
    return tuple(layer for layer in range(num_layers) if layer % period == (offset or 0))


def _hybrid_override_pattern(get: Reader, num_layers: int) -> tuple[int, ...] | None:
    """Nemotron-H: one letter per layer, E for experts."""
    pattern = get("hybrid_override_pattern")
    if pattern is None:
        return None
    return _per_layer("hybrid_override_pattern", pattern, num_layers, lambda letter: letter == "E")


def _layers_block_type(get: Reader, num_layers: int) -> tuple[int, ...] | None:
    """Nemotron-H as Transformers 5 saves it. Jamba and Granite list their attention kinds here, not their experts."""
    kinds = get("layers_block_type")
    if kinds is None or not {"moe", "mlp"} & set(kinds):
        return None
    return _per_layer("layers_block_type", kinds, num_layers, lambda kind: kind == "moe")


def _enable_moe_block(get: Reader, num_layers: int) -> tuple[int, ...] | None:
    """Gemma 4: every layer has experts, or none."""
    enabled = get("enable_moe_block")
    if enabled is None:
        return None
    return tuple(range(num_layers)) if enabled else ()


_RULES = (
    _mlp_layer_types,
    _moe_layer_freq,
    _decoder_sparse_step,
    _moe_layers,
    _moe_layers_enum,
    _moe_layer_interval,
    _num_dense_layers,
    _expert_layer_period,
    _hybrid_override_pattern,
    _layers_block_type,
    _enable_moe_block,
)
