"""Imports flow proto <- images <- shim <- hooks, and the paths that must be quick import little."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = ("proto", "images", "shim", "hooks")
MODULES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """What a module imports, with the names it takes from there, and whether it does so when it is loaded."""
    tree = ast.parse(path.read_text())
    late = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        early = id(node) not in late
        if isinstance(node, ast.Import):
            yield from ((alias.name, early) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            yield str(node.module), early
            yield from ((f"{node.module}.{alias.name}", early) for alias in node.names)


def test_the_walk_finds_imports_early_and_late() -> None:
    """This test's own eyes: a known module has both kinds."""
    found = dict(imports(ROOT / "shim/runtime.py"))
    assert found["smr.proto.errors.SmrError"] is True
    assert found["smr.shim.criu"] is False


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_layer_imports_one_above_it(path: Path) -> None:
    """Late imports count too. All are absolute."""
    layer = LAYERS.index(path.relative_to(ROOT).parts[0])
    for name, _ in imports(path):
        if name.startswith("smr."):
            assert LAYERS.index(name.split(".")[1]) <= layer, f"{path}: imports {name}"


def _loads() -> dict[str, set[str]]:
    """Module -> all that is imported while it is loaded, packages around modules of ours included."""
    loads = {}
    for path in MODULES:
        name = ".".join(["smr", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")
        found = {target for target, early in imports(path) if early}
        loads[name] = (found | {target.rpartition(".")[0] for target in found if target.startswith("smr.")}) - {name}
    return loads


LOADS = _loads()


def loaded_with(module: str) -> set[str]:
    """All that is loaded with a module, by way of others too."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += LOADS.get(name, ())
    return seen


def test_no_cycle() -> None:
    """Loading a module never comes back to it, but for packages that their own modules name."""
    for module in LOADS:
        for target in LOADS[module] & LOADS.keys():
            if not module.startswith(f"{target}."):
                assert module not in loaded_with(target), f"{module} -> {target} -> {module}"


@pytest.mark.parametrize(
    "module",
    [
        "smr.shim.runtime",
        "smr.shim.restore",
        "smr.shim.resume",
        "smr.shim.undo",
        "smr.shim.containerd_shim",
        "smr.hooks.main",
        "smr.images.prefetch",
        "smr.images.store",
    ],
)
def test_quick_paths_load_the_standard_library_and_us(module: str) -> None:
    """What runs before or while a container starts: neither click, rich, structlog nor protobuf."""
    loaded = loaded_with(module)
    assert module in LOADS
    assert {name for name in loaded if name.partition(".")[0] not in {*sys.stdlib_module_names, "smr"}} == set()


def test_third_party_would_be_seen() -> None:
    """This test's own eyes: the command line does load click, protobuf's reader protobuf."""
    assert "click" in loaded_with("smr.shim.cli.gc")
    assert "google.protobuf.message" in loaded_with("smr.images.criu_files")


@pytest.mark.parametrize("path", sorted((ROOT / "proto").glob("*.py")), ids=lambda path: path.name)
def test_contracts_import_the_standard_library_only(path: Path) -> None:
    """proto/ is read before every annotated start."""
    for name, _ in imports(path):
        assert name.startswith("smr.proto") or name.partition(".")[0] in sys.stdlib_module_names, f"{path}: {name}"


@pytest.mark.parametrize("module", ["smr.shim.restored", "smr.images.layer", "smr.shim.network"])
def test_a_stage_of_a_restore_loads_no_large_part_of_the_standard_library(module: str) -> None:
    """HTTP and what it brings (ssl, email) take longer to load than the stage that would load them takes."""
    assert loaded_with(module) & {"http.client", "urllib.request", "asyncio", "ssl", "email.message", "tarfile"} == set()
