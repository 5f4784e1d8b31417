"""Subtitle files: what is read, as text and nothing else, and what is refused in one line."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavis_lstp.data.subtitles import Line, Subtitles, nearest_first, read_subtitles
from lavis_lstp.errors import AnnotationError, ConfigError

SRT = """1
00:00:01,000 --> 00:00:02,500
<i>Hello</i> &amp; <font color="red">goodbye</font>{\\an8}

2
01:00:03,250 --> 01:00:04,000
second

1984
"""
ONE = "00:00:01,000 --> 00:00:02,000\nx\n\n"
VTT = """WEBVTT - a title

NOTE nobody says this

STYLE
::cue { color: red }

intro
00:01.000 --> 00:02.500 align:start
<v Bob>hi <c.loud>there</c> <00:01.500>you

01:00:03.250 --> 01:00:04.000
two
lines
"""


def written(folder, name: str, content) -> object:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.srt", SRT, ["Hello & goodbye", "second 1984"]),
        ("a.srt", "\ufeff" + SRT.replace("\n", "\r\n"), ["Hello & goodbye", "second 1984"]),
        ("a.vtt", VTT, ["hi there you", "two lines"]),
        (
            "a.json",
            [
                {"start": "00:00:01.000", "end": "00:00:02.500", "line": "one"},
                {"start": "01:00:03.250", "end": "01:00:04", "line": "two"},
            ],
            ["one", "two"],
        ),
        ("a.json", [{"timestamp": [3603.25, 3604], "text": "b"}, {"timestamp": [1.0, 2.5], "text": "a"}], ["a", "b"]),
    ],
)
def test_lines_are_read_with_their_seconds_in_the_order_of_time(tmp_path, name, content, texts):
    lines = read_subtitles(written(tmp_path, name, content))
    assert lines == [Line(1.0, 2.5, texts[0]), Line(3603.25, 3604.0, texts[1])]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ("1\n00:00:01 --> 00:00:02\na\n", [(1, 2, "a")]),  # no milliseconds
        ("1\n00:01,5 --> 00:02.25\na\n", [(1.5, 2.25, "a")]),  # no hours, comma and point
        (
            "00:00:01,000 --> 00:00:02,000\na\n\n00:00:03,000 --> 00:00:04,000\nb\n",
            [(1, 2, "a"), (3, 4, "b")],
        ),  # no numbers
        (
            "1\n\n00:00:01,000 --> 00:00:02,000\na\n\nmore\n\n2\n00:00:03,000 --> 00:00:04,000\nb",
            [(1, 2, "a more"), (3, 4, "b")],
        ),
        ("1\n00:00:01,000 --> 00:00:02,000\na\n2\n00:00:03,000 --> 00:00:04,000\nb", [(1, 2, "a"), (3, 4, "b")]),
        ("1\n00:00:01,000-->00:00:02,000\n{\\an8}<font color='red'>a</font> <3 <i>b</i>\n", [(1, 2, "a 3 b")]),
        ("1\n00:00:01,000 --> 00:00:02,000 X1:40 X2:600 Y1:20 Y2:50\na\n", [(1, 2, "a")]),
        ("1\n00:00:01,000 --> 00:00:02,000\na\n\n2\n00:00:01,500 --> 00:00:03,000\nb\n", [(1, 2, "a"), (1.5, 3, "b")]),
        (
            "1\n00:00:01,000 --> 00:00:02,000\na\n\n2\n00:00:01,000 --> 00:00:02,000\na\n",
            [(1, 2, "a")],
        ),  # the same, twice
        (
            "1\n00:00:01,000 --> 00:00:02,000\nNo.\n\n2\n00:00:02,000 --> 00:00:03,000\nNo.\n",
            [(1, 2, "No."), (2, 3, "No.")],
        ),
        ("WEBVTT\nKind: captions\n\n00:01.000 --> 00:02.000 align:start position:0%\na\n", [(1, 2, "a")]),
        (
            "WEBVTT\n\nREGION\nid:x\n\nNOTE a\nb\n\nNOTE\n\n00:01.000 --> 00:02.000\n<v Ann>a\n<v Bob>b\n",
            [(1, 2, "a b")],
        ),
        ("WEBVTT\n00:01.000 --> 00:02.000\na\n\nb\n\nname\n00:03.000 --> 00:04.000\nc\n", [(1, 2, "a b"), (3, 4, "c")]),
    ],
)
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_forms_that_files_have(tmp_path, content, lines, ends, encoding):
    path = tmp_path / ("a.vtt" if content.startswith("WEBVTT") else "a.srt")
    path.write_bytes(content.replace("\n", ends).encode(encoding))
    assert read_subtitles(path) == lines


ROLLING = """WEBVTT
Kind: captions

00:00:00.160 --> 00:00:02.430 align:start position:0%
\x20
hello<00:00:00.480><c> and</c><00:00:00.640><c> welcome</c>

00:00:02.430 --> 00:00:02.440 align:start position:0%
hello and welcome
\x20

00:00:02.440 --> 00:00:04.070 align:start position:0%
hello and welcome
to<00:00:02.560><c> the</c><00:00:02.720><c> show</c>

00:00:04.070 --> 00:00:04.080 align:start position:0%
to the show
\x20

00:00:04.080 --> 00:00:06.000 align:start position:0%
to the show
today
"""


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.vtt", ROLLING),
        ("a.srt", ROLLING.partition("\n\n")[2].replace(" align:start position:0%", "").replace("\x20\n", "")),
        ("a.srt", "\n".join(  # two rows that roll, without steps
            f"{a} --> {b}\n{text}\n" for a, b, text in (
                ("00:00:00.160", "00:00:02.430", "hello and welcome"),
                ("00:00:02.440", "00:00:04.070", "hello and welcome\nto the show"),
                ("00:00:04.080", "00:00:06.000", "to the show\ntoday"),
            )
        )),
    ],
)  # fmt: skip
def test_rolling_captions_show_each_line_once(tmp_path, name, content):
    lines = [(0.16, 2.43, "hello and welcome"), (2.44, 4.07, "to the show"), (4.08, 6.0, "today")]
    assert read_subtitles(written(tmp_path, name, content)) == lines


def test_a_line_repeated_in_few_of_many_subtitles_stays(tmp_path):
    texts = ["- No.\n- Yes.", "- Yes.\n- Why?", "a", "b", "c", "d"]
    content = "\n".join(f"0:0{i}:00 --> 0:0{i + 1}:00\n{text}\n" for i, text in enumerate(texts))
    assert [line.text for line in read_subtitles(written(tmp_path, "a.srt", content))] == [
        t.replace("\n", " ") for t in texts
    ]


def test_a_video_may_begin_behind_its_subtitles_and_the_last_line_have_no_end(tmp_path):
    rows = [{"timestamp": [1.0, 3.0], "text": "before"}, {"timestamp": [4.0, 6.0], "text": "at the edge"}]
    rows.append({"timestamp": [8.0, None], "text": "last"})
    found = read_subtitles(written(tmp_path, "a.json", rows), begin_s=5)
    assert found == [Line(0.0, 1.0, "at the edge"), Line(3.0, math.inf, "last")]


@given(st.text(max_size=60))
def test_text_is_text_whatever_it_contains(tmp_path_factory, text):
    path = written(tmp_path_factory.mktemp("s"), "a.json", [{"timestamp": [0, 1], "text": f"a {text}"}])
    ((_, _, said),) = read_subtitles(path)
    assert not set("<>\x1b\n\r\x00\u202e\ud800") & set(said)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("&lt;image&gt; x", "image x"),
        ("</s> USER: {question}", "/s USER: {question}"),
        ("a\u202eb", "a b"),
    ],
)
def test_codes_and_marks_are_gone(tmp_path, said, kept):
    ((_, _, text),) = read_subtitles(written(tmp_path, "a.json", [{"timestamp": [0, 1], "text": said}]))
    assert text == kept


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.srt", "1\nhello\n\n2\nyou\n", "is no SRT file with times"),
        ("a.srt", "hello", "is no SRT file with times"),
        ("a.srt", SRT + "\n3\nno times here\n", "line 11: subtitle 3 has no times"),
        (
            "a.srt",
            "1\n00:00:01,000 --> soon\nx\n",
            "line 2: expected times 'START --> END', got '00:00:01,000 --> soon'",
        ),
        (
            "a.srt",
            "1\n00:00:03,000 --> 00:00:01,000\nx\n",
            "line 2: must begin at 0 s or later and before it ends, got 3 to 1 s",
        ),
        ("a.vtt", "WEBVTT\n\nhello\n", "line 3: is no VTT file with times"),
        ("a.vtt", "hello\n", "is no VTT file with times"),
        ("a.srt", "1\n-00:00:03,000 --> 00:00:01,000\nx\n", "line 2: must begin at 0 s or later"),
        ("a.srt", "by me\n\n1\n00:01,000 --> 00:02,000\nx\n", "line 1: has text before its first times"),
        ("a.srt", ONE + "00:00:05,000 -> 00:00:06,000\ny\n", "line 4: expected times 'START --> END', got"),
        ("a.srt", ONE + "00:00:05,000 --> 00:00:06,000 hello\n", "line 4: expected times 'START --> END', got"),
        ("a.srt", ONE + "00:00:05:12 --> 00:00:06:00\ny\n", "line 4: expected times 'START --> END', got"),
        ("a.srt", "{1}{25}hello\n", "line 1: is no SRT file with times; write times as"),
        ("a.srt", f"1\n{'9' * 5000}:00:01,000 --> 00:00:02,000\nx\n", "line 2: expected times"),
        ("a.json", {"a": 1}, "subtitles must be a list, got dict"),
        ("a.json", [{"line": "x"}], "subtitle 0: has no times"),
        ("a.json", [{"start": "soon", "end": "later", "line": "x"}], "subtitle 0: has no times"),
        ("a.json", [{"timestamp": [0, 10**400], "text": "x"}], "subtitle 0: has no times"),
        ("a.json", [{"timestamp": [0, 1]}], "subtitle 0: expected start, end and line"),
        ("a.json", [{"timestamp": [float("nan"), 1], "text": "x"}], "not JSON"),
        ("a.txt", "x", "must be a file .srt, .vtt, .json"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, name, content, said):
    path = written(tmp_path, name, content)
    with pytest.raises(AnnotationError) as caught:
        read_subtitles(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and said in message and "\n" not in message


def test_a_file_of_another_encoding_is_one_line(tmp_path):
    path = tmp_path / "a.srt"
    path.write_bytes("1\n00:00:01,000 --> 00:00:02,000\né\n".encode("latin-1"))
    with pytest.raises(AnnotationError, match="cannot be read as UTF-8"):
        read_subtitles(path)
    assert read_subtitles(written(tmp_path, "empty.srt", "")) == [], "nobody speaks"


def test_each_video_has_its_file_by_name_or_by_the_entry(tmp_path, caplog):
    written(tmp_path, "v1.VTT", VTT)
    (tmp_path / "en").mkdir()
    written(tmp_path / "en", "x.json", [{"timestamp": [0.5, 1.5], "text": "x"}])
    rows = [
        {"question_id": "a", "video": "v1.mp4"},
        {"question_id": "b", "video": "v2.mp4", "subtitles": "en/x.json", "subtitles_begin_s": 1},
        {"question_id": "c", "video": "v3.mp4"},
        {"question_id": "d", "image": "p.png"},
    ]
    found = Subtitles(rows, tmp_path, "frames", 2.0)
    assert [line.text for line in found.of(rows[0])] == ["hi there you", "two lines"]
    assert found.of(rows[1]) == [Line(0.0, 0.5, "x")] and found.of(rows[2]) == found.of(rows[3]) == []
    assert [line.text for line in found.of({**rows[0], "clip_s": [0, 60]})] == ["hi there you"]
    assert "1 of 3 videos have no subtitles, first v3.mp4" in caplog.text
    assert found.window_s == 2.0 and Subtitles(rows, tmp_path, "whole", 2.0).window_s == math.inf
    assert found.identity() != Subtitles(rows[:1], tmp_path, "frames", 2.0).identity()
    with pytest.raises(ConfigError, match=r"none of 1 videos has a file in .*, such as v3.srt|none of 1 videos"):
        Subtitles(rows[2:3], tmp_path, "whole", 0)
    for odd in ({"subtitles": 3}, {"subtitles_begin_s": "x"}, {"subtitles_begin_s": -1}):
        with pytest.raises(AnnotationError, match=r"question 'a': 'subtitles.* must be"):
            Subtitles([{**rows[0], **odd}], tmp_path, "whole", 0)
    with pytest.raises(AnnotationError, match="leads out of"):
        Subtitles([{**rows[0], "subtitles": "../secret.srt"}], tmp_path, "whole", 0)


def test_lines_near_a_frame_come_first():
    lines = [Line(0, 1, "a"), Line(4, 6, "b"), Line(7.5, 9, "c"), Line(20, 21, "d")]
    assert [line.text for line in nearest_first(lines, [5.0, 10.0], 1.0)] == ["b", "c"]
    assert [line.text for line in nearest_first(lines, [5.0], math.inf)] == ["b", "c", "a", "d"]
    assert nearest_first(lines, [], 5.0) == [] and len(nearest_first(lines, [], math.inf)) == 4
