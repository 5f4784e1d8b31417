"""Questions about a part of a video, with options, about a folder of pictures, or about a file that is not there."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from video_files import numbered_picture, numbered_video, read_number

from lavis_lstp.data.annotation import read_annotation
from lavis_lstp.data.qa_dataset import VideoQADataset
from lavis_lstp.data.video.reading import read_frames
from lavis_lstp.errors import AnnotationError, ConfigError, VideoError
from lavis_lstp.tasks.temporal_grounding import TemporalGroundingTask


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """long.mp4: 30 numbered frames, 10 a second; pictures/: 9 numbered frames, 3 a second."""
    root = tmp_path_factory.mktemp("videos")
    numbered_video(root / "long.mp4", 30, fps=10)
    (root / "pictures").mkdir()
    for number in range(9):
        Image.fromarray(numbered_picture(number)).save(root / "pictures" / f"{number + 1:05d}.png")
    (root / "pictures" / "notes.txt").write_text("no picture")
    return root


def row(number: int, **changes) -> dict:
    given = {"question_id": f"q{number}", "video": "long.mp4", "question": "what?", "answer": "it", **changes}
    return {**given, "video_id": Path(given["video"]).stem}


def numbers(sample: dict) -> list[int]:
    return [read_number(frame) for frame in sample["frames"].numpy()]


@pytest.mark.parametrize(
    ("clip", "frames", "numbered"),
    [
        ([1.0, 2.0], 5, [10, 12, 14, 16, 18]),
        ([1.0, 1.3], 5, [10, 11, 12]),  # fewer than asked for: each once
        ([2.9, 3.9], 2, [29]),  # ends behind the video
        ([1.01, 1.02], 2, [10]),  # between two frames: the nearest
    ],
)
def test_frames_come_from_the_clip_alone_and_say_their_time_in_the_video(videos, clip, frames, numbered):
    sample = VideoQADataset([row(0, clip_s=clip)], videos, num_frames=frames)[0]
    assert numbers(sample) == numbered
    assert sample["frame_times"].tolist() == pytest.approx([number / 10 for number in numbered], abs=1e-4)


class UpToTheLastFrame(torch.nn.Module):
    def locate(self, samples):
        spans = [(1, int(count)) for count in samples["frame_mask"].sum(1)]
        return {"span": torch.tensor(spans), "spans": [[span] for span in spans]}


def test_the_last_frame_ends_with_the_video_or_the_clip(videos, tmp_path):
    rows = [row(0), row(1, clip_s=[1.0, 2.0]), row(2, clip_s=[2.0, 3.4]), row(3, video="pictures")]
    dataset = VideoQADataset(rows, videos, num_frames=4, image_size=32)
    ends_s = [3.0, 2.0, 3.0, 3.0]
    batch = dataset.collater([dataset[i] for i in range(4)])
    assert batch["end_s"] == pytest.approx(ends_s)
    records = TemporalGroundingTask().valid_step(UpToTheLastFrame(), batch)
    assert [record["span_s"][1] for record in records] == ends_s
    assert [record["spans_s"] for record in records] == [[record["span_s"]] for record in records]
    # an old shard of frames does not say how long its video is: the last lasts as long as the one before
    (record,) = TemporalGroundingTask().valid_step(
        UpToTheLastFrame(), dataset.collater([{**dataset[0], "end_s": None}])
    )
    times = dataset[0]["frame_times"]
    assert record["span_s"][1] == pytest.approx(float(2 * times[-1] - times[-2]), abs=1e-3)


def test_fps_counts_within_the_clip(videos):
    sample = VideoQADataset([row(0, clip_s=[1.0, 2.0])], videos, num_frames=8, fps=5)[0]
    assert numbers(sample) == [10, 12, 14, 16, 18]


def test_a_folder_of_pictures_is_a_video_at_three_a_second(videos):
    whole = VideoQADataset([row(0, video="pictures")], videos, num_frames=3, image_size=64)[0]
    assert numbers(whole) == [1, 4, 7] and whole["frames"].shape == (3, 3, 64, 64)
    assert whole["frame_times"].tolist() == pytest.approx([1 / 3, 4 / 3, 7 / 3])
    clip = VideoQADataset([row(0, video="pictures", clip_s=[1.0, 2.0])], videos, num_frames=3)[0]
    assert numbers(clip) == [3, 4, 5]
    with pytest.raises(ConfigError, match="pictures have no motion vectors"):
        read_frames(videos / "pictures", num=2, motion_vectors=True)
    (videos / "empty").mkdir(exist_ok=True)
    with pytest.raises(VideoError, match="a folder without pictures"):
        read_frames(videos / "empty", num=2)


def test_questions_about_the_same_frames_are_grouped_and_short_ones_come_first(videos):
    rows = [
        row(0, question="which one of these?", options=["it", "that"]),
        row(1, clip_s=[1, 2]),
        row(2),
        row(3, video="pictures"),
        row(4, clip_s=[1, 2], question="who?"),
        row(5, clip_s=[1, 3]),
    ]
    dataset = VideoQADataset(rows, videos, num_frames=2, image_size=32)
    assert dataset.eval_groups() == [[4, 1], [3], [5], [2, 0]]
    media = [dataset[i]["media"] for i in range(6)]
    assert media[0] == media[2] != media[1] == media[4] and len(set(media)) == 4
    batch = dataset.collater([dataset[0], dataset[2]])
    assert batch["options"] == [["it", "that"], []] and batch["text_output"] == ["it", "it"]


def test_an_unknown_answer_is_empty_for_training_and_none_for_scores(videos):
    sample = VideoQADataset([row(0, answer=None)], videos, num_frames=2)[0]
    assert (sample["text_output"], sample["answer"]) == ("", None)


def test_precomputed_flow_is_not_of_clips(videos, tmp_path):
    with pytest.raises(ConfigError, match="precomputed is of whole videos"):
        VideoQADataset([row(0, clip_s=[1, 2])], videos, num_frames=2, flow="precomputed", flow_root=tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"clip_s": [2, 1]}, "'clip_s' must be"),
        ({"options": []}, "'options' must be 1 or more texts"),
        ({"options": ["it", *map(str, range(26))]}, "'options' must be 26 at most, one a letter, got 27"),
        ({"options": ["this", "that"]}, "the answer 'it' is none of the options"),
    ],
)
def test_mistakes_in_clips_and_options_are_named(tmp_path, changes, said):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([row(0, **changes)]))
    with pytest.raises(AnnotationError, match=said) as caught:
        read_annotation(path)
    assert "entry 0" in str(caught.value)


def test_missing_files_are_listed_and_stay_open_up_to_the_share_allowed(videos, caplog):
    rows = [row(0), row(1, video="gone.mp4"), row(2, video="gone.mp4"), row(3)]
    with pytest.raises(VideoError, match="gone.mp4: no such file, needed by question 'q1'.*max_bad_fraction"):
        VideoQADataset(rows, videos, num_frames=2, max_bad_fraction=0.4)
    with caplog.at_level(logging.WARNING):
        dataset = VideoQADataset(rows, videos, num_frames=2, max_bad_fraction=0.5)
    assert "1 of 2 files are missing, 2 questions about them stay open" in caplog.text and "gone.mp4" in caplog.text
    samples = [dataset[i] for i in range(4)]
    assert [sample is None for sample in samples] == [False, True, True, False]
    assert dataset.collater(samples)["question_id"] == ["q0", "q3"]


def test_the_last_frame_of_a_clip_is_before_its_end(videos):
    found = read_frames(videos / "long.mp4", num=100, between_s=(0.5, 1.0))
    assert found.indices == [5, 6, 7, 8, 9] and np.allclose(found.times_s, [0.5, 0.6, 0.7, 0.8, 0.9])
