"""Keys, members, tars and indexes: what is written is read back, and what is damaged is named with its cause."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_lstp.data.shards import flow_code, index, sets, storage
from lavis_lstp.data.shards import format as fmt
from lavis_lstp.data.shards.tar import END, ShardWriter, TarScan, header, samples
from lavis_lstp.errors import ConfigError, ShardError

DIGEST = "0" * 64


def sample(number: int = 0, **changes) -> dict:
    value = {
        "format": fmt.SAMPLE_FORMAT,
        "version": fmt.VERSION,
        "kind": "video",
        "video_id": f"v{number}",
        "source": f"v{number}.mp4",
        "sha256": DIGEST,
        "fps": 25.0,
        "duration_s": 2.0,
        "questions": [{"question_id": f"q{number}", "question": "what?", "answer": "that"}],
    }
    return {name: entry for name, entry in (value | changes).items() if entry is not None}


def write_shard(path, numbers=range(3), questions: int = 1, content: bytes = b"film") -> index.ShardIndex:
    """A shard of samples whose videos are the text `content` and their number."""
    found = []
    with ShardWriter(path) as shard:
        for n in numbers:
            rows = [{"question_id": f"q{n}-{k}", "question": f"what {k}?", "answer": "that"} for k in range(questions)]
            value = sample(n, questions=rows)
            placed = shard.add(
                fmt.media_key("video", f"v{n}.mp4"), {"json": fmt.dump_json(value), "mp4": content + b"%d" % n}
            )
            found.append(index.sample_of(shard.samples[-1][0], placed, value))
    made = index.build(found, path.stat().st_size)
    index.write(made, path)
    return made


def raw_tar(*members: tuple[str, bytes], end: bytes = END) -> bytes:
    return b"".join(header(name, len(data)) + data + bytes(-len(data) % 512) for name, data in members) + end


def read_all(raw: bytes) -> list[tuple[str, dict[str, bytes]]]:
    scan = TarScan(io.BytesIO(raw), "x.tar")
    return [(key, {name: scan.content() for name, _ in group}) for key, group in samples(scan)]


# ---------------------------------------------------------------- keys


@given(st.text(min_size=1, max_size=60))
def test_escaping_is_reversible_and_safe(name):
    try:
        key = fmt.escape(name)
    except ShardError:
        assert any(0xD800 <= ord(c) <= 0xDFFF for c in name)  # half a character, which no file system holds
        return
    assert fmt.unescape(key) == name
    assert not set(key) & set("./\\ \0:") and key.isascii()


@given(st.text(min_size=1, max_size=20))
def test_what_unescapes_is_what_escape_writes(key):
    """No two keys stand for one name."""
    try:
        name = fmt.unescape(key)
    except ShardError:
        return
    assert fmt.escape(name) == key


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "%", "%4", "%41", "%2e", "%FF", "ä", "a b", "..", "a" * 2000])
def test_other_keys_are_refused(key):
    with pytest.raises(ShardError) as caught:
        fmt.unescape(key)
    assert caught.value.cause == "unsafe name"


@pytest.mark.parametrize("name", ["/etc/passwd", "../a.mp4", "a/../../b.mp4", "", ".", "a\0b", "C:\\a.mp4", "C:a.mp4"])
def test_paths_that_lead_out_are_refused(name):
    with pytest.raises(ShardError, match="not a relative path"):
        fmt.media_path(name)


def test_no_medium_and_no_text_share_a_key():
    assert fmt.media_key("video", "./a//b.mp4") == fmt.media_key("video", "a/b.mp4") == "a%2Fb%2Emp4"
    names = [("video", "a.mp4"), ("video", "a.mov"), ("image", "a.jpg"), ("text", "a.mp4"), ("text", "a")]
    assert len({fmt.media_key(*name) for name in names}) == len(names)


# ---------------------------------------------------------------- members


def test_frames_and_flow_are_read_back():
    frames = fmt.StoredFrames([b"one", b"three", b"4"], np.array([0, 0.5, 1.7]), {"num_frames": "3", "size": "8"})
    found = fmt.parse_frames(fmt.dump_frames(frames), "x")
    assert list(found.pictures) == list(frames.pictures) and found.settings == frames.settings
    assert found.times_s.tolist() == frames.times_s.tolist()
    flow = np.random.default_rng(0).normal(0, 1, (4, 2, 5, 6))
    back, about = fmt.parse_flow(fmt.dump_flow(flow, {"extractor": "dis"}), "x")
    assert about == {"extractor": "dis"} and back.dtype == np.float16
    np.testing.assert_allclose(back, flow, rtol=1e-3, atol=1.1 / 512)  # half of a step of 1/256 of its RMS
    still, _ = fmt.parse_flow(fmt.dump_flow(np.zeros((2, 2, 3, 3)), {}), "x")
    assert not still.any()


def test_large_flow_does_not_overflow():
    flow = np.full((1, 2, 2, 2), 6e4)
    np.testing.assert_allclose(fmt.parse_flow(fmt.dump_flow(flow, {}), "x")[0], flow, rtol=1e-6)
    for wrong in (7e4, np.nan):
        with pytest.raises(ShardError, match="expected finite px"):
            fmt.dump_flow(np.full((1, 2, 2, 2), wrong), {})


@pytest.mark.parametrize("step", [np.nan, np.inf, -1.0])
def test_flow_with_steps_that_are_no_length_is_refused(step):
    coded = flow_code.encode(np.ones((2, 2, 8, 8)), 1 << 20)
    flow_code.decode(coded)
    coded.steps[1] = step
    with pytest.raises(ValueError, match="finite steps"):
        flow_code.decode(coded)


def test_a_few_bytes_of_flow_cannot_take_all_memory(monkeypatch):
    form = flow_code.Form(8192, 8192, "corners", False)
    with pytest.raises(ValueError, match="5 fields of 8192 x 8192 px are more than"):
        flow_code.decode(flow_code.Coded(b"", np.ones(5, np.float32), form))
    monkeypatch.setattr(flow_code, "LARGEST_CLIP", 4 * 8 * 8)
    fmt.dump_flow(np.ones((1, 2, 8, 8)), {})
    with pytest.raises(ShardError, match=r"\[2, 2, 8, 8\] takes more than"):
        fmt.dump_flow(np.ones((2, 2, 8, 8)), {})


@given(st.dictionaries(st.text("abcdef_", min_size=1, max_size=5), st.text(max_size=5), max_size=6))
@settings(max_examples=20)
def test_equal_flow_is_equal_bytes(about):
    flow = np.ones((1, 2, 2, 2))
    assert fmt.dump_flow(flow, about) == fmt.dump_flow(flow, dict(reversed(about.items())))


@pytest.mark.parametrize("damage", [b"", b"\0" * 40, b"\xff" * 40, b"{}"])
def test_frames_and_flow_that_are_damaged(damage):
    for parse, cause in ((fmt.parse_frames, "frames"), (fmt.parse_flow, "flow")):
        with pytest.raises(ShardError) as caught:
            parse(damage, "x")
        assert caught.value.cause == cause
    with pytest.raises(ShardError, match="expected 'lavis_lstp.frames'"):
        fmt.parse_frames(fmt.dump_flow(np.zeros((1, 2, 2, 2)), {}), "x")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 2}, "version 2"),
        ({"kind": "film"}, "'kind' must be one of"),
        ({"source": "../v0.mp4"}, "not a relative path"),
        ({"source": None}, "'source'"),
        ({"sha256": "abc"}, "'sha256'"),
        ({"fps": "25"}, "'fps'"),
        ({"questions": []}, "'questions'"),
        ({"questions": [{"question": "?", "answer": "!"}]}, "'question_id'"),
        ({"questions": [{"question_id": "q", "question": "?"}]}, "'answer'"),
        ({"questions": [{"question_id": "q", "conversations": ["hello"]}]}, "'conversations'"),
        ({"questions": [{"question_id": "q", "conversations": None}]}, "'conversations'"),
        ({"questions": [{"question_id": "q", "conversations": [{"from": "human"}]}]}, "here, question 0.*'value'"),
        ({"questions": [{"question_id": "q", "conversations": [{"from": "gpt", "value": "a"}]}]}, "no turn of 'human'"),
        ({"questions": [{"question_id": "q", "question": "?", "answer": "!"}] * 2}, "occurs twice"),
        ({"questions": [{"question_id": "q", "question": "?", "answer": "!", "span_s": [2, 1]}]}, "'span_s'"),
    ],
)
def test_a_json_of_another_form_is_refused(changes, said):
    fmt.check_sample(sample(), "here", "v0%2Emp4")
    with pytest.raises(ShardError, match=said):
        fmt.check_sample(sample(**changes), "here", "v0%2Emp4")


def test_a_key_must_be_that_of_the_source():
    with pytest.raises(ShardError, match="not that of its source"):
        fmt.check_sample(sample(0), "here", "v1%2Emp4")


# ---------------------------------------------------------------- tars


def test_equal_samples_are_equal_bytes_and_others_read_them(tmp_path):
    write_shard(tmp_path / "a-000000.tar")
    write_shard(tmp_path / "b-000000.tar")
    raw = (tmp_path / "a-000000.tar").read_bytes()
    assert raw == (tmp_path / "b-000000.tar").read_bytes()
    with tarfile.open(tmp_path / "a-000000.tar") as tar:
        assert [m.name for m in tar][:2] == ["v0%2Emp4.mp4", "v0%2Emp4.json"]
        assert {(m.mtime, m.uid, m.mode) for m in tar} == {(0, 0, 0o444)}
    import webdataset

    found = list(webdataset.WebDataset(str(tmp_path / "a-000000.tar"), shardshuffle=False, empty_check=False))
    assert [(one["__key__"], one["mp4"]) for one in found] == [(f"v{n}%2Emp4", b"film%d" % n) for n in range(3)]
    assert [key for key, _ in read_all(raw)] == [one["__key__"] for one in found]


def test_a_long_key_is_read_back(tmp_path):
    key = fmt.escape("ä" * 100)
    with ShardWriter(tmp_path / "x.tar") as shard:
        shard.add(key, {"json": b"{}", "mp4": b"film"})
    raw = (tmp_path / "x.tar").read_bytes()
    assert read_all(raw) == [(key, {"mp4": b"film", "json": b"{}"})]
    with tarfile.open(tmp_path / "x.tar") as tar:
        assert tar.getnames() == [f"{key}.mp4", f"{key}.json"]
    place = shard.samples[0][1][0]
    assert raw[place.offset :][: place.size] == b"film"


def test_the_writer_refuses_names_and_leaves_nothing(tmp_path):
    for key, member in (("a.b", "mp4"), ("a/b", "mp4"), ("a", "exe")):
        with pytest.raises(ShardError), ShardWriter(tmp_path / "x.tar") as shard:
            shard.add(key, {member: b""})
    assert not list(tmp_path.iterdir())


def pax(name: str, data: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo(name)
        info.size, info.mtime = len(data), -1.5  # before 1970, which only pax can write
        tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def test_other_writers_tars_are_read():
    long = "k" * 150 + ".json"
    assert read_all(pax(long, b"{}")) == [("k" * 150, {"json": b"{}"})]


def linked(kind: bytes) -> bytes:
    info = tarfile.TarInfo("a.json")
    info.type, info.linkname = kind, "../../etc/passwd"
    return info.tobuf() + END


def bad_name() -> bytes:
    return tarfile.TarInfo("a\udcff.json").tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + END


GOOD = raw_tar(("a.mp4", b"film" * 300), ("a.json", b"{}"), ("b.json", b"{}"))


@pytest.mark.parametrize(
    ("raw", "cause"),
    [
        (b"", "empty"),
        (b"\x1f\x8b" + bytes(range(200)) * 4, "magic"),
        (b"not a tar" * 100, "magic"),
        (GOOD[:100], "truncated"),
        (GOOD[:1000], "truncated"),  # inside a member
        (GOOD[: 512 + 1536], "truncated"),  # between two members
        (GOOD[:-512], "truncated"),
        (GOOD[: 512 + 1536] + b"x" * 512 + GOOD[512 + 1536 + 512 :], "header"),
        (raw_tar(("a.json", b"1"), ("a.json", b"2")), "duplicate member"),
        (raw_tar(("a.exe", b"1")), "unknown member"),
        (raw_tar(("../a.json", b"1")), "unsafe name"),
        (raw_tar(("/a.json", b"1")), "unsafe name"),
        (linked(tarfile.SYMTYPE), "link"),
        (linked(tarfile.LNKTYPE), "link"),
        (linked(tarfile.CHRTYPE), "file type"),
        (bad_name(), "unsafe name"),
    ],
)
def test_a_damaged_tar_is_named_with_its_cause(raw, cause):
    with pytest.raises(ShardError) as caught:
        read_all(raw)
    assert caught.value.cause == cause and "x.tar" in str(caught.value)


def test_cuts_anywhere_are_noticed():
    for size in range(0, len(GOOD), 64):
        with pytest.raises(ShardError):
            read_all(GOOD[:size])
    assert len(read_all(GOOD)) == 2


def test_a_json_of_100_mb_is_not_read(tmp_path):
    path = tmp_path / "x.tar"
    with open(path, "wb") as file:
        file.write(header("a.json", 100 << 20))
        file.truncate(512 + (100 << 20))
        file.seek(0, 2)
        file.write(END)
    with pytest.raises(ShardError) as caught:
        index.scan(str(path))
    assert caught.value.cause == "json too large"


# ---------------------------------------------------------------- indexes


def test_each_question_is_found_by_number(tmp_path):
    for shard, numbers in enumerate([range(3), range(3, 4), range(4, 9)]):
        write_shard(tmp_path / f"x-{shard:06d}.tar", numbers, questions=2)
    found = sets.ShardSet(storage.expand(str(tmp_path / "x-{000000..000002}.tar")))
    ids = [f"q{n}-{k}" for n in range(9) for k in range(2)]
    assert len(found) == 18 and found.question_ids() == ids and found.kinds() == {"video"}
    for number, name in enumerate(ids):
        shard, one, row = found.locate(number)
        assert found.read_json(shard, one)["questions"][row]["question_id"] == name
        assert found.read(shard, one, ("mp4", "flow")) == {"mp4": b"film%d" % (number // 2)}


def test_a_scan_gives_what_the_writer_gave(tmp_path):
    made = write_shard(tmp_path / "x-000000.tar", questions=3)
    found = index.scan(str(tmp_path / "x-000000.tar"))
    assert found.samples() == made.samples()
    assert (found.bytes, found.digest) == (made.bytes, made.digest)
    assert hashlib.sha256(b"film1").digest() == found.members(1)["mp4"].sha256


def test_a_set_without_indexes_is_the_same(tmp_path):
    write_shard(tmp_path / "x-000000.tar", range(2))
    with_index = sets.ShardSet([str(tmp_path / "x-000000.tar")])
    (tmp_path / "x-000000.index").unlink()
    without = sets.ShardSet([str(tmp_path / "x-000000.tar")])
    assert without.question_ids() == with_index.question_ids() and without.digest() == with_index.digest()


def test_changed_bytes_are_noticed(tmp_path):
    path = tmp_path / "x-000000.tar"
    place = write_shard(path).members(1)["mp4"]
    raw = bytearray(path.read_bytes())
    raw[place.offset] ^= 1
    path.write_bytes(raw)
    found = sets.ShardSet([str(path)])
    with pytest.raises(ShardError) as caught:
        found.read(0, 1, ("mp4",))
    assert caught.value.cause == "hash" and "v1%2Emp4.mp4" in str(caught.value)
    path.write_bytes(raw[: place.offset + 2])
    with pytest.raises(ShardError) as caught:
        found.read(0, 1, ("mp4",))
    assert caught.value.cause == "truncated"


@pytest.mark.parametrize("raw", [b"", b"{}", b"\xff" * 100])
def test_a_damaged_index_is_an_error(tmp_path, raw):
    write_shard(tmp_path / "x-000000.tar")
    (tmp_path / "x-000000.index").write_bytes(raw)
    with pytest.raises(ShardError, match="x-000000.index"):
        sets.ShardSet([str(tmp_path / "x-000000.tar")])


DAMAGE = {
    "a column is gone": lambda columns: columns.pop("member_size"),
    "another type": lambda columns: columns.update(member_size=columns["member_size"].astype("float32")),
    "too short": lambda columns: columns.update(sample_kind=columns["sample_kind"][:-1]),
    "negative": lambda columns: columns["member_offset"].__setitem__(0, -1),
    "falls": lambda columns: columns["sample_member_end"].__setitem__(0, 10**6),
    "past its end": lambda columns: columns["key_end"].__setitem__(-1, 10**6),
    "inside a letter": lambda columns: (
        columns["question_id"].__setitem__(slice(0, 2), (0xC3, 0xA9)) or columns["question_id_end"].__setitem__(0, 1)
    ),
    "no name": lambda columns: columns["member_name"].__setitem__(0, 200),
    "not UTF-8": lambda columns: columns["key"].__setitem__(0, 0xFF),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_columns_of_an_index_that_do_not_go_together(tmp_path, damage):
    write_shard(tmp_path / "x-000000.tar")
    path = tmp_path / "x-000000.index"
    whole = index.parse(path.read_bytes(), "x")
    columns = {name: np.array(column) for name, column in whole._columns.items()}
    DAMAGE[damage](columns)
    index.write(index.ShardIndex(columns, whole.facts), tmp_path / "x-000000.tar")
    with pytest.raises(ShardError, match="a damaged index") as caught:
        index.parse(path.read_bytes(), "x")
    assert caught.value.cause == "index"


@pytest.mark.parametrize("entry", [7, {"name": "x-000000.tar"}])
def test_a_manifest_whose_lines_are_not_of_the_form(tmp_path, entry):
    path = tmp_path / "x.manifest.json"
    content = {"format": sets.MANIFEST_FORMAT, "version": index.VERSION, "shards": [entry]}
    path.write_text(json.dumps(content))
    with pytest.raises(ShardError, match="x.manifest.json: .*(must be an object|says not all)") as caught:
        sets.ShardSet([str(tmp_path / "x-000000.tar")])
    assert caught.value.cause == "index"


def test_an_index_is_the_same_in_each_process(tmp_path):
    """Hash maps are ordered differently in each process."""
    code = (
        "import sys; sys.path[:0] = ['tests', 'tests/shards']; from test_wds_format import *; import pathlib;"
        "write_shard(pathlib.Path(sys.argv[1]) / 'x-000000.tar')"
    )
    seen = set()
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        environment = {"PYTHONHASHSEED": str(number), "PATH": "/usr/bin:/bin"}
        subprocess.run([sys.executable, "-c", code, str(folder)], check=True, env=environment)
        seen.add((folder / "x-000000.index").read_bytes())
    assert len(seen) == 1


def test_what_is_no_tar_is_not_read_as_its_own_manifest(tmp_path):
    (tmp_path / "v.mp4").write_bytes(b"\0\0\0\x20ftypisom" * 100)
    with pytest.raises(ShardError, match="v.mp4: no tar header at byte 0"):
        sets.ShardSet([str(tmp_path / "v.mp4")])


def test_a_manifest_spares_the_indexes(tmp_path):
    made = [write_shard(tmp_path / f"x-{n:06d}.tar", range(n, n + 1)) for n in range(2)]
    path, content = sets.write_manifest(
        tmp_path / "x-000000.tar", [sets.shard_entry(f"x-{n:06d}.tar", one) for n, one in enumerate(made)], {}
    )
    assert path.name == "x.manifest.json" and content["totals"]["questions"] == 2
    (tmp_path / "x-000001.index").write_bytes(b"damaged")
    found = sets.ShardSet(storage.expand(str(tmp_path / "x-{000000..000001}.tar")))
    assert len(found) == 2 and found.locate(0) == (0, 0, 0)
    path.write_text(json.dumps(content | {"version": 9}))
    with pytest.raises(ShardError, match="version 9"):
        sets.ShardSet([str(tmp_path / "x-000000.tar")])


# ---------------------------------------------------------------- storages


def test_braces_and_lists():
    assert storage.expand("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert storage.expand(["a.tar", "b-{0..1}.tar"]) == ["a.tar", "b-0.tar", "b-1.tar"]
    assert storage.expand("pipe:cat a-{0..1}.tar") == ["pipe:cat a-0.tar", "pipe:cat a-1.tar"]


@pytest.mark.parametrize("wrong", ["", [], None, 7, [""], "a-{0..99999999}.tar", ["a.tar", "a.tar"], "a-{0..1"])
def test_storages_that_cannot_be_meant(wrong):
    with pytest.raises(ConfigError):
        storage.expand(wrong)
