"""An SGLang plugin for tests: reports from inside each server process, or renames a seam before hooks are applied."""

import json
import os
import pkgutil
import sys
import threading
import time
from importlib.metadata import entry_points
from pathlib import Path

_OWN = ("router_replay", "router_replay_cli", "sglang_router_capture", "megatron_router_replay")


def load() -> None:
    if folder := os.environ.get("ROUTER_CAPTURE_PROBE"):
        threading.Thread(target=_report_forever, args=(Path(folder),), daemon=True).start()


def _rename(path: str) -> None:
    owner_path, name = path.rsplit(".", 1)
    owner = pkgutil.resolve_name(owner_path)
    setattr(owner, name + "_renamed", getattr(owner, name))
    delattr(owner, name)


# Plugins are imported in the order in which the interpreter finds their distributions, and all of them before the
# first of them runs: what is done on import is done before any hook.
if renamed := os.environ.get("ROUTER_CAPTURE_PROBE_RENAME"):
    _rename(renamed)


def _report_forever(folder: Path) -> None:
    # The ledger's names are read without importing the package, whose presence is part of the report.
    paths = json.loads(os.environ["ROUTER_CAPTURE_PROBE_PATHS"])
    plugins = [plugin.name for plugin in entry_points(group="sglang.srt.plugins")]
    report_file = folder / f"{os.getpid()}.json"
    while True:
        report = {
            "command": sys.argv,
            "time": time.time(),
            "hooked_by": {path: _hooking_modules(pkgutil.resolve_name(path)) for path in paths},
            "hooks_imported": "sglang_router_capture.hooks" in sys.modules,
            "loaded": sorted(name for name in list(sys.modules) if name.partition(".")[0] in _OWN),
            "role": _role(),
            "environment": dict(os.environ),
            "plugins": plugins,
            "registered": _registered(),
            "modules": [name for name in list(sys.modules) if name.partition(".")[0] in ("sglang", "tests", *_OWN)],
        }
        partial = report_file.with_suffix(".partial")
        partial.write_text(json.dumps(report))
        partial.rename(report_file)
        time.sleep(2)


def _role() -> str:
    # There where SGLang has given its process a title.
    titles = sys.modules.get("setproctitle")
    title = titles.getproctitle() if titles else ""
    return title if title.startswith("sglang::") else "main"


def _registered() -> list[str]:
    """SGLang's registry: what it hooks, in which order, by whom."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    return [
        f"{target}: {kind.name} {hook.__module__}.{hook.__qualname__} of {source and source.plugin_name}"
        for target, hooks in list(HookRegistry._hooks.items())
        for kind, hook, source in hooks
    ]


def _hooking_modules(function) -> list[str]:
    """Modules of all functions that stand around or in the place of a live one."""
    found = []
    while (wrapped := getattr(function, "__wrapped__", None)) is not None:
        found += [getattr(cell.cell_contents, "__module__", None) for cell in function.__closure__ or ()]
        function = wrapped
    return [module for module in found if module is not None]
