"""`lavis_lstp.picture`: a PNG that is complete or absent, with the chosen frames outlined and motion in its colours."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from lavis_lstp import picture
from lavis_lstp.picture import CHOSEN, GOLD, PREDICTED, explanation_picture, flow_colours


def scene(count: int = 20, height: int = 36, width: int = 64) -> dict:
    """Arguments for a grey video in which frame t has grey level 60 + 5 t."""
    frames = np.empty((count, 3, height, width), np.uint8)
    frames[:] = (60 + 5 * np.arange(count))[:, None, None, None]
    return {
        "frames": frames,
        "flow": np.zeros((count, 2, 16, 16), np.float32),
        "frame_times": np.arange(count) / 2,
        "span": (-1, -1),
        "frame_index": [],
        "question": "which shape turns?",
        "prediction": "a star",
    }


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def count(path, colour: str) -> int:
    """Pixels of exactly that colour."""
    wanted = np.rint(np.array(to_rgb(colour)) * 255)
    return int((pixels(path) == wanted).all(axis=2).sum())


def test_everything_is_drawn(tmp_path):
    logits = np.linspace(-2, 2, 20)
    path = explanation_picture(
        tmp_path / "new folder" / "all.png",
        **scene() | {"span": (4, 9), "frame_index": [4, 5, 7, 8], "start_logits": logits, "end_logits": -logits},
        gold_span=(5, 9),
        answer="a star",
        title="a title",
    )
    height, width = pixels(path).shape[:2]
    assert width == 1300 and 500 < height < 1200
    assert count(path, PREDICTED) > 500 and count(path, GOLD) > 500
    assert [file.name for file in path.parent.iterdir()] == ["all.png"]


def test_the_outline_is_around_chosen_frames_and_nowhere_else(tmp_path):
    none = explanation_picture(tmp_path / "none.png", **scene())
    some = explanation_picture(tmp_path / "some.png", **scene() | {"frame_index": [7, -1, -1, -1]})
    assert count(none, CHOSEN) == 0
    shown = pixels(some)
    pink = (shown == np.rint(np.array(to_rgb(CHOSEN)) * 255)).all(axis=2)
    assert pink.sum() > 2000
    # The large picture at the bottom: within its outline lies frame 7, whose grey level is 95.
    rows = np.flatnonzero(pink.sum(axis=1) > 200)  # long horizontal lines
    columns = np.flatnonzero(pink[rows[-1]])
    middle = shown[(rows[0] + rows[-1]) // 2, (columns[0] + columns[-1]) // 2]
    assert middle.tolist() == [95, 95, 95]


def test_a_chosen_frame_is_in_the_strip_though_others_are_left_out(tmp_path):
    shown = picture._shown_frames(64, [9, 10, 40])
    assert len(shown) == 16 and shown[0][0] == 0 and shown[-1][1] == 64
    assert {9, 40} <= {index for _, _, index in shown}
    assert all(first <= index < end for first, end, index in shown)
    assert all(a[1] == b[0] for a, b in zip(shown, shown[1:], strict=False))


def test_one_frame_without_flow_and_odd_texts(tmp_path):
    one = scene(1) | {"flow": None, "frame_index": [0], "span": (0, 1), "start_logits": [0.3], "end_logits": [0.1]}
    path = explanation_picture(tmp_path / "one.png", **one | {"question": "what $costs {5 ?\n" * 90, "prediction": ""})
    assert count(path, CHOSEN) > 1000 and count(path, PREDICTED) > 500


def test_without_flow_the_picture_is_lower(tmp_path):
    with_flow = explanation_picture(tmp_path / "flow.png", **scene())
    without = explanation_picture(tmp_path / "no_flow.png", **scene() | {"flow": None})
    assert pixels(without).shape[0] < pixels(with_flow).shape[0] - 30


def test_flow_has_the_usual_colours_and_one_scale():
    flow = np.zeros((3, 2, 20, 20), np.float32)
    flow[0, 0] = 4.0  # right: red
    flow[1, 0] = -4.0  # left: cyan
    colours, largest = flow_colours(flow)
    assert largest == pytest.approx(4.0)
    assert colours.shape == (3, 3, 20, 20) and colours.dtype == np.uint8
    assert colours[0, :, 5, 5].tolist() == [255, 0, 0]
    assert colours[1, 0, 5, 5] < 30 and colours[1, 1:, 5, 5].min() > 200
    assert (colours[2] == 255).all()  # nothing moves: white


def test_noise_of_a_still_video_stays_pale():
    colours, largest = flow_colours(np.full((2, 2, 8, 8), 0.01, np.float32))
    assert largest == picture.MIN_FLOW_PX
    assert colours.min() > 240


def test_frames_and_times_must_agree(tmp_path):
    with pytest.raises(ValueError, match="20"):
        explanation_picture(tmp_path / "x.png", **scene() | {"frame_times": [0.0]})
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = tmp_path / "x.png"
    path.write_bytes(b"old")

    def full(self, name, **kw):
        with open(name, "wb") as handle:
            handle.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(FigureCanvasAgg, "print_png", full)
    with pytest.raises(OSError, match="disk full"):
        explanation_picture(path, **scene())
    assert path.read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == ["x.png"]
