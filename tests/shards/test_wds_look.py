"""`stats` counts what is there; `preview` shows it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image, ImageColor
from test_wds_flow import flow_of, moving, shards_of  # noqa: F401 (a fixture)
from test_wds_rewrite import parallel
from test_wds_verify import media, packed  # noqa: F401 (a fixture)

from lavis_lstp.data.shards.format import SAMPLE_FORMAT, dump_json, media_key
from lavis_lstp.data.shards.tar import ShardWriter
from lavis_lstp.report.explanation import PREDICTED
from webdataset_tools.__main__ import main
from webdataset_tools.pack import Settings
from webdataset_tools.preview import LINE, MARGIN
from webdataset_tools.stats import say


def test_stats_count_what_is_there(media, tmp_path, capsys):  # noqa: F811
    shards = packed(media, tmp_path, max_count=3)
    assert main(["stats", *shards, "--workers", "1", "--json", "--html", str(tmp_path / "s.html")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["shards"], report["samples"], report["questions"]) == (2, 4, 4)
    assert report["kinds"] == {"image": 1, "video": 3} and report["members"] == {"json": 4, "mp4": 3, "png": 1}
    assert report["codecs"] == {"h264": 3} and report["answers"]["different"] == 4
    assert report["numbers"]["num_frames"] == {"5 %": 6.1, "95 %": 7.9, "least": 6, "median": 7, "most": 8, "sum": 21}
    assert report["numbers"]["fps"]["median"] == 25 and report["numbers"]["question_words"]["most"] == 1
    assert "sum" not in report["numbers"]["fps"]
    page = (tmp_path / "s.html").read_text()
    assert (
        page.count("<img") == 8
        and page.count('<tr><th scope="row" dir="auto">') == 4
        and "4 samples, 4 questions" in page
    )
    assert main(["stats", *shards, "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "kinds: image 1, video 3" in said and "frames of a video: least 6, 5 % 6.1, median 7" in said
    numbers = (7.0, 1234.5, 1096207.0, 23.976, 0.20031)
    assert [say(value) for value in numbers] == ["7", "1,234", "1,096,207", "23.98", "0.2003"]


def test_a_contact_sheet(moving, media, tmp_path, capsys):  # noqa: F811
    shards = shards_of(moving, tmp_path / "s", max_count=2)
    flow = flow_of(shards, tmp_path / "f")
    command = ["preview", *shards, "--frames", "4", "--size", "32", "--out"]
    assert main([*command, str(tmp_path / "a.html"), "--flow", *flow]) == 0
    page = (tmp_path / "a.html").read_text()
    assert page.count("<img") == 3 and "A: that" in page and "m1.mp4" in page
    assert main([*command, str(tmp_path / "a.png")]) == main([*command, str(tmp_path / "b.png"), "--flow", *flow]) == 0
    with Image.open(tmp_path / "a.png") as plain, Image.open(tmp_path / "b.png") as coloured:
        assert coloured.height - plain.height == 2 * 32  # a row of flow for each video
        assert len(coloured.getcolors(1 << 20)) > len(plain.getcolors(1 << 20))
    stored = packed(media, tmp_path / "m", settings=Settings(frames=5, size=32))
    assert main(["preview", *stored, "--out", str(tmp_path / "c.png"), "--count", "2"]) == 0
    assert main(["preview", *stored, "--out", str(tmp_path / "c.txt")]) == 2
    assert "ends with .html or .png" in capsys.readouterr().err


@pytest.mark.parametrize(("moving_field", "column"), [(0, None), (1, 0), (2, None), (3, 1)])
def test_a_sheet_shows_spans_and_the_flow_of_the_frames_above_it(media, tmp_path, moving_field, column):  # noqa: F811
    shards = packed(media, tmp_path / "s")
    field = np.zeros((4, 2, 4, 4))
    field[moving_field, 0] = 3.0
    flow = parallel(shards, tmp_path / "f", lambda n: field)
    spans = {"format": "lavis_lstp.spans", "version": 1, "num_frames": 4, "spans": {"q1": {"span": [2, 4]}}}
    (tmp_path / "spans.json").write_text(json.dumps(spans))
    words = ["spans", *shards, "--spans", str(tmp_path / "spans.json"), "--out", str(tmp_path / "p/x")]
    assert main([*words, "--workers", "1"]) == 0
    words = ["--flow", *flow, "--spans", *sorted(map(str, (tmp_path / "p").glob("*.tar")))]
    words += ["--count", "1", "--frames", "2", "--size", "32", "--out", str(tmp_path / "a.png")]
    assert main(["preview", *shards, *words]) == 0
    with Image.open(tmp_path / "a.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))[:, MARGIN:]
    blue = np.flatnonzero((pixels == ImageColor.getrgb(PREDICTED)).all(axis=2).any(axis=0))
    assert abs(blue.min() - 32) <= 1 and blue.max() == 63  # the second half of two frames
    top = 3 * LINE + 8 + 32  # below three lines of text and the frames
    coloured = [np.ptp(pixels[top : top + 32, 32 * n : 32 * n + 32], axis=2).max() > 100 for n in range(2)]
    assert coloured == [n == column for n in range(2)]


def test_answers_of_any_script_are_text_in_the_page(tmp_path, recwarn):
    """matplotlib draws boxes for letters that its font has not, and warns; a browser chooses a font itself."""
    answers = ("红色的球", "赤いボール", "كرة", "<b>$x$</b>", "")
    rows = [{"question_id": f"q{n}", "question": "何色?", "answer": answer} for n, answer in enumerate(answers)]
    write_text_shard(tmp_path / "x-000000.tar", rows)
    assert main(["stats", str(tmp_path / "x-000000.tar"), "--workers", "1", "--html", str(tmp_path / "x.html")]) == 0
    page = (tmp_path / "x.html").read_text(encoding="utf-8")
    for answer in answers[:3]:
        assert f">{answer}</th>" in page
    assert "&lt;b&gt;$x$&lt;/b&gt;" in page and "(empty)" in page
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def write_text_shard(path, rows) -> None:
    with ShardWriter(path) as shard:
        for row in rows:
            value = {"format": SAMPLE_FORMAT, "version": 1, "kind": "text", "video_id": "", "questions": [row]}
            shard.add(media_key("text", row["question_id"]), {"json": dump_json(value)})
