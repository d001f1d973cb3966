"""The stacks, and what each of them has to be told: one table for the adapters' starts and for `r3 doctor --stack`.

Nothing here imports a stack.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from router_replay.upstream import Ledger
from sglang_router_capture.options import ENABLE_VARIABLE, FORMAT_VARIABLE, CaptureOptions

logger = logging.getLogger(__name__)

FORMAT = "sglang"
"""The format of routes that stacks decode, as it comes from SGLang's own capture."""

_CAPTURE = {ENABLE_VARIABLE: "1", FORMAT_VARIABLE: FORMAT}


@dataclass(frozen=True)
class Stack:
    """A stack as `r3 doctor` tells of it.

    Attributes:
        name: on the command line.
        title: in prose.
        package: that it is imported by.
        distributions: its names on an index and in its own repository.
        adapter: module of its adapter; None where there is none.
        ledgers: of the adapter, each as `module:name`.
        variables: that every process of a job has to have, so that they belong into Ray's `runtime_env`.
        arguments: of its command line, each as one would type it.
        remark: what else there is to say, as sentences.
        format: of the routes that it reads.
        not_with: arguments with which it never loads the adapter, each as one would type it.
    """

    name: str
    title: str
    package: str
    distributions: tuple[str, ...]
    adapter: str | None
    ledgers: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    remark: str = ""
    format: str = FORMAT
    not_with: tuple[str, ...] = ()

    def installed(self) -> tuple[str, str] | None:
        """Name and release of the distribution that is installed; None where there is none."""
        for name in self.distributions:
            try:
                return name, importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return None

    def variables_to_set(self, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
        """Variables that an environment does not have as this stack needs them.

        Where it asks for capture, the format is among them if it asks for another one than the stack reads.

        Raises:
            InputError: capture is asked for with a format or a codec that does not exist.
        """
        to_set = {name: value for name, value in self.variables.items() if not _is_set(name, value, environ)}
        options = CaptureOptions.from_environment(environ)
        if options is not None and options.format != self.format:
            to_set[FORMAT_VARIABLE] = self.format
        return to_set

    def arguments_to_give(self, given: Sequence[str]) -> list[str]:
        """Arguments that a command line does not have."""
        return [argument for argument in self.arguments if not _is_given(argument.split(), given)]

    def arguments_to_take_away(self, given: Sequence[str]) -> list[str]:
        """Arguments that a command line has, and with which the adapter is never loaded."""
        return [argument for argument in self.not_with if _is_given(argument.split(), given)]


# miles' FSDP backend calls no --custom-megatron-init-path.
_NOT_WITH = {"miles": ("--train-backend fsdp",)}


def _of_megatron_init(name: str, title: str, distributions: tuple[str, ...], ledger: str) -> Stack:
    adapter = f"router_replay_adapters.{name}"
    return Stack(
        name,
        title,
        name,
        distributions,
        adapter,
        (ledger,),
        _CAPTURE,
        ("--use-rollout-routing-replay", f"--custom-megatron-init-path {adapter}.init"),
        f"With an initialisation of your own behind --custom-megatron-init-path, call {adapter}.init(args) in it.",
        not_with=_NOT_WITH.get(name, ()),
    )


def _of_packed_queues(
    stack: str, distributions: tuple[str, ...], ledgers: tuple[str, ...], flag: str, function: str, of_ones_own: str
) -> Stack:
    adapter = f"router_replay_adapters.{stack}_packed"
    return Stack(
        f"{stack}-packed",
        f"{stack}, with packed rows",
        stack,
        distributions,
        adapter,
        tuple(f"{adapter}:{name}" for name in ledgers),
        {ENABLE_VARIABLE: "1"},
        (
            "--use-rollout-routing-replay",
            f"--custom-megatron-init-path {adapter}.init",
            f"{flag} {adapter}.{function}",
        ),
        f"With an initialisation of your own, call {adapter}.init(args) in it; with a function of your own behind"
        f" {flag}, {of_ones_own.format(adapter)}.",
        format="masks",
        not_with=_NOT_WITH.get(stack, ()),
    )


# verl asks its servers for routes itself, which this package's recorder answers.
_VERL = {"VERL_USE_EXTERNAL_MODULES": "router_replay_adapters.verl"}
_VERL_ASKS = "actor_rollout_ref.rollout.enable_rollout_routing_replay=True"

STACKS = {
    stack.name: stack
    for stack in (
        _of_megatron_init("miles", "miles", ("miles-rl", "miles"), "router_replay_adapters.miles:LEDGER"),
        _of_packed_queues(
            "miles",
            ("miles-rl", "miles"),
            ("miles.LEDGER", "SAMPLES", "GENERATE", "TRAINER"),
            "--custom-generate-function-path",
            "generate",
            "import {} in its module",
        ),
        _of_megatron_init("slime", "slime", ("slime",), "router_replay_adapters.slime:LEDGER"),
        _of_packed_queues(
            "slime",
            ("slime",),
            ("slime.LEDGER", "SAMPLES", "CONVERSION", "TRAINER", "QUEUES"),
            "--custom-convert-samples-to-train-data-path",
            "convert",
            "call {}.convert(args, samples) in it",
        ),
        Stack(
            "verl",
            "verl",
            "verl",
            ("verl",),
            "router_replay_adapters.verl",
            ("router_replay_adapters.verl.ledger:LEDGER",),
            _VERL,
            (_VERL_ASKS, "actor_rollout_ref.actor.megatron.router_replay.mode=R3"),
            f"With {ENABLE_VARIABLE}, which alone asks for packed rows, {FORMAT_VARIABLE}={FORMAT} has to be set, too.",
        ),
        Stack(
            "verl-packed",
            "verl, with packed rows",
            "verl",
            ("verl",),
            "router_replay_adapters.verl",
            ("router_replay_adapters.verl.ledger:LEDGER",),
            {**_VERL, ENABLE_VARIABLE: "1"},
            (_VERL_ASKS, "actor_rollout_ref.actor.megatron.router_replay.mode=disabled"),
            format="masks",
        ),
        Stack(
            "nemo-rl",
            "NeMo-RL",
            "nemo_rl",
            ("nemo-rl",),
            None,
            remark=(
                "NeMo-RL takes routes from vLLM alone: it replays in Megatron policies, and these have no way to give"
                " their weights to SGLang."
            ),
        ),
    )
}
"""Every stack by its name on the command line."""


def ledgers_of(package: str) -> tuple[Ledger, ...]:
    """Those of all adapters to a package, each once."""
    names = [name for stack in STACKS.values() if stack.package == package for name in stack.ledgers]
    return tuple({id(ledger): ledger for ledger in map(pkgutil.resolve_name, names)}.values())


def say_at_start(stack: Stack, *, asked: bool) -> None:
    """One line of a trainer's log: what its adapter did, and what is still missing.

    Args:
        asked: whether the stack was told to replay.
    """
    if not asked:
        logger.warning("%s: %s is not given, so that nothing is replayed", stack.adapter, stack.arguments[0])
        return
    found = stack.installed()
    release = "of an unknown release" if found is None else " ".join(found)
    done = f"{stack.adapter} is on ({stack.title}, {release}): rows without routes take the router's own experts"
    if missing := stack.variables_to_set():
        logger.warning(
            "%s. This process lacks %s: where the servers lack it, too, they may answer without routes in format %s;"
            " it belongs into Ray's runtime_env",
            done,
            " and ".join(f"{name}={value}" for name, value in missing.items()),
            stack.format,
        )
    else:
        logger.info("%s", done)


def _is_set(name: str, value: str, environ: Mapping[str, str]) -> bool:
    if name == ENABLE_VARIABLE:
        return CaptureOptions.from_environment(environ) is not None
    # Lists of modules among them are separated by commas.
    return value in environ.get(name, "").split(",")


def _is_given(words: Sequence[str], given: Sequence[str]) -> bool:
    # Hydra adds what is not in its configuration by a plus.
    plain = [word.lstrip("+") for word in given]
    together = list(words)
    return "=".join(words) in plain or any(
        plain[start : start + len(words)] == together for start in range(len(plain) - len(words) + 1)
    )
