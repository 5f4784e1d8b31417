"""`lstp_select`: what the inner model of lmms-eval is handed; and, slow, the released package with its own dummy."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_lmms import lmms_python  # noqa: F401
from video_files import numbered_video, read_number

from lavis_lstp.data.selections import Recorded, text_of
from lavis_lstp.errors import AnnotationError, ConfigError
from lavis_lstp.files import read_jsonl
from lavis_lstp.inference import lmms_select
from lavis_lstp.inference.selection import Selection


class Inner:
    """Answers with the numbers of the frames it is handed, and the text."""

    def __init__(self, is_simple: bool, **arguments):
        self.is_simple, self.arguments, self.rank, self.world_size = is_simple, arguments, 0, 1
        self.device = "cpu"

    def generate_until(self, requests):
        return [self.answer(request.arguments) for request in requests]

    def answer(self, arguments: tuple) -> str:
        document = self.task_dict[arguments[4]][arguments[5]][arguments[3]]
        if self.is_simple:
            media, text = arguments[2](document), arguments[0]
        else:
            parts = [part for message in arguments[1](document) for part in message["content"]]
            media = [part["url"] for part in parts if part["type"] != "text"]
            text = " ".join(part["text"] for part in parts if part["type"] == "text")
        numbers = [read_number(np.asarray(one).transpose(2, 0, 1)) for one in media if isinstance(one, Image.Image)]
        return f"{numbers} {[one for one in media if not isinstance(one, Image.Image)]} {text}"


class Bare(lmms_select.Selecting):
    SIMPLE = True

    def _inner(self, name, arguments):
        assert name == "some_model"
        return Inner(self.SIMPLE, **arguments)


class BareChat(Bare):
    SIMPLE = False


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> Path:
    return numbered_video(tmp_path_factory.mktemp("films") / "film.mp4", 60, fps=30)


@pytest.fixture
def documents(film) -> list[dict]:
    return [{"question": "which?", "video": str(film), "question_id": "a"}, {"question": "why?", "question_id": "b"}]


def request(doc_id: int, *, simple: bool) -> SimpleNamespace:
    def visual(document):
        return [document["video"]] if "video" in document else ["scan.png"]

    def messages(document):
        kind = "video" if "video" in document else "image"
        media = {"type": kind, "url": visual(document)[0]}
        return [{"role": "user", "content": [media, {"type": "text", "text": document["question"]}]}]

    settings = {"max_new_tokens": 4}
    two = (settings, visual) if simple else (messages, settings)
    context = "which? Answer." if doc_id == 0 else "why?"
    return SimpleNamespace(arguments=(context, *two, doc_id, "task", "test"))


def made(simple: bool, documents, **arguments):
    model = (Bare if simple else BareChat)(inner="some_model", **arguments)
    model.task_dict["task"] = {"test": documents}
    return model


CENTRES = [7, 22, 37, 52]
FRAMES = [0, 20, 59]


def test_a_simple_model_is_handed_frames_and_their_seconds(documents, tmp_path):
    log = tmp_path / "shown.jsonl"
    model = made(True, documents, method="uniform", k="4", log=str(log), pretrained="x")
    asked = [request(i, simple=True) for i in (0, 1)]
    video, picture = model.generate_until(asked)
    times = ", ".join(f"{i / 30:.1f}" for i in CENTRES)
    shown = [i % 38 for i in CENTRES]
    assert video == f"{shown} [] The frames show these seconds of the video: {times}.\nwhich? Answer."
    assert picture == "[] ['scan.png'] why?", "what is no video goes through"
    assert model.is_simple and model.inner.arguments == {"pretrained": "x"} and model.device == "cpu"
    logged = asked[0].arguments[-1]["lstp_select"]
    assert logged["method"] == "uniform" and logged["videos"][0]["frame_index"] == CENTRES
    assert logged["videos"][0]["times_s"] == pytest.approx([i / 30 for i in CENTRES], abs=1e-5)
    assert asked[0].arguments[0] == "which? Answer." and len(asked[1].arguments) == 6
    assert [*read_jsonl(log)] == [{"task": "task", "split": "test", "doc_id": 0, **logged}]


def test_a_chat_model_reads_the_seconds_before_each_frame(documents):
    model = made(False, documents, method="uniform", k=4)
    asked = [request(i, simple=False) for i in (0, 1)]
    asked.append(asked[0])  # a repeat
    video, picture, again = model.generate_until(asked)
    assert video == again and video == (
        f"{[i % 38 for i in CENTRES]} [] " + " ".join(f"<{i / 30:.1f} seconds>" for i in CENTRES) + " which?"
    )
    assert picture == "[] ['scan.png'] why?" and not model.is_simple
    assert len(asked[0].arguments) == 7 and asked[0].arguments[-1]["lstp_select"]["videos"][0]["frame_index"] == CENTRES


@pytest.mark.parametrize("form", ["jsonl", "aks", "bolt", "vllm"])
def test_recorded_frames_are_shown_in_place_of_chosen_ones(documents, film, tmp_path, form):
    rows = [
        {"question_id": name, **Selection.recorded(film, asked, Recorded(tuple(FRAMES))).to_json()}
        for name, asked in (("a", "which?"), ("b", "why?"))
    ]
    (tmp_path / "file").write_text(text_of(form, rows))
    model = made(True, documents, selection=str(tmp_path / "file"))
    (found,) = model.generate_until([request(0, simple=True)])
    assert found.startswith(str([i % 38 for i in FRAMES]))
    others = made(True, [{**documents[0], "question_id": "z", "question": "where?"}], selection=str(tmp_path / "file"))
    with pytest.raises(AnnotationError, match="question"):
        others.generate_until([request(0, simple=True)])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "need inner=MODEL and either method=NAME or selection=FILE"),
        ({"method": "uniform", "selection": "x"}, "either method=NAME or selection=FILE"),
        ({"method": "unifrom"}, "did you mean 'uniform'"),
        ({"method": "aks"}, "checkpoint=RUN, or a scorer=NAME"),
        ({"method": "aks", "scorer": "answerer"}, "checkpoint=RUN"),
        ({"method": "aks", "scorer": "clp"}, "did you mean 'clip'"),
        ({"method": "mmr"}, "checkpoint=RUN, or a scorer=NAME"),
        ({"method": "uniform", "scorer": "clip"}, "asks no scorer"),
        ({"method": "bitcost", "settings": "power"}, "expected NAME=VALUE"),
    ],
)
def test_arguments_that_cannot_be_used_are_one_line(arguments, said):
    with pytest.raises(ConfigError, match=said):
        Bare(inner="some_model", **arguments)


def test_a_scorer_is_named_in_place_of_a_checkpoint(documents, monkeypatch):
    asked, real = [], lmms_select.select
    scorer = {"method": "mmr", "scorer": "clip=a/folder", "num_candidates": "12", "k": "2", "settings": "relevance=0.3"}

    def select(path, question, **how):
        asked.append(how)
        return real(path, question, k=how["k"], method="uniform")

    monkeypatch.setattr(lmms_select, "select", select)
    made(True, documents, **scorer).generate_until([request(0, simple=True)])
    told = {"k": 2, "method": "mmr", "seed": 0, "relevance": 0.3, "num_candidates": 12, "scorer": "clip=a/folder"}
    assert asked == [told | {"clip_s": None}]


def test_settings_of_a_method_and_parts_of_videos(documents, film):
    model = made(True, documents, method="bitcost", settings="rule=topk", k=2)
    assert model.generate_until([request(0, simple=True)])[0].startswith("[")
    asked = request(0, simple=True)
    clip = {"type": "video", "path": str(film), "video_start": 0.5, "video_end": 1.0}
    asked.arguments = (*asked.arguments[:2], lambda document: [clip], *asked.arguments[3:])
    model.generate_until([asked])
    (shown,) = asked.arguments[-1]["lstp_select"]["videos"]
    assert len(shown["times_s"]) == 2 and all(0.5 <= seconds < 1.0 for seconds in shown["times_s"])
    with pytest.raises(ConfigError, match="one question at a time"):
        model.generate_until_multi_round([])


@pytest.mark.slow
def test_the_released_package_runs_its_own_dummy_behind_a_selection(lmms_python, film, tmp_path):  # noqa: F811
    """Each logged sample says which frames it was shown, and when they are."""
    import yaml
    from test_lmms import sh

    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "utils.py").write_text("def visual(doc):\n    return [doc['video']]\n")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "which?", "answer": "A", "video": str(film)}) + "\n")
    task = {
        **{"task": "made_task", "dataset_path": "json", "test_split": "test", "output_type": "generate_until"},
        **{"doc_to_text": "question", "doc_to_target": "answer", "metadata": {"version": 0.0}},
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tasks / "made_task.yaml").write_text(yaml.safe_dump(task) + "doc_to_visual: !function utils.visual\n")
    words = [
        "-m",
        "lmms_eval",
        "--model",
        "lstp_select",
        "--model_args",
        f"inner=dummy,method=uniform,k=4,read_bytes=1,log={tmp_path}/shown.jsonl",
    ]
    words += ["--tasks", "made_task", "--include_path", tasks, "--log_samples", "--output_path", tmp_path / "out"]
    offline = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = sh(lmms_python, *words, cwd=tmp_path, **offline)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "Error during evaluation" not in said, said[-3000:]
    (path,) = (tmp_path / "out").rglob("*_samples_made_task.jsonl")
    (row,) = read_jsonl(path)
    assert row["filtered_resps"] == "A"
    (line,) = read_jsonl(tmp_path / "shown.jsonl")
    assert (line["task"], line["split"], line["doc_id"]) == ("made_task", "test", 0)
    assert line["method"] == "uniform" and [one["frame_index"] for one in line["videos"]] == [CENTRES]
