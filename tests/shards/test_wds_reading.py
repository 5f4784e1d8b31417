"""Epochs over shards in loader processes: kinds mixed, ranks and resumes, what fails, evaluation."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_wds_loader import COMMON, assert_same, of_files, of_shards
from test_wds_verify import media, only, packed, rewritten  # noqa: F401 (a fixture)
from video_files import numbered_video

from lavis_lstp.config.data import Shards
from lavis_lstp.data.qa_dataset import VideoQADataset
from lavis_lstp.data.shards import index, sets
from lavis_lstp.data.shards.questions import ShardQuestions
from lavis_lstp.errors import VideoError
from lavis_lstp.runners.data_order import Batches, Sampling, TrainOrder, eval_units, sampling_of
from lavis_lstp.runners.splits import join
from webdataset_tools.pack import pack
from webdataset_tools.sources import units

TURNS = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "that"}]


@pytest.fixture(scope="module")
def three_kinds(tmp_path_factory) -> list[str]:
    """Shards of three samples each: 4 videos, 6 pictures, 8 texts."""
    root = tmp_path_factory.mktemp("kinds")
    rows = []
    for number in range(4):
        numbered_video(root / f"v{number}.mp4", 5)
        rows.append({"id": f"v{number}", "video": f"v{number}.mp4", "conversations": TURNS})
    for number in range(6):
        Image.new("RGB", (16, 16), (40 * number, 0, 0)).save(root / f"i{number}.png")
        rows.append({"id": f"i{number}", "image": f"i{number}.png", "conversations": TURNS})
    rows += [{"id": f"t{number}", "conversations": TURNS} for number in range(8)]
    (root / "a.json").write_text(json.dumps(rows))
    found = units("video-llava", [root / "a.json"], root=root)
    pack(found, str(root / "s/x"), root, max_count=3, shuffle=1)
    return sorted(map(str, (root / "s").glob("*.tar")))


def epoch_of(batches: Batches, order: TrainOrder, epoch: int, position: int = 0) -> list[dict]:
    """The batches of one rank, less what only fills up."""
    plans = list(order.steps(epoch, position))
    given = batches([micro for plan in plans for micro in plan.batches], epoch=epoch)
    counts = [count for plan in plans for count in plan.counts]
    return [batch for batch, count in zip(given, counts, strict=True) if count]


# ---------------------------------------------------------------- epochs


def test_kinds_out_of_shards_are_mixed_by_ratio(three_kinds):
    kinds = ("video", "image", "text")
    parts = {
        kind: VideoQADataset(ShardQuestions(three_kinds, kind=kind), shards=Shards(window=2), **COMMON)
        for kind in kinds
    }
    joined, lengths = join(parts), [len(part) for part in parts.values()]
    assert lengths == [4, 6, 8]
    sampling = [sampling_of(part) for part in parts.values()]
    order = TrainOrder(lengths, batch_size=3, accumulate=1, seed=2, ratios=[4, 1, 1], sampling=sampling)
    batches = epoch_of(Batches(joined, seed=2, num_workers=2), order, 0)
    ids = [name for batch in batches for name in batch["question_id"]]
    assert Counter(name[0] for name in ids) == {"v": 12, "i": 3, "t": 3}
    assert set(Counter(name for name in ids if name[0] == "v").values()) == {3}  # each as often as the others
    assert len({name for name in ids if name[0] != "v"}) == 6
    mixed = [batch for batch in batches if len({name[0] for name in batch["question_id"]}) > 1]
    assert mixed
    for batch in mixed:
        shown = dict(zip(batch["question_id"], batch["frame_mask"].sum(1).tolist(), strict=True))
        assert all(count == {"v": 4, "i": 1, "t": 0}[name[0]] for name, count in shown.items())


class Places(torch.utils.data.Dataset):
    """(question id, process) of what is read, which is noted."""

    def __init__(self, questions):
        self.questions, self.read = questions, []

    def __len__(self):
        return len(self.questions)

    def __getitem__(self, number):
        self.read.append(number)
        return f"{self.questions[number]['question_id']} {os.getpid()}"


def test_processes_stay_and_get_each_epochs_order(three_kinds):
    questions = ShardQuestions(three_kinds)
    order = TrainOrder([18], batch_size=3, accumulate=1, seed=2, sampling=[Sampling(questions.blocks, 2)])
    batches = Batches(Places(questions), seed=2, num_workers=2)
    epochs = [[one.split() for batch in epoch_of(batches, order, epoch) for one in batch] for epoch in (0, 1)]
    orders, processes = [[name for name, _ in seen] for seen in epochs], [{pid for _, pid in seen} for seen in epochs]
    assert processes[0] == processes[1] and len(processes[0]) == 2 and str(os.getpid()) not in processes[0]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == sorted(questions.question_ids())


def test_going_to_a_position_reads_nothing_before_it(three_kinds):
    places = Places(ShardQuestions(three_kinds))
    order = TrainOrder([18], batch_size=2, accumulate=1, seed=2, sampling=[Sampling(places.questions.blocks, 2)])
    epoch_of(Batches(places, seed=2), order, 1, position=12)
    assert places.read == order.permutation(1)[12:].tolist()


@pytest.mark.parametrize("ranks", [1, 3])
def test_resampled_epochs_are_shared_and_resumed_alike(three_kinds, ranks):
    dataset = VideoQADataset(ShardQuestions(three_kinds, kind="text"), shards=Shards(resampled=True), **COMMON)
    options = {"batch_size": 2, "accumulate": 1, "seed": 4, "world_size": ranks, "sampling": [sampling_of(dataset)]}
    orders = [TrainOrder([8], rank=rank, **options) for rank in range(ranks)]
    drawn = orders[0].permutation(0).tolist()
    assert len(drawn) == 8 and len(set(drawn)) < 8
    for position in (0, 6):
        plans = [list(order.steps(0, position)) for order in orders]
        assert len({len(plan) for plan in plans}) == 1
        seen = [
            i for plan in plans for step in plan for b, n in zip(step.batches, step.counts, strict=True) for i in b[:n]
        ]
        assert sorted(seen) == sorted(drawn[position:])


# ---------------------------------------------------------------- what fails


def test_processes_count_together_and_nothing_takes_the_place(media, tmp_path):  # noqa: F811
    shards = packed(media, tmp_path / "s", max_count=1)
    Path(shards[1]).unlink()
    Path(shards[2]).write_bytes(Path(shards[2]).read_bytes()[:700])
    plan, quarantine = [(0, 1), (2, 3)], tmp_path / "q.jsonl"
    dataset = of_shards(shards, max_bad_fraction=0.5, quarantine=quarantine)
    batches = Batches(dataset, seed=0, num_workers=2)
    for epoch in range(2):
        assert [batch["question_id"] for batch in batches(plan, epoch=epoch)] == [["q0"], ["still"]]
    assert dataset.left_out.by_cause() == {"not found": 1, "truncated": 1}
    rows = [json.loads(line) for line in quarantine.read_text().splitlines()]
    listed = sorted((row["question_id"], row["shard"], row["key"], row["cause"]) for row in rows)
    assert listed == [("q1", shards[1], "v1%2Emp4", "not found"), ("q2", shards[2], "v2%2Emp4", "truncated")]
    strict = of_shards(shards, max_bad_fraction=0.25)
    with pytest.raises(VideoError, match=r"2 of 4 questions cannot be read \(1 not found, 1 truncated\).*allows 0.25"):
        list(Batches(strict, seed=0, num_workers=2)(plan))


def test_a_member_that_is_missing(media, tmp_path):  # noqa: F811
    (shard,) = packed(media, tmp_path)
    samples = {one.key: one for one in sets.ShardSet([shard]).index(0).samples()}
    rewritten(Path(shard), only("v1%2Emp4", mp4=None))
    found = sets.ShardSet([shard]).index(0).samples()
    said = [one._replace(question_ids=samples[one.key].question_ids, kind=samples[one.key].kind) for one in found]
    index.write(index.build(said, Path(shard).stat().st_size), shard)
    dataset = of_shards([shard], max_bad_fraction=0.25)
    assert [dataset[number] is None for number in range(4)] == [False, True, False, False]
    assert dataset.left_out.by_cause() == {"missing member": 1}


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_has_a_length_and_a_second_pass(media, tmp_path, workers):  # noqa: F811
    dataset, files = of_shards(packed(media, tmp_path, max_count=3)), of_files(media)
    plan = eval_units(dataset.eval_groups(), 3)
    assert len(dataset) == len(files) == 4 and [len(unit) for unit in plan] == [3, 1]
    batches = Batches(dataset, seed=0, num_workers=workers)
    first, second = (list(batches(plan)) for _ in range(2))
    assert len(first) == len(second) == len(plan)
    for one, other, unit in zip(first, second, plan, strict=True):
        assert_same(one, other)
        assert_same(one, files.collater([files[number] for number in unit]))
