"""Broken and hostile files for every reader of this package: damaged seeds in, one line of error or a sound value out.

    python tests/fuzz.py --seconds 600 [TARGET ...]     looks for new ones; `make fuzz` does that with each target

A target takes the bytes of a file. It may return, or raise an `LstpError` of one line; whatever else is a fault.
Bytes come from sound seeds whose JSON values are replaced by odd ones, whose headers lie, or whose bytes are moved. An
input that fails is written, as small as hypothesis can make it, to tests/fuzz_cases/<target>/;
`tests/host/test_fuzz.py` runs those files and a few new inputs in each run of the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import io
import json
import logging
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from lavis_lstp.errors import LstpError, ShardError

CASES = Path(__file__).resolve().parent / "fuzz_cases"
QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}

DEEP = json.loads("[" * 40 + "]" * 40)
ODD = [None, True, False, 0, 1, -1, 7, 2**31, 2**63, -(2**63), 2**64, 10**400, 0.5, -0.0, 1e308, -1e308, 5e-324]
ODD += [float("nan"), float("inf"), float("-inf"), "", " ", "x", "0", "1e999", "..", "../x", "/etc/passwd", "a\0b"]
ODD += ["\ud800", "\u2028", "\x1b[2J", "${oc.env:HOME}", "pipe:true", "</script>", [], {}, [None], [[]], {"": None}]
ODD += [[0, 1], [0, 1e999], [1, 0], [0, 10**400], [float("nan"), 1.0], ["a", "b"], [True, False], {"a": {}}, DEEP]
INTEGERS = [0, 1, -1, 7, 511, 512, 2**31, 2**32, 2**40, 2**60, 2**63 - 1, 2**63, 2**64 - 1]


# ---- inputs ---------------------------------------------------------------------------------------------------------


@st.composite
def changed(draw: Any, seeds: Sequence[Any]) -> Any:
    """A JSON value with one to three places that are odd, gone, doubled, or another place's."""
    value = json.loads(json.dumps(draw(st.sampled_from(seeds))))
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(value))
        if not places:
            return draw(st.sampled_from(ODD))
        holder, key = draw(st.sampled_from(places))
        what = draw(st.sampled_from(("odd", "odd", "odd", "drop", "add", "move")))
        if what == "drop":
            del holder[key]
        elif what == "add" and isinstance(holder, dict):
            holder[draw(st.sampled_from(["x", "", "__proto__", "format", "version", key]))] = draw(_ODD)
        elif what == "move":
            other, name = draw(st.sampled_from(places))
            holder[key] = json.loads(json.dumps(other[name]))
        else:
            holder[key] = draw(_ODD)
    return value


_ODD = st.sampled_from(ODD).map(lambda value: json.loads(json.dumps(value)))


def _places(value: Any) -> Any:
    """(container, key) of everything inside."""
    for key, one in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(one, (dict, list)):
            yield from _places(one)


@st.composite
def damaged(draw: Any, seeds: Sequence[bytes]) -> bytes:
    """Bytes of a seed, of which pieces are replaced, cut out, doubled, or made large numbers."""
    raw = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(raw) - 1)))
        what = draw(st.sampled_from(("byte", "cut", "drop", "double", "integer", "text")))
        if what == "byte":
            raw[at : at + 1] = draw(st.binary(min_size=1, max_size=4))
        elif what == "cut":
            del raw[at:]
        elif what == "drop":
            del raw[at : at + draw(st.integers(1, 600))]
        elif what == "double":
            raw[at:at] = raw[at : at + draw(st.integers(1, 600))]
        elif what == "integer":
            number = draw(st.sampled_from(INTEGERS)) % 2**64
            raw[at : at + 8] = number.to_bytes(8, draw(st.sampled_from(("little", "big"))))
        else:
            raw[at : at + 4] = draw(
                st.sampled_from([b"NaN ", b"1e999", b'"\\ud800"', b"null", b"[[", b"\xff\xfe", b"\0"])
            )
    return bytes(raw)


def json_files(*seeds: Any, lines: bool = False) -> st.SearchStrategy[bytes]:
    """A JSON file; with `lines` each row of a list on a line of its own."""

    def dump(value: Any) -> bytes:
        rows = value if lines and isinstance(value, list) else [value]
        return b"".join(json.dumps(row).encode() + b"\n" for row in rows)

    return st.one_of(changed(seeds).map(dump), changed(seeds).map(dump), damaged([dump(one) for one in seeds]))


def tensor_files(*seeds: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file: its header's values are odd, or bytes are."""

    def parts(raw: bytes) -> tuple[Any, bytes]:
        size = int.from_bytes(raw[:8], "little")
        return json.loads(raw[8 : 8 + size]), raw[8 + size :]

    def join(pair: tuple[Any, bytes]) -> bytes:
        head = json.dumps(pair[0]).encode()
        return len(head).to_bytes(8, "little") + head + pair[1]

    with_odd_headers = [
        st.tuples(changed([header]), st.one_of(st.just(body), damaged([body]))) for header, body in map(parts, seeds)
    ]
    with_odd_values = [st.tuples(st.just(header), _odd_floats(body)) for header, body in map(parts, seeds)]
    return st.one_of(*(one.map(join) for one in (*with_odd_headers, *with_odd_values)), damaged(seeds))


@st.composite
def _odd_floats(draw: Any, body: bytes) -> bytes:
    """One place of the tensors' bytes is NaN, infinite or very large, as one of the types of floats."""
    raw = bytearray(body)
    kind = draw(st.sampled_from((np.float16, np.float32, np.float64)))
    value = np.array(draw(st.sampled_from((np.nan, np.inf, -np.inf, 6e4, -1.0)))).astype(kind).tobytes()
    at = draw(st.integers(0, max(0, len(raw) // len(value) - 1))) * len(value)
    raw[at : at + len(value)] = value
    return bytes(raw)


@st.composite
def tars(draw: Any) -> bytes:
    """Members of a tar whose headers lie, with check sums that are right."""
    from lavis_lstp.data.shards.tar import END

    raw = b""
    for name, content in draw(st.sampled_from(_tar_members())):
        head = bytearray(_header(name, len(content)))
        if draw(st.integers(0, 2)) == 0:
            at, size = draw(st.sampled_from([(0, 100), (124, 12), (156, 1), (157, 100), (345, 155)]))
            odd = [b"\0", b"5", b"L", b"x", b"g", b"1", b"2", b"S", b"7" * size, b"../x", b"a.mp4", b"\xff" * size]
            odd += [b"\x80" + bytes(size - 9) + (n % 2**64).to_bytes(8, "big") for n in INTEGERS if size == 12]
            head[at : at + size] = draw(st.sampled_from(odd)).ljust(size, b"\0")[:size]
            head[148:156] = b"%06o\0 " % (sum(head[:148]) + sum(head[156:]) + 8 * 32)
        raw += bytes(head) + content + bytes(-len(content) % 512)
    raw += draw(st.sampled_from([END, END, END[:512], b"", END + b"x", bytes(10240)]))
    return draw(damaged([raw])) if draw(st.booleans()) else raw


def _header(name: str, size: int) -> bytes:
    from lavis_lstp.data.shards.tar import header

    return header(name, size)[:512]


# ---- seeds ----------------------------------------------------------------------------------------------------------


def _sample(number: int = 0, **more: Any) -> dict[str, Any]:
    from lavis_lstp.data.shards.format import SAMPLE_FORMAT

    rows = [{"question_id": f"q{number}", "question": "what?", "answer": "that", "span_s": [0.0, 1.5], "category": "x"}]
    rows.append({"question_id": f"r{number}", "question": "a or b?", "answer": "a", "options": ["a", "b"]})
    turns = [{"from": "human", "value": "<video>\nwhat?"}, {"from": "gpt", "value": "that"}]
    rows.append({"question_id": f"s{number}", "conversations": turns})
    value = {"format": SAMPLE_FORMAT, "version": 1, "kind": "video", "video_id": "v", "source": f"v{number}.mp4"}
    return value | {
        "sha256": hashlib.sha256(b"film").hexdigest(),
        "fps": 25.0,
        "duration_s": 2.0,
        "questions": rows,
        **more,
    }


@functools.lru_cache(maxsize=1)
def _tar_members() -> list[list[tuple[str, bytes]]]:
    from lavis_lstp.data.shards.format import dump_json

    one = [("v0%2Emp4.mp4", b"film"), ("v0%2Emp4.json", dump_json(_sample()))]
    two = [("v1%2Emp4.mp4", b"film"), ("v1%2Emp4.json", dump_json(_sample(1)))]
    return [one, one + two, [("x" * 200 + ".mp4", b"film"), *one], [("v0%2Emp4.flow", b"1" * 700)], []]


@functools.lru_cache(maxsize=1)
def _stored() -> dict[str, bytes]:
    """index, flow, frames and a flow file as this package writes them."""
    from safetensors.numpy import save

    from lavis_lstp.data.shards import index
    from lavis_lstp.data.shards.format import StoredFrames, dump_flow, dump_frames, sorted_header
    from lavis_lstp.data.shards.tar import Member

    found = []
    for n in range(2):
        members = {
            "mp4": Member(f"v{n}%2Emp4.mp4", 512, 4, bytes(32)),
            "json": Member(f"v{n}%2Emp4.json", 1536, 9, bytes(32)),
        }
        found.append(index.sample_of(f"v{n}%2Emp4", members, _sample(n)))
    pictures = StoredFrames([b"one", b"second"], np.array([0.0, 0.5]), {"num_frames": "2", "size": "8"})
    folder = StoredFrames([b"one", b"second"], np.array([0.0, 1.0]), {"num_frames": "all", "names": "a.jpg/b.jpg"})
    noise = np.random.default_rng(0).normal(size=(2, 2, 16, 16)).astype(np.float32)
    flow = {"flow": np.ones((2, 2, 4, 4), np.float16)}
    return {
        "index": index.dump(index.build(found, 4096, "plan")),
        "frames": dump_frames(pictures),
        "folder": dump_frames(folder),
        "flow": dump_flow(noise, {"extractor": "dis"}),
        "smooth flow": dump_flow(np.ones((2, 2, 16, 16), np.float32), {"extractor": "dis"}),
        "flow file": sorted_header(save(flow, {"version": "1", "num_frames": "2"})),
    }


ENTRIES = [
    [
        {
            "question_id": "q0",
            "video_id": "v",
            "video": "v.mp4",
            "question": "what?",
            "answer": "that",
            "span_s": [0, 1.5],
        },
        {
            "question_id": "q1",
            "image": "p.jpg",
            "question": "what?",
            "answer": "a",
            "options": ["a", "b"],
            "category": "x",
        },
        {"question_id": "q2", "video": "v.mp4", "question": "what?", "answer": "that", "clip_s": [0.5, 1.0]},
    ]
]
TURNS = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "that"}]
CONVERSATIONS = [[{"id": 1, "image": "a.jpg", "conversations": TURNS}, {"id": "b", "conversations": TURNS}]]
SPANS = {
    "lavis_lstp": {"format": "lavis_lstp.spans", "version": 1, "unit": "frames", "num_frames": 8, "fps": None}
    | {"short_videos": "keep", "spans": {"q0": {"span": [0, 4], "scores": [0.5]}, "q1": {"span": None}}},
    "indices": {"q0": [0, 31], "q1": [3, 4.0]},
    "fractions": {"q0": [0.0, 1.0], "q1": [0.25, 0.5]},
}
LIKELY = {"sum": -1.5, "mean": -0.75, "tokens": 2}
PREDICTIONS = [
    [
        {
            "question_id": f"q{n}",
            "video_id": "v",
            "category": "x",
            "question": "what?",
            "answer": "a",
            "prediction": "a",
        }
        | {
            "prompt": "what?",
            "log_prob": LIKELY,
            "span": [0, 2],
            "span_s": [0.0, 1.0],
            "num_frames": 4,
            "correct": True,
        }
        | {"frame_index": [0, 1], "frame_times": [0.0, 0.5], "gold_span": [1, 3], "entropy": {"start": 1.0, "end": 0.5}}
        | ({"options": ["a", "b"], "choice": "A", "option_log_prob": [LIKELY, LIKELY]} if n else {})
        for n in range(3)
    ]
]
VERDICTS = [
    [
        {"question_id": "q0", "question": "what?", "answer": "a", "prediction": "a", "judge": "m x=1", "pred": "yes"}
        | {"score": 5, "status": "judged", "rule": "equal", "note": {"model": "m", "tokens": [1, 2]}, "video_id": "v"},
        {"question_id": "q1", "question": "who?", "answer": "b", "prediction": "a", "judge": "m x=1"}
        | {"status": "unparsable", "note": {"text": "?"}},
        {
            "question_id": "q2",
            "question": "why?",
            "answer": "b",
            "prediction": "b",
            "judge": "m x=1",
            "pred": "no",
            "score": 0,
        },
    ]
]
MANIFEST = {
    "format": "lavis_lstp.checkpoint",
    "version": 1,
    "config": {
        "run": {"seed": 1, "task": "video_qa"},
        "model": {"arch": "lstp_blip2", "model_type": "tiny", "train": ["sampler"]},
    }
    | {
        "datasets": {"lstp_video_qa": {"num_frames": 8, "build_info": {"annotations": {"test": {"storage": "t.json"}}}}}
    },
    "data": {"train": "digest"},
    "step_samples": 4,
    "versions": {"torch": "2"},
    "cwd": "/nowhere",
    "files": {"model.safetensors": {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}},
}
BEST = {"checkpoint": "step_00000002", "metric": "agg_metrics", "value": 0.5, "epoch": 1, "worse_steps": [3]}
BEST |= {"validated_step": 3}
SHARD = {"name": "x-000000.tar", "bytes": 4096, "digest": "d", "samples": 2, "questions": 6, "kinds": {"video": 2}}
SHARD |= {"members": ["json", "mp4"], "duration_s": 4.0}
SET = {"format": "lavis_lstp.shard_set", "version": 1, "totals": {}, "shards": [SHARD]}
BESIDE = [
    {"test_video_qa_metrics.json": {"num_questions": 3, "coverage": 1.0, "agg_metrics": 0.5}},
    {"../evaluate_manifest.json": MANIFEST},
    {"../table.json": {"rows": [{"name": "result", "title": "the title"}]}},
    {"test_video_qa_timings.jsonl": {"question_id": "q0", "flow": 0.25, "answer": 0.5}},
    {"test_video_qa_missing.jsonl": {"question_id": "q9", "video_id": "v"}},
]


# ---- targets --------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _folder() -> Path:
    made = tempfile.TemporaryDirectory(prefix="fuzz_")
    _folder.keep = made  # gone at the end of the process
    return Path(made.name)


def _file(name: str, raw: bytes) -> Path:
    path = _folder() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    return path


class _Stream(io.BytesIO):
    """Bytes that cannot be sought in, as those of a pipe."""

    def seekable(self) -> bool:
        return False


def tar(raw: bytes) -> None:
    from lavis_lstp.data.shards import index
    from lavis_lstp.data.shards.tar import TarScan, samples

    def read(stream: io.BytesIO) -> Any:
        found = []
        try:
            scan = TarScan(stream, "x.tar")
            for key, group in samples(scan):
                found += [
                    (key, name, bytes(scan.content(1 << 20)) if name == "json" else member) for name, member in group
                ]
        except ShardError as error:
            found.append(error.cause)
        return found

    assert read(io.BytesIO(raw)) == read(_Stream(raw)), "a pipe gives what a file gives"
    path = _file("scan/x-000000.tar", raw)
    made = [index.scan(str(path), quick=quick) for quick in (False, True)]
    for one in made:
        index.parse(index.dump(one), "x")
    assert made[0].keys() == made[1].keys()


def shard_index(raw: bytes) -> None:
    from lavis_lstp.data.shards import index, sets

    found = index.parse(raw, "x.index")
    assert len(found.samples()) == found.num_samples and len(found.question_ids()) == found.num_questions
    for row in range(found.num_questions):
        number, which = found.of_question(row)
        assert found.sample(number).question_ids[which] == found.question_ids()[row]
    json.dumps(sets.shard_entry("x", found), allow_nan=False)


def flow(raw: bytes) -> None:
    from lavis_lstp.data.flow_files import read_flow_file
    from lavis_lstp.data.shards.format import parse_flow

    for read in (lambda: parse_flow(raw, "x.flow")[0], lambda: read_flow_file(_file("x.safetensors", raw))):
        with contextlib.suppress(LstpError):
            found = read()
            assert found.ndim == 4 and found.shape[1] == 2 and found.dtype == np.float16
            assert np.isfinite(found.astype(np.float32)).all()


def frames(raw: bytes) -> None:
    from lavis_lstp.data.shards.format import parse_frames

    found = parse_frames(raw, "x.frames")
    assert len(found.pictures) == len(found.times_s) > 0 and found.times_s.dtype == np.float64
    assert np.isfinite(found.times_s).all()
    assert b"".join(found.pictures) and (not found.folder or len(found.folder) == len(found.pictures))


def spans(raw: bytes) -> None:
    from lavis_lstp.data.spans import SPANS_FORMS, read_spans
    from lavis_lstp.schema import Span

    path = _file("spans.json", raw)
    for form in SPANS_FORMS:
        with contextlib.suppress(LstpError):
            for span in read_spans(path, 8, form=form).values():
                span = span if span is None or isinstance(span, Span) else Span.from_fractions(*span, 8)
                assert span is None or 0 <= span.start < span.end <= 8


def annotations(raw: bytes) -> None:
    from lavis_lstp.data.annotation import read_annotation
    from lavis_lstp.data.instruct import read_instructions
    from lavis_lstp.data.qa_dataset import VideoQADataset
    from webdataset_tools.sources import units

    path = _file("annotation.json", raw)
    for kind in ("image", "video", "text"):
        with contextlib.suppress(LstpError):
            read_instructions([path], kind=kind)
    with contextlib.suppress(LstpError):
        units("annotation", [path], root=_folder())
    entries = read_annotation(path)
    dataset = VideoQADataset(entries, _folder(), num_frames=4, image_size=8, max_bad_fraction=1.0)
    dataset.eval_groups(), dataset.fingerprint(), dataset.batch_settings()
    assert dataset.collater([dataset[n] for n in range(len(dataset))]) is None or len(dataset) > 0


def verdicts(raw: bytes) -> None:
    from lavis_lstp.judging.calibrate import calibrate
    from lavis_lstp.judging.compare import compare, format_comparison, read_judged
    from lavis_lstp.judging.replay import Replay
    from lavis_lstp.judging.verdict import parse_verdict

    assert "\n" not in parse_verdict(raw.decode("utf-8", "replace"), "judge").judge
    path = _file("verdicts.jsonl", raw)
    with contextlib.suppress(LstpError):
        Replay(path)
    with contextlib.suppress(LstpError):
        _check_page(path)
    sound = read_judged(_file("sound.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in VERDICTS[0])))
    found = read_judged(path)
    for a, b in ((sound, found), (found, sound)):
        with contextlib.suppress(LstpError):
            json.dumps(calibrate(a, b, resamples=10), allow_nan=False)
        result = compare(a, b, resamples=10)
        json.dumps(result, allow_nan=False), format_comparison(result)


def predictions(raw: bytes) -> None:
    _check_page(_file("run/result/test_video_qa.jsonl", raw).parent.parent)


def beside(raw: bytes) -> None:
    """{name of a file beside predictions: its content}."""
    out = _folder() / "besides"
    rows = b"".join(json.dumps(row).encode() + b"\n" for row in PREDICTIONS[0])
    _file("besides/result/test_video_qa.jsonl", rows)
    for one in BESIDE:
        (out / "result" / next(iter(one))).unlink(missing_ok=True)
    with contextlib.suppress(ValueError, RecursionError, AttributeError):
        for name, content in json.loads(raw).items():
            if any(name in one for one in BESIDE):
                _file(f"besides/result/{name}", json.dumps(content).encode() + b"\n")
    _check_page(out)


def _check_page(out: Path) -> None:
    """The report of a folder is a page whose JSON every browser reads."""
    from lavis_lstp.commands.report import report

    page, said = report([out], _folder() / "report.html", pictures=1)
    text = page.read_text(encoding="utf-8")
    for data in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.S):
        json.loads(data, parse_constant=_no_constant)
    assert said


def result(raw: bytes) -> None:
    """A result file beside the predictions that it is about."""
    from lavis_lstp.report.result import differences

    wrong, count = differences(_file("board/result.json", raw))
    assert count and all(isinstance(line, str) for line in wrong)


def _result() -> dict[str, Any]:
    from lavis_lstp.report.evaluations import read_evaluation
    from lavis_lstp.report.numbers import summary
    from lavis_lstp.report.result import result_of

    one = read_evaluation(
        _file("board/test_video_qa.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in PREDICTIONS[0]))
    )
    one.resamples = 10
    return json.loads(json.dumps(result_of(one, summary(one))))


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def shard_set(raw: bytes) -> None:
    from lavis_lstp.data.shards import sets
    from lavis_lstp.data.shards.questions import ShardQuestions

    _file("set/x-000000.index", _stored()["index"])
    _file("set/x-000000.tar", b"")
    _file("set/x.manifest.json", raw)
    found = sets.ShardSet([str(_folder() / "set/x-000000.tar")])
    assert isinstance(found.digest(), str) and len(found) >= 0 and found.kinds()
    questions = ShardQuestions([str(_folder() / "set/x-000000.tar")])
    for number in range(min(len(questions), 10)):
        questions.question_id(number)


def checkpoint(raw: bytes) -> None:
    """{"best.json": ..., "manifest.json": ...} of a run with one checkpoint."""
    from lavis_lstp.runners import resume
    from lavis_lstp.runners.checkpoint import CheckpointStore, read_manifest

    folder = _folder() / "run_of" / "checkpoints"
    _file("run_of/checkpoints/step_00000002/model.safetensors", b"")
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        content = raw.decode("latin-1")
    for name, place in (("best.json", ""), ("manifest.json", "step_00000002/")):
        value = content.get(name) if isinstance(content, dict) else content
        _file(f"run_of/checkpoints/{place}{name}", json.dumps(value).encode())
    store = CheckpointStore(folder)
    store.complete(), store.latest()
    for use in (store.best, lambda: resume.to_evaluate(store, "auto")):
        with contextlib.suppress(LstpError):
            use()
    saved = read_manifest(folder / "step_00000002")
    resume.check(saved, json.loads(json.dumps(MANIFEST)), "x")


SUBTITLES = (
    b"1\n00:00:01,000 --> 00:00:02,500\n<i>one</i> {\\an8}\n\n2\n00:00:03,000 --> 00:00:04,000\ntwo\n",
    b"WEBVTT\n\nNOTE x\n\nname\n00:01.000 --> 00:02.000 align:start\n<v B>one <00:01.500>two\n\n"
    b"00:03.000 --> 00:04.000\nx\n",
)
TIMED = ([{"start": "00:00:01.000", "end": "00:00:02", "line": "a"}], [{"timestamp": [0.5, None], "text": "b"}])


def subtitles(raw: bytes) -> None:
    from lavis_lstp.data.subtitles import read_subtitles

    for name in ("x.srt", "x.vtt", "x.json"):
        with contextlib.suppress(LstpError):
            for start, end, text in read_subtitles(_file(name, raw)):
                assert 0 <= start <= end and text and not set("<>\x1b\n\u202e\ud800") & set(text)
    read_subtitles(_file("x.srt" if b"WEBVTT" not in raw else "x.vtt", raw))


TARGETS: dict[str, tuple[Callable[[bytes], None], Callable[[], st.SearchStrategy[bytes]]]] = {
    "tar": (tar, tars),
    "index": (shard_index, lambda: tensor_files(_stored()["index"])),
    "flow": (flow, lambda: tensor_files(*(_stored()[name] for name in ("flow", "smooth flow", "flow file")))),
    "frames": (frames, lambda: tensor_files(_stored()["frames"], _stored()["folder"])),
    "subtitles": (subtitles, lambda: st.one_of(damaged(SUBTITLES), json_files(*TIMED))),
    "spans": (spans, lambda: json_files(*SPANS.values())),
    "annotations": (
        annotations,
        lambda: st.one_of(json_files(*ENTRIES, *CONVERSATIONS, lines=True), json_files(*ENTRIES)),
    ),
    "verdicts": (verdicts, lambda: json_files(*VERDICTS, lines=True)),
    "predictions": (predictions, lambda: json_files(*PREDICTIONS, lines=True)),
    "beside": (beside, lambda: json_files(*BESIDE)),
    "result": (result, lambda: json_files(_result())),
    "set": (shard_set, lambda: json_files(SET)),
    "checkpoint": (checkpoint, lambda: json_files({"best.json": BEST, "manifest.json": MANIFEST})),
}
"""By name: what reads, and the strategy of what is read."""


def attempt(name: str, raw: bytes) -> None:
    """One input; passes where it is read, or refused in one line."""
    logging.disable(logging.CRITICAL)
    try:
        TARGETS[name][0](raw)
    except LstpError as error:
        assert "\n" not in str(error) and str(error), "an error is one line"
    finally:
        logging.disable(logging.NOTSET)


def cases(name: str) -> list[Path]:
    """Inputs that failed once."""
    return sorted((CASES / name).glob("*.bin"))


def hunt(name: str, seconds: float, first_seed: int) -> int:
    """Looks for an input that fails; gives the number of those tried.

    Raises:
        Exception: whatever the target did wrong; the input is then in `cases`.
    """
    tried, last, end = 0, b"", time.monotonic() + seconds
    while time.monotonic() < end:

        @seed(first_seed + tried)
        @settings(max_examples=300, database=None, derandomize=False, **QUIET)
        @given(TARGETS[name][1]())
        def look(raw: bytes) -> None:
            nonlocal tried, last
            tried, last = tried + 1, raw
            attempt(name, raw)

        try:
            look()
        except BaseException:  # kept for the next run, and raised again
            folder = CASES / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{hashlib.sha256(last).hexdigest()[:12]}.bin").write_bytes(last)
            raise
    return tried


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"default: all of {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=float, default=600, help="for each target; default: %(default)s")
    parser.add_argument("--seed", type=int, help="default: another in each call")
    args = parser.parse_args(argv)
    for name in args.targets or TARGETS:
        begin = time.time_ns() % 2**32 if args.seed is None else args.seed
        print(f"{name}: {hunt(name, args.seconds, begin)} inputs, seed {begin}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
