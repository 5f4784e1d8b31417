"""What storing flow in shards does to the sampler: logits of stored flow against those of the flow as it was computed.

    python benchmarks/stored_flow.py FOLDER [--checkpoint RUN --train-steps 300 --raft-large]

In: a folder of videos (here: two real clips); Shapes-QA clips and a textured picture in picture are generated. Flow by
DIS medium, motion vectors, and RAFT with random weights (8 frames of 32, as it takes long). Samplers: the full-size one
from three seeds; a small one at 224 px, trained here on spans of other Shapes-QA clips; with --checkpoint the one of a
tiny run. Each reads the flow in px, the full-size ones also normalised as in published training. Out: a table in
Markdown; a pair is one clip with one question, and has a start and an end.

Beside the stored form stands what was stored before: fp16 means over 8 x 8 px, interpolated.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from video_files import moving_texture, write_video

from lavis_lstp.data.shapes.shapes_qa import generate
from lavis_lstp.data.shards.format import PUBLISHED_FLOW, dump_flow, parse_flow
from lavis_lstp.data.video.reading import read_frames
from lavis_lstp.models.answer.tiny_tokenizer import tiny_tokenizer
from lavis_lstp.models.where.flow import UNINITIALISED, build_flow, radius_normalised, resize_flow
from lavis_lstp.models.where.temporal_sampler import TemporalSampler, span_loss

QUESTIONS = ("what colour is the shape that shakes?", "which shape moves left?", "how many shapes turn?")


class Reader(NamedTuple):
    """A sampler and how it reads: flow [1,T,2,H,W], question -> start and end logits [2,T]."""

    name: str
    size: int
    logits: Callable[[Tensor, str], Tensor]


def logits_of(sampler: TemporalSampler, change: Callable[[Tensor], Tensor], mode: str = "fusion"):
    tokens = tiny_tokenizer(bos=False)

    def logits(flow: Tensor, question: str) -> Tensor:
        text = torch.tensor([tokens(question)["input_ids"]])
        with torch.no_grad():
            field = change(resize_flow(flow, (sampler.flow_size, sampler.flow_size)))
            found = sampler(field, torch.ones(field.shape[:2]), text, torch.ones(text.shape), mode)
        return torch.cat([found.start_logits, found.end_logits])

    return logits


def full_size(seeds: int) -> Iterator[Reader]:
    for seed in range(seeds):
        torch.manual_seed(seed)
        sampler = TemporalSampler(fold_flow=True).eval()
        yield Reader("full size, random, px", 224, logits_of(sampler, lambda field: field))
        yield Reader("full size, random, normalised", 224, logits_of(sampler, radius_normalised))


def trained(root: Path, steps: int) -> Reader:
    """A small sampler at 224 px that has learned where things happen in Shapes-QA, by DIS."""
    rows = json.loads((root / "train.json").read_text())
    tokens, extract = tiny_tokenizer(bos=False), build_flow("dis")
    flow, spans = {}, []
    for row in rows:
        clip = read_frames(root / row["video"], num=32, size=224)
        if row["video"] not in flow:
            flow[row["video"]] = extract(torch.from_numpy(clip.frames)[None])[0].half()
        start, end = (int(np.searchsorted(clip.times_s, one)) for one in row["span_s"])
        spans.append((start, max(end, start + 1)))
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_layers": 4, "num_heads": 4, "intermediate_size": 128, "text_width": 64}
    sampler = TemporalSampler(**sizes, vocab_size=len(tokens), max_positions=160, fusion_layer=2, fold_flow=True)
    optimizer = torch.optim.AdamW(sampler.parameters(), lr=2e-3, weight_decay=0.05)
    generator = np.random.default_rng(0)
    for step in range(steps):
        chosen = generator.choice(len(rows), 16, replace=False)
        text = tokens([rows[n]["question"] for n in chosen], padding=True, return_tensors="pt")
        batch = torch.stack([flow[rows[n]["video"]] for n in chosen]).float()
        mask = torch.ones(batch.shape[:2])
        found = sampler(batch, mask, text["input_ids"], text["attention_mask"], "multi_modal")
        loss = span_loss(found.start_logits, found.end_logits, torch.tensor([spans[n] for n in chosen]), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: span loss {loss:.3f} (knowing nothing: {np.log(32):.3f})", file=sys.stderr, flush=True)
    name = f"small, trained {steps} steps, px"
    return Reader(name, 224, logits_of(sampler.eval(), lambda field: field, "multi_modal"))


def of_run(checkpoint: str) -> Reader:
    from lavis_lstp.inference.loading import build_model

    sampler = build_model("lstp_tiny", None, checkpoint, [])[0].sampler.eval()
    return Reader("tiny, trained run, 64 px", 64, logits_of(sampler, lambda field: field, "multi_modal"))


def clips(folder: Path, root: Path, count: int) -> dict[str, tuple[Path, list[str]]]:
    """Name -> video and the questions asked about it."""
    found = {path.stem: (path, list(QUESTIONS)) for path in sorted(folder.glob("*.mp4"))}
    rows = json.loads((root / "test.json").read_text())
    for video in list(dict.fromkeys(row["video"] for row in rows))[:count]:
        asked = [row["question"] for row in rows if row["video"] == video]
        found[f"shapes {Path(video).stem}"] = (root / video, asked[:3])
    for seed in range(4):
        ground = moving_texture(48, (1.5 + seed, -1.0), 320, 240, seed=seed)
        things = moving_texture(48, (-2.0, 1.0 + seed), 120, 80, seed=seed + 10)
        pictures = []
        for n, (picture, thing) in enumerate(zip(ground, things, strict=True)):
            left, top = 20 + (3 + seed) * n % 170, 30 + 2 * n
            picture[top : top + 80, left : left + 120] = thing
            pictures.append(picture)
        path = write_video(root / f"texture{seed}.mp4", pictures, fps=12)
        found[path.stem] = (path, list(QUESTIONS))
    return found


def computed(path: Path, name: str, size: int) -> Tensor:
    """float32 [1,T,2,size,size]."""
    if name == "motion vectors":
        return torch.from_numpy(read_frames(path, num=32, size=size, motion_vectors=True).flow)[None]
    raft = name.startswith("RAFT")
    frames = torch.from_numpy(read_frames(path, num=8 if raft else 32, size=size).frames)[None]
    torch.manual_seed(0)
    if raft:
        return build_flow(name.replace("RAFT ", "raft_"), weights=UNINITIALISED, iterations=12)(frames)
    return build_flow("dis")(frames)


def stored(flow: Tensor) -> tuple[Tensor, int]:
    raw = dump_flow(flow[0].numpy(), {})
    return torch.from_numpy(parse_flow(raw, "stored")[0]).float()[None], len(raw)


def means(flow: Tensor) -> tuple[Tensor, int]:
    """What version 1 of the format stored."""
    side = flow.shape[-1] // 8
    small = resize_flow(flow, (side, side))
    scale = small.abs().max().clamp(min=1e-9)
    return resize_flow((small / scale).half().float() * scale, flow.shape[-2:]), small.numel() * 2


FORMS = {"as stored": stored, "fp16 means of 8 x 8 px": means}


def measure(readers: list[Reader], chosen: dict[str, Any], raft: list[str]) -> tuple[dict, dict]:
    """Per (form, extractor, sampler): differences and equal arg maxes; per (form, extractor, size): bytes a field."""
    differences, size_of = defaultdict(list), defaultdict(list)
    for number, (clip, (path, questions)) in enumerate(chosen.items()):
        extractors = ["DIS", "motion vectors", *(raft if number % 3 == 0 else [])]
        for extractor in extractors:
            for size in sorted({reader.size for reader in readers}):
                flow = computed(path, extractor, size)
                back = {form: form_of(flow) for form, form_of in FORMS.items()}
                for form, (_, count) in back.items():
                    size_of[form, extractor, size].append(count / flow.shape[1])
                for reader in readers:
                    for question in questions if reader.size == size else ():
                        wanted = reader.logits(flow, question)
                        for form, (field, _) in back.items():
                            found = reader.logits(field, question)
                            same = (found.argmax(1) == wanted.argmax(1)).sum().item()
                            seen = ((found - wanted).abs().max().item(), same, wanted.std(1).mean().item())
                            differences[form, extractor, reader.name].append(seen)
        print(f"{clip} done", file=sys.stderr, flush=True)
    return differences, size_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="a folder of real clips, .mp4")
    parser.add_argument("--checkpoint", help="a run of lstp_tiny with a trained sampler")
    parser.add_argument("--train-steps", type=int, default=300, help="of the small sampler; 0 = leave it out")
    parser.add_argument("--shapes", type=int, default=12, help="Shapes-QA clips")
    parser.add_argument("--seeds", type=int, default=3, help="full-size samplers")
    parser.add_argument("--raft-large", action="store_true", help="RAFT large, too: 1.5 s a pair on a core")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        generate(root, train_videos=80, val_videos=1, test_videos=args.shapes, train_images=1, size=96)
        readers = list(full_size(args.seeds))
        readers += [trained(root, args.train_steps)] if args.train_steps else []
        readers += [of_run(args.checkpoint)] if args.checkpoint else []
        raft = ["RAFT small", *(["RAFT large"] if args.raft_large else [])]
        differences, size_of = measure(readers, clips(args.folder, root, args.shapes), raft)
    print(f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores\n")
    print("| flow | sampler | pairs | same arg max | difference of a logit: median, largest | deviation |")
    print("|---|---|---|---|---|---|")
    for (form, extractor, reader), seen in sorted(differences.items()):
        worst, same, deviation = (np.array(column) for column in zip(*seen, strict=True))
        equal = f"{int(same.sum())} of {2 * len(same)}"
        values = f"{np.median(worst):.4f}, {worst.max():.4f} | {np.median(deviation):.2f}"
        print(f"| {extractor}, {form} | {reader} | {len(seen)} | {equal} | {values} |")
    print("\n| flow | bytes a field: mean, largest of a clip | published over it |\n|---|---|---|")
    for (form, extractor, size), counts in sorted(size_of.items()):
        share = PUBLISHED_FLOW / np.array(counts)
        line = f"{np.mean(counts):.0f}, {np.max(counts):.0f} | {share.mean():.0f}, at least {share.min():.1f}"
        print(f"| {extractor}, {form}, {size} px | {line} |")


if __name__ == "__main__":
    main()
