"""The floors of the package: each room imports only rooms below it, and modules form no circle.

`python tests/test_floors.py [FOLDER]` counts the arrows between the rooms of a checkout.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = "hf_maskselect"
# Lowest first. Rooms on one floor do not know each other. `__init__` is the front door, which may import any room.
FLOORS = (
    ("utils",),
    ("masking",),
    ("methods", "surgery"),
    ("storage",),
    ("fields",),
    ("config",),
    ("search", "distillation", "export"),
    ("runtime",),
    ("reporting",),
    ("training",),
    ("trainer",),
    ("cli", "__init__"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# What the lowest rooms may import besides the standard library.
LIBRARIES = {"utils": {"torch"}, "masking": {"torch", "safetensors"}}


class Import(NamedTuple):
    """One imported module or name. target: the imported module; name: the name taken from it, or an empty text."""

    path: Path
    line: int
    source: str
    target: str
    name: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.target}{f' ({self.name})' if self.name else ''}"


def modules_of(folder: Path, package: str = "") -> dict[str, Path]:
    """Return the modules below a folder by dotted name, such as `hf_maskselect.masking.maskset`."""
    names = {}
    for path in sorted(folder.rglob("*.py")):
        parts = [*([package] if package else []), *path.relative_to(folder).with_suffix("").parts]
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports_of(modules: Mapping[str, Path], root: Path = ROOT) -> Iterator[Import]:
    """Yield every import of every module, also those inside functions and for type checkers only."""
    for source, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(path.relative_to(root), node.lineno, source, alias.name, "")
            elif isinstance(node, ast.ImportFrom):
                package = source.split(".") if path.name == "__init__.py" else source.split(".")[:-1]
                above = package[: len(package) - node.level + 1] if node.level else []
                target = ".".join([*above, *([node.module] if node.module else [])])
                for alias in node.names:
                    inner = f"{target}.{alias.name}"
                    where = (inner, "") if inner in modules else (target, alias.name)
                    yield Import(path.relative_to(root), node.lineno, source, *where)


def room_of(module: str) -> str:
    """Return the room of a module of the package: its folder, or itself if it lies in the root."""
    return module.split(".")[1] if "." in module else "__init__"


def arrows_between_rooms(root: Path = ROOT) -> set[tuple[str, str]]:
    """Return the pairs (importing room, imported room) of a checkout; scripts and benchmarks are one room each."""
    modules = modules_of(root / PACKAGE, PACKAGE)
    pairs = {
        (room_of(each.source), room_of(each.target)) for each in imports_of(modules, root) if each.target in modules
    }
    for room in ("glue_scripts", "benchmarks"):
        imports = imports_of(modules_of(root / room), root)
        pairs |= {(room, room_of(each.target)) for each in imports if each.target.split(".")[0] == PACKAGE}
    return {(source, target) for source, target in pairs if source != target}


MODULES = modules_of(ROOT / PACKAGE, PACKAGE)
IMPORTS = list(imports_of(MODULES))
INNER = [each for each in IMPORTS if each.target.split(".")[0] == PACKAGE]


def refuse(breaches: list[str]) -> None:
    """Fail with one line a breach."""
    assert not breaches, "\n" + "\n".join(breaches)


def check_no_circle(modules: Mapping[str, Path]) -> None:
    """Fail with the files of the first circle of imports."""
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for each in imports_of(modules):
        if each.target in modules:
            graph[each.source].add(each.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = [str(modules[name].relative_to(ROOT)) for name in reversed(error.args[1])]
        raise AssertionError(f"imports form a circle: {' imports '.join(circle)}") from None


def test_every_room_has_a_floor():
    refuse(
        [f"{path.relative_to(ROOT)} is in no room" for name, path in MODULES.items() if room_of(name) not in FLOOR_OF]
    )


def test_rooms_import_only_rooms_below():
    breaches = []
    for each in INNER:
        source, target = room_of(each.source), room_of(each.target)
        if source != target and FLOOR_OF.get(source, -1) <= FLOOR_OF.get(target, -1):
            breaches.append(f"{each}: {target} is not below {source}")
    refuse(breaches)


def test_the_lowest_rooms_know_few_libraries():
    breaches = []
    for each in IMPORTS:
        allowed = LIBRARIES.get(room_of(each.source))
        library = each.target.split(".")[0]
        if allowed is not None and library not in {*sys.stdlib_module_names, *allowed, PACKAGE}:
            breaches.append(f"{each}: {room_of(each.source)} imports only {', '.join(sorted(allowed))}")
    refuse(breaches)


def test_private_names_stay_in_their_module():
    private = [each for each in INNER if each.name.startswith("_") and not each.name.startswith("__")]
    refuse([f"{each}, which is private" for each in private])


def test_modules_form_no_circle():
    check_no_circle(MODULES)


def test_scripts_form_no_circle():
    check_no_circle(modules_of(ROOT / "glue_scripts"))


def test_the_root_has_four_files():
    assert {path.stem for path in (ROOT / PACKAGE).glob("*.py")} <= {"__init__", "cli", "config", "trainer"}


def test_no_file_is_longer_than_400_lines():
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in MODULES.values()}
    refuse([f"{path} has {length} lines, more than 400" for path, length in lengths.items() if length > 400])


def test_few_arrows_between_rooms():
    arrows = arrows_between_rooms()
    assert len(arrows) <= 94, f"{len(arrows)} arrows: {sorted(arrows)}"  # the layout before the rooms had 188


if __name__ == "__main__":
    print(len(arrows_between_rooms(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT)))
