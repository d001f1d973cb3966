"""The ledger: every name of transformers that replay relies on, why, and when the row can go."""

from __future__ import annotations

from dataclasses import replace

from hf_router_replay.families import FAMILIES, Family
from router_replay.upstream import Attribute, Ledger, Seam

TESTED = ("5.19.0",)
CHECKED = ("5.24.0",)

_SEEN = "never: this is where a router's choice is seen and replaced"
_LIVE = "never: the live layers are checked against the rollout's"
_PLANS = "transformers tells whether a module was parallelised"

_MODEL = (
    Seam(
        "modeling_utils.PreTrainedModel",
        None,
        "read by live_model.language_model",
        "the model is found by it inside of its wrappers",
        _LIVE,
    ),
    Seam(
        "modeling_utils.EmbeddingAccessMixin.get_input_embeddings",
        (),
        "called by live_model.input_embedding",
        "it returns the module that is called with the model's token ids, which are compared with those of the layout",
        _LIVE,
    ),
    Seam(
        "distributed.mixin.DistributedMixin._tp_size",
        None,
        "read by refusals.check_model",
        "it tells that ranks of tensor parallelism share this model",
        _PLANS,
    ),
    Seam(
        "distributed.configuration_utils.DistributedConfig",
        None,
        "read by refusals.check_model",
        "it tells by which plan a model was spread over ranks",
        _PLANS,
    ),
    Seam(
        "modeling_layers.GradientCheckpointingLayer",
        None,
        "relied on by replay.Replay",
        "it is what runs a decoder layer in torch.utils.checkpoint, whose bindings are carried",
        _LIVE,
    ),
)


def _rows(family: Family) -> tuple[Seam, ...]:
    return (
        Seam(
            f"{family.module}.{family.router}.forward",
            ("hidden_states",),
            "hooked by layer_replay.LayerReplay",
            "it gives the logits, gates and experts of every place, of which the last two are replaced",
            _SEEN,
        ),
        Seam(
            f"{family.module}.{family.block}.forward",
            ("hidden_states",),
            "relied on by layer_replay.LayerReplay",
            "it hands what its router returns to the experts",
            _SEEN,
        ),
    )


_ROUTERS = {family: f"{family.module}.{family.router}" for family in FAMILIES}

LEDGER = Ledger(
    distribution="transformers",
    title="transformers",
    prefix="transformers.",
    subject="replay",
    tested=TESTED,
    checked=CHECKED,
    way_out="train without replay",
    seams=(*_MODEL, *(row for family in FAMILIES for row in _rows(family))),
    attributes=(
        Attribute(
            None,
            "config",
            "read by live_model.live_layers",
            "which decoder layers route, and to how many experts, is read there",
            "tests/hf_router_replay/test_refusals.py::test_configuration_that_is_not_the_live_model",
        ),
        *(
            Attribute(
                owner,
                name,
                "read by refusals.check_model",
                "it tells by which plan a model was spread over ranks",
                "tests/hf_router_replay/test_refusals.py::test_parallel_plans_of_transformers",
            )
            for owner, name in (
                (None, "distributed_config"),
                ("distributed.configuration_utils.DistributedConfig", "ep_size"),
                ("distributed.configuration_utils.DistributedConfig", "pp_size"),
            )
        ),
        Attribute(
            None,
            "layers",
            "read by live_model.find_routers",
            "a router's rows are found by the number of its decoder layer, which is where it stands in this list",
            "tests/hf_router_replay/test_routes.py::test_experts_are_the_recorded_ones",
        ),
        *(
            Attribute(
                router,
                name,
                "read by live_model.check_live_layers",
                "a live router may choose among others than the configuration says",
                "tests/hf_router_replay/test_refusals.py::test_configuration_that_is_not_the_live_model",
            )
            for router in _ROUTERS.values()
            for name in ("top_k", "num_experts")
        ),
        *(
            Attribute(
                router,
                "hidden_dim",
                "read by formula.require_formula",
                "the formula of its gates is compared on hidden states of that size",
                "tests/hf_router_replay/test_seams.py::test_a_router_of_another_formula_is_refused",
            )
            for router in _ROUTERS.values()
        ),
        *(
            Attribute(
                router,
                name,
                f"read by gates.{family.gates.__name__}",
                "gates are computed as the router would",
                "tests/hf_router_replay/test_gates.py::test_gates_at_own_experts_are_the_routers_own",
            )
            for family, router in _ROUTERS.items()
            for name in ("norm_topk_prob", "routed_scaling_factor")
            if name in family.gates.__code__.co_names
        ),
    ),
)
"""What `attach` needs, of all families."""


def ledger_of(family: Family) -> Ledger:
    """The rows of `LEDGER` that a model of one family needs, for which no other's file is imported."""
    return replace(LEDGER, seams=(*_MODEL, *_rows(family)))
