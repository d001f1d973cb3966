"""The package knows neither engine."""

import subprocess
import sys

_PROGRAM = """
import pkgutil, sys, router_replay.masks
for module in pkgutil.walk_packages(router_replay.masks.__path__, "router_replay.masks."):
    __import__(module.name)
print(sorted({name.split(".")[0] for name in sys.modules} & {"sglang", "megatron", "transformers", "ray"}))
"""


def test_no_module_imports_an_engine():
    result = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
