"""Where things are: files import from the floors below their own alone, no two import each other, and every public name is there."""

from __future__ import annotations

import ast
import importlib
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import sfm_fast

ROOT = Path(__file__).resolve().parents[1]
# From the ground up; what stands in one line is on one floor, and may only import from the lines above it (and from its own folder).
FLOORS = (
    "errors version facade",
    "units",
    "philox files schema options settings",
    "arguments",
    "views",
    "checks",
    "reference",
    "kernels ops",
    "losses synthetic measure report",
    "data",
    "backbones",
    "features",
    "distill evaluation",
    "bundle gate",
    "demo",
    "__init__",
    "benchmarks",
    "cli",
    "__main__",
)
FLOOR = {f"sfm_fast.{room}": level for level, line in enumerate(FLOORS) for room in line.split()}


def modules() -> dict[str, Path]:
    """Dotted name -> file, of the package with its installed folders ``kernels`` and ``benchmarks``."""
    folders = {
        ROOT / "sfm_fast": "sfm_fast",
        ROOT / "kernels": "sfm_fast.kernels",
        ROOT / "benchmarks": "sfm_fast.benchmarks",
    }
    found = {}
    for folder, name in folders.items():
        for path in folder.rglob("*.py"):
            if folder.name == "sfm_fast" and path.relative_to(folder).parts[0] in ("kernels", "benchmarks"):
                continue  # links of a checkout that isn't installed
            parts = [name, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """The package's modules that module ``name`` imports, wherever in the file, but for the imports of type checkers."""
    path, found = MODULES[name], set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for guard in [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]:
        guard.body = []
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            if source == "benchmarks" or source.startswith("benchmarks."):
                source = f"sfm_fast.{source}"
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                found |= {whole} if whole in MODULES else {source} & MODULES.keys()
    return found


def room(name: str) -> str:
    """The file or folder right below the package; `import sfm_fast` is a room too, and lies above all that it offers."""
    return ".".join(name.split(".")[:2]) if "." in name else "sfm_fast.__init__"


def test_every_room_has_a_floor():
    assert {room(name) for name in MODULES} <= FLOOR.keys()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down_only(name):
    upward = [other for other in imports(name) if room(other) != room(name) and FLOOR[room(other)] >= FLOOR[room(name)]]
    assert upward == []


def test_no_two_files_import_each_other():
    graph = {name: imports(name) - {name} for name in MODULES}
    while leaves := {name for name, others in graph.items() if not others & graph.keys()}:
        for name in leaves:
            del graph[name]
    assert sorted(graph) == []


FACADES = sorted(name for name, path in MODULES.items() if "lazy(" in path.read_text() and name != "sfm_fast.facade")


@pytest.mark.parametrize("name", FACADES)
def test_a_facade_says_the_same_to_type_checkers(name):
    package = importlib.import_module(name)
    guards = [node for node in ast.parse(MODULES[name].read_text()).body if isinstance(node, ast.If)]
    told = {alias.asname for guard in guards for node in guard.body for alias in node.names}
    assert told | ({"__version__"} if name == "sfm_fast" else set()) == set(package.__all__)
    for public in package.__all__:
        assert getattr(package, public) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018


@pytest.mark.parametrize("name", sorted(set(sfm_fast.__all__) - {"__version__"}))
def test_every_public_name_has_help(name):
    value = getattr(sfm_fast, name)
    assert len((value.__doc__ or "").strip()) > 20
    assert name in pydoc.render_doc(value, renderer=pydoc.plaintext)


def test_importing_the_package_loads_nothing_that_is_not_used():
    code = "import sys, sfm_fast; print('torch' in sys.modules, sorted(name for name in sys.modules if name.startswith('sfm_fast')))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert out.strip() == "False ['sfm_fast', 'sfm_fast.facade', 'sfm_fast.version']"
