"""The way imports point, over every folder: words -> config, metrics -> data -> models -> tasks -> runners -> the rest.

Nothing is imported here, so these tests say what is written, not what happens to work on this machine.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lavis_lstp"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): path
    for folder in ("lavis_lstp", "webdataset_tools")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


@functools.cache
def imports_of(module: str, at_module_level: bool = False) -> frozenset[str]:
    """Absolute names a module imports; with `from a import b` both a and a.b, as b may be a module."""
    tree = ast.parse(SOURCES[module].read_text(encoding="utf-8"))
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if at_module_level and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module} imports relatively in line {child.lineno}"
                inside = {f"{child.module}.{alias.name}" for alias in child.names}
                found.update(inside if inside <= SOURCES.keys() else {*inside, child.module})
            visit(child)

    visit(tree)
    return frozenset(found)


def ours(names: frozenset[str]) -> set[str]:
    return {name for name in names if name in SOURCES and name != "lavis_lstp"}


LAYERS = (
    ("schema", "errors", "redaction", "untrusted", "files", "batch", "distributed", "endpoint", "jobs"),
    ("config", "metrics"),
    ("data",),
    ("models.weights", "models.pixels"),
    ("models.where", "models.answer"),
    ("models", "models.weights.parts", "models.weights.sizes"),
    ("tasks",),
    ("runners",),
    ("judging", "report", "inference", "serving"),
    ("commands", "webdataset_tools", "testing"),
)
"""What may import what: a folder imports from its own row and from those above it, at whatever place in a file."""
BESIDE = ("lavis_lstp", "lavis_lstp.__main__", "lavis_lstp.host")
"""The plug-in inside LAVIS stands on everything: it registers what is here."""


def layer(module: str) -> int | None:
    """The row of `LAYERS` that a module belongs to, None for what stands beside them."""
    inside = module.removeprefix("lavis_lstp.")
    found = [
        (len(name), row)
        for row, names in enumerate(LAYERS)
        for name in names
        if inside == name or inside.startswith(f"{name}.")
    ]
    return max(found)[1] if found else None


def test_every_folder_has_its_place():
    lost = [name for name in SOURCES if layer(name) is None and not name.startswith(BESIDE)]
    assert not lost, f"add to LAYERS: {lost}"


@pytest.mark.parametrize("module", [name for name in SOURCES if layer(name) is not None])
def test_imports_point_one_way(module):
    wrong = sorted(name for name in ours(imports_of(module)) if (layer(name) or 0) > layer(module))
    assert not wrong, f"{module} must not import {', '.join(wrong)}"


def test_the_direction_test_can_fail():
    assert layer("lavis_lstp.models.lstp") > layer("lavis_lstp.models.where.temporal_sampler")
    assert layer("lavis_lstp.models.where.temporal_sampler") > layer("lavis_lstp.data.video.reading")
    assert "lavis_lstp.errors" in ours(imports_of("lavis_lstp.config.load"))


def test_no_module_imports_itself_by_a_detour():
    """No circles, behind TYPE_CHECKING neither: what a module imports at its top never leads back to it."""
    arrows = {name: ours(imports_of(name, at_module_level=True)) - {name} for name in SOURCES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            for other in sorted(arrows[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in SOURCES:
        visit(name, ())


def outside(module: str) -> set[str]:
    return {name.split(".")[0] for name in imports_of(module)}


@pytest.mark.parametrize("module", [name for name in SOURCES if name.startswith("lavis_lstp.models")])
def test_models_open_no_video(module):
    assert not outside(module) & {"av", "decord", "torchcodec"}
    from_video = {name for name in imports_of(module) if name.startswith("lavis_lstp.data.video.reading")}
    assert not from_video


@pytest.mark.parametrize("module", [name for name in SOURCES if name.startswith("lavis_lstp.metrics")])
def test_metrics_take_strings_and_spans_only(module):
    assert not outside(module) & {"torch", "lavis", "transformers", "omegaconf"}
    assert all(not layer(name) or name.startswith("lavis_lstp.metrics") for name in ours(imports_of(module)))


@pytest.mark.parametrize("module", ["lavis_lstp", "lavis_lstp.host.hook"])
def test_what_every_interpreter_loads_is_standard_library(module):
    import sys

    at_start = {name.split(".")[0] for name in imports_of(module, at_module_level=True)}
    assert at_start - {"lavis_lstp"} <= set(sys.stdlib_module_names)


def test_modules_that_need_lavis_are_the_ones_the_hook_knows():
    """Registration imports these modules; imported by hand, they must let `lavis` go first (see `host/hook.py`)."""
    from lavis_lstp import NEEDS_LAVIS
    from lavis_lstp.host.plugin import REGISTERING

    waiting, closure = [*REGISTERING, "lavis_lstp.config.config"], set()
    while waiting:
        module = waiting.pop()
        if module in closure:
            continue
        closure.add(module)
        waiting += ours(imports_of(module, at_module_level=True))
    direct = {name for name in closure if "lavis" in {i.split(".")[0] for i in imports_of(name, at_module_level=True)}}
    needing = set(direct)
    while True:  # whoever imports one of them needs LAVIS, too
        more = {name for name in closure if ours(imports_of(name, at_module_level=True)) & needing} - needing
        if not more:
            break
        needing |= more
    packages = {name for name in SOURCES if SOURCES[name].name == "__init__.py"}
    uncovered = {
        name
        for name in needing - set(NEEDS_LAVIS)
        if not any(name.startswith(f"{package}.") for package in packages & set(NEEDS_LAVIS))
    }
    assert not uncovered, f"add to NEEDS_LAVIS in lavis_lstp/__init__.py: {sorted(uncovered)}"
    missing = {name for name in NEEDS_LAVIS if name not in SOURCES}
    assert not missing, f"NEEDS_LAVIS names modules that do not exist: {sorted(missing)}"


def test_public_and_old_names_lead_somewhere():
    import lavis_lstp

    assert set(lavis_lstp.PUBLIC.values()) | set(lavis_lstp.MOVED.values()) <= SOURCES.keys()
    assert not set(lavis_lstp.MOVED) & SOURCES.keys()
    assert all(getattr(lavis_lstp, name).__name__ == name for name in lavis_lstp.PUBLIC)
    from lavis_lstp import cli  # an old name
    from lavis_lstp.commands import cli as moved

    assert cli is moved
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        lavis_lstp.lode  # noqa: B018


def test_no_top_level_package_of_ours_has_a_name_that_lavis_or_fairscale_use():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == {"lavis_lstp", "webdataset_tools"}
