"""`lavis-lstp flow INPUT OUT`: flow of many videos, computed once, for `datasets.<name>.flow: precomputed`.

In: a folder of videos, or an annotation file that names them. Out: `<OUT>/<video_id>.safetensors` for each, with
"flow" float16 [T,2,h,w] in px per frame of its own grid, between the frames that a data set with the same
`num_frames` decodes, and in its metadata how it was made and of which file. Worth it for RAFT, which takes seconds a
pair where training needs milliseconds.

A file appears under its name when it is complete, so the command can be killed and called again: finished videos are
skipped. Videos that fail are listed at the end and the exit status says so; the others are kept.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lavis_lstp.data.annotation import check_object, parse_rows, read_text
from lavis_lstp.data.flow_files import FLOW_FILE_VERSION
from lavis_lstp.data.folder import check_name
from lavis_lstp.data.pictures import DEFAULT_MAX_MEGAPIXELS
from lavis_lstp.data.store import content_digest
from lavis_lstp.data.video.reading import (
    BACKENDS,
    FLOW_PAIRS,
    VIDEO_ENDINGS,
    read_frames,
    read_pairs,
)
from lavis_lstp.errors import AnnotationError, ConfigError, LstpError, VideoError
from lavis_lstp.files import find_path, owned, sha256_file, sorted_header, whole_file
from lavis_lstp.models.weights.hub import local_path, where_to_put
from lavis_lstp.untrusted import why_no_file_name

logger = logging.getLogger(__name__)

EXTRACTORS = ("dis", "raft_large", "raft_small", "motion_vectors")


def find_videos(source: str | os.PathLike, root: str | os.PathLike | None = None) -> dict[str, Path]:
    """Video id -> file. In a folder the id is the name without its ending; an annotation file says `video_id`, `video`.

    Args:
        root: where the annotation's relative paths begin; its own folder if None.

    Raises:
        AnnotationError: no such input, not the documented form, or two files under one id.
    """
    source = Path(source)
    if source.is_dir():
        pairs = _in_folder(source)
    elif source.is_file():
        base = Path(root) if root is not None else source.parent
        pairs = []
        for video_id, video, where in _annotated(source):
            check_name(video, base, where)
            pairs.append((video_id, find_path(base, video), where))
    else:
        raise AnnotationError(f"{source}: no such folder or annotation file")
    found: dict[str, Path] = {}
    for video_id, path, where in pairs:
        if found.setdefault(video_id, path) != path:
            raise AnnotationError(f"{where}: video_id '{video_id}' also belongs to {found[video_id]}")
        if why := why_no_file_name(video_id):
            raise AnnotationError(f"{where}: video_id '{video_id[:80]}' cannot be a file name: it {why}")
    return found


def _annotated(source: Path) -> list[tuple[str, str, str]]:
    """(video_id, video, where it stands) of each row that is about a video, read as data sets read it."""
    rows, others = [], []
    for where, row in parse_rows(read_text(source), source):
        if isinstance(row, dict) and ("image" in row or ("conversations" in row and "video" not in row)):
            others.append(where)
            continue
        check_object(row, where, ("video",), ("video", "video_id"))
        rows.append((row.get("video_id", Path(row["video"]).stem), row["video"], where))
    if others:
        what = "rows are about pictures or texts, which have no flow"
        logger.warning("%s: %d %s; first %s", source, len(others), what, others[0])
    if not rows:
        raise AnnotationError(f"{source}: no row is about a video")
    return rows


def _in_folder(source: Path) -> list[tuple[str, Path, str]]:
    """(id, file, where it stands) of each video; the id is the name without its ending where no other has the same."""
    files = [path for path in sorted(source.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    videos = [path for path in files if path.suffix.lower() in VIDEO_ENDINGS]
    if not videos:
        raise AnnotationError(f"{source}: no video in this folder; looked for {', '.join(VIDEO_ENDINGS)}")
    others = [path.name for path in files if path.suffix.lower() not in VIDEO_ENDINGS]
    if others:
        logger.warning(
            "%s: left out %d files that are no videos by their endings, first %s", source, len(others), others[0]
        )
    stems = Counter((path.parent, path.stem) for path in videos)
    alike = dict.fromkeys(path for path in videos if stems[path.parent, path.stem] > 1)
    if alike:
        logger.warning(
            "%s: %s and others differ by their endings alone; their ids are whole names", source, next(iter(alike)).name
        )
    return [(path.name if path in alike else path.stem, path, str(path)) for path in videos]


def settings_of(args: argparse.Namespace) -> dict[str, str]:
    """What must agree for a finished file to be kept."""
    return {
        "version": str(FLOW_FILE_VERSION),
        "extractor": args.flow,
        "flow_pairs": args.flow_pairs,
        "requested_frames": str(args.num_frames),
        "frame_size": str(args.size),
        "flow_size": str(args.flow_size or args.size),
        "weights": sha256_file(args.weights) if args.weights else "",
    }


def is_finished(target: Path, video: Path, settings: dict[str, str]) -> bool:
    """Whether `target` holds this video's flow, made in this way.

    Raises:
        ConfigError: it was made in another way, or of another file: overwriting hours of work takes a word.
    """
    from safetensors import SafetensorError, safe_open

    if not target.is_file():
        return False
    try:
        with safe_open(target, framework="numpy") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        metadata = {}
    metadata = {"flow_pairs": "sampled"} | metadata  # of files written before there were others
    wanted = settings | {"source_bytes": str(video.stat().st_size) if video.is_file() else ""}
    other = [f"{k} {metadata.get(k)!r}, not {v!r}" for k, v in wanted.items() if metadata.get(k) != v]
    if other:
        raise ConfigError(f"{target}: made with {'; '.join(other)}; name another folder or add --overwrite")
    return True


def video_flow(video: Path, args: argparse.Namespace, extractor: Any) -> np.ndarray:
    """float16 [T,2,h,w] of one video."""
    import torch

    chosen = {"num": args.num_frames, "size": args.size, "backend": args.backend, "threads": args.threads}
    chosen["max_megapixels"] = args.max_megapixels
    if args.flow == "motion_vectors":
        codec = {"motion_vectors": True, "flow_size": args.flow_size, "flow_pairs": args.flow_pairs}
        return read_frames(video, **chosen, **codec).flow.astype(np.float16)
    if args.flow_pairs == "local":
        pairs = torch.from_numpy(read_pairs(video, **chosen))
        fields = [extractor(pair[None].to(args.device))[0, 0] for pair in pairs]
        return torch.stack(fields).cpu().numpy().astype(np.float16)
    frames = torch.from_numpy(read_frames(video, **chosen).frames)[None].to(args.device)
    return extractor(frames)[0].cpu().numpy().astype(np.float16)


def write_flow(target: Path, flow: np.ndarray, metadata: dict[str, str]) -> None:
    """Writes a file that is complete, and on disk, as soon as it has its name; equal flow gives equal bytes."""
    from safetensors.numpy import save

    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as partial:
        partial.write_bytes(sorted_header(save({"flow": np.ascontiguousarray(flow)}, metadata)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lavis-lstp flow", description=__doc__.split("\n\n")[0])
    parser.add_argument("input", help="a folder of videos, or an annotation file (JSON list or JSON lines)")
    parser.add_argument("out", help="folder for <video_id>.safetensors")
    parser.add_argument("--flow", default="dis", choices=EXTRACTORS, help="default: dis")
    parser.add_argument("--weights", help="RAFT's weights; default: torchvision's file in torch's cache")
    parser.add_argument("--num-frames", type=int, default=64, help="as datasets.<name>.num_frames; default: 64")
    parser.add_argument("--size", type=int, default=224, help="px, side of the frames that are compared; default: 224")
    parser.add_argument("--flow-size", type=int, help="px, side of the stored field; default: --size")
    pairs = "from a frame to the next one read (sampled, as published) or to the next picture of the file (local)"
    parser.add_argument("--flow-pairs", default="sampled", choices=FLOW_PAIRS, help=f"{pairs}; default: sampled")
    parser.add_argument("--videos", help="where an annotation's relative paths begin; default: its own folder")
    parser.add_argument("--backend", default="pyav", choices=BACKENDS)
    parser.add_argument("--device", default="cpu", help="for RAFT: cpu, cuda, ...; default: cpu")
    parser.add_argument("--threads", type=int, default=1, help="decoder threads; default: 1")
    parser.add_argument(
        "--max-megapixels", type=float, default=DEFAULT_MAX_MEGAPIXELS, help="as datasets.<name>.max_megapixels"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files made with other settings")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Computes what is missing; 0 when every video has its file.

    Raises:
        LstpError: wrong input or settings, or videos that failed.
    """
    args = _parser().parse_args(argv)
    for name in ("num_frames", "size", "threads"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    if not 0 < args.max_megapixels < float("inf"):
        raise ConfigError(f"--max-megapixels: expected a number greater than 0, got {args.max_megapixels}")
    if args.weights:
        if not args.flow.startswith("raft"):
            raise ConfigError(f"--weights: flow '{args.flow}' has no weights; leave it out")
        found = local_path(args.weights)
        if found is None or not found.is_file():
            raise ConfigError(f"--weights: no such file {args.weights}; {where_to_put(args.weights)}")
        args.weights = str(found)
    videos, out, settings = find_videos(args.input, args.videos), Path(args.out), settings_of(args)
    with owned(out):
        return _write_missing(videos, out, settings, args)


def _write_missing(videos: dict[str, Path], out: Path, settings: dict[str, str], args: argparse.Namespace) -> int:
    from tqdm import tqdm

    targets = {video_id: out / f"{video_id}.safetensors" for video_id in videos}
    if not args.overwrite:
        videos = {i: path for i, path in videos.items() if not is_finished(targets[i], path, settings)}
    extractor = _extractor(args) if videos else None
    failed: list[str] = []
    for video_id, path in tqdm(videos.items(), desc=f"flow {args.flow}", unit="video", disable=None):
        try:
            flow = video_flow(path, args, extractor)
        except VideoError as error:
            failed.append(str(error))
            continue
        source = {"source": path.name, "source_bytes": str(path.stat().st_size), "source_sha256": content_digest(path)}
        write_flow(targets[video_id], flow, settings | source | {"num_frames": str(len(flow))})
    kept = len(targets) - len(videos)
    print(f"{out}: flow of {len(targets) - len(failed)} videos, {kept} of them there already, {len(failed)} failed")
    if failed:
        raise LstpError(f"{len(failed)} of {len(targets)} videos have no flow: {'; '.join(failed[:5])}")
    return 0


def _extractor(args: argparse.Namespace) -> Any:
    import torch

    from lavis_lstp.models.where.flow import build_flow

    try:
        device = torch.device(args.device)
        extractor = build_flow(args.flow, weights=args.weights, flow_size=args.flow_size)
        return extractor.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        if isinstance(error, LstpError):
            raise
        raise ConfigError(f"--device {args.device}: not usable ({str(error).splitlines()[0]})") from None
