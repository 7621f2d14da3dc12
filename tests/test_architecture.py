"""What docs/architecture.md promises of imports: one way, no circle, and what each room may know."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGES = ("terrafm_jax", "data_prep", "configs", "benchmarks")
FILES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts): p for k in PACKAGES for p in sorted((ROOT / k).rglob("*.py"))
}


def imports(path: Path) -> Iterator[str]:
    """Names of everything a file imports anywhere: late imports and those for type checkers count, too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in FILES or f"{whole}.__init__" in FILES else node.module


def module(name: str) -> str | None:
    """The file of the project that an imported name means, or None."""
    return next((n for n in (name, f"{name}.__init__") if n in FILES), None)


GRAPH = {name: {m for n in imports(path) if (m := module(n)) and m != name} for name, path in FILES.items()}


def test_imports_make_no_circle() -> None:
    try:
        order = list(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
    assert {"terrafm_jax.sensors", "terrafm_jax.training.loop", "data_prep.cell"} <= set(order)


def below(*names: str) -> set[str]:
    """These files and all that they import, directly or not."""
    found, todo = set(), list(names)
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += GRAPH[name]
    return found


def room(name: str) -> set[str]:
    return {n for n in FILES if n.startswith(f"terrafm_jax.{name}.")}


def test_models_and_objective_know_nothing_of_files_flags_or_configs() -> None:
    for name in room("models") | room("ssl"):
        outer = {n.split(".")[0] for n in imports(FILES[name])} & {
            "absl",
            "etils",
            "json",
            "ml_collections",
            "os",
            "pathlib",
        }
        assert not outer, f"{name} imports {outer}"
        others = {n for n in GRAPH[name] if not n.startswith(("terrafm_jax.models", "terrafm_jax.ssl"))}
        tables = {"terrafm_jax.sensors", "terrafm_jax.landcover", "terrafm_jax.data.tiles"}
        assert others <= tables, f"{name} imports {others}"


def test_the_ground_floor_stands_on_nothing() -> None:
    for name in ("terrafm_jax.sensors", "terrafm_jax.landcover"):
        assert GRAPH[name] <= {"terrafm_jax.__init__"}


def test_training_needs_the_core_packages_only() -> None:
    heavy = {"matplotlib", "rasterio", "scipy", "sklearn", "tensorflow", "torch"}
    for name in room("training") | room("models") | room("ssl") | room("data"):
        assert not {n.split(".")[0] for n in imports(FILES[name])} & heavy, name


def test_preparation_and_library_meet_in_the_record_schema() -> None:
    assert not [
        n for n in below("terrafm_jax.main", "terrafm_jax.evaluate", "terrafm_jax.embed") if n.startswith("data_prep")
    ]


def test_the_page_names_files_that_exist() -> None:
    rooms = (ROOT / "docs" / "architecture.md").read_text().split("```")[1]
    names = set(re.findall(r"[\w/]+\.py", rooms))
    known = {p.relative_to(ROOT).as_posix() for p in FILES.values()} | {"setup.py"}
    lost = sorted(n for n in names if not any(k.endswith(f"/{n}") or k == n for k in known))
    assert not lost, lost
