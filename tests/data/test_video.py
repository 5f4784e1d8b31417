"""`lavis_lstp.data.video.reading`: the frames asked for and no others, from ordinary, odd and broken files."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from fractions import Fraction

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext
from hypothesis import given
from hypothesis import strategies as st
from video_files import audio_file, corners, numbered_picture, numbered_video, read_number, write_video

from lavis_lstp.data.flow_files import read_flow_file
from lavis_lstp.data.frame_numbers import sample_indices, uniform_centres
from lavis_lstp.data.video.codec_figures import packet_costs
from lavis_lstp.data.video.index import _places_s
from lavis_lstp.data.video.reading import probe, read_frames, resize_frames
from lavis_lstp.errors import ConfigError, VideoError
from webdataset_tools.mp4_header import mp4_info

# ---- which frames ---------------------------------------------------------------------------------------------


def test_uniform_centres_equal_the_golden_table(golden):
    cases = json.loads((golden / "sample_frames.json").read_text())["uniform"]
    assert len(cases) == 270
    assert [uniform_centres(num, length) for num, length, _ in cases] == [wanted for *_, wanted in cases]


@given(st.integers(1, 300), st.integers(0, 100_000))
def test_uniform_centres_are_ascending_inside_and_even(num, length):
    centres = uniform_centres(num, length)
    assert len(centres) == min(num, length)
    assert all(a < b for a, b in zip(centres, centres[1:], strict=False))
    assert not centres or (0 <= centres[0] and centres[-1] < length)
    gaps = np.diff(centres)
    assert not len(gaps) or gaps.max() - gaps.min() <= 2
    assert all(type(i) is int for i in centres)


@given(st.integers(1, 64), st.integers(1, 200))
def test_sample_indices_always_give_the_number_asked_for(num, length):
    indices = sample_indices(num, length)
    assert len(indices) == num
    assert indices == sorted(indices) and 0 <= indices[0] and indices[-1] < length
    if length >= num:
        assert indices == uniform_centres(num, length)
    else:
        repeats = np.bincount(indices, minlength=length)
        assert repeats.min() >= 1 and repeats.max() - repeats.min() <= 2


def test_sample_indices_double_every_element():
    assert sample_indices(4, 3) == [0, 0, 1, 2]  # centres of 0 0 1 1 2 2
    assert sample_indices(8, 2) == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("bad", [(0, 5), (-1, 5), (3, -1)])
def test_uniform_centres_refuse_nonsense(bad):
    with pytest.raises(ValueError, match="num="):
        uniform_centres(*bad)


# ---- odd files: every frame is found, under the right number and time --------------------------------------------

COUNT = 30
VARIABLE = np.cumsum([0] + [1 + (i * 7) % 5 for i in range(COUNT - 1)]).tolist()
ODD = {
    "plain.mp4": {},
    "late_start.mp4": {"shift": 50},
    "late_start.mkv": {"shift": 50},
    "variable.mp4": {"ticks": VARIABLE},
    "one_key_frame.mp4": {"gop": 250},
    "many_b.mp4": {"options": {"g": "12", "bf": "8", "b_strategy": "0", "crf": "12"}},
    "open_gop.mp4": {"options": {"g": "8", "bf": "3", "flags": "-cgop", "x264-params": "open-gop=1", "crf": "12"}},
    "open_gop.ts": {"options": {"g": "8", "bf": "3", "flags": "-cgop", "x264-params": "open-gop=1", "crf": "12"}},
    "stream.ts": {},
    "reordered.avi": {},
    "raw.h264": {},
    "hevc.mp4": {"codec": "libx265", "options": {"crf": "10", "x265-params": "keyint=10:bframes=3:log-level=0"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "10", "crf": "15", "b": "0", "cpu-used": "8"}},
    "vp8_hidden.webm": {
        "codec": "libvpx",
        "options": {"g": "15", "auto-alt-ref": "1", "lag-in-frames": "12", "arnr-maxframes": "3", "b": "2M"},
    },
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "10", "bf": "2", "qscale": "2", "b": "4M"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"g": "10", "bf": "2", "b": "8M"}},
    "fragments.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    return {name: numbered_video(folder / name, COUNT, **kw) for name, kw in ODD.items()}


@pytest.mark.parametrize("name", ODD)
def test_every_frame_is_found_under_its_number(odd, name):
    video = read_frames(odd[name], indices=range(COUNT))
    assert video.info.num_frames == COUNT
    assert [read_number(f) for f in video.frames] == list(range(COUNT))
    for few in ([17], [29], [0, 11, 23], [9, 10, 12]):
        assert (read_frames(odd[name], indices=few).frames == video.frames[few]).all(), few


@pytest.mark.parametrize("name", ODD)
def test_times_start_at_zero_and_find_their_frames_again(odd, name):
    video = read_frames(odd[name], num=7)
    ticks = VARIABLE if name == "variable.mp4" else list(range(COUNT))
    assert video.times_s == pytest.approx([ticks[i] / 25 for i in video.indices], abs=2e-3)
    again = read_frames(odd[name], times_s=video.times_s)
    assert again.indices == video.indices
    between = read_frames(odd[name], times_s=video.times_s + 0.02)
    assert between.indices == video.indices  # the frame on screen, not the nearest one


RAW = {
    "bf.h264": {"options": {"bf": "2"}},
    "no_bf.h264": {"options": {"bf": "0"}},
    "s.hevc": {"codec": "libx265", "options": {"x265-params": "log-level=0"}},
    "s.m4v": {"codec": "mpeg4", "options": {}, "container_format": "m4v"},
}


@pytest.mark.parametrize("name", RAW)
def test_times_of_raw_streams_follow_the_rate_that_they_state(tmp_path, caplog, name):
    path = numbered_video(tmp_path / name, 20, fps=10, **RAW[name])
    info = probe(path)
    assert (info.num_frames, info.fps, info.duration_s) == (20, 10, pytest.approx(2))
    video = read_frames(path, times_s=[0, 1.01, 1.91])
    assert video.indices == [0, 10, 19] and video.times_s == pytest.approx([0, 1, 1.9])
    assert read_frames(path, num=20, fps=1).indices == [0, 10]
    assert packet_costs(path).times_s == pytest.approx(np.arange(20) / 10)
    assert read_frames(path.read_bytes(), indices=[19]).times_s == pytest.approx([1.9])
    assert "guess" not in caplog.text


def test_a_raw_stream_without_a_rate_is_guessed_with_a_warning(tmp_path, caplog):
    coding = {"codec": "libx265", "options": {"x265-params": "log-level=0:vui-timing-info=0"}}
    path = numbered_video(tmp_path / "s.hevc", 20, fps=10, **coding)
    for _ in range(2):
        assert (probe(path).fps, probe(path).duration_s) == (25, pytest.approx(0.8))
    assert caplog.text.count("s.hevc: states no frame rate; its times are a guess, by 25 frames a second") == 1


def test_frames_come_in_the_order_asked_for_with_repeats(odd):
    video = read_frames(odd["plain.mp4"], indices=[20, 3, 3, 11])
    assert [read_number(f) for f in video.frames] == [20, 3, 3, 11]
    assert video.times_s == pytest.approx([0.8, 0.12, 0.12, 0.44])


def test_the_first_and_last_moment_show_the_first_and_last_frame(odd):
    info = probe(odd["variable.mp4"])
    assert read_frames(odd["variable.mp4"], times_s=[0.0, info.duration_s]).indices == [0, COUNT - 1]
    with pytest.raises(VideoError, match="variable.mp4: no frame at"):
        read_frames(odd["variable.mp4"], times_s=[info.duration_s + 0.1])
    with pytest.raises(VideoError, match="no frame at -0.1 s"):
        read_frames(odd["variable.mp4"], times_s=[-0.1])


def test_probe_tells_what_the_frames_are(odd):
    info = probe(odd["plain.mp4"])
    assert (info.num_frames, info.fps, info.width, info.height) == (COUNT, 25.0, 160, 96)
    assert (info.rotation, info.codec) == (0, "h264")
    assert info.duration_s == pytest.approx(COUNT / 25, abs=1e-3)
    slow = probe(odd["variable.mp4"])
    assert slow.fps == pytest.approx((COUNT - 1) / (VARIABLE[-1] / 25), rel=0.02)


@pytest.mark.parametrize(
    ("degrees", "hflip"), [(90, False), (180, False), (270, False), (0, True), (90, True), (270, True)]
)
@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_rotation_and_mirroring_are_applied(tmp_path, degrees, hflip, backend):
    path = numbered_video(tmp_path / "turned.mp4", 5, rotation=degrees if degrees < 180 else degrees - 360, hflip=hflip)
    if backend == "decord" and hflip:
        with pytest.raises(VideoError, match="mirrored, which decord ignores"):
            read_frames(path, num=1, backend=backend)
        return
    video = read_frames(path, indices=[0, 4], backend=backend)
    wanted = np.rot90(numbered_picture(0), degrees // 90)
    wanted = wanted[:, ::-1] if hflip else wanted
    assert video.frames.shape[2:] == wanted.shape[:2] == (video.info.height, video.info.width)
    assert corners(video.frames[0]) == corners(wanted.transpose(2, 0, 1))
    assert video.info.rotation == degrees or hflip


@pytest.mark.parametrize("backend", ["pyav", "decord", "torchcodec"])
@pytest.mark.parametrize(
    ("aspect", "rotation", "shape"), [("4:3", 0, (96, 213)), ("3:4", 0, (128, 160)), ("4:3", 90, (213, 96))]
)
def test_pixels_that_are_not_square_are_stretched_as_players_do(tmp_path, aspect, rotation, shape, backend):
    """As on DVDs (meta-pytorch/torchcodec#733, JuliaIO/VideoIO.jl#185); a size that is asked for is that of frames."""
    if backend == "torchcodec":
        pytest.importorskip("torchcodec.decoders", exc_type=(ImportError, RuntimeError, OSError))
    options = {"g": "10", "bf": "2", "crf": "12", "aspect": aspect}  # of the encoder: the shape of a pixel
    path = numbered_video(tmp_path / "dvd.mp4", 10, rotation=rotation or None, options=options)
    video = read_frames(path, indices=[2, 7], backend=backend)
    assert video.frames.shape[2:] == (video.info.height, video.info.width) == shape
    assert (probe(path).height, probe(path).width) == shape
    assert [read_number(frame) for frame in video.frames] == [2, 7]
    stored = np.rot90(numbered_picture(2), rotation // 90).transpose(2, 0, 1)
    assert corners(video.frames[0]) == corners(stored)
    if backend == "pyav":
        small = read_frames(path, indices=[2], decode_size=48).frames
        assert small.shape[2] / small.shape[3] == pytest.approx(shape[0] / shape[1], rel=0.02)
        assert read_frames(path, indices=[2], size=64).frames.shape[2:] == (64, 64)


def test_pixels_of_a_shape_that_makes_pictures_huge_are_refused(tmp_path):
    path = numbered_video(tmp_path / "wide.mp4", 2, options={"aspect": "10:1"})
    with pytest.raises(VideoError, match="wide.mp4: is 1600 x 96 px, more than max_megapixels"):
        probe(path, max_megapixels=0.1)


@pytest.mark.parametrize(
    ("transfer", "named"), [("smpte2084", "HDR (PQ)"), ("arib-std-b67", "HDR (HLG)"), ("bt709", "")]
)
def test_high_dynamic_range_is_told_once(tmp_path, caplog, monkeypatch, transfer, named):
    """No reader maps its colours (rerun-io/rerun#7594, meta-pytorch/torchcodec#585)."""
    monkeypatch.setattr("lavis_lstp.data.video.reading._TOLD", set())
    for name in ("a.mp4", "b.mp4"):
        options = {"bf": "2", "crf": "12", "x264-params": f"transfer={transfer}"}
        video = read_frames(numbered_video(tmp_path / name, 4, options=options), indices=[2])
        assert read_number(video.frames[0]) == 2
    told = [record.getMessage() for record in caplog.records if "HDR" in record.getMessage()]
    assert [named in line and "a.mp4" in line for line in told] == ([True] if named else [])


def test_frames_hidden_by_an_edit_list_do_not_count(tmp_path):
    path = numbered_video(
        tmp_path / "trimmed.mp4", shift=-13, container_options={"avoid_negative_ts": "disabled", "use_editlist": "1"}
    )
    video = read_frames(path, indices=range(COUNT - 13))
    assert video.info.num_frames == COUNT - 13
    assert [read_number(f) for f in video.frames] == list(range(13, COUNT))
    assert video.times_s[0] == 0
    with pytest.raises(VideoError, match="edit list.*use backend 'pyav'"):
        read_frames(path, indices=[0], backend="decord")


# Behind the key frame of an open group these say what becomes of pictures before it, which FFmpeg calls an error.
OPEN_H264 = [
    f"keyint={every}:open-gop=1:bframes=3:b-adapt=0:scenecut=0:{more}"
    for every, more in ((16, "ref=3"), (18, "ref=4:slices=4"), (16, "tff=1"))
]


@pytest.mark.parametrize(
    ("ending", "codec", "options"),
    [
        ("ts", "libx265", {"x265-params": "keyint=10:min-keyint=10:bframes=3:open-gop=1:scenecut=0:log-level=0"}),
        ("mkv", "libx265", {"x265-params": "keyint=10:min-keyint=10:bframes=3:open-gop=1:scenecut=0:log-level=0"}),
        ("ts", "mpeg2video", {"g": "10", "bf": "2", "b": "8M"}),
        *(
            (ending, "libx264", {"x264-params": params})
            for ending in ("ts", "mkv", "mp4", "h264")
            for params in OPEN_H264
        ),
    ],
)
def test_a_cut_in_an_open_group_begins_where_players_begin(tmp_path, ending, codec, options):
    """As `ffmpeg -ss -c copy` and receivers write it: pictures before the first key frame refer to what was cut off."""
    whole = numbered_video(tmp_path / "whole.ts", 60, codec=codec, options=options)
    path = tmp_path / f"cut.{ending}"
    with av.open(str(whole)) as source, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        keys = 0
        for packet in source.demux(video=0):
            keys += packet.is_keyframe
            if packet.size and keys > 1:
                packet.stream = stream
                out.mux(packet)
    with av.open(str(path)) as container:
        packets = sum(bool(packet.size) for packet in container.demux(video=0))
    with av.open(str(path)) as container:
        shown = [frame.to_ndarray(format="rgb24").transpose(2, 0, 1) for frame in container.decode(video=0)]
    video = read_frames(path, indices=range(len(shown)))
    assert (video.frames == np.stack(shown)).all() and video.info.num_frames == len(shown) < packets
    assert video.times_s == pytest.approx(np.arange(len(shown)) / 25, abs=2e-3)
    for i in range(1, len(shown), 3):
        assert (read_frames(path, indices=[i]).frames[0] == shown[i]).all()


def test_an_open_group_is_read_from_its_own_key_frame(tmp_path):
    """Going back to the first key frame of the file would decode a film of two hours for one frame near its end."""
    path = numbered_video(tmp_path / "a.mp4", 160, options={"x264-params": OPEN_H264[0]})
    for i in (150, 151):
        video = read_frames(path, indices=[i])
        assert read_number(video.frames[0]) == i % 38 and video.count.packets < 3 * 40


@pytest.mark.parametrize("lost", [20, 30])
def test_what_is_lost_inside_an_open_group_is_not_passed_over(tmp_path, lost):
    """A decoder complains in the same words about pictures that a cut removed and about those that are damaged."""
    whole = numbered_video(tmp_path / "a.mp4", 60, options={"x264-params": OPEN_H264[1]})
    path = tmp_path / "cut.mkv"
    with av.open(str(whole)) as source, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        keys = kept = 0
        for packet in source.demux(video=0):
            keys += packet.is_keyframe
            if packet.size and keys > 1:
                kept += 1
                if kept == lost:
                    packet = spoilt(packet)
                packet.stream = stream
                out.mux(packet)
    shown = read_frames(path, indices=range(8)).frames
    assert len({read_number(frame) for frame in shown}) == 8
    with pytest.raises(VideoError, match="cut.mkv: frame .* cannot be decoded"):
        read_frames(path, indices=range(probe(path).num_frames))


def spoilt(packet):
    """The packet of a picture without the second half of its data."""
    half = av.Packet(bytes(packet)[: packet.size // 2].ljust(packet.size, b"\0"))
    half.pts, half.dts, half.time_base = packet.pts, packet.dts, packet.time_base
    return half


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_transparency_of_webm_is_ignored_by_every_backend_and_said(tmp_path, caplog, codec):
    path = tmp_path / "a.webm"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"auto-alt-ref": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuva420p"
        clear = av.VideoFrame.from_ndarray(np.full((64, 64, 4), (200, 0, 0, 0), np.uint8), format="rgba")
        for packet in [*stream.encode(clear.reformat(format="yuva420p")), *stream.encode(None)]:
            container.mux(packet)
    ours, theirs = (read_frames(path, num=1, backend=backend).frames for backend in ("pyav", "decord"))
    assert abs(ours.astype(int) - theirs).max() <= 1 and "its transparency is ignored" in caplog.text


def test_what_is_transparent_in_a_video_is_white(tmp_path):
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:8] = (200, 20, 20, 255)
    pixels[8:, 8:, 3] = 51
    with av.open(str(tmp_path / "a.mov"), "w") as container:
        stream = container.add_stream("png", rate=25)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "rgba"
        for packet in [*stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgba")), *stream.encode(None)]:
            container.mux(packet)
    (frame,) = read_frames(tmp_path / "a.mov", num=1).frames
    assert [frame[:, y, x].tolist() for y, x in ((0, 0), (8, 0), (8, 8))] == [[200, 20, 20], [255] * 3, [204] * 3]
    for backend in ("decord", "torchcodec"):
        with pytest.raises(
            VideoError, match=f"a.mov: stores transparency, which {backend} ignores; use backend 'pyav'"
        ):
            read_frames(tmp_path / "a.mov", num=1, backend=backend)


@pytest.mark.parametrize("name", ["12:30.mp4", "file:other.mp4", "a%20b #1?.mp4", "-x.mp4", "concat:a|b.mp4"])
@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_a_name_is_a_name_and_no_address(tmp_path, monkeypatch, odd, name, backend):
    """FFmpeg takes what stands before a colon of a relative name for a protocol."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(odd["plain.mp4"], name)
    assert read_number(read_frames(name, indices=[7], backend=backend).frames[0]) == 7


def test_a_video_of_one_frame(tmp_path):
    path = numbered_video(tmp_path / "one.mp4", 1)
    video = read_frames(path, num=8, motion_vectors=True)
    assert video.indices == [0] and video.frames.shape == (1, 3, 96, 160)
    assert video.times_s.tolist() == [0.0] and not video.flow.any()
    assert probe(path).duration_s == pytest.approx(0.04, abs=1e-3)
    assert read_frames(path, num=8, backend="decord").indices == [0]


def test_a_change_of_picture_size_needs_a_size(tmp_path):
    parts = [numbered_video(tmp_path / f"{w}.ts", 6, width=w, height=96) for w in (160, 128)]
    path = tmp_path / "both.ts"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height = 160, 96
        offset = 0
        for part in parts:
            with av.open(str(part)) as source:
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.stream = stream
                        packet.pts, packet.dts = packet.pts + offset, packet.dts + offset
                        out.mux(packet)
            offset += 6 * 3600
    with pytest.raises(VideoError, match="frame 6 is 128 x 96, the first is 160 x 96"):
        read_frames(path, indices=[0, 6])
    assert read_frames(path, indices=[0, 6], size=(48, 80)).frames.shape == (2, 3, 48, 80)


# ---- sources, backends, sizes ------------------------------------------------------------------------------------


def test_bytes_files_and_paths_are_the_same(odd):
    path = odd["plain.mp4"]
    wanted = read_frames(path, num=4).frames
    data = path.read_bytes()
    for source in (str(path), data, bytearray(data), io.BytesIO(data)):
        assert (read_frames(source, num=4).frames == wanted).all()
    with open(path, "rb") as file:
        file.seek(100)
        assert (read_frames(file, num=4).frames == wanted).all()
        assert not file.closed and probe(file).num_frames == COUNT
    assert (read_frames(data, num=4, backend="decord").frames == wanted).all()


DECORD_READS = ["plain.mp4", "late_start.mp4", "late_start.mkv", "variable.mp4", "one_key_frame.mp4", "many_b.mp4"]


@pytest.mark.parametrize("name", DECORD_READS)
def test_both_backends_give_the_same_frames(odd, name):
    for choice in ({"num": 9}, {"indices": [28, 3, 3, 14]}, {"times_s": [0.0, 0.3, 0.9]}):
        ours, theirs = (read_frames(odd[name], backend=b, **choice) for b in ("pyav", "decord"))
        assert ours.indices == theirs.indices
        assert (ours.times_s == theirs.times_s).all()
        assert (ours.frames == theirs.frames).all()


@pytest.mark.parametrize("name", ["stream.ts", "reordered.avi", "raw.h264", "open_gop.ts"])
def test_decord_is_refused_where_it_returns_wrong_frames(odd, name):
    with pytest.raises(VideoError, match=f"{name}: .*use backend 'pyav'"):
        read_frames(odd[name], num=4, backend="decord")


def test_decord_reads_after_its_bridge_was_set_as_lavis_does(odd):
    script = (
        "import sys, decord; decord.bridge.set_bridge('torch')\n"
        "from lavis_lstp.data.video.reading import read_frames\n"
        "a, b = (read_frames(sys.argv[1], num=3, backend=n).frames for n in ('pyav', 'decord'))\n"
        "assert (a == b).all() and decord.bridge.bridge_out.__globals__['_CURRENT_BRIDGE'].type == 'torch'\n"
    )
    subprocess.run([sys.executable, "-c", script, str(odd["plain.mp4"])], check=True, timeout=300)


def test_real_footage_is_the_same_from_both_backends_and_from_decoding_it_all(real_videos):
    for path in real_videos:
        video = read_frames(path, num=6)
        if video.info.duration_s > 60:
            continue  # decoding all of it would take minutes
        with av.open(str(path)) as container:
            rate = container.streams.video[0].average_rate
            every = [f for i, f in enumerate(container.decode(video=0)) if i in video.indices]
        wanted = np.stack([f.to_ndarray(format="rgb24").transpose(2, 0, 1) for f in every])
        assert (video.frames == wanted).all()
        assert (read_frames(path, num=6, backend="decord").frames == wanted).all()
        assert video.info.fps == pytest.approx(float(rate))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
def test_resize_equals_torch_within_its_own_rounding(height, width, new_height, new_width, seed):
    """Within what truncation makes of a rounding error; its bits are recorded below."""
    import torch

    frames = np.random.default_rng(seed).integers(0, 256, (2, 3, height, width), dtype=np.uint8)
    exact = torch.nn.functional.interpolate(
        torch.from_numpy(frames).double(), size=(new_height, new_width), mode="bilinear", align_corners=False
    ).numpy()
    ours = resize_frames(frames, (new_height, new_width))
    assert ours.dtype == np.uint8
    assert ((ours <= exact + 1e-3) & (ours > exact - 1 - 1e-3)).all()


def made_up(*shape: int) -> np.ndarray:
    """Frames from a formula, so that no library's generator decides them; the upper half has flat areas."""
    count = np.arange(np.prod(shape), dtype=np.uint64)
    frames = ((count * np.uint64(2654435761) >> np.uint64(13)) & np.uint64(255)).astype(np.uint8).reshape(shape)
    frames[:, :, : shape[2] // 2] &= 0xC0
    return frames


RESIZED = {
    ((360, 640), 224): "6baa1690b4310c9710b201dd1f634ceab4b54d8b4d4a573adfb720e830a23300",
    ((336, 596), 224): "6277911292cae72e460041013173fa002a7f5bd63647d7153375b70a409dde3b",
    ((48, 50), 224): "25ff24797cd8d320f3fee9c5e9b4be4f66580a4e4bcf3e7ad6c670bea2661d2e",
    ((97, 31), (40, 56)): "4d92ac89a1f48149456c2ef0ec09a39966142378aabbb0ab75e37c3159c3fa3e",
    ((224, 224), 224): "b7102bfe57c5e7c6c07206388e207c5b3cbeac690e36e12de8ee5c475aa93ca2",
    ((1, 7), (3, 2)): "15249cd7d1dbf5e9af15a5c6c9b6af074d3a927263159668660a53164af95bdc",
}
"""SHA-256 of what `resize_frames` gave for `made_up` frames when its definition was written down."""


@pytest.mark.parametrize("shape, size", RESIZED)
def test_resize_has_one_result_on_every_machine(shape, size):
    assert hashlib.sha256(resize_frames(made_up(2, 3, *shape), size).tobytes()).hexdigest() == RESIZED[shape, size]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(360, 640), (336, 596), (48, 50), (1080, 1920)])
def test_resize_is_within_one_level_of_the_published_call(shape, threads):
    """torch's rounding depends on its version and on the processor: 0.11 % of values of flat areas at most, so far."""
    import torch

    frames = np.random.default_rng(0).integers(0, 256, (4, 3, *shape), dtype=np.uint8)
    frames[:, :, : shape[0] // 2] &= 0xC0  # flat areas: whole numbers, where truncation shows every rounding
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        clip = torch.from_numpy(frames).float().transpose(0, 1)
        theirs = torch.nn.functional.interpolate(clip, size=(224, 224), mode="bilinear", align_corners=False)
    finally:
        torch.set_num_threads(before)
    apart = np.abs(resize_frames(frames, 224).astype(int) - theirs.to(torch.uint8).transpose(0, 1).numpy())
    assert apart.max() <= 1 and (apart > 0).mean() < 0.002


def test_size_resizes_while_reading(odd):
    full, small = read_frames(odd["plain.mp4"], num=4), read_frames(odd["plain.mp4"], num=4, size=(40, 56))
    assert small.frames.shape == (4, 3, 40, 56) and (small.info.height, small.info.width) == (96, 160)
    assert (small.frames == resize_frames(full.frames, (40, 56))).all()


# ---- cost --------------------------------------------------------------------------------------------------------


def test_only_what_is_needed_is_decoded(tmp_path):
    """8 of 400 frames, a key frame every 20: at most one group of pictures each, less those nothing refers to."""
    path = numbered_video(tmp_path / "long.mp4", 400, gop=20)
    video = read_frames(path, num=8)
    assert [read_number(f) for f in video.frames] == [i % 38 for i in video.indices]
    assert video.count.packets <= 8 * 25 and video.count.pictures <= 8 * 14
    # From one wanted frame to the next group 34 to 36 packets are passed over, or 44, in turn. By `decode.SEEK_US` a
    # seek costs 300 us; passing 36 packets costs 292 us and passing 44 costs 357 us, which happens three times.
    assert video.count.seeks == 3
    near = read_frames(path, indices=[200, 201, 203])
    assert near.count.seeks == 1 and near.count.packets < 15


@pytest.mark.parametrize("name", ODD)
def test_key_frames_stand_in_for_frames_under_their_own_numbers(odd, name):
    """Each once, at its own time, the nearest to what was asked for; or exact frames where key frames are no help."""
    costs = packet_costs(odd[name])
    keys = np.flatnonzero(costs.is_key)
    asked = read_frames(odd[name], num=4)
    video = read_frames(odd[name], num=4, exact=False)
    if name in ("reordered.avi", "raw.h264", "mpeg4.avi") or len(keys) == 1:
        assert video.indices == asked.indices and (video.frames == asked.frames).all()
        return
    whole = read_frames(odd[name], indices=range(COUNT))
    nearest = {int(keys[np.abs(costs.times_s[keys] - t).argmin()]) for t in asked.times_s}
    assert video.indices == sorted(nearest)
    assert (video.frames == whole.frames[video.indices]).all()
    assert video.times_s == pytest.approx(whole.times_s[video.indices])
    assert video.count.pictures < COUNT


def test_where_each_frame_is_a_key_frame_they_are_the_exact_ones(tmp_path):
    path = numbered_video(tmp_path / "all.mp4", 12, options={"g": "1"})
    assert read_frames(path, num=5, exact=False).indices == read_frames(path, num=5).indices


def test_reading_imports_no_torch(odd):
    script = (
        "import sys; from lavis_lstp.data.video.reading import read_frames\nread_frames(sys.argv[1], num=2, size=32)\n"
    )
    script += "assert 'torch' not in sys.modules and 'lavis' not in sys.modules"
    subprocess.run([sys.executable, "-c", script, str(odd["plain.mp4"])], check=True, timeout=300)


def test_readers_work_in_threads_and_after_a_fork(odd):
    wanted = read_frames(odd["plain.mp4"], num=5).frames
    same = []
    workers = [
        threading.Thread(target=lambda: same.append((read_frames(odd["plain.mp4"], num=5).frames == wanted).all()))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert same == [True] * 4
    script = (
        "import os, sys; from lavis_lstp.data.video.reading import read_frames\n"
        "a = {b: read_frames(sys.argv[1], num=3, backend=b).frames for b in ('pyav', 'decord')}\n"
        "pid = os.fork()\n"
        "ok = all((read_frames(sys.argv[1], num=3, backend=b).frames == a[b]).all() for b in a)\n"
        "os._exit(not ok) if pid == 0 else sys.exit(os.waitpid(pid, 0)[1])\n"
    )
    subprocess.run([sys.executable, "-c", script, str(odd["plain.mp4"])], check=True, timeout=300)


@pytest.mark.parametrize("name", ODD)
def test_several_decoder_threads_change_nothing(odd, name):
    wanted = read_frames(odd[name], indices=[0, 8, 13, 29]).frames
    assert (read_frames(odd[name], indices=[0, 8, 13, 29], threads=3).frames == wanted).all()


def test_the_table_of_frames_follows_a_file_that_changes(tmp_path):
    path = numbered_video(tmp_path / "a.mp4", 10)
    assert probe(path).num_frames == 10
    os.replace(numbered_video(tmp_path / "b.mp4", 20), path)
    assert probe(path).num_frames == 20


# ---- broken files: one line that names the file, never a wrong frame ---------------------------------------------


def broken_files(folder, odd):
    data = odd["plain.mp4"].read_bytes()
    files = {"zero.mp4": b"", "noise.mp4": bytes(range(256)) * 40, "text.mp4": b"this is no video\n" * 500}
    files["no_end.mp4"] = data[: len(data) // 2]  # the table of contents comes last
    files["playlist.mp4"] = b"#EXTM3U\n#EXTINF:10,\nplain.mp4\n"
    files["script.mp4"] = f"ffconcat version 1.0\nfile {odd['plain.mp4']}\n".encode()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    audio_file(folder / "sound.mp4")
    (folder / "folder.mp4").mkdir()
    os.mkfifo(folder / "pipe.mp4")  # opening it would wait for ever
    return [*files, "sound.mp4", "folder.mp4", "pipe.mp4", "missing.mp4"]


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_broken_files_are_one_clear_line(tmp_path, odd, backend):
    for name in broken_files(tmp_path, odd):
        for call in (lambda p: read_frames(p, num=4, backend=backend), probe):
            with pytest.raises(VideoError) as caught:
                call(tmp_path / name)
            line = str(caught.value)
            assert line.startswith(str(tmp_path / name)) and "\n" not in line and len(line) < 300, name
    with pytest.raises(VideoError, match="empty"):
        read_frames(b"", num=1)
    with pytest.raises(VideoError, match="^clip 7: cannot be read as a video"):
        read_frames(b"no video", num=1, name="clip 7")
    with pytest.raises(VideoError, match="no video stream, only audio"):
        read_frames(tmp_path / "sound.mp4", num=1)


@pytest.mark.parametrize("brand", ["avif", "avis", "heic", "heix", "hevc", "mif1", "msf1"])
def test_heic_and_avif_are_refused_by_their_major_brand(tmp_path, odd, brand):
    """FFmpeg reads them as videos: a photo of tiles gives one tile, and transparency is ignored."""
    raw = odd["plain.mp4"].read_bytes()
    for name in ("photo.heic", "photo.jpg", "photo.mp4"):
        photo = tmp_path / name
        photo.write_bytes(raw[:8] + brand.encode() + raw[12:])
        for source in (photo, photo.read_bytes(), io.BytesIO(photo.read_bytes())):
            for call in (probe, lambda given, **how: read_frames(given, num=1, backend="decord", **how)):
                with pytest.raises(VideoError) as caught:
                    call(source, name=name)
                assert str(caught.value) == HEIF.format(name)
    assert mp4_info(photo.read_bytes()) is None and mp4_info(raw)
    video = tmp_path / "compatible.mp4"
    video.write_bytes(raw[:16] + brand.encode() + raw[20:])
    assert probe(video).num_frames == COUNT


@pytest.mark.parametrize(
    ("raw", "said"),
    [(b"", r"empty \(0 bytes\), expected a picture"), (b"<html></html>" * 9, "cannot be read as a picture")],
)
def test_what_is_called_a_picture_is_refused_as_one(tmp_path, raw, said):
    path = tmp_path / "photo.jpg"
    path.write_bytes(raw)
    for source in (path, raw, io.BytesIO(raw)) if raw else (path, raw):
        with pytest.raises(VideoError, match=f"photo.jpg: {said}") as caught:
            read_frames(source, num=1, name="photo.jpg")
        assert "video" not in str(caught.value) and "\n" not in str(caught.value)


def test_an_mp4_without_its_table_looks_truncated(tmp_path, odd):
    cut = tmp_path / "cut.mp4"
    raw = odd["plain.mp4"].read_bytes()
    cut.write_bytes(raw[: raw.index(b"moov") - 4])
    with pytest.raises(VideoError, match="cut.mp4: cannot be read as a video .*it looks truncated, or is no video"):
        probe(cut)


HEIF = "{}: is a HEIC or AVIF picture, which is not read; convert it to JPEG or PNG"


def test_sound_with_a_cover_picture_is_no_video(tmp_path):
    cover = numbered_picture(3, 64, 64)
    with av.open(str(tmp_path / "song.m4a"), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=16000, layout="mono")
        picture = container.add_stream("mjpeg", rate=1)
        picture.width = picture.height = 64
        picture.pix_fmt = "yuvj420p"
        picture.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        image = av.VideoFrame.from_ndarray(cover, format="rgb24")
        image.pts = 0
        packets = [*picture.encode(image), *picture.encode(None), *sound.encode(frame), *sound.encode(None)]
        for packet in packets:
            container.mux(packet)
    with pytest.raises(VideoError, match="no video stream, only a cover picture, audio; expected a video"):
        probe(tmp_path / "song.m4a")


def test_an_avi_with_dropped_pictures_is_whole(tmp_path):
    """Its header counts them, and empty chunks stand for them."""
    shown = [0, 7, 14, 20, 21]
    path = numbered_video(tmp_path / "v.avi", 5, ticks=shown, fps=25, codec="mpeg4", options={})
    video = read_frames(path, num=5)
    assert [read_number(frame) for frame in video.frames] == list(range(5))
    assert video.times_s == pytest.approx([tick / 25 for tick in shown], abs=1e-3)
    (tmp_path / "cut.avi").write_bytes(path.read_bytes()[:-400])
    with pytest.raises(VideoError, match="cut.avi: truncated"):
        probe(tmp_path / "cut.avi")


@pytest.mark.parametrize("clock", [25, 50], ids=["own_clock", "double_clock"])
@pytest.mark.parametrize("dropped", [{}, {9, 10, 17}, {1, 12}], ids=["whole", "dropped", "dropped_early"])
@pytest.mark.parametrize("bf", [0, 1, 3])
def test_h264_in_avi_is_shown_when_it_was_filmed(tmp_path, bf, dropped, clock):
    """AVI stores no presentation times: FFmpeg's own are one picture late, and with B-frames leave gaps out."""
    filmed = [n for n in range(30) if n not in dropped]
    ticks = [n * clock // 25 for n in filmed]
    options = {"g": "10", "bf": str(bf), "crf": "12"}
    path = write_video(tmp_path / "v.avi", map(numbered_picture, filmed), fps=clock, ticks=ticks, options=options)
    video = read_frames(path, num=len(filmed))
    assert [read_number(frame) for frame in video.frames] == filmed
    assert video.times_s == pytest.approx([n / 25 for n in filmed], abs=1e-6)
    assert probe(path).duration_s == pytest.approx(30 / 25, abs=3e-3 if not dropped else 0.01)
    assert read_number(read_frames(path, times_s=[0.8]).frames[0]) == 20
    (tmp_path / "cut.avi").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VideoError, match="cut.avi: (truncated|cannot be read)"):
        read_frames(tmp_path / "cut.avi", num=len(filmed))


@pytest.mark.parametrize(("bf", "lost"), [(0, 0), (3, 2)])
@pytest.mark.parametrize("ending", ["mp4", "mov"])
def test_an_mp4_without_composition_times_is_in_order(tmp_path, bf, lost, ending):
    """A copy of a raw stream presents each picture when it is decoded, so B-frames would be seen out of order.

    FFmpeg's decoder finds out late how many pictures wait, and loses those that it has passed, two at most.
    """
    whole = write_video(tmp_path / "whole.mp4", map(numbered_picture, range(30)), fps=10, options={"bf": str(bf)})
    path = tmp_path / f"copy.{ending}"
    with av.open(str(whole)) as source, av.open(str(path), "w") as copy:
        stored = source.streams.video[0]
        stream = copy.add_stream_from_template(stored)
        begin = None
        for packet in source.demux(stored):
            if packet.size:
                begin = packet.dts if begin is None else begin
                packet.pts = packet.dts = packet.dts - begin
                packet.stream = stream
                copy.mux(packet)
    count = probe(path).num_frames
    assert 30 - lost <= count <= 30
    video = read_frames(path, num=count)
    numbers = np.array([read_number(frame) for frame in video.frames])
    assert (np.diff(numbers) > 0).all()
    assert video.times_s == pytest.approx((numbers - numbers[0]) / 10, abs=0.11)
    assert read_number(read_frames(path, indices=[count - 5]).frames[0]) == numbers[count - 5]


def test_an_avi_whose_clock_is_finer_than_its_pictures_is_whole(tmp_path):
    plain, copy = numbered_video(tmp_path / "v.mp4", 20, options={"bf": "0", "crf": "12"}), tmp_path / "v.avi"
    with av.open(str(plain)) as source, av.open(str(copy), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        stream.time_base = Fraction(1, 50)
        in_avi = BitStreamFilterContext("h264_mp4toannexb", source.streams.video[0])
        for read in source.demux(video=0):
            for packet in in_avi.filter(read if read.dts is not None else None):
                packet.stream = stream
                target.mux(packet)
    info = probe(copy)
    assert (info.num_frames, info.duration_s) == (20, pytest.approx(0.8))
    assert read_frames(copy, num=20).times_s == pytest.approx(np.arange(20) / 25, abs=1e-6)
    (tmp_path / "cut.avi").write_bytes(copy.read_bytes()[:-1500])
    with pytest.raises(VideoError, match="cut.avi: truncated"):
        probe(tmp_path / "cut.avi")


def test_places_in_an_avi_are_times_but_for_the_delay_of_its_encoder(caplog):
    """XviD's packed B-frames have no other times; PyAV cannot write them."""
    assert _places_s([0, 2, 3, 4, 5, 7, 8], 0.04, "v.avi") is None
    assert not caplog.text
    dropped = [0, 2, 3, 4, 5, 30, 31]
    assert _places_s(dropped, 0.04, "v.avi") == pytest.approx(np.array(dropped) * 0.04)
    assert _places_s([2 * n for n in dropped], 0.02, "v.avi") == pytest.approx(np.array(dropped) * 0.04)
    assert "v.avi: pictures were dropped" in caplog.text


@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi", "ts"])
def test_a_file_cut_off_gives_its_whole_frames_or_an_error(tmp_path, ending):
    options = {"movflags": "faststart"} if ending == "mp4" else {}
    pictures = [np.random.default_rng(i).integers(0, 256, (96, 160, 3), dtype=np.uint8) for i in range(60)]
    coding = {"g": "10", "bf": "3", "b_strategy": "0"}  # frames stored behind later ones, all along
    path = write_video(tmp_path / f"whole.{ending}", pictures, options=coding, container_options=options)
    whole = read_frames(path, indices=range(60)).frames
    cut = tmp_path / f"cut.{ending}"
    cut.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    for backend in ("pyav", "decord"):
        for choice in ({"num": 8}, {"indices": [59]}, {"times_s": [2.2]}, {"indices": range(60)}):
            with pytest.raises(VideoError, match=f"cut.{ending}"):
                read_frames(cut, backend=backend, **choice)
    with pytest.raises(VideoError, match=f"cut.{ending}: truncated"):
        probe(cut)
    right = 0
    for i in range(60):
        try:
            frame = read_frames(cut, indices=[i]).frames[0]
        except VideoError:
            continue
        assert (frame == whole[i]).all(), i
        right += 1
    assert 20 <= right < 45


@pytest.mark.parametrize("name", [name for name in ODD if name != "raw.h264"])
def test_a_cut_anywhere_never_shows_another_frame(odd, name):
    """Not for raw streams: nothing in them says where a picture ends."""
    whole, data = read_frames(odd[name], indices=range(COUNT)).frames, odd[name].read_bytes()
    random = np.random.default_rng(3)
    for cut in random.integers(1, len(data), 25).tolist():
        i = int(random.integers(COUNT))
        try:
            assert (read_frames(data[:cut], indices=[i]).frames[0] == whole[i]).all(), (cut, i)
        except VideoError as error:
            assert str(error).startswith("<bytes>: ")


def test_damage_in_the_middle_is_an_error_only_where_it_shows(odd, tmp_path):
    pictures = [np.random.default_rng(i).integers(0, 256, (96, 160, 3), dtype=np.uint8) for i in range(60)]
    path = write_video(tmp_path / "whole.mp4", pictures, options={"g": "10", "bf": "2", "keyint_min": "10"})
    whole = read_frames(path, indices=range(60)).frames
    data = bytearray(path.read_bytes())
    start = len(data) // 2
    data[start : start + 40_000] = bytes(40_000)
    found = {}
    for i in range(60):
        try:
            found[i] = (read_frames(bytes(data), indices=[i], name="damaged.mp4").frames[0] == whole[i]).all()
        except VideoError as error:
            assert "damaged.mp4: frame" in str(error)
    assert all(found.values()) and 30 < len(found) < 60
    assert 0 in found and 59 in found


# ---- wrong calls -------------------------------------------------------------------------------------------------


def test_wrong_calls_are_told_apart_from_broken_files(odd):
    path = odd["plain.mp4"]
    with pytest.raises(ConfigError, match="unknown video backend 'pyva'; did you mean 'pyav'"):
        read_frames(path, num=1, backend="pyva")
    with pytest.raises(ConfigError, match="motion vectors need backend 'pyav'"):
        read_frames(path, num=1, backend="decord", motion_vectors=True)
    with pytest.raises(VideoError, match="plain.mp4: no frame 30, it has 30 frames"):
        read_frames(path, indices=[30])
    with pytest.raises(VideoError, match="no frame -1"):
        read_frames(path, indices=[-1])
    with pytest.raises(VideoError, match="no frames were asked for"):
        read_frames(path, indices=[])
    with pytest.raises(ConfigError, match="0 x 8"):
        read_frames(path, num=1, size=(0, 8))
    for wrong in ({}, {"num": 1, "indices": [0]}):
        with pytest.raises(TypeError, match="exactly one"):
            read_frames(path, **wrong)
    with pytest.raises(TypeError, match="path, bytes or"):
        read_frames(3, num=1)


# ---- flow files --------------------------------------------------------------------------------------------------


def test_flow_files_are_checked(tmp_path):
    from safetensors.numpy import save_file

    flow = np.ones((4, 2, 6, 8), np.float16)
    save_file({"flow": flow}, tmp_path / "a.safetensors", {"version": "1", "num_frames": "4"})
    assert (read_flow_file(tmp_path / "a.safetensors", 4) == flow).all()
    with pytest.raises(VideoError, match="a.safetensors: flow for 4 frames, expected 8.*--num-frames 8"):
        read_flow_file(tmp_path / "a.safetensors", 8)
    with pytest.raises(VideoError, match="no such flow file"):
        read_flow_file(tmp_path / "b.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors here")
    save_file({"of": flow}, tmp_path / "name.safetensors", {"version": "1"})
    save_file({"flow": flow}, tmp_path / "old.safetensors", {"version": "0"})
    save_file({"flow": flow[0]}, tmp_path / "shape.safetensors", {"version": "1"})
    for name, line in [
        ("text", "not a flow file"),
        ("name", r"expected a tensor 'flow', found \['of'\]"),
        ("old", "version 0, expected 1"),
        ("shape", r"got \[2, 6, 8\]"),
    ]:
        with pytest.raises(VideoError, match=line):
            read_flow_file(tmp_path / f"{name}.safetensors")
