"""`stats` counts what is there; `preview` shows it."""

from __future__ import annotations

import json

from PIL import Image
from test_wds_flow import flow_of, moving, shards_of  # noqa: F401 (a fixture)
from test_wds_verify import media, packed  # noqa: F401 (a fixture)

from webdataset_tools.__main__ import main
from webdataset_tools.pack import Settings


def test_stats_count_what_is_there(media, tmp_path, capsys):  # noqa: F811
    shards = packed(media, tmp_path, max_count=3)
    assert main(["stats", *shards, "--workers", "1", "--json", "--html", str(tmp_path / "s.html")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["shards"], report["samples"], report["questions"]) == (2, 4, 4)
    assert report["kinds"] == {"image": 1, "video": 3} and report["members"] == {"json": 4, "mp4": 3, "png": 1}
    assert report["codecs"] == {"h264": 3} and report["answers"]["different"] == 4
    assert report["numbers"]["num_frames"] == {"5 %": 6.1, "95 %": 7.9, "least": 6, "median": 7, "most": 8, "sum": 21}
    assert report["numbers"]["fps"]["median"] == 25 and report["numbers"]["question_words"]["most"] == 1
    page = (tmp_path / "s.html").read_text()
    assert page.count("<img") == 9 and "4 samples, 4 questions" in page
    assert main(["stats", *shards, "--workers", "1"]) == 0
    assert "kinds: image 1, video 3" in capsys.readouterr().out


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
