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


def functions(node: ast.AST, name: str, classes: tuple = ()) -> Iterator[tuple[str, ast.FunctionDef, tuple]]:
    """(name, function, the classes around it) of every public function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef) and not child.name.startswith("_"):
            if isinstance(child, ast.ClassDef):
                yield from functions(child, f"{name}.{child.name}", (*classes, child))
            else:
                yield f"{name}.{child.name}", child, classes


def said(function: ast.FunctionDef, owner: ast.ClassDef, known: dict[str, ast.ClassDef]) -> str:
    """The docstring of a method, or that of the method which it replaces, of a class of the same module."""
    if own := ast.get_docstring(function):
        return own
    for base in (known[one.id] for one in owner.bases if isinstance(one, ast.Name) and one.id in known):
        same = next((one for one in base.body if getattr(one, "name", "") == function.name), function)
        if text := said(same, base, known):
            return text
    return ""


def without_shape(tree: ast.AST, module: str) -> list[str]:
    known = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    found = []
    for name, function, classes in functions(tree, module):
        own = said(function, classes[-1], known) if classes else ast.get_docstring(function)
        docs = " ".join(str(one) for one in (own, *map(ast.get_docstring, classes)))
        arguments = ast.unparse(function.args) + (f" -> {ast.unparse(function.returns)}" if function.returns else "")
        if re.search(r"\bTensor\b", BY_NAME.sub("", arguments)) and not SHAPE.search(docs):
            found.append(name)
    return found


def test_tensors_have_shapes():
    trees = ((name, ast.parse(path.read_text(encoding="utf-8"))) for name, path in SOURCES.items())
    lost = [one for name, tree in trees for one in without_shape(tree, name) if one not in EXEMPT]
    assert not lost, f"say the shape of their tensors, such as [B,T]: {lost}"


def test_a_method_that_replaces_another_need_not_repeat_it():
    code = 'class A:\n def f(self) -> Tensor:\n  "{}"\nclass B(A):\n def f(self) -> Tensor:\n  pass'
    assert without_shape(ast.parse(code.format("Scores [B].")), "m") == []
    assert without_shape(ast.parse(code.format("Scores.")), "m") == ["m.A.f", "m.B.f"]


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
