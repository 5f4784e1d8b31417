"""Bit costs equal the packets of the file in presentation order; motion energy is where something moves."""

from __future__ import annotations

import subprocess
import sys

import av
import numpy as np
import pytest
from video_files import moving_texture, numbered_picture, numbered_video, write_video

from lavis_lstp.data.video.codec_figures import motion_energy, packet_costs
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
