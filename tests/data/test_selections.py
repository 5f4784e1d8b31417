"""Recorded frames in the forms of AKS, BOLT, vLLM and our own: read, written, and shown exactly by an evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from video_files import numbered_video, read_number

from lavis_lstp.commands import cli
from lavis_lstp.data.qa_dataset import VideoQADataset
from lavis_lstp.data.selections import FORMS, Recorded, media_io_kwargs, read_recorded, text_of, timing
from lavis_lstp.errors import AnnotationError, ConfigError, LstpError
from lavis_lstp.inference.selection import Selection
from lavis_lstp.models.where.frame_selector import build_selector

FRAMES = {"q0": [3, 11, 40], "q1": [0, 59], "q2": [7]}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """a.mp4 and b.mp4, numbered frames, 30 a second; rows.json, two questions about a and one about b."""
    root = tmp_path_factory.mktemp("root")
    numbered_video(root / "a.mp4", 60, fps=30)
    numbered_video(root / "b.mp4", 30, fps=30)
    videos = {"q0": "a.mp4", "q1": "a.mp4", "q2": "b.mp4"}
    rows = [
        {"question_id": name, "video": video, "video_id": video[0], "question": f"what of {name}?", "answer": "x"}
        for name, video in videos.items()
    ]
    (root / "rows.json").write_text(json.dumps(rows))
    return root


@pytest.fixture(scope="module")
def rows(root) -> list[dict]:
    return json.loads((root / "rows.json").read_text())


@pytest.fixture(scope="module")
def files(root, rows, tmp_path_factory) -> dict[str, Path]:
    """A file of each form with FRAMES."""
    folder = tmp_path_factory.mktemp("forms")
    made = []
    for row in rows:
        found = Selection.recorded(root / row["video"], row["question"], Recorded(tuple(FRAMES[row["question_id"]])))
        made.append({"question_id": row["question_id"], **found.to_json()})
    for form in FORMS:
        (folder / form).write_text(text_of(form, made))
    return {form: folder / form for form in FORMS}


def test_the_forms_are_those_that_others_read(files):
    assert json.loads(files["aks"].read_text()) == [FRAMES["q0"], FRAMES["q1"], FRAMES["q2"]]
    bolt = json.loads(files["bolt"].read_text())
    assert list(bolt) == ["a", "b"] and [set(row) for row in bolt["a"]] == [{"question_id", "question", "frames"}] * 2
    assert bolt["b"][0]["frames"] == pytest.approx([7 / 30], abs=1e-6)
    first = json.loads(files["vllm"].read_text().splitlines()[0])
    told = first["media_io_kwargs"]["video"]
    assert first["question_id"] == "q0" and told == {
        **{"fps": 30.0, "frames_indices": [3, 11, 40], "total_num_frames": 60},
        "num_frames": 3,
    }


@pytest.mark.parametrize("form", FORMS)
def test_an_evaluation_is_shown_exactly_the_recorded_frames(root, rows, files, form):
    dataset = VideoQADataset(rows, root, recorded=read_recorded(files[form], rows, "here"))
    samples = [dataset[i] for i in range(3)]
    assert [[read_number(f) for f in one["frames"].numpy()] for one in samples] == [
        [number % 38 for number in FRAMES[name]] for name in FRAMES
    ]
    assert samples[0]["frame_times"].tolist() == pytest.approx([n / 30 for n in FRAMES["q0"]], abs=1e-5)
    assert samples[0]["media"] != samples[1]["media"], "two questions about a video share no frames here"
    batch = dataset.collater(samples)
    index = build_selector("recorded", num_selected=3)(batch["frame_mask"]).frame_index
    assert index.tolist() == [[0, 1, 2], [0, 1, -1], [0, -1, -1]]
    with pytest.raises(ConfigError, match="3 recorded frames, and model.selector.num_selected is 2"):
        build_selector("recorded", num_selected=2)(batch["frame_mask"])
    assert dataset.fingerprint() != VideoQADataset(rows, root).fingerprint()


@pytest.mark.parametrize("form", FORMS)
def test_the_command_turns_every_form_into_every_other(root, files, form, tmp_path, capsys):
    words = ["select", "--questions", str(root / "rows.json"), "--root", str(root), "--from", str(files[form])]
    for other in FORMS:
        assert cli.main([*words, "--out", str(tmp_path / other), "--format", other]) == 0
    assert (tmp_path / "aks").read_text() == files["aks"].read_text()
    assert (tmp_path / "vllm").read_text() == files["vllm"].read_text()
    own = [json.loads(line) for line in (tmp_path / "jsonl").read_text().splitlines()]
    assert [row["frame_index"] for row in own] == list(FRAMES.values()) and own[0]["sha256"]
    assert "3 questions" in capsys.readouterr().out


def test_a_selection_is_shown_again_and_told_to_a_server(root, files, tmp_path, capsys):
    one = Selection.recorded(root / "a.mp4", "what?", Recorded((3, 11)))
    one.write(tmp_path / "selection.json")
    assert cli.main(["select", "--from", str(tmp_path / "selection.json")]) == 0
    assert "2 of 60 frames by recorded" in capsys.readouterr().out
    assert cli.main(["select", str(root / "a.mp4"), "--method", "uniform", "-k", "2", "--format", "vllm"]) == 0
    told = json.loads(capsys.readouterr().out)["media_io_kwargs"]["video"]
    assert told["frames_indices"] == [14, 44] and told["total_num_frames"] == 60
    clock = timing([1, 9], [0.5, 3.25], 30.0, 60, 3.0)
    assert media_io_kwargs(*clock)["video"]["frames_indices"] == [500, 3250] and clock[2] == 3251


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[1], [2]]", "has frames for 2 questions by their place, and there are 3"),
        ("[[1], [2], []]", "entry 2: has no frame"),
        ("[[1], [2], [0.5]]", "entry 2: expected a list of frame numbers"),
        ('{"a": [{"question_id": "q0", "question": "what of q0?", "frames": [0.1]}]}', "no frames for question 'q1'"),
        ('{"a": [{"question_id": "q0", "question": "why?", "frames": [0.1]}]}', "were selected for 'why\\?'"),
        ('{"a": [{"question_id": "q0", "frames": [-1]}]}', "expected a list of seconds"),
        ('{"a": [{"question_id": 1, "frames": [1]}, {"question_id": "1", "frames": [1]}]}', "occurs twice"),
        ('{"question_id": "q0", "media_io_kwargs": {"video": {"fps": 0}}}', "fps must be a number above 0"),
        ('{"question_id": "q0", "media_io_kwargs": 3}', "fps must be a number above 0"),
        ('{"question_id": "q0", "format": "lavis_lstp.selection", "version": 9}', "not a selection"),
        ('{"a": 1}', "not a question with its frames"),
        ("[1]", "not a question with its frames"),
        ("{", "not JSON"),
        ("", "no frames for question 'q0'"),
    ],
)
def test_a_file_that_is_for_something_else_is_refused_in_one_line(rows, tmp_path, text, said):
    (tmp_path / "file").write_text(text)
    with pytest.raises(AnnotationError, match=said) as caught:
        read_recorded(tmp_path / "file", rows, "here")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_frames_of_other_videos_are_refused(root, rows, files, tmp_path):
    swapped = [
        {**row, "video": "b.mp4" if row["video"] == "a.mp4" else "a.mp4", "video_id": "x" + row["video"]}
        for row in rows
    ]
    dataset = VideoQADataset(swapped, root, recorded=read_recorded(files["jsonl"], rows, "here"), max_bad_fraction=1.0)
    with pytest.raises(ConfigError, match="b.mp4: is not the video that these frames were selected from"):
        dataset[0]
    beyond = VideoQADataset(swapped, root, recorded=read_recorded(files["aks"], rows, "here"))
    with pytest.raises(LstpError, match="b.mp4"):
        beyond[0]
    with pytest.raises(ConfigError, match="no such frame"):
        Selection.recorded(root / "b.mp4", "", Recorded((40,)))


@pytest.mark.parametrize("more", [{"fps": 2.0}, {"flow": "motion_vectors"}, {"frames": "keyframe"}])
def test_settings_that_choose_frames_do_not_go_with_recorded_ones(root, rows, more):
    with pytest.raises(ConfigError, match="selection says which frames are read"):
        VideoQADataset(rows, root, recorded={name: Recorded((0,)) for name in FRAMES}, **more)


def test_videos_of_one_name_do_not_fit_into_bolt():
    row = {"question": "", "times_s": [0.0]}
    with pytest.raises(ConfigError, match="have the same"):
        text_of("bolt", [{**row, "video": "x/a.mp4"}, {**row, "video": "y/a.mp4"}])


def test_evaluating_recorded_frames_end_to_end(root, files, tmp_path):
    """`datasets.X.selection` with selector recorded: each answer names its frames' seconds; other selectors refused."""
    import yaml

    from lavis_lstp.files import read_jsonl
    from lavis_lstp.host import evaluate

    data = {
        **{"num_frames": 8, "image_size": 64, "selection": str(files["aks"])},
        "build_info": {"annotations": {"test": {"storage": str(root / "rows.json")}}, "videos": {"storage": str(root)}},
    }
    run = {"task": "video_qa", "runner": "runner_lstp", "evaluate": True, "device": "cpu", "test_splits": ["test"]}
    config = {
        "model": {"arch": "lstp_tiny", "train": [], "losses": ["lm"], "selector": {"name": "recorded"}},
        "datasets": {"lstp_video_qa": data},
        "run": {**run, "batch_size_eval": 3, "output_dir": str(tmp_path / "out")},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with torch.random.fork_rng():
        assert evaluate.main(["--cfg-path", str(tmp_path / "config.yaml")]) == 0
    rows = {row["question_id"]: row for row in read_jsonl(tmp_path / "out" / "result" / "test_video_qa.jsonl")}
    for name, row in rows.items():
        told = [t for t in row["frame_times"] if t is not None]
        assert told == pytest.approx([number / 30 for number in FRAMES[name]], abs=1e-3)
    with pytest.raises(ConfigError, match="recorded frames are shown by model.selector.name=recorded alone"):
        from lavis_lstp.config.model import check_recorded

        check_recorded({"selector": {"name": "uniform"}}, config["datasets"])
    with pytest.raises(ConfigError, match="name a file there"):
        check_recorded({"selector": {"name": "recorded"}}, {"lstp_video_qa": {}})
