"""`flow` and `spans` write parallel sets: the same samples in the same order, and what files would have given."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from test_wds_rewrite import contents
from test_wds_verify import causes, media, only, packed, rewritten  # noqa: F401 (a fixture)
from video_files import moving_texture, write_video

from lavis_lstp.data.shards import flow_code, index, sets
from lavis_lstp.data.shards.format import dump_flow, parse_flow
from lavis_lstp.data.video.reading import read_frames, read_pairs
from lavis_lstp.models.where.flow import UNINITIALISED, build_flow, radius_normalised
from lavis_lstp.models.where.temporal_sampler import TemporalSampler
from webdataset_tools.__main__ import main
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
    found = sets.ShardSet(paths)
    places = [(n, k) for n in range(len(paths)) for k in range(found.index(n).num_samples)]
    return [parse_flow(found.read(*place, ("flow",))["flow"], "x")[0] for place in places]


def error_of(found: np.ndarray, wanted: np.ndarray) -> float:
    """RMS of the difference over that of what was wanted."""
    return float(np.sqrt(np.square(found.astype(np.float64) - wanted).mean() / np.square(wanted).mean()))


def test_flow_is_that_of_the_frames(moving, tmp_path):
    shards = shards_of(moving, tmp_path / "s", max_count=2)
    paths = flow_of(shards, tmp_path / "f")
    assert [index.scan(path).keys() for path in paths] == [index.scan(shard).keys() for shard in shards]
    first, second, text = fields(paths)  # videos come before texts
    assert text.shape == (0, 2, 64, 64)
    for n, found in enumerate((first, second)):
        frames = torch.from_numpy(read_frames(moving / f"m{n}.mp4", num=4, size=64).frames)[None]
        wanted = build_flow("dis")(frames)[0].numpy()
        assert error_of(found, wanted) < 0.02 and found.dtype == np.float16
        assert found.shape == (4, 2, 64, 64) and np.abs(found).max() > 0.1
    assert causes(paths) == {}


def test_a_sample_without_its_video_is_named(media, tmp_path, capsys):  # noqa: F811
    (shard,) = packed(media, tmp_path)
    rewritten(Path(shard), only("v1%2Emp4", mp4=None))
    Path(shard).with_suffix(".index").unlink(missing_ok=True)
    assert main(["flow", shard, "--out", str(tmp_path / "f"), "--num-frames", "2", "--size", "32"]) == 2
    assert "v1%2Emp4: expected one video, it has none" in capsys.readouterr().err


def test_flow_to_the_next_picture_of_each_video(moving, tmp_path, capsys):
    shards = shards_of(moving, tmp_path / "s")
    local = ("--flow-pairs", "local")
    codec = fields(flow_of(shards, tmp_path / "codec", "--flow", "motion_vectors", *local))
    wanted = read_frames(moving / "m1.mp4", num=4, size=64, motion_vectors=True, flow_pairs="local").flow
    assert error_of(codec[1], wanted) < 0.02
    pairs = torch.from_numpy(read_pairs(moving / "m0.mp4", num=4, size=64))
    dis = fields(flow_of(shards, tmp_path / "dis", *local))
    assert error_of(dis[0], build_flow("dis")(pairs)[:, 0].numpy()) < 0.02
    frames = shards_of(moving, tmp_path / "frames", settings=Settings(frames=4, size=64, quality=98))
    assert main(["flow", *frames, "--out", str(tmp_path / "i/f"), "--num-frames", "4", "--size", "64", *local]) == 2
    assert "stored frames have no next picture" in capsys.readouterr().err


def test_other_extractors_and_stored_frames(moving, tmp_path):
    shards = shards_of(moving, tmp_path / "s")
    codec = fields(flow_of(shards, tmp_path / "codec", "--flow", "motion_vectors"))
    wanted = read_frames(moving / "m1.mp4", num=4, size=64, motion_vectors=True).flow
    assert error_of(codec[1], wanted) < 0.02
    frames = shards_of(moving, tmp_path / "frames", settings=Settings(frames=4, size=64, quality=98))
    stored = fields(flow_of(frames, tmp_path / "g"))
    assert np.abs(stored[0] - fields(flow_of(shards, tmp_path / "h"))[0]).mean() < 0.05
    assert main(["flow", *frames, "--out", str(tmp_path / "i/f"), "--num-frames", "5", "--size", "64"]) == 2
    assert main(["flow", *frames, "--out", str(tmp_path / "i/f"), "--flow", "motion_vectors"]) == 2


def test_flow_is_small_and_made_once(moving, tmp_path, capsys):
    shards = shards_of(moving, tmp_path / "s")
    (path,) = flow_of(shards, tmp_path / "f")
    per_frame = index.scan(path).members(0)["flow"].size / 4
    assert per_frame < 2 * 224 * 224 * 4 / 50  # of the published float32 files
    date = Path(path).stat().st_mtime_ns
    assert flow_of(shards, tmp_path / "f") == [path] and Path(path).stat().st_mtime_ns == date
    assert main(["flow", *shards, "--out", str(tmp_path / "f/f"), "--num-frames", "3"]) == 2
    assert "other settings" in capsys.readouterr().err
    first = Path(path).read_bytes()
    (again,) = flow_of(shards, tmp_path / "f2")
    assert Path(again).read_bytes() == first
    assert main(["flow", *shards, "--out", str(tmp_path / "j/f"), "--weights", "w.pth"]) == 2


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> dict[str, torch.Tensor]:
    """Flow [1,T,2,224,224] between frames of a picture in picture, each moving its own way, by every extractor."""
    ground, thing = moving_texture(8, (2.5, -1.0), 224, 224), moving_texture(8, (-4.0, 3.0), 96, 80, seed=1)
    pictures = []
    for n, (picture, inner) in enumerate(zip(ground, thing, strict=True)):
        picture[60 + 4 * n : 140 + 4 * n, 40 + 3 * n : 136 + 3 * n] = inner
        pictures.append(picture)
    path = write_video(tmp_path_factory.mktemp("clips") / "a.mp4", pictures, fps=10)
    read = read_frames(path, num=8, size=224, motion_vectors=True)
    frames = torch.from_numpy(read.frames)[None]
    found = {"motion_vectors": torch.from_numpy(read.flow)[None], "dis": build_flow("dis")(frames)}
    for name in ("raft_small", "raft_large"):
        torch.manual_seed(0)
        found[name] = build_flow(name, weights=UNINITIALISED, iterations=2)(frames[:, :3])
    return found


@pytest.mark.parametrize("name", ["dis", "motion_vectors", "raft_small", "raft_large"])
def test_stored_flow_moves_no_logit_by_a_hundredth(clips, name):
    """In 1/50 of the bytes of the published files, header included; benchmarks/stored_flow.py does it with more."""
    flow = clips[name]
    raw = dump_flow(flow[0].numpy(), {"extractor": name})
    if flow.shape[1] > 3:  # the header is about 450 bytes a clip
        assert len(raw) <= flow[0].numpy().astype(np.float32).nbytes / 50
    stored = torch.from_numpy(parse_flow(raw, "x")[0]).float()[None]
    assert stored.shape == flow.shape
    sizes = {"hidden_size": 192, "num_layers": 4, "num_heads": 4, "fusion_layer": 2, "vocab_size": 50, "text_width": 64}
    mask, text = torch.ones(flow.shape[:2]), torch.arange(6)[None]
    for seed in range(3):
        torch.manual_seed(seed)
        sampler = TemporalSampler(**sizes, fold_flow=True).eval()
        for change in (lambda field: field, radius_normalised):
            with torch.no_grad():
                found, wanted = (sampler(change(one), mask, text, torch.ones(1, 6)) for one in (stored, flow))
            for ours, theirs in zip(found[1:], wanted[1:], strict=True):
                spread = theirs.std()  # the flow does say something; how much, the version's random weights decide
                assert spread > 1e-3
                assert (ours - theirs).abs().max() < min(1e-2, spread) and ours.argmax() == theirs.argmax()


def test_each_extractor_is_stored_where_it_computes(clips):
    """What the writer finds out by trying."""
    forms = {name: flow_code.encode(flow[0].numpy(), 8028 * flow.shape[1]).form for name, flow in clips.items()}
    assert [forms[name].lattice for name in ("dis", "motion_vectors", "raft_small", "raft_large")] == [
        "half",
        "full",
        "corners",
        "full",
    ]
    assert forms["raft_large"].cosine and not forms["dis"].cosine


@pytest.mark.parametrize("shape", [(3, 2, 64, 48), (2, 2, 31, 24), (1, 2, 1, 1), (0, 2, 16, 16), (2, 2, 8, 8)])
def test_any_size_is_stored(shape):
    turning = np.indices(shape[2:])[::-1] * np.array([1, -1])[:, None, None] / 20  # (y, x) -> (x, -y) / 20
    flow = np.ones(shape) * turning + np.arange(shape[0])[:, None, None, None]
    found = parse_flow(dump_flow(flow, {}), "x")[0]
    assert found.shape == shape
    np.testing.assert_allclose(found, flow, atol=0.05)


def test_numbers_larger_than_a_byte_come_back():
    """A point that moves among still ones: its difference takes 16 bits, beside 8 for the others."""
    for lattice in ("full", "half", "corners"):
        form = flow_code.Form(32, 32, lattice, False)
        values = np.zeros((2, 2, *form.grid))
        values[0, 1, 2, 3], values[1, 0, 0, 0] = 40.0, -40.0
        coded = flow_code._coded(form, values, np.array([0.01, 0.02]))
        places = [flow_code._interpolation(lattice, 32) if lattice != "full" else np.eye(32)] * 2
        np.testing.assert_allclose(flow_code.decode(coded), places[0] @ values @ places[1].T, atol=0.04)


def test_damaged_flow_is_named():
    flow = np.random.default_rng(0).normal(0, 3, (2, 2, 16, 16))
    good = flow_code.encode(flow, 2000)
    for data in (good.data[:-3], good.data + b"x", b"\xff" * 40, b"", zlib.compress(bytes(5), wbits=-15)):
        with pytest.raises(ValueError, match=r"deflate|expected 2 fields of 2 x \d+ x \d+ numbers"):
            flow_code.decode(good._replace(data=data))
    for wrong in ({"lattice": "third"}, {"height": "-1"}, {"width": "x"}, {"height": "9", "lattice": "half"}):
        with pytest.raises(ValueError, match="no such form|invalid literal"):
            flow_code.Form.of({**good.form.about(), **wrong})


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
