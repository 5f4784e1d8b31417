"""Recipes over shards: built from a configuration, trained by `python -m lavis.train`, with the result of the files."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from test_wds_flow import moving  # noqa: F401 (a fixture)
from test_wds_loader import assert_same
from test_wds_verify import media, packed  # noqa: F401 (a fixture)

from lavis_lstp.data.builders import ShardsBuilder, VideoInstructBuilder, VideoQABuilder
from lavis_lstp.errors import ConfigError
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
