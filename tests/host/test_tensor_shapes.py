"""Every public function that takes or returns a tensor says its shape, such as [B,T]; nothing is imported."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from test_imports import SOURCES

SHAPE = re.compile(r"\[[\w.,*+ /]*\]|any shape")
BY_NAME = re.compile(r"\w+\[str, (torch\.)?Tensor\]")
"""Weights and losses by name, which have all shapes."""
EXEMPT = {"lavis_lstp.inference.candidates.num_bytes"}
"""Its tensors may have any shape."""


def functions(node: ast.AST, name: str, docs: str = "") -> Iterator[tuple[str, ast.FunctionDef, str]]:
    """(name, function, its own docstring and those of the classes around it) of every public function."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.ClassDef | ast.FunctionDef) or child.name.startswith("_"):
            continue
        own = f"{docs} {ast.get_docstring(child)}"
        if isinstance(child, ast.ClassDef):
            yield from functions(child, f"{name}.{child.name}", own)
        else:
            yield f"{name}.{child.name}", child, own


def without_shape(tree: ast.AST, module: str) -> list[str]:
    found = []
    for name, function, docs in functions(tree, module):
        arguments = ast.unparse(function.args) + (f" -> {ast.unparse(function.returns)}" if function.returns else "")
        if re.search(r"\bTensor\b", BY_NAME.sub("", arguments)) and not SHAPE.search(docs):
            found.append(name)
    return found


def test_tensors_have_shapes():
    trees = ((name, ast.parse(path.read_text(encoding="utf-8"))) for name, path in SOURCES.items())
    lost = [one for name, tree in trees for one in without_shape(tree, name) if one not in EXEMPT]
    assert not lost, f"say the shape of their tensors, such as [B,T]: {lost}"


@pytest.mark.parametrize(
    ("annotation", "doc", "is_found"),
    [
        ("Tensor", "The frames.", True),
        ("torch.Tensor | None", "The frames.", True),
        ("Tensor", "The frames [B,T,3,H,W].", False),
        ("Tensor", "A loss, float32 [].", False),
        ("dict[str, Tensor]", "Weights by name.", False),
        ("str", "A text.", False),
    ],
)
def test_the_test_can_fail(annotation, doc, is_found):
    code = f'class Some:\n    def public(self) -> {annotation}:\n        "{doc}"'
    assert without_shape(ast.parse(code), "m") == (["m.Some.public"] if is_found else [])
