"""Section "a plugin nobody has to import": what a process sees that never mentions lavis_lstp.

`import lavis` takes seconds, so the processes that need it are few and answer many questions at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lavis_lstp import Finder
from lavis_lstp.errors import LstpError
from lavis_lstp.host import hook as _hook
from lavis_lstp.host import plugin

ROOT = Path(__file__).resolve().parents[2]
INSTALL_LINE = "pip install --no-deps salesforce-lavis==1.0.2"


def python(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """Run this interpreter in a folder of its own; no variable of this process sets PYTHONPATH for it."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHONPATH", "LAVIS_LSTP"))}
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env={**clean, **env}, capture_output=True, text=True, timeout=300
    )


def answers(code: str, cwd: Path, **env: str) -> dict:
    """What a program prints as JSON in its last line."""
    done = python("-c", code, cwd=cwd, **env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_a_process_that_never_imports_lavis_gets_one_finder_and_nothing_else(tmp_path):
    before = "import sys, json; names = [type(f).__name__ for f in sys.meta_path if not isinstance(f, type)];"
    seen = answers(before + "print(json.dumps([names, sorted(m for m in sys.modules)]))", tmp_path)
    assert seen[0].count("Finder") == 1
    assert "lavis_lstp" in seen[1] and "lavis_lstp.host.hook" not in seen[1]
    assert not {"torch", "omegaconf", "lavis", "numpy"} & set(seen[1])


def test_disable_leaves_the_interpreter_alone(tmp_path):
    code = "import sys, json; print(json.dumps([type(f).__module__ for f in sys.meta_path]))"
    assert "lavis_lstp" in answers(code, tmp_path)
    assert "lavis_lstp" not in answers(code, tmp_path, LAVIS_LSTP_DISABLE="1")
    assert "lavis_lstp" in answers(code, tmp_path, LAVIS_LSTP_DISABLE="0")


def test_the_hook_is_cheap(tmp_path):
    """Aim: under 1 ms, which benchmarks/startup.py measures. A busy machine gets ten times that, as the best of 7."""
    env = {"PYTHONPYCACHEPREFIX": str(tmp_path / "pyc"), "PYTHONDONTWRITEBYTECODE": ""}
    costs = []
    for _ in range(7):
        report = python("-X", "importtime", "-c", "pass", cwd=tmp_path, **env).stderr
        line = next(line for line in report.splitlines() if line.split("|")[-1].strip() == "lavis_lstp")
        costs.append(int(line.split("|")[1]))
    assert min(costs) < 10_000, f"microseconds: {costs}"


NO_MENTION = """
import json, importlib.util, sys
from lavis.models import load_model, load_model_and_preprocess, model_zoo
import lavis, lavis.models, lavis.common.config
from lavis.common.registry import registry

def error(function, *args):
    try:
        function(*args)
    except Exception as problem:
        return [type(problem).__name__, str(problem)]

model = load_model("lstp_tiny", is_eval=True)
processed, vis, text = load_model_and_preprocess("lstp_tiny")
plugin = sys.modules["lavis_lstp"]
plugin.register()
plugin.register()
print(json.dumps({
    "class": type(model).__mro__[1].__name__,
    "training": model.training,
    "processors": sorted(vis) + sorted(text),
    "same": lavis.load_model is lavis.models.load_model is load_model,
    "zoo": dict(model_zoo),
    "zoo_text": str(model_zoo),
    "tasks": registry.list_tasks(),
    "runners": registry.list_runners(),
    "datasets": registry.list_datasets(),
    "served": [importlib.util.find_spec(f"lavis.{name}").origin for name in ("train", "evaluate")],
    "main": importlib.import_module("lavis.train").main.__module__,
    "loader": type(lavis.__spec__.loader).__name__,
    "unknown_model": error(load_model, "lstp_tiyn"),
    "unknown_type": error(load_model, "lstp_tiny", "huge"),
    "config": lavis.common.config.Config.__module__,
}))
"""


@pytest.fixture(scope="module")
def no_mention(tmp_path_factory) -> dict:
    return answers(NO_MENTION, tmp_path_factory.mktemp("elsewhere"))


def test_load_model_needs_no_model_type_and_no_import_of_ours(no_mention):
    assert no_mention["class"] == "LSTP"
    assert no_mention["training"] is False
    assert no_mention["same"]
    assert no_mention["processors"] == ["eval", "train", "eval", "train"]


def test_the_model_zoo_lists_ours_beside_laviss(no_mention):
    assert "default" in no_mention["zoo"]["lstp_tiny"]
    assert "lstp_tiny" in no_mention["zoo_text"]
    assert "pretrain_flant5xl" in no_mention["zoo"]["blip2_t5"]


def test_every_part_is_registered_once_although_register_ran_three_times(no_mention):
    assert {"video_instruct", "temporal_grounding", "pseudo_span", "video_qa"} <= set(no_mention["tasks"])
    assert "runner_lstp" in no_mention["runners"]
    assert {"lstp_shapes", "lstp_video_qa"} <= set(no_mention["datasets"])
    assert "coco_caption" in no_mention["datasets"]


def test_train_and_evaluate_are_served_where_lavis_has_none(no_mention):
    assert no_mention["served"] == [str(ROOT / "lavis_lstp" / "host" / name) for name in ("train.py", "evaluate.py")]
    assert no_mention["main"] == "lavis.train"


def test_lavis_keeps_its_own_loader(no_mention):
    assert no_mention["loader"] == "SourceFileLoader"


def test_unknown_model_names_are_answered_with_the_nearest(no_mention):
    assert no_mention["unknown_model"][0] == "ConfigError"
    assert "did you mean 'lstp_tiny'?" in no_mention["unknown_model"][1]
    assert no_mention["unknown_type"][0] == "ConfigError"
    assert "default" in no_mention["unknown_type"][1]


def test_our_modules_can_be_imported_before_lavis(tmp_path):
    """`import lavis_lstp.models.lstp` first: LAVIS's import registers it, and it must not be run a second time."""
    code = """
import json, sys
import lavis_lstp.models.lstp as mine
from lavis.common.registry import registry
from lavis.models import model_zoo
found = registry.get_model_class("lstp_tiny")
print(json.dumps([issubclass(found, mine.LSTP), mine is sys.modules["lavis_lstp.models.lstp"],
                  "lstp_tiny" in dict(model_zoo), "runner_lstp" in registry.list_runners()]))
"""
    assert answers(code, tmp_path) == [True, True, True, True]


def test_register_by_hand_where_the_hook_is_off(tmp_path):
    code = """
import json, sys
import lavis_lstp
off = not any(isinstance(finder, lavis_lstp.Finder) for finder in sys.meta_path)
lavis_lstp.register()
lavis_lstp.register()
from lavis.models import load_model
print(json.dumps([off, load_model("lstp_tiny").training]))
"""
    assert answers(code, tmp_path, LAVIS_LSTP_DISABLE="1") == [True, True]


def test_a_failed_registration_says_the_same_the_second_time(monkeypatch):
    """LAVIS's registry refuses to be filled twice, so that a second import would fail for another reason."""
    monkeypatch.setitem(plugin._state, "failure", ValueError("the first reason"))
    with pytest.raises(ValueError, match="the first reason"):
        plugin.before_lavis()


def test_python_m_lavis_train_reports_a_user_error_in_one_line(tmp_path):
    done = python("-m", "lavis.train", "--cfg-path", "nothing_here.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "nothing_here.yaml" in line
    assert "Traceback" not in done.stderr


def bare(code: str, cwd: Path, *paths: Path) -> subprocess.CompletedProcess:
    """An interpreter without site-packages that finds this package and the given folders."""
    start = f"import sys; sys.path[:0] = {[str(path) for path in (ROOT, *paths)]!r}; import lavis_lstp\n"
    return python("-I", "-S", "-c", start + code, cwd=cwd)


@pytest.mark.parametrize("code", ["import lavis", "import lavis_lstp.models.lstp", "lavis_lstp.register()"])
def test_missing_lavis_says_the_line_to_type(tmp_path, code):
    done = bare(code, tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ModuleNotFoundError") and INSTALL_LINE in last


def test_lavis_train_without_lavis_says_the_line_to_type(tmp_path):
    done = bare("import runpy; runpy.run_module('lavis.train', run_name='__main__')", tmp_path)
    assert INSTALL_LINE in done.stderr.strip().splitlines()[-1]


def make_lavis(folder: Path, version: str | None, blip2: bool) -> Path:
    (folder / "lavis" / "models" / "blip2_models").mkdir(parents=True)
    (folder / "lavis" / "__init__.py").write_text("")
    if blip2:
        (folder / "lavis" / "models" / "blip2_models" / "blip2_t5.py").write_text("")
    if version:
        (folder / f"salesforce_lavis-{version}.dist-info").mkdir()
    return folder


@pytest.mark.parametrize("version, blip2", [("0.1.0", False), ("1.0.1", True), (None, False)])
def test_old_lavis_says_the_line_to_type(tmp_path, version, blip2):
    done = bare("import lavis", tmp_path, make_lavis(tmp_path / "old", version, blip2))
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError") and INSTALL_LINE in last and (version or "without BLIP-2") in last


def test_a_folder_named_lavis_is_not_taken_for_the_package(tmp_path):
    (tmp_path / "lavis").mkdir()
    done = bare("import lavis", tmp_path, tmp_path)
    assert "is not it" in done.stderr and INSTALL_LINE in done.stderr


@pytest.mark.parametrize("version", ["1.0.2", "1.1.0.dev1", None])
def test_newer_lavis_and_checkouts_are_accepted(tmp_path, version):
    make_lavis(tmp_path, version, blip2=True)
    spec = _hook.find_spec(Finder(), "lavis", [str(tmp_path)], None)
    assert spec.origin == str(tmp_path / "lavis" / "__init__.py")


def test_laviss_own_train_module_goes_first(tmp_path):
    (tmp_path / "train.py").write_text("")
    finder = Finder()
    assert _hook.find_spec(finder, "lavis.train", [str(tmp_path)], None).origin == str(tmp_path / "train.py")
    served = _hook.find_spec(finder, "lavis.evaluate", [str(tmp_path)], None).origin
    assert served == str(ROOT / "lavis_lstp" / "host" / "evaluate.py")


def test_other_names_are_left_to_other_finders():
    finder = Finder()
    assert finder.find_spec("lavis_other") is None
    assert finder.find_spec("lavis.models") is None
    assert finder.find_spec("json") is None


def test_doctor_reports_as_json(capsys):
    from lavis_lstp.commands.cli import main

    status = main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert status == 0 and report["usable"] and report["broken"] == []
    found = {finding["name"]: finding for finding in report["findings"]}
    assert found["plug-in"]["usable"] and "lstp_tiny" in found["plug-in"]["detail"]
    assert found["transformers"]["required"] and not found["gpu"]["required"]
    assert any(finding["part"] == "shims" for finding in report["findings"])


def test_doctor_fails_when_the_main_job_cannot_run(capsys, monkeypatch):
    from lavis_lstp.commands import doctor

    monkeypatch.setitem(doctor.REQUIRED, "no-such-package", "no_such_package")
    monkeypatch.setattr(doctor, "_main_job", list)
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "BROKEN no-such-package" in out and "cannot run: no-such-package" in out


def test_doctor_looks_for_the_hook_itself(monkeypatch, tmp_path):
    from lavis_lstp.commands import doctor

    assert "lavis_lstp.pth" in doctor._hook()
    monkeypatch.setenv("LAVIS_LSTP_DISABLE", "1")
    assert "LAVIS_LSTP_DISABLE is set" in str(pytest.raises(RuntimeError, doctor._hook).value)
    monkeypatch.delenv("LAVIS_LSTP_DISABLE")
    site = tmp_path / "site-packages"
    site.mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(site)])
    assert "no folder of this environment has lavis_lstp.pth" in str(pytest.raises(RuntimeError, doctor._hook).value)
    (site / "lavis_lstp.pth").write_text("import lavis_lstp\n")
    assert str(site) in doctor._hook()


def test_doctor_says_where_raft_belongs_and_that_nothing_fetches_it(monkeypatch, tmp_path):
    from lavis_lstp.commands import doctor
    from lavis_lstp.models.where.flow import RAFT_URLS, build_flow

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for size in ("Large", "Small"):
        name = f"raft_{size.lower()}"
        said = str(pytest.raises(RuntimeError, doctor._raft_weights, size).value)
        file = said.rsplit(" as ", 1)[1]
        assert RAFT_URLS[name] in said and "nothing downloads" in said
        assert file in str(pytest.raises(LstpError, build_flow, name).value)  # where the model looks
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_bytes(b"")
        assert doctor._raft_weights(size) == file


def test_doctor_says_that_deepspeed_was_not_imported(monkeypatch):
    from lavis_lstp.commands import doctor

    real = doctor.importlib.util.find_spec
    for there, said in ((True, "not imported"), (False, "not installed")):
        monkeypatch.setattr(
            doctor.importlib.util, "find_spec", lambda n, *a, t=there: t or None if n == "deepspeed" else real(n, *a)
        )
        (found,) = (finding for finding in doctor._optional() if finding.name == "deepspeed")
        assert found.usable is there and said in found.detail


def test_list_and_unknown_commands(capsys):
    from lavis_lstp.commands.cli import main

    assert main(["list", "tasks"]) == 0
    assert "video_qa" in capsys.readouterr().out.split()
    with pytest.raises(SystemExit) as stopped:
        main(["demmo"])
    assert stopped.value.code == 2
