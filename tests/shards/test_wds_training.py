"""Recipes over shards: built from a configuration, trained by `python -m lavis.train`, with the result of the files."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from test_wds_flow import flow_of, moving, shards_of  # noqa: F401 (a fixture)
from test_wds_loader import assert_same
from test_wds_verify import media, packed  # noqa: F401 (a fixture)
from video_files import moving_texture, write_video

from lavis_lstp.data.builders import ShardsBuilder, VideoInstructBuilder, VideoQABuilder, pack_once
from lavis_lstp.data.shapes.shapes_qa import generate
from lavis_lstp.errors import AnnotationError, ConfigError, ShardError, VideoError
from lavis_lstp.files import read_jsonl
from lavis_lstp.host import evaluate, train
from lavis_lstp.models.weights.reading import load_state_dict_file
from lavis_lstp.runners.data_order import sampling_of
from webdataset_tools.__main__ import main as tools
from webdataset_tools.pack import pack
from webdataset_tools.sources import units


def built(cls, **changes):
    config = OmegaConf.load(cls.default_config_path())["datasets"][cls.name]
    options = {"num_frames": 4, "image_size": 32, **changes}
    return cls(OmegaConf.merge(config, options)).build_datasets()


def storages(folder: Path, count: int) -> dict:
    return {"annotations": {"train": {"storage": f"{folder}/x-{{000000..{count - 1:06d}}}.tar"}}}


def test_a_storage_of_shards_in_place_of_a_file(media, tmp_path):  # noqa: F811
    packed(media, tmp_path, max_count=3)
    info = {"annotations": {"train": {"storage": str(media / "a.json")}}, "videos": {"storage": str(media)}}
    files = built(VideoQABuilder, build_info=info)["train"]
    for cls in (VideoQABuilder, ShardsBuilder):
        shards = built(cls, build_info=storages(tmp_path, 2), shards={"window": 1, "resampled": True})["train"]
        for number in range(len(files)):
            assert_same(shards[number], files[number])
        sampling = sampling_of(shards)
        assert (list(sampling.blocks), sampling.window, sampling.resampled) == ([3, 4], 1, True)
    assert not sampling_of(files).blocks


def test_one_set_serves_every_kind(moving, tmp_path):  # noqa: F811
    pack(units("video-llava", [moving / "c.json"], root=moving), str(tmp_path / "x"), moving)
    videos = built(VideoInstructBuilder, build_info=storages(tmp_path, 1))["train"]
    assert videos.question_ids() == ["q0", "q1"] and videos[0]["prompt"].startswith("USER: <video>")
    assert len(built(ShardsBuilder, build_info=storages(tmp_path, 1))["train"]) == 3
    assert len(built(ShardsBuilder, build_info=storages(tmp_path, 1), kind="text")["train"]) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "film"}, "unknown datasets.lstp_shards.kind 'film'"),
        ({"shards": {"window": -1}}, "shards.window must be"),
        ({"shards": {"attempts": 0}}, "shards.attempts must be"),
        ({"shards": {"attempts": 1.5}}, "shards.attempts must be"),
        ({"build_info": {"annotations": {"train": {"storage": "train.json"}}}}, "names a file"),
    ],
)
def test_configurations_that_cannot_be(media, tmp_path, changes, said):  # noqa: F811
    packed(media, tmp_path)
    with pytest.raises(ConfigError, match=said):
        built(ShardsBuilder, **{"build_info": storages(tmp_path, 1), **changes})


def spans_file(path: Path, ids, num_frames: int) -> str:
    """A span for each question, not two alike in a row."""
    header = {"format": "lavis_lstp.spans", "version": 1, "num_frames": num_frames}
    spans = {name: {"span": [n % (num_frames - 1), n % (num_frames - 1) + 1]} for n, name in enumerate(ids)}
    path.write_text(json.dumps({**header, "spans": spans}), encoding="utf-8")
    return str(path)


def test_spans_of_shards_are_those_of_their_file(media, tmp_path):  # noqa: F811
    """In the samples themselves, and in a parallel set."""
    shards = packed(media, tmp_path, max_count=3)
    path = spans_file(tmp_path / "spans.json", ["q0", "q1", "q2"], 4)
    assert tools(["spans", *shards, "--spans", path, "--out", str(tmp_path / "s/x"), "--workers", "1"]) == 0
    parallel = sorted(map(str, (tmp_path / "s").glob("*.tar")))
    assert tools(["reshard", *shards, "--join", *parallel, "--out", str(tmp_path / "j/x"), "--workers", "1"]) == 0
    info, one = storages(tmp_path, 2), storages(tmp_path / "j", 1)
    wanted = [sample["span"].tolist() for sample in built(ShardsBuilder, build_info=info, spans=path)["train"]]
    assert wanted == [[0, 1], [1, 2], [2, 3], [-1, -1]]
    for found in (
        built(ShardsBuilder, build_info=info, spans="shards", shards={"spans": parallel})["train"],
        built(ShardsBuilder, build_info=info, spans={"train": "shards"}, shards={"spans": {"train": parallel}})[
            "train"
        ],
        built(VideoQABuilder, build_info=one, spans="shards")["train"],
        built(ShardsBuilder, build_info=one, spans="shards", kind="video")["train"],
    ):
        assert [sample["span"].tolist() for sample in found] == wanted[: len(found)] and len(found) > 2
    files = {"annotations": {"train": {"storage": str(media / "a.json")}}, "videos": {"storage": str(media)}}
    for changes, error, said in (
        ({"build_info": info}, ShardError, r"v0%2Emp4.span.json: there is none; attach spans"),
        ({"build_info": info, "shards": {"spans": parallel[::-1]}}, ConfigError, "does not hold the samples of"),
        ({"build_info": info, "shards": {"spans": parallel[:1]}}, ConfigError, "1 shards of spans for 2 of media"),
        ({"build_info": one, "num_frames": 8}, AnnotationError, r"span.json: spans count 4 frames per video"),
        ({"build_info": files}, ConfigError, "'shards' is for tar shards; split train is read from files"),
    ):
        with pytest.raises(error, match=said):
            built(VideoQABuilder, spans="shards", **changes)


def test_each_split_may_have_its_own_parallel_set(moving, tmp_path):  # noqa: F811
    flow, info = {}, {"annotations": {}}
    for split in ("train", "val"):
        shards = shards_of(moving, tmp_path / split, max_count=2)
        flow[split] = flow_of(shards, tmp_path / f"{split}_flow")
        info["annotations"][split] = {"storage": shards}
    Path(flow["val"][0]).write_bytes(b"")
    found = built(
        ShardsBuilder,
        build_info=info,
        image_size=64,
        flow="precomputed",
        flow_size=8,
        shards={"flow": flow},
        kind="video",
    )
    assert found["train"][0]["flow"].abs().max() > 0
    with pytest.raises(VideoError, match="truncated"):
        found["val"][0]


SHAPES = {"seed": 0, "train_videos": 5, "val_videos": 1, "test_videos": 1, "train_images": 3, "size": 64}


def recipe(root: Path, name: str, module, *more: str, status: int = 0) -> Path:
    """Runs a tiny recipe; the data lie in root/data, whichever way they are read."""
    sizes = [f"datasets.lstp_shapes.generate.{key}={value}" for key, value in SHAPES.items()]
    options = [*sizes, f"datasets.lstp_shapes.root={root / 'data'}", "datasets.lstp_shapes.num_frames=8", *more]
    out = root / name
    command = ["--cfg-path", f"projects/lstp/tiny_{name.split('_')[0]}.yaml", "--options", *options]
    assert module.main([*command, f"run.output_dir={out}"]) == status
    return out


def test_a_recipe_over_shards_ends_with_the_weights_of_files(tmp_path):
    steps = ["run.max_steps=3", "run.batch_size_train=4", "run.train_splits=[train]", "run.num_workers=2"]
    more = ["datasets.lstp_shapes.flow=motion_vectors", "model.flow.name=motion_vectors", *steps]
    weights = []
    for from_shards in ("false", "true"):
        out = recipe(tmp_path, f"base_{from_shards}", train, *more, f"datasets.lstp_shapes.from_shards={from_shards}")
        weights.append(load_state_dict_file(out / "checkpoints" / "last" / "model.safetensors"))
    assert (tmp_path / "data/shards/train.manifest.json").is_file()
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_sampler_learns_spans_of_shards_as_it_learns_those_of_files(tmp_path):
    """Step 3 of the demo: the same weights, and the same checkpoint found best by the spans of the other split."""
    generate(tmp_path / "data", **SHAPES)
    files, shards, parallel = {}, pack_once(tmp_path / "data", ["train", "val"]), {}
    for split, paths in shards.items():
        ids = [row["question_id"] for row in json.loads((tmp_path / f"data/{split}.json").read_text())]
        files[split] = spans_file(tmp_path / f"spans_{split}.json", ids, 8)
        out = tmp_path / "spans" / split
        assert tools(["spans", *paths, "--spans", files[split], "--out", str(out), "--strict"]) == 0
        parallel[split] = sorted(map(str, out.parent.glob(f"{split}-*.tar")))
    more = ["run.max_epoch=2", "run.eval_every_epochs=1", "run.batch_size_train=8"]
    section = "datasets.lstp_shapes"
    of_files = [f"{section}.spans.{split}={path}" for split, path in files.items()]
    of_shards = [f"{section}.spans.{split}=shards" for split in shards] + [f"{section}.from_shards=true"]
    of_shards += [f"{section}.shards.spans.{split}=[{','.join(paths)}]" for split, paths in parallel.items()]
    results = []
    for name, spans in (("files", of_files), ("shards", of_shards)):
        out = recipe(tmp_path, f"sampler_{name}", train, *more, *spans)
        weights = load_state_dict_file(out / "checkpoints/last/model.safetensors")
        curve = [(row["step"], row["pseudo_iou"]) for row in read_jsonl(out / "log.jsonl") if row["kind"] == "eval"]
        results.append((weights, curve))
    (one, curve), (other, other_curve) = results
    assert curve == other_curve and len(curve) == 2
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_documents_walk_from_two_videos_to_a_run(tmp_path):
    """docs/data_format.md, its commands as they stand, but for where the two videos come from."""
    text = Path("docs/data_format.md").read_text(encoding="utf-8")
    part = text.partition("## From two videos to a training run\n\n")[2]
    lines = itertools.dropwhile(lambda line: not line.startswith("    "), part.splitlines())
    lines = list(itertools.takewhile(lambda line: line.startswith("    "), lines))
    first, *rest = textwrap.dedent("\n".join(lines)).splitlines()
    assert first.startswith("mkdir clips && cp ../shared/videos/*.mp4 clips/")
    (tmp_path / "clips").mkdir()
    for name in ("peppers_9s", "living_room_6s"):
        write_video(tmp_path / f"clips/{name}.mp4", moving_texture(20, (2.0, 1.0)))
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    script = "\n".join(["set -e", *rest])
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "whole: 1 shards, 2 sound samples" in done.stdout and "<img" in (tmp_path / "sheet.html").read_text()
    assert (tmp_path / "out/checkpoints/last/model.safetensors").is_file()


def test_evaluation_over_shards_writes_the_bytes_of_files(tmp_path):
    results = []
    for from_shards in ("false", "true"):
        more = ["model.checkpoint=null", f"datasets.lstp_shapes.from_shards={from_shards}", "model.flow.name=dis"]
        out = recipe(tmp_path, f"eval_{from_shards}", evaluate, *more)
        results.append((out / "result/test_video_qa.jsonl").read_bytes())
    assert results[0] == results[1] and len(results[0].splitlines()) == 6


@pytest.mark.parametrize("way", ["window=1", "loader=stream"])
def test_shards_for_a_window_or_a_stream_train_and_resume(tmp_path, way, capsys):
    """Another order than that of files, so other weights; stopped and resumed, the same ones."""
    # A constant rate: a cosine would end with max_steps.
    steps = [
        "run.batch_size_train=4",
        "run.train_splits=[train]",
        "run.max_epoch=1",
        "run.min_lr=1.0e-3",
        "run.warmup_ratio=0",
    ]
    more = ["datasets.lstp_shapes.from_shards=true", f"datasets.lstp_shapes.shards.{way}", *steps]
    whole = recipe(tmp_path, "base_whole", train, *more)
    recipe(tmp_path, "base_half", train, *more, "run.max_steps=3")
    if way == "loader=stream":  # where the run stands is a position in its own order
        other = ["datasets.lstp_shapes.shards.buffer=3", "run.resume_ckpt_path=auto"]
        recipe(tmp_path, "base_half", train, *more, *other, status=2)
        assert "how its shards are streamed" in capsys.readouterr().err
    half = recipe(tmp_path, "base_half", train, *more, "run.resume_ckpt_path=auto", "run.num_workers=2")
    one, other = (load_state_dict_file(out / "checkpoints/last/model.safetensors") for out in (whole, half))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
