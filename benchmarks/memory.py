"""Peak memory of a training step against `lavis-lstp estimate`: python benchmarks/memory.py [RECIPE] [--kind zero1]

Random weights of the published sizes (no download), a batch of the largest samples in bf16, frames chosen evenly, and
four steps by the engine of runner_lstp ("plain") or DeepSpeed at a ZeRO stage. Prints the estimate, what torch
allocated in the last step, and seconds. `--model lstp_tiny --device cpu` tries the script itself, without the memory.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict

import torch
from omegaconf import OmegaConf

from lavis_lstp.host import plugin

GIB = 2**30
KINDS = ("plain", "zero1", "zero2", "zero3")
STEPS = 4


def configuration(recipe: str | None, name: str):
    """A recipe's model, or a named one, without what the estimate leaves out."""
    from lavis_lstp.config import complete_model, find_config

    given = OmegaConf.load(find_config(recipe)) if recipe else OmegaConf.create({"model": {"arch": name}})
    config = complete_model(given).model
    config.selector.name, config.flow.name, config.flow.weights = "uniform", "none", None
    config.backbone.gradient_checkpointing = bool(config.backbone.weights)
    return config


def build(config, device: torch.device):
    from lavis.common.registry import registry

    from lavis_lstp.models.weights.published_sizes import PUBLISHED_SIZES

    if config.backbone.weights:
        config.backbone.config = PUBLISHED_SIZES[config.backbone.weights]
    config.backbone.weights = config.sampler.weights = config.sampler.tokenizer = config.checkpoint = None
    torch.manual_seed(0)
    with device:
        return registry.get_model_class(config.arch).from_config(config).to(device)


def make_engine(model, deepspeed: dict | None, device: torch.device):
    from lavis_lstp.runners.deepspeed.engine import DeepSpeedEngine
    from lavis_lstp.runners.engine import TorchEngine

    settings = {"device": device, "precision": "bf16", "lr": 1e-4, "max_grad_norm": 1.0}
    return DeepSpeedEngine(model, deepspeed, **settings) if deepspeed else TorchEngine(model, **settings)


def measure(config, kind: str, device: torch.device, sizes: dict[str, int]) -> dict:
    from lavis_lstp.commands import estimate
    from lavis_lstp.config.run import RunSettings
    from lavis_lstp.runners.deepspeed import config as deepspeed_config
    from lavis_lstp.runners.record import versions

    run = {"output_dir": "unused", "init_lr": 1e-4, "precision": "bf16", "max_grad_norm": 1.0}
    settings = RunSettings.from_config({**run, "batch_size_train": sizes["batch"]})
    deepspeed = None
    if kind != "plain":
        deepspeed = deepspeed_config.complete({"zero_optimization": {"stage": int(kind[-1])}}, settings, 1)
    meta = estimate.build_without_memory(config)
    options = {"processes": 1, "precision": "bf16", "accumulate": 1, "deepspeed": deepspeed}
    expected = estimate.divide(meta, estimate.example(meta, **sizes), **options)
    model, cuda = build(config, device), device.type == "cuda"
    samples = estimate.example(model, **sizes, device=str(device))
    engine = make_engine(model, deepspeed, device)
    engine.train_mode()
    losses, seconds = [], []
    for _ in range(STEPS):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        losses.append(engine.accumulate(lambda m: m(samples), weight=1.0, last=True)["loss"].item())
        engine.clip()
        engine.step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(round(time.perf_counter() - started, 3))
    parts = {name: round(value / GIB, 2) for name, value in asdict(expected).items()}
    found = {"kind": kind, **sizes, "estimate_gib": parts, "total_gib": round(expected.total / GIB, 2)}
    found.update(losses=losses, seconds=seconds, versions=versions())
    if cuda:
        peak = torch.cuda.max_memory_allocated()
        found.update(device=torch.cuda.get_device_name(), allocated_gib=round(peak / GIB, 2))
        found["estimate_over_allocated"] = round(expected.total / peak, 3)
    return found


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="projects/lstp/vicuna_ft.yaml")
    parser.add_argument("--model", help="a model's name instead of a recipe")
    parser.add_argument("--kind", default="plain", choices=KINDS)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(argv)
    plugin.register()
    config = configuration(None if args.model else args.recipe, args.model or "")
    sizes = {"batch": args.batch, "frames": args.frames, "prompt_tokens": 100, "answer_tokens": 64}
    found = measure(config, args.kind, torch.device(args.device), sizes)
    print(json.dumps(found, indent=2))
    return found


if __name__ == "__main__":
    main()
