"""Our models in lmms-eval: what its requests become; and, slow, the released package itself on tasks of made videos."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from PIL import Image
from test_predictor import run_that_read
from video_files import numbered_video

from lavis_lstp.data.video import reading
from lavis_lstp.data.video.reading import read_frames
from lavis_lstp.errors import ConfigError, VideoError
from lavis_lstp.files import read_jsonl, write_json
from lavis_lstp.inference import lmms
from lavis_lstp.inference.lmms_requests import Request, cut, generation_settings, questions_of
from lavis_lstp.metrics.choice import choice_prompt
from lavis_lstp.models.variants import MODEL_TYPES

RELEASE = "0.7.3"
GREEDY = {"until": ["\n\n"], "do_sample": False, "max_new_tokens": 4}


# ---- without lmms-eval --------------------------------------------------------------------------------------------


def test_the_package_declares_the_entry_point_and_does_not_import_lmms_eval():
    (entry,) = [e for e in importlib.metadata.entry_points(group="lmms_eval.models") if e.name == "lavis_lstp"]
    assert entry.load() is lmms.manifests
    assert "lmms_eval" not in sys.modules
    with pytest.raises(AttributeError, match="no attribute 'lstp_tinny'"):
        lmms.lstp_tinny  # noqa: B018


class Bare(lmms.LstpAnswers):
    """The model without lmms-eval's base class, which gives it nothing but documents and a rank."""

    MODEL = "lstp_tiny"

    def __init__(self, documents, **arguments):
        super().__init__(**arguments)
        self.task_dict = {"task": {"test": documents}}


def request(doc_id: int, context: str, wanted=None, visual=lambda document: [document["medium"]]) -> SimpleNamespace:
    wanted = dict(GREEDY) if wanted is None else wanted
    return SimpleNamespace(args=(context, wanted, visual, doc_id, "task", "test"))


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> list[dict]:
    """Two videos, a picture in memory, the same one as a file, a part of a video, a text, a folder of pictures."""
    folder = tmp_path_factory.mktemp("media")
    videos = [str(numbered_video(folder / f"{name}.mp4", count)) for name, count in (("a", 20), ("b", 9))]
    picture = Image.effect_mandelbrot((70, 50), (-2, -1.5, 1, 1.5), 30).convert("P")
    picture.convert("RGB").save(folder / "picture.png")
    clip = {"type": "video", "path": videos[0], "video_start": 0.5, "video_end": 1.25}
    (folder / "frames").mkdir()
    for number in range(3):
        picture.convert("RGB").rotate(40 * number).save(folder / "frames" / f"{number}.png")
    media = [*videos, picture, str(folder / "picture.png"), clip, None, str(folder / "frames")]
    return [{"medium": medium, "question": "which shape?"} for medium in media]


@pytest.fixture(scope="module")
def model(documents) -> Bare:
    return Bare(documents, num_frames=8, batch_size="2", options="model.backbone.seed=3 model.selector.num_selected=4")


ASKED = "Look closely. which shape? Answer with one word."


def test_videos_pictures_and_texts_are_answered_in_order_whatever_they_share_a_batch_with(model):
    order = (5, 3, 0, 1, 2, 4, 0, 6)
    found = model.generate_until([request(i, ASKED) for i in order])
    assert found == [model.generate_until([request(i, ASKED)])[0] for i in order]
    losses = [loss for loss, _ in model.losses([request(i, ASKED, "red") for i in order])]
    alone = [model.losses([request(i, ASKED, "red")])[0][0] for i in order]
    assert losses == pytest.approx(alone, abs=1e-4)
    assert losses[1] == losses[4] and losses[2] == losses[6], "a picture in memory is what its file is"
    assert len({round(loss, 3) for loss in losses}) == 6, "three videos, a part of one, a picture and a text differ"


def test_frames_are_found_by_the_question_and_the_language_model_reads_everything(model, documents, monkeypatch):
    seen, answer = [], model.model.answer
    monkeypatch.setattr(model.model, "answer", lambda samples, **settings: seen.append(samples) or answer(samples))
    model.generate_until([request(0, f"<image>\n{ASKED}"), request(1, "is it a dog?")])
    (samples,) = seen
    assert samples["text_input"] == ["which shape?", "is it a dog?"], "a context that does not hold the question"
    assert samples["prompt"][0] == f"USER: <video>\n{ASKED} ASSISTANT: "
    assert samples["frame_mask"].sum(1).tolist() == [8, 8]


def test_a_video_gets_the_answer_of_the_command_ask(model, documents):
    for number in (0, 1):
        direct = model.predictor.answer(documents[number]["medium"], "which shape?")
        (found,) = model.generate_until([request(number, "which shape?", {"do_sample": False})])
        assert found == direct.prediction


def test_equal_questions_are_asked_once_unless_answers_are_drawn(model, monkeypatch):
    rows, answer = [], model.model.answer
    monkeypatch.setattr(
        model.model, "answer", lambda samples, **s: rows.extend(samples["question_id"]) or answer(samples, **s)
    )
    model.generate_until([request(0, ASKED)] * 3)
    assert rows == ["task/test/0"]
    rows.clear()
    model.generate_until([request(0, ASKED, {"do_sample": True, "temperature": 0.7, "max_new_tokens": 2})] * 2)
    assert rows == ["task/test/0", "task/test/0#1"]


def test_an_option_has_the_loss_that_lavis_evaluate_compares(model):
    losses = model.losses([request(0, "which shape?", option) for option in (" red", " blue", " red")])
    scored = model.model.score_options({**_samples(model, 0), "options": [["red", "blue"]]})
    assert [loss for loss, _ in losses[:2]] == [-one["mean"] for one in scored["option_log_prob"][0]]
    assert losses[2] == losses[0] != losses[1]
    of_document = model.losses([request(0, "what?", lambda document: document["question"])])
    assert of_document == model.losses([request(0, "what?", " which shape?")])


def test_greedy_search_gives_the_option_it_is_said_to_give(documents):
    model = Bare(documents, options="model.train=[language_model] model.flow.name=none model.selector.name=uniform")
    samples = {**_samples(model, 5), "text_output": ["red"]}
    optimizer = torch.optim.Adam((p for p in model.model.parameters() if p.requires_grad), 0.01)
    for _ in range(20):
        loss = model.model(samples)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    losses = model.losses([request(5, "which shape?", option) for option in (" red", " blue", " red red")])
    assert [greedy for _, greedy in losses] == [True, False, False] and losses[0][0] < 0.1 < losses[1][0]
    assert model.generate_until([request(5, "which shape?")]) == ["red"]


def _samples(model: Bare, number: int) -> dict:
    read = [Request.read(request(number, "which shape?").args)]
    (samples,) = model._batches(model._questions(read)[0])
    return samples


@pytest.mark.parametrize(
    ("wanted", "settings", "until"),
    [
        ({}, {}, []),
        ({"until": ["\n\n"], "do_sample": False}, {"do_sample": False}, ["\n\n"]),
        ({"temperature": 0, "top_p": 1.0, "num_beams": 1}, {"do_sample": False, "num_beams": 1}, []),
        ({"temperature": 0.2, "top_p": None}, {"do_sample": True, "temperature": 0.2}, []),
        ({"do_sample": True, "temperature": 0}, {"do_sample": False}, []),
        ({"do_sample": False, "temperature": 0.7, "top_k": 1}, {"do_sample": False}, []),
        ({"until": "", "max_new_tokens": 16, "image_aspect_ratio": "original"}, {"max_new_tokens": 16}, []),
        ({"until": "."}, {}, ["."]),
    ],
)
def test_settings_of_an_answer(wanted, settings, until):
    assert generation_settings(wanted, "task/test/0") == (settings, until)


def test_an_answer_ends_before_the_first_mark(model):
    (whole,) = model.generate_until([request(0, ASKED)])
    assert model.generate_until([request(0, ASKED, {**GREEDY, "until": [whole[3]]})]) == [whole[:3].split(whole[3])[0]]
    assert cut(" a dog. It barks\n\nQuestion", ["\n\n", "."]) == "a dog"
    assert cut("a dog ", ["."]) == "a dog"


@pytest.mark.parametrize(
    ("medium", "error", "said"),
    [
        ([Image.new("RGB", (4, 4))] * 2, ConfigError, "task/test/0: LSTP answers about one video, .* 2 media"),
        ("none.mp4", VideoError, "none.mp4: no such file, needed by task/test/0"),
        ("https://host/a.mp4", ConfigError, "got https://host/a.mp4, which LSTP does not read"),
        ({"array": [0.0], "sampling_rate": 16000}, ConfigError, "got a dict, which LSTP does not read"),
    ],
)
def test_media_that_are_not_supported_are_named_in_one_line(medium, error, said):
    read = [Request.read(request(0, "what?", visual=lambda document: medium).args)]
    documents = {"task": {"test": [{}]}}
    with pytest.raises(error, match=said) as caught:
        questions_of(read, documents, question_key="question", as_prompt=str)
    assert "\n" not in str(caught.value)


def test_requests_that_are_not_supported_are_named_in_one_line(model):
    with pytest.raises(ConfigError, match="unknown generation_kwargs 'num_beam'; did you mean 'num_beams'"):
        model.generate_until([request(0, "what?", {"num_beam": 2})])
    with pytest.raises(ConfigError, match="expected a request of lmms-eval with 6 arguments, got 2"):
        model.losses([SimpleNamespace(args=("", "red"))])
    with pytest.raises(ConfigError, match="task/test/0: expected a text to score, got 3"):
        model.losses([request(0, "what?", lambda document: 3)])
    with pytest.raises(ConfigError, match="lstp_tiny answers one question at a time"):
        model.generate_until_multi_round([])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"checkpint": "x"}, "unknown --model_args of lstp_tiny 'checkpint'; did you mean 'checkpoint'"),
        ({"batch_size": "auto"}, "batch_size must be a whole number of at least 1, got 'auto'"),
        ({"option_score": "max"}, "unknown option_score 'max'"),
        ({"options": "model.flow.nam=x"}, "did you mean 'model.flow.name'"),
        ({"options": "model.selector.name=given"}, "takes spans from a data set"),
    ],
)
def test_arguments_that_are_wrong_are_named(arguments, said):
    with pytest.raises(ConfigError, match=said):
        Bare([], **arguments)


def test_videos_are_read_as_the_run_read_them(documents, tmp_path, monkeypatch):
    section = {"num_frames": 5, "frames": "keyframe", "fps": 3}
    found = Bare(documents, checkpoint=run_that_read(tmp_path / "run", "dis", section))
    seen = []
    monkeypatch.setattr(reading, "read_frames", lambda *a, **how: seen.append(how) or read_frames(*a, **how))
    found.generate_until([request(0, ASKED)])
    assert [(how["num"], how["exact"], how["fps"]) for how in seen] == [(5, False, 3)]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    write_json(tmp_path / "manifest.json", {"config": {"model": {"arch": "lstp_flant5xl"}}})
    with pytest.raises(ConfigError, match="is of lstp_flant5xl, not of lstp_tiny; use --model lstp_flant5xl"):
        Bare([], checkpoint=str(tmp_path))


# ---- the released package -----------------------------------------------------------------------------------------

SHAPES = {"seed": 0, "train_videos": 1, "val_videos": 1, "test_videos": 3, "train_images": 0, "size": 96}
NUM_FRAMES = 16
BATCH = 4
COLOURS, KINDS = ["blue", "green", "red", "yellow"], ["bar", "circle", "cross", "star"]

TASK = {
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_visual": "!function utils.visual",
    "doc_to_text": "question",
    "doc_to_target": "answer",
    "metadata": {"version": 0.0},
}
UTILS = """
from pathlib import Path
from PIL import Image
HERE = Path(__file__).resolve().parents[1]
def visual(doc):
    path = HERE / "data" / doc["medium"]
    return [Image.open(path) if path.suffix == ".png" else str(path)]
def choices(doc):
    return doc["options"]
"""


def sh(*words: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    whole = {**os.environ, **environment}
    return subprocess.run(
        [str(word) for word in words], cwd=cwd, env=whole, capture_output=True, text=True, timeout=900
    )


@pytest.fixture(scope="module")
def lmms_python(tmp_path_factory) -> Path:
    """A Python that has the released lmms-eval: this one, or one made here that sees this one's packages."""
    if importlib.util.find_spec("lmms_eval"):
        return Path(sys.executable)
    folder = tmp_path_factory.mktemp("lmms") / "env"
    assert sh(sys.executable, "-m", "venv", "--without-pip", folder).returncode == 0
    python = folder / "bin" / "python"
    site = sh(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    (Path(site) / "base.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    extra = [Requirement(line) for line in importlib.metadata.requires("lavis_lstp")]
    needs = [f"{r.name}{r.specifier}" for r in extra if r.marker and "lmms" in str(r.marker)]
    assert needs
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check")
    for what in (("--no-deps", f"lmms-eval=={RELEASE}"), needs):
        done = sh(*pip, *what)
        if done.returncode:
            pytest.skip(f"lmms-eval {RELEASE} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    return python


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A trained run, questions about its videos and about a picture, and the same questions as tasks of lmms-eval."""
    from lavis_lstp.host import train

    root = tmp_path_factory.mktemp("shapes")
    data = root / "data"
    options = [f"datasets.lstp_shapes.generate.{name}={value}" for name, value in SHAPES.items()]
    options += [f"datasets.lstp_shapes.root={data}", f"datasets.lstp_shapes.num_frames={NUM_FRAMES}"]
    options += [f"run.output_dir={root / 'run'}", "run.max_steps=1", "run.init_lr=1e-6", "model.backbone.seed=3"]
    options += ["run.test_splits=[]"]
    assert train.main(["--cfg-path", "projects/lstp/tiny_ft.yaml", "--options", *options]) == 0
    Image.effect_mandelbrot((96, 96), (-2, -1.5, 1, 1.5), 30).save(data / "picture.png")
    rows = json.loads((data / "test.json").read_text())
    for row in rows:
        some = COLOURS if "colour" in row["question"] else KINDS
        row["options"] = some if row["answer"] in some else [row["answer"], *some[1:]]
    seen = {"question_id": "picture", "video_id": "picture", "image": "picture.png", "question": "what colour is it?"}
    rows.append({**seen, "answer": "red", "options": COLOURS})
    write_json(root / "choice.json", rows)
    write_json(root / "open.json", [{k: v for k, v in row.items() if k != "options"} for row in rows])
    _write_tasks(root, rows)
    return root


def _write_tasks(root: Path, rows: list[dict]) -> None:
    folder = root / "tasks"
    folder.mkdir()
    (folder / "utils.py").write_text(UTILS)
    documents = [
        {
            **{key: row[key] for key in ("question", "answer", "options")},
            "medium": row.get("video") or row["image"],
            "asked": choice_prompt(row["question"], row["options"]),
        }
        for row in rows
    ]
    (root / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    greedy = {"max_new_tokens": 8, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}
    exact, right = ([{"metric": m, "aggregation": "mean", "higher_is_better": True}] for m in ("exact_match", "acc"))
    for name, own in (
        ("made_open", {"output_type": "generate_until", "generation_kwargs": greedy, "metric_list": exact}),
        ("made_letters", {"output_type": "generate_until", "doc_to_text": "asked", "metric_list": exact}),
        (
            "made_choice",
            {"output_type": "multiple_choice", "doc_to_choice": "!function utils.choices", "metric_list": right},
        ),
    ):
        data = {"dataset_kwargs": {"data_files": {"test": str(root / "documents.jsonl")}}}
        text = yaml.safe_dump({"task": name, **TASK, **data, **own})
        (folder / f"{name}.yaml").write_text(re.sub(r"'(!function [\w.]+)'", r"\1", text))


def evaluated(root: Path, name: str, annotation: str, **run: object) -> tuple[list[dict], dict]:
    """Predictions and metrics of `lavis.evaluate`."""
    from lavis_lstp.host import evaluate

    flow, selector = {"name": "motion_vectors"}, {"name": "lstp", "num_selected": 4}  # as the run was trained
    model = {"arch": "lstp_tiny", "train": [], "flow": flow, "selector": selector, "backbone": {"seed": 3}}
    config = {
        "model": {**model, "checkpoint": str(root / "run")},
        "datasets": {
            "lstp_video_qa": {
                **{"num_frames": NUM_FRAMES, "image_size": 64, "flow": "motion_vectors", "flow_size": 32},
                "build_info": {
                    "annotations": {"test": {"storage": str(root / annotation)}},
                    "videos": {"storage": str(root / "data")},
                },
            }
        },
        "run": {"task": "video_qa", "runner": "runner_lstp", "evaluate": True, "seed": 43, "device": "cpu"}
        | {"test_splits": ["test"], "batch_size_eval": BATCH, "output_dir": str(root / name), **run},
    }
    (root / f"{name}.yaml").write_text(yaml.safe_dump(config))
    assert evaluate.main(["--cfg-path", str(root / f"{name}.yaml")]) == 0
    folder = root / name / "result"
    records = list(read_jsonl(folder / "test_video_qa.jsonl"))
    return records, json.loads((folder / "test_video_qa_metrics.json").read_text())


@pytest.mark.slow
def test_lmms_eval_knows_our_models(lmms_python):
    code = "from lmms_eval.models import get_model, list_available_models as names\n"
    code += "print(*(f'{n} {get_model(n).__name__}' for n in names() if n.startswith('lstp_')), sep='\\n')"
    found = sh(lmms_python, "-c", code)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == [f"{name} {name}" for name in sorted([*MODEL_TYPES, lmms.SELECTING])]


@pytest.mark.slow
def test_lmms_eval_gives_the_answers_of_lavis_evaluate(lmms_python, made, tmp_path):
    words = ("--model", "lstp_tiny", "--model_args", f"checkpoint={made / 'run'}", "--batch_size", BATCH)
    words += ("--tasks", "made_open,made_letters,made_choice", "--include_path", made / "tasks")
    words += ("--log_samples", "--output_path", tmp_path / "out")
    offline = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = sh(lmms_python, "-m", "lmms_eval", *words, cwd=tmp_path, **offline)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "Error during evaluation" not in said, said[-3000:]

    def samples(task: str) -> list:
        (path,) = (tmp_path / "out").rglob(f"*_samples_{task}.jsonl")
        return [row["filtered_resps"] for row in sorted(read_jsonl(path), key=lambda row: row["doc_id"])]

    (path,) = (tmp_path / "out").rglob("*_results.json")
    results = json.loads(path.read_text())["results"]
    records, metrics = evaluated(made, "open", "open.json")
    predictions = [record["prediction"] for record in records]
    assert len(predictions) == 19 and len(set(predictions)) >= 4, (
        "answers that tell nothing of the videos prove nothing"
    )
    assert samples("made_open") == predictions
    assert results["made_open"]["exact_match,none"] == pytest.approx(metrics["exact_match"])
    records, _ = evaluated(made, "letters", "choice.json", choose="generate")
    assert samples("made_letters") == [record["prediction"] for record in records]
    records, metrics = evaluated(made, "choice", "choice.json", choose="likelihood")
    for losses, record in zip(samples("made_choice"), records, strict=True):
        numbers = [-float(loss) for loss, _ in losses]
        assert numbers == pytest.approx([option["mean"] for option in record["option_log_prob"]], abs=1e-4)
        assert record["options"][numbers.index(max(numbers))] == record["prediction"]
    assert results["made_choice"]["acc,none"] == pytest.approx(metrics["accuracy"])
