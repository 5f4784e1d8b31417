"""What `pip install .` and `pip install -e .` put into an environment, each tried in one of its own.

The environments hold this package alone; everything else comes from the one that runs the tests, through a `.pth`
line that is a plain path, so that no `.pth` file there, ours least of all, has an effect. Nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv*", "__pycache__", "*.egg-info", "build", "output", ".*_cache", "dist"
)


def run(*args: object, cwd: Path | None = None, status: int = 0) -> subprocess.CompletedProcess:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHONPATH", "LAVIS_LSTP"))}
    done = subprocess.run([str(a) for a in args], cwd=cwd, env=clean, capture_output=True, text=True, timeout=600)
    assert done.returncode == status, f"{args}\n{done.stdout}\n{done.stderr}"
    return done


@dataclass
class Environment:
    folder: Path
    python: Path
    site: Path
    empty: Path
    checkout: Path

    def answers(self, code: str):
        """What a program in an empty folder prints as JSON in its last line."""
        return json.loads(run(self.python, "-c", code, cwd=self.empty).stdout.strip().splitlines()[-1])


def make_environment(folder: Path, checkout: Path, shared: bool = True) -> Environment:
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    if shared:
        (site / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    empty = folder / "empty"
    empty.mkdir()
    return Environment(folder, python, site, empty, checkout)


def pip_install(environment: Environment, *what: object) -> None:
    options = ("install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", environment.python, *options, *what, cwd=environment.empty)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the working tree, as building leaves files behind, with one more recipe."""
    copy = Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "checkout", ignore=NOT_COPIED))
    (copy / "projects" / "lstp" / "sub").mkdir(parents=True, exist_ok=True)
    (copy / "projects" / "lstp" / "sub" / "made_by_test.yaml").write_text("run: {task: video_qa}")
    return copy


@pytest.fixture(scope="module")
def wheel(checkout) -> Path:
    command = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", "dist", ".")
    run(sys.executable, *command, cwd=checkout)
    (built,) = (checkout / "dist").glob("lavis_lstp-*.whl")
    return built


KINDS = ["wheel", "editable", "editable strict", "editable compat"]


@pytest.fixture(scope="module", params=KINDS)
def installed(request, checkout, wheel, tmp_path_factory) -> Environment:
    kind, _, mode = request.param.partition(" ")
    environment = make_environment(tmp_path_factory.mktemp("installed") / "env", checkout)
    if kind == "wheel":
        pip_install(environment, wheel)
    else:
        settings = ("--config-settings", f"editable_mode={mode}") if mode else ()
        pip_install(environment, *settings, "--editable", checkout)
    return environment


def test_the_wheel_holds_the_plug_in_line_the_recipes_and_nothing_that_clashes(wheel, checkout):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert archive.read("lavis_lstp.pth").decode() == "import lavis_lstp\n"
    recipes = {f"lavis_lstp/{path.relative_to(checkout)}" for path in (checkout / "projects").rglob("*.yaml")}
    configs = {str(path.relative_to(ROOT)) for path in (ROOT / "lavis_lstp" / "configs").rglob("*.yaml")}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "lavis_lstp").rglob("*.py")}
    page = {f"lavis_lstp/report/{name}" for name in ("report.html", "style.css", "browse.js")}
    assert recipes | configs | sources | page <= names
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {
        "lavis_lstp",
        "lavis_lstp.pth",
        "webdataset_tools",
    }


def test_salesforce_lavis_is_not_a_requirement_and_everything_it_imports_is(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    needs = set(re.findall(r"^Requires-Dist: ([\w.-]+)", text, flags=re.MULTILINE))
    assert "salesforce-lavis" not in needs
    assert {"torch", "transformers", "decord", "eva-decord", "webdataset", "pycocoevalcap", "spacy"} <= needs


def test_no_process_has_to_mention_us(installed):
    seen = installed.answers(
        "import sys, json; before = 'torch' in sys.modules\n"
        "from lavis.models import load_model, model_zoo\n"
        "model = load_model('lstp_tiny')\n"
        "print(json.dumps([before, type(model).__mro__[1].__name__, 'lstp_tiny' in dict(model_zoo),"
        " sys.modules['lavis_lstp'].__file__]))"
    )
    assert seen[:3] == [False, "LSTP", True]
    assert not Path(seen[3]).is_relative_to(ROOT)


def test_recipes_are_found_from_an_empty_folder(installed):
    listed = run(installed.folder / "bin" / "lavis-lstp", "list", "recipes", cwd=installed.empty).stdout.split()
    parts = ("chains", "benchmarks", "models")
    files = [path for path in (installed.checkout / "projects").rglob("*.yaml") if path.parent.name not in parts]
    # an evaluation is composed of what is asked and who answers
    asked, answers = (sorted((installed.checkout / "projects/lstp/eval" / part).glob("*.yaml")) for part in parts[1:])
    described = (installed.checkout / "lavis_lstp/configs/datasets").glob("lstp_*.yaml")
    names = {path.stem for path in asked} | {
        path.stem.removeprefix("lstp_") for path in described if "run" in yaml.safe_load(path.read_text("utf-8"))
    }
    files += [installed.checkout / f"projects/lstp/eval/{one}_{other.name}" for one in names for other in answers]
    assert asked and answers and listed == sorted(str(path.relative_to(installed.checkout)) for path in files)
    found = installed.answers(
        f"import json; from lavis_lstp.config import find_config; print(json.dumps(str(find_config({listed[-1]!r}))))"
    )
    assert Path(found).is_file() and not Path(found).is_relative_to(ROOT)


@pytest.mark.parametrize("module", ["lavis.train", "lavis.evaluate"])
def test_laviss_missing_modules_run(installed, module):
    done = run(installed.python, "-m", module, "--cfg-path", "none.yaml", cwd=installed.empty, status=2)
    assert "error: unknown config file 'none.yaml'" in done.stderr


SMALL = [
    *(
        f"datasets.lstp_shapes.generate.{split}_videos={count}"
        for split, count in (("train", 4), ("val", 1), ("test", 1))
    ),
    "datasets.lstp_shapes.generate.train_images=0",
    "run.max_steps=1",
]


def test_the_wheel_trains_evaluates_and_loads_from_an_empty_folder(checkout, wheel, tmp_path):
    environment = make_environment(tmp_path / "env", checkout)
    pip_install(environment, wheel)
    recipe = ("--cfg-path", "projects/lstp/tiny_ft.yaml", "--options", *SMALL)
    trained = run(environment.python, "-m", "lavis.train", *recipe, cwd=environment.empty)
    assert "Traceback" not in trained.stderr
    output = environment.empty / "output" / "lstp" / "tiny_ft"
    assert list(output.rglob("model.safetensors"))
    evaluated = run(environment.python, "-m", "lavis.evaluate", *recipe, cwd=environment.empty)
    assert "the weights of lstp_tiny are random" in evaluated.stderr + evaluated.stdout
    assert (output / "evaluate_manifest.json").is_file()
    loaded = environment.answers(
        "import json, sys; from lavis.models import load_model, load_model_and_preprocess\n"
        "a, (b, vis, text) = load_model('lstp_tiny'), load_model_and_preprocess('lstp_tiny')\n"
        "print(json.dumps([type(a).__name__, type(b).__name__, sorted(vis), sys.modules['lavis_lstp'].__file__]))"
    )
    assert loaded[0] == loaded[1] and loaded[2] == ["eval", "train"]
    assert Path(loaded[3]).is_relative_to(environment.folder)


def test_uninstalling_leaves_nothing_behind(checkout, tmp_path, wheel):
    environment = make_environment(tmp_path / "env", checkout)
    for what in ((wheel,), ("--editable", checkout)):
        pip_install(environment, *what)
        assert (environment.site / "lavis_lstp.pth").is_file()
        run(sys.executable, "-m", "pip", "--python", environment.python, "uninstall", "--quiet", "--yes", "lavis_lstp")
        assert [path.name for path in environment.site.iterdir()] == ["base.pth"]


def test_without_lavis_the_first_error_says_what_to_type(tmp_path, checkout, wheel):
    environment = make_environment(tmp_path / "env", checkout, shared=False)
    pip_install(environment, wheel)
    for args in (("-c", "from lavis.models import load_model"), ("-m", "lavis.train", "--cfg-path", "x.yaml")):
        error = run(environment.python, *args, cwd=environment.empty, status=1).stderr
        assert "pip install --no-deps salesforce-lavis==1.0.2" in error.strip().splitlines()[-1]
