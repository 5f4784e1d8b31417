"""The explanation picture shows what it is given: read back from the pixels of the PNG."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from lavis_lstp.report import explanation as picture
from lavis_lstp.report.explanation import explanation_picture, flow_colours

TEXT = {"question": "what colour is it?", "prediction": "red"}


def plain_frames(total: int, height: int = 24, width: int = 32) -> np.ndarray:
    """uint8 [T,3,H,W], frame t all (t, 100, 200)."""
    frames = np.zeros((total, 3, height, width), dtype=np.uint8)
    frames[:, 0] = np.arange(total)[:, None, None]
    frames[:, 1:] = np.array([100, 200])[None, :, None, None]
    return frames


def draw(path, total: int = 64, **changes) -> np.ndarray:
    """int [H,W,3] of the picture."""
    given = {
        "frames": plain_frames(total),
        "flow": None,
        "frame_times": np.arange(total) / 5,
        "span": None,
        "frame_index": [],
        **TEXT,
        **changes,
    }
    assert explanation_picture(path, **given) == path
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def where(pixels: np.ndarray, colour) -> np.ndarray:
    """bool [H,W]: pixels of exactly that colour."""
    rgb = ImageColor.getrgb(colour) if isinstance(colour, str) else colour
    return (pixels == np.array(rgb)).all(axis=-1)


def test_chosen_frames_are_shown_large_and_no_others(tmp_path):
    pixels = draw(tmp_path / "a.png", frame_index=[40, 9, 41, -1])
    area = {i: int(where(pixels, (i, 100, 200)).sum()) for i in range(64)}
    assert sorted(i for i in area if area[i] > 5000) == [9, 40, 41]
    left = [np.flatnonzero(where(pixels, (i, 100, 200)).sum(0) > 100).min() for i in (9, 40, 41)]
    assert left == sorted(left)  # in the order of time
    strip = [i for i in area if area[i]]
    assert len(strip) == 16 + 1  # one frame for each column of the strip; 40 and 41 share one
    assert where(pixels, picture.CHOSEN).sum() > 1000
    assert not where(draw(tmp_path / "b.png"), picture.CHOSEN).any()


def test_spans_cover_their_share_of_the_time_line(tmp_path):
    pixels = draw(tmp_path / "a.png", span=(16, 32), gold_span=torch.tensor([24, 64]), frame_index=[])
    wide = (picture.WIDTH_IN - picture.LEFT_IN - picture.RIGHT_IN) * picture.DPI
    begins = picture.LEFT_IN * picture.DPI
    for colour, start, end in ((picture.PREDICTED, 16, 32), (picture.GOLD, 24, 64)):
        bar = where(pixels, colour)
        columns = np.flatnonzero(bar[bar.sum(axis=1).argmax()])
        assert columns.min() - begins == pytest.approx(start / 64 * wide, abs=2)
        assert columns.max() + 1 - begins == pytest.approx(end / 64 * wide, abs=2)
    pixels = draw(tmp_path / "b.png", span=(-1, -1), gold_span=None)
    assert not where(pixels, picture.GOLD).any()


def test_probabilities_peak_at_their_frame(tmp_path):
    start, end = np.full(64, -np.inf), np.zeros(64)
    start[10], end[50] = 3.0, 20.0
    pixels = draw(tmp_path / "a.png", start_logits=start, end_logits=torch.tensor(end))
    wide = picture.WIDTH_IN - picture.LEFT_IN - picture.RIGHT_IN
    for colour, frame in ((picture.START, 10), (picture.END, 50)):
        rows, columns = np.nonzero(where(pixels, colour))
        legend = columns[rows < rows.min() + 12]  # the tip of the curve, above everything else in its colour
        expected = (picture.LEFT_IN + (frame + 0.5) / 64 * wide) * picture.DPI
        assert abs(legend.mean() - expected) < 8


def test_flow_has_the_colours_of_the_wheel():
    flow = np.zeros((4, 2, 8, 8), dtype=np.float16)
    flow[0, 0] = 3.0  # right
    flow[1, 0] = -3.0  # left
    flow[2, 1] = 1.5  # down, half as fast
    colours, largest = flow_colours(flow)
    assert colours.shape == (4, 3, 8, 8) and colours.dtype == np.uint8
    assert largest == pytest.approx(3.0)
    right, left, down, still = (colours[t, :, 4, 4].astype(int) for t in range(4))
    assert still.tolist() == [255, 255, 255]
    assert right[0] > 240 and right[1] < 30 and right[2] < 60  # red
    assert left[0] < 30 and left[1] > 200 and left[2] > 200  # cyan
    assert down.min() > 100  # pale: half of the largest motion
    noise, largest = flow_colours(np.full((1, 2, 4, 4), 1e-3))
    assert largest == picture.MIN_FLOW_PX and noise.min() > 250  # codec noise is not drawn as a storm


def test_flow_row_lies_under_its_frames(tmp_path):
    flow = np.zeros((16, 2, 8, 8), dtype=np.float32)
    flow[12:, 0] = 2.0
    pixels = draw(tmp_path / "a.png", total=16, flow=torch.from_numpy(flow), frame_index=[])
    right = flow_colours(flow)[0][12, :, 0, 0]
    rows, columns = np.nonzero(where(pixels, tuple(right)))
    columns = columns[columns > picture.LEFT_IN * picture.DPI]
    frame_rows, frame_columns = np.nonzero(where(pixels, (12, 100, 200)))
    assert abs(columns.min() - frame_columns.min()) <= 2 and rows.min() > frame_rows.max()
    # A square field is stretched over a frame that is not square.
    assert np.ptp(columns) + 1 == pytest.approx(4 * (np.ptp(frame_columns) + 1), rel=0.1)
    assert np.ptp(rows[columns.argsort()]) < 60


def test_right_and_wrong_answers_differ(tmp_path):
    right, wrong = (draw(tmp_path / "a.png", answer=a) for a in ("Red", "blue"))
    green, red = "#178a3a", "#c62828"
    assert where(right, green).any() and not where(right, red).any()
    assert where(wrong, red).any() and not where(wrong, green).any()


@pytest.mark.parametrize(
    "changes",
    [
        {"total": 1, "frame_index": [0, -1, -1], "span": (0, 1), "start_logits": [0.0], "end_logits": [0.0]},
        {"total": 2, "flow": np.zeros((2, 2, 5, 7)), "frame_index": [0, 1]},
        {"question": "is $x^2$ \\frac{ < 3? " * 40, "prediction": "", "answer": "$", "title": "t$ " * 100},
        {"total": 5, "frames": plain_frames(5, 300, 20), "frame_index": [1], "flow": np.ones((5, 2, 30, 2))},
        {"total": 40, "frame_index": list(range(32))},
    ],
    ids=["one frame", "no motion", "odd texts", "upright video", "many chosen"],
)
def test_odd_inputs_give_a_picture(tmp_path, changes):
    pixels = draw(tmp_path / "deep" / "a.png", **changes)
    assert pixels.shape[1] == round(picture.WIDTH_IN * picture.DPI) and 300 < pixels.shape[0] < 1500
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.png"]


def test_wrong_shapes_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"expected frames \[T,3,H,W\] and T times, got \(4, 3, 24, 32\) and 3"):
        draw(tmp_path / "a.png", total=4, frame_times=[0, 1, 2])
    with pytest.raises(ValueError, match="expected frames"):
        draw(tmp_path / "a.png", total=4, frames=np.zeros((4, 24, 32, 3), dtype=np.uint8))
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_the_old_picture(tmp_path, monkeypatch):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = tmp_path / "a.png"
    before = draw(path)

    def half(self, name):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(FigureCanvasAgg, "print_png", half)
    with pytest.raises(OSError, match="disk full"):
        draw(path, prediction="blue")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert np.array_equal(np.asarray(Image.open(path).convert("RGB")), before)
