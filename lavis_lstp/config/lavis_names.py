"""The names that LAVIS registers, read from its sources: importing LAVIS takes seconds, and a list needs none of it.

In: the installed LAVIS. Out: names of its models with their types, of data sets, tasks and runners. LAVIS registers by
decorators with a literal name, so that these can be seen without running them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from lavis_lstp.config.load import lavis_root

FOLDERS = {
    "models": ("lavis/models", "register_model"),
    "datasets": ("lavis/datasets/builders", "register_builder"),
    "tasks": ("lavis/tasks", "register_task"),
    "runners": ("lavis/runners", "register_runner"),
}
"""Kind -> where LAVIS registers it, and by which decorator."""
TYPES = "PRETRAINED_MODEL_CONFIG_DICT"


def lavis_names(kind: str) -> dict[str, list[str]]:
    """Registered name -> types; only models have any."""
    folder, decorator = FOLDERS[kind]
    found: list[ast.ClassDef] = []
    for root in lavis_root():
        for path in sorted((root / folder).rglob("*.py")):
            source = path.read_text(encoding="utf-8")
            if f"registry.{decorator}(" in source:
                found += [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    classes = {node.name: node for node in found}  # of data sets, two have one class name
    return {name: _types(node, classes) for node in found for name in _names(node, decorator)}


def _names(node: ast.ClassDef, decorator: str) -> Iterator[str]:
    for call in node.decorator_list:
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == decorator:
            yield ast.literal_eval(call.args[0])


def _types(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> list[str]:
    """The keys of the class's own table of types, else of the class it inherits from."""
    for line in node.body:
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == TYPES:
            return list(ast.literal_eval(line.value))
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            return _types(classes[base.id], classes)
    return []
