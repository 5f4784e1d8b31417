"""Data sets over shards give what files give; each sample once for any ranks and workers; what fails is named."""

from __future__ import annotations

import io
import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_wds_flow import flow_of, moving, shards_of  # noqa: F401 (a fixture)
from test_wds_order import WORLDS
from test_wds_verify import media, only, packed, rewritten  # noqa: F401 (a fixture)

from lavis_lstp.data.annotation import read_annotation
from lavis_lstp.data.qa_dataset import VideoQADataset
from lavis_lstp.data.shards import index, sets
from lavis_lstp.data.shards.questions import ShardQuestions, is_shards, unpack_frames
from lavis_lstp.errors import AnnotationError, ConfigError, ShardError, VideoError
from lavis_lstp.runners.data_order import Batches, Sampling, TrainOrder
from webdataset_tools.pack import Settings

COMMON = {"num_frames": 4, "image_size": 32}


def of_files(media, **options) -> VideoQADataset:  # noqa: F811
    return VideoQADataset(read_annotation(media / "a.json"), media, **COMMON | options)


def of_shards(places, /, *, questions: dict | None = None, **options) -> VideoQADataset:
    return VideoQADataset(ShardQuestions(places, **questions or {}), **COMMON | options)


def assert_same(one, other) -> None:
    """Equal but for where they come from."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        if key == "media":
            continue
        same = torch.equal(value, other[key]) if torch.is_tensor(value) else value == other[key]
        assert same, (key, value, other[key])


# ---------------------------------------------------------------- samples


def test_storages_that_name_shards():
    assert is_shards("a-{000..003}.tar") and is_shards(["a.tar", "b.tar"]) and is_shards("https://h/a.tar?token=1")
    assert (
        is_shards("pipe:cat a")
        and not is_shards("train.json")
        and not is_shards(["train.json"])
        and not is_shards(None)
    )


@pytest.mark.parametrize("flow", ["none", "motion_vectors"])
def test_shards_give_the_samples_of_the_files(media, tmp_path, flow):  # noqa: F811
    files = of_files(media, flow=flow)
    shards = of_shards(packed(media, tmp_path, max_count=3), flow=flow)
    assert len(shards) == len(files) and shards.question_ids() == files.question_ids()
    for number in range(len(files)):
        assert_same(shards[number], files[number])
    assert [row["question"] for row in shards.annotation] == [row["question"] for row in files.annotation]
    assert shards.eval_groups() == files.eval_groups()
    again = pickle.loads(pickle.dumps(shards))
    assert_same(again[2], files[2])


def test_the_fingerprint_is_of_the_content(media, tmp_path):  # noqa: F811
    one = of_shards(packed(media, tmp_path / "a", max_count=3))
    assert one.fingerprint() == of_shards(packed(media, tmp_path / "b", max_count=3)).fingerprint()
    assert one.fingerprint() != of_shards(packed(media, tmp_path / "c", shuffle=1)).fingerprint()


def test_kinds_are_separated(moving, tmp_path):  # noqa: F811
    shards = shards_of(moving, tmp_path, max_count=1)
    videos = ShardQuestions(shards, kind="video")
    assert videos.question_ids() == ["q0", "q1"] and videos.blocks == [1, 2, 2] and videos.kinds == {"video"}
    texts = ShardQuestions(shards, kind="text")
    assert texts.question_ids() == ["t"] and texts.question_id(0) == "t"
    row = texts[0]
    assert row["prompt"] == "USER: <video>\nwhat?  ASSISTANT: " and row["answer"] == "that"
    mixed = VideoQADataset(ShardQuestions(shards), **COMMON)
    assert [len(mixed[n]["frames"]) for n in range(3)] == [4, 4, 0]
    with pytest.raises(AnnotationError, match="no question of the kind 'image'"):
        ShardQuestions(shards, kind="image")


def test_stored_frames_are_those_of_the_video(media, tmp_path):  # noqa: F811
    stored = packed(media, tmp_path, settings=Settings(frames=4, size=32, quality=98))
    files, shards = of_files(media), of_shards(stored)
    for number in range(3):
        one, other = files[number], shards[number]
        assert (one["frames"].int() - other["frames"].int()).abs().float().mean() < 3
        assert_same({**one, "frames": 0}, {**other, "frames": 0})
        assert one["end_s"] > one["frame_times"][-1]
    unseen = packed(media, tmp_path / "unseen", settings=Settings(frames=4, size=32, probe=False))
    assert of_shards(unseen)[0]["end_s"] is None, "nobody looked how long the video is"
    for key, value in (("num_frames", 5), ("image_size", 16), ("short_videos", "double"), ("fps", 2.0)):
        with pytest.raises(ConfigError, match=f"stored with {key}"):
            of_shards(stored, **{key: value})[0]
    with pytest.raises(ConfigError, match="motion_vectors needs the video"):
        of_shards(stored, flow="motion_vectors")[0]


@pytest.mark.parametrize("encoding", ["jpeg", "webp"])
def test_stored_frames_are_decoded_as_pil_does(media, tmp_path, encoding):  # noqa: F811
    (shard,) = packed(media, tmp_path, settings=Settings(frames=3, size=24, encoding=encoding))
    questions = ShardQuestions([shard])
    stored = questions.frames((0, 0))
    wanted = [np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")).transpose(2, 0, 1) for raw in stored.pictures]
    assert np.array_equal(of_shards([shard], num_frames=3, image_size=24)[0]["frames"].numpy(), np.stack(wanted))
    damaged = stored._replace(pictures=[b"no picture", *stored.pictures[1:]])
    with pytest.raises(ShardError, match="frame 0 cannot be decoded"):
        unpack_frames(damaged, "x", "y", num=3, fps=None, short_videos="keep", size=24)


def test_stored_flow_is_given(moving, tmp_path):  # noqa: F811
    shards = shards_of(moving, tmp_path / "s", max_count=2)
    flow = flow_of(shards, tmp_path / "f")
    options = {"flow": "precomputed", "image_size": 64, "flow_size": 64}
    dataset = of_shards(shards, questions={"flow": flow}, **options)
    found = [dataset[number]["flow"] for number in range(3)]
    assert [tuple(one.shape) for one in found] == [(4, 2, 64, 64), (4, 2, 64, 64), (0, 2, 64, 64)]
    assert found[0].dtype == torch.float16 and found[0].abs().max() > 0.1
    assert dataset.collater([dataset[n] for n in range(3)])["flow"].shape == (3, 4, 2, 64, 64)
    with pytest.raises(ConfigError, match="does not hold the samples"):
        of_shards(shards, questions={"flow": flow[::-1]}, **options)
    with pytest.raises(ConfigError, match="1 shards of flow for 2"):
        of_shards(shards, questions={"flow": flow[:1]}, **options)
    with pytest.raises(VideoError, match="has no flow"):
        of_shards(shards, **options)[0]
    with pytest.raises(VideoError, match="made with num_frames 4"):
        of_shards(shards, questions={"flow": flow}, **options | {"num_frames": 3})[0]


# ---------------------------------------------------------------- order


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> list[str]:
    """Eleven texts in shards of 1, 5, 2 and 3."""
    root = tmp_path_factory.mktemp("uneven")
    from test_wds_format import sample

    from lavis_lstp.data.shards.format import dump_json, media_key
    from lavis_lstp.data.shards.tar import ShardWriter

    paths, number = [], 0
    for shard_number, count in enumerate((1, 5, 2, 3)):
        path, samples = root / f"x-{shard_number:06d}.tar", []
        with ShardWriter(path) as shard:
            for _ in range(count):
                row = {"question_id": f"q{number}", "question": "?", "answer": "!"}
                value = sample(kind="text", source=None, sha256=None, questions=[row])
                key = media_key("text", f"q{number}")
                samples.append(index.sample_of(key, shard.add(key, {"json": dump_json(value)}), value))
                number += 1
        index.write(index.build(samples, path.stat().st_size), path)
        paths.append(str(path))
    return paths


class Ids(torch.utils.data.Dataset):
    """Question ids alone, so that loader processes are all a test waits for."""

    def __init__(self, questions):
        self.questions = questions

    def __len__(self):
        return len(self.questions)

    def __getitem__(self, number):
        return self.questions[number]["question_id"]


@pytest.mark.parametrize(("ranks", "workers"), WORLDS)
def test_each_sample_once_for_any_ranks_and_workers(uneven, ranks, workers):
    questions = ShardQuestions(uneven)
    orders = [
        TrainOrder(
            [len(questions)],
            batch_size=2,
            accumulate=1,
            seed=3,
            rank=rank,
            world_size=ranks,
            sampling=[Sampling(questions.blocks, 2)],
        )
        for rank in range(ranks)
    ]
    batches = Batches(Ids(questions), seed=3, num_workers=workers)
    epochs = []
    for epoch in range(2):  # the second with the same workers
        seen, lengths = [], set()
        for order in orders:
            plans = list(order.steps(epoch))
            given = list(batches([micro for plan in plans for micro in plan.batches], epoch=epoch))
            counts = [count for plan in plans for count in plan.counts]
            seen += [name for batch, count in zip(given, counts, strict=True) for name in batch[:count]]
            lengths.add(len(given))
        assert sorted(seen) == sorted(questions.question_ids()) and len(lengths) == 1
        epochs.append(seen)
    assert epochs[0] != epochs[1]


def loaded(questions, pool, ranks: int, epoch: int, position: int, steps: int | None = None) -> list[str]:
    """Question ids in the global order, as loader processes of `ranks` ranks give them."""
    options = {"batch_size": 1, "accumulate": 2, "seed": 3, "world_size": ranks}
    sampling = [Sampling(questions.blocks, 2)]
    orders = [TrainOrder([len(questions)], rank=rank, sampling=sampling, **options) for rank in range(ranks)]
    given = []
    for order in orders:
        plans = list(itertools.islice(order.steps(epoch, position), steps))
        batches = pool([micro for plan in plans for micro in plan.batches], epoch=epoch)
        counts = [count for plan in plans for count in plan.counts]
        given.append([batch[:count] for batch, count in zip(batches, counts, strict=True)])
    return [name for micro in zip(*given, strict=True) for share in micro for name in share]


def test_after_a_kill_the_rest_is_the_same_for_any_ranks_and_workers(uneven):
    """From every (ranks, workers) to every other, killed after each step."""
    questions = ShardQuestions(uneven)
    pools = {workers: Batches(Ids(questions), seed=3, num_workers=workers) for workers in (0, 1, 2, 4)}
    whole = loaded(questions, pools[0], 1, 1, 0)
    assert sorted(whole) == sorted(questions.question_ids())
    firsts, rests = {}, {}
    for ranks, workers in WORLDS:
        for steps in range(7):
            firsts[ranks, workers, steps] = loaded(questions, pools[workers], ranks, 1, 0, steps)
        for position in range(len(whole) + 1):
            rests[ranks, workers, position] = loaded(questions, pools[workers], ranks, 1, position)
    for seen in firsts.values():
        assert seen == whole[: len(seen)]
        for ranks, workers in WORLDS:
            assert seen + rests[ranks, workers, len(seen)] == whole


# ---------------------------------------------------------------- what fails


def test_what_fails_is_counted_by_cause_and_listed(media, tmp_path, caplog):  # noqa: F811
    shards = packed(media, tmp_path / "s", max_count=2)
    rewritten(Path(shards[0]), only("v0%2Emp4", mp4=b"no film"))
    found = sets.ShardSet(shards)
    raw = bytearray(Path(shards[0]).read_bytes())
    raw[found.index(0).members(1)["mp4"].offset] ^= 1
    Path(shards[0]).write_bytes(raw)
    from lavis_lstp.data.shards.index import build, scan, write

    (tmp_path / "s/x.manifest.json").unlink()  # of what was packed
    samples = found.index(0).samples()
    named = scan(shards[0]).samples()
    write(
        build([a._replace(question_ids=b.question_ids, kind="video") for a, b in zip(samples, named, strict=True)], 0),
        shards[0],
    )
    quarantine = tmp_path / "q.jsonl"
    dataset = of_shards(shards, max_bad_fraction=0.5, quarantine=quarantine)
    samples = [dataset[number] for number in (0, 1, 2, 3, 0, 1)]
    assert [sample is None for sample in samples] == [True, True, False, False, True, True]
    assert dataset.left_out.by_cause() == {"undecodable": 1, "hash": 1}
    rows = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert [(row["question_id"], row["key"], row["cause"]) for row in rows] == [
        ("q0", "v0%2Emp4", "undecodable"),
        ("q1", "v1%2Emp4", "hash"),
    ]
    assert all(row["shard"] == shards[0] for row in rows)
    strict = of_shards(shards, max_bad_fraction=0.25)
    assert strict[0] is None
    with pytest.raises(VideoError, match=r"2 of 4 questions cannot be read \(1 undecodable, 1 hash\)"):
        strict[1]


def test_a_shard_that_vanishes(media, tmp_path):  # noqa: F811
    shards = packed(media, tmp_path, max_count=2)
    dataset = of_shards(shards, max_bad_fraction=0.5)
    Path(shards[1]).unlink()
    assert dataset[0] is not None and dataset[2] is None
    assert dataset.left_out.by_cause() == {"not found": 1}
    with pytest.raises(ShardError, match="no such file"):
        ShardQuestions([*shards, str(tmp_path / "x-000007.tar")])


def test_a_pipe_is_copied_once(media, tmp_path):  # noqa: F811
    shards = packed(media, tmp_path / "s", max_count=2)
    log = tmp_path / "log"
    pipes = [f"pipe:echo . >> {log}; cat {shard}" for shard in shards]
    with pytest.raises(ConfigError, match="shards.cache is needed"):
        ShardQuestions(pipes)
    for _ in range(2):
        dataset = of_shards(pipes, questions={"cache": tmp_path / "cache"})
        assert_same(dataset[1], of_files(media)[1])
    assert log.read_text().split() == ["."] * 2
    with pytest.raises(ShardError, match="truncated|ends"):
        ShardQuestions([f"pipe:head -c 700 {shards[0]}"], cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 2


def test_numpy_is_not_the_loaders_limit(uneven):
    """Questions are found by number among those of a kind as among all."""
    questions = ShardQuestions(uneven, kind="text")
    assert questions.question_ids() == [questions[n]["question_id"] for n in range(11)]
    assert np.diff([0, *questions.blocks]).tolist() == [1, 5, 2, 3]
    with pytest.raises(IndexError):
        questions[11]
