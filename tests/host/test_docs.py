"""What README, docs/, CONTRIBUTING.md and the projects' READMEs name exists: files, commands, targets, modules, tests.

Texts are read, and nothing is run; a page that a change makes wrong is told with the line to mend.
"""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

import pytest

from lavis_lstp.commands.cli import COMMANDS
from lavis_lstp.config import recipes
from webdataset_tools.__main__ import VERBS

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("lavis_lstp", "webdataset_tools")
ARCHITECTURE = ROOT / "docs" / "architecture.md"
README_LINES = 160

pytestmark = pytest.mark.skipif(not ARCHITECTURE.is_file(), reason="an installed package has no pages")


def pages() -> list[Path]:
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [*found, *sorted((ROOT / "projects").rglob("README.md"))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def matches(pattern: str, page: Path) -> list[tuple[int, str]]:
    """(line number, first group) of everything in a page that fits."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, found.start()) + 1, found[1]) for found in re.finditer(pattern, text)]


def unknown(pattern: str, page: Path, known) -> list[str]:
    """What fits the pattern in a page and is not known, each with its place."""
    return [f"{name_of(page)}:{line}: {word}" for line, word in matches(pattern, page) if not known(word)]


def anchors(page: Path) -> set[str]:
    """The names under which GitHub lets links reach a page's headings."""
    heads = [text for _, text in matches(r"(?m)^#+ +(.+)$", page)]
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def shown_as(module: Path) -> str:
    """How docs/architecture.md writes a module: relative to lavis_lstp, or to the repository for the other package."""
    return str(module.relative_to(ROOT)).removeprefix("lavis_lstp/")


def missing_modules(modules: list[Path], text: str) -> list[str]:
    """The lines that docs/architecture.md lacks, ready to be pasted into the table of the module's folder."""
    lines = []
    for module in modules:
        name = shown_as(module)
        if f"`{name}`" not in text:
            about = (ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or "").split("\n")[0]
            lines.append(f"| `{name}` | {about.rstrip('.') or 'what it contains'} |")
    return lines


def modules() -> list[Path]:
    """Modules with something in them; a folder's `__init__` is told by the folder."""
    found = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [path for path in found if path.name != "__init__.py" or path == ROOT / "lavis_lstp" / "__init__.py"]


def test_architecture_names_every_module():
    lines = missing_modules(modules(), ARCHITECTURE.read_text(encoding="utf-8"))
    assert not lines, "docs/architecture.md: add to the table of its folder\n" + "\n".join(lines)


def test_a_module_without_a_line_is_found():
    module = ROOT / "lavis_lstp" / "schema.py"
    assert missing_modules([module], "| `errors.py` | errors |")[0].startswith("| `schema.py` | ")


def test_a_name_that_does_not_exist_is_found():
    page = ROOT / "README.md"
    assert unknown(r"lavis-lstp ([a-z][\w-]*)", page, lambda word: word != "ask")[0].startswith("README.md:")
    assert any(word.startswith("projects/") for _, word in matches(r"(projects/[\w/]+\.yaml)", page))


def test_architecture_names_no_module_that_is_gone():
    named = {word for _, word in matches(r"`([\w/]+\.py)`", ARCHITECTURE)}
    gone = sorted(word for word in named if not (ROOT / "lavis_lstp" / word).is_file() and not (ROOT / word).is_file())
    assert not gone, f"docs/architecture.md names files that do not exist: {gone}"


def test_readme_is_read_in_three_minutes():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").count("\n")
    assert lines <= README_LINES, f"README.md has {lines} lines, {README_LINES} are allowed; move a part to docs/"


def test_every_page_of_docs_is_reached_from_the_readme():
    linked = {word for _, word in matches(r"\]\((docs/[\w.]+\.md)\)", ROOT / "README.md")}
    lost = sorted(name_of(page) for page in (ROOT / "docs").glob("*.md") if name_of(page) not in linked)
    assert not lost, f"README.md links to none of {lost}"


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_links_lead_somewhere(page):
    broken = []
    for line, target in matches(r"\]\(([^)\s]+)\)", page):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(f"{name_of(page)}:{line}: {target}")
    assert not broken, broken


def test_the_site_builds_and_a_broken_link_is_an_error(tmp_path):
    """`make docs`, and the same with a page that leads nowhere."""
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed (pip install '.[test]')")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort

    def made(config_file):
        build(load_config(str(config_file), strict=True, site_dir=str(tmp_path / "site")))

    made(ROOT / "mkdocs.yml")
    page = (tmp_path / "site" / "architecture" / "index.html").read_text(encoding="utf-8")
    assert 'href="../CONTRIBUTING/"' in page and "fonts.googleapis.com" not in page
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "mkdocs.yml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("docs", "projects"):
        shutil.copytree(ROOT / name, tmp_path / name)
    with (tmp_path / "docs" / "training.md").open("a", encoding="utf-8") as file:
        file.write("\n[gone](gone.md)\n")
    with pytest.raises(Abort):
        made(tmp_path / "mkdocs.yml")


def test_the_notebook_runs_from_top_to_bottom():
    nbformat, nbclient = (
        pytest.importorskip(name, reason="pip install '.[test]'") for name in ("nbformat", "nbclient")
    )
    notebook = nbformat.read(ROOT / "docs" / "tour.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not committed"
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    shown = str([cell.get("outputs") for cell in notebook.cells])
    assert "bar (5.6, 7.0)" in shown and shown.count("image/png") == 2


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_commands_exist(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?m)^([\w-]+):", makefile))
    assert {"demo", "test"} <= targets
    wrong = [
        *unknown(r"lavis-lstp ([a-z][\w-]*)", page, lambda word: word in COMMANDS),
        *unknown(r"python -m webdataset_tools ([a-z]\w*)", page, lambda word: word in VERBS),
        *unknown(r"(?:`|    |and )make ([a-z][\w-]*)", page, lambda word: word in targets),
    ]
    assert not wrong, f"no such command, verb or target: {wrong}"


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_files_of_the_repository_exist(page):
    def is_recipe(word: str) -> bool:
        return word in composed or (ROOT / word).exists()

    composed = set(recipes())
    wrong = [
        *unknown(r"(projects/[\w/]+\.(?:yaml|json|sbatch|py))", page, is_recipe),
        *unknown(r"(?<![\w/])((?:tests|benchmarks|lavis_lstp|docs)/[\w/]+\.(?:py|md|yaml|json))\b", page, is_recipe),
        *unknown(
            r"python -m (lavis_lstp(?:\.\w+)+)",
            page,
            lambda word: (ROOT / f"{word.replace('.', '/')}.py").is_file() or "projects" in word,
        ),
    ]
    assert not wrong, f"no such file: {wrong}"


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_names_of_modules_in_code_style_exist(page):
    """`data/...py` and the like, as docs/architecture.md writes them: relative to the package."""
    folders = "|".join(path.name for path in sorted((ROOT / "lavis_lstp").iterdir()) if path.is_dir())
    wrong = unknown(
        rf"`((?:{folders})/[\w/]+\.(?:py|yaml))`",
        page,
        lambda word: (ROOT / "lavis_lstp" / word).is_file() or (ROOT / word).is_file(),
    )
    assert not wrong, f"no such module: {wrong}"
