"""The subcommand `r3 doctor`: what is installed here, whether it fits, and what a server would be refused for."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import warnings
from typing import TYPE_CHECKING, Annotated

import typer

from router_replay_adapters.stacks import STACKS
from router_replay_cli.ledgers import print_ledger
from router_replay_cli.running_server import print_running_server
from router_replay_cli.stack import print_stack

if TYPE_CHECKING:
    from rich.console import Console

    from router_replay.upstream import Ledger

_PACKAGES = ("sglang", "megatron-core", "transformer-engine", "torch", "transformers", "numpy", "safetensors")


def doctor(
    flags: Annotated[
        list[str] | None,
        typer.Argument(
            help="Flags of an SGLang server, as they would follow `python -m sglang.launch_server`; with --stack the"
            " arguments of that stack's command.",
            show_default=False,
        ),
    ] = None,
    stack: Annotated[
        str | None,
        typer.Option(
            help=f"Say what there is of a stack, and what it has to be told: {', '.join(STACKS)}.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(help="Say which capturer a running server has.", metavar="URL", show_default=False),
    ] = None,
) -> None:
    """Say what is installed here, whether it fits, and what a server with these flags would be refused for.

    Versions; every name of the engines that this package stands on, held against what is installed; the
    kernels of this process. With flags of an SGLang server: whether it would capture, what it would be refused for, and
    what capture would cost, by SGLang's own parser and without starting anything. One engine is enough.

    With --stack: what is installed of that stack, whether its names fit this package's adapter, and which variables and
    arguments it lacks, by this environment and by the arguments of its command, if they follow. With --server: what a
    server that runs says of its capturer.

    The exit status is 1 where something does not fit.
    """
    from rich.console import Console

    if stack is not None and stack not in STACKS:
        raise typer.BadParameter(f"{stack!r} is none of {', '.join(STACKS)}", param_hint="--stack")
    # A terminal wraps by itself, and messages that are cut in two cannot be searched for.
    console = Console(highlight=False, soft_wrap=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _print_versions(console)
        fits = [_print_ledgers(console), _print_kernels(console)]
        if stack is not None:
            fits.append(print_stack(console, STACKS[stack], flags or []))
        elif flags:
            fits.append(_print_server(console, flags))
        if server is not None:
            fits.append(print_running_server(console, server, None if stack is None else STACKS[stack].format))
    if not all(fits):
        raise typer.Exit(1)


def _print_versions(console: Console) -> None:
    from router_replay import __version__

    console.print("Versions", style="bold")
    console.print(f"  Python {platform.python_version()}, rollout-routing-replay {__version__}")
    for name in _PACKAGES:
        try:
            console.print(f"  {name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            console.print(f"  {name}: not installed", style="dim")


def _print_ledgers(console: Console) -> bool:
    console.print("\nNames that this package stands on", style="bold")
    fits = [print_ledger(console, ledger) for ledger in _ledgers()]
    return all(fits)


def _ledgers() -> list[Ledger]:
    from router_replay.replay.torch_checkpoint import TORCH_LEDGER
    from router_replay.upstream import Installed
    from sglang_router_capture.ledger import LEDGER as CAPTURE_LEDGER

    ledgers = [CAPTURE_LEDGER]
    # A trainer's end cannot be imported without its engine, of which the versions say that it is not there.
    if Installed("megatron-core").release is not None:
        from megatron_router_replay.ledger import AVERAGES_LEDGER, TRANSFORMER_ENGINE_LEDGER
        from megatron_router_replay.ledger import LEDGER as MEGATRON_LEDGER

        ledgers += [MEGATRON_LEDGER, AVERAGES_LEDGER, TRANSFORMER_ENGINE_LEDGER]
    if Installed("transformers").release is not None:
        from hf_router_replay.ledger import LEDGER as HF_LEDGER

        ledgers.append(HF_LEDGER)
    return [*ledgers, TORCH_LEDGER]


def _print_kernels(console: Console) -> bool:
    import torch

    from router_replay.masks.codecs.ops import MISSING_KERNELS

    console.print("\nKernels of the codecs", style="bold")
    present = {"cpu": True, "cuda": torch.cuda.is_available()}
    fits = True
    for device, there in present.items():
        reason = MISSING_KERNELS.get(device)
        if not there:
            console.print(f"  {device}: no such device here", style="dim")
        elif reason is None:
            console.print(f"  [green]loaded[/] {device}")
        else:
            fits = False
            console.print(f"  [red]missing[/] {device}, plain torch runs in their place: {reason}")
    return fits


def _print_server(console: Console, flags: list[str]) -> bool:
    console.print("\nA server with these flags", style="bold")
    if importlib.util.find_spec("sglang") is None:
        console.print("  [red]SGLang is not installed here[/]")
        return False
    from sglang_router_capture.preview import preview

    with console.status("  resolving its settings"):
        found = preview(flags)
    if found.asked:
        console.print(f"  captures: format {found.options.format}, codec {found.codec or found.options.codec}")
    else:
        console.print("  captures nothing: add --enable-router-capture. If it did:", style="yellow")
    if found.geometry is not None:
        geometry = found.geometry
        console.print(
            f"  {geometry.num_moe_layers} MoE layers of {geometry.top_k} of {geometry.num_experts} experts:"
            f" a row of {found.row_bytes} bytes for each KV slot, in host memory"
        )
    for sentence in found.refused:
        console.print("  [red]refused[/]", end=" ")
        console.print(sentence, markup=False)
    if not found.refused:
        console.print(
            "  [green]nothing refused[/] by its settings; a live server also looks at its KV pools and at the model's"
            " routers"
        )
    return not found.refused
