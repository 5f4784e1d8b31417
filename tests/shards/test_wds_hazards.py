"""A sound sample, then something that no shard should hold: verbs and loader name it, and repair keeps the sample."""

from __future__ import annotations

import gzip
import json
import os
import tarfile
import time
import tracemalloc
from pathlib import Path

import pytest
from test_wds_format import bad_name, linked, raw_tar, sample
from test_wds_rewrite import contents, quarantined
from test_wds_verify import media, packed  # noqa: F401 (a fixture)

from lavis_lstp.data.shards import index, sets, storage
from lavis_lstp.data.shards.format import dump_json
from lavis_lstp.data.shards.questions import ShardQuestions
from lavis_lstp.data.shards.tar import BLOCK, END, Member, header
from lavis_lstp.errors import ShardError
from webdataset_tools.__main__ import main

KEY = "v0%2Emp4"
GREAT = 100 << 20

HAZARDS = {
    "truncated": lambda good: good + header("b.json", 700) + b"{",
    "empty": lambda good: b"",
    "magic": lambda good: gzip.compress(good + END),
    "header": lambda good: good + b"\xff" * BLOCK + END,
    "duplicate member": lambda good: good + raw_tar((f"{KEY}.json", b"{}")),
    "json too large": lambda good: good + header("b.json", GREAT),
    "unsafe name": lambda good: good + bad_name(),  # not UTF-8
    "link": lambda good: good + linked(tarfile.SYMTYPE),  # to ../../etc/passwd
}
NOTHING_SOUND = ("empty", "magic")


@pytest.fixture(params=HAZARDS)
def hazard(request, media, tmp_path) -> tuple[str, Path]:  # noqa: F811
    """The cause that is to be named, and a shard without an index."""
    first = packed(media, tmp_path / "good", max_count=1)[0]
    path = tmp_path / "x-000000.tar"
    path.write_bytes(HAZARDS[request.param](Path(first).read_bytes()[: -len(END)]))
    if request.param == "json too large":
        os.truncate(path, path.stat().st_size + GREAT + len(END))  # zeros that take no room
    return request.param, path


def test_verify_counts_it_and_repair_keeps_the_rest(hazard, tmp_path, capsys):
    cause, path = hazard
    assert main(["verify", str(path), "--json", "--workers", "1"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["causes"] == {cause: 1, "no index": 1, "no manifest": 1}
    assert found["samples"] == (cause not in (*NOTHING_SOUND, "duplicate member"))
    mended = main(["repair", str(path), "--out", str(tmp_path / "new/x"), "--workers", "1"])
    if not found["samples"]:
        assert mended == 2 and "nothing of this set is sound" in capsys.readouterr().err
        return
    assert mended == 0 and set(contents([tmp_path / "new/x-000000.tar"])) == {KEY}
    assert [named for _, named in quarantined(tmp_path / "new/x")] == [cause]
    assert main(["verify", str(tmp_path / "new/x-000000.tar"), "--workers", "1"]) == 0


def test_the_other_verbs_say_it_in_one_line_and_leave_nothing(hazard, tmp_path, capsys):
    cause, path = hazard
    out = str(tmp_path / "out/x")
    flow = ["flow", "--num-frames", "2", "--size", "32", "--out"]
    for words in (["extract", "--out"], ["reshard", "--out"], flow, ["stats", "--html"], ["preview", "--out"]):
        page = ".html" if words[0] in ("stats", "preview") else ""
        assert main([words[0], str(path), *words[1:], out + page]) == 2, words
        said = capsys.readouterr().err.strip()
        assert said.startswith("error: ") and "x-000000.tar" in said and "\n" not in said
        assert not [left for left in (tmp_path / "out").rglob("*") if left.is_file()]


def test_a_run_says_it_before_it_starts(hazard):
    cause, path = hazard
    with pytest.raises(ShardError, match="x-000000.tar") as caught:
        list(ShardQuestions([str(path)]))
    assert caught.value.cause == cause


def test_a_json_of_100_mb_behind_an_index_is_not_read(tmp_path):
    path = tmp_path / "x-000000.tar"
    with open(path, "wb") as file:
        file.write(header("v0%2Emp4.json", GREAT))
        file.truncate(BLOCK + GREAT)
    value = sample(0)
    one = index.sample_of(KEY, {"json": Member(f"{KEY}.json", BLOCK, GREAT, bytes(32))}, value)
    index.write(index.build([one], path.stat().st_size), path)
    tracemalloc.start()
    try:
        with pytest.raises(ShardError) as caught:
            sets.ShardSet([str(path)]).read_json(0, 0)
        assert caught.value.cause == "json too large"
        assert tracemalloc.get_traced_memory()[1] < GREAT / 10
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("moment", [0, -5, 1 << 40])
def test_the_clock_and_the_dates_of_files_change_nothing(media, tmp_path, monkeypatch, moment):  # noqa: F811
    """A machine that woke up in 1970, or in the year 36812."""
    before = {path.name: path.read_bytes() for path in map(Path, packed(media, tmp_path / "now"))}
    (tmp_path / "media").mkdir()
    for path in media.iterdir():
        (tmp_path / "media" / path.name).write_bytes(path.read_bytes())
        os.utime(tmp_path / "media" / path.name, (max(moment, 0), min(moment, 1 << 33)))
    monkeypatch.setattr(time, "time", lambda: float(moment))
    after = {path.name: path.read_bytes() for path in map(Path, packed(tmp_path / "media", tmp_path / "then"))}
    assert after == before
    assert not {member.mtime for name in before for member in tarfile.open(tmp_path / "then" / name)} - {0}


def test_a_file_whose_name_is_not_unicode_is_refused(media, tmp_path):  # noqa: F811
    name = os.fsdecode(b"v\xff.mp4")
    (tmp_path / name).write_bytes((media / "v0.mp4").read_bytes())
    row = {"question_id": "q", "video": name, "question": "?", "answer": "!"}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    with pytest.raises(ShardError, match="is not Unicode text; rename the file") as caught:
        packed(tmp_path, tmp_path / "s")
    assert caught.value.cause == "unsafe name"


def test_a_sample_of_another_version_is_refused(tmp_path, capsys):
    raw = raw_tar((f"{KEY}.mp4", b"film"), (f"{KEY}.json", dump_json(sample(0, version=2))))
    (tmp_path / "x-000000.tar").write_bytes(raw)
    assert main(["verify", str(tmp_path / "x-000000.tar"), "--workers", "1"]) == 1
    assert "version 2" in capsys.readouterr().out


# ---- sizes that are not there ---------------------------------------------------------------------------------------


def member_of(size: int, name: str = "a.mp4") -> bytes:
    """A header that claims `size` bytes, in the form that GNU tar has for large ones."""
    head = bytearray(header(name, 0))
    head[124:136] = b"\x80" + size.to_bytes(11, "big")
    head[148:156] = b"%06o\0 " % (sum(head[:148]) + sum(head[156:]) + 8 * 32)
    return bytes(head)


@pytest.mark.parametrize("size", [1 << 33, 1 << 60, 1 << 80])
def test_a_size_that_the_tar_has_not_is_a_cut(tmp_path, size, capsys):
    path = tmp_path / "x-000000.tar"
    path.write_bytes(member_of(size) + bytes(1024))
    tracemalloc.start()
    try:
        assert main(["verify", str(path), "--json", "--workers", "1"]) == 1
        for quick in (False, True):
            with pytest.raises(ShardError, match="ends inside 'a.mp4'") as caught:
                index.scan(str(path), quick=quick)
            assert caught.value.cause == "truncated"
        assert tracemalloc.get_traced_memory()[1] < GREAT
    finally:
        tracemalloc.stop()
    # More than is ever read at once is refused by its size, from a file as from a pipe, whose end nobody knows.
    assert json.loads(capsys.readouterr().out)["causes"]["member too large"] == 1


def test_an_index_that_says_more_than_the_tar_has_is_a_cut(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"film")
    for offset, size in ((0, 1 << 60), (1 << 62, 4), (2, 3)):
        with pytest.raises(ShardError, match="truncated") as caught:
            storage.read_at(str(tmp_path / "x.tar"), offset, size)
        assert caught.value.cause == "truncated"


def test_an_index_is_a_small_file(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "SMALL_FILE_LIMIT", 10)
    (tmp_path / "x.index").write_bytes(bytes(10))
    assert len(storage.read_all(str(tmp_path / "x.index"))) == 10
    (tmp_path / "x.index").write_bytes(bytes(11))
    for location in (str(tmp_path / "x.index"), f"pipe:cat '{tmp_path / 'x.index'}'"):
        with pytest.raises(ShardError, match="more than 10 bytes"):
            storage.read_all(location)
