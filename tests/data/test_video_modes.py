"""Frames are those of a plain decoder, bit by bit, in every mode, and what each mode changes is told."""

from __future__ import annotations

import gc
import hashlib
import io
import logging
import re
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from video_files import moving_texture, numbered_video, read_number, write_video

from lavis_lstp.data.video import container, decode, index, reading
from lavis_lstp.data.video.reading import probe, read_frames
from lavis_lstp.errors import ConfigError, VideoError

COUNT = 60
VARIABLE = np.cumsum([0] + [1 + (i * 7) % 5 for i in range(COUNT - 1)]).tolist()
OPEN_GOP = {"g": "12", "bf": "3", "flags": "-cgop", "x264-params": "open-gop=1", "crf": "20"}
FILES = {
    "closed.mp4": {"options": {"g": "20", "bf": "3", "crf": "20"}},
    "pyramid.mkv": {"options": {"g": "30", "bf": "8", "b_strategy": "0", "b-pyramid": "normal", "crf": "20"}},
    "open_gop.mp4": {"options": OPEN_GOP},
    "open_gop.ts": {"options": OPEN_GOP},
    "variable.mp4": {"ticks": VARIABLE, "options": {"g": "20", "bf": "3"}},
    "edit_list.mp4": {"shift": -10, "options": {"g": "20", "bf": "3"}},
    "every_key.mp4": {"options": {"g": "1"}},
    "one_key.mp4": {"options": {"g": "500", "bf": "2", "sc_threshold": "0"}},
    "refresh.ts": {"options": {"g": "20", "x264-params": "intra-refresh=1", "crf": "20"}},
    "interlaced.mp4": {"options": {"g": "20", "bf": "2", "x264-params": "interlaced=1"}},
    "counted.avi": {"options": {"g": "20", "bf": "2"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"g": "12", "bf": "2", "b": "4M"}},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"g": "12", "bf": "2", "b": "4M"}},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "keyint=12:bframes=3:log-level=0"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "20", "b": "1M", "cpu-used": "8"}},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modes")
    pictures = list(moving_texture(COUNT, (2, 1), 128, 96))
    return {name: write_video(folder / name, pictures, **kw) for name, kw in FILES.items()}


def plainly(path: Path, stop: int | None = None) -> list[np.ndarray]:
    """RGB pictures of a file, decoded one after the other, without those an edit list hides."""
    found = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_type = "SLICE"
        for frame in container.decode(stream):
            found.append(decode.picture(frame, "rgb24").transpose(2, 0, 1))
            if stop is not None and len(found) >= stop:
                break
    return found


def somewhere(length: int, num: int, seed: int) -> list[int]:
    return sorted(np.random.default_rng(seed).choice(length, min(num, length), replace=False).tolist())


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", FILES)
def test_chosen_frames_are_those_of_plain_decoding(files, name, threads):
    every = plainly(files[name])
    for num, seed in ((1, 0), (1, 1), (1, 2), (4, 3), (20, 4), (len(every), 5)):
        chosen = somewhere(len(every), num, seed)
        video = read_frames(files[name], indices=chosen, threads=threads, size=(96, 128))  # the size that they have
        assert (video.frames == np.stack([every[i] for i in chosen])).all()


@pytest.mark.parametrize("name", FILES)
def test_parts_that_are_decoded_at_the_same_time_change_nothing(files, name):
    chosen = somewhere(COUNT - 11, 12, 6)
    for how in ({}, {"with_next": True}, {"exact": False}, {"motion_vectors": True, "flow_pairs": "local"}):
        try:
            alone = read_frames(files[name], indices=chosen, size=48, **how)
        except VideoError as error:  # no motion vectors, or too few key frames
            with pytest.raises(VideoError, match=re.escape(str(error))):
                read_frames(files[name], indices=chosen, size=48, threads=3, **how)
            continue
        for source in (files[name], files[name].read_bytes()):
            video = read_frames(source, indices=chosen, size=48, threads=3, name=str(files[name]), **how)
            assert (video.frames == alone.frames).all() and video.info == alone.info
            assert video.indices == alone.indices
            assert video.flow is None if alone.flow is None else (video.flow == alone.flow).all()


def test_each_thread_decodes_a_part_of_the_file(files, monkeypatch):
    parts = []
    monkeypatch.setattr(
        reading, "_decode", lambda *given, decode=reading._decode: parts.append(given[2]) or decode(*given)
    )
    read_frames(files["closed.mp4"], indices=[0, 15, 25, 30, 45], size=48, threads=2)
    assert sorted(parts) in ([[0, 15], [25, 30, 45]], [[0, 15, 25, 30], [45]])


def test_threads_of_ffmpeg_do_not_wait_for_pythons_lock(files):
    """Older torchvisions set a level, and then a decoder with threads may wait for ever when it is freed."""
    av.logging.set_level(av.logging.ERROR)
    try:
        read_frames(next(iter(files.values())), indices=[COUNT // 2], threads=3)
        assert av.logging.get_level() is None
    finally:
        av.logging.set_level(None)


def test_chosen_frames_of_real_clips_are_those_of_plain_decoding(real_videos):
    for path in real_videos:
        every = plainly(path, 700)
        chosen = somewhere(len(every), 24, 0)
        for frame, i in zip(read_frames(path, indices=chosen).frames, chosen, strict=True):
            assert (frame == every[i]).all(), (path.name, i)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs the command ffmpeg")
@pytest.mark.parametrize("name", [name for name in FILES if name not in ("refresh.ts", "counted.avi")])
def test_decoded_pixels_are_those_of_ffmpeg(files, name):
    command = ["ffmpeg", "-v", "error", "-i", files[name], "-fps_mode", "passthrough", "-f", "framemd5", "-"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    theirs = [line.split(",")[-1].strip() for line in lines if not line.startswith("#")]
    table = index.video_index(files[name], name)
    chosen = somewhere(table.num_frames, 6, 1)
    with index.reopen(files[name], table) as opened:
        walk = decode._by_count if table.by_count else decode._by_time
        found = walk(lambda **_: opened, table, chosen, None, None, decode.DecodeCount())
        ours = {i: hashlib.md5(frame.to_ndarray().tobytes()).hexdigest() for i, frame in found}
    assert len(theirs) == table.num_frames and ours == {i: theirs[i] for i in chosen}


def test_pictures_that_nothing_refers_to_are_left_out_and_none_after_the_target_is_decoded(files):
    path, chosen = files["pyramid.mkv"], [5, 25, 45]
    table = index.video_index(path, "a")
    video = read_frames(path, indices=chosen)
    needed = sum(stretch.stop - stretch.start for stretch in decode.stretches(table, chosen))
    assert video.count.packets == needed and video.count.pictures < 0.7 * needed


def test_dense_frames_are_one_pass_and_sparse_ones_seek(tmp_path):
    path = numbered_video(tmp_path / "a.mp4", 400, gop=20)
    dense = read_frames(path, num=100)
    assert dense.count.seeks == 0 and dense.count.packets <= 400
    path = numbered_video(tmp_path / "b.mp4", 1500, gop=20)
    sparse = read_frames(path, indices=[3, 1490])
    assert sparse.count.seeks == 1 and sparse.count.packets <= 60
    assert [read_number(f) for f in sparse.frames] == [3, 1490 % 38]


# ---- near key frames ---------------------------------------------------------------------------------------------


def test_a_key_frame_is_decoded_alone(tmp_path):
    path = numbered_video(tmp_path / "a.mp4", 60, gop=10)
    video = read_frames(path, indices=[4, 12, 13, 29, 59], exact=False)
    assert video.indices == [0, 10, 30, 50] and video.count.pictures == video.count.packets == 4
    assert [read_number(f) for f in video.frames] == [0, 10, 30, 12]


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("counted.avi", "one_key.mp4")])
def test_key_frames_are_ascending_distinct_and_real(files, name):
    every = plainly(files[name])
    video = read_frames(files[name], num=4, exact=False)
    assert 2 <= len(video.indices) <= 4 and video.indices == sorted(set(video.indices))
    assert (video.frames == np.stack([every[i] for i in video.indices])).all()
    assert (video.frames == read_frames(files[name], indices=video.indices).frames).all()


def test_where_key_frames_are_no_help_exact_frames_are_read_and_that_is_told_once(files, caplog, monkeypatch):
    monkeypatch.setattr("lavis_lstp.data.video.choosing._TOLD", set())
    for _ in range(2):
        for name in ("one_key.mp4", "counted.avi"):
            video = read_frames(files[name], num=4, exact=False)
            assert video.indices == read_frames(files[name], num=4).indices
    told = [r.getMessage() for r in caplog.records if "exact frames are read" in r.getMessage()]
    assert len(told) == 2 and "one_key.mp4: all frames" in told[0] and "counted.avi: stores no times" in told[1]


# ---- flow of neighbouring pictures -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["closed.mp4", "open_gop.mp4", "mpeg2.mpg", "mpeg4.mp4"])
@pytest.mark.parametrize("exact", [True, False])
def test_local_pairs_give_the_motion_to_the_next_picture(tmp_path, name, exact):
    """The next picture, 8 or more frames before the next chosen one."""
    options = {"g": "12", "bf": "2", "sc_threshold": "0"} | FILES[name].get("options", {})
    kw = FILES[name] | {"options": options}
    path = write_video(tmp_path / name, list(moving_texture(COUNT, (2, 1), 192, 128)), **kw)
    video = read_frames(path, num=6, exact=exact, motion_vectors=True, flow_pairs="local")
    assert video.flow.shape == (len(video.indices), 2, 128, 192)
    middle = np.median(video.flow[:, :, 32:-32, 32:-32], axis=(2, 3))
    assert np.abs(middle - [2, 1]).max() < 0.3


def test_two_pictures_are_enough_for_a_key_frame_and_its_motion(tmp_path):
    options = {"g": "20", "keyint_min": "20", "sc_threshold": "0", "bf": "2", "b-pyramid": "none"}
    path = write_video(tmp_path / "a.mp4", moving_texture(200, (1, 0), 128, 96), options=options)
    video = read_frames(path, num=8, exact=False, motion_vectors=True, flow_pairs="local")
    assert len(video.indices) == 8 and video.count.pictures == 16
    assert np.abs(np.median(video.flow[:, 0], axis=(1, 2)) - 1).max() < 0.3


def test_two_frames_that_one_picture_tells_the_motion_of(tmp_path):
    options = {"g": "20", "keyint_min": "20", "sc_threshold": "0", "bf": "3", "b_strategy": "0"}
    path = write_video(tmp_path / "a.mp4", moving_texture(40, (2, 1), 192, 128), options=options)
    video = read_frames(path, indices=[5, 6, 7], motion_vectors=True, flow_pairs="local")
    middle = np.median(video.flow[:, :, 32:-32, 32:-32], axis=(2, 3))
    assert np.abs(middle - [2, 1]).max() < 0.3


# ---- smaller pictures, devices, other libraries ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["closed.mp4", "mpeg2.mpg"])
def test_pictures_are_scaled_while_they_are_decoded(tmp_path, name):
    path = write_video(tmp_path / name, moving_texture(12, (2, 1), 320, 240), **FILES[name])
    small, whole = read_frames(path, num=3, decode_size=60), read_frames(path, num=3)
    assert small.frames.shape == (3, 3, 60, 80) and (small.info.height, small.info.width) == (240, 320)
    area = whole.frames.reshape(3, 3, 60, 4, 80, 4).mean(axis=(3, 5))
    assert np.abs(small.frames.mean(axis=1) - area.mean(axis=1)).mean() < 6  # colour is stored at half the size
    assert read_frames(path, num=1, decode_size=1000).frames.shape == (1, 3, 240, 320)
    assert read_frames(path, num=1, decode_size=60, size=32).frames.shape == (1, 3, 32, 32)


def test_a_device_that_is_absent_is_told_once_and_the_processor_decodes(files, caplog):
    container._NO_HARDWARE.clear()
    with caplog.at_level(logging.WARNING):
        first = read_frames(files["closed.mp4"], num=3, hardware="d3d11va")
        read_frames(files["closed.mp4"], num=3, hardware="d3d11va")
    assert (first.frames == read_frames(files["closed.mp4"], num=3).frames).all()
    assert caplog.text.count("'d3d11va' does not decode it") == 1


TORCHCODEC_READS = [name for name in FILES if name.endswith((".mp4", ".mkv", ".webm")) and name != "interlaced.mp4"]


@pytest.mark.parametrize(
    "name", TORCHCODEC_READS
)  # FFmpeg's filter takes other lines for the colour of interlaced ones
def test_torchcodec_gives_the_same_frames(files, name):
    pytest.importorskip("torchcodec", exc_type=(ImportError, RuntimeError))
    ours = read_frames(files[name], num=7)
    theirs = read_frames(files[name], num=7, backend="torchcodec")
    assert theirs.indices == ours.indices and theirs.times_s.tolist() == ours.times_s.tolist()
    assert np.abs(theirs.frames.astype(int) - ours.frames).max() <= 4


@pytest.mark.parametrize("name", ["open_gop.ts", "mpeg2.mpg", "counted.avi"])
def test_torchcodec_is_refused_where_it_returns_wrong_frames(files, name):
    pytest.importorskip("torchcodec", exc_type=(ImportError, RuntimeError))
    with pytest.raises(VideoError, match="use backend 'pyav'"):
        read_frames(files[name], num=3, backend="torchcodec")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"flow_pairs": "locl"}, "did you mean 'local'"),
        ({"hardware": "cuda9"}, "unknown hardware"),
        ({"decode_size": 0}, "decode_size must be at least 1"),
        ({"decode_size": 32, "backend": "decord"}, "decode_size need backend 'pyav'"),
        ({"motion_vectors": True, "hardware": "cuda"}, "leave out hardware"),
    ],
)
def test_wrong_settings_are_named(files, given, said):
    with pytest.raises(ConfigError, match=said):
        read_frames(files["closed.mp4"], num=2, **given)


# ---- files that lie or change ------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [True, False])
def test_a_table_that_calls_every_picture_a_key_frame_gives_right_frames_or_one_line(files, tmp_path, exact):
    raw, path = files["closed.mp4"].read_bytes(), tmp_path / "lies.mp4"
    assert raw.count(b"stss") == 1
    path.write_bytes(raw.replace(b"stss", b"free"))  # a file without this table has key frames only
    every = plainly(files["closed.mp4"])
    for seed in range(4):
        try:
            video = read_frames(path, indices=somewhere(COUNT, 5, seed), exact=exact)
        except VideoError as error:
            assert str(error).startswith(f"{path}: frame ") and "\n" not in str(error)
        else:
            assert (video.frames == np.stack([every[i] for i in video.indices])).all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("change", ["shorter", "other", "longer"])
def test_a_file_that_changes_while_it_is_read_is_frames_or_one_line(files, tmp_path, monkeypatch, change, threads):
    path = tmp_path / "changes.ts"
    before, after = files["open_gop.ts"].read_bytes(), files["refresh.ts"].read_bytes()
    after = {"shorter": before[: len(before) // 2], "other": after, "longer": before + before[: 188 * 50]}[change]
    path.write_bytes(before)
    plain, changed = reading.decode_pyav, []

    def change_then(*args, **how):
        changed.append(path.write_bytes(after))
        return plain(*args, **how)

    old, new = plainly(files["open_gop.ts"]), plainly(files["refresh.ts"])
    monkeypatch.setattr(reading, "decode_pyav", change_then)
    try:
        video = read_frames(path, indices=[3, 50], size=(96, 128), threads=threads)
    except VideoError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
    else:
        for i, frame in zip([3, 50], video.frames, strict=True):
            assert (frame == old[i]).all() or (frame == new[i]).all()
    assert changed


def test_pictures_are_freed_without_a_collection_of_garbage(files):
    """PyAV ties a picture to its side data in a cycle; 64 pictures of a film then stay in memory."""
    gc.collect()
    gc.disable()
    try:
        for flow in ({}, {"motion_vectors": True, "flow_pairs": "local"}, {"motion_vectors": True}):
            read_frames(files["closed.mp4"], num=12, **flow)
            assert sum(type(thing) is av.VideoFrame for thing in gc.get_objects()) < 3
        with av.open(str(files["closed.mp4"])) as container:
            assert [frame.side_data for frame in container.decode(video=0)]
        assert sum(type(thing) is av.VideoFrame for thing in gc.get_objects()) == COUNT  # what PyAV does by itself
    finally:
        gc.enable()


def field_coded(path: Path, count: int) -> Path:
    """MPEG-2 whose pictures are two fields each, as of broadcasts, 25 a second; each is brighter by 8 than the last.

    No encoder here writes it: these are pictures of half the height, whose headers are made those of fields.
    """
    half = io.BytesIO()
    with av.open(half, "w", format="mpeg2video") as out:
        stream = out.add_stream("mpeg2video", rate=50, options={"g": "1", "q": "3"})
        stream.width, stream.height, stream.pix_fmt = 96, 32, "yuv420p"
        for n in range(2 * count):
            grey = np.full((32, 96, 3), 8 * (n // 2), np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        out.mux(stream.encode(None))

    def put(unit: bytes, bit: int, size: int, value: int) -> bytes:
        bits = f"{int.from_bytes(unit, 'big'):0{8 * len(unit)}b}"
        bits = bits[:bit] + f"{value:0{size}b}" + bits[bit + size :]
        return int(bits, 2).to_bytes(len(unit), "big")

    made, ahead, fields = [], [], 0
    for unit in half.getvalue().split(b"\0\0\1")[1:]:
        extension = unit[1] >> 4 if unit[0] == 0xB5 else 0
        if unit[0] == 0xB3:  # height and rate
            ahead.append(put(put(unit, 20, 12, 64), 36, 4, 3))
        elif unit[0] == 0xB8 or extension == 1:  # a group; not progressive
            ahead.append(put(unit, 20, 1, 0) if extension else unit)
        elif unit[0] == 0:
            made += [] if fields % 2 else ahead
            made, ahead, fields = [*made, put(unit, 8, 10, 0)], [], fields + 1
        elif extension == 8:  # the first or the second field, and of none the signs of whole pictures
            made.append(put(put(put(unit, 30, 2, 2 - fields % 2), 32, 2, 0), 38, 3, 0))
        elif unit[0] != 0xB7:
            made.append(unit)
    raw = b"".join(b"\0\0\1" + unit for unit in made)
    if path.suffix == ".m2v":
        path.write_bytes(raw)
        return path
    with av.open(io.BytesIO(raw), format="mpegvideo") as source, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for n, packet in enumerate(packet for packet in source.demux(video=0) if packet.size):
            packet.time_base, packet.pts, packet.dts, packet.stream = Fraction(1, 25), n, n, stream
            out.mux(packet)
    return path


@pytest.mark.parametrize("ending", ["ts", "mkv", "m2v"])
def test_pictures_of_two_fields_are_read_and_damaged_ones_are_not(tmp_path, ending):
    path = field_coded(tmp_path / f"a.{ending}", 25)
    video = read_frames(path, indices=range(probe(path).num_frames))
    assert np.abs(video.frames.mean((1, 2, 3)) - 8 * np.arange(25)).max() < 4
    assert video.times_s == pytest.approx(np.arange(25) / 25, abs=2e-3)
    assert read_frames(path, indices=[20, 7]).frames.mean((1, 2, 3)) == pytest.approx([160, 56], abs=4)
    if ending == "mkv":
        raw = bytearray(path.read_bytes())
        with av.open(str(path)) as container:
            at, size = next((packet.pos, packet.size) for packet in container.demux(video=0) if packet.pts == 400)
        raw[at + size // 2 : at + size // 2 + 60] = bytes(range(7, 67))
        with pytest.raises(VideoError, match="frame 10 cannot be decoded"):
            read_frames(bytes(raw), indices=[9, 10])
