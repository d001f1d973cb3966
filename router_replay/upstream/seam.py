"""Rows of a ledger: the upstream names that one end stands on."""

from __future__ import annotations

from dataclasses import dataclass

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

PATCHED = ("hooked", "wrapped")
"""Uses that put something of ours in the place of the name, which therefore must be the owner's own."""
CALLED = ("called", "overridden", "answered")
"""Uses in which one side calls the other: a further parameter without a default would break the call."""
_USES = (*PATCHED, *CALLED, "inherited", "read", "relied")


def in_range(releases: str, release: str | None) -> bool | None:
    """Whether a release is in a PEP 440 range; None where the release is not known, or is no version.

    A pre-release counts as the release that it leads to, whose names it mostly has already.
    """
    try:
        return None if release is None else SpecifierSet(releases).contains(Version(release).base_version)
    except InvalidVersion:
        return None


@dataclass(frozen=True)
class At:
    """Where a name is in some releases.

    Attributes:
        path: dotted path below the ledger's prefix.
        releases: PEP 440 range, such as `>=0.5.23`; all releases where it is empty.
    """

    path: str
    releases: str = ""

    def holds_in(self, release: str | None) -> bool:
        """Whether the name is expected here in a release; an unknown one may have it anywhere."""
        return in_range(self.releases, release) is not False


@dataclass(frozen=True)
class Seam:
    """One upstream name that can be found, and whose parameters can be read.

    Attributes:
        where: dotted path below the ledger's prefix; or several by release, the newest first, of which any that is
            there will do. A name that no entry expects in a release is not needed in it.
        parameters: those that we use, and no others: by position first, in their order, then after `"*"` those that
            are passed by name, in any order. None where the name only has to exist: a class, a field, a member.
        use: what we do with it and where, such as `hooked by hooks.after_alloc`. The first word is one of hooked
            (SGLang's registry puts our hook around it), wrapped (we do so), called, overridden, answered (upstream
            calls an object of ours in its place), inherited, read, relied (on).
        why: a clause that completes "it is needed because ...".
        until: what would make the row unnecessary.
    """

    where: str | tuple[At, ...]
    parameters: tuple[str, ...] | None
    use: str
    why: str
    until: str

    def __post_init__(self) -> None:
        _require_use(self.use)

    @property
    def places(self) -> tuple[At, ...]:
        """`where`, with the releases of each path."""
        return (At(self.where),) if isinstance(self.where, str) else self.where

    @property
    def name(self) -> str:
        """Newest path, by which the rest of the code names the row."""
        return self.places[0].path

    @property
    def verb(self) -> str:
        """First word of `use`."""
        return self.use.split()[0]

    def paths(self, release: str | None) -> tuple[str, ...]:
        """Paths below the prefix, any of which will do in a release; none where the row is not needed in it."""
        return tuple(place.path for place in self.places if place.holds_in(release))


@dataclass(frozen=True)
class Attribute:
    """One attribute of upstream's objects, set while they live: no signature shows it, so a test has to.

    Attributes:
        owner: dotted path, below the ledger's prefix, of the class whose objects have it; None where it is any class.
        name: the attribute.
        use: as in `Seam`.
        why: as in `Seam`.
        noticed_by: node of a test that fails without it, such as `tests/test_x.py::test_y`.
        releases: PEP 440 range of the releases in which it is needed; all where it is empty.
    """

    owner: str | None
    name: str
    use: str
    why: str
    noticed_by: str
    releases: str = ""

    def __post_init__(self) -> None:
        _require_use(self.use)

    @property
    def verb(self) -> str:
        """First word of `use`."""
        return self.use.split()[0]

    def needed_in(self, release: str | None) -> bool:
        """Whether a release has to have it."""
        return At(self.name, self.releases).holds_in(release)


@dataclass(frozen=True)
class Ledger:
    """Everything of one distribution that one part of this project stands on.

    Attributes:
        distribution: its name on the index, whose version is the installed release.
        title: its name in prose.
        prefix: of every path, with the last dot.
        subject: what needs the names, as the beginning of a message.
        tested: releases with which our tests of the running engine passed.
        checked: releases against which only the ledger was held.
        way_out: a clause in the imperative for whoever can install no other release.
        seams: the names.
        attributes: what no reader can find by import.
    """

    distribution: str
    title: str
    prefix: str
    subject: str
    tested: tuple[str, ...]
    checked: tuple[str, ...]
    way_out: str
    seams: tuple[Seam, ...]
    attributes: tuple[Attribute, ...] = ()

    def seam(self, name: str) -> Seam:
        """The row of that name."""
        return next(seam for seam in self.seams if seam.name == name)

    @property
    def releases(self) -> str:
        """Half a sentence: which releases are tested, and which only checked."""
        if not self.tested:
            return f"tested with no {self.title}; names and parameters fit {_listed(self.checked)}"
        checked = f"; names and parameters also fit {_listed(self.checked)}" if self.checked else ""
        return f"tested with {self.title} {_listed(self.tested)}{checked}"


def _listed(releases: tuple[str, ...]) -> str:
    return releases[0] if len(releases) == 1 else f"{', '.join(releases[:-1])} and {releases[-1]}"


def _require_use(use: str) -> None:
    words = use.split()
    if len(words) != (4 if words[0] == "relied" else 3) or words[0] not in _USES or words[-2] != "by":
        raise ValueError(f"a use reads '<verb> by <ours>' with a verb of {', '.join(_USES)} (on), not {use!r}")
