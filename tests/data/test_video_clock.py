"""Which track of a file is read, from when its seconds count, and recordings whose clock begins anew."""

from __future__ import annotations

import io
import logging
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest
from video_files import numbered_picture, numbered_video, read_number

from lavis_lstp.data.frame_numbers import frames_at_rate, rate_varies
from lavis_lstp.data.qa_dataset import VideoQADataset
from lavis_lstp.data.video.choosing import frames_between
from lavis_lstp.data.video.index import video_index
from lavis_lstp.data.video.reading import probe, read_frames
from lavis_lstp.errors import VideoError
from lavis_lstp.inference.selection import select
from lavis_lstp.schema import Span
from webdataset_tools.mp4_header import mp4_info


class Track(NamedTuple):
    """Numbered pictures at 25 a second."""

    count: int
    first: int = 0
    codec: str = "libx264"
    begins_s: float = 0.0
    side: int = 64
    disposition: int | None = None
    bit_rate: int | None = None


def write_tracks(path: Path, *tracks: Track, sound_s: tuple[float, float] | None = None, **container) -> Path:
    """A file of tracks of pictures and, from and to `sound_s`, of silence."""
    with av.open(str(path), "w", options=container) as out:
        streams = [(out.add_stream(track.codec, rate=25), track) for track in tracks]
        for stream, track in streams:
            stream.width = stream.height = track.side
            stream.pix_fmt = "yuvj420p" if track.codec == "mjpeg" else "yuv420p"
            if track.bit_rate:
                stream.bit_rate = track.bit_rate
            if track.codec == "libx264":
                stream.options = {"bf": "2", "g": "10", "keyint_min": "10", "sc_threshold": "0", "b_strategy": "0"}
            if track.disposition is not None:
                stream.disposition = track.disposition
        sound = out.add_stream("aac", rate=16000, layout="mono") if sound_s else None
        packets = []
        for stream, track in streams:
            for i in range(track.count):
                picture = numbered_picture(track.first + i, track.side, track.side)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = round(track.begins_s * 25) + i, Fraction(1, 25)
                packets += stream.encode(frame)
            packets += stream.encode()
        if sound:
            for n in range(round((sound_s[1] - sound_s[0]) * 16000 / 1024)):
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 16000, round(sound_s[0] * 16000) + 1024 * n
                packets += sound.encode(frame)
            packets += sound.encode()
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            out.mux(packet)
    return path


def first_picture_s(path: Path) -> float:
    """When FFmpeg shows the first picture of a file, from the file's start."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        pts = min(p.pts for p in container.demux(stream) if p.size and not p.is_discard)
        return float(pts * stream.time_base) - container.start_time / av.time_base


# ---- seconds count from the start of the file ----------------------------------------------------------------------

LATE = {
    "mp4": ({}, 1.0, (0.0, 2.5)),
    "mov": ({}, 1.0, (0.0, 2.5)),
    "mkv": ({}, 1.0, (0.0, 2.5)),
    "ts": ({}, 1.0, (0.0, 2.5)),
    "flv": ({}, 1.0, (0.0, 2.5)),
    "fragments.mp4": ({"movflags": "frag_keyframe+delay_moov"}, 1.0, (0.0, 2.5)),
    "far.ts": ({"output_ts_offset": "95000"}, 1.0, (0.0, 2.5)),
    "far.mkv": ({"output_ts_offset": "7000"}, 1.0, (0.0, 2.5)),
    "copyts.mp4": ({}, 4.0, (3.0, 5.5)),  # as `-ss 3 -c copy -copyts` leaves it: nothing at all for three seconds
    "wrapping.ts": ({"output_ts_offset": str(2**33 / 90000 - 2.4)}, 1.0, (0.0, 2.5)),
    "negative.mp4": ({"avoid_negative_ts": "disabled"}, 0.0, (-1.0, 1.5)),
}


@pytest.mark.parametrize("backend", ["pyav", "decord"])
@pytest.mark.parametrize("name", LATE)
def test_pictures_that_begin_after_the_sound_have_the_times_of_players(tmp_path, name, backend):
    container, begins_s, sound_s = LATE[name]
    path = write_tracks(tmp_path / f"late.{name}", Track(30, begins_s=begins_s), sound_s=sound_s, **container)
    late_s = first_picture_s(path)
    assert name == "negative.mp4" or late_s == pytest.approx(1.0, abs=0.07), "the sound may begin with its padding"
    if backend == "decord" and path.suffix in (".ts", ".flv"):
        pytest.skip("decord is not used for this container")
    info = probe(path)
    assert info.num_frames == 30 and info.duration_s == pytest.approx(late_s + 1.2, abs=2e-3)
    assert info.fps == pytest.approx(25, rel=1e-3)
    video = read_frames(path, indices=range(30), backend=backend)
    assert video.times_s == pytest.approx(late_s + np.arange(30) / 25, abs=2e-3)
    assert [read_number(frame) for frame in video.frames] == list(range(30))
    assert read_frames(path, times_s=video.times_s + 0.01, backend=backend).indices == video.indices
    # 0.4 to 0.8 s after the first picture
    part = read_frames(path, num=30, between_s=(late_s + 0.399, late_s + 0.799), backend=backend)
    assert part.indices == list(range(10, 20))


def test_a_time_before_the_first_picture_shows_the_first_and_none_lies_before_the_start(tmp_path):
    path = write_tracks(tmp_path / "late.mkv", Track(30, begins_s=1.0), sound_s=(0.0, 2.0))
    assert read_frames(path, times_s=[0.0, 0.9, 1.3]).indices == [0, 0, pytest.approx(6, abs=2)]
    with pytest.raises(VideoError, match="no frame at -0.1 s; it lasts from 0 to 2.2"):
        read_frames(path, times_s=[-0.1])


def test_a_file_without_an_earlier_track_begins_at_zero(tmp_path):
    for container in ({}, {"output_ts_offset": "3"}):
        for ending in ("mkv", "ts", "mp4"):
            path = write_tracks(tmp_path / f"alone.{ending}", Track(10, begins_s=2.0), **container)
            assert read_frames(path, indices=[0]).times_s.tolist() == [0.0]
            assert probe(path).duration_s == pytest.approx(0.4, abs=2e-3)


def test_a_cut_that_hides_pictures_counts_from_the_first_one_shown(tmp_path):
    """As `ffmpeg -ss 0.52 -c copy` writes MP4: pictures before the cut are kept and hidden by an edit list."""
    whole = numbered_video(tmp_path / "whole.mp4", 30, gop=30)
    with av.open(str(whole)) as source, av.open(str(tmp_path / "cut.mp4"), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                packet.pts, packet.dts = (t - round(0.52 / packet.time_base) for t in (packet.pts, packet.dts))
                out.mux(packet)
    video = read_frames(tmp_path / "cut.mp4", indices=range(17))
    assert [read_number(frame) for frame in video.frames] == list(range(13, 30))
    assert video.times_s == pytest.approx(np.arange(17) / 25, abs=1e-3)


def test_questions_about_seconds_meet_the_pictures_that_a_player_shows_then(tmp_path):
    write_tracks(tmp_path / "late.mp4", Track(38, begins_s=2.0), sound_s=(0.0, 3.5))
    row = {"question_id": "q", "video_id": "late", "video": "late.mp4", "question": "?", "answer": "it"}
    dataset = VideoQADataset([row | {"clip_s": [2.4, 2.8], "span_s": [2.48, 2.6]}], tmp_path, num_frames=38)
    sample = dataset[0]
    assert [read_number(frame.numpy()) for frame in sample["frames"]] == list(range(10, 20))
    assert sample["frame_times"].tolist() == pytest.approx([2.4 + i / 25 for i in range(10)], abs=1e-3)
    assert sample["gold_span"].tolist() == [2, 5]


@pytest.mark.parametrize("edits", ["0", "1"])
@pytest.mark.parametrize("begins_s", [0.0, 0.4])
def test_the_header_of_an_mp4_says_the_same_of_a_late_picture_or_nothing(tmp_path, begins_s, edits):
    path = write_tracks(tmp_path / "v.mp4", Track(12, begins_s=begins_s), sound_s=(0.0, 1.0), use_editlist=edits)
    late = first_picture_s(path) > 0
    assert late == (begins_s > 0 or edits == "0"), "B-frames without an edit list begin late, too"
    assert mp4_info(path.read_bytes()) == (None if late else probe(path))


@pytest.mark.parametrize("frames", [2, 0])
@pytest.mark.parametrize("ending", ["mp4", "mov", "mkv", "flv"])
@pytest.mark.parametrize(
    "ticks",
    [
        [*range(60), *range(240, 300)],
        [*range(30), *range(90, 120), *range(300, 303)],
        [*range(60), 299],
        [0, *range(200, 260)],
        [*range(0, 240, 60), 241, 242],
    ],
)
def test_a_pause_does_not_make_a_video_longer(tmp_path, ticks, ending, frames):
    """A selection of frames or a recorded screen: MP4 stores a pause beside the wrong picture where there are B."""
    options = {"bf": str(frames), "g": "50", "b_strategy": "0"}
    path = tmp_path / f"pause.{ending}"
    numbered_video(path, len(ticks), fps=30, ticks=ticks, width=64, height=64, options=options)
    found = probe(path)
    assert found.duration_s == pytest.approx((ticks[-1] + 1) / 30, abs=0.035)
    if ending in ("mp4", "mov"):
        assert mp4_info(path.read_bytes()) == found
    with pytest.raises(VideoError, match="no frame at"):
        read_frames(path, times_s=[ticks[-1] / 30 + 1])


# ---- which track ---------------------------------------------------------------------------------------------------

THUMBNAIL, FILM = Track(1, 30, "mjpeg"), Track(30)
DEFAULT, NONE = 1, 0
SEVERAL = {
    "a thumbnail before the film": ("mkv", (THUMBNAIL, FILM), 1),
    "a thumbnail behind the film": ("mkv", (FILM, THUMBNAIL), 0),
    "a thumbnail in an MP4": ("mp4", (Track(1, 33, "mjpeg"), FILM), 1),
    "a thumbnail that is the default": (
        "mkv",
        (THUMBNAIL._replace(disposition=DEFAULT), FILM._replace(disposition=NONE)),
        1,
    ),
    "the second is the default": ("mkv", (Track(30, disposition=NONE), Track(30, 4, disposition=DEFAULT)), 1),
    "the first of equals": ("mkv", (Track(30, 2), Track(20, side=96)), 0),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_the_film_is_read_where_there_are_several_tracks(tmp_path, caplog, name):
    ending, tracks, expected = SEVERAL[name]
    path = write_tracks(tmp_path / f"several.{ending}", *tracks)
    with av.open(str(path)) as container:
        best = container.streams.best("video").index
    assert best == expected or name in ("a thumbnail that is the default", "a thumbnail in an MP4")
    with caplog.at_level(logging.WARNING):
        info = probe(path)
    film = tracks[expected]
    assert (info.num_frames, info.codec, info.width, info.track) == (film.count, "h264", film.side, expected)
    assert f"several.{ending}: track {expected} (h264) is read, not {1 - expected}" in caplog.text
    video = read_frames(path, num=5, motion_vectors=True)
    wanted = [film.first + i for i in video.indices]
    assert [read_number(frame) for frame in video.frames] == wanted
    assert mp4_info(path.read_bytes()) is None, "a header with several tracks is left to FFmpeg"
    try:
        theirs = read_frames(path, num=5, backend="decord")
    except VideoError as error:
        assert "use backend 'pyav'" in str(error)
    else:
        assert (theirs.frames == video.frames).all()


def test_one_track_is_read_without_a_word(tmp_path, caplog):
    assert probe(write_tracks(tmp_path / "one.mkv", FILM, sound_s=(0.0, 1.0))).track is None
    assert not caplog.records


# ---- recordings joined with `cat` ----------------------------------------------------------------------------------


def part(path: Path, first: int, offset_s: float, codec: str, count: int = 20) -> Path:
    """Numbered pictures from `first` on, stamped from `offset_s` on."""
    return write_tracks(path, Track(count, first, codec, bit_rate=2_000_000), output_ts_offset=str(offset_s))


JOINED = {
    "a later clock before an earlier one, MPEG-TS": ("ts", "libx264", (20, 0)),
    "the same clock twice, MPEG-TS": ("ts", "libx264", (0, 0)),
    "a gap of twenty seconds, MPEG-TS": ("ts", "libx264", (0, 20)),
    "far back, which FFmpeg takes for a clock that wraps": ("ts", "libx264", (100, 0)),
    "a gap that is as good as a day": ("ts", "libx264", (0, 80_000)),
    "HEVC": ("ts", "libx265", (20, 0)),
    "MPEG-2 in MPEG-TS": ("ts", "mpeg2video", (20, 0)),
    "MPEG-1 in MPEG-PS": ("mpg", "mpeg1video", (20, 0)),
    "MPEG-2 in MPEG-PS": ("mpg", "mpeg2video", (20, 0)),
    "the same clock twice, MPEG-PS": ("mpg", "mpeg1video", (0, 0)),
    "AVI": ("avi", "mpeg4", (0, 0)),
}


@pytest.mark.parametrize("name", JOINED)
def test_joined_recordings_go_on_in_the_order_of_decoding(tmp_path, name):
    ending, codec, (before, behind) = JOINED[name]
    parts = [part(tmp_path / f"a.{ending}", 0, before, codec), part(tmp_path / f"b.{ending}", 20, behind, codec)]
    path = tmp_path / f"joined.{ending}"
    path.write_bytes(b"".join(one.read_bytes() for one in parts))
    info = probe(path)
    assert info.num_frames == 40 and info.duration_s == pytest.approx(1.6, abs=0.05)
    assert info.fps == pytest.approx(25, rel=0.03)
    video = read_frames(path, indices=range(40))
    shown = [read_number(frame) for frame in video.frames]
    assert shown == [number % 38 for number in range(40)]
    assert video.times_s == pytest.approx(np.arange(40) / 25, abs=0.05)
    assert read_frames(path, indices=[25, 19, 20, 39]).frames.tolist() == video.frames[[25, 19, 20, 39]].tolist()
    assert read_frames(path, num=40, between_s=(video.times_s[21] - 0.01, 2)).indices == list(range(21, 40))


@pytest.mark.parametrize(
    ("ending", "codec"), [("flv", "libx264"), ("flv", "flv1"), ("mp4", "libx264"), ("mov", "mpeg4"), ("wmv", "wmv2")]
)
@pytest.mark.parametrize("sound_s", [None, (0.0, 0.4)])
def test_a_second_file_that_ffmpeg_does_not_read_is_not_lost_in_silence(tmp_path, ending, codec, sound_s):
    raw = write_tracks(tmp_path / f"a.{ending}", Track(10, codec=codec), sound_s=sound_s).read_bytes()
    path = tmp_path / f"joined.{ending}"
    path.write_bytes(raw + write_tracks(path, Track(10, 10, codec), sound_s=sound_s).read_bytes())
    for source in (path, path.read_bytes()):
        with pytest.raises(VideoError, match=f"joined.{ending}: another file begins behind frame 10; join files with"):
            probe(source, name=path.name)
    assert mp4_info(path.read_bytes()) is None
    (tmp_path / f"noise.{ending}").write_bytes(raw + raw[1:])
    assert probe(tmp_path / f"noise.{ending}") == probe(tmp_path / f"a.{ending}")


def test_three_parts_and_their_sound(tmp_path):
    """The counters of MPEG-TS packets begin anew at each joint, so FFmpeg takes what stands before it for damaged."""
    raw = b""
    for n, offset in enumerate((50, 20, 0)):
        one = write_tracks(tmp_path / "p.ts", Track(12, 12 * n), sound_s=(0.0, 0.48), output_ts_offset=str(offset))
        raw += one.read_bytes()
    video = read_frames(raw, num=36, name="joined.ts")
    assert [read_number(frame) for frame in video.frames] == list(range(36))
    assert np.diff(video.times_s) == pytest.approx(0.04, abs=1e-3)


@pytest.mark.parametrize("back", [0, 2])
def test_where_cut_parts_were_joined_the_other_pictures_keep_their_times(tmp_path, back):
    """`ffmpeg -f concat -c copy` squeezes the pictures in front of a cut into ticks, behind some shown later."""
    clip = numbered_video(tmp_path / "clip.mp4", 30, gop=30)
    with av.open(str(clip)) as source:
        packets = [packet for packet in source.demux(video=0) if packet.size]
        tick = 1 / (25 * packets[0].time_base)
        with av.open(str(tmp_path / "joined.mp4"), "w") as joined:
            stream = joined.add_stream_from_template(source.streams.video[0])
            times = [(packet.pts, packet.dts) for packet in packets]
            end = next(n for n in range(20, 30) if {pts for pts, _ in times[:n]} == {k * tick for k in range(n)})
            squeezed = next(n for n in range(9, 20) if {pts for pts, _ in times[:n]} == {k * tick for k in range(n)})
            for n, packet in enumerate([*packets[:end], *packets]):
                own = n - end
                if 0 <= own < squeezed:
                    packet = av.Packet(bytes(packet))
                    packet.pts = packet.dts = times[end - 1][1] + own + 1
                    packet.is_keyframe = own == 0
                elif own >= squeezed:
                    packet.pts, packet.dts = (int(at + (end - squeezed - back) * tick) for at in times[own])
                    packet.dts = max(packet.dts, times[end - 1][1] + own + 1)
                packet.stream = stream
                packet.time_base = stream.time_base or packet.time_base
                joined.mux(packet)
    video = read_frames(tmp_path / "joined.mp4", indices=range(end + 30))
    numbers = [read_number(frame) for frame in video.frames]
    assert numbers == [*range(end), *range(30)], (end, squeezed, numbers)
    assert video.times_s[:end] == pytest.approx(np.arange(end) / 25, abs=1e-4)
    behind = np.arange(end - back, end - back + 30 - squeezed) / 25
    assert video.times_s[end + squeezed + back + 1 :] == pytest.approx(behind[back + 1 :], abs=1e-2)
    assert (np.diff(video.times_s) > 0).all()
    assert read_frames(tmp_path / "joined.mp4", times_s=[0.5]).indices == [12]


def test_a_pause_in_a_recording_is_kept(tmp_path):
    """Up to ten seconds a step forward is time that passed; further, as FFmpeg has it, another clock."""
    raw = b"".join(part(tmp_path / "p.ts", 20 * n, 1 + 6 * n, "libx264").read_bytes() for n in range(2))
    assert read_frames(raw, indices=[19, 20]).times_s == pytest.approx([0.76, 6.0], abs=1e-3)
    slides = numbered_video(tmp_path / "slides.mkv", 4, ticks=[0, 400, 800, 1200])  # a picture every 16 s
    assert read_frames(slides, num=4).times_s == pytest.approx([0, 16, 32, 48], abs=1e-2)


def recording_without(path: Path, first: int, behind: int, cut: int = 0) -> tuple[bytes, int]:
    """A recording in MPEG-TS without what stands from the key frame `first` on up to the one `behind`, and its marks.

    Of the part in front the last `cut` packets of 188 bytes are missing, too. The counters of packets do not fit behind
    it, so that FFmpeg marks what stands in front as damaged.
    """
    with av.open(str(numbered_video(path, 36, gop=6))) as container:
        at = [packet.pos for packet in container.demux(video=0) if packet.size]
    raw = path.read_bytes()
    raw = raw[: at[first] - 188 * cut] + raw[at[behind] :]
    with av.open(io.BytesIO(raw)) as container:
        return raw, sum(packet.is_corrupt for packet in container.demux(video=0) if packet.size)


@pytest.mark.parametrize(("first", "behind"), [(6, 12), (12, 24), (24, 30)])
def test_a_segment_that_is_missing_damages_nothing_before_it(tmp_path, first, behind):
    raw, marked = recording_without(tmp_path / "whole.ts", first, behind)
    assert marked
    kept = [n for n in range(36) if not first <= n < behind]
    video = read_frames(raw, indices=range(len(kept)))
    assert [read_number(frame) for frame in video.frames] == kept
    assert video.times_s == pytest.approx(np.array(kept) / 25, abs=1e-3)


@pytest.mark.parametrize("mode", [{}, {"mpegts_m2ts_mode": "1"}])
@pytest.mark.parametrize("begin", [1, 100, 188, 500])
def test_a_recording_that_begins_inside_a_transport_packet_is_not_called_cut_off_at_its_end(tmp_path, mode, begin):
    raw = write_tracks(tmp_path / "a.ts", Track(30), **mode).read_bytes()
    assert probe(raw[begin:]).num_frames >= 20 and video_index(raw[begin:], "a.ts").missing is None
    for cut in (2, 4, 50):
        assert "ends inside a transport packet" in video_index(raw[begin:-cut], "a.ts").missing


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_a_segment_that_was_cut_off_in_front_of_a_missing_one_shows_no_other_picture(tmp_path, cut):
    raw, _ = recording_without(tmp_path / "whole.ts", 12, 24, cut)
    try:
        video = read_frames(raw, indices=range(probe(raw).num_frames), name="cut.ts")
    except VideoError as error:
        assert str(error).startswith("cut.ts: ")
    else:
        shown = [read_number(frame) for frame in video.frames]
        assert shown == sorted(set(shown)) and set(shown) <= {*range(12), *range(24, 36)}


def test_a_joint_where_the_first_part_was_cut_off_never_shows_another_frame(tmp_path):
    raw = [part(tmp_path / "p.ts", 20 * n, 20 - 20 * n, "libx264", 20 - 5 * n).read_bytes() for n in range(2)]
    for packets in (3, 7, 12):
        joined = raw[0][: -188 * packets] + raw[1]
        try:
            video = read_frames(joined, num=40, name="cut.ts")
        except VideoError as error:
            assert str(error).startswith("cut.ts: ")
        else:
            shown = [read_number(frame) for frame in video.frames]
            assert shown == sorted(shown) and shown[-15:] == list(range(20, 35))


def test_an_avi_whose_last_pictures_were_dropped_is_whole(tmp_path):
    """Its header counts them, and its index, which a file that is cut off lacks, does not."""
    raw = bytearray(write_tracks(tmp_path / "a.avi", Track(12, codec="mjpeg")).read_bytes())
    for box, place in ((b"avih", 8 + 16), (b"strh", 8 + 32)):
        at = raw.index(box) + place
        assert int.from_bytes(raw[at : at + 4], "little") == 12
        raw[at : at + 4] = (15).to_bytes(4, "little")
    video = read_frames(bytes(raw), indices=range(12))
    assert [read_number(frame) for frame in video.frames] == list(range(12))
    assert video_index(bytes(raw), "a.avi").missing is None
    cut = bytes(raw[: int(len(raw) * 0.6)])
    assert "of 15 frames are in the file" in video_index(cut, "a.avi").missing


# ---- the published rate --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "fps", "expected"),
    [
        (24000 / 1001, 1, [0, 23, 46, 69, 92]),
        (30000 / 1001, 1, [0, 29, 58, 87]),
        (25, 1, [0, 25, 50, 75]),
        (2.5, 1, list(range(0, 100, 2))),
        (24000 / 1001, 0.5, [0, 46, 92]),
        (25, 10, [0, 2, 5, 7, *range(10, 100, 5), *range(12, 100, 5)]),
        (0.5, 0.1, list(range(0, 100, 5))),
        (59.94, 2, [0, 29, 59, 88]),
    ],
)
def test_a_second_counts_a_whole_number_of_frames_as_published(rate, fps, expected):
    assert frames_at_rate(100, rate, fps) == sorted(expected)


@pytest.mark.parametrize(("rate", "expected"), [(Fraction(24000, 1001), [0, 23, 46]), (Fraction(5, 2), [0, 2, 4, 6])])
def test_one_frame_a_second_of_a_file(tmp_path, rate, expected):
    path, count = tmp_path / "film.mp4", 2 * int(rate) + 3
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=rate)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(numbered_picture(i, 64, 64), format="rgb24")
            frame.pts, frame.time_base = i, 1 / rate
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    assert read_frames(path, num=32, fps=1).indices == expected


# ---- limits --------------------------------------------------------------------------------------------------------


def test_pictures_of_too_large_an_area_are_refused_before_they_are_decoded(tmp_path):
    path = numbered_video(tmp_path / "v.mp4", 3, width=320, height=240)
    line = "v.mp4: is 320 x 240 px, more than max_megapixels: 0.05 allows"
    for call in (lambda: probe(path, max_megapixels=0.05), lambda: read_frames(path, num=1, max_megapixels=0.05)):
        with pytest.raises(VideoError, match=line):
            call()
    assert probe(path, max_megapixels=0.0768).width == 320


STATED = r"is 320 x 240 px, more than max_megapixels: 0\.05 allows; .*"
FOUND = r".* 0\.05 megapixels \(max_megapixels\)"


@pytest.mark.parametrize(
    ("ending", "codec", "said"), [("avi", "mpeg4", FOUND), ("mkv", "libx264", STATED), ("h264", "libx264", STATED)]
)
def test_the_decoder_holds_the_limit_whatever_a_header_says(tmp_path, ending, codec, said):
    raw = numbered_video(tmp_path / f"v.{ending}", 3, width=320, height=240, codec=codec, options={}).read_bytes()
    if ending == "mkv":
        small, large = b"\xb0\x82\x00\x10\xba\x81\x10", b"\xb0\x82\x01\x40\xba\x81\xf0"  # PixelWidth, PixelHeight
        assert raw.count(large) == 1
        raw = raw.replace(large, small)
    for backend in ("pyav", "decord"):
        with pytest.raises(VideoError, match=f"^v: {said}$") as caught:
            read_frames(raw, num=1, max_megapixels=0.05, backend=backend, name="v")
        assert "\n" not in str(caught.value)


# ---- pictures that come when something changes ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> Path:
    """A slide from 0, 5, 21 and 59 s, each two or three pictures (0-2, 3-4, 5-6, 7-8)."""
    ticks = [0, 1, 2, 150, 151, 630, 631, 1770, 1771]
    return numbered_video(tmp_path_factory.mktemp("slides") / "slides.mp4", 9, fps=30, ticks=ticks)


@pytest.fixture(scope="module")
def burst(tmp_path_factory) -> Path:
    """Two seconds of 30 pictures a second (0-59), then one every two seconds, the last at 14 s (60-65)."""
    ticks = [*range(60), *range(120, 480, 60)]
    return numbered_video(tmp_path_factory.mktemp("burst") / "burst.mkv", 66, fps=30, ticks=ticks, width=64, height=64)


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        ([8, 20], [4]),
        ([15, 22], [4, 5, 6]),
        ([0.1, 5.01], [2, 3]),
        ([5.02, 5.03], [3]),
        ([25, 58], [6]),
        ([21, 60], [5, 6, 7, 8]),
        ([59.02, 59.04], [8]),
    ],
)
def test_the_picture_on_screen_when_a_clip_starts_is_of_the_clip(slides, clip, expected):
    assert read_frames(slides, num=9, between_s=clip).indices == expected
    assert select(slides, k=9, method="uniform", clip_s=clip).frame_index == expected
    for method in ("bitcost", "motion"):
        assert set(select(slides, k=2, method=method, clip_s=clip).candidate_index) == set(expected)


def test_a_clip_of_one_slide_a_picture_begins_with_the_one_on_screen():
    times_s = [0.0, 5.0, 21.0, 59.0]
    assert frames_between(times_s, [15, 22]) == [1, 2] and frames_between(times_s, [20.5, 22]) == [2]
    assert frames_between(times_s, [8, 20]) == [1] and frames_between(times_s, [60, 61]) == [3]


@pytest.mark.parametrize("rate", [24000 / 1001, 25, 30, 3, 1])
def test_a_clip_at_a_constant_rate_has_the_frames_that_begin_in_it(rate):
    times_s = (np.arange(200) / rate).round(3)
    for start in np.arange(0.0, 100 / rate, 0.37 / rate):
        end = start + 8 / rate
        assert frames_between(times_s, [start, end]) == [i for i, t in enumerate(times_s) if start <= t < end]


def test_gold_seconds_between_two_frames_are_the_frame_on_screen():
    times_s = [1.0, 5.0, 21.0, 59.0]
    assert [list(Span.from_seconds(a, a + 3, times_s)) for a in (12, 17, 0, 5, 70)] == [
        *([1, 2], [1, 2], [0, 1], [1, 2], [3, 4]),
    ]
    assert list(Span.from_seconds(0.1, 0.5, times_s)) == [0, 1]


def test_key_frames_of_a_clip_lie_in_it(tmp_path):
    path = numbered_video(tmp_path / "keys.mp4", 40, gop=10)
    found = read_frames(path, num=8, between_s=[0.6, 1.4], exact=False)  # frames 15 to 34
    assert found.indices == [20, 30]
    figures = VideoQADataset(
        [
            {
                "question_id": "q",
                "video_id": "v",
                "video": path.name,
                "question": "?",
                "answer": "a",
                "clip_s": [0.6, 1.4],
            }
        ],
        tmp_path,
        num_frames=8,
        frames="keyframe",
        bit_cost=True,
    )[0]
    assert figures["frame_times"].tolist() == pytest.approx([0.8, 1.2]) and len(figures["bit_cost"]) == 2


def test_of_a_variable_rate_frames_are_taken_by_time(burst, monkeypatch, caplog):
    monkeypatch.setattr("lavis_lstp.data.video.choosing._TOLD", set())
    duration_s = probe(burst).duration_s

    def shown(times_s) -> list[int]:
        return sorted(set(read_frames(burst, times_s=list(times_s)).indices))

    for num in (1, 3, 8, 40):
        moments = [duration_s * (i + 0.5) / num for i in range(num)]
        assert read_frames(burst, num=num).indices == shown(moments)
        assert select(burst, k=num, method="uniform").frame_index == shown(moments)
        assert select(burst, k=1, method="bitcost", num_candidates=num).candidate_index == shown(moments)
    assert sum(t < 2 for t in read_frames(burst, num=8).times_s) <= 2
    assert read_frames(burst, num=66).indices == list(range(66)), "all, where there are no more"
    assert read_frames(burst, num=16, fps=1).indices == shown(range(15)) == [0, 30, 59, *range(60, 66)]
    assert read_frames(burst, num=16, fps=2).indices == shown(np.arange(0, duration_s, 0.5))
    moments = [3 + 10 * (i + 0.5) / 4 for i in range(4)]
    assert read_frames(burst, num=4, between_s=[3, 13]).indices == shown(moments)
    assert read_frames(burst, num=16, fps=0.5, between_s=[3, 13]).indices == [59, 60, 61, 62, 63, 64]
    assert len(read_frames(burst, num=8, short_videos="double").indices) == 8
    assert sum("its rate varies" in line for line in caplog.messages) == 1


def test_a_clock_that_rounds_and_a_dropped_frame_are_no_variable_rate():
    for rate in (24000 / 1001, 30000 / 1001, 25, 50, 3):
        for count in (2, 3, 5, 12, 40, 300):
            for digits in (2, 3, 6):
                times_s = (np.arange(count + 1) / rate).round(digits)
                assert not rate_varies(times_s[:-1], times_s[-1])
                for dropped in range(1, count, 1 + count // 20):
                    assert not rate_varies(np.delete(times_s[:-1], dropped), times_s[-1])
    assert not rate_varies(np.zeros(1), 0.04)


@pytest.mark.parametrize(
    "times_s",
    [
        [0, 5, 21, 59],
        [0, 0.033, 0.066, 5, 5.033, 21, 21.033, 59, 59.033],
        [*np.arange(300) / 30, *range(10, 60, 10)],
        [*range(0, 50, 10), *(50 + np.arange(300) / 30)],
        [*np.arange(300) / 30],  # and the last one stays
        [*np.arange(600) / 30, *(20 + np.arange(300) / 15)],
    ],
)
def test_a_variable_rate_is_seen(times_s):
    assert rate_varies(np.asarray(times_s, dtype=float), 60.0)
