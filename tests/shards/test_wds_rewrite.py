"""`reshard` keeps every byte of every sample; `repair` keeps what is sound, mends what it can and lists the rest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_wds_verify import causes, media, only, packed, rewritten  # noqa: F401 (a fixture)

from lavis_lstp.data.shards import index, sets
from lavis_lstp.data.shards.format import dump_flow
from lavis_lstp.data.shards.tar import ShardWriter
from lavis_lstp.errors import ShardError
from webdataset_tools.__main__ import main
from webdataset_tools.pack import Settings
from webdataset_tools.repair import repair
from webdataset_tools.verify import verify


def contents(shards) -> dict[str, dict[str, bytes]]:
    found = sets.ShardSet(sorted(map(str, shards)))
    samples = [(n, k, one) for n in range(len(found.shards)) for k, one in enumerate(found.index(n).samples())]
    return {one.key: found.read(n, k, dict(one.members)) for n, k, one in samples}


def quarantined(out: Path) -> list[tuple[str, str]]:
    lines = (out.parent / f"{out.name}.quarantine.jsonl").read_text().splitlines()
    return [(row["key"], row["cause"]) for row in map(json.loads, lines)]


# ---------------------------------------------------------------- reshard


def test_resharding_there_and_back_gives_the_same_bytes(media, tmp_path):  # noqa: F811
    shards = packed(media, tmp_path / "a", max_count=2)
    arguments = ["reshard", *shards, "--workers", "1", "--max-count"]
    assert main([*arguments, "3", "--out", str(tmp_path / "b/x")]) == 0
    moved = sorted(map(str, (tmp_path / "b").glob("*.tar")))
    assert [len(index.scan(shard).keys()) for shard in moved] == [3, 1]
    assert contents(moved) == contents(shards) and list(contents(moved)) == list(contents(shards))
    assert causes(moved) == {}
    assert main(["reshard", *moved, "--workers", "1", "--max-count", "2", "--out", str(tmp_path / "c/x")]) == 0
    for shard in shards:
        assert Path(shard).read_bytes() == (tmp_path / "c" / Path(shard).name).read_bytes()
    assert main([*arguments, "1", "--out", str(tmp_path / "d/x"), "--shuffle", "3"]) == 0
    shuffled = contents((tmp_path / "d").glob("*.tar"))
    assert shuffled == contents(shards) and list(shuffled) != list(contents(shards))


def parallel(shards, out: Path, field=lambda n: np.full((2, 2, 2, 2), n + 1.0)) -> list[str]:
    """A set with flow for each sample."""
    paths = []
    for number, location in enumerate(shards):
        path, samples = out / f"flow-{number:06d}.tar", []
        with ShardWriter(path) as shard:
            for n, key in enumerate(index.scan(location).keys()):
                placed = shard.add(key, {"flow": dump_flow(field(n), {})})
                samples.append(index.sample_of(key, placed, None))
        index.write(index.build(samples, path.stat().st_size), path)
        paths.append(str(path))
    return paths


def test_a_parallel_set_is_joined_and_dropped(media, tmp_path, capsys):  # noqa: F811
    shards = packed(media, tmp_path / "a", max_count=2)
    flow = parallel(shards, tmp_path / "f")
    assert main(["reshard", *shards, "--join", *flow, "--out", str(tmp_path / "b/x"), "--workers", "1"]) == 0
    (one,) = map(str, (tmp_path / "b").glob("*.tar"))
    assert [set(members) for members in contents([one]).values()] == [{"mp4", "flow", "json"}] * 3 + [
        {"png", "flow", "json"}
    ]
    assert main(["reshard", one, "--drop", "flow", "--out", str(tmp_path / "c/x"), "--workers", "1"]) == 0
    assert contents((tmp_path / "c").glob("*.tar")) == contents(shards)
    assert main(["reshard", *shards, "--join", *flow[::-1], "--out", str(tmp_path / "d/x")]) == 2
    assert main(["reshard", one, "--join", *flow, "--out", str(tmp_path / "d/x")]) == 2
    said = capsys.readouterr().err
    assert "the same samples in the same order" in said and "a member twice" in said


def test_changed_bytes_are_not_copied(media, tmp_path):  # noqa: F811
    (shard,) = packed(media, tmp_path)
    place = sets.ShardSet([shard]).index(0).members(1)["mp4"]
    raw = bytearray(Path(shard).read_bytes())
    raw[place.offset] ^= 1
    Path(shard).write_bytes(raw)
    assert main(["reshard", shard, "--out", str(tmp_path / "b/x"), "--workers", "1"]) == 2
    assert not list((tmp_path / "b").iterdir())


# ---------------------------------------------------------------- repair


def test_a_truncated_shard_gives_what_is_before_the_cut(media, tmp_path):  # noqa: F811
    shards = packed(media, tmp_path / "a", max_count=2)
    before = contents(shards)
    place = sets.ShardSet(shards).index(0).members(1)["mp4"]
    Path(shards[0]).write_bytes(Path(shards[0]).read_bytes()[: place.offset + 7])
    report = repair(shards, str(tmp_path / "b/x"), decode=4)
    mended = sorted(map(str, (tmp_path / "b").glob("*.tar")))
    assert causes(mended) == {} and report["totals"]["samples"] == 3
    assert contents(mended) == {key: value for key, value in before.items() if key != "v1%2Emp4"}
    assert sorted(quarantined(tmp_path / "b/x")) == [("", "truncated"), ("v1%2Emp4", "truncated")]


def test_a_damaged_video_is_fetched_again(media, tmp_path):  # noqa: F811
    shards = packed(media, tmp_path / "a", max_count=2)
    before = contents(shards)
    found = sets.ShardSet(shards).index(0)
    raw = bytearray(Path(shards[0]).read_bytes())
    raw[found.members(0)["mp4"].offset + 99] ^= 1
    raw[found.members(1)["json"].offset + 5] ^= 1
    Path(shards[0]).write_bytes(raw)
    report = repair(shards, str(tmp_path / "b/x"), root=media, decode=0)
    mended = sorted(map(str, (tmp_path / "b").glob("*.tar")))
    assert report["made_by"]["fetched"] == 1 and causes(mended) == {}
    assert contents(mended) == {key: value for key, value in before.items() if key != "v1%2Emp4"}
    assert [key for key, _ in quarantined(tmp_path / "b/x")] == ["v1%2Emp4"]


@pytest.mark.parametrize("member", ["mp4", "frames", "folder"])
def test_what_is_fetched_again_is_what_was_there(media, tmp_path, member):  # noqa: F811
    """As a file, as chosen frames or as a folder of pictures, and with the flow and spans it had."""
    root, rows = tmp_path / "media", []
    for name in ("a", "b"):
        source = root / ("v0" if member == "folder" else "v0.mp4")
        source = source.with_name(source.name.replace("v0", name))
        source.parent.mkdir(exist_ok=True)
        if member == "folder":
            source.mkdir()
            for n in range(3):
                Image.new("RGB", (20 + 4 * n, 20), (60 * n, 0, ord(name))).save(source / f"{n}.png")
        else:
            source.write_bytes((media / f"v{'ab'.index(name)}.mp4").read_bytes())
        rows.append({"question_id": name, "video": source.name, "question": "?", "answer": "!"})
    (root / "a.json").write_text(json.dumps(rows))
    settings = Settings(frames=3, size=32, encoding="webp", quality=80) if member == "frames" else Settings()
    shards = packed(root, tmp_path / "s", settings=settings)
    flow = parallel(shards, tmp_path / "f", lambda n: np.full((3, 2, 2, 2), n + 1.0))
    assert main(["reshard", *shards, "--join", *flow, "--out", str(tmp_path / "a/x"), "--workers", "1"]) == 0
    (shard,) = (tmp_path / "a").glob("*.tar")
    before = contents([shard])
    name = "mp4" if member == "mp4" else "frames"
    first = sets.ShardSet([str(shard)]).index(0).members(0)
    raw = bytearray(shard.read_bytes())
    raw[first[name].offset + first[name].size - 9] ^= 1
    shard.write_bytes(raw)
    assert repair([str(shard)], str(tmp_path / "b/x"), root=root, decode=0)["made_by"]["fetched"] == 1
    assert contents((tmp_path / "b").glob("*.tar")) == before and not list((tmp_path / "b").glob("*.jsonl"))
    raw[first["flow"].offset + first["flow"].size - 1] ^= 1
    shard.write_bytes(raw)
    repair([str(shard)], str(tmp_path / "c/x"), root=root, decode=0)
    key = next(iter(before))
    assert set(contents((tmp_path / "c").glob("*.tar"))[key]) == set(before[key]) - {"flow"}
    ((named, cause),) = quarantined(tmp_path / "c/x")
    assert named == key and cause in ("hash", "flow")  # whichever is noticed first


def test_flow_for_other_frames_is_dropped_and_listed(media, tmp_path):  # noqa: F811
    shards = packed(media, tmp_path / "a", settings=Settings(frames=3, size=32))
    rewritten(Path(shards[0]), only("v1%2Emp4", flow=dump_flow(np.zeros((2, 2, 4, 4)), {})))
    repair(shards, str(tmp_path / "b/x"), root=media, decode=0)
    mended = sorted(map(str, (tmp_path / "b").glob("*.tar")))
    assert causes(mended) == {} and set(contents(mended)["v1%2Emp4"]) == {"frames", "json"}
    assert quarantined(tmp_path / "b/x") == [("v1%2Emp4", "flow")]


def test_a_file_that_has_changed_is_not_fetched(media, tmp_path):  # noqa: F811
    (shard,) = packed(media, tmp_path / "a")
    rewritten(Path(shard), only("v0%2Emp4", mp4=b"damaged"))
    (tmp_path / "v0.mp4").write_bytes(b"another")
    repair([shard], str(tmp_path / "b/x"), root=tmp_path, decode=0)
    assert quarantined(tmp_path / "b/x") == [("v0%2Emp4", "hash")]


def test_duplicates_and_leaks_go_and_one_of_each_stays(media, tmp_path):  # noqa: F811
    shards = packed(media, tmp_path / "a") + packed(media, tmp_path / "c")
    val = packed(media, tmp_path / "val", "val.json")
    report = repair(shards, str(tmp_path / "b/x"), against=val, decode=0)
    mended = sorted(map(str, (tmp_path / "b").glob("*.tar")))
    assert report["totals"]["samples"] == 3 and causes(mended, against=val) == {}
    listed = quarantined(tmp_path / "b/x")
    assert listed.count(("v1%2Emp4", "leak")) == 2 and sum(cause == "duplicate key" for _, cause in listed) == 3


def test_a_lost_index_and_manifest_are_made_again(media, tmp_path):  # noqa: F811
    (shard,) = packed(media, tmp_path / "a")
    (tmp_path / "a/x-000000.index").unlink()
    (tmp_path / "a/x.manifest.json").unlink()
    repair([shard], str(tmp_path / "b/x"), decode=0)
    assert (tmp_path / "b/x-000000.tar").read_bytes() == Path(shard).read_bytes()
    assert not verify([str(tmp_path / "b/x-000000.tar")], decode=0)["failed"]


def test_nothing_sound_is_an_error(media, tmp_path, capsys):  # noqa: F811
    (shard,) = packed(media, tmp_path / "a")
    Path(shard).write_bytes(b"")
    with pytest.raises(ShardError, match="nothing of this set is sound"):
        repair([shard], str(tmp_path / "b/x"), decode=0)
    assert main(["repair", shard, "--out", str(tmp_path / "b/x"), "--workers", "1"]) == 2
    assert "empty (0 bytes)" in capsys.readouterr().err


def test_a_file_that_was_never_sound_is_not_fetched(media, tmp_path):  # noqa: F811
    """`pack` reads its header alone; what lies below --root is the same film without pictures."""
    raw = bytearray((media / "v0.mp4").read_bytes())
    start = raw.index(b"mdat") + 4
    size = int.from_bytes(raw[start - 8 : start - 4], "big") - 8
    raw[start : start + size] = bytes(size)
    root = tmp_path / "media"
    root.mkdir()
    (root / "v0.mp4").write_bytes(raw)
    (root / "v1.mp4").write_bytes((media / "v1.mp4").read_bytes())
    rows = [{"question_id": v, "video": f"{v}.mp4", "question": "?", "answer": "!"} for v in ("v0", "v1")]
    (root / "a.json").write_text(json.dumps(rows))
    shards = packed(root, tmp_path / "a")
    report = repair(shards, str(tmp_path / "b/x"), root=root, decode=4)
    assert report["made_by"]["fetched"] == 0 and causes(sorted(map(str, (tmp_path / "b").glob("*.tar")))) == {}
    assert quarantined(tmp_path / "b/x") == [("v0%2Emp4", "undecodable")]


@pytest.mark.parametrize("now", ["not a video", "folder", "gone"])
def test_one_bad_file_below_the_root_ends_no_repair(media, tmp_path, now):  # noqa: F811
    """Its sample is listed, and the others are mended."""
    root = tmp_path / "media"
    root.mkdir()
    for name in ("v0.mp4", "v1.mp4", "v2.mp4"):
        (root / name).write_bytes((media / name).read_bytes())
    if now == "not a video":
        (root / "v0.mp4").write_bytes(b"no film" * 1000)
    rows = [{"question_id": v, "video": f"{v}.mp4", "question": "?", "answer": "!"} for v in ("v0", "v1", "v2")]
    (root / "a.json").write_text(json.dumps(rows))
    shards = packed(root, tmp_path / "a", settings=Settings(probe=False))
    for number, row in enumerate(sets.ShardSet([shards[0]]).index(0).samples()):
        member = dict(row.members)["mp4"]
        if number < 2:  # v0 and v1
            raw = bytearray(Path(shards[0]).read_bytes())
            raw[member.offset + 40] ^= 255
            Path(shards[0]).write_bytes(raw)
    if now != "not a video":
        (root / "v0.mp4").unlink()
    if now == "folder":
        (root / "v0.mp4").mkdir()
    report = repair(shards, str(tmp_path / "b/x"), root=root, decode=4)
    assert report["made_by"]["fetched"] == 1 and report["totals"]["samples"] == 2
    assert [key for key, _ in quarantined(tmp_path / "b/x")] == ["v0%2Emp4"]
