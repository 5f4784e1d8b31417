"""Recipes over shards: built from a configuration, trained by `python -m lavis.train`, with the result of the files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from test_wds_flow import moving  # noqa: F401 (a fixture)
from test_wds_loader import assert_same
from test_wds_verify import media, packed  # noqa: F401 (a fixture)

from lavis_lstp import evaluate, train
from lavis_lstp.data.builders import ShardsBuilder, VideoInstructBuilder, VideoQABuilder
from lavis_lstp.errors import ConfigError
from lavis_lstp.models.weights import load_state_dict_file
from lavis_lstp.runners.data_order import sampling_of
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


SHAPES = {"seed": 0, "train_videos": 5, "val_videos": 1, "test_videos": 1, "train_images": 3, "size": 64}


def recipe(root: Path, name: str, module, *more: str) -> Path:
    """Runs a tiny recipe; the data lie in root/data, whichever way they are read."""
    sizes = [f"datasets.lstp_shapes.generate.{key}={value}" for key, value in SHAPES.items()]
    options = [*sizes, f"datasets.lstp_shapes.root={root / 'data'}", "datasets.lstp_shapes.num_frames=8", *more]
    out = root / name
    command = ["--cfg-path", f"projects/lstp/tiny_{name.split('_')[0]}.yaml", "--options", *options]
    assert module.main([*command, f"run.output_dir={out}"]) == 0
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


def test_evaluation_over_shards_writes_the_bytes_of_files(tmp_path):
    results = []
    for from_shards in ("false", "true"):
        more = ["model.checkpoint=null", f"datasets.lstp_shapes.from_shards={from_shards}", "model.flow.name=dis"]
        out = recipe(tmp_path, f"eval_{from_shards}", evaluate, *more)
        results.append((out / "result/test_video_qa.jsonl").read_bytes())
    assert results[0] == results[1] and len(results[0].splitlines()) == 6


def test_shards_for_a_window_train_and_resume(tmp_path):
    """Another order than that of files, so other weights; stopped and resumed, the same ones."""
    # A constant rate: a cosine would end with max_steps.
    steps = [
        "run.batch_size_train=4",
        "run.train_splits=[train]",
        "run.max_epoch=1",
        "run.min_lr=1.0e-3",
        "run.warmup_ratio=0",
    ]
    more = ["datasets.lstp_shapes.from_shards=true", "datasets.lstp_shapes.shards.window=1", *steps]
    whole = recipe(tmp_path, "base_whole", train, *more)
    recipe(tmp_path, "base_half", train, *more, "run.max_steps=3")
    half = recipe(tmp_path, "base_half", train, *more, "run.resume_ckpt_path=auto", "run.num_workers=2")
    one, other = (load_state_dict_file(out / "checkpoints/last/model.safetensors") for out in (whole, half))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
