"""`lavis_lstp.select` and its command: frames with their true times, with and without a network."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from video_files import numbered_video, read_number, write_video

import lavis_lstp
from lavis_lstp.commands import cli
from lavis_lstp.data.video import codec_figures
from lavis_lstp.data.video.codec_figures import packet_costs
from lavis_lstp.errors import ConfigError, LstpError
from lavis_lstp.inference import contact_sheet
from lavis_lstp.inference.loading import EXAMPLE
from lavis_lstp.inference.selection import BY_SAMPLER, METHODS, WITHOUT_NETWORK, Selection, timing
from lavis_lstp.models.where import selectors

QUESTION = "what colour is the shape that shakes?"
CLIP = EXAMPLE / "clip.mp4"


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return numbered_video(tmp_path_factory.mktemp("films") / "film.mp4", 100, gop=10)


@pytest.mark.parametrize("method", WITHOUT_NETWORK)
def test_frames_and_times_are_those_of_the_file(film, method):
    found = lavis_lstp.select(film, k=6, method=method)
    assert found.frame_index == sorted(set(found.frame_index)) and len(found.frame_index) == 6
    assert found.times_s == pytest.approx([i / 25 for i in found.frame_index])
    assert [read_number(frame) for frame in found.frames()] == [i % 38 for i in found.frame_index]
    assert found == lavis_lstp.select(film, k=6, method=method) or found.seconds != {}
    if method == "keyframes":
        assert all(i % 10 == 0 for i in found.frame_index)


def test_a_folder_of_pictures_is_chosen_from_as_from_a_video(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(12):
        Image.new("RGB", (32, 32), (20 * number,) * 3).save(folder / f"f{number}.png")
    for method in WITHOUT_NETWORK[2:]:
        with pytest.raises(ConfigError, match=f"frames: method {method} reads a video file, and this is a folder"):
            lavis_lstp.select(folder, k=3, method=method)
    for method in ("uniform", "random", "lstp", "topk"):
        found = lavis_lstp.select(folder, QUESTION, k=3, method=method)
        assert found.times_s == pytest.approx([i / 3 for i in found.frame_index], abs=1e-6) and found.duration_s == 4
        assert [frame[0, 0, 0] // 20 for frame in found.frames()] == found.frame_index, method
    assert lavis_lstp.select(folder, k=3, method="uniform", clip_s=(1, 3)).frame_index == [3, 5, 7]
    assert cli.main(["select", str(folder), "--method", "uniform", "--save", str(tmp_path / "out")]) in (0, None)
    assert (tmp_path / "out/sheet.png").is_file()


def test_methods_without_a_network_import_neither_torch_nor_lavis(film):
    script = "import sys, lavis_lstp\n" + "".join(
        f"lavis_lstp.select(sys.argv[1], k=3, method={method!r})\n" for method in WITHOUT_NETWORK
    )
    script += "assert 'torch' not in sys.modules and 'lavis.models' not in sys.modules"
    subprocess.run([sys.executable, "-c", script, str(film)], check=True, timeout=300)


def test_bit_cost_and_motion_find_where_something_happens(tmp_path):
    still = np.full((64, 96, 3), 90, np.uint8)
    noise = np.random.default_rng(0)
    pictures = [noise.integers(0, 256, still.shape, dtype=np.uint8) if 50 <= i < 60 else still for i in range(100)]
    path = write_video(tmp_path / "event.mp4", pictures)
    for method in ("bitcost", "motion"):
        found = lavis_lstp.select(path, k=4, method=method, rule="topk")
        assert all(48 <= i <= 61 for i in found.frame_index), method
        assert len(found.scores) == len(found.candidate_times_s) == 100 and found.settings["rule"] == "topk"


@pytest.mark.parametrize("method", BY_SAMPLER)
def test_the_sampler_of_a_checkpoint_is_asked(predictor, method):
    found = lavis_lstp.select(CLIP, QUESTION, k=4, method=method, predictor=predictor)
    assert len(found.frame_index) == 4 and len(found.scores) == len(found.candidate_times_s) == 64
    assert found.times_s == pytest.approx([i / 10 for i in found.frame_index])
    if method in ("lstp", "topk"):
        (gold,) = (
            row["span_s"] for row in json.loads((EXAMPLE / "questions.json").read_text()) if row["question"] == QUESTION
        )
        assert all(gold[0] - 0.3 <= seconds <= gold[1] + 0.3 for seconds in found.times_s)


@pytest.mark.parametrize(("gop", "read"), [(5, "keyframe"), (1000, "exact")])
def test_settings_tell_how_candidates_were_read_in_fact(predictor, tmp_path, gop, read):
    path = numbered_video(tmp_path / "film.mp4", 30, gop=gop)
    how = {"predictor": predictor, "num_candidates": 5, "flow_pairs": "local"}
    found = lavis_lstp.select(path, QUESTION, k=2, method="topk", frames="keyframe", **how)
    assert (found.settings["frames"], found.settings["flow_pairs"]) == (read, "local")
    assert all(i % 5 == 0 for i in found.candidate_index) == (read == "keyframe")
    assert lavis_lstp.select(path, QUESTION, k=2, method="topk", **how).settings["frames"] == "exact"


def test_a_rule_is_told_when_the_candidates_are(predictor, monkeypatch):
    """focus divides a video into arms of seconds, which candidates alone do not tell."""
    seen = []
    choose = selectors.choose
    monkeypatch.setattr(
        selectors, "choose", lambda name, row, **own: seen.append(row.times_s) or choose(name, row, **own)
    )
    found = lavis_lstp.select(CLIP, QUESTION, k=4, method="focus", predictor=predictor, arm_s=2.0)
    assert seen[0] == pytest.approx(found.candidate_times_s) and found.settings["arm_s"] == 2.0


def test_settings_of_a_rule_and_what_was_filled_in_are_told(predictor):
    found = lavis_lstp.select(CLIP, QUESTION, k=6, method="aks", predictor=predictor, mean_gap=0.99)
    assert found.settings["mean_gap"] == 0.99 and found.settings["depth"] == 5 and found.num_filled == 6
    with pytest.raises(ConfigError, match="selector 'aks' has no setting 'dept'"):
        lavis_lstp.select(CLIP, QUESTION, method="aks", predictor=predictor, dept=1)


def test_it_goes_through_json_and_refuses_another_video(film, tmp_path):
    found = lavis_lstp.select(film, k=5, method="bitcost")
    found.write(tmp_path / "selection.json")
    assert Selection.read(tmp_path / "selection.json") == found
    changed = {**found.to_json(), "video": str(CLIP)}
    with pytest.raises(LstpError, match="is not the video that these frames were selected from"):
        Selection.from_json(changed).frames()
    wrong = [("version", 2), ("frame_index", [1000] * 5), ("times_s", [0.0]), ("times_s", ["0"] * 5), ("video", 0)]
    wrong += [("num_frames", "9"), ("span_s", 5), ("span_s", [1]), ("scores", [None]), ("settings", [])]
    wrong += [("seconds", {"a": "b"})]
    for key, value in wrong:
        with pytest.raises(ConfigError, match="selection"):
            Selection.from_json({**found.to_json(), key: value}, "selection")


ASKED = {"method": "topk", "scorer": "clip", "question": "what moves?"}


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"method": "unifrom"}, "did you mean 'uniform'"),
        ({"method": "LSTP"}, "did you mean 'lstp'"),
        ({"k": 0}, "k must be a whole number of at least 1"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"num_candidates": 0, "method": "motion"}, "num_candidates must be a whole number of at least 1"),
        (
            {"num_candidates": 8, "method": "uniform"},
            "num_candidates is of methods that score frames, the method is un",
        ),
        ({"method": "lstp"}, "needs a question"),
        ({"method": "mmr", "scorer": "clip"}, "needs a question"),
        (ASKED | {"candidates_per_s": 1}, "ask the sampler, the scorer is clip"),
        (ASKED | {"frames": "keyframes"}, "did you mean 'keyframe'"),
        ({"method": "bitcost", "rule": "topkk"}, "did you mean 'topk'"),
        ({"method": "uniform", "power": 2.0}, "has no setting 'power'"),
    ],
)
def test_what_cannot_be_done_is_one_line(film, how, said):
    with pytest.raises(ConfigError, match=said):
        lavis_lstp.select(film, **{"method": "uniform", **how})


def test_more_frames_than_the_video_has_are_all_of_them(tmp_path, capsys):
    path = numbered_video(tmp_path / "short.mp4", 5)
    assert lavis_lstp.select(path, k=9, method="uniform").frame_index == [0, 1, 2, 3, 4]
    assert cli.main(["select", str(path), "-k", "9", "--method", "bitcost"]) == 0
    assert "5 of 5 frames by bitcost" in (said := capsys.readouterr().out) and "9 were asked for" in said


@pytest.mark.parametrize("method", ["uniform", "bitcost", "motion", "lstp", "topk"])
def test_a_picture_is_its_only_frame(tmp_path, method):
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    found = lavis_lstp.select(tmp_path / "picture.png", QUESTION, k=4, method=method)
    assert (found.frame_index, found.times_s, found.num_frames, found.scores) == ([0], [0.0], 1, None)
    assert np.array_equal(found.frames()[0], picture.transpose(2, 0, 1)) and found.frames(20).shape == (1, 3, 20, 20)
    assert Selection.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize("ending", ["h264", "mkv", "ts"])
def test_files_that_keep_no_duration_or_no_times_are_read(tmp_path, ending):
    options = {"live": "1"} if ending == "mkv" else {}  # a stream that was never finished
    path = numbered_video(tmp_path / f"film.{ending}", 30, gop=5, container_options=options)
    for method in WITHOUT_NETWORK:
        found = lavis_lstp.select(path, k=3, method=method)
        assert [read_number(frame) for frame in found.frames()] == found.frame_index


def test_motion_is_found_once(film, monkeypatch, tmp_path):
    monkeypatch.setenv("LAVIS_LSTP_STORE", str(tmp_path))
    first = lavis_lstp.select(film, k=3, method="motion")
    monkeypatch.setattr(codec_figures, "motion_energy", lambda *_: 1 / 0)
    assert lavis_lstp.select(film, k=3, method="motion").scores == first.scores


def test_times_that_keep_no_rate_are_told_in_milliseconds(tmp_path):
    ticks = np.cumsum([0] + [1 + (i * 7) % 5 for i in range(29)]).tolist()
    path = numbered_video(tmp_path / "variable.mp4", 30, ticks=ticks)
    found = lavis_lstp.select(path, k=4, method="uniform")
    told = found.video_metadata()
    assert [i / told.fps for i in told.frames_indices] == pytest.approx(found.times_s, abs=6e-4)
    assert timing([40, 50], [40 / 30, 50 / 30], 30.0, 300, 10.0) == (30.0, [40, 50], 300)


def test_a_video_processor_writes_the_true_times():
    """Frames 40 to 295 of a 30 fps video, as Qwen3-VL's processor tells them to its model."""
    processor = pytest.importorskip("transformers.models.qwen3_vl.video_processing_qwen3_vl").Qwen3VLVideoProcessor()
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    numbers = [40, 68, 147, 153, 218, 226, 292, 295]
    fps, indices, total = timing(numbers, [i / 30 for i in numbers], 30.0, 300, 10.0)
    found = processor(
        videos=[np.zeros((8, 3, 64, 64), np.uint8)],
        video_metadata=[{"fps": fps, "frames_indices": indices, "total_num_frames": total}],
        do_sample_frames=False,
        return_metadata=True,
    )
    (metadata,) = found["video_metadata"]
    written = Qwen3VLProcessor._calculate_timestamps(None, metadata.frames_indices, metadata.fps, 2)
    assert [round(seconds, 1) for seconds in written] == [1.8, 5.0, 7.4, 9.8]


def test_the_command_prints_a_table_and_saves_pictures(film, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["select", str(film), "--method", "bitcost", "-k", "3", "--save", str(out)]) == 0
    printed = capsys.readouterr().out
    found = Selection.read(out / "selection.json")
    assert all(str(number) in printed for number in found.frame_index) and "3 of 100 frames by bitcost" in printed
    for number in found.frame_index:
        frame = np.asarray(Image.open(out / f"{number:07d}.png")).transpose(2, 0, 1)
        assert read_number(frame) == number % 38
    sheet = np.asarray(Image.open(out / "sheet.png").convert("RGB"))
    assert sheet.shape[1] > 300
    lines = {x for x in range(sheet.shape[1]) if (sheet[-90:, x] == contact_sheet.CHOSEN).all(axis=1).sum() > 40}
    assert lines == {int((sheet.shape[1] - 1) * seconds / 4.0) for seconds in found.times_s}, "100 frames last 4 s"
    assert (sheet[-100:] == contact_sheet.SCORES).all(axis=2).any(axis=0).mean() > 0.8
    for form, kept in (([], found.to_json()), (["--format", "aks"], [found.frame_index])):
        words = ["--method", "bitcost", "-k", "3", "--out", str(tmp_path / "kept.json"), *form]
        assert cli.main(["select", str(film), *words]) == 0 and "3 of 100 frames" in capsys.readouterr().out
        written = json.loads((tmp_path / "kept.json").read_text(encoding="utf-8"))
        assert written["frame_index"] == found.frame_index if form == [] else written == kept
    for words, said in (
        (["--from", str(out / "selection.json"), "-k", "2"], "takes frames as they were chosen; leave out k"),
        ([str(film), "--workers", "2"], "--workers and --engine go with --questions FILE"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["select", *words])
        assert said in capsys.readouterr().err
    assert cli.main(["select", str(film), "--method", "lstpp"]) == 2
    assert "did you mean 'lstp'" in capsys.readouterr().err


def test_a_file_of_questions_is_gone_on_with(film, tmp_path, capsys):
    rows = [{"question_id": f"q{i}", "video": film.name, "question": "what?", "answer": "x"} for i in range(4)]
    rows[1]["clip_s"] = [2.0, 3.0]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    out = tmp_path / "selection.jsonl"
    words = ["select", "--questions", str(tmp_path / "rows.json"), "--root", str(film.parent), "--out", str(out)]
    words += ["--method", "bitcost", "-k", "2"]
    assert cli.main(words) == 0
    whole = out.read_text().splitlines()
    out.write_text("\n".join(whole[:2]) + "\n" + whole[2][:30])
    capsys.readouterr()
    assert cli.main(words) == 0
    assert "4 questions, 2 of them selected now" in capsys.readouterr().out
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["question_id"] for row in again] == ["q0", "q1", "q2", "q3"]
    assert [row["frame_index"] for row in again] == [json.loads(line)["frame_index"] for line in whole]
    assert [all(50 <= i < 75 for i in row["candidate_index"]) for row in again] == [False, True, False, False]
    parallel = [*words, "--workers", "2", "--out", str(tmp_path / "parallel.jsonl")]
    assert cli.main(parallel) == 0
    for line, row in zip((tmp_path / "parallel.jsonl").read_text().splitlines(), again, strict=True):
        assert {**json.loads(line), "seconds": {}} == {**row, "seconds": {}}
    for other in ([*words[:-1], "3"], [*words, "--num-candidates", "20"], [*words, "--seed", "1"]):
        assert cli.main(other) == 2
        assert "holds selections made otherwise" in capsys.readouterr().err
    for change, line in (
        ({"video": "../film.mp4"}, "question q2: path '../film.mp4' is absolute or leads out of"),
        ({"video": "sub\\film.mp4"}, "question q2: path 'sub\\\\film.mp4' has a backslash"),
        ({"clip_s": [900, 901]}, f"question q2: {film}: 'clip_s' [900, 901] lies outside of the video"),
    ):
        (tmp_path / "rows.json").write_text(json.dumps([*rows[:2], {**rows[2], **change}, rows[3]]))
        out.unlink(missing_ok=True)
        assert cli.main(words) == 2
        assert f"error: {line}" in capsys.readouterr().err


@pytest.mark.parametrize("method", WITHOUT_NETWORK)
def test_a_question_about_a_part_sees_that_part_alone(film, method):
    found = lavis_lstp.select(film, k=3, method=method, clip_s=(0.8, 2.4))
    assert len(set(found.frame_index)) == 3 and all(20 <= i < 60 for i in [*found.frame_index, *found.candidate_index])
    assert found.times_s == pytest.approx([i / 25 for i in found.frame_index])
    assert found.settings["clip_s"] == [0.8, 2.4]
    if method in ("bitcost", "motion"):
        assert len(found.scores) == 40
    if method == "uniform":
        assert lavis_lstp.select(film, k=3, method=method, clip_s=(2.8, float("inf"))).settings["clip_s"] == [2.8, 4.0]


def test_a_part_is_read_by_the_sampler_and_refused_where_it_is_none(predictor, film):
    found = lavis_lstp.select(CLIP, QUESTION, k=4, method="lstp", predictor=predictor, clip_s=(1.0, 3.0))
    assert 1.0 <= min(found.candidate_times_s) and max(found.candidate_times_s) < 3.0
    assert 1.0 <= found.span_s[0] < found.span_s[1] <= 3.0 and set(found.frame_index) <= set(found.candidate_index)
    for clip_s, said in (
        ((9, 10), "lies outside of the video"),
        ((2, 1), "start < end"),
        ((0, float("nan")), "start <"),
    ):
        with pytest.raises(LstpError, match=said):
            lavis_lstp.select(film, k=2, method="uniform", clip_s=clip_s)
    with pytest.raises(ConfigError, match="no key frame from 0.1 to 0.2 s"):
        lavis_lstp.select(film, k=2, method="keyframes", clip_s=(0.1, 0.2))


def test_settings_that_are_none_are_one_line_also_of_a_picture(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for word, said in (
        ("k=3", "no setting of a method"),
        ("predictor=1", "no setting"),
        ("nonsense=1", "has no setting"),
    ):
        assert cli.main(["select", str(tmp_path / "a.png"), "--method", "motion", "--settings", word]) == 2
        assert said in capsys.readouterr().err
    assert cli.main(["select", str(tmp_path / "a.png"), "--method", "motion", "--settings", "power=2"]) == 0


def test_every_method_has_a_name_in_the_help_and_costs_are_of_all_frames(film, capsys):
    with pytest.raises(SystemExit):
        cli.main(["select", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(method in text for method in METHODS)
    assert len(packet_costs(film).num_bytes) == 100
