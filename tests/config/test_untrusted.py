"""What comes out of a file stays data: no command, no address, no variable, no place to write."""

from __future__ import annotations

import ast
import http.server
import inspect
import io
import json
import os
import threading
import urllib.request
from pathlib import Path

import pytest
import torch

from lavis_lstp.commands import cli
from lavis_lstp.errors import AnnotationError, ConfigError, LstpError, ShardError, WeightsError
from lavis_lstp.untrusted import recorded, what_it_names

ROOT = Path(__file__).resolve().parents[2]
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

    def refuse(*args, **_):
        raise AssertionError(f"a file's text got to the machine: {args}")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(urllib.request.OpenerDirector, "open", refuse)
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
        page = (folder / "report.html").read_text(encoding="utf-8")
        assert "1 without pictures" in said.out
        assert "sk-nobody-may-see-this" not in page + said.out + said.err
    assert not (watched / "made").exists()


def test_a_manifests_cache_and_quarantine_are_not_written(watched):
    places = {"shards": {"cache": "made"}, "quarantine": "made", "flow_root": "made", "root": "made"}
    info = {"annotations": {"test": {"storage": ["x-000000.tar"]}}}
    assert cli.main(["report", str(results_of(watched / "run", "lstp_shards", {**places, "build_info": info}))]) == 0
    assert sorted(os.listdir(watched / "run")) == ["evaluate_manifest.json", "report.html", "result"]


def test_a_manifests_shard_is_a_file_and_a_far_folder_is_told(watched, tmp_path_factory, capsys):
    os.mkfifo(watched / "x-000000.tar")
    folder = results_of(
        watched / "fifo", "lstp_shards", {"build_info": {"annotations": {"test": {"storage": "../x-000000.tar"}}}}
    )
    assert cli.main(["report", str(folder)]) == 0 and "is no file" in capsys.readouterr().out
    far = tmp_path_factory.mktemp("far")
    (far / "v.mp4").write_bytes(b"no video")
    for name, videos in (("far", far), ("near", watched)):
        info = {"annotations": {"test": {"storage": "test.json"}}, "videos": {"storage": str(videos)}}
        folder = results_of(watched / name, "lstp_video_qa", {"build_info": info})
        (watched / "v.mp4").write_bytes(b"no video")
        (folder / "test.json").write_text(
            json.dumps([{"question_id": "q", "video": "v.mp4", "question": "?", "answer": "a"}])
        )
        assert cli.main(["report", str(folder)]) == 0
        assert (f"pictures are of files in {far}" in capsys.readouterr().out) == (name == "far")


@pytest.mark.parametrize("manifest", [{"config": []}, {"config": {"datasets": {"lstp_shards": "pipe:id"}}}, {"cwd": 3}])
def test_a_manifest_of_another_form_is_named(manifest, watched, capsys):
    folder = results_of(watched / "run", "lstp_shards", {})
    (folder / "evaluate_manifest.json").write_text(json.dumps(manifest))
    assert cli.main(["report", str(folder)]) == 2
    assert "evaluate_manifest.json" in capsys.readouterr().err


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
    from lavis_lstp.commands import export
    from lavis_lstp.inference import lmms, loading

    outer, _, inner = place.partition(".")
    run = run_with(watched / "run", {outer: {inner: text} if inner else text})
    readers = (
        lambda: loading.build_model("lstp_tiny", None, str(run), []),
        lambda: export.export([str(run)], watched / "out", name="lstp_tiny"),
        lambda: type("lstp_tiny", (lmms.LstpAnswers,), {"MODEL": "lstp_tiny"})(checkpoint=str(run)),
    )
    for read in readers:
        with pytest.raises(ConfigError, match=rf"manifest\.json: model\.{place} is an? ") as caught:
            read()
        assert "sk-nobody" not in str(caught.value)
    assert loading.recorded_model(str(run), [f"model.{place}=other"])["arch"] == "lstp_tiny"


@pytest.mark.parametrize(
    "key", ["backbone.weights", "sampler.weights", "sampler.tokenizer", "scorer.weights", "checkpoint"]
)
def test_a_manifest_does_not_choose_what_is_downloaded(key, watched, monkeypatch):
    """A name on the hub is an address, too, but for the published models and what is in the cache already."""
    import huggingface_hub.constants

    from lavis_lstp.inference import loading

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(watched / "hub"))
    outer, _, inner = key.partition(".")
    name = "somebody/tracking/x.pt" if key == "checkpoint" else "somebody/tracking"
    run = run_with(watched / "run", {outer: {inner: name} if inner else name})
    with pytest.raises((ConfigError, WeightsError), match="manifest.json.*somebody/tracking"):
        loading.recorded_model(str(run))
    if inner:
        assert loading.recorded_model(str(run), [f"model.{key}={name}"])
        (watched / "hub" / "models--somebody--tracking").mkdir(parents=True)
        assert loading.recorded_model(str(run))[outer][inner] == name
        run = run_with(watched / "other", {outer: {inner: "Salesforce/instructblip-vicuna-7b"}})
        assert loading.recorded_model(str(run))


def test_a_manifest_does_not_choose_where_answers_are_written(watched):
    from lavis_lstp.inference import loading

    place = str(watched / "answers.sqlite")
    run = run_with(watched / "run", {"backbone": {"source": "endpoint", "endpoint": {"cache": place}}})
    with pytest.raises(ConfigError, match=r"manifest\.json: model\.backbone\.endpoint\.cache is "):
        loading.recorded_model(str(run))
    assert loading.recorded_model(str(run), ["model.backbone.endpoint.cache=null"])["backbone"]["source"] == "endpoint"


def test_the_users_own_options_may_name_variables(watched):
    from lavis_lstp.inference import loading

    run = run_with(watched / "run", {"prompt": "${oc.env:LSTP_TEST_KEY}"})
    own = ["model.prompt=${oc.env:LSTP_TEST_KEY}"]
    _, config = loading.model_config(loading.recorded_model(str(run), own), [], own)
    assert config.prompt == "sk-nobody-may-see-this"


# ---- every door ------------------------------------------------------------------------------------------------------

CONFIGURE = {"create", "load", "merge", "from_dotlist", "resolve", "unsafe_merge", "update", "select", "to_container"}
"""Functions of OmegaConf that interpret text, or may."""
OPEN = "ShardQuestions ShardSet expand open_stream open_scan read_all read_at Popen run urlopen url_to_fs".split()
"""Functions that take a command, an address or a place."""
OWN = {
    "the configuration on the command line": """
        load_recipe _load with_options _complete _complete_run complete_model _complete_datasets _plain plain
        _content _call Warm.start _section_of explain complete _load_defaults sections_of _own_sections
        VideoQABuilder.__init__ VideoQABuilder.build VideoQABuilder._split ShapesBuilder.build
        ShardQuestions.__init__ ShardQuestions.spans _copy
    """,
    "the package's own files": """
        _with_default_preprocess.load_model_and_preprocess_by_name load_variant _settings hub_answers
        laid_over _defaults base LSTP.default_config VideoQABuilder.default_config git_revision pack_once.work export
        build_matching
    """,
    "what opens, for those above": "_pipe _strip _fsspec ShardSet._index read_manifest",
    "a copy of the configuration for a record": "recordable",
    "what has passed the line": """
        RunSettings.from_config model_config LSTP.from_pretrained _save_sampler _data_set _placed _media
    """,
}
"""Functions that call these, by whose text they take."""


def doors(path: Path) -> set[str]:
    """Functions of a module, with their class, that interpret or open something."""
    found, tree = set(), ast.parse(path.read_text(encoding="utf-8"))
    storages = "lavis_lstp.data." + "shards"  # every module of it
    sources = ("subprocess", "urllib", storages)
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
            if (of == "OmegaConf" and called in CONFIGURE) or called == "merge_with" or opens:
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
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                called = [one.func for one in ast.walk(node) if isinstance(one, ast.Call)]
                passing |= {node.name for one in called if getattr(one, "id", "") == "recorded"}
    assert passing == {"recorded_model", "_recorded_videos", "_data_set", "shown_in"}


# ---- ids and paths ---------------------------------------------------------------------------------------------------

BAD_NAMES = ["", ".", "..", "../x", "a/b", "/etc/x", "a\\b", "C:x", "a\0b", "x" * 201, "\ud800"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_an_id_that_is_no_file_name_is_neither_written_nor_read(name, tmp_path):
    """`lavis-lstp flow` and both readers of its files ask the same function."""
    from lavis_lstp.commands.flow import find_videos
    from lavis_lstp.data.flow_files import flow_file
    from lavis_lstp.data.folder import FolderQuestions

    (tmp_path / "flow").mkdir()
    row = {"question_id": "q", "video": "v.mp4", "video_id": name, "question": "?", "answer": "a"}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    questions = FolderQuestions([row], tmp_path, flow_root=tmp_path / "flow")
    readers = (
        lambda: find_videos(tmp_path / "a.json"),
        lambda: flow_file(tmp_path / "flow", name),
        lambda: questions.flow(questions.place(row), 4),
        lambda: questions.check_files(),
    )
    for read in readers:
        with pytest.raises(AnnotationError, match="cannot be a file name: it|half a character"):
            read()


def test_a_shards_video_id_does_not_lead_out_of_flow_root(tmp_path):
    from lavis_lstp.data.shards.format import dump_json, media_key
    from lavis_lstp.data.shards.questions import ShardQuestions
    from lavis_lstp.data.shards.tar import ShardWriter

    row = {"question_id": "q", "question": "?", "answer": "a"}
    value = {"format": "lavis_lstp.shard_sample", "version": 1, "kind": "video", "video_id": "../secret"}
    value |= {"source": "v.mp4", "sha256": "0" * 64, "questions": [row]}
    with ShardWriter(tmp_path / "x-000000.tar") as shard:
        shard.add(media_key("video", "v.mp4"), {"mp4": b"video", "json": dump_json(value)})
    questions = ShardQuestions(str(tmp_path / "x-000000.tar"), flow_root=tmp_path / "flow")
    with pytest.raises(AnnotationError, match=r"'\.\./secret' cannot be a file name"):
        questions.flow(questions[0]["place"], 4)


@pytest.mark.parametrize("name", [*BAD_NAMES[2:4], *BAD_NAMES[5:9], "a/" + "x" * 256, "a/" * 600 + "a"])
def test_a_path_of_an_annotation_or_a_shard_stays_in_its_folder(name, tmp_path):
    from lavis_lstp.data.folder import FolderQuestions
    from lavis_lstp.data.shards.format import media_path

    row = {"question_id": "q", "video": name, "video_id": "v", "question": "?", "answer": "a"}
    with pytest.raises(AnnotationError, match="leads out of|has a backslash|is longer"):
        FolderQuestions([row], tmp_path).check_files()
    with pytest.raises(ShardError, match="not a relative path"):
        media_path(name)


def test_a_checkpoint_is_not_looked_for_outside_its_folder(tmp_path):
    from lavis_lstp.runners.checkpoint import CheckpointStore, what_is_torn

    outside = tmp_path / "outside" / "step_00000001"
    outside.mkdir(parents=True)
    (outside / "manifest.json").write_text(json.dumps({"files": {}}))
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    store.folder.mkdir(parents=True)
    for name in ("../../outside/step_00000001", str(outside), 7):
        (store.folder / "best.json").write_text(json.dumps({"checkpoint": name}))
        with pytest.raises(WeightsError, match="best.json: 'checkpoint' is not of the form"):
            store.best()
    (outside / "manifest.json").write_text(json.dumps({"files": {"../../secret": {"bytes": 1, "sha256": ""}}}))
    assert "'files' is not of the form" in what_is_torn(outside)


# ---- weights ---------------------------------------------------------------------------------------------------------


class Bomb:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_refused_by_every_loader(tmp_path, monkeypatch):
    """Ours, and those of LAVIS's models: blip, blip2, albef, alpro, base_model read a file of the user's alike."""
    import pickle

    import lavis
    from lavis.common.registry import registry

    from lavis_lstp.models.weights.reading import load_state_dict_file, load_torch

    monkeypatch.delenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", raising=False)
    file, made = tmp_path / "w.pth", tmp_path / "made"
    torch.save({"model": {"a": torch.zeros(1)}, "epoch": Bomb(made)}, file)
    for read in (load_torch, load_state_dict_file):
        with pytest.raises(WeightsError, match="could run code"):
            read(file)
    assert lavis.__file__
    loaders = {}
    for name in registry.list_models():
        model = registry.get_model_class(name)
        for method in ("load_checkpoint", "load_from_pretrained"):
            function = getattr(model, method, None)
            if function is not None and model.__module__.startswith("lavis."):
                loaders[function.__module__, function.__qualname__] = (model, function)
    assert len(loaders) >= 4
    for model, function in loaders.values():
        with pytest.raises(pickle.UnpicklingError, match="[Ww]eights"):
            more = (4, 16) if "num_frames" in inspect.signature(function).parameters else ()
            function(model.__new__(model), str(file), *more)
    assert not made.exists()


@pytest.mark.parametrize("name", ["vit", "timesformer.helpers"])
def test_what_lavis_downloads_by_torch_hub_holds_weights_only(name, tmp_path, monkeypatch):
    """DeiT's and TimeSformer's files; torch.hub itself would run what they hold."""
    import importlib
    import pickle

    from lavis_lstp import register
    from lavis_lstp.host import shims

    register()
    module = importlib.import_module(f"lavis.models.{name}")
    shims.apply_to_lavis()
    load = module.model_zoo.load_url if name != "vit" else module.torch.hub.load_state_dict_from_url
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "good.pth")
    torch.save({"model": Bomb(tmp_path / "made")}, tmp_path / "bomb.pth")
    assert load(f"file://{tmp_path}/good.pth", map_location="cpu", progress=False)["model"]["a"] == 1
    with pytest.raises(pickle.UnpicklingError, match="[Ww]eights"):
        load(f"file://{tmp_path}/bomb.pth", map_location="cpu", progress=False)
    assert not (tmp_path / "made").exists()


def test_pickles_are_read_in_one_place():
    """`torch.load` is called by `load_torch` alone, and nothing else reads pickles."""
    for path in [*(ROOT / "lavis_lstp").rglob("*.py"), *(ROOT / "webdataset_tools").rglob("*.py")]:
        calls = [
            ast.unparse(node.func)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call)
        ]
        allowed = ["torch.load"] if path.parts[-2:] == ("weights", "reading.py") else []
        reading = ("torch.load", "pickle.load", "pickle.loads", "np.load", "yaml.load", "joblib.load", "eval", "exec")
        assert [call for call in calls if call in reading] == allowed, path


LENIENT = {
    "files.py": {"_who", "read_jsonl", "sorted_header"},  # what just wrote a file
    "endpoint.py": {"message_of"},  # a server's answer, whose form is checked and which is never kept
    "judging/cache.py": {"_verdict"},  # our own data base
    "inference/lmms.py": {"generate_until"},  # text made a line above
    "data/shards/index.py": {"__init__", "_check_columns"},  # lists, whose form is checked
    "data/shards/format.py": {"load_tensors"},  # a header that safetensors has parsed
    "commands/scan.py": {"_unescaped"},  # any text at all: what is no JSON is looked through as it is
    "commands/export.py": {"_save_tokenizer"},  # written a line above by transformers
    "commands/demo.py": {"report", "explain"},  # written by the demo's steps
    "commands/ask.py": {"_take_example"},  # ships with the package
    "testing/example.py": {"make"},  # written by itself
    "testing/tiny_tokenizers.py": {"_core_json"},  # written by tokenizers
}


def test_json_of_files_has_one_strict_reader():
    """`json.loads` takes the last of two equal keys, NaN, and no mark of Windows; who calls it says here why."""
    found = {}
    for path in sorted((ROOT / "lavis_lstp").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                calls = [ast.unparse(one.func) for one in ast.walk(node) if isinstance(one, ast.Call)]
                if {"json.loads", "json.load"} & set(calls):
                    found.setdefault(path.relative_to(ROOT / "lavis_lstp").as_posix(), set()).add(node.name)
    assert found == LENIENT


@pytest.mark.parametrize("content", ['{"weight_map": {}, "weight_map": {}}', "[" * 100_000, "\ufeff[]", '{"a": NaN}'])
def test_a_file_about_weights_that_no_two_readers_read_alike_is_one_line(content, tmp_path, monkeypatch):
    from lavis_lstp.models.weights import hub
    from lavis_lstp.models.weights.reading import _load_shards
    from lavis_lstp.models.weights.recorded import recorded_run
    from lavis_lstp.report.table import measure

    names = ("model.safetensors.index.json", hub.SIZES_FILE, "manifest.json", "s_t_metrics.json")
    for name in names:
        (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "s_t.jsonl").write_text('{"question_id": "1", "answer": "a", "prediction": "a"}\n')
    monkeypatch.setenv(hub.ENVIRONMENT, str(tmp_path))
    reads = {
        names[0]: lambda: _load_shards(tmp_path / names[0]),
        names[1]: hub.sizes_of_weights,
        names[2]: lambda: recorded_run(str(tmp_path / "model.safetensors")),
        names[3]: lambda: measure(tmp_path, "s_t"),
    }
    for name, read in reads.items():
        if "NaN" in content and name in names[2:]:
            continue  # manifests and scores may hold NaN: json.dump writes it
        with pytest.raises(LstpError) as caught:
            read()
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_mark_of_windows_programs_is_read(tmp_path, monkeypatch):
    from lavis_lstp.models.weights import hub

    (tmp_path / hub.SIZES_FILE).write_text('\ufeff{"model": {"sampler": {"width": 8}}}', encoding="utf-8")
    monkeypatch.setenv(hub.ENVIRONMENT, str(tmp_path))
    assert hub.sizes_of_weights() == {"sampler": {"width": 8}}


def test_an_old_torch_reads_no_pickle(tmp_path, monkeypatch):
    from lavis_lstp.models.weights.reading import load_state_dict_file

    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pt")
    for version in ("2.5.1+cu124", "2.4.0", "1.13"):
        monkeypatch.setattr(torch, "__version__", version)
        with pytest.raises(WeightsError, match="CVE-2025-32434"):
            load_state_dict_file(tmp_path / "w.pt")
    for version in ("2.6.0a0+git", "2.10.0", "3.0"):
        monkeypatch.setattr(torch, "__version__", version)
        assert load_state_dict_file(tmp_path / "w.pt")["a"].tolist() == [0]


def test_setup_asks_for_a_torch_that_reads_pickles_safely():
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert '"torch>=2.6"' in text and '"torchvision>=0.21"' in text


@pytest.mark.filterwarnings("ignore:.*parse")
def test_a_file_that_claims_more_numbers_than_it_has_is_refused(tmp_path):
    from lavis_lstp.models.weights.reading import load_state_dict_file, load_torch

    one = torch.zeros(1 << 10)
    large = {
        "stride 0": {"a": torch.zeros(1).expand(92_000, 92_000)},
        "views": {f"a{i}": torch.zeros(1 << 20)[None].expand(40, -1) for i in range(4)},
        "nested": {"state": {0: {"exp_avg": torch.zeros(1).expand(1 << 40)}}},
        "meta": {"a": torch.zeros(1 << 40, device="meta")},
        "sparse": {"a": torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), torch.ones(1), (1 << 40,))},
    }
    for name, state in large.items():
        torch.save(state, tmp_path / "w.pt")
        assert (tmp_path / "w.pt").stat().st_size < 64 << 20
        with pytest.raises(WeightsError, match="bytes of|no plain tensor"):
            load_torch(tmp_path / "w.pt")
            pytest.fail(name)
    tied = {"a": one, "b": one, "ids": torch.arange(512).expand(1, -1), "empty": torch.zeros(0)}
    torch.save(tied, tmp_path / "w.pt")
    assert load_state_dict_file(tmp_path / "w.pt").keys() == tied.keys()


# ---- hosts and sizes -------------------------------------------------------------------------------------------------


class Answering(http.server.BaseHTTPRequestHandler):
    """Redirects to where its server is told, else answers with two bytes."""

    def do_GET(self):
        self.server.asked.append((self.path, dict(self.headers)))
        if self.server.to:
            self.send_response(307)
            self.send_header("Location", self.server.to)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        return self.wfile.write(b"{}")

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def two_hosts():
    """A server that redirects to another one, unless its `to` is changed."""
    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering) for _ in range(2)]
    for server in servers:
        server.asked, server.to, server.url = [], None, f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
    servers[0].to = f"{servers[1].url}/other.json"
    yield servers
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_redirect_to_another_host_is_followed_only_where_the_user_says_so(two_hosts, monkeypatch):
    from lavis_lstp.data.builders import retry_of, shard_settings
    from lavis_lstp.data.shards import storage

    first, second = two_hosts
    monkeypatch.delenv(storage.REDIRECTS, raising=False)

    def streamed() -> bytes:
        with storage.open_stream(f"{first.url}/x.json") as stream:
            return stream.read()

    for read in (
        lambda: storage.read_all(f"{first.url}/x.json"),
        lambda: storage.read_at(f"{first.url}/x.json", 0, 2),
        streamed,
    ):
        with pytest.raises(ShardError, match=f"another host.*{storage.REDIRECTS}=127.0.0.1"):
            read()
    assert not second.asked
    monkeypatch.setenv(storage.REDIRECTS, "example.org, 127.0.0.1")
    assert storage.read_all(f"{first.url}/x.json") == b"{}" and len(second.asked) == 1
    monkeypatch.delenv(storage.REDIRECTS)
    allowed = retry_of(shard_settings({"redirects": ["127.0.0.1"], "attempts": 2}, "train", "datasets.x"))
    assert storage.read_all(f"{first.url}/x.json", allowed) == b"{}" and len(second.asked) == 2
    others = retry_of(shard_settings({"redirects": ["example.org"]}, "train", "datasets.x"))
    with pytest.raises(ShardError, match=r"shards.redirects=\[127.0.0.1\] of the data set, or"):
        storage.read_all(f"{first.url}/x.json", others)
    monkeypatch.setenv(storage.REDIRECTS, "*")
    first.to = "ftp://127.0.0.1/x"
    with pytest.raises(ShardError, match="not encrypted"):
        storage.read_all(f"{first.url}/x.json")


def test_a_redirect_on_the_same_host_is_followed(two_hosts, monkeypatch):
    from lavis_lstp.data.shards import storage

    monkeypatch.delenv(storage.REDIRECTS, raising=False)
    _, second = two_hosts
    handler = storage._Redirects()
    for old, new, followed in (
        ("http://h/x", "http://h/y", True),
        ("http://h/x", "https://h/x", True),
        ("https://h/x", "http://h/x", False),
        ("http://h/x", "http://h:8080/x", False),
        ("https://h/x", "https://h.evil.org/x", False),
    ):
        request = urllib.request.Request(old)
        if followed:
            assert handler.redirect_request(request, None, 302, "", {}, new).full_url == new
        else:
            with pytest.raises(ShardError):
                handler.redirect_request(request, None, 302, "", {}, new)


def test_a_judge_takes_its_key_nowhere_else(two_hosts, monkeypatch):
    pytest.importorskip("openai")
    from lavis_lstp.judging.endpoint import EndpointJudge
    from lavis_lstp.judging.prompts import preset
    from lavis_lstp.judging.verdict import FAILED, Case

    first, second = two_hosts
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-key-0123456789")
    monkeypatch.setenv("OPENAI_BASE_URL", f"{first.url}/v1")
    verdicts = []
    judge = EndpointJudge("m", preset("strict"), retries=0, concurrency=1)
    judge.judge([Case("what?", "a", "b")], lambda case, verdict: verdicts.append(verdict))
    assert [verdict.status for verdict in verdicts] == [FAILED]
    assert len(first.asked) == 1 and not second.asked


def test_members_and_bytes_that_are_read_at_once_have_an_end(monkeypatch):
    from lavis_lstp.data.shards import tar

    raw = b"".join(tar.header(f"{n}.json", 1024) + bytes(1024) for n in range(4)) + tar.END
    monkeypatch.setattr(tar, "CONTENT_LIMIT", 1000)
    scan = tar.TarScan(io.BytesIO(raw), "x.tar")
    next(iter(scan))
    with pytest.raises(ShardError, match="0.json: 1024 bytes, at most 1000 are read") as caught:
        scan.content()
    assert caught.value.cause == "member too large"
    monkeypatch.setattr(tar, "MEMBERS_LIMIT", 3)
    with pytest.raises(ShardError, match="more than 3 members"):
        list(tar.TarScan(io.BytesIO(raw), "x.tar"))


def test_deflated_flow_and_long_ids_have_an_end():
    import zlib

    import numpy as np

    from lavis_lstp.data.shards import flow_code
    from lavis_lstp.data.shards.format import escape

    packed = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = packed.compress(bytes(64 << 20)) + packed.flush()
    form = flow_code.Form(16, 16, "full", False)
    with pytest.raises(ValueError, match="."):
        flow_code.decode(flow_code.Coded(bomb, np.ones(1, np.float32), form))
    with pytest.raises(ShardError, match="expected 1..1024"):
        escape("x" * 1025)


# ---- terminals -------------------------------------------------------------------------------------------------------


def test_no_command_prints_an_escape_out_of_a_file(watched, capsys):
    """Ids, answers and names of somebody else's results in tables, notes and errors."""
    evil = "\x1b]0;owned\x07\x1b[31m\u202e"
    folder = results_of(watched / "run", "lstp_shards", {"build_info": {"annotations": {"test": {"storage": evil}}}})
    file = folder / "result" / "test_video_qa.jsonl"
    row = {**json.loads(file.read_text()), "question_id": f"q{evil}", "category": evil, "answer": evil}
    file.write_text("".join(json.dumps({**row, "question_id": f"q{i}{evil}"}) + "\n" for i in range(3)))
    broken = watched / "broken.jsonl"
    broken.write_text(json.dumps({**row, "prediction": 3}) + "\n")
    (watched / "videos").mkdir()
    for command in (
        ["report", str(folder)],
        ["report", str(broken)],
        ["report", str(folder), "--result", str(watched / "x.json")],
        ["verify-result", str(watched / "x.json"), "--predictions", str(file)],
        ["judge", str(file), "--judge", "rules"],
        ["compare", str(file), str(file)],
        ["ask", f"none{evil}.mp4", "?"],
    ):
        cli.main(command)
        said = capsys.readouterr()
        assert not any(mark in said.out + said.err for mark in "\x1b\x07\u202e"), command
