"""One training step and one answer at full size, with random weights: python benchmarks/full_size.py [--out FILE]

Needs no download: the sizes are those of the published weights (`models/published_sizes.py`), the values are random. By
default the recipe `vicuna_ft` on a CUDA device, in bf16 with gradient checkpointing. Prints JSON: parameters, seconds
and peak memory of building, of a step (the second of two) and of an answer. `--model lstp_tiny --device cpu` tries the
script itself.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from omegaconf import OmegaConf

from lavis_lstp.host import plugin

GIB = 2**30


def build(recipe: str | None, name: str, device: torch.device):
    """The recipe's model, or a named one, with random weights on `device`."""
    from lavis.common.registry import registry

    from lavis_lstp.config import complete_model, find_config
    from lavis_lstp.models.weights.published_sizes import PUBLISHED_SIZES

    given = OmegaConf.load(find_config(recipe)) if recipe else OmegaConf.create({"model": {"arch": name}})
    model_cfg = complete_model(given).model
    if model_cfg.backbone.weights:
        model_cfg.backbone.config = PUBLISHED_SIZES[model_cfg.backbone.weights]
        model_cfg.backbone.gradient_checkpointing = True
    model_cfg.backbone.weights = model_cfg.sampler.weights = model_cfg.sampler.tokenizer = model_cfg.checkpoint = None
    if model_cfg.flow.name.startswith("raft"):
        model_cfg.flow.weights = "checkpoint"
    with device:
        return registry.get_model_class(model_cfg.arch).from_config(model_cfg).to(device)


def batch(model, videos: int, frames: int, device: torch.device) -> dict:
    """Noise in the form of a batch: videos, and one image."""
    size = model.backbone.image_size
    count = videos + 1
    mask = torch.ones(count, frames, dtype=torch.long)
    mask[-1, 1:] = 0
    generator = torch.Generator().manual_seed(0)
    return {
        "frames": torch.randint(0, 256, (count, frames, 3, size, size), dtype=torch.uint8, generator=generator).to(
            device
        ),
        "frame_mask": mask.to(device),
        "text_input": ["what happens after the man opens the door?"] * count,
        "text_output": ["he walks into the room and sits down"] * count,
        "question_id": [str(i) for i in range(count)],
        "video_id": [str(i) for i in range(count)],
        "span": torch.tensor([[0, frames]] * count),
    }


class Meter:
    """Seconds and peak memory of the stages of a run."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stages: dict[str, dict[str, float]] = {}

    @contextmanager
    def stage(self, name: str):
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        # on the CPU the largest so far, of the whole process; Linux counts KiB
        peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.stages[name] = {"seconds": round(seconds, 3), "peak_gib": round(peak / GIB, 2)}


def measure(recipe: str | None, name: str, device: torch.device, *, videos: int, frames: int) -> dict:
    from lavis_lstp.runners.engine import TorchEngine
    from lavis_lstp.runners.record import versions

    meter = Meter(device)
    torch.manual_seed(0)
    with meter.stage("build"):
        model = build(recipe, name, device)
    engine = TorchEngine(model, device=device, precision="bf16", lr=5e-5, max_grad_norm=1.0)
    samples = batch(model, videos, frames, device)
    engine.train_mode()
    losses = []
    for attempt in ("first_step", "step"):  # the first one allocates and picks kernels
        with meter.stage(attempt):
            found = engine.accumulate(lambda m: m(samples), weight=1.0, last=True)
            engine.clip()
            engine.step()
        losses.append(round(found["loss"].item(), 4))
    model.eval()
    with meter.stage("answer"), torch.autocast(device.type, dtype=torch.bfloat16):
        answers = model.answer(samples, max_new_tokens=16)["prediction"]
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "model": recipe or name,
        "samples": len(answers),
        "frames": frames,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": model.trained_parts(),
        "losses": losses,
        "stages": meter.stages,
        "versions": versions(),
    }


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--recipe", default="projects/lstp/vicuna_ft.yaml")
    chosen.add_argument("--model", help="a model's name instead of a recipe")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--videos", type=int, default=1)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(argv)
    plugin.register()
    recipe = None if args.model else args.recipe
    result = measure(recipe, args.model or "", torch.device(args.device), videos=args.videos, frames=args.frames)
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
