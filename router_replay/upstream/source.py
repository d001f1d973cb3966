"""Reads an upstream's release from its source, without importing it or what it depends on."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from router_replay.upstream.reader import Found, without_receiver
from router_replay.upstream.syntax import Function, bound, is_property, members, set_on_self, signature, statements

_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class _Module:
    """One parsed module; `names` are what it binds, `stars` the modules that it imports everything from."""

    path: str
    is_package: bool
    names: dict[str, ast.stmt]
    stars: tuple[str, ...]


@dataclass(frozen=True)
class _Class:
    module: _Module
    node: ast.ClassDef


@dataclass(frozen=True)
class _Value:
    """Something that is neither a module, a class nor a function: a constant, a field, a property."""


_Target = _Module | _Class | Function | _Value


class Source:
    """Reader of a folder into which wheels were unpacked.

    It follows imports, base classes and plain aliases (`a = b`) inside of the folder. Names that are made while the
    program runs are not seen.

    Attributes:
        root: folder that holds the distribution's packages and its `.dist-info`.
        distribution: name on the index.
    """

    def __init__(self, root: Path, distribution: str) -> None:
        self.root = root
        self.distribution = distribution
        self._parsed = cache(self._parse)

    @cached_property
    def release(self) -> str | None:
        """The distribution's version, by its metadata in the folder."""
        found = importlib.metadata.Distribution.discover(name=self.distribution, path=[str(self.root)])
        return next((distribution.version for distribution in found), None)

    def find(self, path: str) -> Found:
        """The name at a full dotted path.

        Raises:
            LookupError: there is none.
        """
        owner_path, _, name = path.rpartition(".")
        owner = self._walk(owner_path)
        inherited_from = None
        if isinstance(owner, _Class):
            holder = next((base for base in self._lineage(owner) if name in members(base.node)), None)
            if holder is None:
                raise LookupError(f"nothing of that name (class {owner.node.name} has no {name!r})")
            if holder.node is not owner.node:
                inherited_from = holder.node.name
        return Found(self._signature(self._member(owner, name, path)), inherited_from)

    def has_field(self, owner: str, name: str) -> bool:
        """Whether the class at a full dotted path, or a base of it, declares an annotated field."""
        return any(
            isinstance(members(base.node).get(name), ast.AnnAssign) for base in self._lineage(self._class(owner))
        )

    def has_attribute(self, owner: str, name: str) -> bool | None:
        """Whether the class at a full dotted path, or a base of it, sets, declares or computes an attribute."""
        return any(
            name in members(base.node) or name in set_on_self(base.node) for base in self._lineage(self._class(owner))
        )

    def _class(self, path: str) -> _Class:
        found = self._walk(path)
        if not isinstance(found, _Class):
            raise LookupError(f"no class at {path}")
        return found

    def _walk(self, path: str) -> _Target:
        names = path.split(".")
        module = next((end for end in range(len(names), 0, -1) if self._file(".".join(names[:end])) is not None), None)
        if module is None:
            raise LookupError(f"nothing of that name (no module {names[0]!r})")
        target: _Target = self._parsed(".".join(names[:module]))
        for end in range(module, len(names)):
            target = self._member(target, names[end], ".".join(names[: end + 1]))
        return target

    def _member(self, owner: _Target, name: str, path: str) -> _Target:
        if isinstance(owner, _Module):
            return self._in_module(owner, name)
        if isinstance(owner, _Class):
            for base in self._lineage(owner):
                if (node := members(base.node).get(name)) is not None:
                    return self._target(base.module, node, name)
        raise LookupError(f"nothing of that name ({path.rpartition('.')[0]} has no {name!r})")

    def _in_module(self, module: _Module, name: str) -> _Target:
        if name in module.names:
            return self._target(module, module.names[name], name)
        if self._file(f"{module.path}.{name}") is not None:
            return self._parsed(f"{module.path}.{name}")
        for star in module.stars:
            if self._file(star) is not None:
                try:
                    return self._in_module(self._parsed(star), name)
                except LookupError:
                    continue
        raise LookupError(f"nothing of that name (module {module.path} has no {name!r})")

    def _target(self, module: _Module, node: ast.stmt, name: str) -> _Target:
        if isinstance(node, ast.ClassDef):
            return _Class(module, node)
        if isinstance(node, ast.Import | ast.ImportFrom):
            return self._imported(module, node, name)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and node.value.id in module.names:
            return self._target(module, module.names[node.value.id], node.value.id)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_property(node):
            return node
        return _Value()

    def _imported(self, module: _Module, node: ast.Import | ast.ImportFrom, name: str) -> _Target:
        alias = next(alias for alias in node.names if (alias.asname or alias.name.partition(".")[0]) == name)
        if isinstance(node, ast.Import):
            path = alias.name if alias.asname else name
            if self._file(path) is None:
                raise LookupError(f"an import of {path}, which is not part of this distribution")
            return self._parsed(path)
        source = _absolute(module, node)
        if self._file(source) is None:
            raise LookupError(f"an import of {alias.name} from {source}, which is not part of this distribution")
        return self._in_module(self._parsed(source), alias.name)

    def _lineage(self, cls: _Class) -> Iterator[_Class]:
        """A class and its bases inside of the folder, depth first."""
        yield cls
        for base in cls.node.bases:
            # `Generic[T]` is the class behind its brackets.
            expression = base.value if isinstance(base, ast.Subscript) else base
            try:
                found = self._expression(cls.module, expression)
            except LookupError:
                continue
            if isinstance(found, _Class):
                yield from self._lineage(found)

    def _expression(self, module: _Module, node: ast.expr) -> _Target:
        if isinstance(node, ast.Name):
            return self._in_module(module, node.id)
        if isinstance(node, ast.Attribute):
            return self._member(self._expression(module, node.value), node.attr, ast.unparse(node))
        raise LookupError(f"{ast.unparse(node)} is no name")

    def _signature(self, target: _Target) -> inspect.Signature | None:
        if isinstance(target, ast.FunctionDef | ast.AsyncFunctionDef):
            return without_receiver(signature(target.args))
        if isinstance(target, _Class):
            for base in self._lineage(target):
                if isinstance(init := members(base.node).get("__init__"), ast.FunctionDef):
                    return without_receiver(signature(init.args))
        return None

    def _file(self, module: str) -> Path | None:
        stem = self.root.joinpath(*module.split("."))
        # A folder without __init__.py is a package, too: `megatron` is one.
        for file in (stem / "__init__.py", stem.with_name(f"{stem.name}.py")):
            if file.is_file():
                return file
        return stem if stem.is_dir() else None

    def _parse(self, path: str) -> _Module:
        file = self._file(path)
        if file is None or file.is_dir():
            return _Module(path, True, {}, ())
        package = file.name == "__init__.py"
        names: dict[str, ast.stmt] = {}
        module = _Module(path, package, names, ())
        stars = []
        for node in statements(ast.parse(file.read_text(encoding="utf-8")).body):
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                stars.append(_absolute(module, node))
            for name in bound(node):
                # `ServerArgs = assembled(ServerArgs)` leaves the methods of the class where they were.
                if not (isinstance(node, ast.Assign) and isinstance(names.get(name), _DEFINITIONS)):
                    names[name] = node
        return _Module(path, package, names, tuple(stars))


def _absolute(module: _Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.path.split(".")
    package = parts[: len(parts) - node.level + module.is_package]
    return ".".join([*package, node.module] if node.module else package)
