"""`lavis_lstp.models.where.flow`, the codec's motion vectors, and `lavis-lstp flow`: known motion is found."""

from __future__ import annotations

import copy
import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from video_files import moving_texture, numbered_video, write_video

from lavis_lstp.commands import flow as flow_files
from lavis_lstp.commands.flow import find_videos
from lavis_lstp.commands.flow import main as flow_main
from lavis_lstp.data.flow_files import read_flow_file
from lavis_lstp.data.store import Store
from lavis_lstp.data.video.reading import probe, read_frames
from lavis_lstp.errors import AnnotationError, ConfigError, LstpError, VideoError, WeightsError
from lavis_lstp.models.where.flow import FLOW_NAMES, DisFlow, build_flow, radius_normalised, resize_flow

VELOCITIES = [(3.0, 0.0), (-3.0, 0.0), (0.0, 2.0), (0.0, -2.0), (1.5, -0.75)]
CODECS = {
    "h264": ("libx264", {}),
    "h264_fast": ("libx264", {"preset": "veryfast"}),
    "h264_no_b": ("libx264", {"bf": "0"}),
    "h264_short_groups": ("libx264", {"g": "8"}),
    "mpeg4": ("mpeg4", {"bf": "2", "b": "4M"}),
    "mpeg2": ("mpeg2video", {"bf": "2", "b": "8M"}),
}


def texture_clip(velocity, count=4) -> torch.Tensor:
    frames = np.stack([p.transpose(2, 0, 1) for p in moving_texture(count, velocity)])
    return torch.from_numpy(frames)[None]


def texture_video(path: Path, velocity, count=32, codec="h264", **kw) -> Path:
    name, options = CODECS[codec]
    return write_video(path, moving_texture(count, velocity), codec=name, options=options, **kw)


def assert_moves(flow, velocity, *, within: float) -> None:
    """Median and bulk of [T,2,h,w] away from the edges, where content enters."""
    inside = np.asarray(flow)[:, :, 16:-16, 32:-32]
    wanted = np.asarray(velocity).reshape(-1, 2)
    assert np.median(inside, axis=(2, 3)) == pytest.approx(np.broadcast_to(wanted, (len(inside), 2)), abs=within)
    off = np.abs(inside - wanted[:, :, None, None]).max(axis=1)
    assert (off < max(0.5, 2 * within)).mean() > 0.9


# ---- known motion is found ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("velocity", VELOCITIES)
def test_dis_finds_the_motion(velocity):
    flow = build_flow("dis")(texture_clip(velocity))
    assert flow.shape == (1, 4, 2, 128, 192) and flow.dtype == torch.float32
    assert_moves(flow[0], velocity, within=0.15)
    assert (flow[0, 3] == flow[0, 2]).all()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("velocity", VELOCITIES)
def test_motion_vectors_find_the_motion(tmp_path, codec, velocity):
    path = texture_video(tmp_path / "moving.mp4", velocity, codec=codec)
    for indices in ([4, 5, 6, 7], [3, 8, 13, 20, 31]):
        video = read_frames(path, indices=indices, motion_vectors=True)
        apart = np.diff([*indices, 2 * indices[-1] - indices[-2]])
        assert video.flow.shape == (len(indices), 2, 128, 192) and video.flow.dtype == np.float32
        assert_moves(video.flow / apart[:, None, None, None], velocity, within=0.25)
        assert (video.flow[-1] == video.flow[-2]).all()
        frames, given = torch.from_numpy(video.frames)[None], torch.from_numpy(video.flow)[None]
        assert (build_flow("motion_vectors")(frames, flow=given) == given).all()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("velocity", VELOCITIES)
def test_local_motion_vectors_are_those_to_the_next_picture(tmp_path, codec, velocity):
    """Whatever lies between the candidates; the frames are those that are read without flow."""
    path = texture_video(tmp_path / "moving.mp4", velocity, codec=codec)
    for indices in ([4, 5, 6, 7], [0, 3, 8, 20, 30]):
        video = read_frames(path, indices=indices, motion_vectors=True, flow_pairs="local")
        assert_moves(video.flow, velocity, within=0.25)
        assert (video.frames == read_frames(path, indices=indices).frames).all()


def test_local_motion_vectors_look_at_a_few_pictures_a_candidate(tmp_path):
    options = {"g": "20", "keyint_min": "20", "sc_threshold": "0", "bf": "2", "crf": "15"}
    path = write_video(tmp_path / "long.mp4", moving_texture(200, (3, 1)), options=options)
    sampled = read_frames(path, num=5, motion_vectors=True)
    local = read_frames(path, num=5, motion_vectors=True, flow_pairs="local")
    assert local.count.pictures <= 5 * 20 < sampled.count.pictures
    assert_moves(local.flow, (3, 1), within=0.25)
    keys = read_frames(path, num=5, motion_vectors=True, flow_pairs="local", exact=False)
    assert all(i % 20 == 0 for i in keys.indices) and keys.count.pictures <= 5 * 8
    assert_moves(keys.flow, (3, 1), within=0.25)
    with pytest.raises(ConfigError, match="flow_pairs 'locla'.*did you mean 'local'"):
        read_frames(path, num=5, motion_vectors=True, flow_pairs="locla")


def test_long_ways_between_candidates_are_announced(tmp_path, caplog, monkeypatch):
    path = texture_video(tmp_path / "moving.mp4", (1, 0))
    monkeypatch.setattr("lavis_lstp.data.video.reading.MANY_PICTURES", 10)
    read_frames(path, indices=[1, 30], motion_vectors=True)
    assert "followed through 29 pictures" in caplog.text and "flow_pairs: local" in caplog.text
    caplog.clear()
    read_frames(path, indices=[1, 30], motion_vectors=True, flow_pairs="local")
    assert not caplog.text


def raft_weights(name: str) -> str:
    path = os.environ.get(f"LAVIS_LSTP_{name.upper()}")
    if not path:
        pytest.skip(f"needs trained weights: set LAVIS_LSTP_{name.upper()} to torchvision's file of {name}")
    return path


@pytest.mark.parametrize("name", ["raft_large", "raft_small"])
@pytest.mark.parametrize("velocity", VELOCITIES)
def test_raft_finds_the_motion(name, velocity):
    flow = build_flow(name, weights=raft_weights(name))(texture_clip(velocity, count=2))
    assert_moves(flow[0], velocity, within=0.25)


def test_precomputed_flow_is_handed_through():
    frames, given = texture_clip((1, 0)), torch.randn(1, 4, 2, 10, 12).half()
    flow = build_flow("precomputed")(frames, flow=given)
    assert flow.dtype == torch.float32
    assert (flow[:, :3] == given[:, :3].float()).all() and (flow[:, 3] == flow[:, 2]).all()


def test_none_is_still():
    assert not build_flow("none", flow_size=(5, 7))(texture_clip((3, 0))).any()
    assert build_flow("none", flow_size=(5, 7))(texture_clip((3, 0))).shape == (1, 4, 2, 5, 7)


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_motion_vectors_turn_with_the_picture(tmp_path, rotation):
    path = texture_video(tmp_path / "turned.mp4", (3, 1), count=8, rotation=rotation)
    video = read_frames(path, indices=[2, 3, 4], motion_vectors=True)
    dis = build_flow("dis")(torch.from_numpy(video.frames)[None])[0].numpy()
    assert video.flow.shape == dis.shape
    assert np.median(video.flow, axis=(2, 3)) == pytest.approx(np.median(dis, axis=(2, 3)), abs=0.3)


def test_two_directions_are_told_apart_in_one_picture(tmp_path):
    """Left half to the left, right half to the right, a still band between."""
    left, right = list(moving_texture(16, (-2, 0))), list(moving_texture(16, (2, 0), seed=1))
    pictures = []
    for a, b in zip(left, right, strict=True):
        picture = np.full_like(a, 128)
        picture[:, :80], picture[:, -80:] = a[:, :80], b[:, -80:]
        pictures.append(picture)
    path = write_video(tmp_path / "halves.mp4", pictures, options={"crf": "15"})
    video = read_frames(path, indices=[3, 4, 5, 6], motion_vectors=True)
    for flow in (video.flow, build_flow("dis")(torch.from_numpy(video.frames)[None])[0].numpy()):
        assert np.median(flow[:, 0, 20:-20, 16:64]) == pytest.approx(-2, abs=0.3)
        assert np.median(flow[:, 0, 20:-20, -64:-16]) == pytest.approx(2, abs=0.3)


def test_motion_vectors_in_px_of_the_size_asked_for(tmp_path):
    path = texture_video(tmp_path / "moving.mp4", (3, 2), count=12)
    small = read_frames(path, indices=[4, 5, 6], size=(64, 48), motion_vectors=True)
    assert small.flow.shape == (3, 2, 64, 48)
    assert np.median(small.flow, axis=(2, 3))[0] == pytest.approx([3 * 48 / 192, 2 * 64 / 128], abs=0.1)
    tiny = read_frames(path, indices=[4, 5, 6], size=224, flow_size=16, motion_vectors=True)
    assert tiny.frames.shape[-1] == 224 and tiny.flow.shape == (3, 2, 16, 16)
    assert np.median(tiny.flow, axis=(2, 3))[0] == pytest.approx([3 * 16 / 192, 2 * 16 / 128], abs=0.03)
    with pytest.raises(VideoError, match="ascending frames without repeats"):
        read_frames(path, indices=[5, 4], motion_vectors=True)


def test_codecs_without_motion_vectors_say_so(tmp_path):
    options = {"x265-params": "log-level=0"}
    hevc = write_video(tmp_path / "a.mp4", moving_texture(6, (2, 0)), codec="libx265", options=options)
    still = write_video(tmp_path / "b.mp4", moving_texture(6, (2, 0)), options={"g": "1"})
    for path in (hevc, still):
        with pytest.raises(VideoError, match=f"{path.name}: no motion vectors.*'dis'"):
            read_frames(path, num=4, motion_vectors=True)
        with pytest.raises(VideoError, match=f"{path.name}: no motion vectors near.*'dis'"):
            read_frames(path, num=4, motion_vectors=True, flow_pairs="local")


def test_a_still_picture_has_no_motion(tmp_path):
    path = write_video(tmp_path / "still.mp4", [next(moving_texture(1, (0, 0)))] * 12)
    video = read_frames(path, num=4, motion_vectors=True)
    assert np.abs(video.flow).max() < 0.05


def test_real_footage_agrees_with_dis(real_videos):
    """Sign and size of what moves: per-frame mean motion of codec and DIS correlate."""
    for path in real_videos:
        if probe(path).duration_s > 60:  # a film fades in from black: nothing moves there but noise
            continue
        video = read_frames(path, indices=range(20, 60), size=128, motion_vectors=True)
        dis = build_flow("dis")(torch.from_numpy(video.frames)[None])[0].numpy()
        moving = np.hypot(dis[:, 0], dis[:, 1]) > 1
        if moving.mean() > 0.01:
            pair = np.stack([video.flow.transpose(1, 0, 2, 3)[:, moving], dis.transpose(1, 0, 2, 3)[:, moving]])
            assert np.corrcoef(pair.reshape(2, -1))[0, 1] > 0.5, path.name


# ---- pairs, padding, size, normalising ---------------------------------------------------------------------------


def test_padding_has_no_flow_and_forms_no_pair():
    clip, mask = texture_clip((3, 0), count=5), torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    frames = torch.cat([clip] * 3)
    flow = build_flow("dis")(frames, mask)
    assert not flow[0, 3:].any() and not flow[1].any()
    assert (flow[0, 2] == flow[0, 1]).all() and (flow[0, :2] == flow[2, :2]).all()
    assert (flow[2, 4] == flow[2, 3]).all()
    noise = frames.clone()
    noise[0, 3:], noise[1, 1:] = 255, 7
    assert (build_flow("dis")(noise, mask) == flow).all()
    given = torch.randn(3, 5, 2, 4, 4)
    masked = build_flow("precomputed")(frames, mask, flow=given)
    assert not masked[0, 3:].any() and not masked[1].any() and (masked[0, :2] == given[0, :2]).all()


def test_fields_are_kept_by_what_they_are_computed_from(tmp_path, monkeypatch):
    """Each clip by itself, whatever stands beside it in a batch; another extractor's are others."""
    clip = texture_clip((3, 0), count=5)[..., :64, :64].contiguous()
    frames, mask = torch.cat([clip, clip, clip[:, [0] * 5]]), torch.tensor([[1] * 5, [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    expected = build_flow("dis", flow_size=32)(frames, mask)
    computed = []
    monkeypatch.setattr(
        DisFlow, "__call__", lambda self, *args, real=DisFlow.__call__: computed.append(1) or real(self, *args)
    )

    def kept(**settings):
        made = build_flow("dis", **settings)
        made.store = Store(tmp_path)
        return made

    assert torch.equal(kept(flow_size=32)(frames, mask), expected) and len(computed) == 1
    assert torch.equal(kept(flow_size=32)(frames[:2], mask[:2]), expected[:2]) and len(computed) == 1
    assert len(Store(tmp_path).entries()) == 2
    other = {"flow_size": 32, "dis_preset": "fast"}
    assert torch.equal(kept(**other)(frames[:1]), build_flow("dis", **other)(frames[:1]))
    assert kept(flow_size=16)(frames[:1]).shape[-1] == 16
    changed = frames[:1].clone()
    changed[0, 2] = 0
    assert torch.equal(kept(flow_size=32)(changed), build_flow("dis", flow_size=32)(changed))


def test_raft_s_weights_are_part_of_what_is_kept(tmp_path):
    made = [build_flow("raft_small", weights="checkpoint", iterations=1) for _ in range(2)]
    assert made[0].estimator.identity() == made[0].estimator.identity() != made[1].estimator.identity()


@pytest.mark.parametrize("name", FLOW_NAMES)
def test_one_frame_has_zero_flow(name):
    frames = texture_clip((3, 0), count=1)[..., :64, :64]
    weights = "checkpoint" if name.startswith("raft") else None
    flow = build_flow(name, weights=weights, iterations=1)(frames, flow=torch.ones(1, 1, 2, 64, 64))
    assert flow.shape == (1, 1, 2, 64, 64) and not flow.any()


def test_a_resized_field_counts_in_its_own_px():
    flow = build_flow("dis", flow_size=(64, 48))(texture_clip((3, 2)))
    assert flow.shape == (1, 4, 2, 64, 48)
    assert_moves(flow[0].numpy().repeat(2, 2).repeat(2, 3), (3 * 48 / 192, 2 * 64 / 128), within=0.1)
    field = torch.randn(2, 3, 2, 8, 8)
    assert resize_flow(field, (8, 8)) is field
    constant = torch.ones(1, 1, 2, 4, 8)
    bigger = resize_flow(constant, (12, 16))
    assert bigger[0, 0, 0].unique().tolist() == pytest.approx([2.0])
    assert bigger[0, 0, 1].unique().tolist() == pytest.approx([3.0])


def test_published_training_divides_by_the_clip_s_largest_radius():
    field = torch.zeros(2, 3, 2, 4, 4)
    field[0, 1, :, 2, 3] = torch.tensor([3.0, -4.0])
    field[0, 2, 0, 0, 0] = 1.0
    scaled = radius_normalised(field)
    assert scaled[0, 1, :, 2, 3].tolist() == pytest.approx([3 / 5.00001, -4 / 5.00001], abs=1e-7)
    assert scaled[0, 2, 0, 0, 0] == pytest.approx(1 / 5.00001) and not scaled[1].any()
    clip = texture_clip((3, 0))
    plain, preset = build_flow("dis")(clip), build_flow("dis", flow_preset="published_training")(clip)
    assert (preset == radius_normalised(plain)).all()
    assert preset.square().sum(2).max().sqrt() == pytest.approx(1, abs=1e-4)
    assert (build_flow("dis", flow_preset="published_inference")(clip) == plain).all()


@pytest.mark.parametrize("side", [4, 9, 15, 40])
def test_dis_takes_small_frames(side):
    frames = texture_clip((1, 0), count=3)[..., :side, :side]
    flow = build_flow("dis")(frames)
    assert flow.shape[-2:] == (side, side) and flow.isfinite().all()


def test_wrong_tensors_are_refused():
    dis = build_flow("dis")
    with pytest.raises(ValueError, match="uint8 frames"):
        dis(torch.zeros(1, 2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"frame_mask \[1, 2\]"):
        dis(torch.zeros(1, 2, 3, 32, 32, dtype=torch.uint8), torch.ones(1, 3))
    for name in ("motion_vectors", "precomputed"):
        with pytest.raises(LstpError, match=f"flow: {name}, or choose model.flow.name: dis"):
            build_flow(name)(texture_clip((1, 0)))
        with pytest.raises(LstpError, match=r"\[1, 4\] fields.*got flow of shape \[1, 3, 2, 4, 4\]"):
            build_flow(name)(texture_clip((1, 0)), flow=torch.zeros(1, 3, 2, 4, 4))


# ---- RAFT --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raft_files(tmp_path_factory):
    from torchvision.models import optical_flow

    folder, files = tmp_path_factory.mktemp("raft"), {}
    torch.manual_seed(0)
    for name in ("raft_large", "raft_small"):
        net = getattr(optical_flow, name)(weights=None).eval()
        for module in net.modules():  # statistics that evaluation must use and never change
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
        files[name] = folder / f"{name}.pth"
        torch.save(net.state_dict(), files[name])
        save_file(net.state_dict(), folder / f"{name}.safetensors")
    return files


def torchvision_raft(name, file):
    from torchvision.models import optical_flow

    net = getattr(optical_flow, name)(weights=None).eval()
    net.load_state_dict(torch.load(file, weights_only=True))
    return net


@pytest.mark.parametrize(("name", "iterations"), [("raft_small", 20), ("raft_large", 3)])
@torch.no_grad()
def test_raft_is_torchvision_s(raft_files, name, iterations):
    frames = texture_clip((3, 0), count=3)[..., :128, :136]
    net = torchvision_raft(name, raft_files[name])
    images = frames[0].float() / 255 * 2 - 1
    wanted = net(images[:2], images[1:], num_flow_updates=iterations)[-1]
    for weights in (raft_files[name], raft_files[name].with_suffix(".safetensors")):
        flow = build_flow(name, weights=weights, iterations=iterations)(frames)
        assert torch.allclose(flow[0, :2], wanted, atol=1e-4) and (flow[0, 2] == flow[0, 1]).all()
    one_by_one = build_flow(name, weights=raft_files[name], iterations=iterations, pairs_at_once=1)(frames)
    assert torch.allclose(one_by_one, flow, atol=1e-3)


@torch.no_grad()
def test_raft_runs_twenty_updates_by_default_as_published(raft_files):
    assert build_flow("raft_small", weights=raft_files["raft_small"]).estimator.iterations == 20


@torch.no_grad()
def test_published_inference_feeds_raft_as_the_published_demo(raft_files):
    frames = texture_clip((3, 0), count=2)[..., :128, :128]
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    seen = 2 * ((frames[0].float() / 255 - mean) / std / 255) - 1
    net = torchvision_raft("raft_small", raft_files["raft_small"])
    wanted = net(seen[:1], seen[1:], num_flow_updates=2)[-1]
    kw = {"weights": raft_files["raft_small"], "iterations": 2}
    flow = build_flow("raft_small", flow_preset="published_inference", **kw)(frames)
    assert torch.allclose(flow[0, 0], wanted[0], atol=1e-4)
    assert not torch.allclose(build_flow("raft_small", **kw)(frames), flow, atol=1e-3)


@torch.no_grad()
def test_raft_pads_frames_it_cannot_take(raft_files):
    frames = texture_clip((2, 0), count=2)[..., :70, :150]
    flow = build_flow("raft_small", weights=raft_files["raft_small"], iterations=2)(frames)
    images = torch.nn.functional.pad(frames[0].float() / 255 * 2 - 1, (1, 1, 29, 29), mode="replicate")
    net = torchvision_raft("raft_small", raft_files["raft_small"])
    wanted = net(images[:1], images[1:], num_flow_updates=2)[-1][..., 29:99, 1:151]
    assert flow.shape == (1, 2, 2, 70, 150) and torch.allclose(flow[0, 0], wanted[0], atol=1e-4)


def test_raft_computes_in_float32_whatever_the_run_s_precision(raft_files):
    """bf16 would give another field than the files of `lavis-lstp flow`, and on a CPU take 85 times as long."""
    flow = build_flow("raft_small", weights=raft_files["raft_small"], iterations=1)
    frames = torch.randint(0, 255, (1, 2, 3, 32, 32), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = flow(frames)
    assert torch.equal(under_autocast, flow(frames))


def test_no_tf32_while_flow_is_computed(monkeypatch):
    """cuDNN's default would make a GPU's fields differ from the CPU's by 0.05 px."""
    flow = build_flow("dis")
    seen = []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    own = flow.estimator
    flow.estimator = lambda *given: seen.append(torch.backends.cudnn.allow_tf32) or own(*given)
    flow(torch.zeros(1, 2, 3, 32, 32, dtype=torch.uint8))
    assert seen == [False] and torch.backends.cudnn.allow_tf32 is True


def test_raft_stays_frozen_and_in_eval_mode(raft_files):
    extractor = build_flow("raft_large", weights=raft_files["raft_large"], iterations=1)
    around = torch.nn.Sequential(extractor)
    around.train()
    assert not any(m.training for m in extractor.model.modules())
    assert not any(p.requires_grad for p in extractor.parameters())
    before = {k: v.clone() for k, v in extractor.state_dict().items()}
    assert all(k.startswith("model.") for k in before) and len(before) == 169
    extractor(texture_clip((1, 0), count=2)[..., :128, :128])
    assert all((extractor.state_dict()[k] == v).all() for k, v in before.items())
    twin = copy.deepcopy(extractor)
    assert twin.estimator.net is twin.model and twin.model is not extractor.model


def test_published_weights_load_under_their_own_names(raft_files, golden, tmp_path):
    mapping = json.loads((golden / "raft.json").read_text())["mapping_ref_to_torchvision"]
    state = torch.load(raft_files["raft_large"], weights_only=True)
    published = {f"module.{theirs}": state[ours].clone() for theirs, ours in mapping.items()}
    assert len(published) == 179
    torch.save(published, tmp_path / "raft-things.pth")
    loaded = build_flow("raft_large", weights=tmp_path / "raft-things.pth").model.state_dict()
    assert loaded.keys() == state.keys() and all((loaded[k] == v).all() for k, v in state.items())


def test_missing_and_wrong_weights(raft_files, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    with pytest.raises(WeightsError) as caught:
        build_flow("raft_large")
    line = str(caught.value)
    assert "https://download.pytorch.org/models/raft_large" in line and str(tmp_path / "cache") in line
    with pytest.raises(WeightsError, match="no-such.pth, where there is no file"):
        build_flow("raft_small", weights=tmp_path / "no-such.pth")
    with pytest.raises(WeightsError, match="does not hold raft_small: .*missing.*another shape.*raft_small_C_T"):
        build_flow("raft_small", weights=raft_files["raft_large"])
    (tmp_path / "text.pth").write_text("weights?")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"net": torch.nn.Linear(1, 1)}, tmp_path / "code.pth")  # would run code when unpickled
    for name in ("text.pth", "empty.safetensors", "list.pth", "code.pth"):
        with pytest.raises(WeightsError, match=name):
            build_flow("raft_small", weights=tmp_path / name)
    (tmp_path / "cache" / "hub" / "checkpoints").mkdir(parents=True)
    cached = tmp_path / "cache" / "hub" / "checkpoints" / "raft_small_C_T_V2-01064c6d.pth"
    cached.write_bytes(raft_files["raft_small"].read_bytes())
    assert build_flow("raft_small").model is not None


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ConfigError, match="unknown flow 'raftt'; did you mean 'raft_small'|'raft_large'.*known: dis"):
        build_flow("raftt")
    with pytest.raises(ConfigError, match="unknown flow_preset 'published'"):
        build_flow("dis", flow_preset="published")
    with pytest.raises(ConfigError, match="unknown dis_preset 'quick'"):
        build_flow("dis", dis_preset="quick")
    assert build_flow("dis", weights="x.pth").model is None  # RAFT's setting, read by RAFT alone
    with pytest.raises(ConfigError, match="flow_size of at least 1"):
        build_flow("dis", flow_size=0)


# ---- lavis-lstp flow ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for name, velocity in (("a", (2, 0)), ("b", (0, -1))):
        write_video(tmp_path / f"{name}.mp4", moving_texture(12, velocity, 64, 64))
    return tmp_path


def run_flow(*args, frames=4):
    return flow_main([*map(str, args), "--num-frames", str(frames), "--size", "48"])


@pytest.mark.parametrize("kind", ["dis", "motion_vectors"])
def test_flow_files_hold_what_training_would_compute(folder, kind, capsys):
    out = folder / "flow"
    assert run_flow(folder, out, "--flow", kind) == 0
    assert "2 videos, 0 of them there already, 0 failed" in capsys.readouterr().out
    video = read_frames(folder / "a.mp4", num=4, size=48, motion_vectors=True)
    wanted = video.flow if kind == "motion_vectors" else build_flow("dis")(torch.from_numpy(video.frames)[None])[0]
    assert (read_flow_file(out / "a.safetensors", 4) == np.asarray(wanted).astype(np.float16)).all()
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert sorted(before) == ["a.safetensors", "b.safetensors"]
    os.unlink(out / "b.safetensors")
    assert run_flow(folder, out, "--flow", kind) == 0
    assert "1 of them there already" in capsys.readouterr().out
    assert (out / "a.safetensors").stat().st_mtime_ns == before["a.safetensors"]


def test_two_runs_write_equal_flow_files_that_others_may_read(folder, tmp_path):
    """safetensors orders its metadata as a hash map does, another way in each call, and leaves 0600."""
    metadata = {f"key {n}": str(n) for n in range(20)}
    for name in "ab":
        flow_files.write_flow(tmp_path / name, np.ones((2, 2, 4, 4), np.float16), metadata)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~mask


def test_flow_files_say_how_they_were_made(folder):
    from safetensors import safe_open

    run_flow(folder, folder / "flow", frames=20)
    with safe_open(folder / "flow" / "a.safetensors", framework="numpy") as file:
        metadata = file.metadata()
    assert (metadata["extractor"], metadata["version"], metadata["num_frames"]) == ("dis", "1", "12")
    assert metadata["requested_frames"] == "20" and len(metadata["source_sha256"]) == 64
    assert metadata["source_bytes"] == str((folder / "a.mp4").stat().st_size)
    with pytest.raises(ConfigError, match="requested_frames '20', not '4'.*--overwrite"):
        run_flow(folder, folder / "flow")
    assert run_flow(folder, folder / "flow", "--overwrite") == 0
    assert len(read_flow_file(folder / "flow" / "a.safetensors")) == 4
    os.replace(folder / "b.mp4", folder / "a.mp4")
    with pytest.raises(ConfigError, match="source_bytes"):
        run_flow(folder, folder / "flow")


def test_a_broken_video_is_named_and_the_others_are_kept(folder):
    (folder / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(LstpError, match="1 of 3 videos have no flow: .*broken.mp4: cannot be read"):
        run_flow(folder, folder / "flow")
    assert sorted(p.name for p in (folder / "flow").iterdir()) == ["a.safetensors", "b.safetensors"]


def test_annotations_name_the_videos(folder):
    entries = [{"video_id": f"id {n}", "video": f"{n}.mp4", "question": "?"} for n in "aab"]
    (folder / "list.json").write_text(json.dumps(entries))
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, entries)))
    for source in ("list.json", "lines.jsonl"):
        out = folder / f"of_{source}"
        assert run_flow(folder / source, out) == 0
        assert sorted(p.name for p in out.iterdir()) == ["id a.safetensors", "id b.safetensors"]
    for text, line in [
        ('{"video_id": "a", "video": 3}\n', "line 1: 'video' must be a string, got int 3"),
        ('[{"id": "a"}]', "entry 0: key 'video' is missing"),
        ('[{"vidoe": "a.mp4", "question": "?"}, {"video": "b.mp4"}]', "entry 0: key 'video' is missing"),
        ('[{"video": ""}]', "entry 0: expected the path of a file"),
        ('[{"video": "."}]', "entry 0: expected the path of a file"),
        ('[{"video": "../a.mp4"}]', "entry 0: .*leads out of"),
        ('[{"video": "/a.mp4"}]', "entry 0: .*leads out of"),
        ('[{"image": "a.png", "question": "?"}]', "no row is about a video"),
        ('[{"video_id": "../a", "video": "a.mp4"}]', "cannot be a file name"),
        ('[{"video_id": "a", "video": "a.mp4"}, {"video_id": "a", "video": "b.mp4"}]', "also belongs to"),
        ('[{"video": "a.mp4", "video": "b.mp4"}]', "'video' stands twice"),
        ('[{"video": "a.mp4", "clip_s": [0, 1e999]}]', "larger than any number"),
        (
            '[{"video": "a.mp4"}, {"video": "b.mp4", "s": NaN}]',
            "entry 1, key 's': NaN is no number of JSON; write null",
        ),
        ('[{"video": "a.mp4", "clip_s": [0, NaN]}]', "NaN is no number"),
        ("{", "not JSON"),
    ]:
        (folder / "bad.json").write_text(text)
        with pytest.raises(AnnotationError, match=line):
            run_flow(folder / "bad.json", folder / "flow")
    for source, line in [(folder / "nothing", "no such folder"), (folder / "flow_empty", "no video in this folder")]:
        (folder / "flow_empty").mkdir(exist_ok=True)
        with pytest.raises(AnnotationError, match=line):
            run_flow(source, folder / "flow")


def test_annotations_are_read_as_data_sets_read_them(folder, caplog):
    """No video_id, a picture beside videos, a line separator in a text, the mark of Windows programs, other accents."""
    (folder / unicodedata.normalize("NFD", "é.mp4")).write_bytes((folder / "a.mp4").read_bytes())
    rows = [{"video": "a.mp4", "question": "a\u2028b"}, {"image": "p.png", "question": "?"}, {"video": "é.mp4"}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text("\ufeff" + lines, encoding="utf-8")
    found = find_videos(folder / "rows.jsonl")
    assert list(found) == ["a", "é"] and all(path.is_file() for path in found.values())
    assert "1 rows are about pictures or texts" in caplog.text and "rows.jsonl, line 2" in caplog.text


def test_flow_of_a_folder_of_pictures(folder):
    (folder / "frames").mkdir()
    for number, picture in enumerate(moving_texture(4, (1, 0), 64, 64)):
        Image.fromarray(np.asarray(picture)).save(folder / "frames" / f"{number}.png")
    (folder / "rows.json").write_text('[{"video": "frames"}]')
    assert run_flow(folder / "rows.json", folder / "flow") == 0
    assert read_flow_file(folder / "flow/frames.safetensors", 4).shape[0] == 4


def test_a_folder_says_what_it_leaves_out(folder, caplog):
    for name in ("a.gif", "c.TS", "notes.txt"):
        (folder / name).write_bytes(b"")
    assert list(find_videos(folder)) == ["a.gif", "a.mp4", "b", "c"]
    assert "left out 1 files" in caplog.text and "notes.txt" in caplog.text and "differ by their endings" in caplog.text


def test_wrong_options_are_one_line(folder):
    for extra, line in [
        (["--weights", "none.pth", "--flow", "raft_small"], "--weights: no such file"),
        (["--device", "warp"], "--device warp: not usable"),
    ]:
        with pytest.raises(ConfigError, match=line):
            run_flow(folder, folder / "flow", *extra)
    with pytest.raises(ConfigError, match="--num-frames: expected at least 1"):
        run_flow(folder, folder / "flow", frames=0)
    with pytest.raises(ConfigError, match="flow 'dis' has no weights"):
        numbered = numbered_video(folder / "w.pth.mp4", 3)
        run_flow(folder, folder / "flow", "--weights", numbered)
