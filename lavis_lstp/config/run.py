"""The section `run`: every key, its type, its default, its range and its meaning.

In: the section of a configuration. Out: `RunSettings`, plain values that `runner_lstp` and `runner_deepspeed` work by;
nothing below them sees the configuration. A default of null leaves a decision to whoever reads the key. Runners and
tasks of other packages may name keys of their own in a class attribute RUN_KEYS.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from lavis_lstp.config.fields import SEED, check_generation, checked, key, rules, unknown_key
from lavis_lstp.errors import ConfigError, unknown_name

OPTIMIZERS = ("adamw", "adam")
RUNNERS = ("runner_lstp", "runner_deepspeed")
TASKS = ("video_qa", "video_instruct", "temporal_grounding", "pseudo_span")
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
ANSWERING = ("video_qa", "video_instruct")
"""Runners and tasks of this package."""
_SAME = ("num_beams", "length_penalty", "repetition_penalty", "temperature", "top_p", "top_k")
GENERATION = {"max_len": "max_new_tokens", "min_len": "min_new_tokens"} | {name: name for name in _SAME}
"""Generation keys of the section, which override the model's own, and their names in transformers."""
RATE = {"least": 0, "most": 1_000_000}


@dataclass
class RunSettings:
    # ---- what runs
    task: str | None = key()  # the one key without which nothing can run
    runner: str | None = key()  # runner_lstp, with LAVIS's own models and tasks runner_base
    evaluate: bool = key(False)  # evaluate only; lavis.evaluate sets it
    seed: int = key(42, least=0, most=SEED)  # of every generator; the rank is added
    output_dir: str = key("output")  # where results go; relative to the current folder
    # training: checkpoint to go on from, auto or a run's folder meaning the last complete one; evaluation: weights to
    # evaluate, auto or a run's folder meaning its best checkpoint, else its last (runner_lstp)
    resume_ckpt_path: str | None = key()
    log_freq: int = key(50, least=1)  # steps between two log lines
    track: list[str] = key([], one_of=TRACKERS, only=RUNNERS, called="tracker (run.track)")  # beside log.jsonl
    # a trial: batches of each epoch (at least one optimizer step) and of each evaluation, whose metrics say "partial"
    limit_batches: int | None = key(None, least=1, only=RUNNERS)
    # two batches of everything, afresh, in output_dir/fast_dev_run, which the next such run empties; no trackers
    fast_dev_run: bool = key(False, only=RUNNERS)
    profile: bool = key(False, only=RUNNERS)  # say where each second went; a trace for Chrome in output_dir/profile
    # ---- data
    train_splits: list[str] = key(["train"])
    valid_splits: list[str] = key([])  # evaluated after each epoch
    test_splits: list[str] = key([])  # evaluated at the end
    train_dataset_ratios: dict[str, int | float] | None = key(
        None, least=0, most=1_000_000_000
    )  # share in an epoch, by data set
    batch_size_train: int = key(1, least=1)  # samples in a training batch of one process
    batch_size_eval: int = key(1, least=1)  # samples in an evaluation batch of one process
    num_workers: int = key(0, least=0, most=4096)  # loader processes
    use_dist_eval_sampler: bool | None = key()  # kept for LAVIS's files; runner_lstp always divides, without padding
    # ---- optimization
    max_epoch: int = key(1, least=1)
    max_steps: int | None = key(
        None, least=1, only=RUNNERS
    )  # stop after so many optimizer steps; null runs max_epoch epochs
    accum_grad_iters: int = key(1, least=1)  # batches whose gradients make one step
    precision: str = key("fp32", only=RUNNERS)  # fp32 or bf16 autocast; LAVIS's `amp: true` means bf16
    amp: bool | None = key()  # mixed precision
    optimizer: str = key("adamw", one_of=OPTIMIZERS, only=RUNNERS)  # adam: weight decay goes through the gradient
    lr_sched: str = key("linear_warmup_cosine_step")  # schedule of the learning rate
    init_lr: int | float = key(0.0, **RATE)  # learning rate after warm-up; above 0 to train
    min_lr: int | float = key(0.0, **RATE)  # at the end
    warmup_lr: int | float = key(-1.0, least=-1, most=1_000_000)  # at the first step of warm-up; -1 = 0
    warmup_steps: int | None = key(None, least=0)  # steps of warm-up; null = warmup_ratio
    warmup_ratio: int | float = key(
        0.05, least=0, most=1, only=RUNNERS
    )  # share of all optimizer steps spent warming up
    lr_decay_rate: int | float | None = key(None, above=0)  # factor by epoch, for the step schedule
    lr_layer_decay: int | float = key(1.0, above=0, most=1)  # factor by layer
    weight_decay: int | float = key(0.05, **RATE)
    beta2: int | float = key(0.999, least=0, below=1)  # AdamW's and Adam's
    max_grad_norm: int | float | None = key(None, above=0, only=RUNNERS)  # clip the gradient's global norm to this
    find_unused_parameters: bool = key(
        False, only=RUNNERS
    )  # tell DDP that some trained weights get no gradient in some steps
    # ---- checkpoints and validation
    save_every_steps: int = key(0, least=0, only=RUNNERS)  # also save every so many optimizer steps; 0 does not
    save_every_minutes: int | float | None = key(None, above=0, only=RUNNERS)  # also save when the last one is so old
    save_every_epochs: int = key(1, least=0, only=RUNNERS)  # the last epoch is always saved; 0 = that one alone
    keep_last: int = key(2, least=1, only=RUNNERS)  # checkpoints to keep besides the best one
    eval_every_epochs: int = key(1, least=0, only=RUNNERS)  # evaluate valid_splits; the last epoch always
    early_stop_epochs: int | None = key(
        None, least=1, only=RUNNERS
    )  # stop after so many validations without a better run.metric
    metric: str = key(
        "agg_metrics", only=RUNNERS
    )  # of the first valid split; higher is better, lower where the name ends in 'loss'
    allow_partial: bool = key(False, only=RUNNERS)  # report metrics although some questions have no prediction
    # ---- processes
    device: str = key("auto")  # cpu, cuda or auto: cuda if there is a device
    distributed: bool = key(False)  # set from torchrun's environment
    world_size: int = key(1, least=1)  # set from torchrun's environment
    dist_url: str = key("env://")  # where the processes meet
    rank: int = key(0, least=0)  # set when the run starts
    gpu: int = key(0, least=0)  # set when the run starts
    dist_backend: str | None = key()  # set when the run starts
    deepspeed: Any = key(only=("runner_deepspeed",))  # DeepSpeed's configuration: a JSON file or a mapping
    # ---- answering, and keys of single tasks
    choose: str = key("generate", one_of=("generate", "likelihood"), only=ANSWERING)  # generate: the model answers and
    # one option is read; likelihood: the likeliest option
    option_score: str = key("mean", one_of=("mean", "sum"), only=ANSWERING)  # of the log-probabilities of its tokens
    valid_on: str = key("loss", one_of=("loss", "answers"), only=("video_instruct",))  # what validation compares
    spans_out: str | None = key(only=("temporal_grounding", "pseudo_span"))  # file to write; {split} is replaced
    iou: str = key("frames", only=("temporal_grounding",))  # published: 0 for spans that meet in one frame alone
    subtract_min: bool = key(True, only=("pseudo_span",))  # subtract each video's smallest score first
    # what a frame is labelled by: its own answer, or the score that model.scorer gives it, which needs no answer
    label: str = key("answer", one_of=("answer", "scores"), only=("pseudo_span",))
    smooth: int = key(1, least=1, only=("pseudo_span",))  # window in frames of a moving average over the scores
    max_len: int | None = key(None, least=1)  # most tokens generated
    min_len: int | None = key(None, least=0)  # fewest tokens generated
    num_beams: int | None = key(None, least=1)  # beams of the search; 1 = greedy
    length_penalty: int | float | None = key()  # exponent on the length in beam search
    repetition_penalty: int | float | None = key(None, above=0)  # factor on tokens already there
    temperature: int | float | None = key(None, least=0)  # of sampling
    top_p: int | float | None = key(None, above=0, most=1)  # share of probability sampled from
    top_k: int | None = key(None, least=0)  # most tokens sampled from
    prompt: str | None = key()  # text in front of, or around, the question
    # ---- LAVIS's own runners, tasks and models
    max_iters: int | float | None = key(None, least=0)  # steps (runner_iter)
    iters_per_inner_epoch: int | float | None = key(None, above=0)  # steps between two validations (runner_iter)
    save_freq: int | None = key(None, least=0)  # epochs between two checkpoints (LAVIS's git main)
    save_last: bool | None = key()  # keep the last checkpoint (LAVIS's git main)
    val_freq: int | None = key(None, least=0)  # epochs between two validations (LAVIS's git main)
    inference_method: str | None = key()  # generate or rank (vqa)
    num_ans_candidates: int | None = key(None, least=1)  # answers to rank (vqa)
    report_metric: bool | None = key()  # compute metrics after evaluation
    k_test: int | None = key(None, least=1)  # candidates to re-rank (retrieval)
    block_num: int | None = key(None, least=0)  # layer of the attention map (pnp_vqa)
    cap_max_length: int | None = key(None, least=1)  # longest caption (pnp_vqa)
    cap_min_length: int | None = key(None, least=0)  # shortest caption (pnp_vqa)
    num_captions: int | None = key(None, least=1)  # captions made (pnp_vqa)
    num_captions_fid: int | None = key(None, least=1)  # captions in one reader input (pnp_vqa)
    internal_bsz_fid: int | None = key(None, least=1)  # reader batch (pnp_vqa)
    num_patches: int | None = key(None, least=1)  # image patches kept (pnp_vqa)

    @classmethod
    def from_config(cls, run: Mapping[str, Any]) -> RunSettings:
        """The settings of a run section; a null means that nothing is said.

        Raises:
            ConfigError: a value is missing, of the wrong type, out of range, or contradicts another.
        """
        run = OmegaConf.to_container(run, resolve=True) if OmegaConf.is_config(run) else run
        given = {name: value for name, value in run.items() if value is not None and name in rules(cls)}
        if "output_dir" not in given:
            raise ConfigError("run.output_dir is missing; name the folder that checkpoints and results go to")
        given = checked(given, cls, "run")
        settings = cls(**given)
        settings.precision = _precision(given)
        settings._check()
        if settings.fast_dev_run:
            settings._shrink()
        return settings

    def _shrink(self) -> None:
        """Sets what `fast_dev_run` stands for."""
        if self.evaluate:
            whole = self.resume_ckpt_path == "auto"
            self.resume_ckpt_path = self.output_dir if whole else self.resume_ckpt_path
        else:
            self.resume_ckpt_path = None
        self.limit_batches, self.max_epoch, self.track = min(2, self.limit_batches or 2), 1, []
        self.output_dir = os.path.join(self.output_dir, "fast_dev_run")

    def _check(self) -> None:
        """Raise ConfigError for settings that contradict each other."""
        if self.early_stop_epochs is not None and not (self.valid_splits and self.eval_every_epochs):
            raise ConfigError("run.early_stop_epochs needs validations: set run.valid_splits and run.eval_every_epochs")
        if not self.evaluate and self.init_lr <= 0:
            raise ConfigError(f"run.init_lr must be above 0 to train, got {self.init_lr}")
        if self.train_dataset_ratios is not None and not sum(self.train_dataset_ratios.values()) > 0:
            raise ConfigError(f"run.train_dataset_ratios must sum to more than 0, got {self.train_dataset_ratios}")
        self.device_kind()

    def device_kind(self) -> str:
        """auto, cpu or cuda.

        Raises:
            ConfigError: it is none of these, or a device's number is none.
        """
        kind, _, number = self.device.partition(":")
        if kind not in ("auto", "cpu", "cuda") or (":" in self.device and not number.isdecimal()):
            raise ConfigError(f"run.device must be auto, cpu or cuda, got '{self.device}'")
        return kind

    def torch_device(self, local_rank: int = 0) -> Any:
        """The torch.device that this process computes on."""
        import torch

        kind, there = self.device_kind(), torch.cuda.is_available()
        if kind == "auto":
            kind = "cuda" if there else "cpu"
        if kind == "cuda" and not there:
            raise ConfigError("run.device is cuda, but torch sees no CUDA device; set run.device=cpu or auto")
        if kind == "cuda" and ":" not in self.device:
            return torch.device(f"cuda:{local_rank}")
        return torch.device(self.device if ":" in self.device else kind)

    def steps_to_warm_up(self, total_steps: int) -> int:
        return self.warmup_steps if self.warmup_steps is not None else int(self.warmup_ratio * total_steps)


WRITTEN = ("evaluate", "seed", "output_dir", "distributed", "world_size", "dist_url")
"""Defaults that are written into a configuration; the others are those of `runner_lstp` alone."""

LAVIS_RUNNER_DEFAULTS: dict[str, object] = {
    "batch_size_train": 8,
    "batch_size_eval": 8,
    "num_workers": 2,
    "max_epoch": 1,
    "lr_sched": "linear_warmup_cosine_lr",
    "init_lr": 1e-4,
    "min_lr": 0,
    "weight_decay": 0.05,
}
"""Keys that LAVIS's own runners read and have no default for."""


def checked_run(given: Mapping[str, Any], roles: Iterable[str], extra: Iterable[str] = ()) -> dict[str, Any]:
    """The run section without its nulls, every value as its field declares it.

    Args:
        roles: names of the task and the runner; a key that is for others is not known.
        extra: keys that other packages' tasks and runners read.

    Raises:
        ConfigError: a key that nobody reads, or a value that cannot be used.
    """
    roles, legal = set(roles), set(extra)
    for name, rule in rules(RunSettings).items():
        if "only" not in rule.limits or roles & set(rule.limits["only"]):
            legal.add(name)
    for name in given:
        if name not in legal:
            raise ConfigError(unknown_key("run", name, legal))
    found = checked({name: value for name, value in given.items() if value is not None}, RunSettings, "run", legal)
    if roles & set(ANSWERING) and found.get("num_captions", 1) != 1:
        raise ConfigError(f"run.num_captions={found['num_captions']}: a question has one answer; set it to 1")
    return found


def check_run_generation(run: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise ConfigError where generation keys of a run section and the model's own settings contradict each other."""
    given = {GENERATION[name]: run[name] for name in GENERATION if run.get(name) is not None}
    names = {GENERATION[name]: f"run.{name}" for name in GENERATION if run.get(name) is not None}
    check_generation({**own, **given}, "model.generation", names)


def _precision(run: Mapping[str, Any]) -> str:
    """fp32 or bf16, from `precision` or from LAVIS's `amp`; both may be given if they agree."""
    amp, precision = run.get("amp"), run.get("precision")
    if precision is None:
        return "bf16" if amp else "fp32"
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"run.precision must be fp32 or bf16, got '{precision}'")
    if amp is not None and bool(amp) != (precision == "bf16"):
        raise ConfigError(f"run.amp={amp} contradicts run.precision={precision}; remove one of them")
    return precision


def splits_of(run: Mapping[str, Any], *, evaluate_only: bool = False) -> dict[str, list[str]]:
    """Key of `run` -> the splits it names, for all that a run will read."""
    keys = ["test_splits"] if evaluate_only else ["valid_splits", "test_splits"]
    if not (evaluate_only or run.get("evaluate")):
        keys.insert(0, "train_splits")
    defaults = RunSettings()
    return {name: getattr(defaults, name) if run.get(name) is None else run[name] for name in keys}


def check_splits(known: Mapping[str, Iterable[str]], wanted: Mapping[str, Iterable[str]]) -> None:
    """Raise ConfigError for a split that no data set has.

    Args:
        known: data set -> its splits.
        wanted: key of `run`, such as "train_splits" -> the splits it names.
    """
    known = {name: list(splits) for name, splits in known.items()}
    there = {split for splits in known.values() for split in splits}
    for name, splits in wanted.items():
        for split in splits:
            if split not in there:
                has = "; ".join(f"{data} has {', '.join(own) or 'none'}" for data, own in known.items())
                raise ConfigError(
                    f"{unknown_name(f'split in run.{name}:', split, there)} ({has}); name one of these, or "
                    "give it a file in datasets.<name>.build_info.annotations"
                )


OLDEST_DEEPSPEED = (0, 19)
"""0.17.6 loses accumulated gradients at stage 2, 0.18.3 divides them twice, silently; 0.18.9 fails on torch 2.15."""


def check_deepspeed_version(version: str) -> None:
    """Raise ConfigError for a release that trains wrongly."""
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_DEEPSPEED:
        oldest = ".".join(map(str, OLDEST_DEEPSPEED))
        raise ConfigError(
            f"DeepSpeed {version} is too old, it may accumulate gradients wrongly; runner_deepspeed needs {oldest} or "
            f"newer: pip install 'deepspeed>={oldest}'"
        )
