"""Adapter to verl, of its routes and their meaning: `VERL_USE_EXTERNAL_MODULES=router_replay_adapters.verl`.

verl imports this in each of its processes while it is imported itself. Nothing of verl is loaded here: names are
checked and wrapped behind the import of the module that has them, in the process that needs it.

- Answers of SGLang, in the format `sglang`, are decoded (`answers`).
- Rows that verl adds to routes are -1, not expert 0 (`padding`).
- In the trainer a row of -1 is the router's own choice (`known_rows`).

With `SGLANG_ROUTER_CAPTURE=1` beside it, and verl's own replay off, routes stay packed on their way (`packed`), and
`megatron_router_replay` takes the place of verl's replay (`engine`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from router_replay_adapters.on_import import Wrap, wrap_on_import
from router_replay_adapters.verl import answers, engine, known_rows, ledger, packed, padding


def _as_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    return packed.around_as_dict(padding.around_as_dict(original))


def _agent_loop_postprocess(original: Callable[..., Any]) -> Callable[..., Any]:
    return packed.around_agent_loop_postprocess(padding.around_agent_loop_postprocess(original))


_WRAPS: dict[str, dict[str, Wrap]] = {
    ledger.REPLAY: {
        "RouterReplay.set_target_indices": known_rows.around_set_target_indices,
        "RouterReplay.get_replay_topk": known_rows.around_get_replay_topk,
    },
    ledger.AGENT_LOOP: {
        "AgentLoopOutput.as_dict": _as_dict,
        "AgentLoopWorker._agent_loop_postprocess": _agent_loop_postprocess,
    },
    ledger.TOOL_LOOP: {"ToolAgentLoop._handle_generating_state": answers.around_handle_generating_state},
    ledger.PADDING_SAMPLES: {
        "build_padding_routed_experts": padding.around_build_padding_routed_experts,
        "construct_minimal_padding_template": packed.around_construct_minimal_padding_template,
    },
    ledger.ENGINE: {
        "MegatronEngineWithLMHead.forward_step": engine.around_forward_step,
        "MegatronEngine.optimizer_step": engine.around_optimizer_step,
    },
    ledger.ANY_ENGINE: {"BaseEngine.train_batch": engine.around_train_batch},
    ledger.SGLANG_SERVER: {"SGLangHttpServer.generate": answers.around_generate},
}
"""By module below `verl`, and by name in it; of the ledger's other modules names are only checked."""

_logger = logging.getLogger(__name__)


def _install() -> None:
    for module in ledger.MODULES:
        wraps = {f"{module}.{name}": wrap for name, wrap in _WRAPS.get(module, {}).items()}
        wrap_on_import(ledger.ledger_of(module), f"{ledger.LEDGER.prefix}{module}", wraps, _tell)
    # As loud as what verl lets through.
    _logger.warning(
        "router_replay_adapters.verl: on in process %d; %d names of verl are wrapped as their modules are imported",
        os.getpid(),
        sum(map(len, _WRAPS.values())),
    )


def _tell(module: str) -> None:
    names = ", ".join(_WRAPS.get(module.removeprefix(ledger.LEDGER.prefix), ())) or "nothing, all of it is as expected"
    _logger.info("router_replay_adapters.verl: wrapped in %s: %s", module, names)


_install()
