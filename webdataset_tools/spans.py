"""`spans`: attaches the pseudo spans of a file to the samples they belong to, as a parallel set of shards.

In: shards, and a file that `run.task: pseudo_span` wrote. Out: a `span.json` for each sample, of the same form as the
file, with who made it, and the spans of its questions alone. A question without a span in the file is counted, and an
error with --strict. `reshard --join` puts the spans into the samples.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lavis_lstp.data.annotation import parse, read_text
from lavis_lstp.data.shards import sets
from lavis_lstp.data.shards.format import dump_json
from lavis_lstp.data.shards.storage import expand
from lavis_lstp.data.spans import SPANS_FORMAT, SPANS_VERSION, read_spans
from lavis_lstp.errors import AnnotationError
from lavis_lstp.files import sha256_file
from lavis_lstp.jobs import how
from webdataset_tools.derive import derive

HELP = "attach pseudo spans as a parallel set"


@functools.lru_cache(maxsize=1)
def _file(path: str) -> dict[str, Any]:
    return parse(read_text(Path(path)), Path(path), "file")


def sample_spans(value: Mapping[str, Any], read: Callable[..., dict], name: str, path: str) -> bytes:
    """The `span.json` member of a sample."""
    content = _file(path)
    ids = [row["question_id"] for row in value["questions"]] if value["kind"] == "video" else []
    found = {question: content["spans"][question] for question in ids if question in content["spans"]}
    return dump_json({**content, "spans": found})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "example: python -m webdataset_tools spans 'train-{000000..000123}.tar' --spans spans.json --out spans/train\n"
        "then:    datasets.<name>: {spans: shards, shards: {spans: 'spans/train-{000000..000123}.tar'}}"
    )
    parser.add_argument("shards", nargs="+", help="paths or addresses of shards, braces allowed")
    parser.add_argument("--spans", required=True, help="file written by run.task=pseudo_span")
    parser.add_argument("--out", required=True, help="path and name of the parallel set")
    parser.add_argument("--strict", action="store_true", help="every question about a video must have a span")
    parser.add_argument("--overwrite", action="store_true", help="replace a set of other input")


def run(args: argparse.Namespace) -> dict[str, Any]:
    path = Path(args.spans)
    content = parse(read_text(path, section="--spans"), path, "file")
    header = content if isinstance(content, dict) else {}
    if (header.get("format"), header.get("version")) != (SPANS_FORMAT, SPANS_VERSION):
        raise AnnotationError(f"{path}: expected format {SPANS_FORMAT!r} version {SPANS_VERSION}")
    header = {name: value for name, value in header.items() if name != "spans"}
    frames = {"fps": header.get("fps"), "short_videos": header.get("short_videos", "keep")}
    read_spans(path, header.get("num_frames"), section="--spans", **frames)  # says what is wrong with a span
    shards = expand(args.shards)
    found = sets.ShardSet(shards)
    samples = [sample for n in range(len(shards)) for sample in found.index(n).samples() if sample.kind == "video"]
    ids = [question for sample in samples for question in sample.question_ids]
    without = [question for question in ids if question not in content["spans"]]
    if len(without) == len(ids) or (without and args.strict):
        raise AnnotationError(f"{path}: no span for {len(without)} of {len(ids)} questions, first {without[:1]}")
    about = {"made_by": {"verb": "spans", "file_sha256": sha256_file(path), **header, "without": len(without)}}
    return derive(
        shards, args.out, "span.json", sample_spans, str(path.resolve()), about, overwrite=args.overwrite, **how(args)
    )


def show(report: dict[str, Any], args: argparse.Namespace) -> str:
    return (
        f"{args.out}: spans of {report['totals']['samples']} samples; {report['made_by']['without']} questions without"
    )
