"""Annotation files and videos become samples and batches; each mistake is named with its file, entry and key."""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
import pickle
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from PIL import Image
from safetensors.numpy import load_file, save_file
from torch.utils.data import DataLoader
from video_files import ACCENTS, audio_file, numbered_video, read_number

from lavis_lstp.commands import flow as flow_files
from lavis_lstp.data.flow_files import flow_file
from lavis_lstp.data.folder import FolderQuestions
from lavis_lstp.data.frame_numbers import sample_indices, uniform_centres
from lavis_lstp.data.qa_dataset import VideoQADataset, read_annotation
from lavis_lstp.data.shapes import shapes_qa
from lavis_lstp.data.spans import read_spans
from lavis_lstp.data.store import Store
from lavis_lstp.data.video import reading
from lavis_lstp.data.video.codec_figures import motion_energy, packet_costs
from lavis_lstp.data.video.reading import read_frames, read_pairs
from lavis_lstp.errors import AnnotationError, ConfigError, CoverageError, VideoError
from lavis_lstp.files import find_path
from lavis_lstp.metrics.coverage import join_by_id
from lavis_lstp.models.where.flow import build_flow
from lavis_lstp.runners.data_order import Batches
from lavis_lstp.runners.splits import JoinedDataset
from lavis_lstp.schema import Span

SHAPES = {"seed": 0, "train_videos": 2, "val_videos": 1, "test_videos": 3, "train_images": 3, "size": 64}


def entry(number: int = 0, **changes) -> dict:
    row = {"question_id": f"q{number}", "video": "long.mp4", "question": f"what is {number}?", "answer": "grey"}
    row.update(changes)
    row.setdefault("video_id", Path(str(row["video"])).stem)
    return {key: value for key, value in row.items() if value is not None}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """long.mp4 and short.mp4 with 30 and 5 numbered frames, still.png, and broken.mp4, which has no pictures."""
    root = tmp_path_factory.mktemp("videos")
    numbered_video(root / "long.mp4", 30)
    numbered_video(root / "short.mp4", 5)
    audio_file(root / "broken.mp4")
    Image.fromarray(np.full((40, 60, 3), (10, 200, 30), dtype=np.uint8)).save(root / "still.png")
    return root


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    shapes_qa.generate(root, workers=1, **SHAPES)
    return root


# ---------------------------------------------------------------- annotation files


def test_a_list_and_json_lines_are_the_same(tmp_path):
    rows = [entry(0, video_id=None), entry(1, video="film/b.mp4", video_id=None, category="colour", span_s=[0.5, 2])]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    found = read_annotation(tmp_path / "list.json")
    assert found == read_annotation(tmp_path / "lines.jsonl")
    assert [row["video_id"] for row in found] == ["long", "b"]  # the file's name, where none is given


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([entry(0), entry(1, answer=None)], ["entry 1", "'q1'", "'answer' is missing"]),
        ([entry(0, question_id=None)], ["entry 0", "'question_id' is missing"]),
        ([entry(0), entry(1, question="what? \ud83d")], ["file, entry 1, key 'question': half a character", "mend it"]),
        ([{"id": 1, "conversations": []}], ["entry 0", "as LLaVA's", "lstp_video_instruct", "pack --from video-llava"]),
        ([entry(0, video=None)], ["entry 0", "'video' is missing"]),
        ([entry(0, question=7)], ["entry 0", "'q0'", "'question' must be a string, got int 7"]),
        ([entry(0, question_id=7)], ["entry 0", "'question_id' must be a string, got int 7"]),
        ([entry(0), "text"], ["entry 1", "expected an object, got str"]),
        ([entry(0), entry(0)], ["entry 1", "'q0' occurs twice"]),
        ([entry(0, span_s=[2.0, 1.0])], ["'q0'", "'span_s' must be [start, end]", "[2.0, 1.0]"]),
        ([entry(0, span_s="1-2")], ["'q0'", "'span_s'", "'1-2'"]),
        ([entry(0, span_s=[True, 2])], ["'q0'", "'span_s'"]),
        ([entry(0), entry(1, question=" ")], ["entry 1", "'q1'", "'question' is empty"]),
        ([entry(0, image="still.png")], ["entry 0", "'q0'", "both 'image' and 'video'"]),
        ([entry(0, question_id=" ")], ["entry 0", "'question_id' is empty"]),
        ([entry(0, prompt=["a"])], ["'q0'", "'prompt' must be a string, got ['a']"]),
        ([entry(0, category=7)], ["'q0'", "'category' must be a string, got 7"]),
        ([entry(0, categories=["red"])], ["'q0'", "'categories' must be {axis: kind or [kinds]}", "['red']"]),
        ([entry(0, categories={"colour": [7]})], ["'q0'", "'categories' must be", "[7]"]),
        ([entry(0, moments_s="0-1")], ["'q0'", "'moments_s' must be [[start, end], ...]", "'0-1'"]),
        ([entry(0, moments_s=[0.5, 1])], ["'q0'", "'moments_s' must be [start, end]", "0.5"]),
        ([entry(0, moments_s=[[0, 1], [3, 2]])], ["'q0'", "'moments_s'", "[3, 2]"]),
        ([], ["holds no question"]),
    ],
)
def test_what_is_wrong_with_an_entry(tmp_path, rows, said):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(AnnotationError) as error:
        read_annotation(path)
    assert "\n" not in str(error.value)
    for part in [str(path), *said]:
        assert part in str(error.value)


def test_an_object_over_several_lines_is_one_row_and_its_own_words_say_what_is_wrong(tmp_path):
    path = tmp_path / "a.json"

    def said(text: str) -> str:
        path.write_text(text)
        with pytest.raises(AnnotationError) as error:
            read_annotation(path)
        return str(error.value).removeprefix(str(path))

    one = json.dumps(entry(0), indent=2)
    path.write_text(one)
    assert [row["question_id"] for row in read_annotation(path)] == ["q0"]
    assert said(json.dumps({"data": [entry(0)]}, indent=2)).endswith(
        "one object: key 'question_id' is missing; it has data"
    )
    many = {f"q{i}": entry(i) for i in range(1000)}
    assert said(json.dumps(many, indent=4)).endswith("it has q0, q1, q2, q3, q4, ...")
    assert "one object: not JSON" in (cut := said(one[:-20])) and "line 6" in cut
    assert "Extra data: line 8" in said(f"{one}\n{one}")
    lines = [json.dumps(entry(i)) for i in range(2)]
    assert said(f"{lines[0][:-5]}\n{lines[1]}").startswith(", line 1: not JSON")
    assert said(f"{lines[0]}\n{lines[1][:-5]}").startswith(", line 2: not JSON")


def test_null_is_as_if_left_out_and_the_longest_moment_is_the_gold_span(tmp_path):
    nulls = dict.fromkeys(("span_s", "moments_s", "clip_s", "category", "categories", "options", "prompt", "video_id"))
    rows = [{**entry(0), **nulls}, entry(1, moments_s=[[0, 1], [0.5, 2.5]])]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    found = read_annotation(tmp_path / "a.json")
    assert found == [entry(0, video_id="long"), entry(1, moments_s=[[0, 1], [0.5, 2.5]], span_s=[0.5, 2.5])]
    (tmp_path / "a.json").write_text(json.dumps([entry(0, moments_s=[[2, 3.5], [-0.5, 1]])]))
    assert read_annotation(tmp_path / "a.json")[0]["span_s"] == [0, 1]  # authors round; shards take no less than 0


@pytest.mark.parametrize("hidden", [None, "", " \n"])
def test_no_answer_is_hidden_in_all_questions_or_in_none(tmp_path, caplog, hidden):
    rows = [{**entry(number), "answer": hidden} for number in range(2)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert [row["answer"] for row in read_annotation(tmp_path / "a.json")] == [None, None]
    assert "the 2 questions have no answers; predictions are written, not scored" in caplog.text
    (tmp_path / "a.json").write_text(json.dumps([*rows, entry(2)]))
    with pytest.raises(AnnotationError, match="a.json: 2 of 3 questions have no answer: q0, q1$"):
        read_annotation(tmp_path / "a.json")


def test_a_key_that_is_nearly_one_that_is_read_is_warned_of(tmp_path, caplog):
    rows = [entry(0, spans_s=[0, 1], Options=["a"], mine=1, video_path="x"), entry(1, spans_s=[0, 1], start=3)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    read_annotation(tmp_path / "a.json")
    assert sorted(record.getMessage() for record in caplog.records) == [
        f"{tmp_path / 'a.json'}: 'Options', in 1 of 2 entries, is not read; did you mean 'options'?",
        f"{tmp_path / 'a.json'}: 'spans_s', in 2 of 2 entries, is not read; did you mean 'span_s'?",
        f"{tmp_path / 'a.json'}: 'start', in 1 of 2 entries, is not read; did you mean 'clip_s'?",
    ]


@pytest.mark.parametrize("name", ["choices", "candidates"])
def test_a_key_of_other_projects_is_warned_of(tmp_path, caplog, name):
    (tmp_path / "a.json").write_text(json.dumps([entry(0, **{name: ["a", "b"]})]))
    read_annotation(tmp_path / "a.json")
    assert f"'{name}', in 1 of 1 entries, is not read; did you mean 'options'?" in caplog.text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"question_id": "q0"\n', "line 1: not JSON"),
        (b"[1, 2", "file: not JSON"),
        (b'[{"question_id": "a", "answer": "x", "answer": "y"}]', "file: not JSON (the key 'answer' stands twice"),
        (
            b'\xef\xbb\xbf{"question_id": "a"}\n{"clip_s": [0, Infinity]}\n',
            "line 2: not JSON (key 'clip_s', entry 1: Infinity",
        ),
        (b'{"clip_s": [0, 1e999]}\n', "line 1: not JSON (key 'clip_s', entry 1: 1e999 is larger"),
        (b"[" * 100_000, "file: not JSON"),
        (b"[" * 2_000 + b"NaN" + b"]" * 2_000, "file: not JSON"),
        (b'{"a": [NaN, }', "line 1: not JSON (NaN is no number"),
        (b"", "holds no question"),
        (b"\xff\xfe[]", "cannot be read as UTF-8"),
        (None, "no such annotation file"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, content, said):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AnnotationError) as error:
        read_annotation(path)
    assert str(path) in str(error.value) and said in str(error.value) and "\n" not in str(error.value)


def test_the_line_of_a_wrong_entry_counts_blank_ones(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(entry(0)) + "\n\n" + json.dumps(entry(1, video=3)) + "\n")
    with pytest.raises(AnnotationError, match="line 3 .*'q1'.*'video' must be a string"):
        read_annotation(path)


@ACCENTS
@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_a_name_means_its_file_however_its_accents_are_encoded(tmp_path, stored):
    """Of the medium, of folders above it and of its flow; a name that is there as it is written wins."""
    other = {"NFC": "NFD", "NFD": "NFC"}[stored]
    folder, name = (unicodedata.normalize(stored, text) for text in ("caf\u00e9", "\u00fcber \uac00.mp4"))
    (tmp_path / folder).mkdir()
    (tmp_path / folder / name).write_bytes(b"film")
    asked = unicodedata.normalize(other, f"{folder}/{name}")
    assert find_path(tmp_path, asked).read_bytes() == b"film"
    FolderQuestions([entry(0, video=asked)], tmp_path).check_files()
    assert not find_path(tmp_path, asked + "x").exists()
    (tmp_path / unicodedata.normalize(stored, "\u00e9.safetensors")).write_bytes(b"flow")
    assert flow_file(tmp_path, unicodedata.normalize(other, "\u00e9")).read_bytes() == b"flow"
    (tmp_path / unicodedata.normalize(other, folder)).mkdir()
    assert not find_path(tmp_path, asked).exists(), "the folder of exactly this name is empty"


# ---------------------------------------------------------------- samples


def test_a_sample_holds_evenly_spaced_frames_and_their_times(videos):
    dataset = VideoQADataset([entry(0, video_id="v", span_s=[0.4, 0.8])], videos, num_frames=8)
    sample = dataset[0]
    expected = uniform_centres(8, 30)
    assert sample["frames"].shape == (8, 3, 96, 160) and sample["frames"].dtype == torch.uint8
    assert [read_number(frame.numpy()) for frame in sample["frames"]] == expected
    assert sample["frame_times"].dtype == torch.float32
    torch.testing.assert_close(sample["frame_times"], torch.tensor(expected) / 25)
    inside = [t for t, i in enumerate(expected) if 10 <= i < 20]
    assert sample["gold_span"].tolist() == [inside[0], inside[-1] + 1]
    assert sample["span"].tolist() == [-1, -1]
    text = ("text_input", "text_output", "question_id", "video_id")
    assert [sample[key] for key in text] == ["what is 0?", "grey", "q0", "v"]
    assert "flow" not in sample and "image" not in sample


def test_frames_are_resized_as_published(videos):
    frames = VideoQADataset([entry()], videos, num_frames=3, image_size=32)[0]["frames"]
    full = VideoQADataset([entry()], videos, num_frames=3)[0]["frames"]
    wanted = torch.nn.functional.interpolate(full.float(), (32, 32), mode="bilinear", align_corners=False)
    assert (frames.int() - wanted.to(torch.uint8).int()).abs().max() <= 1


def test_gold_spans_are_exact_at_the_rate_of_the_demo(shapes):
    """Every gold span is the frames its seconds name, though 1.8 s is no float32."""
    rows = read_annotation(shapes / "test.json")
    dataset = VideoQADataset(rows, shapes, num_frames=64, cache_videos=3)
    read = uniform_centres(64, 128)
    for row, sample in zip(rows, (dataset[i] for i in range(len(rows))), strict=True):
        first, last = (round(10 * edge) for edge in row["span_s"])
        inside = [t for t, i in enumerate(read) if first <= i < last]
        assert sample["gold_span"].tolist() == [inside[0], inside[-1] + 1], row["span_s"]
        start, end = sample["gold_span"].tolist()
        colour = (sample["frames"].amax(1).int() - sample["frames"].amin(1)).gt(60).sum((1, 2))
        assert colour[start:end].min() > 40  # of 64 x 64 pixels


def test_pictures_are_resized_as_published(videos, tmp_path):
    """Bicubic, with antialias: one-pixel stripes become an even grey, where taking every tenth pixel keeps them."""
    stripes = np.zeros((40, 40, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    row = {**entry(video=None), "image": "stripes.png"}
    frames = VideoQADataset([row], tmp_path, image_size=4)[0]["frames"]
    wanted = Image.fromarray(stripes).resize((4, 4), Image.Resampling.BICUBIC)
    assert np.array_equal(frames[0].permute(1, 2, 0).numpy(), np.array(wanted))
    assert (frames.int() - 127).abs().max() < 8


def test_a_picture_is_a_sample_of_one_frame(videos):
    row = {**entry(video=None), "image": "still.png"}
    sample = VideoQADataset([row], videos, num_frames=8, image_size=16)[0]
    assert sample["frames"].shape == (1, 3, 16, 16) and sample["frame_times"].tolist() == [0.0]
    assert sample["frames"][0, :, 8, 8].tolist() == [10, 200, 30]
    assert sample["gold_span"].tolist() == [-1, -1]
    flow = VideoQADataset([row], videos, flow="motion_vectors")[0]["flow"]
    assert flow.shape == (1, 2, 40, 60) and not flow.any()


def test_backends_give_the_same_sample(videos):
    one, two = (VideoQADataset([entry()], videos, num_frames=5, backend=name)[0] for name in ("pyav", "decord"))
    assert torch.equal(one["frames"], two["frames"]) and torch.equal(one["frame_times"], two["frame_times"])


def test_laviss_processors_see_the_middle_frame_and_the_question(videos):
    dataset = VideoQADataset(
        [entry()],
        videos,
        num_frames=5,
        vis_processor=lambda picture: torch.from_numpy(np.array(picture)).permute(2, 0, 1).float(),
        text_processor=str.upper,
    )
    sample = dataset[0]
    assert read_number(sample["image"].numpy()) == uniform_centres(5, 30)[2]
    assert sample["text_input"] == "WHAT IS 0?"
    assert dataset.collater([sample, sample])["image"].shape == (2, 3, 96, 160)


def test_flow_of_the_codec_and_of_files(shapes, tmp_path):
    rows = read_annotation(shapes / "test.json")[:1]
    sample = VideoQADataset(rows, shapes, num_frames=64, flow="motion_vectors", flow_size=32)[0]
    assert sample["flow"].shape == (64, 2, 32, 32) and sample["flow"].dtype == torch.float16
    direct = read_frames(shapes / rows[0]["video"], num=64, motion_vectors=True, flow_size=32)
    assert sample["flow"].any() and np.array_equal(sample["flow"].numpy(), direct.flow.astype(np.float16))

    stored = np.random.default_rng(0).normal(size=(64, 2, 8, 8)).astype(np.float16)
    path = tmp_path / f"{rows[0]['video_id']}.safetensors"
    save_file({"flow": stored}, path, metadata={"version": "1", "num_frames": "64", "extractor": "dis"})
    dataset = VideoQADataset(rows, shapes, num_frames=64, flow="precomputed", flow_root=tmp_path)
    assert np.array_equal(dataset[0]["flow"].numpy(), stored)
    with pytest.raises(VideoError, match=r"test-00000-q0.*flow"):  # 64 stored, 32 frames read
        VideoQADataset(rows, shapes, num_frames=32, flow="precomputed", flow_root=tmp_path)[0]
    with pytest.raises(VideoError, match="no such flow file"):
        VideoQADataset(rows, shapes, num_frames=64, flow="precomputed", flow_root=tmp_path / "gone")[0]


def test_flow_written_by_the_command_is_what_a_sample_holds(videos, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([entry(0), entry(1, video="short.mp4")]))
    source, out = str(tmp_path / "a.json"), str(tmp_path / "flow")
    command = [source, out, "--videos", str(videos), "--flow", "motion_vectors", "--num-frames", "6", "--size", "32"]
    assert flow_files.main(command) == 0
    rows = read_annotation(source)
    stored, read = (
        VideoQADataset(rows, videos, num_frames=6, image_size=32, flow=kind, flow_root=out)
        for kind in ("precomputed", "motion_vectors")
    )
    for i in range(2):
        assert stored[i]["flow"].shape[0] == stored[i]["frames"].shape[0]
        assert torch.equal(stored[i]["flow"], read[i]["flow"]), i


@pytest.mark.parametrize("extractor", ["motion_vectors", "dis"])
def test_flow_to_the_next_picture_of_the_file_is_told_apart(videos, tmp_path, extractor, monkeypatch):
    (tmp_path / "a.json").write_text(json.dumps([entry(0)]))
    source, out = str(tmp_path / "a.json"), str(tmp_path / "flow")
    command = [source, out, "--videos", str(videos), "--flow", extractor, "--num-frames", "6", "--size", "32"]
    assert flow_files.main([*command, "--flow-pairs", "local"]) == 0
    rows, made = read_annotation(source), {"num_frames": 6, "image_size": 32, "flow": "precomputed", "flow_root": out}
    stored = VideoQADataset(rows, videos, flow_pairs="local", **made)[0]["flow"]
    monkeypatch.setenv("LAVIS_LSTP_STORE", str(tmp_path / "store"))
    for how in ({"flow_pairs": "local", **made}, {"num_frames": 6, "image_size": 32}):  # frames are kept once for both
        VideoQADataset(rows, videos, store=True, **how)[0]
        assert sum(entry.what == "frames" for entry in Store(tmp_path / "store").entries()) == 1
    if extractor == "motion_vectors":
        read = VideoQADataset(rows, videos, num_frames=6, image_size=32, flow=extractor, flow_pairs="local")
        assert torch.equal(stored, read[0]["flow"])
    else:
        pair = torch.from_numpy(read_pairs(videos / "long.mp4", num=6, size=32))
        assert torch.equal(stored[2], build_flow("dis")(pair[2:3])[0, 0].half())
        after = read_frames(videos / "long.mp4", num=6, size=32).indices[2] + 1
        assert (pair[2, 1].numpy() == read_frames(videos / "long.mp4", indices=[after], size=32).frames[0]).all()
    with pytest.raises(VideoError, match="flow of pairs 'local', expected 'sampled'; set flow_pairs: local"):
        VideoQADataset(rows, videos, **made)[0]
    with pytest.raises(ConfigError, match="made with flow_pairs 'local', not 'sampled'"):
        flow_files.main(command)
    with pytest.raises(ConfigError, match="flow_pairs: local is for flow: motion_vectors"):
        VideoQADataset(rows, videos, flow_pairs="local")


def test_decoding_settings_reach_the_reader(videos, monkeypatch):
    seen = {}
    monkeypatch.setattr(reading, "read_frames", lambda source, **how: seen.update(how) or read_frames(source, **how))
    made = {"num_frames": 3, "image_size": 16, "decode_threads": 2, "decode_size": 32}
    small = VideoQADataset([entry()], videos, **made)
    assert small[0]["frames"].shape == (3, 3, 16, 16)
    assert (seen["threads"], seen["decode_size"], seen["hardware"]) == (2, 32, None)
    whole = VideoQADataset([entry()], videos, num_frames=3, image_size=16, decode_threads=2)
    alike = VideoQADataset([entry()], videos, num_frames=3, image_size=16)
    assert small.fingerprint() != whole.fingerprint() == alike.fingerprint()


@pytest.mark.parametrize(("name", "clip_s"), [("bit_cost", None), ("motion_energy", None), ("bit_cost", [0.4, 0.8])])
def test_a_figure_is_the_mean_of_the_pictures_around_each_frame(videos, name, clip_s):
    sample = VideoQADataset([entry(0, clip_s=clip_s)], videos, num_frames=3, **{name: True})[0]
    path = videos / "long.mp4"
    times_s = packet_costs(path).times_s
    costs = packet_costs(path).num_bytes if name == "bit_cost" else motion_energy(path)
    if clip_s:  # what lies outside says nothing of the clip
        costs = costs[(times_s.round(6) >= clip_s[0]) & (times_s.round(6) < clip_s[1])]
    count = len(costs)
    nearest = [min(range(3), key=lambda part: abs(i - uniform_centres(3, count)[part])) for i in range(count)]
    wanted = [np.mean([cost for cost, near in zip(costs, nearest, strict=True) if near == part]) for part in range(3)]
    assert sample[name].tolist() == pytest.approx(wanted) and sample[name].dtype == torch.float32
    batch = VideoQADataset(
        [entry(0), entry(1, video="short.mp4"), entry(2, video=None, image="still.png")],
        videos,
        num_frames=6,
        image_size=32,
        **{name: True},
    )
    batch = batch.collater([batch[i] for i in range(3)])
    assert batch[name].shape == (3, 6) and (batch[name] > 0).tolist() == batch["frame_mask"].bool().tolist()


def test_videos_are_decoded_once_while_the_cache_holds_them(videos, monkeypatch):
    calls = []

    def counted(source, **kw):
        calls.append(Path(source).name)
        return read_frames(source, **kw)

    monkeypatch.setattr(reading, "read_frames", counted)
    rows = [entry(0), entry(1), entry(2, video="short.mp4"), entry(3)]
    dataset = VideoQADataset(rows, videos, num_frames=4, cache_videos=2)
    batches = [dataset.collater([dataset[i] for i in range(4)]) for _ in range(2)]
    assert calls == ["long.mp4", "short.mp4"]
    batches[0]["frames"].zero_()  # a batch is a copy: what a model does to it does not reach the cache
    assert all(frames.any() for frames in batches[1]["frames"])
    assert dataset[0]["frames"].any()
    calls.clear()
    dataset = VideoQADataset(rows, videos, num_frames=4)
    for i in range(4):
        dataset[i]
    assert len(calls) == 3, "the last video is always kept, and the first two questions are about the same one"


def test_another_run_finds_decoded_frames_in_the_store(videos, tmp_path, monkeypatch):
    """Samples are equal bit by bit, and frames that were read in another way are others."""
    monkeypatch.setenv("LAVIS_LSTP_STORE", str(tmp_path))
    calls = []
    monkeypatch.setattr(reading, "read_frames", lambda source, **how: calls.append(how) or read_frames(source, **how))
    ways = [{}, {"flow": "motion_vectors"}, {"frames": "keyframe"}, {"num_frames": 3}, {"decode_size": 32}]
    rows = [entry(clip_s=None), entry(1, clip_s=[0.2, 0.8])]
    runs = []
    for store in (False, True, True):
        runs.append([VideoQADataset(rows, videos, **{"num_frames": 4, **way}, store=store) for way in ways])
    samples = [[[dataset[0], dataset[1]] for dataset in run] for run in runs[:2]]
    assert len(calls) == 2 * 2 * len(ways)
    samples.append([[dataset[0], dataset[1]] for dataset in runs[2]])
    assert len(calls) == 2 * 2 * len(ways)
    for others in samples[1:]:
        for mine, own in zip(sum(samples[0], []), sum(others, []), strict=True):
            assert all(torch.equal(mine[key], own[key]) for key in mine if torch.is_tensor(mine[key]))
    assert runs[0][0].fingerprint() == runs[1][0].fingerprint()


# ---------------------------------------------------------------- which frames

# long.mp4 has 30 frames at 25 a second, short.mp4 five.
CHOICES = [
    ("long.mp4", {"num_frames": 8, "fps": 5}, [0, 5, 10, 15, 20, 25]),
    ("long.mp4", {"num_frames": 6, "fps": 5}, [0, 5, 10, 15, 20, 25]),
    ("long.mp4", {"num_frames": 5, "fps": 5}, uniform_centres(5, 30)),  # more than fit
    ("long.mp4", {"num_frames": 40, "fps": 10}, [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27]),
    ("long.mp4", {"num_frames": 40, "fps": 100}, list(range(30))),  # no more than there are, each once
    ("long.mp4", {"num_frames": 8, "fps": 100}, uniform_centres(8, 30)),
    ("long.mp4", {"num_frames": 8, "fps": 0.1}, [0]),
    ("long.mp4", {"num_frames": 8, "short_videos": "double"}, uniform_centres(8, 30)),
    ("short.mp4", {"num_frames": 8}, [0, 1, 2, 3, 4]),
    ("short.mp4", {"num_frames": 8, "short_videos": "double"}, [0, 0, 1, 1, 2, 3, 3, 4]),
    ("short.mp4", {"num_frames": 5, "short_videos": "double"}, [0, 1, 2, 3, 4]),
    ("long.mp4", {"num_frames": 4, "fps": 2.5, "short_videos": "double"}, [0, 0, 10, 20]),
]


@pytest.mark.parametrize(("video", "settings", "expected"), CHOICES)
def test_frames_by_rate_and_of_short_videos(videos, video, settings, expected):
    sample = VideoQADataset([entry(video=video)], videos, **settings)[0]
    assert [read_number(frame.numpy()) for frame in sample["frames"]] == expected
    torch.testing.assert_close(sample["frame_times"], torch.tensor(expected) / 25)


def test_doubled_frames_are_the_published_ones(videos):
    sample = VideoQADataset([entry(video="short.mp4")], videos, short_videos="double")[0]
    assert [read_number(frame.numpy()) for frame in sample["frames"]] == sample_indices(32, 5)


def test_frames_by_rate_bring_their_flow(videos):
    flow = VideoQADataset([entry()], videos, num_frames=8, fps=5, image_size=16, flow="motion_vectors")[0]["flow"]
    assert flow.shape == (6, 2, 16, 16)


# ---------------------------------------------------------------- texts


def test_a_text_is_a_sample_without_frames(videos):
    row = entry(0, video=None, video_id="", prompt="USER: hello ASSISTANT: ")
    sample = VideoQADataset([row], videos, image_size=16, flow="motion_vectors", flow_size=8, spans={})[0]
    assert sample["frames"].shape == (0, 3, 16, 16) and sample["frames"].dtype == torch.uint8
    assert sample["frame_times"].shape == (0,) and sample["flow"].shape == (0, 2, 8, 8)
    assert sample["span"].tolist() == sample["gold_span"].tolist() == [-1, -1]
    assert (sample["prompt"], sample["text_input"]) == ("USER: hello ASSISTANT: ", "what is 0?")


def test_every_kind_gives_the_same_keys(videos):
    rows = [entry(0), {**entry(1, video=None), "image": "still.png"}, entry(2, video=None, video_id="")]
    for flow in ("none", "motion_vectors"):
        dataset = VideoQADataset(rows, videos, num_frames=4, image_size=16, flow=flow)
        video, image, text = (dataset[i] for i in range(3))
        assert list(video) == list(image) == list(text) and ("flow" in video) == (flow != "none")
        assert [sample["prompt"] for sample in (video, image, text)] == [""] * 3
        batch = dataset.collater([text, image, video])
        assert batch["frame_mask"].tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
        assert not batch["frames"][0].any()
        alone = dataset.collater([text])
        assert alone["frames"].shape == (1, 1, 3, 16, 16) and alone["frame_mask"].tolist() == [[0]]


def test_samples_of_different_sizes_are_named(videos):
    dataset = VideoQADataset([entry(0), {**entry(1, video=None), "image": "still.png"}], videos, num_frames=2)
    with pytest.raises(ConfigError, match=r"'frames' of question 'q0' is \[2, 3, 96, 160\], of 'q1' .*image_size"):
        dataset.collater([dataset[0], dataset[1]])


# ---------------------------------------------------------------- pseudo spans


def spans_file(path: Path, **changes) -> Path:
    content = {
        "format": "lavis_lstp.spans",
        "version": 1,
        "unit": "frames",
        "num_frames": 8,
        "made_by": {},
        "spans": {"q0": {"span": [2, 5], "scores": [0.0] * 8}},
    }
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")
    return path


def test_spans_reach_the_sample(videos, tmp_path):
    spans = read_spans(spans_file(tmp_path / "s.json"), 8)
    assert spans == {"q0": Span(2, 5)}
    assert VideoQADataset([entry(0)], videos, num_frames=8, spans=spans)[0]["span"].tolist() == [2, 5]
    with pytest.raises(AnnotationError, match="no span for 1 of 2 questions, first 'q1'"):
        VideoQADataset([entry(0), entry(1)], videos, num_frames=8, spans=spans)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_frames": 16}, "spans count 16 frames per video, datasets.<name>.num_frames is 8"),
        ({"format": "other"}, "expected format 'lavis_lstp.spans' version 1"),
        ({"version": 2}, "expected format 'lavis_lstp.spans' version 1"),
        ({"spans": {"q0": {"span": [5, 5]}}}, "'q0' must have span"),
        ({"spans": {"q0": {"span": [2, 9]}}}, "'q0' must have span"),
        ({"spans": {"q0": {"span": [0.2, 0.5]}}}, "'q0' must have span"),
        ({"spans": {"q0": [2, 5]}}, "'q0' must have span"),
        ({"spans": {"q0": {}}}, "'q0' must have span"),
        ({"fps": 2}, "spans were made with fps 2, datasets.<name>.fps is None"),
        ({"short_videos": "double"}, "spans were made with short_videos double, datasets.<name>.short_videos is keep"),
        ({"spans": [1]}, "'spans' must be an object"),
    ],
)
def test_what_is_wrong_with_a_span_file(tmp_path, changes, said):
    path = spans_file(tmp_path / "s.json", **changes)
    with pytest.raises(AnnotationError) as error:
        read_spans(path, 8)
    assert str(path) in str(error.value) and said in str(error.value)


def test_what_does_not_move_has_no_span(videos, tmp_path):
    spans = read_spans(spans_file(tmp_path / "s.json", spans={"q0": {"span": None, "scores": []}}), 8)
    rows = [entry(0), {**entry(1, video=None), "image": "still.png"}]
    dataset = VideoQADataset(rows, videos, num_frames=8, spans=spans)  # a picture needs no entry
    assert [dataset[i]["span"].tolist() for i in range(2)] == [[-1, -1], [-1, -1]]
    assert dataset.fingerprint() != VideoQADataset(rows, videos, num_frames=8).fingerprint()


def test_a_span_beyond_the_video_is_refused(videos):
    dataset = VideoQADataset([entry(video="short.mp4")], videos, num_frames=8, spans={"q0": Span(2, 7)})
    with pytest.raises(AnnotationError, match=r"'q0' has the span \[2, 7\], its video gives 5 frames"):
        dataset[0]


def test_published_spans_equal_published(videos, tmp_path):
    """The recorded pairs of start and end, for 32 frames; the one whose start is behind its end is no span."""
    cases = json.loads((GOLDEN / "prompts.json").read_text())["iv"]
    cases = [(case["pseudo_label"], case["out"]) for case in cases if "pseudo_label" in case]
    path = tmp_path / "pseudo_label.json"
    for label, out in cases:
        path.write_text(json.dumps({"q0": label}))
        spans = read_spans(path, 32, form="fractions")
        sample = VideoQADataset([entry(video="short.mp4")], videos, short_videos="double", spans=spans)[0]
        if label[0] > label[1]:
            assert sample["span"].tolist() == [-1, -1] and sample["no_moment"] == 1
            continue
        assert Span(*sample["span"].tolist()).to_inclusive() == (out["start"], out["end"])
    assert len(cases) == 4


@pytest.mark.parametrize(
    ("form", "rows"), [("fractions", [[0.9, 0.1], [0.1, 0.9], [1, 0]]), ("indices", [[9, 1], [1, 9], [31, 0]])]
)
def test_reversed_rows_of_a_published_file_are_no_spans_and_counted(videos, tmp_path, caplog, form, rows):
    path = tmp_path / "pseudo_label.json"
    path.write_text(json.dumps({f"q{i}": row for i, row in enumerate(rows)}))
    with caplog.at_level("WARNING"):
        spans = read_spans(path, 32, form=form)
    line = f"2 of 3 spans end before they begin, and are read as no span, first that of question 'q0': {rows[0]}"
    assert [record.getMessage() for record in caplog.records] == [f"{path}: {line}"]
    assert spans["q0"] is spans["q2"] is None and spans["q1"] is not None
    dataset = VideoQADataset([entry(i) for i in range(3)], videos, num_frames=30, spans=spans)
    batch = dataset.collater([dataset[i] for i in range(3)])
    assert batch["no_moment"].tolist() == [1, 0, 1] and batch["span"][0].tolist() == [-1, -1]
    assert "no_moment" not in dataset.collater([dataset[1]])
    gold = VideoQADataset([entry(3, span_s=[0.1, 0.6])], videos, num_frames=30, spans="gold", span_weight=2)
    both = JoinedDataset({"pseudo": dataset, "gold": gold})
    batch = both.collater([both[0], both[3]])
    assert batch["no_moment"].tolist() == [1, 0] and batch["span_weight"].tolist() == [1, 2]
    assert batch["span"][1].tolist() == batch["gold_span"][1].tolist() != [-1, -1]


def test_published_spans_go_there_and_back(tmp_path):
    every = [Span(a, b) for a in range(32) for b in range(a + 1, 33)]
    path = tmp_path / "pseudo_label.json"
    path.write_text(json.dumps({str(i): span.to_inclusive() for i, span in enumerate(every)}))
    indices = read_spans(path, 32, form="indices")
    path.write_text(json.dumps({str(i): span.to_fractions(32) for i, span in enumerate(every)}))
    fractions = read_spans(path, 32, form="fractions")
    assert indices == fractions and len(indices) == 528
    assert [Span.from_fractions(*indices[str(i)], 32) for i in range(528)] == every
    for length in (1, 2, 5, 20):
        spans = [Span(a, b) for a in range(length) for b in range(a + 1, length + 1)]
        assert [Span.from_fractions(*span.to_fractions(length), length) for span in spans] == spans


@pytest.mark.parametrize(
    ("content", "form", "said"),
    [
        ({"q0": [0.25, 0.75]}, "indices", "whole numbers of 0..31 as datasets.<name>.spans_form 'indices' says"),
        ({"q0": [7, 23]}, "fractions", "numbers of 0..1 as datasets.<name>.spans_form 'fractions' says, got [7, 23]"),
        ({"q0": [0, 32]}, "indices", "whole numbers of 0..31"),
        ({"q0": [5, -4]}, "indices", "whole numbers of 0..31"),
        ({"q0": [1.5, 0.1]}, "fractions", "numbers of 0..1"),
        ({"q0": [0, True]}, "indices", "whole numbers of 0..31"),
        ({"q0": {"span": [0, 1]}}, "indices", "must have [first, last]"),
        ([[0, 1]], "fractions", "expected {question id: [first, last]}, got list"),
        ({"format": "lavis_lstp.spans", "version": 1}, "indices", "is of the form 'lavis_lstp'"),
        ({"q0": [0, 1]}, "lavis_lstp", "files of the published code need datasets.<name>.spans_form"),
        ({"q0": [0, 1]}, "fraction", "unknown datasets.<name>.spans_form 'fraction'; did you mean 'fractions'?"),
    ],
)
def test_forms_of_span_files_are_never_guessed(tmp_path, content, form, said):
    path = tmp_path / "pseudo_label.json"
    path.write_text(json.dumps(content))
    with pytest.raises((AnnotationError, ConfigError)) as error:
        read_spans(path, 32, form=form)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_missing_span_file_says_how_to_make_it(tmp_path):
    with pytest.raises(AnnotationError, match="run.task=pseudo_span"):
        read_spans(tmp_path / "gone.json", 8)


# ---------------------------------------------------------------- batches


def test_batches_are_padded_and_masked(videos):
    rows = [entry(0), entry(1, video="short.mp4"), {**entry(2, video=None), "image": "still.png"}]
    dataset = VideoQADataset(rows, videos, num_frames=8, image_size=16, flow="motion_vectors")
    batch = next(iter(DataLoader(dataset, batch_size=3, collate_fn=dataset.collater)))
    assert batch["frames"].shape == (3, 8, 3, 16, 16) and batch["flow"].shape == (3, 8, 2, 16, 16)
    assert batch["frame_mask"].tolist() == [[1] * 8, [1] * 5 + [0] * 3, [1] + [0] * 7]
    assert not batch["frames"][1, 5:].any() and not batch["frame_times"][1, 5:].any()
    assert batch["span"].dtype == torch.int64 and batch["span"].shape == (3, 2)
    assert batch["question_id"] == ["q0", "q1", "q2"] and isinstance(batch["text_output"], list)


def test_workers_give_the_same_batches(videos):
    dataset = VideoQADataset(
        [entry(i, video=name) for i, name in enumerate(["long.mp4", "short.mp4"] * 2)],
        videos,
        num_frames=4,
        cache_videos=2,
    )
    dataset[0]
    copy = pickle.loads(pickle.dumps(dataset))  # a warm cache does not keep a data set from a spawned worker
    assert torch.equal(copy[1]["frames"], dataset[1]["frames"])
    here, there = (list(DataLoader(dataset, batch_size=2, num_workers=n, collate_fn=dataset.collater)) for n in (0, 2))
    assert [b["question_id"] for b in here] == [b["question_id"] for b in there]
    assert all(torch.equal(a["frames"], b["frames"]) for a, b in zip(here, there, strict=True))


def test_workers_count_what_they_leave_out_together(videos):
    rows = [entry(0), *(entry(i, video="broken.mp4") for i in (1, 2, 3))]
    dataset = VideoQADataset(rows, videos, num_frames=2, max_bad_fraction=0.5)
    loader = Batches(dataset, seed=0, num_workers=2)
    said = []
    try:
        list(loader([(0,), (1,), (2,), (3,)]))
    except VideoError as error:
        said.append(str(error))
    assert "3 of 4 questions cannot be read" in said[0]  # no worker has seen more than two
    assert "Traceback" not in said[0] and "\n" not in said[0]
    workers = multiprocessing.active_children()
    del loader
    gc.collect()
    for worker in workers:
        worker.join(60)
    ends = [worker.exitcode for worker in workers]
    assert ends == [0, 0], "each hears that it is over; torch ends others by a signal, after 5 s"


def test_fingerprint_tells_contents_and_settings_apart(videos):
    def made(rows=None, **kw) -> str:
        return VideoQADataset(rows or [entry(0)], videos, **{"num_frames": 4, **kw}).fingerprint()

    assert made() == made()
    others = [
        made([entry(0, answer="blue")]),
        made([entry(0), entry(1)]),
        made(num_frames=5),
        made(image_size=8),
        made(fps=2),
        made(short_videos="double"),
        made(flow="motion_vectors"),
        made(spans={"q0": Span(0, 1)}),
    ]
    assert len({made(), *others}) == 9


# ---------------------------------------------------------------- what can be wrong with the videos


def test_a_missing_video_is_named_before_anything_runs(videos):
    with pytest.raises(VideoError) as error:
        VideoQADataset([entry(0), entry(1, video="gone.mp4"), entry(2, video="lost.mp4")], videos)
    assert "gone.mp4: no such file" in str(error.value) and "'q1'" in str(error.value)


@pytest.mark.parametrize("name", ["../long.mp4", "/etc/hostname", "a/../../long.mp4"])
def test_paths_stay_in_their_folder(videos, name):
    with pytest.raises(AnnotationError, match="'q0'.*is absolute or leads out of .*; write it relative to this folder"):
        VideoQADataset([entry(0, video=name)], videos)


def test_a_folder_may_hold_links(videos, tmp_path):
    (tmp_path / "linked.mp4").symlink_to(videos / "long.mp4")
    assert len(VideoQADataset([entry(0, video="linked.mp4")], tmp_path, num_frames=2)[0]["frames"]) == 2


def test_an_unreadable_video_stops_the_run_and_is_named(videos):
    dataset = VideoQADataset([entry(0), entry(1, video="broken.mp4")], videos, num_frames=2)
    with pytest.raises(VideoError, match=r"'q1': .*broken\.mp4.*max_bad_fraction allows 0"):
        dataset[1]


def test_a_few_unreadable_ones_are_left_out_and_never_replaced(videos, caplog):
    rows = [entry(i) for i in range(4)] + [entry(4, video="broken.mp4"), entry(5, video="broken.mp4")]
    dataset = VideoQADataset(rows, videos, num_frames=2, max_bad_fraction=0.2)
    with caplog.at_level(logging.WARNING):
        batch = dataset.collater([dataset[i] for i in (0, 4, 1)])
        assert dataset[4] is None  # the second epoch does not count it again
    assert batch["question_id"] == ["q0", "q1"] and batch["frames"].shape[0] == 2
    assert [r.message for r in caplog.records if "left out" in r.message] == [caplog.records[0].message]
    assert "'q4'" in caplog.text and "broken.mp4" in caplog.text
    assert dataset.collater([None, None]) is None
    with pytest.raises(VideoError, match="2 of 6 questions cannot be read"):
        dataset[5]


def test_no_score_over_what_is_left(videos):
    rows = [entry(0), entry(1), entry(2, video="broken.mp4")]
    dataset = VideoQADataset(rows, videos, num_frames=2, max_bad_fraction=0.5)
    batch = dataset.collater([dataset[i] for i in range(3)])
    answered = dict.fromkeys(batch["question_id"], "grey")
    expected = dict.fromkeys(dataset.question_ids(), "grey")
    with pytest.raises(CoverageError, match=r"2 of 3 questions have a prediction; 1 ids \('q2'\) missing"):
        join_by_id(answered, expected)
    *_, report = join_by_id(answered, expected, allow_partial=True)
    assert report["partial"] and report["coverage"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"flow": "motion_vector"}, "did you mean 'motion_vectors'"),
        ({"flow": "precomputed"}, "needs flow_root"),
        ({"num_frames": 0}, "num_frames must be a whole number of at least 1 and at most 1000000, got 0"),
        ({"num_frames": "many"}, "num_frames must be a whole number of at least 1 and at most 1000000, got 'many'"),
        ({"image_size": 0}, "image_size"),
        ({"cache_videos": -1}, "cache_videos"),
        ({"max_bad_fraction": 2}, "max_bad_fraction must be a number of at least 0 and at most 1, got 2"),
        ({"fps": 0}, "fps must be a number above 0 or null, got 0"),
        ({"fps": "fast"}, "fps must be a number above 0 or null, got 'fast'"),
        ({"fps": 2, "flow": "precomputed", "flow_root": "x"}, "fps does not go with flow: precomputed"),
        ({"short_videos": "doubled"}, "unknown datasets.<name>.short_videos 'doubled'; did you mean 'double'?"),
        ({"short_videos": "double", "flow": "motion_vectors"}, "does not go with flow: motion_vectors"),
        ({"flow": "precomputed", "flow_root": "x", "image_size": 16}, "precomputed needs flow_size"),
        ({}, "image_size is needed for texts"),
        ({"image_size": 16, "vis_processor": str}, "vis_processor: a text has no picture"),
    ],
)
def test_settings_out_of_range(videos, settings, said):
    with pytest.raises(ConfigError) as error:
        VideoQADataset([entry(0), entry(1, video=None, video_id="")], videos, **settings)
    assert said in str(error.value)


# ---------------------------------------------------------------- builders


def test_builder_of_shapes_generates_what_is_missing(build, shapes, tmp_path):
    sizes = {"num_frames": 64, "image_size": 64, "flow_size": 16}
    found = build("lstp_shapes", root=str(tmp_path / "new"), generate=SHAPES, **sizes)
    assert {split: len(dataset) for split, dataset in found.items()} == {
        "train": 12,
        "val": 6,
        "test": 18,
        "train_images": 6,
    }
    again = build("lstp_shapes", root=str(shapes), generate=SHAPES, **sizes)
    assert again["test"].fingerprint() == found["test"].fingerprint()  # made elsewhere from the same seed
    batch = again["test"].collater([again["test"][0], again["train_images"][0]])
    assert batch["frames"].shape == (2, 64, 3, 64, 64) and batch["flow"].shape == (2, 64, 2, 16, 16)
    with pytest.raises(ConfigError, match="seed: there 0, wanted 1"):
        build("lstp_shapes", root=str(shapes), generate={**SHAPES, "seed": 1})
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"datasets\.lstp_shapes\.root: cannot write"):
        build("lstp_shapes", root=str(tmp_path / "file" / "x"), generate=SHAPES)


def test_builder_of_ones_own_videos(build, videos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps([entry(0)]))
    (tmp_path / "b.jsonl").write_text(json.dumps(entry(1, video="short.mp4")))
    (tmp_path / "double.json").write_text(json.dumps([entry(0)]))
    spans = spans_file(tmp_path / "s.json")
    (tmp_path / "videos").symlink_to(videos)

    def own(annotations, folder="videos", **changes):
        info = {"annotations": annotations, "videos": {"storage": folder}}
        return build("lstp_video_qa", build_info=info, **{"num_frames": 8, "image_size": 16, **changes})

    train = {"train": {"storage": ["a.json", "b.jsonl"]}, "unseen": {"storage": "b.jsonl"}}
    found = own(train)
    assert {split: data.question_ids() for split, data in found.items()} == {"train": ["q0", "q1"], "unseen": ["q1"]}
    assert own({"train": {"storage": "a.json"}, "val": {"storage": "b.jsonl"}}, spans=str(spans))["train"][0][
        "span"
    ].tolist() == [2, 5]
    processed = own(train, vis_processor={"train": {"name": "blip_image_eval", "image_size": 32}})
    assert processed["train"][0]["image"].shape == (3, 32, 32)

    def refused(kind, annotations, said, folder="videos", **changes):
        with pytest.raises(kind) as error:
            own(annotations, folder, **changes)
        assert said in str(error.value) and "\n" not in str(error.value)
        assert "<name>" not in str(error.value)

    here = "datasets.lstp_video_qa"
    refused(ConfigError, {}, f"{here}.build_info.annotations names no file")
    refused(ConfigError, {"train": {"storage": 3}}, f"{here}.build_info.annotations.train.storage must be a file")
    refused(ConfigError, {"train": {}}, "names no file")
    refused(AnnotationError, {"train": {"storage": "gone.json"}}, "gone.json: no such annotation file")
    refused(AnnotationError, {"train": {"storage": "gone.json"}}, f"({here}.build_info.annotations)")
    refused(AnnotationError, {"train": {"storage": ["a.json", "double.json"]}}, "'q0' occurs 2 times")
    refused(ConfigError, train, f"{here}.build_info.videos.storage: no such folder: nowhere", folder="nowhere")
    refused(AnnotationError, train, f"{here}.spans has no span for 1 of 2 questions", spans=str(spans))
    refused(AnnotationError, train, f"({here}.spans)", spans="gone.json")
    refused(AnnotationError, train, f"{here}.num_frames is 4", spans=str(spans), num_frames=4)
    refused(ConfigError, train, f"{here}.cache_videos must be", cache_videos=-1)
    refused(ConfigError, train, f"unknown {here}.flow 'dis'", flow="dis")


@pytest.mark.parametrize("train, evaluate", [("blip2_image_train", "blip_image_eval"), ("blip_image_train", None)])
def test_laviss_own_processors_by_split(build, shapes, train, evaluate):
    """A split whose kind has no processor gives no `image`."""
    processors = {"train": {"name": train, "image_size": 32}}
    if evaluate:
        processors["eval"] = {"name": evaluate, "image_size": 48}
    found = build("lstp_shapes", root=str(shapes), generate=SHAPES, num_frames=4, vis_processor=processors)
    image = found["train"][0]["image"]
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32
    assert found["train_images"][0]["image"].shape == (3, 32, 32)
    sample = found["test"][0]
    assert ("image" in sample) == bool(evaluate)
    if evaluate:
        assert sample["image"].shape == (3, 48, 48)
        assert torch.equal(sample["image"], found["test"][0]["image"])


def test_one_video_id_for_two_files(tmp_path):
    """Flow files and decoded videos go by the id: one of the two would silently get the other's."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.mp4").touch()
    rows = [{"question_id": f, "video": f"{f}/same.mp4", "question": "?", "answer": ""} for f in "ab"]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(AnnotationError, match="'same' names two files, 'a/same.mp4' and 'b/same.mp4'"):
        VideoQADataset(read_annotation(tmp_path / "rows.json"), tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps([{**row, "video_id": row["question_id"]} for row in rows]))
    assert len(VideoQADataset(read_annotation(tmp_path / "rows.json"), tmp_path)) == 2


@pytest.mark.parametrize("lines", [False, True], ids=["list", "lines"])
def test_what_is_wrong_with_a_row_names_annotation_and_row(lines, tmp_path):
    folder = tmp_path / "media"
    folder.mkdir()
    (folder / "bad.mp4").write_bytes(b"no video")
    numbered_video(folder / "good.mp4", 9)
    names = ("good", "bad", "good")
    rows = [
        {"question_id": f"q{n}", "video": f"{name}.mp4", "question": "q", "answer": "a"} for n, name in enumerate(names)
    ]
    rows[2]["clip_s"] = [100, 200]
    text = "\n\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    (tmp_path / "a.json").write_text(text)
    stands = [f"{tmp_path / 'a.json'}, {f'line {2 * n + 1}' if lines else f'entry {n}'}" for n in range(3)]
    data = VideoQADataset(read_annotation(tmp_path / "a.json"), folder, num_frames=2, image_size=16)
    for number in (1, 2):
        with pytest.raises(VideoError, match=re.escape(f"question 'q{number}' ({stands[number]}): ")):
            data[number]
    quarantine = tmp_path / "bad.jsonl"
    some = {"num_frames": 2, "image_size": 16, "max_bad_fraction": 1.0, "quarantine": quarantine}
    data = pickle.loads(pickle.dumps(VideoQADataset(read_annotation(tmp_path / "a.json"), folder, **some)))
    assert data[0] is not None and data[1] is None and data[2] is None
    assert [json.loads(line)["annotation"] for line in quarantine.read_text().splitlines()] == stands[1:]
    rows[1]["video"] = "gone.mp4"
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with pytest.raises(VideoError, match=r"needed by question 'q1' \(.*a.json, entry 1\); 1 of 2 files"):
        VideoQADataset(read_annotation(tmp_path / "a.json"), folder)


def test_flow_of_a_folder_with_equal_stems_is_found_by_whole_names(tmp_path, caplog):
    """`lavis-lstp flow FOLDER` names a.mp4 and a.gif apart; an annotation without video_id calls both "a"."""
    folder, out = tmp_path / "media", tmp_path / "flow"
    folder.mkdir()
    numbered_video(folder / "a.mp4", 9, width=32, height=32)
    pictures = [Image.new("L", (32, 32), 20 * n) for n in range(9)]
    pictures[0].save(folder / "a.gif", save_all=True, append_images=pictures[1:], duration=100)
    assert flow_files.main([str(folder), str(out), "--num-frames", "4", "--size", "16"]) == 0
    assert sorted(path.name for path in out.glob("*.safetensors")) == ["a.gif.safetensors", "a.mp4.safetensors"]
    some = {"num_frames": 4, "image_size": 16, "flow": "precomputed", "flow_root": out}
    flows = []
    for name in ("a.mp4", "a.gif"):
        (tmp_path / "a.json").write_text(
            json.dumps([{"question_id": "1", "video": name, "question": "q", "answer": "a"}])
        )
        data = VideoQADataset(read_annotation(tmp_path / "a.json"), folder, **some)
        assert torch.equal(data[0]["flow"], torch.from_numpy(load_file(out / f"{name}.safetensors")["flow"]))
        flows.append(data[0]["flow"])
    assert not torch.equal(*flows)
    rows = [{"question_id": n, "video": n, "question": "q", "answer": "a"} for n in ("a.mp4", "a.gif")]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with pytest.raises(AnnotationError, match=r"entry 1\): video_id 'a' names two files, .*give each an id"):
        VideoQADataset(read_annotation(tmp_path / "a.json"), folder, **some)
