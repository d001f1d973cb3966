"""Names and settings of verl that are gone: an error where the module is imported, or when masks are first replayed."""

from __future__ import annotations

import importlib
import inspect

import pytest

from router_replay.errors import SeamError
from router_replay.upstream import refuse, require

# isort: split
import cpu_engines.megatron  # noqa: F401 (before anything that may import Megatron)

# isort: split
from router_replay_adapters.verl import ledger
from router_replay_adapters.verl.refusals import SETTINGS

CONFIGS = (ledger.ENGINE_CONFIG, ledger.ROLLOUT_CONFIG, ledger.MODEL_CONFIG)
FIELDS = [
    (module, seam.name.removeprefix(f"{module}.")) for module in CONFIGS for seam in ledger.ledger_of(module).seams
]


@pytest.mark.parametrize(("module", "name"), FIELDS, ids=lambda part: part)
def test_a_setting_of_another_name_does_not_pass_for_its_default(
    module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, _, setting = name.partition(".")
    kind = getattr(importlib.import_module(f"verl.{module}"), owner)
    require(ledger.ledger_of(module))
    for each in kind.__mro__:
        if setting in each.__dict__:
            monkeypatch.delattr(each, setting)
        if setting in inspect.get_annotations(each):
            monkeypatch.delitem(each.__annotations__, setting)
    with pytest.raises(SeamError, match=rf"verl\.{module}\.{name}: expected that name, found nothing of that name"):
        require(ledger.ledger_of(module))


@pytest.mark.parametrize("setting", [row.setting for row in SETTINGS])
def test_a_configuration_without_a_setting_is_no_configuration_that_fits(setting: str) -> None:
    fields = {row.setting: None for row in SETTINGS if row.setting != setting}
    with pytest.raises(SeamError, match=f"expected a setting '{setting}', found none"):
        refuse(ledger.LEDGER, SETTINGS, type("Config", (), fields)())


def test_what_is_wrapped_is_in_a_module_of_the_ledger() -> None:
    from router_replay_adapters import verl

    assert verl._WRAPS.keys() <= set(ledger.MODULES)
