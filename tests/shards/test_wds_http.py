"""Shards over HTTP from a server that fails: nothing is lost, nothing comes twice, and what stays away is named."""

from __future__ import annotations

import contextlib
import http.server
import pickle
import random
import re
import threading
import time
from pathlib import Path

import pytest
from test_wds_format import write_shard
from test_wds_loader import COMMON, assert_same, of_files
from test_wds_verify import media, packed  # noqa: F401 (a fixture)

from lavis_lstp.data.qa_dataset import VideoQADataset
from lavis_lstp.data.shards import index, sets, storage
from lavis_lstp.data.shards import questions as shards_module
from lavis_lstp.data.shards.questions import ShardQuestions
from lavis_lstp.errors import ConfigError, ShardError
from lavis_lstp.files import write_json
from webdataset_tools.__main__ import main
from webdataset_tools.pack import Settings
from webdataset_tools.verify import verify

QUICK = storage.Retry(attempts=12, wait_s=0.001, timeout_s=0.2)


class Server(http.server.ThreadingHTTPServer):
    """Files of a folder, with ranges; a share of the requests fails in one of four ways.

    Attributes:
        served: (path, first byte, how) of each request.
        sent: bytes of all answers.
    """

    daemon_threads = True

    def __init__(self, root: Path, failing=0.0, ranges=True, always=None, ways=("503", "break", "cut", "stall")):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.failing, self.ranges, self.always = root, failing, ranges, always or {}
        self.ways, self.sent = ways, 0
        self.chance, self.served = random.Random(7), []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """Connections that the client gave up are what these tests are about."""


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, name = self.server, self.path.partition("?")[0].lstrip("/")
        path = server.root / name
        if name in server.always or not path.is_file():
            return self.send_error(server.always.get(name, 404))
        with server.lock:
            failing = server.chance.random() < server.failing
            how = server.chance.choice(server.ways) if failing else "fine"
        raw, first = path.read_bytes(), 0
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and server.ranges:
            first = int(asked[1])
            if first >= len(raw):
                return self.send_error(416)
        last = int(asked[2]) if asked and server.ranges and asked[2] else len(raw) - 1
        body = raw[first : last + 1]
        with server.lock:
            server.served.append((name, first, how))
            server.sent += len(body)
        if how == "503":
            return self.send_error(503)
        if how == "break":
            return self.connection.close()
        self.send_response(206 if asked and server.ranges else 200)
        self.send_header("Content-Length", str(len(body)))
        if asked and server.ranges:
            self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(raw)}")
        self.end_headers()
        self.wfile.write(body if how == "fine" else body[: len(body) // 2])
        if how == "stall":
            self.wfile.flush()
            time.sleep(0.5)


@contextlib.contextmanager
def serving(root: Path, kind: type[Server] = Server, **options):
    server = kind(root, **options)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def locations(server, shards) -> list[str]:
    return [f"{server.url}/{Path(shard).name}" for shard in shards]


@pytest.mark.parametrize("failing", [0.0, 0.3])
def test_every_sample_comes_once_and_whole(media, tmp_path, failing):  # noqa: F811
    shards = packed(media, tmp_path, max_count=1)
    files = of_files(media)
    with serving(tmp_path, failing=failing) as server:
        questions = ShardQuestions(locations(server, shards), retry=QUICK)
        dataset = VideoQADataset(questions, **COMMON)
        for _ in range(3):
            for number in range(len(files)):
                assert_same(dataset[number], files[number])
            questions._kept.clear()
    assert not dataset.left_out.by_cause() and dataset.question_ids() == files.question_ids()
    if failing:
        failed = [how for *_, how in server.served if how != "fine"]
        assert len(failed) > 5 and {"503", "cut"} & set(failed)


def test_a_sample_is_one_request_of_its_bytes(media, tmp_path):  # noqa: F811
    shards = packed(media, tmp_path)
    with serving(tmp_path) as server:
        dataset = VideoQADataset(ShardQuestions(locations(server, shards), retry=QUICK), **COMMON)
        dataset[2]  # the index comes with the first sample
        server.served.clear()
        dataset[1]
        place = sets.ShardSet(shards).index(0).members(1)["mp4"]
        assert server.served == [("x-000000.tar", place.offset, "fine")]


def test_a_stream_goes_on_where_it_broke(media, tmp_path):  # noqa: F811
    (shard,) = packed(media, tmp_path)
    with serving(tmp_path, failing=0.6, ways=("cut", "503")) as server:
        patient = storage.Retry(attempts=30, wait_s=0.001, timeout_s=0.2)
        with storage.open_stream(f"{server.url}/x-000000.tar", patient) as stream:
            assert stream.read() == Path(shard).read_bytes()
        assert len({first for _, first, _ in server.served}) > 1
        report = verify([f"{server.url}/x-000000.tar"], decode=0, retry=patient)
        assert not report["failed"] and report["samples"] == 4


def test_a_set_without_indexes_is_scanned(media, tmp_path):  # noqa: F811
    shards = packed(media, tmp_path, max_count=2)
    for path in [*tmp_path.glob("*.index"), *tmp_path.glob("*.json")]:
        path.unlink()
    with serving(tmp_path, failing=0.2) as server:
        dataset = VideoQADataset(ShardQuestions(locations(server, shards), retry=QUICK), **COMMON)
        assert_same(dataset[3], of_files(media)[3])


@pytest.fixture
def bulky(tmp_path) -> list[str]:
    """Two shards of six samples of 400 kB, without indexes."""
    for number in range(2):
        write_shard(tmp_path / f"x-{number:06d}.tar", range(6 * number, 6 * number + 6), content=b"film " * 80_000)
        (tmp_path / f"x-{number:06d}.index").unlink()
    return sorted(map(str, tmp_path.glob("*.tar")))


def read_whole(questions: ShardQuestions) -> list[tuple[str, bytes]]:
    rows = list(questions)
    return [(row["question_id"], questions.medium(questions.place(row))[0]) for row in rows]


@pytest.mark.parametrize("failing", [0.0, 0.3])
def test_the_first_sample_of_a_set_without_indexes_needs_little_of_it(bulky, tmp_path, failing):
    total = sum(Path(shard).stat().st_size for shard in bulky)
    with serving(tmp_path, failing=failing, ways=("503", "break", "cut")) as server:
        questions = ShardQuestions(locations(server, bulky), retry=QUICK)
        assert len(questions) == 12 and questions[0]["question_id"] == "q0-0"
        assert server.sent < (0.3 if not failing else 0.6) * total
        assert read_whole(questions) == read_whole(ShardQuestions(bulky))
        server.served.clear()
        again = pickle.loads(pickle.dumps(questions))  # what a loader process starts from
        assert again[7]["question_id"] == "q7-0"
        assert len([name for name, *_ in server.served if name.endswith(".tar")]) == 1


def test_a_server_without_ranges_is_copied_where_a_folder_is_named(bulky, tmp_path):
    with serving(tmp_path, ranges=False) as server:
        with pytest.raises(ShardError, match="a folder named in its shards.cache"):
            ShardQuestions(locations(server, bulky), retry=QUICK)[0]
        server.served.clear()
        for _ in range(2):
            questions = ShardQuestions(locations(server, bulky), retry=QUICK, cache=tmp_path / "cache")
            assert read_whole(questions) == read_whole(ShardQuestions(bulky))
        whole = [name for name, *_ in server.served if name.endswith(".tar")]
        assert len(list((tmp_path / "cache").glob("*.tar"))) == 2 and len(whole) == 4  # asked twice, two copied once


def test_parallel_sets_are_copied_too(media, tmp_path):  # noqa: F811
    """Flow and spans on a server without ranges, or out of a pipe: `shards.cache` is for them as for the media."""
    [shard] = packed(media, tmp_path)
    flow, spans, cache = tmp_path / "f-000000.tar", tmp_path / "s-000000.tar", tmp_path / "cache"
    made = {key: {"span": [0, 2]} for key in ShardQuestions(shard).video_question_ids()}
    form = {"format": "lavis_lstp.spans", "version": 1, "unit": "frames", "num_frames": 4, "made_by": {}}
    write_json(tmp_path / "spans.json", {**form, "fps": None, "short_videos": "keep", "spans": made})
    assert main(["flow", shard, "--out", str(tmp_path / "f"), "--num-frames", "4", "--size", "32"]) == 0
    assert main(["spans", shard, "--out", str(tmp_path / "s"), "--spans", str(tmp_path / "spans.json")]) == 0
    local = ShardQuestions(shard, flow=str(flow))
    with serving(tmp_path, ranges=False) as server:
        for of_flow, of_spans in (locations(server, [flow, spans]), (f"pipe:cat {flow}", f"pipe:cat {spans}")):
            there = ShardQuestions(shard, flow=of_flow, cache=cache, retry=QUICK)
            assert (there.flow((0, 0), 4) == local.flow((0, 0), 4)).all() and there.identity() == local.identity()
            frames = {"num_frames": 4, "fps": None, "short_videos": "keep"}
            assert there.spans(of_spans, **frames) == local.spans(str(spans), **frames)
    with pytest.raises(ConfigError, match="shards.cache is needed"):
        ShardQuestions(shard, flow=f"pipe:cat {flow}")


def test_processes_that_hear_different_things_of_a_server_do_not_wait_for_each_other(bulky, tmp_path, monkeypatch):
    """All pass the same barrier, whatever they were answered; and a server that refuses is not one without ranges."""
    met = []
    monkeypatch.setattr(shards_module, "first_process_alone", lambda work: (met.append(work), work()))
    for ranges in (True, False):
        with serving(tmp_path, ranges=ranges) as server:
            ShardQuestions(locations(server, bulky), retry=QUICK, cache=tmp_path / f"cache {ranges}")
    assert len(met) == 2
    names = {Path(shard).name: 403 for shard in bulky}
    with serving(tmp_path, always=names) as server, pytest.raises(ShardError, match="403"):
        storage.knows_ranges(locations(server, bulky)[0], QUICK)


def test_scans_agree(media, tmp_path, caplog):  # noqa: F811
    """Headers and JSON give the index that reading everything gives: places, counts, and a video's SHA-256."""
    shards = packed(media, tmp_path, max_count=2)
    memory = pytest.importorskip("fsspec").filesystem("memory")
    memory.pipe("/scans/x-000000.tar", Path(shards[0]).read_bytes())
    with serving(tmp_path) as server:
        for place in (shards[0], f"{server.url}/x-000000.tar", "memory://scans/x-000000.tar", f"pipe:cat {shards[0]}"):
            assert index.scan(place, QUICK, quick=True).samples() == index.scan(shards[0]).samples()
    stored = packed(media, tmp_path / "frames", settings=Settings(frames=2, size=16))
    (tmp_path / "frames/x-000000.index").unlink()
    (tmp_path / "frames/x.manifest.json").unlink()
    assert index.scan(stored[0], quick=True).members(0)["frames"].sha256 == index.UNKNOWN
    assert "no index" not in caplog.text
    dataset = VideoQADataset(ShardQuestions(stored), num_frames=2, image_size=16)
    assert len(dataset[0]["frames"]) == 2
    assert "x-000000.tar: no index, so frames cannot be compared with a SHA-256" in caplog.text
    damaged = bytearray(Path(shards[0]).read_bytes())
    damaged[index.scan(shards[0]).members(0)["mp4"].offset + 700] ^= 1
    (tmp_path / "damaged.tar").write_bytes(damaged)
    with pytest.raises(ShardError, match="SHA-256"):
        ShardQuestions([str(tmp_path / "damaged.tar")])[0]


@pytest.mark.parametrize(("status", "cause"), [(404, "not found"), (403, "refused"), (500, "connection")])
def test_what_stays_away_is_named(media, tmp_path, status, cause):  # noqa: F811
    shards = packed(media, tmp_path, max_count=2)
    with serving(tmp_path, always={"x-000001.tar": status}) as server:
        short = storage.Retry(attempts=3, wait_s=0.001, timeout_s=0.2)
        dataset = VideoQADataset(ShardQuestions(locations(server, shards), retry=short), max_bad_fraction=0.5, **COMMON)
        assert dataset[0] is not None and dataset[2] is None and dataset[3] is None
        assert dataset.left_out.by_cause() == {cause: 2}
        tries = {404: 1, 403: 1, 500: 3}[status]
        with pytest.raises(ShardError) as caught:
            storage.read_at(f"{server.url}/x-000001.tar", 0, 10, short)
        assert caught.value.cause == cause and ("3 times" in str(caught.value)) == (tries == 3)


def test_a_server_that_knows_no_ranges_is_refused(media, tmp_path):  # noqa: F811
    shards = packed(media, tmp_path)
    with serving(tmp_path, ranges=False) as server:
        dataset = VideoQADataset(ShardQuestions(locations(server, shards), retry=QUICK), max_bad_fraction=1, **COMMON)
        assert dataset[0] is None and dataset.left_out.by_cause() == {"no ranges": 1}


def test_no_server_at_all():
    with pytest.raises(ShardError) as caught:
        storage.read_at("http://127.0.0.1:9/x.tar", 0, 1, storage.Retry(attempts=2, wait_s=0.001, timeout_s=0.2))
    assert caught.value.cause == "connection"


def test_waits_double_and_long_ones_are_said(monkeypatch, caplog):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(ShardError):
        storage.read_at("http://127.0.0.1:9/x.tar", 0, 1, storage.Retry(attempts=5, wait_s=1.0, timeout_s=0.2))
    assert len(waits) == 4 and all(2**n <= wait <= 2 * 2**n for n, wait in enumerate(waits))
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [text.split("; ")[1][:12] for text in said] == [f"attempt {n} of" for n in (3, 4, 5)]


def test_what_fsspec_opens(media, tmp_path):  # noqa: F811
    fsspec = pytest.importorskip("fsspec")
    shards = packed(media, tmp_path, max_count=2)
    memory = fsspec.filesystem("memory")
    for path in tmp_path.iterdir():
        memory.pipe(f"/set/{path.name}", path.read_bytes())
    questions = ShardQuestions("memory://set/x-{000000..000001}.tar", retry=QUICK)
    dataset = VideoQADataset(questions, **COMMON)
    assert len(questions) == 4
    assert_same(dataset[3], of_files(media)[3])
    report = verify(["memory://set/x-000000.tar"], decode=0)
    assert report["causes"] == {} and len(shards) == 2
    with pytest.raises(ShardError) as caught:
        ShardQuestions("memory://set/y-000000.tar", retry=QUICK)
    assert caught.value.cause == "not found"


# ---- lengths that lie -----------------------------------------------------------------------------------------------


class Liar(http.server.BaseHTTPRequestHandler):
    """Sends 4 MiB and more, whatever was asked for and whatever it says about it."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        name = self.path.lstrip("/")
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Range", "bytes 0-9/10" if name != "digits" else f"bytes 0-{'9' * 5000}/10")
        length = {"long": str(1 << 50), "digits": "9" * 5000, "odd": "-1", "other": "ten"}.get(name)
        if length is not None:
            self.send_header("Content-Length", length)
        self.end_headers()
        with contextlib.suppress(OSError):  # nobody listens any more
            while True:
                self.wfile.write(bytes(1 << 20))
                if name != "endless":
                    return


def test_a_server_that_lies_about_lengths_takes_no_memory(monkeypatch):
    monkeypatch.setattr(storage, "SMALL_FILE_LIMIT", 4 << 20)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Liar)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    retry = storage.Retry(attempts=1, timeout_s=5)
    try:
        for name in ("long", "endless", "digits", "odd", "other"):
            location = f"http://127.0.0.1:{server.server_port}/{name}"
            with pytest.raises(ShardError) as caught:
                storage.read_at(location, 0, 10, retry)
            assert "the server sends more" in str(caught.value) or name == "digits"
        with pytest.raises(ShardError, match="more than 4194304 bytes"):
            storage.read_all(f"http://127.0.0.1:{server.server_port}/endless", retry)
        with pytest.raises(ShardError, match="1 times"):  # 1 MiB of 2^50
            storage.read_all(f"http://127.0.0.1:{server.server_port}/long", retry)
    finally:
        server.shutdown()
        server.server_close()
