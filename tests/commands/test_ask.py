"""`lavis-lstp ask` on made and real videos, and on files that are none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from video_files import audio_file, numbered_picture, numbered_video, read_number, write_video

import lavis_lstp
from lavis_lstp.commands import ask, cli
from lavis_lstp.data.video import probe
from lavis_lstp.errors import WeightsError
from lavis_lstp.files import write_json
from lavis_lstp.inference import loading
from lavis_lstp.inference.predictor import Predictor

STAGES = {"decode", "flow", "sampler", "selection", "vision", "language"}


def run(capsys, *words: str) -> tuple[int, str, str]:
    code = cli.main(["ask", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def check(result: dict, duration_s: float, picture) -> None:
    start_s, end_s = result["span_s"]
    assert 0 <= start_s < end_s <= duration_s + 0.1
    times = result["frame_times_s"]
    assert len(times) == 4 and times == sorted(times) and start_s <= times[0] and times[-1] < end_s
    assert result["milliseconds"].keys() == STAGES and all(value >= 0 for value in result["milliseconds"].values())
    with Image.open(picture) as image:
        assert image.width > 600 and image.height > 300


def test_any_video_gets_an_answer_a_span_and_a_picture(tmp_path, capsys):
    video = numbered_video(tmp_path / "clip.mp4", 30)
    picture = tmp_path / "why.png"
    words = (str(video), "what colour is the shape?", "--num-frames", "12", "--picture", str(picture), "--json")
    code, out, err = run(capsys, *words)
    assert code == 0 and "random weights" in err
    check(json.loads(out), 30 / 10, picture)
    (tmp_path / "said.srt").write_text("1\n00:00:00,000 --> 00:00:03,000\nsaid\n", encoding="utf-8")
    code, out, _ = run(capsys, *words, "--subtitles", str(tmp_path / "said.srt"))
    assert code == 0 and json.loads(out)["subtitles"] == {"window_s": 2.0, "lines": 1, "left_out": 0}
    code, out, _ = run(capsys, *words[:-1], "--options", "model.selector.name=uniform")
    assert code == 0 and "frames    " in out and str(picture) in out
    assert "flow" not in out.split("time")[1]  # evenly spaced frames need neither flow nor sampler
    (tmp_path / "frames").mkdir()
    for number in range(7):
        Image.fromarray(numbered_picture(number)).save(tmp_path / "frames" / f"{number}.png")
    code, out, _ = run(capsys, str(tmp_path / "frames"), "what?", "--picture", str(picture), "--json")
    assert code == 0 and json.loads(out)["frame_times_s"][-1] < 7 / 3  # a folder of pictures, three a second


def test_a_runs_checkpoint_brings_its_config_and_the_weights_it_began_with(tmp_path):
    untrained, notes = loading.build_model("lstp_tiny", None, None, ["model.train=[sampler]", "model.losses=[span]"])
    assert notes == [loading.RANDOM_WEIGHTS]
    first = tmp_path / "first.safetensors"
    save_file({k: v + 1 for k, v in untrained.trainable_state_dict().items()}, first)
    base, _ = loading.build_model("lstp_tiny", None, None, ["model.train=[projection]"])
    folder = tmp_path / "run" / "checkpoints" / "last"
    folder.mkdir(parents=True)
    save_file({k: v + 2 for k, v in base.trainable_state_dict().items()}, folder / "model.safetensors")
    model = {"arch": "lstp_tiny", "checkpoint": str(first), "flow": {"name": "precomputed"}, "fusion": "mean"}
    write_json(folder / "manifest.json", {"config": {"model": model}})

    model, notes = loading.build_model("unused", None, str(tmp_path / "run"), [])
    assert model.backbone.fusion.name == "mean" and model.flow.name == "dis"
    assert len(notes) == 1 and "flow is computed with dis" in notes[0]
    own = model.state_dict()
    for source, amount in ((untrained, 1), (base, 2)):
        for key, value in source.trainable_state_dict().items():
            assert own[key].equal(value + amount), key


def test_earlier_weights_are_those_of_the_run_not_those_of_the_current_folder(tmp_path, monkeypatch):
    sampler, _ = loading.build_model("lstp_tiny", None, None, ["model.train=[sampler]", "model.losses=[span]"])
    projection, _ = loading.build_model("lstp_tiny", None, None, ["model.train=[projection]"])
    for place, amount in (("there", 1), ("here", 5)):
        base = tmp_path / place / "output" / "base"
        base.mkdir(parents=True)
        save_file({k: v + amount for k, v in sampler.trainable_state_dict().items()}, base / "model.safetensors")
    run_folder = tmp_path / "there" / "output" / "lstp"
    last = run_folder / "checkpoints" / "last"
    last.mkdir(parents=True)
    save_file(projection.trainable_state_dict(), last / "model.safetensors")
    write_json(last / "manifest.json", {"config": {"model": {"arch": "lstp_tiny", "checkpoint": ["output/base"]}}})
    monkeypatch.chdir(tmp_path / "here")
    own = loading.build_model("lstp_tiny", None, str(run_folder), [])[0].state_dict()
    for key, value in sampler.trainable_state_dict().items():
        assert own[key].equal(value + 1), key


def make_run(folder: Path, **model) -> Path:
    """A run's folder with one checkpoint of the projection and its manifest."""
    weights, _ = loading.build_model("lstp_tiny", None, None, ["model.train=[projection]"])
    last = folder / "checkpoints" / "last"
    last.mkdir(parents=True)
    save_file(weights.trainable_state_dict(), last / "model.safetensors")
    datasets = {"lstp_shapes": {"num_frames": 9}, "lstp_video_qa": {"num_frames": None}}
    write_json(last / "manifest.json", {"config": {"model": {"arch": "lstp_tiny", **model}, "datasets": datasets}})
    return folder


@pytest.mark.parametrize("place", ["output/gone", "/nowhere/gone"])
def test_earlier_weights_that_are_gone_are_named(tmp_path, place):
    with pytest.raises(WeightsError, match=f"manifest.json began with the weights '{place}', which are gone"):
        loading.build_model("lstp_tiny", None, str(make_run(tmp_path / "run", checkpoint=place)), [])


def test_earlier_weights_may_be_a_file_of_the_hub_that_lies_elsewhere(tmp_path, monkeypatch):
    """As the published checkpoint, which a fine-tuned run begins with."""
    source = make_run(tmp_path / "first") / "checkpoints" / "last" / "model.safetensors"
    place = tmp_path / "weights" / "owner" / "repository" / "first.safetensors"
    place.parent.mkdir(parents=True)
    source.rename(place)
    run = make_run(tmp_path / "run", checkpoint="owner/repository/first.safetensors")
    monkeypatch.setenv("LAVIS_LSTP_WEIGHTS", str(tmp_path / "weights"))
    assert loading.recorded_model(str(run))["checkpoint"] == [str(place)]
    assert loading.build_model("lstp_tiny", None, str(run), [])[1] == []


def test_frames_are_as_many_as_the_run_used_and_replaced_flow_is_said(tmp_path, capsys, monkeypatch):
    video = numbered_video(tmp_path / "clip.mp4", 30)
    folder = make_run(tmp_path / "run", flow={"name": "precomputed"})
    asked, real = [], Predictor.answer
    monkeypatch.setattr(Predictor, "answer", lambda self, *a, **k: asked.append(self.num_frames) or real(self, *a, **k))
    words = (str(video), "what?", "--picture", str(tmp_path / "why.png"))
    code, _, err = run(capsys, *words, "--checkpoint", str(folder))
    assert code == 0 and asked == [9] and "note: flow is computed with dis" in err
    code, _, err = run(capsys, *words, "--checkpoint", str(folder), "--num-frames", "5")
    assert code == 0 and asked == [9, 5]
    code, _, err = run(capsys, *words)
    assert code == 0 and asked == [9, 5, 64] and "computed with dis" not in err


@pytest.mark.parametrize("flow", ["dis", "motion_vectors"])
def test_real_footage(real_videos, tmp_path, capsys, flow):
    for video in real_videos:
        picture = tmp_path / f"{video.stem}.png"
        words = ("--picture", str(picture), "--json", "--options", f"model.flow.name={flow}")
        code, out, _ = run(capsys, str(video), "what is on the table?", *words)
        assert code == 0
        check(json.loads(out), probe(video).duration_s, picture)


def test_bad_input_is_one_line(tmp_path, capsys):
    text = tmp_path / "text.mp4"
    text.write_text("not a video")
    missing = tmp_path / "missing.mp4"
    audio = audio_file(tmp_path / "audio.mp4")
    clip = str(numbered_video(tmp_path / "clip.mp4", 3))
    for words, named in (
        ((str(text), "what?"), "text.mp4"),
        ((str(missing), "what?"), "missing.mp4"),
        ((str(audio), "what?"), "no video stream"),
        ((clip, "what?", "--picture", str(tmp_path)), "--picture"),
        ((clip, "what?", "--picture", str(text / "x.png")), "--picture"),
        ((str(text), "what?", "--model", "blip2"), "LSTP"),
        ((str(text), "what?", "--options", "model.selector.nam=uniform"), "model.selector.name"),
        ((str(text), "what?", "--options", "model.slector.name=uniform"), "model.selector"),
        ((str(text), "what?", "--options", "model.promt=x"), "did you mean 'model.prompt'"),
        ((str(text), "what?", "--options", "model=3"), "model."),
        ((str(text), "what?", "--options", "model"), "option 'model' has no value"),
        ((str(text), "what?", "--options", "model.selector=lstp"), "model.selector must be a mapping"),
        ((str(text), "what?", "--options", "model.flow=null"), "model.flow must be a mapping"),
        ((str(text), "what?", "--options", "model.prompt=${nothing}"), "nothing"),
        ((str(text), "what?", "--options", "model.arch=lstp_tinny"), "lstp_tiny"),
        ((str(text), "what?", "--options", "model.model_type=huge"), "default"),
        ((str(text), "what?", "--options", "model.selector.name=given"), "model.selector.name=lstp"),
        ((str(text), "what?", "--num-frames", "0"), "--num-frames"),
        ((str(text), "what?", "--checkpoint", str(tmp_path / "no_run")), "no_run"),
        ((str(text), "what?", "--model", "lstp_tinny"), "lstp_tiny"),
        ((str(text), "what?", "--options", "run.seed=1"), "model."),
    ):
        code, out, err = run(capsys, *words)
        lines = [line for line in err.splitlines() if not line.startswith("note: ")]
        assert code == 2 and not out and len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0], err
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("content", ["{bad", "{}", "[]", '{"config": {"model": {}}}', '{"config": {"model": null}}'])
def test_a_manifest_of_something_else_is_named(tmp_path, content):
    save_file({"sampler.x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(WeightsError, match="manifest.json: not the manifest"):
        loading.build_model("lstp_tiny", None, str(tmp_path), [])


def test_the_picture_has_the_candidates_in_the_proportions_of_the_video(tmp_path, monkeypatch):
    """Also of a run that read other frames than evenly spaced ones."""
    from lavis_lstp.report import explanation

    shown = []
    monkeypatch.setattr(explanation, "explanation_picture", lambda path, **how: shown.append(how))
    video = numbered_video(tmp_path / "clip.mp4", 30, gop=7)  # 160 x 96, smaller than a picture may be
    wide = write_video(tmp_path / "wide.mp4", [np.full((200, 800, 3), 90, np.uint8)] * 2)
    for path, frames in ((video, "keyframe"), (wide, "exact")):
        with lavis_lstp.load("example", reading={"frames": frames}) as predictor:
            ask.explain(tmp_path / "x.png", path, predictor.answer(path, "which?"))
    numbers = [read_number(frame) for frame in shown[0]["frames"]]
    assert numbers == [0, 7, 14, 21, 28] and shown[0]["frames"].shape == (5, 3, 96, 160)
    assert shown[1]["frames"].shape[1:] == (3, 80, 320)
