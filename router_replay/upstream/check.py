"""Holds an upstream against its ledger, and says all that differs in whole sentences."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

from router_replay.errors import SeamError
from router_replay.upstream.installed import Installed
from router_replay.upstream.reader import Found, Reader
from router_replay.upstream.seam import CALLED, PATCHED, Attribute, Ledger, Seam

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_NAMED = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_COLLECTING = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Problem:
    """One row that an upstream does not fit.

    Attributes:
        row: what was expected.
        path: full dotted path.
        expected: a noun phrase.
        found: a noun phrase.
    """

    row: Seam | Attribute
    path: str
    expected: str
    found: str

    def __str__(self) -> str:
        """Two sentences: what differs, and what the name is for."""
        return (
            f"{self.path}: expected {self.expected}, found {self.found}. It is {self.row.use} and needed because"
            f" {self.row.why}."
        )


def check(ledger: Ledger, reader: Reader) -> list[Problem]:
    """Every row of a ledger that a release does not fit, in the ledger's order."""
    release = reader.release
    problems: list[Problem] = []
    for seam in ledger.seams:
        differences = [_differs(seam, ledger.prefix + path, reader) for path in seam.paths(release)]
        # Any of its paths will do; of a row that fits none the newest is told.
        if None not in differences:
            problems += [difference for difference in differences if difference is not None][:1]
    for attribute in ledger.attributes:
        if attribute.owner is None or not attribute.needed_in(release):
            continue
        if found := _lacks(ledger.prefix + attribute.owner, attribute.name, reader):
            path = f"{ledger.prefix}{attribute.owner}.{attribute.name}"
            problems.append(Problem(attribute, path, "that attribute", found))
    return problems


def path_in(ledger: Ledger, seam: Seam, reader: Reader) -> str | None:
    """Full dotted path at which a row is found; None where the release does not need it, or does not fit."""
    paths = [ledger.prefix + path for path in seam.paths(reader.release)]
    return next((path for path in paths if _differs(seam, path, reader) is None), None)


def require(ledger: Ledger, reader: Reader | None = None) -> None:
    """Refuse an upstream that does not fit its ledger; the installed one by default.

    Raises:
        SeamError: with every row that it does not fit, the tested releases and the way out.
    """
    reader = Installed(ledger.distribution) if reader is None else reader
    if problems := check(ledger, reader):
        raise SeamError(message(ledger, reader.release, problems))


def message(ledger: Ledger, release: str | None, problems: Sequence[object]) -> str:
    """What a user reads: the release, one line for each problem, and the way out."""
    installed = f"{ledger.title} {release or 'of an unknown release'} ({ledger.distribution})"
    lines = "".join(f"\n  {problem}" for problem in problems)
    return (
        f"{ledger.subject} does not fit the installed {installed}:{lines}\n"
        f"This is {ledger.releases}. Install one of these, or {ledger.way_out}."
    )


def _differs(seam: Seam, path: str, reader: Reader) -> Problem | None:
    expected = _expected(seam)
    try:
        found = reader.find(path)
    except LookupError as error:
        return Problem(seam, path, expected, str(error.args[0]))
    if seam.verb in PATCHED and found.inherited_from is not None:
        return Problem(seam, path, expected, f"nothing of that name but what {found.inherited_from} bequeaths")
    if seam.parameters is None:
        return None
    if found.signature is None:
        return Problem(seam, path, expected, "something that is no function")
    return None if _fits(seam, found) else Problem(seam, path, expected, _shown(found.signature))


def _lacks(owner: str, name: str, reader: Reader) -> str | None:
    try:
        return "nothing in the class that sets it" if reader.has_attribute(owner, name) is False else None
    except LookupError as error:
        return str(error.args[0])


def _fits(seam: Seam, found: Found) -> bool:
    assert seam.parameters is not None
    assert found.signature is not None
    by_position, by_name = _split(seam.parameters)
    there = [parameter for parameter in found.signature.parameters.values() if parameter.kind not in _COLLECTING]
    positional = tuple(parameter.name for parameter in there if parameter.kind in _POSITIONAL)
    named = {parameter.name for parameter in there if parameter.kind in _NAMED}
    if positional[: len(by_position)] != by_position or not named.issuperset(by_name):
        return False
    ours = {*by_position, *by_name}
    needed = {parameter.name for parameter in there if parameter.default is inspect.Parameter.empty}
    return seam.verb not in CALLED or needed <= ours


def _split(parameters: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    cut = parameters.index("*") if "*" in parameters else len(parameters)
    return parameters[:cut], parameters[cut + 1 :]


def _expected(seam: Seam) -> str:
    if seam.parameters is None:
        return "that name"
    if not seam.parameters:
        return "a function that asks for no parameters" if seam.verb in CALLED else "a function"
    return f"parameters ({', '.join(seam.parameters)})"


def _shown(signature: inspect.Signature) -> str:
    # Names, stars and whether there is a default; annotations and the defaults themselves are long.
    bare = [
        parameter.replace(
            annotation=inspect.Parameter.empty,
            default=inspect.Parameter.empty if parameter.default is inspect.Parameter.empty else ...,
        )
        for parameter in signature.parameters.values()
    ]
    plain = inspect.Signature(bare)
    return f"parameters {str(plain).replace('=Ellipsis', '=...')}"
