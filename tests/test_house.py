"""The package's shape: rooms that import downwards only, short functions and modules, and public names that are listed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

import refusal_direction

PACKAGE = Path(refusal_direction.__file__).parent
ROOMS = (
    ("errors", "config"),
    ("directions", "candidates"),
    ("runtime",),
    ("demo",),
    ("prompts",),
    ("models",),
    ("methods",),
    ("engine",),
    ("scoring",),
    ("selection",),
    ("results",),
    ("output",),
    ("fingerprint", "records"),
    ("pipeline",),
    ("estimate",),
    ("flags",),
    ("cli",),
    ("__main__",),
)
"""From the bottom up. What the package offers, `refusal_direction/__init__.py`, is above them all and below none."""
LONGEST_FUNCTION, LONGEST_MODULE = 60, 400
FOR_TYPES_ONLY: frozenset[tuple[str, str]] = frozenset()
"""Modules that may name the types of a higher room, and that room, each with its reason."""


@dataclass(frozen=True)
class Module:
    """A module's source, by its dotted name."""

    name: str
    source: str
    is_package: bool = False

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @property
    def room(self) -> str:
        return (*self.name.split("."), "")[1]


@dataclass(frozen=True)
class Import:
    """One module's import of another, and whether it takes place whenever the module is loaded."""

    importer: str
    imported: str
    at_load: bool
    for_types: bool = False


def modules_of(folder: Path, name: str) -> list[Module]:
    found = []
    for path in sorted(folder.rglob("*.py")):
        parts = [name, *path.relative_to(folder).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        found.append(Module(".".join(parts[:-1] if is_package else parts), path.read_text("utf-8"), is_package))
    return found


def imports_of(module: Module, known: set[str]) -> Iterator[Import]:
    """Those of the package's own modules; a name that is taken from a package may be one of its modules."""

    def within(nodes: list[ast.stmt], at_load: bool, for_types: bool) -> Iterator[Import]:
        for node in nodes:
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = ".".join([*_above(module, node.level), *((node.module or "").split(".") if node.module else [])])
                names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
            else:
                is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
                for inner in ("body", "orelse", "finalbody", "handlers"):
                    for_these = for_types or (types and inner == "body")
                    yield from within(getattr(node, inner, []), at_load and not is_function, for_these)
                continue
            yield from (
                Import(module.name, name, at_load and not for_types, for_types) for name in names if name in known
            )

    yield from within(module.tree.body, at_load=True, for_types=False)


def _above(module: Module, level: int) -> list[str]:
    parts = module.name.split(".")
    return parts[: len(parts) - level + module.is_package] if level else []


def climbing(modules: list[Module]) -> list[str]:
    """Imports from a higher room, whenever they take place, and of rooms that have no place."""
    height = {room: number for number, rooms in enumerate(ROOMS) for room in rooms}
    known, found = {module.name for module in modules}, []
    for module in modules:
        if module.room and module.room not in height:
            found.append(f"{module.name} is in no room")
            continue
        for one in imports_of(module, known):
            room = (*one.imported.split("."), "")[1]
            above = room not in height or height[room] > height.get(module.room, len(ROOMS))
            if above and not (one.for_types and (module.name, room) in FOR_TYPES_ONLY):
                found.append(f"{one.importer} imports {one.imported}")
    return found


def circle(modules: list[Module]) -> list[str]:
    """Modules that load each other in a circle, if there are any; else nothing."""
    known = {module.name for module in modules}
    waiting = {
        module.name: {one.imported for one in imports_of(module, known) if one.at_load} - {module.name}
        for module in modules
    }
    while free := [name for name, needs in waiting.items() if not needs & waiting.keys()]:
        for name in free:
            del waiting[name]
    return sorted(waiting)


def too_long(modules: list[Module]) -> list[str]:
    found = []
    for module in modules:
        if len(module.source.splitlines()) > LONGEST_MODULE:
            found.append(module.name)
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION:
                    found.append(f"{module.name}.{node.name}")
    return found


def wrongly_listed(modules: list[Module]) -> list[str]:
    """Names of `__all__` that are not defined, and public functions, classes and constants that are not in it."""
    return [f"{module.name}.{name}" for module in modules for name in sorted(_listed(module) ^ _public(module))]


def _listed(module: Module) -> set[str]:
    for node in module.tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == "__all__":
            return set(ast.literal_eval(node.value))  # type: ignore[attr-defined]
    return set()


def _public(module: Module) -> set[str]:
    """What a module defines, but for its log; imported names only where they are listed."""
    defined, imported = set(), set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom):
            imported |= {alias.asname or alias.name for alias in node.names}
    for node in module.tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return {name for name in defined - {"log"} if not name.startswith("_")} | (imported & _listed(module))


@pytest.fixture(scope="module")
def modules() -> list[Module]:
    return modules_of(PACKAGE, "refusal_direction")


def test_no_module_imports_from_a_room_above_its_own(modules: list[Module]) -> None:
    assert climbing([module for module in modules if module.name != "refusal_direction"]) == []


def test_no_modules_load_each_other_in_a_circle(modules: list[Module]) -> None:
    assert circle(modules) == []


def test_functions_and_modules_are_short(modules: list[Module]) -> None:
    assert too_long(modules) == []


def test_public_names_are_those_of_all(modules: list[Module]) -> None:
    """The package's own, which are imported when they are asked for, are tested in test_api.py."""
    assert wrongly_listed([module for module in modules if module.name != "refusal_direction"]) == []


# Controls: planted violations


def planted(**sources: str) -> list[Module]:
    folders = {name.rpartition("__")[0] for name in sources}
    return [
        Module(f"house.{name.replace('__', '.')}", source, is_package=name in folders)
        for name, source in {**dict.fromkeys(filter(None, folders), ""), **sources}.items()
    ]


@pytest.mark.parametrize(
    "statement",
    [
        "import house.engine.rows",
        "from house.engine.rows import Row",
        "from house.engine import rows",
        "from ..engine.rows import Row",
        "def late():\n    from house.engine import rows",
        "try:\n    pass\nexcept OSError:\n    import house.engine.rows",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.engine.rows import Row",
    ],
)
def test_an_import_from_above_is_found(statement: str) -> None:
    found = climbing(planted(models__chat=statement, engine__rows=""))
    assert found == ["house.models.chat imports house.engine.rows"]
    assert climbing(planted(models__chat="", engine__rows="import house.models.chat")) == []


def test_a_room_without_a_place_is_found() -> None:
    assert climbing(planted(attic="")) == ["house.attic is in no room"]


@pytest.mark.parametrize(
    ("back", "found"),
    [
        ("import house.models.one", ["house.models.one", "house.models.three", "house.models.two"]),
        ("def late():\n    import house.models.one", []),
        ("", []),
    ],
)
def test_a_circle_is_found_unless_a_function_closes_it(back: str, found: list[str]) -> None:
    one, two = "from house.models import two", "from house.models.three import x"
    assert circle(planted(models__one=one, models__two=two, models__three=back)) == found


@pytest.mark.parametrize("lines", [LONGEST_FUNCTION, LONGEST_FUNCTION + 1])
def test_a_long_function_is_found(lines: int) -> None:
    source = "class A:\n    def f():\n" + "        pass\n" * (lines - 1)
    assert too_long(planted(cli=source)) == (["house.cli.f"] if lines > LONGEST_FUNCTION else [])


@pytest.mark.parametrize("lines", [LONGEST_MODULE, LONGEST_MODULE + 1])
def test_a_long_module_is_found(lines: int) -> None:
    assert too_long(planted(cli="pass\n" * lines)) == (["house.cli"] if lines > LONGEST_MODULE else [])


def test_names_that_are_listed_but_not_there_or_there_but_not_listed_are_found() -> None:
    source = (
        "from a import b, c\n__all__ = ['b', 'gone', 'here']\ndef here(): ...\nclass New: ...\nSIZE: int = 1\n_X = 2\n"
    )
    assert wrongly_listed(planted(cli=source)) == ["house.cli.New", "house.cli.SIZE", "house.cli.gone"]
