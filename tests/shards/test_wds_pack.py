"""`pack`: the same bytes every time, after every kill; what is packed is what the annotation said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from video_files import ACCENTS, audio_file, numbered_video

from lavis_lstp.data.annotation import read_annotation
from lavis_lstp.data.instruct import read_instructions
from lavis_lstp.data.prompts import conversation_prompt
from lavis_lstp.data.shards import sets, storage
from lavis_lstp.data.shards.format import check_sample, media_key, parse_frames
from lavis_lstp.errors import AnnotationError, ConfigError, ShardError, VideoError
from lavis_lstp.testing.tiny_instruct import write_instruct
from webdataset_tools.__main__ import main
from webdataset_tools.pack import Settings, pack, parse_size, plan_shards
from webdataset_tools.sources import units


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    """Five videos and a picture, two questions about each, in annotation.json."""
    root = tmp_path_factory.mktemp("media")
    (root / "clips").mkdir()
    rows = []
    for n in range(5):
        numbered_video(root / f"clips/v {n}.mp4", 6 + n)
    Image.new("RGB", (40, 30), (200, 10, 10)).save(root / "still.png")
    for k in range(2):
        for n in range(6):
            place = {"video": f"clips/v {n}.mp4"} if n < 5 else {"image": "still.png"}
            row = {"question_id": f"q{n}-{k}", **place, "question": f"what {k}?", "answer": f"a{n}", "category": "x"}
            rows.append(row | ({"span_s": [0.0, 0.1]} if k else {}))
    (root / "annotation.json").write_text(json.dumps(rows))
    return root


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def opened(folder: Path, name: str = "x") -> sets.ShardSet:
    return sets.ShardSet(sorted(map(str, folder.glob(f"{name}-*.tar"))))


def packed(media: Path, out: Path, **options) -> dict:
    return pack(units("annotation", [media / "annotation.json"], root=media), str(out / "x"), media, **options)


# ---------------------------------------------------------------- the plan


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=40),
    st.integers(1, 120),
    st.none() | st.integers(1, 9),
    st.integers(1, 8),
)
def test_the_plan_keeps_order_and_limits(sizes, max_size, max_count, min_shards):
    if min_shards > len(sizes):
        with pytest.raises(ConfigError, match="--min-shards"):
            plan_shards(sizes, max_size=max_size, max_count=max_count, min_shards=min_shards)
        return
    parts = plan_shards(sizes, max_size=max_size, max_count=max_count, min_shards=min_shards)
    assert [n for part in parts for n in part] == list(range(len(sizes)))
    assert len(parts) >= min_shards and all(len(part) for part in parts)
    assert all(len(part) == 1 or sum(sizes[n] for n in part) <= max_size for part in parts)
    assert not max_count or all(len(part) <= max_count for part in parts)


@pytest.mark.parametrize(
    "option", ["--frames=-3", "--quality=500", "--fps=nan", "--fps=-1", "--workers=0", "--size=0", "--max-size=0"]
)
def test_numbers_that_cannot_be_are_refused(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["pack", "x", "none.json", option])
    assert f"argument {option.partition('=')[0]}: expected a" in capsys.readouterr().err


def test_sizes():
    assert [parse_size(x) for x in ("1GB", "1.5 MB", "2KiB", "7")] == [10**9, 1_500_000, 2048, 7]


# ---------------------------------------------------------------- content


def test_videos_are_stored_once_with_all_their_questions(media, tmp_path):
    report = packed(media, tmp_path, max_count=4)
    assert (report["totals"]["samples"], report["totals"]["questions"], len(report["shards"])) == (6, 12, 2)
    found, rows = opened(tmp_path), {row["question_id"]: row for row in read_annotation(media / "annotation.json")}
    seen = set()
    for number in range(len(found)):
        shard, sample, which = found.locate(number)
        value = found.read_json(shard, sample)
        check_sample(value, "here", media_key(value["kind"], value["source"]))
        question, row = value["questions"][which], rows[value["questions"][which]["question_id"]]
        assert {**question, "video_id": value["video_id"], value["kind"]: value["source"]} == row
        member = "png" if value["kind"] == "image" else "mp4"
        content = found.read(shard, sample, (member,))[member]
        assert content == (media / value["source"]).read_bytes()
        assert value["sha256"] == found.index(shard).members(sample)[member].sha256.hex()
        seen.add(question["question_id"])
    assert seen == set(rows)
    assert found.read_json(0, 0) | {"questions": 0} == {
        "bytes": (media / "clips/v 0.mp4").stat().st_size, "codec": "h264", "duration_s": 0.24,
        "format": "lavis_lstp.shard_sample", "fps": 25.0, "height": 96, "kind": "video", "num_frames": 6,
        "questions": 0,
        "sha256": found.index(0).members(0)["mp4"].sha256.hex(), "source": "clips/v 0.mp4", "version": 1,
        "video_id": "v 0", "width": 160,
    }  # fmt: skip


def test_media_need_not_be_opened(media, tmp_path):
    (tmp_path / "no_film.mp4").write_bytes(b"no film")
    (tmp_path / "a.json").write_text(
        json.dumps([{"question_id": "q", "video": "no_film.mp4", "question": "?", "answer": "!"}])
    )
    found = units("annotation", [tmp_path / "a.json"], root=tmp_path)
    pack(found, str(tmp_path / "s/x"), tmp_path, settings=Settings(probe=False))
    value = opened(tmp_path / "s").read_json(0, 0)
    assert "fps" not in value and value["bytes"] == 7


@ACCENTS
def test_any_video_that_is_read_is_packed_however_its_name_encodes_accents(tmp_path):
    for name in ("\u00e9.wmv", "\u00e9.3gp", "\u00e9.ts"):
        (tmp_path / unicodedata.normalize("NFD", name)).write_bytes(name.encode())
        row = {"question_id": name, "video": name, "video_id": name, "question": "?", "answer": "!"}
        (tmp_path / "a.json").write_text(json.dumps([row]))
        found = units("annotation", [tmp_path / "a.json"], root=tmp_path)
        out = tmp_path / name[2:]
        pack(found, str(out / "x"), tmp_path, settings=Settings(probe=False))
        value = opened(out).read_json(0, 0)
        assert value["source"] == name and value["bytes"] == len(name.encode())


def test_frames_in_place_of_videos(media, tmp_path):
    packed(media, tmp_path, settings=Settings(frames=4, size=32))
    found = opened(tmp_path)
    assert set(found.index(0).members(0)) == {"frames", "json"}
    frames = parse_frames(found.read(0, 2, ("frames",))["frames"], "x")
    assert len(frames.pictures) == 4 and frames.settings["num_frames"] == "4"
    assert frames.times_s.tolist() == [0, 0.08, 0.16, 0.24]  # centres of 8 frames at 25 a second
    assert found.read_json(0, 2)["num_frames"] == 8


def test_video_llava_layout(tmp_path):
    written = write_instruct(tmp_path / "data")
    root = tmp_path / "data"
    source = [Path(written["train"]), Path(written["nlp_tune"])]
    found = units("video-llava", source, root=root)
    pack(found, str(tmp_path / "s/x"), root)
    shards = opened(tmp_path / "s")
    assert shards.kinds() == {"image", "video", "text"}
    stored = {}
    for number in range(len(shards)):
        shard, sample, which = shards.locate(number)
        question = shards.read_json(shard, sample)["questions"][which]
        stored[question["question_id"]] = conversation_prompt(question["conversations"])
    wanted = [row for kind in ("image", "video", "text") for row in read_instructions(source, kind=kind)]
    assert {row["question_id"]: (row["prompt"], row["answer"], row["question"]) for row in wanted} == stored


def test_ids_may_repeat_between_kinds(tmp_path):
    """LLaVA's files do that; data sets of one kind read them."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "that"}]
    rows = [{"id": 7, "conversations": turns}, {"id": 7, "image": "a.png", "conversations": turns}]
    (tmp_path / "a.json").write_text(json.dumps(rows + rows[:1]))
    found = units("video-llava", [tmp_path / "a.json"], root=tmp_path)
    assert [(unit.kind, unit.questions[0]["question_id"]) for unit in found] == [
        ("image", "7"),
        ("text", "7"),
        ("text", "7#2"),
    ]


def test_a_benchmarks_files_are_joined_by_id(media, tmp_path):
    questions = [{"video_name": f"v {n}", "question": f"what {n}?", "question_id": n} for n in range(2)]
    (tmp_path / "q.json").write_text(json.dumps(questions))
    (tmp_path / "a.json").write_text(json.dumps([{"answer": f"a{n}", "type": 3, "question_id": n} for n in (1, 0)]))
    found = units("qa", [tmp_path / "q.json"], root=media / "clips", answers=tmp_path / "a.json")
    assert [(unit.source, unit.questions[0]["answer"], unit.questions[0]["category"]) for unit in found] == [
        ("v 0.mp4", "a0", "3"),
        ("v 1.mp4", "a1", "3"),
    ]
    (tmp_path / "a.json").write_text(json.dumps([{"answer": "a", "question_id": 1}]))
    with pytest.raises(AnnotationError, match=r"1 questions have no answer here \(0\)"):
        units("qa", [tmp_path / "q.json"], root=media / "clips", answers=tmp_path / "a.json")


# ---------------------------------------------------------------- bytes


def test_the_same_bytes_with_any_number_of_workers(media, tmp_path):
    packed(media, tmp_path / "one", max_count=2)
    packed(media, tmp_path / "two", max_count=2, workers=2)
    assert content_of(tmp_path / "one") == content_of(tmp_path / "two")
    assert sorted(content_of(tmp_path / "one"))[-1] == "x.manifest.json"


def test_a_second_run_does_nothing_and_other_settings_are_refused(media, tmp_path):
    packed(media, tmp_path, max_count=2)
    dates = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}
    packed(media, tmp_path, max_count=2)
    assert dates == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}
    with pytest.raises(ConfigError, match="other settings"):
        packed(media, tmp_path, max_count=2, settings=Settings(frames=2))
    with pytest.raises(ConfigError, match="of another set"):
        packed(media, tmp_path, max_count=6)
    packed(media, tmp_path, max_count=6, overwrite=True)
    assert sorted(content_of(tmp_path)) == ["x-000000.index", "x-000000.tar", "x.manifest.json"]


def test_shuffling_is_decided_by_its_seed(media, tmp_path):
    orders = []
    for number, seed in enumerate([1, 1, 2]):
        packed(media, tmp_path / str(number), shuffle=seed)
        orders.append(opened(tmp_path / str(number)).question_ids())
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2])


def test_a_killed_run_continues_with_the_same_bytes(media, tmp_path):
    packed(media, tmp_path / "whole", max_count=1)
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "webdataset_tools", "pack", str(out / "x"), str(media / "annotation.json")]
    command += ["--max-count", "1", "--workers", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    kills = 0
    for at_least in (1, 3):  # killed when so many shards are there
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(list(out.glob("*.index"))) < at_least:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        assert not (out / "x.manifest.json").exists() or kills < 2
    (out / ".x-000004.tar.1.tmp").write_bytes(b"half a shard")
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert kills and content_of(out) == content_of(tmp_path / "whole")


def test_no_worker_outlives_a_killed_run(media, tmp_path):
    command = [sys.executable, "-m", "webdataset_tools", "pack", str(tmp_path / "x"), str(media / "annotation.json")]
    command += ["--max-count", "1", "--workers", "2", "--frames", "6"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while process.poll() is None and not list(tmp_path.glob("*.index")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)  # ends when the last process that holds the pipe does
    assert process.returncode == -signal.SIGKILL


def test_what_another_set_is_writing_is_left_alone(media, tmp_path):
    mine, theirs = tmp_path / ".x-000004.tar.1.tmp", tmp_path / ".x-flow-000000.tar.1.tmp"
    for path in (mine, theirs):
        path.write_bytes(b"half a shard")
    packed(media, tmp_path)
    assert theirs.is_file() and not mine.exists()


def test_a_place_that_cannot_be_written_is_named_in_one_line(media, tmp_path, capsys):
    (tmp_path / "file").write_bytes(b"")
    assert main(["pack", str(tmp_path / "file/x"), str(media / "annotation.json"), "--workers", "1"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "file" in said and "\n" not in said


def test_a_shard_cut_after_it_was_written_is_packed_again(media, tmp_path):
    packed(media, tmp_path, max_count=2)
    before = content_of(tmp_path)
    (tmp_path / "x-000001.tar").write_bytes(before["x-000001.tar"][:700])
    packed(media, tmp_path, max_count=2)
    assert content_of(tmp_path) == before


# ---------------------------------------------------------------- bad input


def test_what_cannot_be_decoded_stops_or_is_listed(media, tmp_path):
    audio_file(tmp_path / "broken.mp4")
    numbered_video(tmp_path / "fine.mp4", 5)
    rows = [
        {"question_id": name, "video": f"{name}.mp4", "question": "?", "answer": "!"} for name in ("broken", "fine")
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    found = units("annotation", [tmp_path / "a.json"], root=tmp_path)
    with pytest.raises(VideoError, match="broken.mp4"):
        pack(found, str(tmp_path / "s/x"), tmp_path)
    assert not list((tmp_path / "s").iterdir())
    report = pack(found, str(tmp_path / "s/x"), tmp_path, skip_bad=True)
    again = pack(found, str(tmp_path / "s/x"), tmp_path, skip_bad=True)  # also where the shard is there already
    listed = [json.loads(line) for line in (tmp_path / "s/x.quarantine.jsonl").read_text().splitlines()]
    assert report == again and report["left_out"] == 1 and report["totals"]["samples"] == 1
    assert (listed[0]["key"], listed[0]["cause"]) == ("broken%2Emp4", "undecodable")
    with pytest.raises(ShardError, match="none of 1 samples"):
        pack(found[:1], str(tmp_path / "t/x"), tmp_path, skip_bad=True)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"video": "../v.mp4"}, ShardError, "not a relative path"),
        ({"video": "none.mp4"}, VideoError, "no such file"),
        ({"video": "text.txt"}, ConfigError, "unknown ending"),
        ({"question_id": "q1"}, AnnotationError, "twice"),
        ({"video_id": "other", "video": "v.mp4"}, AnnotationError, "in another"),
    ],
)
def test_annotations_that_cannot_be_packed(tmp_path, changes, error, said):
    (tmp_path / "text.txt").write_text("x")
    numbered_video(tmp_path / "v.mp4", 2)
    base = {"question": "?", "answer": "!", "video": "v.mp4"}
    rows = [base | {"question_id": "q1"}, base | {"question_id": "q2"} | changes]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with pytest.raises(error, match=said):
        units("annotation", [tmp_path / "a.json"], root=tmp_path)


# ---------------------------------------------------------------- command line


def test_the_command_line(media, tmp_path, capsys):
    arguments = ["pack", str(tmp_path / "x"), str(media / "annotation.json"), "--max-count", "3", "--workers", "1"]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "x.manifest.json").read_text())
    assert storage.expand(f"{tmp_path}/x-{{000000..000001}}.tar") == [
        f"{tmp_path}/{s['name']}" for s in report["shards"]
    ]
    assert main(arguments) == 0
    assert "2 shards, 6 samples, 12 questions" in capsys.readouterr().out
    assert main([*arguments, "--min-shards", "9"]) == 2
    assert "there are only 6 samples" in capsys.readouterr().err
    assert main(["pack", str(tmp_path / "y"), "gone.json"]) == 2
    assert capsys.readouterr().err == "error: gone.json: no such file\n"
    assert main(["pak"]) == 2 and "unknown verb 'pak'" in capsys.readouterr().err
    assert main(["--help"]) == 0 and "pack" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["pack", "--help"])
    assert "continues when called again" in capsys.readouterr().out
