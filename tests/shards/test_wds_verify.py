"""`verify` names what is wrong with each sample and each cause once; `extract` writes back what was packed, safely."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from test_wds_format import pax, raw_tar
from video_files import audio_file, numbered_video

from lavis_lstp.data.shards import index, sets, storage
from lavis_lstp.data.shards.format import dump_flow, dump_json, media_key
from lavis_lstp.data.shards.tar import ShardWriter
from lavis_lstp.errors import ConfigError, ShardError
from webdataset_tools.__main__ import main
from webdataset_tools.extract import extract
from webdataset_tools.pack import Settings, pack
from webdataset_tools.sources import units
from webdataset_tools.verify import verify

COUNT = 4


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    """Three videos and a picture with a question each, and another split of one video."""
    root = tmp_path_factory.mktemp("media")
    rows = []
    for n in range(COUNT - 1):
        numbered_video(root / f"v{n}.mp4", 6 + n)
        rows.append({"question_id": f"q{n}", "video": f"v{n}.mp4", "question": "what?", "answer": f"a{n}"})
    Image.new("RGB", (40, 30), (200, 10, 10)).save(root / "still.png")
    rows.append({"question_id": "still", "image": "still.png", "question": "what?", "answer": "red"})
    (root / "a.json").write_text(json.dumps(rows))
    (root / "val.json").write_text(json.dumps([rows[1] | {"question_id": "val"}]))
    return root


def packed(media: Path, out: Path, source: str = "a.json", **options) -> list[str]:
    pack(units("annotation", [media / source], root=media), str(out / "x"), media, **options)
    return sorted(map(str, out.glob("x-*.tar")))


def causes(shards, **options) -> dict[str, int]:
    report = verify(shards, decode=4, **options)
    assert report["failed"] == bool(report["problems"])
    return report["causes"]


def rewritten(path: Path, change) -> None:
    """The shard with `change(key, {member: bytes})` for each sample's members, and an index that fits."""
    found = sets.ShardSet([str(path)])
    content = [(one.key, found.read(0, n, dict(one.members))) for n, one in enumerate(found.index(0).samples())]
    changed = [change(key, dict(members)) for key, members in content]
    samples = []
    with ShardWriter(path) as shard:
        for (key, _), members in zip(content, changed, strict=True):
            placed = shard.add(key, members)
            samples.append(index.sample_of(key, placed, None))
    index.write(index.build(samples, path.stat().st_size), path)


def only(key: str, **members):
    """Replaces members of one sample; None removes one."""

    def change(found, content):
        if found == key:
            content |= {name.replace("_", "."): raw for name, raw in members.items()}
        return {name: raw for name, raw in content.items() if raw is not None}

    return change


def test_a_whole_set_is_whole(media, tmp_path):
    shards = packed(media, tmp_path / "mp4", max_count=2)
    report = verify(shards, decode=4)
    assert not report["failed"] and (report["samples"], report["questions"]) == (COUNT, COUNT)
    assert verify(shards, decode=4, workers=2) == report
    assert causes(packed(media, tmp_path / "frames", settings=Settings(frames=3, size=32))) == {}


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda raw: b"", "empty"),
        (lambda raw: b"no tar" * 200, "magic"),
        (lambda raw: raw[: len(raw) // 2], "truncated"),
        (lambda raw: raw[:-1024], "truncated"),
    ],
)
def test_a_damaged_tar(media, tmp_path, damage, cause):
    shards = packed(media, tmp_path)
    path = Path(shards[0])
    path.write_bytes(damage(path.read_bytes()))
    report = verify(shards, decode=4)
    assert [row["cause"] for row in report["problems"] if row["key"] == ""] == [cause]
    lost = {row["key"] for row in report["problems"]} - {""}
    assert len(lost) + report["samples"] == COUNT  # each sample is sound or named


def test_samples_behind_a_damaged_header_are_found_by_the_index(media, tmp_path):
    shards = packed(media, tmp_path)
    path, place = Path(shards[0]), sets.ShardSet(shards).index(0).members(1)["mp4"]
    raw = bytearray(path.read_bytes())
    raw[place.offset - 512 : place.offset] = b"x" * 512
    path.write_bytes(raw)
    report = verify(shards, decode=4)
    assert report["causes"] == {"header": 1} and report["samples"] == COUNT


def test_a_flipped_bit_in_a_video(media, tmp_path):
    shards = packed(media, tmp_path)
    path, place = Path(shards[0]), sets.ShardSet(shards).index(0).members(1)["mp4"]
    raw = bytearray(path.read_bytes())
    raw[place.offset + place.size // 2] ^= 1
    path.write_bytes(raw)
    report = verify(shards, decode=0)
    assert [(row["key"], row["cause"]) for row in report["problems"]] == [("v1%2Emp4", "hash")]


@pytest.mark.parametrize(
    ("members", "cause"),
    [
        ({"json": b"{"}, "json"),
        ({"json": b"[]"}, "json"),
        ({"json": b'{"format": "other"}'}, "schema"),
        ({"json": None}, "missing member"),
        ({"mp4": None}, "missing member"),
        ({"jpg": b"x"}, "missing member"),
        ({"flow": b"x"}, "flow"),
        ({"frames": b"x"}, "missing member"),
        ({"span_json": b"no"}, "json"),
        ({"json": b"{" + b" " * (17 << 20) + b"}"}, "json too large"),
    ],
)
def test_members_that_are_wrong(media, tmp_path, members, cause):
    shards = packed(media, tmp_path)
    rewritten(Path(shards[0]), only("v1%2Emp4", **members))
    report = verify(shards, decode=4)
    assert [(row["key"], row["cause"]) for row in report["problems"] if row["key"]] == [("v1%2Emp4", cause)]
    assert report["samples"] == COUNT - 1


def test_flow_for_other_frames(media, tmp_path):
    import numpy as np

    shards = packed(media, tmp_path, settings=Settings(frames=3, size=32))
    rewritten(Path(shards[0]), only("v1%2Emp4", flow=dump_flow(np.zeros((2, 2, 4, 4)), {})))
    assert causes(shards)["flow"] == 1


def test_media_that_cannot_be_decoded(tmp_path):
    """Packed by hand: `pack` would have refused them."""
    audio_file(tmp_path / "a.mp4")
    samples = []
    (tmp_path / "s").mkdir()
    path = tmp_path / "s/x-000000.tar"
    with ShardWriter(path) as shard:
        for kind, name, raw in (("video", "a.mp4", (tmp_path / "a.mp4").read_bytes()), ("image", "b.png", b"PNG")):
            place = shard.append(media_key(kind, name), name[2:], raw)
            value = {"format": "lavis_lstp.shard_sample", "version": 1, "kind": kind, "video_id": "a", "source": name}
            value |= {"sha256": place.sha256.hex(), "questions": [{"question_id": name, "question": "", "answer": ""}]}
            shard.append(media_key(kind, name), "json", dump_json(value))
            samples.append(index.sample_of(media_key(kind, name), {}, value))
    report = verify([str(path)])
    assert report["causes"] == {"undecodable": 2, "no index": 1, "no manifest": 1}
    assert "no video stream" in str(report["problems"])
    assert verify([str(path)], decode=0)["samples"] == 2


def test_duplicates_between_shards(media, tmp_path):
    shards = packed(media, tmp_path / "a", max_count=2) + packed(media, tmp_path / "b")
    assert causes(shards)["duplicate key"] == COUNT
    found = units("annotation", [media / "a.json"], root=media)  # the third is in the second shard
    other = found[2]._replace(questions=({"question_id": "q0", "question": "?", "answer": "!"},))
    pack([other], str(tmp_path / "c/x"), media)
    report = verify([shards[0], str(tmp_path / "c/x-000000.tar")], decode=0)
    assert report["causes"]["duplicate question"] == 1


def test_the_same_video_under_two_names_is_a_note(media, tmp_path):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes((media / "v0.mp4").read_bytes())
    rows = [{"question_id": n, "video": f"{n}.mp4", "question": "?", "answer": "!"} for n in "ab"]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    shards = packed(tmp_path, tmp_path / "s")
    report = verify(shards)
    assert not report["failed"] and report["notes"] == ["1 media have the same bytes as another one"]


def test_leaks_between_splits(media, tmp_path):
    train = packed(media, tmp_path / "train")
    val = packed(media, tmp_path / "val", "val.json")
    report = verify(train, val, decode=0)
    assert [(row["key"], row["cause"]) for row in report["problems"]] == [("v1%2Emp4", "leak")]


def test_indexes_and_manifests_that_do_not_fit(media, tmp_path):
    shards = packed(media, tmp_path, max_count=2)
    folder = Path(shards[0]).parent
    indexes = [Path(storage.beside(shard, ".index")) for shard in shards]
    first, second = (path.read_bytes() for path in indexes)
    indexes[0].write_bytes(second)
    assert causes(shards)["index"] == 4 and "manifest" not in causes(shards)
    indexes[0].unlink()
    assert causes(shards) == {"no index": 1}
    indexes[0].write_bytes(first)
    manifest = json.loads((folder / "x.manifest.json").read_text())
    manifest["shards"][0]["questions"] = 7
    manifest["shards"].append({"name": "x-000002.tar"})
    (folder / "x.manifest.json").write_text(json.dumps(manifest))
    assert causes(shards) == {"manifest": 1, "missing shard": 1}
    (folder / "x.manifest.json").unlink()
    assert causes(shards) == {"no manifest": 1}


def test_missing_shards(tmp_path):
    assert causes([str(tmp_path / "x-000000.tar")])["not found"] == 1


def test_the_command_says_it_with_its_status(media, tmp_path, capsys):
    (shard,) = packed(media, tmp_path)
    assert main(["verify", shard, "--workers", "1"]) == 0
    assert "whole: 1 shards, 4 sound samples" in capsys.readouterr().out
    Path(shard).write_bytes(Path(shard).read_bytes()[:-1024])
    assert main(["verify", shard, "--workers", "1"]) == 1
    table = capsys.readouterr().out
    assert "NOT whole" in table and "truncated       1  " in table
    assert main(["verify", shard, "--workers", "1", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["causes"] == {"truncated": 1}
    assert main(["verify", f"pipe:cat {shard}", "--workers", "1", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["causes"] == {"truncated": 1}


# ---------------------------------------------------------------- extract


def test_what_is_extracted_packs_to_the_same_bytes(media, tmp_path):
    shards = packed(media, tmp_path / "s", max_count=3)
    report = extract(shards, tmp_path / "out")
    assert report["files"] == report["questions"] == COUNT
    assert (tmp_path / "out/v1.mp4").read_bytes() == (media / "v1.mp4").read_bytes()
    again = units("annotation", [tmp_path / "out/annotation.json"], root=tmp_path / "out")
    pack(again, str(tmp_path / "t/x"), tmp_path / "out", max_count=3)
    for path in (tmp_path / "s").iterdir():
        assert path.read_bytes() == (tmp_path / "t" / path.name).read_bytes(), path.name


def test_conversations_and_frames_are_extracted(media, tmp_path):
    turns = [{"from": "human", "value": "<video>\nwhat?"}, {"from": "gpt", "value": "that"}]
    rows = [{"id": "v", "video": "v0.mp4", "conversations": turns}, {"id": "t", "conversations": turns}]
    (tmp_path / "c.json").write_text(json.dumps(rows))
    found = units("video-llava", [tmp_path / "c.json"], root=media)
    pack(found, str(tmp_path / "x"), media, settings=Settings(frames=2, size=16))
    extract([str(tmp_path / "x-000000.tar")], tmp_path / "out")
    assert json.loads((tmp_path / "out/conversations.json").read_text()) == rows
    with Image.open(tmp_path / "out/v0.mp4.frames/00001.jpg") as picture:
        assert picture.size == (16, 16)


def link(name: str, target: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = tarfile.SYMTYPE, target
        tar.addfile(info)
    return out.getvalue()


def leading_out() -> bytes:
    value = {"format": "lavis_lstp.shard_sample", "version": 1, "kind": "image", "video_id": "a", "sha256": "0" * 64}
    value |= {"source": "../../evil.png", "questions": [{"question_id": "q", "question": "", "answer": ""}]}
    return raw_tar(("a.png", b"evil"), ("a.json", dump_json(value)))


@pytest.mark.parametrize(
    "raw", [leading_out(), link("a.png", "/etc/passwd"), raw_tar(("../evil.png", b"x")), pax("/tmp/evil.json", b"{}")]
)
def test_nothing_is_written_outside(tmp_path, raw):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.tar").write_bytes(raw)
    with pytest.raises(ShardError):
        extract([str(tmp_path / "in/x.tar")], tmp_path / "in/deep/out")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["x.tar"]


def test_a_folder_with_something_in_it_is_left_alone(media, tmp_path):
    shards = packed(media, tmp_path / "s")
    with pytest.raises(ConfigError, match="exists already"):
        extract(shards, media)
    (tmp_path / "link").symlink_to(media)
    assert main(["extract", *shards, "--out", str(tmp_path / "link")]) == 2


@pytest.mark.parametrize("stored", [(), ("--frames", "2", "--size", "32")], ids=["files", "frames"])
def test_the_largest_area_is_the_users_in_every_verb(media, tmp_path, stored, capsys):
    """Frames of a numbered video have 0.0154 megapixels, the picture has 0.0012, a stored frame 0.001."""
    small, great = ("--max-megapixels", "0.01"), ("--max-megapixels", "0.02")
    source = (str(media / "a.json"), *stored)
    assert main(["pack", str(tmp_path / "no/x"), *source, *small]) == 2
    assert "max_megapixels" in capsys.readouterr().err
    if not stored:  # a limit of another size is another plan; the usual one is that of sets that began without it
        assert main(["pack", str(tmp_path / "some/x"), *source, *small, "--skip-bad"]) == 0
        assert "3 left out" in capsys.readouterr().out
        assert main(["pack", str(tmp_path / "some/x"), *source, "--skip-bad"]) == 2
        assert "with other settings" in capsys.readouterr().err
    assert main(["pack", str(tmp_path / "all/x"), *source, *great]) == 0
    (shard,) = map(str, (tmp_path / "all").glob("*.tar"))
    assert main(["verify", shard, *great]) == 0
    tight = small if not stored else ("--max-megapixels", "0.0011")
    capsys.readouterr()
    assert main(["verify", shard, *tight]) == 1
    assert ["undecodable", "1" if stored else "3"] in [
        line.split()[:2] for line in capsys.readouterr().out.splitlines()
    ]
    assert main(["repair", shard, "--out", str(tmp_path / "mended/x"), *tight]) == 0
    assert f"{1 if not stored else 3} samples" in capsys.readouterr().out
    frames = ("--num-frames", "2", "--size", "32")
    assert main(["flow", shard, "--out", str(tmp_path / "flow/x"), *frames, *great]) == 0
    assert main(["flow", shard, "--out", str(tmp_path / "flow2/x"), *frames, "--max-megapixels", "0.0009"]) == 2
    with pytest.raises(SystemExit):
        main(["verify", shard, "--max-megapixels", "0"])
