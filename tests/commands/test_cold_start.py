"""Commands that need no model import neither torch nor LAVIS; what they list equals LAVIS's registry all the same."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lavis_lstp.commands.cli import _names

COLD = """
import contextlib, importlib, io, sys
from lavis_lstp.commands import cli
with contextlib.redirect_stdout(io.StringIO()):
    names = ("judge", "compare", "calibrate", "report", "ask", "chat", "serve")
    for words in [["--help"]] + [[name, "--help"] for name in names] + [
        ["list", kind] for kind in ("models", "datasets", "tasks", "runners", "recipes")
    ]:
        with contextlib.suppress(SystemExit):
            cli.main(words)
    tools = importlib.import_module("webdataset_tools.__main__")
    for verb in tools.VERBS:
        with contextlib.suppress(SystemExit):
            tools.main([verb, "--help"])
import lavis_lstp.report.pictures, lavis_lstp.report.table  # of predictions, without a manifest
found = [name for name in ("torch", "lavis") if name in sys.modules]
assert "lavis_lstp.judging.judge" in sys.modules and "webdataset_tools.preview" in sys.modules
sys.stdout.write(repr(found))
"""


def test_neither_torch_nor_lavis_is_imported():
    done = subprocess.run([sys.executable, "-c", COLD], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]"), done.stdout


@pytest.mark.parametrize("kind", ["datasets", "tasks", "runners"])
def test_names_are_those_of_the_registry(kind):
    from lavis.common.registry import registry

    known = {"datasets": registry.list_datasets, "tasks": registry.list_tasks, "runners": registry.list_runners}
    # other tests register names of their own in this process
    assert _names(kind) == [name for name in known[kind]() if _is_installed(registry, kind, name)]


def _is_installed(registry, kind, name) -> bool:
    get = {
        "datasets": registry.get_builder_class,
        "tasks": registry.get_task_class,
        "runners": registry.get_runner_class,
    }
    return get[kind](name).__module__.startswith(("lavis.", "lavis_lstp."))


def test_models_and_types_are_those_of_the_registry():
    from lavis.common.registry import registry

    classes = {name: registry.get_model_class(name) for name in registry.list_models()}
    expected = [
        f"{name}  {', '.join(found.PRETRAINED_MODEL_CONFIG_DICT)}"
        for name, found in sorted(classes.items())
        if found.__module__.startswith(("lavis.", "lavis_lstp."))
    ]
    assert _names("models") == expected
