"""Bit costs equal the packets of the file in presentation order; motion energy is where something moves."""

from __future__ import annotations

import subprocess
import sys

import av
import numpy as np
import pytest
from video_files import moving_texture, numbered_picture, numbered_video, write_video

from lavis_lstp.data.video.codec_figures import motion_energy, of_candidates, packet_costs
from lavis_lstp.data.video.reading import read_frames
from lavis_lstp.errors import VideoError

OPTIONS = {"g": "12", "bf": "2", "sc_threshold": "0"}


def test_costs_are_the_packets_in_the_order_a_viewer_sees_them(tmp_path):
    path = numbered_video(tmp_path / "a.mp4", 30)
    costs = packet_costs(path)
    with av.open(str(path)) as container:
        packets = sorted((p.pts, p.size, p.is_keyframe) for p in container.demux(video=0) if p.size)
    assert costs.num_bytes.tolist() == [size for _, size, _ in packets]
    assert costs.is_key.nonzero()[0].tolist() == [0, 10, 20] == [i for i, p in enumerate(packets) if p[2]]
    assert costs.times_s.tolist() == read_frames(path, num=30).times_s.tolist()


@pytest.mark.parametrize("ending", ["avi", "h264", "ts", "mkv"])
def test_every_container_gives_a_cost_to_each_picture(tmp_path, ending):
    path = numbered_video(tmp_path / f"a.{ending}", 30)
    costs = packet_costs(path)
    assert len(costs.times_s) == len(costs.num_bytes) == len(costs.is_key) == 30
    assert (costs.num_bytes > 0).all() and costs.is_key.nonzero()[0].tolist() == [0, 10, 20]


def test_energy_is_where_something_moves(tmp_path):
    still = [numbered_picture(0, 192, 128)] * 30
    moving = list(moving_texture(30, (3, 1)))
    energy = motion_energy(write_video(tmp_path / "a.mp4", [*still, *moving, *still], options=OPTIONS))
    assert energy.shape == (90,) and energy.dtype == np.float32
    assert energy[:27].max() < 0.3 and energy[64:].max() < 0.3 and energy[32:58].min() > 1
    assert energy[28:32].max() > 10  # the cut; it may be shared with pictures that no other refers to


def film_with_an_event(path, start, stop, count=280, gop=10, **kw):
    """A still film in which a texture moves from picture `start` to `stop`."""
    moving = dict(zip(range(start, stop), moving_texture(stop - start, (3, 1), 96, 64), strict=True))
    still = numbered_picture(0, 96, 64)
    kw.setdefault("options", {"g": str(gop), "keyint_min": str(gop), "sc_threshold": "0", "bf": "2"})
    return write_video(path, [moving.get(i, still) for i in range(count)], **kw)


@pytest.mark.parametrize("where", [(0, 30), (122, 138), (250, 280)])
@pytest.mark.parametrize(("ending", "gop"), [("mp4", 10), ("ts", 10), ("mkv", 60)])
def test_energy_of_a_film_is_where_something_moves_seen_or_not(tmp_path, where, ending, gop):
    energy = motion_energy(film_with_an_event(tmp_path / f"a.{ending}", *where, gop=gop), places=4)
    assert energy.dtype == np.float32 and len(energy) == 280 and (energy >= 0).all()
    best = np.argsort(-of_candidates(energy, np.arange(4, 280, 8)))[:2] * 8 + 4  # parts of 8 pictures
    assert ((best >= where[0] - 4) & (best <= where[1] + 4)).all()


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"codec": "mjpeg", "pixel_format": "yuvj420p", "options": {}},
        {"options": {"g": "20", "x264opts": "open-gop=1"}},
        {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    ],
)
def test_energy_that_is_measured_is_that_of_a_whole_film(tmp_path, how):
    path = film_with_an_event(tmp_path / "a.mkv", 0, 280, **how)
    whole, some = motion_energy(path, places=None), motion_energy(path, places=4)
    assert 4 <= np.isclose(some, whole, rtol=1e-5).sum() < 100
    parts = [of_candidates(energy[20:], np.arange(10, 260, 20)) for energy in (whole, some)]
    assert np.abs(parts[1] / parts[0] - 1).mean() < 0.3  # everything moves alike


@pytest.mark.parametrize("places", [None, 4])
def test_energy_is_the_same_by_any_number_of_threads(tmp_path, places):
    path = film_with_an_event(tmp_path / "a.mp4", 100, 180)
    alone = motion_energy(path, places=places)
    for threads in (2, 3, 40):
        assert (motion_energy(path, places=places, threads=threads) == alone).all()
    with path.open("rb") as file:
        assert (motion_energy(file, places=places, threads=2) == alone).all()


@pytest.mark.parametrize(("ending", "gop"), [("mp4", 1000), ("avi", 10), ("h264", 10)])
def test_a_film_without_places_to_start_from_is_decoded_whole_and_tells(tmp_path, caplog, ending, gop):
    path = film_with_an_event(tmp_path / f"a.{ending}", 100, 120, gop=gop)
    energy = motion_energy(path, places=4)
    assert "of 4 places, so all" in caplog.text and str(path) in caplog.text
    assert (energy == motion_energy(path, places=None)).all()


def test_energy_of_one_picture_is_zero_and_repeats_itself(tmp_path):
    assert motion_energy(numbered_video(tmp_path / "one.mp4", 1)).tolist() == [0.0]
    path = numbered_video(tmp_path / "a.mp4", 30)
    assert (motion_energy(path) == motion_energy(path.read_bytes(), name="a")).all()
    assert len(motion_energy(numbered_video(tmp_path / "a.avi", 30))) == 30


def test_what_is_no_video_is_one_line(tmp_path):
    (tmp_path / "no.mp4").write_bytes(b"text")
    for figures in (packet_costs, motion_energy):
        with pytest.raises(VideoError, match="no.mp4"):
            figures(tmp_path / "no.mp4")
        with pytest.raises(VideoError, match="is a folder"):
            figures(tmp_path)


def test_figures_import_no_torch():
    script = "import lavis_lstp.data.video.codec_figures, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
