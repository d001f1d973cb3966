"""What `r3 doctor` says of one ledger: whether the installed upstream fits it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from router_replay.upstream import Ledger


def print_ledger(console: Console, ledger: Ledger, *, released: bool = True) -> bool:
    """Hold a ledger against what can be imported here, and tell what differs.

    Args:
        released: whether what no distribution is installed of is not there; otherwise its names are looked for, too.

    Returns:
        Whether it fits; what is not there is no fault.
    """
    from router_replay.upstream import Installed, check

    title = f"{ledger.title}, {ledger.subject}"
    reader = Installed(ledger.distribution)
    if reader.release is None and released:
        console.print(f"  {title}: {ledger.distribution} is not installed", style="dim")
        return True
    with console.status(f"  {title}: importing"):
        problems = check(ledger, reader)
    num_names = sum(bool(seam.paths(reader.release)) for seam in ledger.seams)
    of_release = f"{num_names} names of {reader.release or 'an unknown release'} ({ledger.releases})"
    if not problems:
        console.print(f"  [green]fits[/] {title}: {of_release}")
        return True
    console.print(f"  [red]does not fit[/] {title}: {len(problems)} of {of_release}")
    for problem in problems:
        console.print(f"    {problem}", markup=False)
    return False
