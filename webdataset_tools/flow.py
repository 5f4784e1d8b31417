"""`flow`: computes optical flow once, into a parallel set of shards, for `datasets.<name>.flow: precomputed`.

Flow lies between the frames that a data set with the same num_frames and image_size reads, at their size, in at most
1/50 of the bytes of the published float32 files (8 kB a frame of 224 x 224; `flow_code` tells how). Pictures and texts
do not move and get zeros. A killed run continues; `reshard --join` puts the flow into the samples.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lavis_lstp.data.pictures import DEFAULT_MAX_MEGAPIXELS, open_picture
from lavis_lstp.data.shards.format import VIDEO_MEMBERS, dump_flow, parse_frames
from lavis_lstp.data.shards.storage import expand
from lavis_lstp.data.video.reading import FLOW_PAIRS, read_frames, read_pairs
from lavis_lstp.errors import ConfigError, ShardError
from lavis_lstp.files import sha256_file
from lavis_lstp.jobs import how
from webdataset_tools.derive import derive
from webdataset_tools.pack import above_zero, add_area_argument, positive

HELP = "compute optical flow into a parallel set"
EXTRACTORS = ("dis", "raft_large", "raft_small", "motion_vectors")


@dataclass(frozen=True)
class Settings:
    """How flow is computed; `weights` of RAFT are told by their SHA-256 in what is written."""

    extractor: str = "dis"
    num_frames: int = 32
    fps: float | None = None
    size: int = 224
    weights: str | None = None
    device: str = "cpu"
    pairs_at_once: int = 8
    max_megapixels: float = DEFAULT_MAX_MEGAPIXELS
    flow_pairs: str = "sampled"

    def about(self) -> dict[str, str]:
        """What decides the result, as texts."""
        others = ("device", "pairs_at_once", "max_megapixels")
        others += ("flow_pairs",) if self.flow_pairs == "sampled" else ()  # as sets were written that know no others
        facts = {name: value for name, value in asdict(self).items() if name not in others}
        facts["weights"] = sha256_file(self.weights) if self.weights else None
        return {name: str(value) for name, value in facts.items()}


@functools.lru_cache(maxsize=1)
def _extractor(settings: Settings) -> Any:
    from lavis_lstp.models.where.flow import build_flow

    options = {"weights": settings.weights, "pairs_at_once": settings.pairs_at_once}
    return build_flow(settings.extractor, **options).to(settings.device).eval()


_about = functools.lru_cache(maxsize=1)(Settings.about)  # RAFT's weights are hashed once


def sample_flow(value: Mapping[str, Any], read: Callable[..., dict], name: str, settings: Settings) -> bytes:
    """The `flow` member of a sample."""
    import torch

    about = _about(settings)
    if value["kind"] != "video":
        still = np.zeros((1 if value["kind"] == "image" else 0, 2, settings.size, settings.size))
        return dump_flow(still, about)
    content = read("frames", *VIDEO_MEMBERS)
    if "frames" in content:
        frames = _stored(content["frames"], name, settings)
    elif len(content) != 1:
        raise ShardError(f"{name}: expected one video, it has {', '.join(content) or 'none'}", "missing member")
    else:
        (member,) = content
        chosen = {"num": settings.num_frames, "fps": settings.fps, "size": settings.size}
        chosen |= {"max_megapixels": settings.max_megapixels, "name": f"{name}.{member}"}
        if settings.extractor == "motion_vectors":
            video = read_frames(content[member], motion_vectors=True, flow_pairs=settings.flow_pairs, **chosen)
            return dump_flow(video.flow, about)
        if settings.flow_pairs == "local":
            pairs = torch.from_numpy(read_pairs(content[member], **chosen))
            fields = [_extractor(settings)(pair[None].to(settings.device))[0, 0] for pair in pairs]
            return dump_flow(torch.stack(fields).cpu().numpy(), about)
        frames = read_frames(content[member], **chosen).frames
    flow = _extractor(settings)(torch.from_numpy(frames)[None].to(settings.device))
    return dump_flow(flow[0].cpu().numpy(), about)


def _stored(raw: bytes, name: str, settings: Settings) -> np.ndarray:
    """uint8 [T,3,H,W] of stored frames, or of a folder of pictures."""
    stored = parse_frames(raw, f"{name}.frames")
    if settings.flow_pairs == "local":
        raise ConfigError(f"{name}: stored frames have no next picture of a video; choose --flow-pairs sampled")
    if settings.extractor == "motion_vectors":
        raise ConfigError(f"{name}: stored frames have no motion vectors; choose another --flow")
    if stored.folder:
        chosen = {"num": settings.num_frames, "fps": settings.fps, "size": settings.size}
        chosen["max_megapixels"] = settings.max_megapixels
        return read_frames(list(stored.pictures), **chosen, name=f"{name}.frames").frames
    for key in ("num_frames", "fps", "size"):
        if stored.settings.get(key) != str(getattr(settings, key)):
            option = f"--{key.replace('_', '-')}"
            raise ConfigError(
                f"{name}: its frames were stored with {key} {stored.settings.get(key)}, {option} is "
                f"{getattr(settings, key)}; set it alike"
            )
    named = ((picture, f"{name}.frames, {number}") for number, picture in enumerate(stored.pictures))
    pictures = [np.asarray(open_picture(*picture, max_megapixels=settings.max_megapixels)) for picture in named]
    return np.ascontiguousarray(np.stack(pictures).transpose(0, 3, 1, 2))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "example: python -m webdataset_tools flow 'train-{000000..000123}.tar' --out flow/train --flow raft_large\n"
        "then:    datasets.<name>: {flow: precomputed, shards: {flow: 'flow/train-{000000..000123}.tar'}}"
    )
    parser.add_argument("shards", nargs="+", help="paths or addresses of shards, braces allowed")
    parser.add_argument("--out", required=True, help="path and name of the parallel set")
    parser.add_argument("--flow", choices=EXTRACTORS, default="dis", help="default: dis")
    parser.add_argument("--num-frames", type=positive, default=32, help="as datasets.<name>.num_frames; default: 32")
    parser.add_argument("--fps", type=above_zero, help="as datasets.<name>.fps")
    parser.add_argument("--size", type=positive, default=224, help="px, side of the frames compared; default: 224")
    pairs = "from a frame to the next one read (sampled) or to the next picture of the file (local); default: sampled"
    parser.add_argument("--flow-pairs", default="sampled", choices=FLOW_PAIRS, help=pairs)
    parser.add_argument("--weights", help="RAFT's weights; default: torchvision's file in torch's cache")
    parser.add_argument("--device", default="cpu", help="for RAFT: cpu, cuda; default: cpu")
    parser.add_argument("--pairs-at-once", type=positive, default=8, help="RAFT's batch; default: 8")
    add_area_argument(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a set of other input or settings")


def run(args: argparse.Namespace) -> dict[str, Any]:
    chosen = (args.flow, args.num_frames, args.fps, args.size, args.weights, args.device, args.pairs_at_once)
    settings = Settings(*chosen, args.max_megapixels, args.flow_pairs)
    if settings.weights and not settings.extractor.startswith("raft"):
        raise ConfigError(f"--weights: flow '{settings.extractor}' has none")
    if settings.extractor != "motion_vectors":
        _extractor(settings)  # says now what is missing
    about = {"made_by": {"verb": "flow", **settings.about()}}
    return derive(
        expand(args.shards), args.out, "flow", sample_flow, settings, about, overwrite=args.overwrite, **how(args)
    )


def show(report: dict[str, Any], args: argparse.Namespace) -> str:
    totals = report["totals"]
    return f"{args.out}: flow of {totals['samples']} samples, {totals['bytes'] / 1e6:.1f} MB"
