"""The header of an MP4 says what opening it does, or nothing; media are read ahead in their order."""

from __future__ import annotations

import struct
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from video_files import audio_file, numbered_picture, numbered_video

from lavis_lstp.data.shards.tar import header
from lavis_lstp.data.video.reading import probe
from lavis_lstp.errors import VideoError
from webdataset_tools import media
from webdataset_tools.media import Settings, load, read_ahead
from webdataset_tools.mp4_header import mp4_info
from webdataset_tools.sources import Unit

PLAIN = {
    "b-frames": {},
    "no b-frames": {"options": {"bf": "0", "crf": "30"}},
    "header first": {"container_options": {"movflags": "faststart"}},
    "variable rate": {"ticks": [0, 1, 2, 5, 6, 7, 11, 12, 20, 21, 22, 23]},
    "film rate": {"fps": 24},
    "hevc": {"codec": "libx265", "options": {"log-level": "none"}},
}
UNCLEAR = {
    "fragments": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "turned": {"rotation": 90},
    "mirrored": {"hflip": True, "rotation": 0},
    "shifted": {"shift": 7},  # two edits
    "pixels not square": {"options": {"aspect": "4:3"}},
    "mpeg4": {"codec": "mpeg4", "options": {}},
}


@pytest.mark.parametrize("ending", ["mp4", "mov"])
@pytest.mark.parametrize("name", PLAIN)
def test_the_header_says_what_opening_says(tmp_path, name, ending):
    path = numbered_video(tmp_path / f"v.{ending}", 12, **PLAIN[name])
    assert mp4_info(path.read_bytes()) == probe(path)


@pytest.mark.parametrize("name", UNCLEAR)
def test_what_the_header_leaves_open_is_left_to_opening(tmp_path, name):
    path = numbered_video(tmp_path / "v.mp4", 12, **UNCLEAR[name])
    assert mp4_info(path.read_bytes()) is None
    assert probe(path).num_frames == 12


@pytest.mark.parametrize("ending", ["avi", "mkv", "webm"])
def test_other_containers_are_opened(tmp_path, ending):
    codec = {"codec": "libvpx", "options": {}} if ending == "webm" else {}
    assert mp4_info(numbered_video(tmp_path / f"v.{ending}", 5, **codec).read_bytes()) is None


def test_a_sound_track_beside_the_video(tmp_path):
    with av.open(str(tmp_path / "both.mp4"), "w") as out:
        sound, stream = out.add_stream("aac", rate=16000, layout="mono"), out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        for number in range(12):
            wave = av.AudioFrame.from_ndarray(np.zeros((1, 640), np.float32), format="fltp", layout="mono")
            wave.sample_rate, wave.pts = 16000, number * 640
            out.mux(sound.encode(wave))
            out.mux(stream.encode(av.VideoFrame.from_ndarray(numbered_picture(number), format="rgb24")))
        out.mux(sound.encode(None))
        out.mux(stream.encode(None))
    found = mp4_info((tmp_path / "both.mp4").read_bytes())
    assert found == probe(tmp_path / "both.mp4") and found.num_frames == 12
    assert mp4_info(audio_file(tmp_path / "a.mp4").read_bytes()) is None


def edited(raw: bytes, kind: bytes, at: int, form: str, *values) -> bytes:
    """The file with other numbers `at` bytes into the content of its only box of a kind."""
    assert raw.count(kind) == 1
    changed = bytearray(raw)
    struct.pack_into(form, changed, raw.index(kind) + 4 + at, *values)
    return bytes(changed)


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> Path:
    """With its header in front, so that a cut loses samples."""
    path = tmp_path_factory.mktemp("film") / "v.mp4"
    return numbered_video(path, 12, **PLAIN["header first"])


@pytest.mark.parametrize(
    ("kind", "at", "form", "values"),
    [
        (b"elst", 8, ">Ii", (10**6, 3000)),  # the edit begins behind the first frame
        (b"elst", 8, ">I", (100,)),  # and ends before the last
        (b"elst", 12, ">i", (-1,)),
        (b"elst", 16, ">I", (1 << 15,)),  # half the speed
        (b"stsd", 4, ">I", (2,)),
        (b"stsz", 8, ">I", (1 << 30,)),
        (b"stsz", 4, ">II", (1, 1 << 31)),
        (b"mvhd", 12, ">I", (0,)),
        (b"stsz", 8, ">I", (0,)),
        (b"stts", 8, ">I", (11,)),
        (b"stts", 12, ">I", (0,)),
        (b"stco", 4, ">I", (1 << 31,)),
        (b"mdhd", 12, ">I", (0,)),
    ],
)
def test_a_header_that_cuts_frames_or_contradicts_itself(film, kind, at, form, values):
    raw = film.read_bytes()
    assert mp4_info(raw) == probe(film)
    assert mp4_info(edited(raw, kind, at, form, *values)) is None


@settings(max_examples=200)
@given(st.data())
def test_cut_and_damaged_files_are_never_an_accident(film, data):
    raw = film.read_bytes()
    cut = data.draw(st.integers(0, len(raw) - 1))
    assert mp4_info(raw[:cut]) is None
    at, value = data.draw(st.integers(0, 1500)), data.draw(st.integers(0, 255))
    mp4_info(raw[:at] + bytes([value]) + raw[at + 1 :])  # says something or nothing


# ---------------------------------------------------------------- reading ahead


def unit(name: str, kind: str = "video") -> Unit:
    return Unit(name, kind, name, "" if kind == "text" else name, ({"question_id": name},))


def test_media_come_in_their_order_and_failures_in_their_place(film, tmp_path, monkeypatch):
    names = [f"{number}.mp4" for number in range(40)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(b"no film" if number % 7 == 3 else film.read_bytes())
    units = [unit(name) for name in names] + [unit("t", "text")]
    monkeypatch.setattr(media, "GROUP", 3)
    found = list(read_ahead(units, [1] * 41, tmp_path, Settings()))
    assert [one.key for one, _ in found] == [*names, "t"] and found[-1][1] is None
    assert [isinstance(medium, VideoError) for _, medium in found[:-1]] == [n % 7 == 3 for n in range(40)]
    assert found[0][1] == load(units[0], tmp_path, Settings()) and found[0][1].content == film.read_bytes()


def test_a_great_file_is_not_held_in_memory(film, tmp_path, monkeypatch):
    small = load(unit(film.name), film.parent, Settings())
    monkeypatch.setattr(media, "WHOLE", 100)
    great = load(unit(film.name), film.parent, Settings())
    assert great.content == film and great.sha256 is None and great.facts == small.facts
    frames = [load(unit(film.name), film.parent, Settings(frames=2, size=16)) for _ in range(2)]
    assert frames[0] == frames[1] and frames[0].sha256 == small.sha256


# ---------------------------------------------------------------- headers


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=120), st.integers(0, 8**11))
def test_headers_are_those_of_tarfile(name, size):
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, 0, 0o444
    assert header(name, size) == info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")
