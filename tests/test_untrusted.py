"""What comes out of a file stays data: no command, no address, no variable, no place to write."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import pytest

from lavis_lstp import cli
from lavis_lstp.errors import ConfigError
from lavis_lstp.untrusted import recorded, what_it_names

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = {
    "pipe:id > FILE": "a command",
    " PIPE:id": "a command",
    "{pipe,x}:id > FILE; true .tar": "a command",
    "${oc.env:LSTP_TEST_KEY}": "a variable",
    "videos/${oc.decode:x}": "a variable",
    "???": "a variable",
    "http://127.0.0.1:9/x-000000.tar": "an address",
    "HTTPS://user:word@host/x.tar": "an address",
    "{h,x}ttp:{//,/}127.0.0.1:9/x.tar": "a command",
    "s3://bucket/x-{000..002}.tar": "an address",
    "file:///etc/passwd": "an address",
    "simplecache::s3://bucket/x.tar": "an address",
    "filecache::local/x.tar": "an address",
    "//host/share/x.tar": "an address",
    "\\\\host\\share\\x.tar": "an address",
}
PLAIN = [
    "videos",
    "/data/x-{000..003}.tar",
    "../up",
    "Question: {question} Answer:",
    "Salesforce/instructblip",
    "a:b",
    "",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_acts_on_the_machine_is_refused_wherever_it_stands(text):
    assert what_it_names(text) == HOSTILE[text]
    for value in ({"a": {"b": [1, text]}}, {"a": {"b": [1, {text: 2}]}}):
        with pytest.raises(ConfigError, match=r"run\.json: a\.b\[1\].* is an? (command|variable|address)"):
            recorded(value, "run.json")


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_text_or_a_path_stays_as_it_is(text):
    value = {"a": [{"b": text, "n": 1.5, "none": None, "yes": True}]}
    assert recorded(value, "run.json") == value


def test_the_command_line_replaces_what_is_refused():
    value = {"model": {"weights": "${oc.env:HOME}", "parts": {"one": "pipe:id"}}}
    found = recorded(value, "run.json", replaced=["model.weights", "model.parts"])
    assert found == {"model": {"weights": None, "parts": {"one": None}}}
    with pytest.raises(ConfigError, match="model.weights is a variable"):
        recorded(value, "run.json", replaced=["model.weigh", "model.parts"])


# ---- the commands that read somebody else's files --------------------------------------------------------------------


@pytest.fixture
def watched(monkeypatch, tmp_path):
    """Fails where a process is started, a host is asked, or the test's variable becomes part of anything."""
    import subprocess
    import urllib.request

    def refuse(*args, **_):
        raise AssertionError(f"a file's text got to the machine: {args}")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setenv("LSTP_TEST_KEY", "sk-nobody-may-see-this")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


SECTION = {
    "data_type": "videos",
    "num_frames": 4,
    "fps": None,
    "short_videos": "keep",
    "image_size": 32,
    "flow_size": None,
    "spans_form": "lavis_lstp",
    "backend": "pyav",
    "cache_videos": 0,
    "image_frames": 1,
}


def results_of(folder: Path, name: str, section: dict) -> Path:
    """A results folder as an evaluation writes it, with this section of data set `name` in its manifest."""
    row = {"question_id": "q", "video_id": "v", "question": "?", "answer": "a", "prediction": "a", "frame_times": [0.0]}
    (folder / "result").mkdir(parents=True)
    (folder / "result" / "test_video_qa.jsonl").write_text(json.dumps(row) + "\n")
    config = {"run": {"task": "video_qa"}, "model": {}, "datasets": {name: {**SECTION, **section}}}
    (folder / "evaluate_manifest.json").write_text(json.dumps({"config": config, "cwd": str(folder)}))
    return folder


def sections(text: str, folder: Path) -> list[tuple[str, dict]]:
    """Every place of a recorded data set that takes a text, with `text` there."""
    text = text.replace("FILE", str(folder / "made"))
    storage = {"annotations": {"test": {"storage": text}}}
    many = {"annotations": {"test": {"storage": [f"{folder}/x-000000.tar", text]}}}
    file = {"annotations": {"test": {"storage": "test.json"}}, "videos": {"storage": "."}}
    videos = {**file, "videos": {"storage": text, "names": text}}
    cache = {"shards": {"cache": str(folder / "made")}}
    return [
        ("lstp_shards", {"build_info": storage, **cache}),
        ("lstp_shards", {"build_info": many, **cache}),
        ("lstp_video_qa", {"build_info": storage, **cache}),
        ("lstp_shapes", {"build_info": file, "root": str(folder / "made"), "backend": text}),
        ("lstp_nextqa_mc", {"build_info": {**videos, "answers": {"test": {"storage": text}}}}),
        ("lstp_video_qa", {"build_info": file, "short_videos": text}),
    ]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_report_on_somebody_elses_results_does_nothing_that_they_say(text, watched, capsys):
    for number, (name, section) in enumerate(sections(text, watched)):
        folder = results_of(watched / f"{number}", name, section)
        (folder / "test.json").write_text(
            json.dumps([{"question_id": "q", "video": "v.mp4", "question": "?", "answer": "a"}])
        )
        (folder / "v.mp4").write_bytes(b"no video")
        assert cli.main(["report", str(folder)]) == 0
        said = capsys.readouterr()
        page = (folder / "report.html").read_text()
        assert "1 without pictures" in said.out
        assert "sk-nobody-may-see-this" not in page + said.out + said.err
    assert not (watched / "made").exists()


def test_a_manifests_cache_and_quarantine_are_not_written(watched):
    places = {"shards": {"cache": "made"}, "quarantine": "made", "flow_root": "made", "root": "made"}
    info = {"annotations": {"test": {"storage": ["x-000000.tar"]}}}
    assert cli.main(["report", str(results_of(watched / "run", "lstp_shards", {**places, "build_info": info}))]) == 0
    assert sorted(os.listdir(watched / "run")) == ["evaluate_manifest.json", "report.html", "result"]


@pytest.mark.parametrize("manifest", [{"config": []}, {"config": {"datasets": {"lstp_shards": "pipe:id"}}}, {"cwd": 3}])
def test_a_manifest_of_another_form_gives_a_note(manifest, watched, capsys):
    folder = results_of(watched / "run", "lstp_shards", {})
    (folder / "evaluate_manifest.json").write_text(json.dumps(manifest))
    assert cli.main(["report", str(folder)]) == 0
    assert "1 without pictures" in capsys.readouterr().out


def run_with(folder: Path, model: dict) -> Path:
    """A run's checkpoint of no weights whose manifest has this section `model`."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    save_file({}, str(folder / "model.safetensors"))
    (folder / "manifest.json").write_text(json.dumps({"config": {"model": {"arch": "lstp_tiny", **model}}}))
    return folder


@pytest.mark.parametrize("text", ["${oc.env:LSTP_TEST_KEY}", "pipe:id", "https://user:word@host/w.safetensors"])
@pytest.mark.parametrize("place", ["checkpoint", "prompt", "backbone.weights", "sampler.tokenizer", "flow.weights"])
def test_a_checkpoints_manifest_names_no_variable_and_no_address(text, place, watched):
    from lavis_lstp import ask, export, lmms

    outer, _, inner = place.partition(".")
    run = run_with(watched / "run", {outer: {inner: text} if inner else text})
    readers = (
        lambda: ask.build_model("lstp_tiny", None, str(run), []),
        lambda: export.export([str(run)], watched / "out", name="lstp_tiny"),
        lambda: type("lstp_tiny", (lmms.LstpAnswers,), {"MODEL": "lstp_tiny"})(checkpoint=str(run)),
    )
    for read in readers:
        with pytest.raises(ConfigError, match=rf"manifest\.json: model\.{place} is an? ") as caught:
            read()
        assert "sk-nobody" not in str(caught.value)
    assert ask.recorded_model(str(run), [f"model.{place}=other"])["arch"] == "lstp_tiny"


def test_the_users_own_options_may_name_variables(watched):
    from lavis_lstp import ask

    run = run_with(watched / "run", {"prompt": "${oc.env:LSTP_TEST_KEY}"})
    own = ["model.prompt=${oc.env:LSTP_TEST_KEY}"]
    _, config = ask.model_config(ask.recorded_model(str(run), own), [], own)
    assert config.prompt == "sk-nobody-may-see-this"


# ---- every door ------------------------------------------------------------------------------------------------------

CONFIGURE = {"create", "load", "merge", "from_dotlist", "resolve", "unsafe_merge", "update", "select", "to_container"}
"""Functions of OmegaConf that interpret text, or may."""
OPEN = "ShardQuestions ShardSet expand open_stream open_scan read_all read_at Popen run urlopen url_to_fs".split()
"""Functions that take a command, an address or a place."""
OWN = {
    "the configuration on the command line": """
        load_recipe _load with_options _complete _complete_run complete_model _complete_datasets _plain plain
        _digest _call _section_of explain complete
        VideoQABuilder.build VideoQABuilder._split ShapesBuilder.build
        ShardQuestions.__init__ ShardQuestions.spans _copy
    """,
    "the package's own files": """
        _with_default_preprocess.load_model_and_preprocess_by_name load_variant _settings _hub_answers
        BenchmarkBuilder.default_config git_revision
    """,
    "what has passed the line": "model_config _save_sampler _questions _placed _media",
}
"""Functions that call these, by whose text they take."""


def doors(path: Path) -> set[str]:
    """Functions of a module, with their class, that interpret or open something."""
    found, tree = set(), ast.parse(path.read_text())
    sources = ("webdataset_tools", "subprocess", "urllib", "lavis_lstp.data.shards")
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith(sources)]
    imported = {name.name for node in imports for name in node.names} | {path.stem}

    def walk(node: ast.AST, names: tuple[str, ...]) -> None:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names = (*names, node.name)
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            of = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
            opener = of.split(".")[-1] in ("storage", "subprocess", "request", "core") or (
                not of and called in imported
            )
            opens = called in OPEN and opener
            if (of == "OmegaConf" and called in CONFIGURE) or opens:
                found.add(".".join(names))
        for child in ast.iter_child_nodes(node):
            walk(child, names)

    walk(tree, ())
    return found


def test_every_door_to_the_machine_is_known():
    """A new call that interprets text or opens a place is put into OWN after somebody asked whose text it is."""
    known = {name for table in OWN.values() for name in table.split()}
    found = set().union(*(doors(path) for path in (ROOT / "lavis_lstp").rglob("*.py")))
    assert found - known == set() and known - found == set()


def test_the_readers_of_recorded_configurations_pass_the_line():
    """Where a manifest's text becomes a part of a configuration, `recorded` is called."""
    passing = set()
    for path in (ROOT / "lavis_lstp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                called = [one.func for one in ast.walk(node) if isinstance(one, ast.Call)]
                passing |= {node.name for one in called if getattr(one, "id", "") == "recorded"}
    assert passing == {"recorded_model", "_questions"}
