"""The ledger's rows of weights that change while the server runs."""

from __future__ import annotations

from router_replay.upstream import At, Attribute, Seam

_UPDATER = "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_UPDATES = "SGLang numbers the updates of its weights"
_HOOK = "hooked by hooks.weights.before_update"
_WHY = "rows computed before and after an update are of other weights"
_TEST = "tests/sglang_router_capture/test_weight_updates.py::test_updates_in_parts_from_tensors"

SEAMS = (
    Seam(f"{_UPDATER}.update_weights_from_disk", (), _HOOK, _WHY, _UPDATES),
    Seam(f"{_UPDATER}.update_weights_from_distributed", (), _HOOK, _WHY, _UPDATES),
    Seam(f"{_UPDATER}.update_weights_from_tensor", (), _HOOK, _WHY, _UPDATES),
    Seam(f"{_UPDATER}.update_weights_from_ipc", (), _HOOK, _WHY, _UPDATES),
    Seam(
        f"{_UPDATER}.record_weight_version_after_update",
        ("weight_version",),
        "hooked by hooks.weights.after_record_weight_version",
        "an update that fails does not come here, and the weights have no name then",
        _UPDATES,
    ),
    Seam(
        (At(f"{_UPDATER}.begin_weight_update", ">=0.5.21"),),
        (),
        "hooked by hooks.weights.around_begin_weight_update",
        "between the parts of an update the weights are neither the old nor the new ones",
        _UPDATES,
    ),
    Seam(
        (At(f"{_UPDATER}.end_weight_update", ">=0.5.21"),),
        (),
        "hooked by hooks.weights.around_end_weight_update",
        "the weights are whole again, and have the name that a part was given",
        _UPDATES,
    ),
)

ATTRIBUTES = tuple(
    Attribute(
        f"managers.io_struct.{name}ReqOutput",
        "success",
        f"read by hooks.weights.around_{verb}_weight_update",
        "SGLang refuses to open what is open, and to close what is not",
        _TEST,
        releases=">=0.5.21",
    )
    for name, verb in (("BeginWeightUpdate", "begin"), ("EndWeightUpdate", "end"))
)
