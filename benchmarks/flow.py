"""Milliseconds a pair of each flow extractor, and how well it finds a known motion.

    python benchmarks/flow.py [--size 224] [--threads 1] [--pairs 16] [--raft [--device cuda --at-once 32]]

Frames are a texture that moves by (2, -1) px per frame; RAFT, measured with --raft, has random weights unless
LAVIS_LSTP_RAFT_LARGE and LAVIS_LSTP_RAFT_SMALL name trained ones. Motion vectors are timed as reading the video with
them less reading the same frames without. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from video_files import moving_texture, write_video

from lavis_lstp.data.video.reading import read_frames
from lavis_lstp.models.where.flow import build_flow

VELOCITY = (2.0, -1.0)


def milliseconds(call, pairs: int, repeats: int = 3) -> float:
    """Median over runs, per pair."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times) / pairs


def error_px(flow) -> float:
    """Median distance from the true motion, away from the edges."""
    inside = np.asarray(flow)[:-1, :, 32:-32, 32:-32] - np.float32(VELOCITY)[:, None, None]
    return round(float(np.median(np.hypot(inside[:, 0], inside[:, 1]))), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--raft", action="store_true", help="also RAFT: seconds a pair")
    parser.add_argument("--device", default="cpu", help="for RAFT")
    parser.add_argument("--at-once", type=int, default=1, help="pairs that RAFT is given together; default: 1")
    args = parser.parse_args()
    import cv2

    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)
    pictures = list(moving_texture(args.pairs + 1, VELOCITY, args.size, args.size))
    frames = torch.from_numpy(np.stack([p.transpose(2, 0, 1) for p in pictures]))[None]
    rows = {}
    for preset in ("ultrafast", "fast", "medium"):
        extractor = build_flow("dis", dis_preset=preset)
        spent = milliseconds(lambda e=extractor: e(frames), args.pairs)
        rows[f"dis_{preset}"] = {"ms_per_pair": round(spent, 2), "error_px": error_px(extractor(frames)[0])}
    with tempfile.TemporaryDirectory() as folder:
        path = write_video(Path(folder) / "moving.mp4", pictures)
        every = range(len(pictures))
        plain = milliseconds(lambda: read_frames(path, indices=every), args.pairs)
        with_flow = milliseconds(lambda: read_frames(path, indices=every, motion_vectors=True), args.pairs)
        flow = read_frames(path, indices=every, motion_vectors=True).flow
        rows["motion_vectors"] = {"ms_per_pair": round(with_flow - plain, 2), "error_px": error_px(flow)}
        rows["motion_vectors"]["ms_per_frame_of_reading"] = round(plain, 2)
    for name in ("raft_small", "raft_large") if args.raft else ():
        weights = os.environ.get(f"LAVIS_LSTP_{name.upper()}", "checkpoint")
        extractor = build_flow(name, weights=weights, pairs_at_once=args.at_once).to(args.device)
        clip = frames[:, : min(args.at_once, args.pairs) + 1].to(args.device)
        # its field is read, for which a GPU's work is waited
        spent = milliseconds(lambda e=extractor, c=clip: e(c)[0, 0, 0, 0, 0].item(), clip.shape[1] - 1)
        rows[name] = {"ms_per_pair": round(spent, 1)}
        rows[name]["error_px"] = error_px(extractor(clip)[0].cpu()) if weights != "checkpoint" else "random weights"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "opencv": cv2.__version__}
    settings = {
        "size": args.size,
        "threads": args.threads,
        "pairs": args.pairs,
        "at_once": args.at_once,
        "device": args.device,
        "cores": os.cpu_count(),
    }
    print(json.dumps({"extractors": rows, "settings": settings, "versions": versions}, indent=2))


if __name__ == "__main__":
    main()
