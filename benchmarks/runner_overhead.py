"""What runner_lstp costs over a bare PyTorch loop: python benchmarks/runner_overhead.py [--width 512] [--steps 200]

Both train the same model on the same samples in the same order, with clipping, the same optimizer and a loss read each
step. Prints milliseconds of processor time per optimizer step as JSON, the least of several runs taken in turn: on a
machine with other work, wall time says more about that work.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import Dataset

from lavis_lstp.host import plugin

BATCH = 32


class Data(Dataset):
    def __init__(self, length: int, width: int):
        self.x = torch.randn(length, width, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "instance_id": str(index)}


def model_class():
    from lavis.models.base_model import BaseModel

    class Model(BaseModel):
        def __init__(self, width: int):
            super().__init__()
            self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(8)))

        def forward(self, samples):
            return {"loss": (self.layers(samples["x"]) - samples["x"]).square().mean()}

    return Model


def bare(model: nn.Module, data: Data) -> float:
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    started = time.process_time()
    for samples in loader:
        loss = model(samples)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        loss.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return time.process_time() - started


def with_runner(model: nn.Module, data: Data, folder: Path) -> float:
    from lavis_lstp.runners import RunnerLSTP
    from lavis_lstp.tasks import VideoInstructTask

    run = {"output_dir": str(folder), "device": "cpu", "init_lr": 1e-4, "batch_size_train": BATCH, "max_grad_norm": 1.0}
    config = OmegaConf.create({"run": run, "model": {"arch": "bench"}, "datasets": {}})
    stand_in = type("Config", (), {"config": config, "run_cfg": config.run})()
    runner = RunnerLSTP(cfg=stand_in, task=VideoInstructTask(), model=model, datasets={"bench": {"train": data}})
    runner.manifest = runner._manifest("train")
    runner._prepare_training()
    started = time.process_time()
    runner.train_epoch(0)
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    plugin.before_lavis()
    model_cls = model_class()
    data = Data(args.steps * BATCH, args.width)
    times: dict[str, list[float]] = {"bare": [], "runner": []}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):
            times["bare"].append(bare(model_cls(args.width), data))
            times["runner"].append(with_runner(model_cls(args.width), data, Path(folder) / str(repeat)))
    result = {name: round(1000 * min(values) / args.steps, 3) for name, values in times.items()}
    result["overhead_ms"] = round(result["runner"] - result["bare"], 3)
    print(json.dumps({"ms_per_step": result, "width": args.width, "batch": BATCH, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
