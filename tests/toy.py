"""A toy model, data set and run, small enough to train in a second, for tests of the runner and the tasks.

As a script it is one process of a run, alone or under torchrun: `python tests/toy.py output_dir=DIR [key=value ...]`;
`+` between groups of settings makes it several runs, one after the other.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import zlib
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import Dataset

from lavis_lstp.errors import LstpError
from lavis_lstp.host import plugin

plugin.before_lavis()

from lavis.models.base_model import BaseModel  # noqa: E402

WORDS = ("red", "green", "blue", "left", "right")


class ToyModel(BaseModel):
    """A frozen layer, a trained one behind dropout. `forward` gives the mean squared error over the batch."""

    def __init__(self, dropout: float = 0.1, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.frozen = nn.Linear(4, 8).requires_grad_(False)
            self.head = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
        self.dropout = nn.Dropout(dropout)

    def forward(self, samples):
        hidden = self.dropout(self.frozen(samples["x"]))
        loss = (self.head(hidden).squeeze(1) - samples["y"]).square().mean()
        return {"loss": loss, "half_loss": loss / 2}

    @torch.no_grad()
    def predict_answers(self, samples, **unused):
        scores = self.head(self.dropout(self.frozen(samples["x"]))).squeeze(1)
        return [WORDS[int(abs(float(s)) * 1e4) % len(WORDS)] for s in scores]

    def locate(self, samples):
        start = samples["x"][:, 0].abs().long() % 4
        return {"span": torch.stack([start, start + 2], 1), "frame_index": torch.stack([start, start + 1], 1)}

    def pseudo_scores(self, samples):
        rows = [[zlib.crc32(f"{name}/{t}".encode()) % 5 / 4 for t in range(6)] for name in samples["question_id"]]
        return torch.tensor(rows) * samples["frame_mask"]


class ToyData(Dataset):
    """`noise` adds an augmentation drawn from torch's global generator, as LAVIS's image processors do."""

    def __init__(self, length: int, *, noise: float = 0.0, nan_at: int | None = None):
        self.x = torch.randn(length, 4, generator=torch.Generator().manual_seed(1))
        self.noise = noise
        self.nan_at = nan_at
        self.annotation = [{"question_id": f"q{i}", "answer": WORDS[i % len(WORDS)]} for i in range(length)]

    def __len__(self):
        return len(self.annotation)

    def __getitem__(self, index):
        x = self.x[index] + self.noise * torch.randn(4)
        y = torch.tensor(float("nan")) if index == self.nan_at else x.sum()
        return {"x": x, "y": y, "index": index}

    def collater(self, items):
        ids = [item["index"] for item in items]
        mask = torch.ones(len(items), 6, dtype=torch.long)
        mask[:, 5:] = torch.tensor([i % 2 for i in ids])[:, None]
        return {
            "x": torch.stack([item["x"] for item in items]),
            "y": torch.stack([item["y"] for item in items]),
            "question_id": [self.annotation[i]["question_id"] for i in ids],
            "video_id": [f"v{i // 2}" for i in ids],
            "text_input": [f"which {i}?" for i in ids],
            "text_output": [self.annotation[i]["answer"] for i in ids],
            "frame_mask": mask,
            "gold_span": torch.tensor([[i % 4, i % 4 + 2] if i % 3 else [-1, -1] for i in ids]),
        }


class ToyConfig:
    """What the runner wants of LAVIS's Config."""

    def __init__(self, run: dict, model: dict | None = None):
        self.config = OmegaConf.create({"run": run, "model": {"arch": "toy", **(model or {})}, "datasets": {"toy": {}}})

    @property
    def run_cfg(self):
        return self.config.run

    @property
    def model_cfg(self):
        return self.config.model

    @property
    def datasets_cfg(self):
        return self.config.datasets


RUN = {
    "task": "video_instruct",
    "device": "cpu",
    "seed": 7,
    "batch_size_train": 3,
    "batch_size_eval": 2,
    "max_epoch": 2,
    "init_lr": 1e-2,
    "log_freq": 1,
}


def make_runner(output_dir, *, length=20, dropout=0.1, noise=0.1, nan_at=None, eval_length=5, cls=None, **run):
    """A runner over the toy; keyword arguments override RUN."""
    from lavis.common.registry import registry

    from lavis_lstp import runners, tasks  # noqa: F401

    config = ToyConfig({**RUN, "output_dir": str(output_dir), **run}, {"dropout": dropout})
    task = registry.get_task_class(config.run_cfg.task).setup_task(cfg=config)
    data = {"train": ToyData(length, noise=noise, nan_at=nan_at), "val": ToyData(eval_length), "test": ToyData(3)}
    model = ToyModel(dropout)
    cls = cls or registry.get_runner_class(config.run_cfg.get("runner", "runner_lstp"))
    return cls(cfg=config, task=task, model=model, datasets={"toy": data}, job_id="job")


class Killed(Exception):
    """Stands for the end of a process in tests that have no process to spare."""


def run(argv: list[str]) -> None:
    """One run. Before optimizer step N, `kill_at=N` dies of SIGKILL, `term_at=N` gets SIGTERM, `raise_at=N` raises;
    `on_rank=R` lets that happen on one rank only. `lose=ID` loses a question's record, `full_disk=N` lets the save at
    step N fail. An error of the user's is written to `<output_dir>/error_rank<R>.txt`."""
    options = OmegaConf.to_container(OmegaConf.from_dotlist(argv))
    rank = int(os.environ.get("RANK", 0))
    here = rank == options.pop("on_rank", rank)
    at = {name: options.pop(name, None) for name in ("kill_at", "term_at", "raise_at")}
    lost, full_disk = options.pop("lose", None), options.pop("full_disk", None)
    runner = make_runner(Path(options.pop("output_dir")), **options)
    plain_step, valid_step = runner._train_step, runner.task.valid_step
    if lost:
        runner.task.valid_step = lambda **batch: [r for r in valid_step(**batch) if r["question_id"] != lost]

    def step(*args):
        if runner.position.step == at["raise_at"]:
            raise Killed
        for name, number in (("kill_at", signal.SIGKILL), ("term_at", signal.SIGTERM)):
            if here and runner.position.step == at[name]:
                os.kill(os.getpid(), number)
        return plain_step(*args)

    def save(*args):
        raise OSError(28, "No space left on device")

    def build_engine(real=runner.build_engine):
        engine = real()
        plain_save = engine.save
        engine.save = lambda *args: (save if here and runner.position.step == full_disk else plain_save)(*args)
        return engine

    runner._train_step, runner.build_engine = step, build_engine
    try:
        runner.train()
    except Killed:
        return
    except LstpError as error:
        (runner.output_dir / f"error_rank{rank}.txt").write_text(f"{type(error).__name__}: {error}")


def main(argv: list[str]) -> None:
    torch.set_num_threads(1)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        torch.distributed.init_process_group("gloo")
    for _, group in itertools.groupby(argv, lambda word: word == "+"):
        group = list(group)
        if group != ["+"]:
            run(group)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
