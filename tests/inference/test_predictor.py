"""`lavis_lstp.load(...)`: one object for every way to ask, with what it keeps, streams, refuses and gives up."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from video_files import lengthen, numbered_video

import lavis_lstp
from lavis_lstp.data.qa_dataset import VideoQADataset
from lavis_lstp.data.store import Store
from lavis_lstp.data.video import reading
from lavis_lstp.errors import AnnotationError, ConfigError, VideoError
from lavis_lstp.inference import candidates
from lavis_lstp.inference.candidates import Kept
from lavis_lstp.inference.loading import EXAMPLE
from lavis_lstp.inference.prediction import Cancelled, Prediction
from lavis_lstp.inference.predictor import history_of
from lavis_lstp.models.where.flow import DisFlow

CLIP = EXAMPLE / "clip.mp4"
ROWS = json.loads((EXAMPLE / "questions.json").read_text(encoding="utf-8"))
ASKED = ROWS[1]["question"]


def run_that_read(folder, flow: str, *sections: dict) -> str:
    """A checkpoint of the example's model, of a run whose data sets had these settings."""
    folder.mkdir()
    shutil.copy(EXAMPLE / "model.safetensors", folder)
    manifest = json.loads((EXAMPLE / "manifest.json").read_text())
    manifest["config"]["model"]["flow"]["name"] = flow
    manifest["config"]["datasets"] = dict(zip(("lstp_video_qa", "lstp_nextqa", "msvd_qa"), sections, strict=False))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return str(folder)


@pytest.fixture
def decoded(monkeypatch):
    """Names of the sources that were really decoded."""
    seen, real = [], reading.read_frames
    monkeypatch.setattr(reading, "read_frames", lambda source, **how: seen.append(how["name"]) or real(source, **how))
    return seen


def picture_bytes(colour="red", form="PNG") -> bytes:
    stored = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(stored, form)
    return stored.getvalue()


def same(one: Prediction, other: Prediction) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in ("prediction", "span", "frame_index", "log_prob"))


def test_path_bytes_and_file_are_the_same_video_and_are_decoded_once(decoded):
    with lavis_lstp.load("example") as fresh:
        first = fresh.answer(CLIP, ASKED, name="first")
        assert {"decode", "flow"} <= first.seconds.keys()
        with CLIP.open("rb") as file:
            others = [fresh.answer(CLIP.read_bytes(), ASKED, name="x"), fresh.answer(file, ASKED, name="y")]
        others.append(fresh.answer(CLIP, ROWS[0]["question"]))
        assert all(same(first, other) for other in others[:2]) and others[2].prediction == ROWS[0]["answer"]
        assert not any({"decode", "flow"} & other.seconds.keys() for other in others)
        assert decoded == ["first"]
        fresh.answer(CLIP, ASKED, num_frames=9, name="other frames")
        assert decoded == ["first", "other frames"]


def test_another_process_finds_frames_and_flow_in_the_store(decoded, tmp_path, monkeypatch):
    computed, real = [], DisFlow.__call__
    monkeypatch.setattr(DisFlow, "__call__", lambda self, *args: computed.append(1) or real(self, *args))
    with lavis_lstp.load("example", store=Store(tmp_path)) as first:
        found = first.answer(CLIP, ASKED, name="first")
    assert decoded == ["first"] and len(computed) == 1
    for row in ROWS:
        with lavis_lstp.load("example", store=Store(tmp_path)) as later:
            other = later.answer(CLIP, row["question"])
            assert other.prediction == row["answer"]
            assert row["question"] != ASKED or same(found, other)
            assert np.array_equal(found.flow, other.flow)
            assert later.answer(CLIP, row["question"], num_frames=9, name="others").prediction
    assert decoded == ["first", "others"] and len(computed) == 2
    assert {entry.what for entry in Store(tmp_path).entries()} <= {"frames", "flow", "digest"}


def test_candidates_are_read_as_the_run_read_them(tmp_path):
    """Key frames, and flow to the next picture, where its data were read so; a call may say otherwise."""
    film = numbered_video(tmp_path / "film.mp4", 60, gop=10)
    shutil.copytree(EXAMPLE, tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    manifest["config"]["datasets"] = {"lstp_shapes": {"num_frames": 6, "frames": "keyframe", "flow_pairs": "local"}}
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    with lavis_lstp.load(tmp_path / "run") as loaded:
        found = loaded.answer(film, ASKED)
        assert [round(25 * seconds) for seconds in found.candidate_times_s] == [0, 10, 20, 30, 40, 50]
        exact = loaded.answer(film, ASKED, frames="exact", flow_pairs="sampled")
        assert [round(25 * seconds) for seconds in exact.candidate_times_s] == [4, 14, 24, 34, 44, 54]
        side = loaded.model.backbone.image_size
        pairs = torch.from_numpy(reading.read_pairs(film, num=6, size=side, exact=False))
        wanted = torch.cat([loaded.model.flow(pair[None])[0, :1] for pair in pairs])
        assert np.array_equal(found.flow, wanted.numpy())


def test_a_file_that_was_changed_is_read_again(tmp_path, predictor):
    video = numbered_video(tmp_path / "clip.mp4", 12)
    first = predictor.answer(video, ASKED)
    numbered_video(tmp_path / "clip.mp4", 7)
    assert len(predictor.answer(video, ASKED).candidate_times_s) == 7 < len(first.candidate_times_s)


def test_threads_that_ask_at_once_get_what_they_would_get_alone(predictor, decoded):
    questions = [row["question"] for row in ROWS] * 3
    data = CLIP.read_bytes() + b"\0" * 8  # other content than in other tests, the same pictures
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda question: predictor.answer(data, question, name="once").prediction, questions))
    assert found == [row["answer"] for row in ROWS] * 3 and decoded == ["once"]


def test_a_batch_of_unlike_media_is_answered_as_each_is_alone(predictor, tmp_path):
    short = numbered_video(tmp_path / "short.mp4", 5)
    media = [CLIP, short, picture_bytes(), None, [picture_bytes("red"), picture_bytes("blue")], CLIP]
    alone = [predictor.answer(medium, ASKED) for medium in media]
    together = predictor.answer_many([predictor.prepare(medium, ASKED) for medium in media])
    for one, other in zip(alone, together, strict=True):
        assert same(one, other)
    assert [one.span is None for one in together] == [False, False, True, True, False, False]
    assert [len(one.candidate_times_s) for one in together] == [64, 5, 1, 0, 2, 64]
    assert together[3].frame_index == [] and together[3].prompt == f"USER: {ASKED} ASSISTANT: "
    assert together[2].prompt == f"USER: <image>\n{ASKED} ASSISTANT: "


def test_scores_are_high_inside_the_moment(predictor):
    found = predictor.answer(CLIP, ASKED)
    inside = np.zeros(64, bool)
    inside[slice(*found.span)] = True
    scores = np.array(found.scores)
    assert scores[inside].mean() > 0.6 and scores[~inside].mean() < 0.2 and 0 <= scores.min() <= scores.max() <= 1
    assert found.frame_times_s == [found.candidate_times_s[i] for i in found.frame_index]
    json.dumps(found.as_dict(), allow_nan=False)


def test_pieces_of_a_stream_are_the_answer(predictor):
    for settings in ({"max_new_tokens": 12, "min_new_tokens": 12}, {"num_beams": 3}, {"do_sample": True, "seed": 3}):
        *pieces, last = predictor.stream(CLIP, "tell me, what happens?", **settings)
        assert isinstance(last, Prediction) and "".join(pieces) == last.prediction
        assert same(last, predictor.answer(CLIP, "tell me, what happens?", **settings))
        assert len(pieces) > 1 or "min_new_tokens" not in settings, pieces


def test_draws_depend_on_the_seed_alone(predictor):
    def drawn(seed):
        return predictor.answer(CLIP, "what?", do_sample=True, temperature=3.0, seed=seed, min_new_tokens=8).prediction

    assert drawn(1) == drawn(1) and len({drawn(seed) for seed in range(4)}) > 1


@pytest.mark.parametrize("selector", ["bitcost", "motion"])
@pytest.mark.parametrize("clip_s", [None, (0.5, 1.5)])
def test_what_the_codec_says_is_read_of_a_video_alone(predictor, selector, clip_s):
    """The frames of `lavis_lstp.select`, which asks nobody; a picture and a text in the same batch have one or none."""
    given = predictor.settings(selector=selector, num_selected=3)
    asked = [predictor.prepare(CLIP, ASKED, settings=given, clip_s=clip_s)]
    asked += [predictor.prepare(medium, ASKED, settings=given) for medium in (picture_bytes(), None)]
    found = predictor.answer_many(asked)
    chosen = lavis_lstp.select(CLIP, ASKED, k=3, method=selector, num_candidates=predictor.num_frames, clip_s=clip_s)
    assert [asked[0].candidates.numbers[i] for i in found[0].frame_index] == chosen.frame_index
    assert [set(one.frame_index) for one in found[1:]] == [{0}, set()]
    with pytest.raises(VideoError, match="is of a video file"):
        predictor.answer([picture_bytes(), picture_bytes()], ASKED, selector=selector)


def test_settings_of_a_call_leave_the_next_call_alone(predictor):
    before = predictor.answer(CLIP, ASKED)
    uniform = predictor.answer(CLIP, ASKED, selector="uniform", num_selected=2)
    assert len(uniform.frame_index) == 2 and uniform.scores is None and uniform.span == (0, 64)
    assert same(before, predictor.answer(CLIP, ASKED))
    assert "compute_flow" not in vars(predictor.model) and predictor.model.selector.name != "uniform"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_selectd": 3}, "did you mean 'settings.num_selected'"),
        ({"num_selected": 0}, "settings.num_selected"),
        ({"num_selected": "many"}, "settings.num_selected"),
        ({"num_frames": 159}, "at most 158"),
        ({"num_frames": 10**9}, "settings.num_frames"),
        ({"selector": "lstpp"}, "lstp"),
        ({"selector": "given"}, "takes its span from a data set"),
        ({"max_new_tokens": 10**6}, "at most 4096"),
        ({"min_new_tokens": 9}, "at most max_new_tokens (8), got 9"),
        ({"temperature": 0, "do_sample": True}, "temperature"),
        ({"top_p": 1.5}, "settings.top_p"),
        ({"num_beams": 2, "do_sample": True}, "num_beams"),
        ({"max_time": 3}, "max_time"),
        ({"seed": -1}, "settings.seed"),
    ],
)
def test_settings_that_cannot_be_used_are_named(predictor, settings, said):
    with pytest.raises(ConfigError, match="settings|generation|selector") as refused:
        predictor.answer(CLIP, ASKED, **settings)
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("medium", "got"),
    [
        ([], "a list of nothing"),
        ([np.zeros((4, 4, 3), np.uint8)], "a list of ndarray"),
        (np.zeros((4, 3, 64, 64), np.uint8), "ndarray"),
        (io.StringIO("film.mp4"), "StringIO"),
        (7, "int"),
    ],
)
def test_what_is_no_medium_is_one_line(predictor, medium, got):
    with pytest.raises(ConfigError, match=f"is a path, bytes, .* got {got}"):
        predictor.answer(medium, ASKED)


@pytest.mark.parametrize("history", ["a question", [("q", "a", "b")], [{"question": "q", "answer": "a"}, 3]])
def test_a_history_that_is_no_list_of_pairs_is_one_line(predictor, history):
    with pytest.raises(ConfigError, match=r"history is a list of \(question, answer\), got"):
        predictor.answer(CLIP, ASKED, history=history)


@pytest.mark.parametrize("medium", [b"", b"no video", b"\x89PNG\r\n\x1a\nbroken", io.BytesIO(b"#EXTM3U\nfile.ts\n")])
def test_a_medium_that_cannot_be_read_is_named_and_not_kept(predictor, medium):
    held = len(predictor.reader.kept._found)
    with pytest.raises(VideoError, match="^the upload: "):
        predictor.answer(medium, ASKED, name="the upload")
    assert len(predictor.reader.kept._found) == held


@pytest.mark.parametrize(
    ("flow", "section"),
    [
        ("motion_vectors", {"num_frames": 12, "frames": "keyframe", "flow_pairs": "local"}),
        ("dis", {"num_frames": 12, "fps": 2, "decode_size": 48}),
        ("dis", {"num_frames": 70, "short_videos": "double"}),
    ],
)
def test_videos_are_read_as_the_run_read_them(flow, section, tmp_path):
    """Frames, times and flow are those of the data set with the same settings."""
    film = numbered_video(tmp_path / "film.mp4", 60, gop=7)
    run = run_that_read(tmp_path / "run", flow, section)
    with lavis_lstp.load(run) as loaded:
        asked = loaded.prepare(film, ASKED).candidates
        assert loaded.notes == () and loaded.num_frames == section["num_frames"]
        rows = [{"question_id": "a", "video": film.name, "video_id": "film", "question": ASKED, "answer": ""}]
        given = "none" if flow == "dis" else flow
        side = loaded.model.backbone.image_size
        data = VideoQADataset(rows, tmp_path, image_size=side, flow=given, **section)
        sample = data[0]
        flow_of_data = loaded.model.chooser.flow(data.collater([sample]))[0]
    assert torch.equal(asked.frames, sample["frames"]) and torch.allclose(asked.flow, flow_of_data, atol=0.02)
    assert asked.times_s == pytest.approx(sample["frame_times"].numpy())


def test_flow_of_a_run_with_local_pairs_goes_to_the_next_picture(tmp_path):
    section = {"num_frames": 8, "flow": "precomputed", "flow_pairs": "local"}
    run = run_that_read(tmp_path / "run", "precomputed", section)
    with lavis_lstp.load(run) as loaded:
        found = loaded.prepare(CLIP, ASKED).candidates
        side = loaded.model.backbone.image_size
        pairs = torch.from_numpy(reading.read_pairs(CLIP, num=8, size=side))
        alone = torch.cat([loaded.model.flow(pair[None])[0, :1] for pair in pairs])
        assert torch.equal(found.flow, alone) and found.flow.abs().max() > 0
        with pytest.raises(ConfigError, match="flow_pairs local needs a video"):
            loaded.prepare([picture_bytes(), picture_bytes("blue")], ASKED)


def test_data_sets_that_were_read_differently_are_told(tmp_path):
    run = run_that_read(tmp_path / "run", "dis", {"fps": 1}, {"num_frames": 9, "frames": "keyframe"}, {"fps": "no"})
    with lavis_lstp.load(run) as loaded:
        assert loaded.num_frames == 9 and {"exact": True, "fps": 1}.items() <= loaded.reader.how.items()
        assert loaded.notes == (
            "frames is exact as the run's data set lstp_video_qa was read, not keyframe in lstp_nextqa",
            "fps is 1 as the run's data set lstp_video_qa was read, not None in lstp_nextqa",
        )


@pytest.mark.parametrize(("key", "value"), [("frames", "keyfram"), ("decode_size", -1), ("fps", "${oc.env:HOME}")])
def test_a_manifest_whose_reading_cannot_be_followed_is_one_line(key, value, tmp_path):
    with pytest.raises(ConfigError, match=rf"manifest.json: datasets.lstp_video_qa.*{key}"):
        lavis_lstp.load(run_that_read(tmp_path / "run", "dis", {key: value}))


def test_limits_of_length_and_size():
    with lavis_lstp.load("example", max_seconds=5, max_megapixels=0.001) as strict:
        with pytest.raises(VideoError, match="max_megapixels"):
            strict.answer(picture_bytes(), ASKED, name="picture")
        strict.reader.how["max_megapixels"] = 1
        with pytest.raises(VideoError, match="clip: lasts 12.8 s, more than the 5 s"):
            strict.answer(CLIP.read_bytes(), ASKED, name="clip")


def test_an_answer_can_be_given_up_before_and_while_it_is_written(predictor):
    gone = threading.Event()
    gone.set()
    with pytest.raises(Cancelled):
        predictor.answer(CLIP, ASKED, cancel=gone)
    stream = predictor.stream(CLIP, "tell me", min_new_tokens=400, max_new_tokens=400)
    assert isinstance(next(stream), str)
    stream.close()  # the model is free again
    assert predictor.answer(CLIP, ASKED).prediction == ROWS[1]["answer"]


def test_of_a_batch_only_the_row_that_was_given_up_is_cut_short(predictor):
    long = predictor.settings(min_new_tokens=30, max_new_tokens=30)
    gone = threading.Event()
    left = predictor.prepare(CLIP, "tell me", settings=long, cancel=gone, on_text=lambda text: gone.set())
    stays = predictor.prepare(CLIP, ASKED, settings=long)
    _, found = predictor.answer_many([left, stays])
    assert same(found, predictor.answer_many([predictor.prepare(CLIP, ASKED, settings=long)])[0])


def test_earlier_turns_are_read_in_the_published_form_as_many_as_fit(predictor):
    turns = history_of(
        [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a star"}]
        + [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "red"}]
    )
    found = predictor.answer(CLIP, ASKED, history=turns)
    assert found.prompt == (
        "USER: <video>\nwhat? ASSISTANT: a star</s>USER: <video>\nand? ASSISTANT: red</s>"
        f"USER: <video>\n{ASKED} ASSISTANT: "
    )
    many = predictor.answer(CLIP, ASKED, history=[(f"question {n}?", "x" * 20) for n in range(20)])
    assert many.prompt.endswith(f"</s>USER: <video>\n{ASKED} ASSISTANT: ") and "question 19?" in many.prompt
    assert "question 0?" not in many.prompt
    with pytest.raises(ConfigError, match="in turn, got user, user"):
        history_of([{"role": "user", "content": "a"}] * 2)


@pytest.mark.parametrize("question", ["", " \n", None, 3])
def test_a_question_must_be_a_text(predictor, question):
    with pytest.raises(ConfigError, match="question"):
        predictor.answer(CLIP, question)


def test_a_closed_predictor_says_so():
    loaded = lavis_lstp.load("example")
    loaded.close()
    with pytest.raises(ConfigError, match="closed"):
        loaded.answer(CLIP, ASKED)


def test_what_is_kept_has_a_bound_and_the_last_used_stays():
    kept = Kept(10, len)
    made = []

    def get(key, size):
        return kept.get(key, lambda: made.append(key) or "x" * size)

    for key, size in (("a", 4), ("b", 4), ("a", 4), ("c", 4), ("a", 4), ("b", 4)):
        get(key, size)
    assert made == ["a", "b", "c", "b"] and kept.num_bytes == 8
    assert get("large", 11) == "x" * 11 and kept.num_bytes <= 10
    with pytest.raises(ZeroDivisionError):
        kept.get("bad", lambda: 1 // 0)
    assert get("bad", 1) == "x"


def test_pictures_are_told_by_content(tmp_path):
    for form in ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM"):
        assert candidates.is_picture(picture_bytes(form=form)), form
    assert not candidates.is_picture(CLIP) and not candidates.is_picture(picture_bytes(form="GIF"))


def test_a_png_or_webp_that_moves_is_no_picture(tmp_path, predictor):
    """A WebP film of ComfyUI (python-pillow/Pillow#7738) was answered from its first frame alone."""
    shown = [Image.new("RGB", (40, 30), colour) for colour in ("red", "green", "blue")]
    for form in ("PNG", "WEBP"):
        shown[0].save(tmp_path / form, form, save_all=True, append_images=shown[1:], duration=100)
        for source in (tmp_path / form, (tmp_path / form).read_bytes()):
            assert not candidates.is_picture(source), form
        assert candidates.is_picture((tmp_path / form).read_bytes()[:20]), form  # cut off before it says so
    assert predictor.answer(tmp_path / "PNG", ASKED, num_frames=3).candidate_times_s == pytest.approx([0, 0.1, 0.2])
    with pytest.raises(VideoError, match="WEBP: is of a format that is not read as a video"):
        predictor.answer(tmp_path / "WEBP", ASKED)


def test_long_videos_are_scored_in_windows_and_may_have_several_spans(tmp_path):
    film = lengthen(CLIP, tmp_path / "film.mp4", 12)
    with lavis_lstp.load("example", options=["model.sampler.window=64", "model.selector.max_spans=3"]) as long:
        found = long.answer(film, ASKED, num_frames=1000, fps=5)
        steps = np.diff(found.candidate_times_s)
        assert len(found.candidate_times_s) > 300 and steps.max() == pytest.approx(0.2, abs=0.11)
        assert 1 <= len(found.spans_s) <= 3 and found.span_s == found.spans_s[0]
        assert all(any(a <= t < b for a, b in found.spans_s) for t in found.frame_times_s)
        assert len(long.answer(film, ASKED, num_frames=40, fps=5).candidate_times_s) == 40
        assert found.as_dict()["spans_s"] == found.spans_s
        assert "spans_s" not in long.answer(film, ASKED, num_frames=8, selector="uniform").as_dict()
    selected = lavis_lstp.select(film, ASKED, 4, num_candidates=40, candidates_per_s=0.5)
    assert np.diff(selected.candidate_times_s).min() > 1.5
    with pytest.raises(ConfigError, match="candidates_per_s is of methods that ask the sampler"):
        lavis_lstp.select(film, method="uniform", candidates_per_s=1)


def test_subtitles_near_the_shown_frames_stand_before_the_question(tmp_path, predictor):
    file = tmp_path / "clip.vtt"
    file.write_text("WEBVTT\n\n00:05.000 --> 00:06.000\nnear\n\n00:59.000 --> 01:00.000\nfar\n", encoding="utf-8")
    asked = {"num_frames": 16, "selector": "uniform", "num_selected": 16}
    found = predictor.answer(CLIP, ASKED, subtitles=file, **asked)
    assert f"Subtitles:\nnear\n{ASKED}" in found.prompt
    assert found.subtitles == {"window_s": 2.0, "lines": 1, "left_out": 0} == found.as_dict()["subtitles"]
    lines = [(5, 6, "near"), (59, 60, "far")]
    whole = predictor.answer(CLIP, ASKED, subtitles=lines, subtitles_window_s="whole", **asked)
    assert "near\nfar" in whole.prompt and whole.subtitles["window_s"] is None
    *_, streamed = predictor.stream(CLIP, ASKED, subtitles=file, **asked)
    assert (streamed.prompt, streamed.prediction) == (found.prompt, found.prediction)
    plain = predictor.answer(CLIP, ASKED, **asked)
    assert plain.subtitles is None and "subtitles" not in plain.as_dict() and "Subtitles" not in plain.prompt
    settings = predictor.settings(**asked)
    both = [predictor.prepare(CLIP, ASKED, settings=settings, subtitles=lines) for lines in (None, str(file))]
    assert [one.prompt for one in predictor.answer_many(both)] == [plain.prompt, found.prompt]
    file.write_text("WEBVTT\n\nnever --> ever\nx\n", encoding="utf-8")
    with pytest.raises(AnnotationError, match="clip.vtt, line 3: expected times"):
        predictor.answer(CLIP, ASKED, subtitles=file)
    with pytest.raises(ConfigError, match="subtitles_window_s must be a number of at least 0 or whole"):
        predictor.settings(subtitles_window_s="all")


HOURS = """
import resource, sys
import lavis_lstp
with lavis_lstp.load("example", options=["model.sampler.window=64"]) as long:
    found = long.answer(sys.argv[1], "what moves?", num_frames=512, fps=4)
assert len(found.candidate_times_s) == 512
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.slow
def test_two_hours_take_the_memory_of_ten_minutes(tmp_path):
    """Of a longer file only the index grows, by about 100 bytes a picture: 17 MB more for 165,000 pictures."""
    clip, peaks = numbered_video(tmp_path / "clip.mp4", 250), []
    for minutes in (10, 120):
        film = lengthen(clip, tmp_path / f"{minutes}.mp4", 6 * minutes)
        done = subprocess.run([sys.executable, "-c", HOURS, str(film)], capture_output=True, text=True, check=True)
        peaks.append(float(done.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 60, peaks
