"""`shards.loader: stream`: samples, checks and errors of reads at offsets, in an order that no rank or worker moves."""

from __future__ import annotations

import itertools
import json
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from test_wds_flow import flow_of, moving, shards_of  # noqa: F401 (a fixture)
from test_wds_format import write_shard
from test_wds_http import QUICK, locations, serving
from test_wds_loader import assert_same, of_files, of_shards
from test_wds_order import WORLDS, ends_of, order
from test_wds_reading import three_kinds  # noqa: F401 (a fixture)
from test_wds_verify import media, packed  # noqa: F401 (a fixture)

from lavis_lstp.config.data import Shards
from lavis_lstp.data.builders import shard_settings
from lavis_lstp.data.qa_dataset import VideoQADataset
from lavis_lstp.data.shards import sets, storage
from lavis_lstp.data.shards.questions import ShardQuestions
from lavis_lstp.data.shards.stream import ReadShards, Wanted
from lavis_lstp.errors import ConfigError, ShardError, VideoError
from lavis_lstp.runners.data_order import LANE, Sampling, TrainOrder, sampling_of
from lavis_lstp.runners.shard_stream import StreamBatches, build_batches
from lavis_lstp.runners.splits import join

SIZES = st.lists(st.integers(0, 7), min_size=1, max_size=12).filter(any)


# ---------------------------------------------------------------- order


@given(SIZES, st.integers(1, 9), st.integers(1, 5), st.integers(0, 3))
def test_each_sample_comes_once_out_of_lanes_that_read_shards_from_end_to_end(sizes, lanes, buffer, epoch):
    blocks = ends_of(sizes)
    sampling = Sampling(blocks, lanes=lanes, buffer=buffer)
    found, places = (one.tolist() for one in order([blocks[-1]], [sampling]).drawn(epoch))
    assert sorted(found) == list(range(blocks[-1]))
    assert sampling.used_lanes <= max(1, min(lanes, sum(map(bool, sizes))))
    row = [index for _, index in sorted(zip(places, found, strict=True))]
    shard_of = [n for n, size in enumerate(sizes) for _ in range(size)]
    read = [(shard, [*group]) for shard, group in itertools.groupby(row, key=shard_of.__getitem__)]
    assert sorted(shard for shard, _ in read) == [n for n, size in enumerate(sizes) if size]  # each in one go
    assert all(group == sorted(group) for _, group in read)
    for lane in range(sampling.used_lanes):
        mine = [place for place in places if place // LANE == lane]
        assert mine == places[lane :: sampling.used_lanes]
        first = min(mine, default=0)
        assert all(place - first <= n + buffer for n, place in enumerate(mine))  # no more is read than fits


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 1)])
def test_a_lane_is_read_by_one_worker_alone(ranks, workers):
    blocks, readers = ends_of([6] * 8), {}
    for rank in range(ranks):
        there = order([48], [Sampling(blocks, lanes=4, buffer=3)], rank=rank, world=ranks)
        for position in (0, 16):
            places = [place for plan in there.steps(1, position) for row in plan.places for place in row]
            for worker in range(workers):
                for place in places[worker::workers]:
                    readers.setdefault((position, place // LANE), set()).add((rank, worker))
    assert len(readers) == 8 and all(len(found) == 1 for found in readers.values())


def test_epochs_and_seeds_differ_and_the_buffer_mixes():
    blocks = ends_of([20] * 4)
    sampling = Sampling(blocks, lanes=2, buffer=10)
    there = order([80], [sampling])
    one = there.permutation(0).tolist()
    assert one == there.permutation(0).tolist() != there.permutation(1).tolist()
    assert one != order([80], [sampling], seed=6).permutation(0).tolist()
    plain = order([80], [Sampling(blocks, lanes=2, buffer=1)]).permutation(0).tolist()
    assert all(b - a in (1, -19, -39, -59, 21, 41) or abs(b - a) > 19 for a, b in itertools.pairwise(plain[::2]))
    assert sum(b - a == 1 for a, b in itertools.pairwise(one[::2])) < 20


def test_mixed_data_sets_keep_their_lanes():
    blocks = ends_of([10] * 6)
    mixed = order([60, 20], [Sampling(blocks, lanes=4, buffer=2), None], ratios=[3, 1], batch=4)
    found, places = mixed.drawn(0)
    assert sorted(found[found < 60].tolist()) == list(range(60)) and (places[found >= 60] == -1).all()
    slots = (found < 60).nonzero().flatten()
    assert (places[slots] // LANE == slots % 4).all()


def test_resampled_draws_whole_shards():
    blocks = ends_of([5] * 40)
    found = order([200], [Sampling(blocks, resampled=True, lanes=4, buffer=3)]).permutation(0).tolist()
    times = Counter(index // 5 for index in found)
    assert len(found) == 200 and 20 < len(times) < 32  # 40 (1 - 1/e) = 25 expected
    assert sum(count % 5 != 0 for count in times.values()) <= 1  # the last one is cut


# ---------------------------------------------------------------- samples


def streamed(shards, *, questions: dict | None = None, lanes: int = 2, buffer: int = 2, **options) -> VideoQADataset:
    how = Shards(loader="stream", lanes=lanes, buffer=buffer)
    return of_shards(shards, questions=questions, shards=how, **options)


def train_order(dataset, *, rank=0, ranks=1, batch=2, accumulate=1, seed=3, **options) -> TrainOrder:
    parts = getattr(dataset, "parts", {"": dataset}).values()
    given = {"batch_size": batch, "accumulate": accumulate, "seed": seed, "rank": rank, "world_size": ranks, **options}
    return TrainOrder([len(part) for part in parts], sampling=[sampling_of(part) for part in parts], **given)


def batches_of(dataset, there: TrainOrder, epoch: int, position: int = 0, workers: int = 0, steps: int | None = None):
    """The batches of one rank, less what only fills up."""
    plans = list(itertools.islice(there.steps(epoch, position), steps))
    counts = [count for plan in plans for count in plan.counts]
    loader = build_batches(dataset, there, seed=3, num_workers=workers, pin_memory=False)
    assert isinstance(loader, StreamBatches)
    given = list(loader.of_plans(plans, epoch))
    assert len(given) == len(counts)
    return [batch for batch, count in zip(given, counts, strict=True) if count]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_samples_are_those_of_the_files(media, tmp_path, workers):  # noqa: F811
    files = of_files(media, flow="motion_vectors")
    dataset = streamed(packed(media, tmp_path, max_count=1), flow="motion_vectors")
    there = train_order(dataset)
    found = batches_of(dataset, there, 1, workers=workers)
    plans = list(there.steps(1))
    assert [len(batch["question_id"]) for batch in found] == [2, 2]
    for batch, plan in zip(found, plans, strict=True):
        assert_same(batch, files.collater([files[number] for number in plan.batches[0]]))


def test_the_pipeline_is_one_that_webdataset_knows(media, tmp_path):  # noqa: F811
    dataset = streamed(packed(media, tmp_path, max_count=1))
    pipeline = StreamBatches(dataset, seed=3).pipeline([Wanted(0, 0), Wanted(1, 1)], 0)
    assert isinstance(pipeline, webdataset.DataPipeline) and webdataset.split_by_worker in pipeline.pipeline
    assert [sample["question_id"] for sample in pipeline] == ["q0", "q1"]


def test_flow_of_a_parallel_set_comes_along(moving, tmp_path):  # noqa: F811
    shards = shards_of(moving, tmp_path / "a", max_count=1)
    flow = flow_of(shards, tmp_path / "f", "--num-frames", "4")
    options = {"questions": {"kind": "video", "flow": flow}, "flow": "precomputed", "flow_size": 32}
    plain, dataset = of_shards(shards, **options), streamed(shards, **options)
    (batch,) = batches_of(dataset, train_order(dataset, batch=4), 0)
    (plan,) = train_order(dataset, batch=4).steps(0)
    assert_same(batch, plain.collater([plain[number] for number in plan.batches[0]]))
    assert batch["flow"].abs().sum() > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_kinds_and_data_sets_are_mixed(three_kinds, workers):  # noqa: F811
    parts = {kind: streamed(three_kinds, questions={"kind": kind}) for kind in ("video", "text")}
    parts["image"] = of_shards(three_kinds, questions={"kind": "image"})  # read at offsets, beside streams
    joined = join(parts)
    there = train_order(joined, batch=3, ratios=[4, 1, 1])
    found = batches_of(joined, there, 0, workers=workers)
    ids = [name for batch in found for name in batch["question_id"]]
    wanted = [row[i]["question_id"] for i in there.permutation(0).tolist() for row in [joined]]
    assert ids == wanted and Counter(name[0] for name in ids) == {"v": 12, "i": 3, "t": 3}


# ---------------------------------------------------------------- exactly once, and the rest


class Words(torch.utils.data.Dataset):
    """Question ids, and the bytes of their videos, so that reading is all a test waits for."""

    def __init__(self, questions: ShardQuestions, **sampling):
        self.annotation, self.blocks = questions, questions.blocks
        self.__dict__.update(sampling)

    def __len__(self):
        return len(self.annotation)

    def __getitem__(self, number):
        row = self.annotation[number]
        return row["question_id"], self.annotation.medium(self.annotation.place(row))[0]

    def collater(self, samples):
        return samples


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> list[str]:
    """Shards of 1, 5, 2, 3 and 4 videos with two questions each."""
    root, first = tmp_path_factory.mktemp("films"), 0
    for number, count in enumerate((1, 5, 2, 3, 4)):
        write_shard(root / f"x-{number:06d}.tar", range(first, first + count), questions=2, content=b"film " * 4000)
        first += count
    return sorted(map(str, root.glob("*.tar")))


def words(films, *, lanes=4, buffer=3, retry=QUICK, **sampling) -> Words:
    return Words(ShardQuestions(films, retry=retry), lanes=lanes, buffer=buffer, **sampling)


def loaded(dataset, ranks: int, workers: int, position: int, steps: int | None = None) -> list[str]:
    """Question ids in the global order, as loader processes of `ranks` ranks give them."""
    given = []
    for rank in range(ranks):
        there = train_order(dataset, rank=rank, ranks=ranks, batch=1, accumulate=2)
        plans = list(itertools.islice(there.steps(1, position), steps))
        loader = StreamBatches(dataset, seed=3, num_workers=workers)
        counts = [count for plan in plans for count in plan.counts]
        given.append([batch[:count] for batch, count in zip(loader.of_plans(plans, 1), counts, strict=True)])
    for name, film in (one for share in given for batch in share for one in batch):
        assert film == b"film " * 4000 + name.partition("-")[0][1:].encode()
    return [name for micro in zip(*given, strict=True) for share in micro for name, _ in share]


def test_after_a_kill_the_rest_is_the_same_for_any_ranks_and_workers(films):
    dataset = words(films)
    whole = loaded(dataset, 1, 0, 0)
    assert sorted(whole) == sorted(dataset.annotation.question_ids()) and len(whole) == 30
    for ranks, workers in ((ranks, workers) for ranks, workers in WORLDS if workers != 1):
        assert loaded(dataset, ranks, workers, 0) == whole
        for position in (5, 12, 29) if workers == 0 else (12,):
            assert loaded(dataset, ranks, workers, position) == whole[position:]
        if workers == 0:
            assert loaded(dataset, ranks, workers, 0, 3) == whole[: 6 * ranks]


def test_resampled_epochs_are_shared_and_resumed_alike(films):
    dataset = words(films, resampled=True)
    whole = loaded(dataset, 1, 0, 0)
    assert len(whole) == 30 > len(set(whole))
    assert loaded(dataset, 2, 2, 0) == whole and loaded(dataset, 3, 0, 12) == whole[12:]


def test_two_epochs_of_one_loader_differ(films):
    dataset = words(films)
    there, loader = train_order(dataset), StreamBatches(dataset, seed=3, num_workers=2)
    epochs = [
        [name for batch in loader.of_plans([*there.steps(epoch)], epoch) for name, _ in batch] for epoch in (0, 1)
    ]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1])


# ---------------------------------------------------------------- over HTTP


@pytest.mark.parametrize("failing", [0.0, 0.3])
def test_a_shard_is_a_request_and_goes_on_where_it_broke(films, failing):
    local = loaded(words(films), 1, 0, 0)
    with serving(Path(films[0]).parent, failing=failing) as server:
        remote = words(locations(server, films))
        remote.annotation.question_ids()
        server.served.clear()
        assert loaded(remote, 1, 0, 0) == local
        requests = [name for name, *_ in server.served if name.endswith(".tar")]
        # 5 shards in 4 lanes: at most 3 are cut, and both lanes ask for one that is
        assert failing or 5 <= len(requests) <= 8
        assert not failing or len({how for *_, how in server.served}) > 2


def test_resuming_begins_at_the_first_byte_that_is_wanted(films):
    with serving(Path(films[0]).parent) as server:
        dataset = words(locations(server, films), lanes=1)
        there = train_order(dataset)
        wanted = there.permutation(1)[22:].tolist()
        dataset.annotation.question_ids()
        server.served.clear()
        loaded(dataset, 1, 0, 22)
        firsts: dict[str, int] = {}
        for index in wanted:
            shard, sample = dataset.annotation.place_of(index)
            offset = min(m.offset for m in sets.ShardSet(films).index(shard).members(sample).values())
            name = Path(films[shard]).name
            firsts[name] = min(offset, firsts.get(name, offset))
        assert {name: first for name, first, _ in server.served} == firsts and len(server.served) == len(firsts)
        assert any(first > 20_000 for first in firsts.values())


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 70_000), st.integers(0, 9_000)), min_size=1, max_size=8), st.booleans())
def test_a_forward_reader_reads_what_single_reads_do(films, asked, rising):
    path = Path(films[1])
    asked = sorted(asked) if rising else asked
    with serving(path.parent, failing=0.1, ways=("503", "cut")) as server:
        place, retry = f"{server.url}/{path.name}", storage.Retry(attempts=12, wait_s=0.0, timeout_s=0.2)
        reader = storage.ForwardReader(place, retry, skip=20_000)
        for offset, size in asked:
            assert reader.read_at(place, offset, size, retry) == path.read_bytes()[offset : offset + size]
        reader.close()


@pytest.mark.parametrize("of", ["http", "fsspec", "file"])
def test_a_forward_reader_fails_as_single_reads_do(films, of):
    path = Path(films[1])
    with serving(path.parent, ranges=False) as bare, serving(path.parent) as server:
        root = {"http": server.url, "fsspec": f"local://{path.parent}", "file": str(path.parent)}[of]
        cases = [(path.name, path.stat().st_size - 5, 10), (path.name, 1 << 30, 10), ("none.tar", 5, 10)]
        places = [(f"{root}/{name}", offset, size) for name, offset, size in cases]
        places += [(f"{bare.url}/{path.name}", 5, 10)] if of == "http" else []
        for place, offset, size in places:
            reader = storage.ForwardReader(place, QUICK)
            with pytest.raises(ShardError) as one:
                storage.read_at(place, offset, size, QUICK)
            with pytest.raises(ShardError) as other:
                reader.read_at(place, offset, size, QUICK)
            assert (str(one.value), one.value.cause) == (str(other.value), other.value.cause)


# ---------------------------------------------------------------- what fails


@pytest.mark.parametrize("workers", [0, 2])
def test_what_fails_is_left_out_as_by_offsets(media, tmp_path, workers):  # noqa: F811
    shards = packed(media, tmp_path / "s", max_count=1)
    Path(shards[1]).unlink()
    raw = bytearray(Path(shards[2]).read_bytes())
    raw[sets.ShardSet(shards).index(2).members(0)["mp4"].offset] ^= 1
    Path(shards[2]).write_bytes(raw)
    quarantine = tmp_path / "q.jsonl"
    dataset = streamed(shards, max_bad_fraction=0.5, quarantine=quarantine)
    for epoch in range(2):
        found = batches_of(dataset, train_order(dataset), epoch, workers=workers)
        assert sorted(name for batch in found if batch for name in batch["question_id"]) == ["q0", "still"]
    assert dataset.left_out.by_cause() == {"not found": 1, "hash": 1}
    rows = [json.loads(line) for line in quarantine.read_text().splitlines()]
    listed = sorted((row["question_id"], row["shard"], row["key"], row["cause"]) for row in rows)
    assert listed == [("q1", shards[1], "v1%2Emp4", "not found"), ("q2", shards[2], "v2%2Emp4", "hash")]
    strict = streamed(shards, max_bad_fraction=0.25)
    with pytest.raises(VideoError, match=r"2 of 4 questions cannot be read \(1 not found, 1 hash\).*allows 0.25"):
        batches_of(strict, train_order(strict), 0, workers=workers)


def test_a_sample_behind_a_damaged_one_is_read(films, tmp_path):
    """Over HTTP, where a refused read ends the connection."""
    for path in (Path(films[1]), Path(films[1]).with_suffix(".index")):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = tmp_path / Path(films[1]).name
    shard.write_bytes(shard.read_bytes()[:50_000])  # of five samples two are whole
    with serving(tmp_path) as server:
        questions = ShardQuestions(locations(server, [shard]), retry=QUICK)
        stage = ReadShards([(0, questions)], LANE)
        found = []
        for index in stage([Wanted(index, index) for index in range(10)]):
            try:
                found.append(len(questions.content(questions.place_of(index))["mp4"]))
            except ShardError as error:
                found.append(error.cause)
    assert found == [20_001] * 4 + ["truncated"] * 6


def test_a_loader_that_is_left_closes_its_connections(films):
    def reading() -> set[threading.Thread]:
        return {one for one in threading.enumerate() if one.name.startswith("shards")}

    before = reading()
    with serving(Path(films[0]).parent) as server:
        dataset = words(locations(server, films))
        given = StreamBatches(dataset, seed=3).of_plans([*train_order(dataset).steps(0)], 0)
        next(given)
        assert reading() - before  # threads of an earlier test may end meanwhile
        given.close()
        assert not reading() - before


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"loader": "strem"}, "unknown datasets.x.shards.loader 'strem'; did you mean 'stream'"),
        ({"loader": "stream", "window": 2}, "window is for loader: offsets"),
        ({"loader": "stream", "lanes": 0}, "lanes must be a whole number of at least 1"),
        ({"loader": "stream", "buffer": 1.5}, "buffer must be a whole number of at least 1"),
    ],
)
def test_settings_that_cannot_be(config, said):
    with pytest.raises(ConfigError, match=said):
        shard_settings(config, "train", "datasets.x")


def test_settings_reach_the_order(films):
    def order(**given) -> tuple:
        settings = shard_settings({**given, "cache": {"train": "x", "test": "y"}}, "test", "x")
        assert settings.cache == "y"
        sampling = sampling_of(of_shards(films, shards=settings))
        return sampling.window, sampling.resampled, sampling.lanes, sampling.buffer

    assert order(loader="stream") == (0, False, 16, 16)
    assert order(lanes=4, window=3, resampled=True) == (3, True, 0, 1)


def test_lanes_that_do_not_divide_are_told(films, caplog):
    dataset = words(films)
    build_batches(dataset, train_order(dataset, ranks=3), seed=0, num_workers=2, pin_memory=False)
    assert "4 lanes for 6 processes x workers" in caplog.text
