"""`flow` and `spans` write parallel sets: the same samples in the same order, and what files would have given."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_wds_rewrite import contents
from test_wds_verify import causes, media, packed  # noqa: F401 (a fixture)
from video_files import moving_texture, write_video

from lavis_lstp.data.video import read_frames
from lavis_lstp.models.flow import build_flow
from webdataset_tools import index
from webdataset_tools.__main__ import main
from webdataset_tools.format import parse_flow
from webdataset_tools.pack import Settings, pack
from webdataset_tools.sources import units


@pytest.fixture(scope="module")
def moving(tmp_path_factory) -> Path:
    """Two videos of a moving texture and a text."""
    root = tmp_path_factory.mktemp("moving")
    turns = [{"from": "human", "value": "<video>\nwhat?"}, {"from": "gpt", "value": "that"}]
    rows = [{"id": "t", "conversations": turns}]
    for n in range(2):
        write_video(root / f"m{n}.mp4", moving_texture(6, (2.0, -1.0 - n), width=64, height=64), fps=10)
        rows.append({"id": f"q{n}", "video": f"m{n}.mp4", "conversations": turns})
    (root / "c.json").write_text(json.dumps(rows))
    return root


def shards_of(root: Path, out: Path, **options) -> list[str]:
    pack(units("video-llava", [root / "c.json"], root=root), str(out / "x"), root, **options)
    return sorted(map(str, out.glob("x-*.tar")))


def flow_of(shards, out: Path, *options: str) -> list[str]:
    command = ["flow", *shards, "--out", str(out / "f"), "--num-frames", "4", "--size", "64", "--workers", "1"]
    assert main([*command, *options]) == 0
    return sorted(map(str, out.glob("f-*.tar")))


def fields(paths) -> list[np.ndarray]:
    found = index.ShardSet(paths)
    places = [(n, k) for n in range(len(paths)) for k in range(found.index(n).num_samples)]
    return [parse_flow(found.read(*place, ("flow",))["flow"], "x")[0] for place in places]


def test_flow_is_that_of_the_frames_at_an_eighth(moving, tmp_path):
    shards = shards_of(moving, tmp_path / "s", max_count=2)
    paths = flow_of(shards, tmp_path / "f")
    assert [index.scan(path).keys() for path in paths] == [index.scan(shard).keys() for shard in shards]
    first, second, text = fields(paths)  # videos come before texts
    assert text.shape == (0, 2, 8, 8)
    for n, found in enumerate((first, second)):
        frames = torch.from_numpy(read_frames(moving / f"m{n}.mp4", num=4, size=64).frames)[None]
        wanted = build_flow("dis", flow_size=8)(frames)[0].numpy()
        np.testing.assert_allclose(found, wanted, atol=2e-3 * np.abs(wanted).max())
        assert found.shape == (4, 2, 8, 8) and np.abs(found).max() > 0.1
    assert causes(paths) == {}


def test_other_extractors_and_stored_frames(moving, tmp_path):
    shards = shards_of(moving, tmp_path / "s")
    codec = fields(flow_of(shards, tmp_path / "codec", "--flow", "motion_vectors"))
    wanted = read_frames(moving / "m1.mp4", num=4, size=64, motion_vectors=True, flow_size=8).flow
    np.testing.assert_allclose(codec[1], wanted, atol=2e-3 * np.abs(wanted).max())
    frames = shards_of(moving, tmp_path / "frames", settings=Settings(frames=4, size=64, quality=98))
    stored = fields(flow_of(frames, tmp_path / "g"))
    assert np.abs(stored[0] - fields(flow_of(shards, tmp_path / "h"))[0]).mean() < 0.05
    assert main(["flow", *frames, "--out", str(tmp_path / "i/f"), "--num-frames", "5", "--size", "64"]) == 2
    assert main(["flow", *frames, "--out", str(tmp_path / "i/f"), "--flow", "motion_vectors"]) == 2


def test_flow_is_small_and_made_once(moving, tmp_path, capsys):
    shards = shards_of(moving, tmp_path / "s")
    (path,) = flow_of(shards, tmp_path / "f")
    per_frame = index.scan(path).members(0)["flow"].size / 4
    assert per_frame < 2 * 64 * 64 * 4 / 50  # of the published float32 files
    date = Path(path).stat().st_mtime_ns
    assert flow_of(shards, tmp_path / "f") == [path] and Path(path).stat().st_mtime_ns == date
    assert main(["flow", *shards, "--out", str(tmp_path / "f/f"), "--num-frames", "3"]) == 2
    assert "other settings" in capsys.readouterr().err
    first = Path(path).read_bytes()
    (again,) = flow_of(shards, tmp_path / "f2")
    assert Path(again).read_bytes() == first
    assert main(["flow", *shards, "--out", str(tmp_path / "j/f"), "--weights", "w.pth"]) == 2


def test_spans_of_a_file_go_to_their_questions(media, tmp_path, capsys):  # noqa: F811
    shards = packed(media, tmp_path / "s", max_count=2)
    rows = {f"q{n}": {"span": [n, n + 2], "scores": [0.0] * 4} for n in range(2)} | {"other": {"span": None}}
    spans = {"format": "lavis_lstp.spans", "version": 1, "unit": "frames", "num_frames": 4, "made_by": {"who": "me"}}
    (tmp_path / "spans.json").write_text(json.dumps(spans | {"spans": rows}))
    command = ["spans", *shards, "--spans", str(tmp_path / "spans.json"), "--workers", "1"]
    assert main([*command, "--out", str(tmp_path / "p/x")]) == 0
    paths = sorted(map(str, (tmp_path / "p").glob("*.tar")))
    found = [json.loads(members["span.json"]) for members in contents(paths).values()]
    assert [one["spans"] for one in found] == [{"q0": rows["q0"]}, {"q1": rows["q1"]}, {}, {}]
    assert found[0]["made_by"] == {"who": "me"} and found[0]["num_frames"] == 4 and causes(paths) == {}
    assert "1 questions without" in capsys.readouterr().out
    assert main([*command, "--out", str(tmp_path / "q/x"), "--strict"]) == 2
    assert "no span for 1 of 3 questions, first ['q2']" in capsys.readouterr().err
    (tmp_path / "spans.json").write_text(json.dumps({"q0": [0, 1]}))
    assert main([*command, "--out", str(tmp_path / "q/x")]) == 2
