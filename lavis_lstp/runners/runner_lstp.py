"""`run.runner: runner_lstp`: trains and evaluates on a CPU, one GPU, or several by torchrun.

In: a LAVIS configuration, task, model and data sets. Out: below exactly `run.output_dir`, checkpoints that hold
trained weights only, results per split, log.jsonl and run_manifest.json.

The runner decides the order of things: data order, steps, checkpoints, validation, resume. How losses become changed
weights is the engine's business (`build_engine`), what a loss or a metric is the task's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lavis.common.registry import registry
from lavis.runners.runner_base import RunnerBase

from lavis_lstp import distributed
from lavis_lstp.config.run import RunSettings, check_splits, splits_of
from lavis_lstp.errors import ConfigError
from lavis_lstp.files import expanded, owned, sha256_json, sweep
from lavis_lstp.redaction import recordable
from lavis_lstp.runners import checkpoint, profile, resume
from lavis_lstp.runners.data_order import TrainOrder, sampling_of
from lavis_lstp.runners.engine import TorchEngine, WholeModel
from lavis_lstp.runners.evaluation import evaluate_split, fingerprint, is_better, metric_value, to_device
from lavis_lstp.runners.randomness import derived_seed, seed_everything
from lavis_lstp.runners.record import JsonLog, RunManifest, parameter_table
from lavis_lstp.runners.saving import Position, Saver
from lavis_lstp.runners.schedule import build_schedule
from lavis_lstp.runners.shard_stream import build_batches
from lavis_lstp.runners.sigterm import StopRequest
from lavis_lstp.runners.splits import evaluation_dataset, join, training_parts
from lavis_lstp.runners.train_loop import StepLosses, StepWindow, TrainingError, epoch_bar, losses_of, show
from lavis_lstp.tasks.base import plain

log = logging.getLogger(__name__)


@registry.register_runner("runner_lstp")
class RunnerLSTP(RunnerBase):
    def __init__(self, cfg: Any, task: Any, model: Any, datasets: Mapping[str, Any], job_id: str | None = None):
        self.plain_config = plain(cfg.config)
        self.recorded_config = recordable(cfg.config, resolved=resume.BINDING)  # what goes into files
        self.settings = self.read_settings()
        super().__init__(cfg=cfg, task=task, model=model, datasets=datasets, job_id=job_id)
        if hasattr(model, "maybe_autocast"):  # LAVIS's BLIP-2 family
            distributed.ensure_group(self.device)
            if self.device.type == "cpu":
                model.float()  # its half-precision parts meet fp32 where there is no CUDA autocast
        self.bare_model = model.to(self.device)
        self.position = Position()
        self.built_engine: WholeModel | None = None
        self.store = checkpoint.CheckpointStore(self.output_dir / "checkpoints")
        log_file, track = self.output_dir / "log.jsonl", self.settings.track
        self.json_log = JsonLog(log_file, enabled=distributed.is_main(), track=track)
        self.manifest: RunManifest | None = None  # of training
        self.stop_request = StopRequest()
        self.spare_batch: dict[str, Any] | None = None

    @classmethod
    def check_run(cls, run: Mapping[str, Any]) -> None:
        """Raise ConfigError for a run section that this runner cannot work by, before data and model are built."""
        RunSettings.from_config(run)

    @staticmethod
    def check_splits(datasets: Mapping[str, Any], run: Mapping[str, Any], evaluate_only: bool) -> None:
        """Raise ConfigError for a split that no data set has, before the model is built."""
        check_splits(datasets, splits_of(run, evaluate_only=evaluate_only))

    def read_settings(self) -> RunSettings:
        return RunSettings.from_config(self.plain_config["run"])

    # ---- what RunnerBase offers ---------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.settings.torch_device(int(os.environ.get("LOCAL_RANK", 0)))

    @property
    def use_distributed(self) -> bool:
        return distributed.world_size() > 1

    @property
    def engine(self) -> WholeModel:
        """What changes, loads and evaluates the weights; before one is built, the bare model."""
        return self.built_engine or WholeModel(self.bare_model)

    @property
    def model(self) -> torch.nn.Module:
        """The model as it is trained: wrapped for several processes once training has begun."""
        return self.engine.model

    @property
    def optimizer(self) -> Any:
        return self.engine.optimizer

    @property
    def scaler(self) -> None:
        """None: bf16 has fp32's range and needs no loss scaling."""

    @property
    def evaluate_only(self) -> bool:
        return self.settings.evaluate

    def setup_output_dir(self) -> None:
        """`run.output_dir` itself; no job id is added, so a resumed run finds its own checkpoints."""
        if self.settings.fast_dev_run:
            distributed.on_main(lambda: shutil.rmtree(self.settings.output_dir, ignore_errors=True))
        self.output_dir = _made(self.settings.output_dir)
        self.result_dir = self.output_dir / "result"
        for name, path in (("output_dir", self.output_dir), ("result_dir", self.result_dir)):
            registry.mapping["paths"][name] = str(path)  # register_path allows one run per process

    # ---- entry points -------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Train, validate, test; with `run.evaluate` only the latter two. Returns the metrics by split.

        Raises:
            BusyError: another run works in the output folder.
        """
        with self.alone(self.output_dir), contextlib.closing(self.json_log), self._profiled():
            if self.evaluate_only:
                return self._evaluate_alone(self._eval_splits(), "given", skip_reload=True)
            return self._train()

    @staticmethod
    @contextlib.contextmanager
    def alone(output_dir: str | os.PathLike) -> Iterator[None]:
        """Own an output folder, several times over if need be; rank 0 does so for all ranks.

        Raises:
            BusyError: another run works there.
            ConfigError: it cannot be written to.
        """
        with contextlib.ExitStack() as until_the_end:

            def own() -> None:
                folder = _made(output_dir)
                until_the_end.enter_context(owned(folder))
                sweep(folder / "result")

            distributed.on_main(own)
            yield

    def _profiled(self) -> contextlib.AbstractContextManager:
        """What says where the time went, where the settings ask for it."""
        if not self.settings.profile:
            return contextlib.nullcontext()
        return profile.profiled(self.output_dir / "profile", self.bare_model)

    def _train(self) -> dict[str, Any]:
        self.manifest = self._manifest("train")
        self._prepare_training()
        with self.manifest.running():
            while self.position.epoch < self.settings.max_epoch:
                with self.stop_request:  # elsewhere SIGTERM just ends the process: what is on disk is complete
                    self.train_epoch(self.position.epoch)
                self._end_of_epoch()
                self.manifest.add(step=self.position.step)
            return self._evaluate_splits(self.settings.test_splits, "best", skip_reload=False)

    def evaluate(self, cur_epoch: int | str = "given", skip_reload: bool = True) -> dict[str, Any]:
        """Evaluate `test_splits` with the weights at hand, or with the best checkpoint's unless `skip_reload`."""
        with self.alone(self.output_dir), contextlib.closing(self.json_log), self._profiled():
            return self._evaluate_alone(self.settings.test_splits, cur_epoch, skip_reload=skip_reload)

    def _evaluate_alone(self, splits: Sequence[str], cur_epoch: int | str, *, skip_reload: bool) -> dict[str, Any]:
        if not splits:
            raise ConfigError("nothing to evaluate: name splits in run.test_splits, for instance [test]")
        for split in splits:
            evaluation_dataset(self.datasets, split)  # before the first one is worked on
        self.built_engine = self.built_engine or self.build_evaluation_engine()
        if self.settings.resume_ckpt_path:
            self._load(distributed.on_main(lambda: resume.to_evaluate(self.store, self.settings.resume_ckpt_path)))
        with self._manifest("evaluate").running():
            return self._evaluate_splits(splits, cur_epoch, skip_reload=skip_reload)

    def _manifest(self, kind: str) -> RunManifest:
        name = "run_manifest.json" if kind == "train" else "evaluate_manifest.json"
        facts = {"config": self.recorded_config, "device": str(self.device), "world_size": distributed.world_size()}
        return RunManifest(self.output_dir / name, {"kind": kind, **facts}, enabled=distributed.is_main())

    def _eval_splits(self) -> list[str]:
        return list(dict.fromkeys([*self.settings.valid_splits, *self.settings.test_splits]))

    # ---- preparation --------------------------------------------------------------------------------------------

    def _prepare_training(self) -> None:
        settings = self.settings
        check_splits(self.datasets, splits_of(self.plain_config["run"]))
        for split in self._eval_splits():
            evaluation_dataset(self.datasets, split)  # a misspelt name should not wait for the end of an epoch
        source = distributed.on_main(lambda: resume.choose_source(self.store, settings.resume_ckpt_path))
        ratios = settings.train_dataset_ratios
        parts = training_parts(self.datasets, settings.train_splits, ratios)
        self.order = TrainOrder(
            [len(part) for part in parts.values()],
            batch_size=settings.batch_size_train,
            accumulate=settings.accum_grad_iters,
            seed=settings.seed,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            ratios=[ratios[name] for name in parts] if ratios else None,
            sampling=[sampling_of(part) for part in parts.values()],
            limit_steps=settings.limit_batches and max(1, settings.limit_batches // settings.accum_grad_iters),
        )
        dataset = join(parts)
        loading = {"seed": settings.seed, "num_workers": settings.num_workers, "pin_memory": self.device.type == "cuda"}
        self.train_batches = build_batches(dataset, self.order, **loading)
        data = {name: fingerprint(part) for name, part in parts.items()}
        if self.order.streamed:  # a position in the middle of an epoch means something in this order alone
            data["streams"] = [(one.lanes, one.buffer, one.resampled) for one in self.order.sampling]
        self.train_fingerprint = sha256_json(data)
        self.manifest.add(data={"train": self.train_fingerprint}, samples_per_epoch=self.order.samples_per_epoch)
        if hasattr(self.task, "before_training"):  # LAVIS's git main
            self.task.before_training(model=self.bare_model, dataset=dataset)
        log.info("%s", parameter_table(self.bare_model))  # an engine may divide the weights among the processes
        self.built_engine = self.build_engine()
        self.total_steps = self.order.steps_per_epoch * settings.max_epoch
        if settings.max_steps is not None:
            self.total_steps = min(self.total_steps, settings.max_steps)
        self.schedule = self._build_schedule()
        self.saver = self._build_saver()
        seed_everything(derived_seed(settings.seed, "rank", distributed.rank()))
        if distributed.is_main():
            self.store.clean(fresh=source is None)
        if source is not None:
            self.position = self.saver.resume(source)
            self.manifest.add(resumed_from=[*self.manifest.earlier().get("resumed_from", []), str(source)])
        if distributed.is_main():
            self.store.forget_best(settings.metric)
        self.json_log.rewind(self.position.step if source is not None else -1)
        log.info(
            "%d samples, %d optimizer steps per epoch of %d samples each, %d steps in all, starting at step %d",
            *(self.order.samples_per_epoch, self.order.steps_per_epoch, self.order.group_size),
            *(self.total_steps, self.position.step),
        )

    def build_engine(self) -> TorchEngine:
        """What another runner replaces, beside `read_settings` and `build_evaluation_engine`."""
        unused = self.settings.find_unused_parameters
        return TorchEngine(self.bare_model, **self.engine_settings(), find_unused_parameters=unused)

    def engine_settings(self) -> dict[str, Any]:
        """What every engine wants to know."""
        s = self.settings
        return {
            "device": self.device,
            "precision": s.precision,
            "optimizer": s.optimizer,
            "lr": s.init_lr,
            "weight_decay": s.weight_decay,
            "lr_scale": s.lr_layer_decay,
            "betas": (0.9, s.beta2),
            "max_grad_norm": s.max_grad_norm,
        }

    def build_evaluation_engine(self) -> WholeModel | None:
        """What evaluates where nothing is trained; None is the bare model in each process."""

    def _build_schedule(self) -> Any:
        s = self.settings
        return build_schedule(
            s.lr_sched,
            self.engine.optimizer,
            max_epoch=s.max_epoch,
            min_lr=s.min_lr,
            init_lr=s.init_lr,
            decay_rate=s.lr_decay_rate,
            warmup_start_lr=s.warmup_lr,
            warmup_steps=s.steps_to_warm_up(self.total_steps),
            total_steps=self.total_steps,
            steps_per_epoch=self.order.steps_per_epoch,
            iters_per_epoch=self.order.steps_per_epoch,
        )

    def _build_saver(self) -> Saver:
        facts = {
            "config": self.recorded_config,
            "data": self.train_fingerprint,
            "step_samples": self.order.group_size,
            "world_size": distributed.world_size(),
        }
        s = self.settings
        return Saver(self.store, self.engine, facts=facts, keep_last=s.keep_last, seed=s.seed)

    def save_checkpoint(self) -> None:
        """Write a checkpoint of this moment; see `Saver.save`."""
        with profile.span("checkpoint"):
            self.saver.save(self.position)

    # ---- training -----------------------------------------------------------------------------------------------

    def train_epoch(self, epoch: int) -> None:
        """The rest of an epoch, one optimizer step after the other."""
        plans = [] if self._finished() else list(self.order.steps(epoch, self.position.consumed))
        if not plans:  # resumed from a checkpoint at the end of an epoch
            return
        batches = self.train_batches.of_plans(plans, epoch)
        self.engine.train_mode()
        with epoch_bar(epoch, plans, self.order.steps_per_epoch, main=distributed.is_main()) as bar:
            window = StepWindow(self.json_log, self.settings.log_freq, say=bar.disable)
            for plan in plans:
                if self._finished():
                    break
                losses = self._train_step(epoch, plan, batches)
                self.position.step += 1
                self.position.consumed += plan.size
                at_end = self._finished() or self.position.consumed >= self.order.samples_per_epoch
                window.add(self.position.step, epoch, losses, flush=at_end)
                show(bar, losses)
                if losses.stop:
                    log.warning("SIGTERM: saving a checkpoint and leaving at step %d", self.position.step)
                    self.save_checkpoint()
                    raise SystemExit(StopRequest.EXIT_STATUS)
                every = self.settings.save_every_steps
                if (losses.save or every and self.position.step % every == 0) and not at_end:
                    self.save_checkpoint()

    def _train_step(self, epoch: int, plan: Any, batches: Iterator[Any]) -> StepLosses:
        started, ids, waited = time.perf_counter(), [], 0.0
        index = self.position.consumed // self.order.group_size
        self.schedule.step(cur_epoch=epoch, cur_step=index)
        losses = StepLosses(lr=self.engine.lr, samples=plan.size)
        for micro, count in enumerate(plan.counts):
            asked = time.perf_counter()
            with profile.span("waiting for data"):
                samples = next(batches)
            waited += time.perf_counter() - asked
            if samples is None:  # none of its videos could be read; the data set has counted them
                if not self.engine.needs_every_batch:
                    continue
                samples, count = self.spare_batch, 0  # the other ranks wait for a forward and a backward
            if samples is None:
                raise TrainingError(f"the first batch of this run has no readable sample: {plan.batches[micro]}")
            with profile.span("copying to the device"):
                samples = self.spare_batch = to_device(samples, self.device)
            ids.extend(map(str, samples.get("question_id", samples.get("instance_id", []))))
            samples.update(epoch=epoch, num_iters_per_epoch=self.order.steps_per_epoch, iters=index)
            weight = count * distributed.world_size() / plan.size
            with profile.span("forward and backward"):
                found = self.engine.accumulate(
                    lambda model, samples=samples: losses_of(self.task.train_step(model=model, samples=samples)),
                    weight=weight,
                    last=micro == len(plan.counts) - 1,
                )
            losses.add(found, count)
        if not losses.counted and distributed.world_size() == 1:
            raise TrainingError(f"no sample of optimizer step {self.position.step + 1} could be read: {plan.batches}")
        save = self.saver.is_due(self.settings.save_every_minutes)
        with profile.span("losses and gradients over processes"):
            losses.reduce(self.engine.clip(), stop=self.stop_request.asked, save=save)
        losses.require_finite(self.position.step + 1, ids)
        with profile.span("optimizer"):
            self.engine.step()
        profile.step()
        losses.data_s, losses.step_s = waited, time.perf_counter() - started
        return losses

    def _finished(self) -> bool:
        return self.position.step >= self.total_steps

    def _end_of_epoch(self) -> None:
        s, epoch = self.settings, self.position.epoch
        final = epoch + 1 >= s.max_epoch or self._finished()
        saves = final or (s.save_every_epochs and (epoch + 1) % s.save_every_epochs == 0)
        validates = s.valid_splits and (final or (s.eval_every_epochs and (epoch + 1) % s.eval_every_epochs == 0))
        if saves or validates:
            self.save_checkpoint()  # before validation, which may take long and decides only which one is the best
        if validates and distributed.on_main(lambda: self.store.best().get("validated_step")) != self.position.step:
            self._validate(epoch)
        final = final or (s.early_stop_epochs is not None and distributed.on_main(self._improves_no_more))
        self.position.epoch = s.max_epoch if final else epoch + 1
        self.position.consumed = 0

    def _validate(self, epoch: int) -> None:
        """Evaluate the valid splits; the first one's `run.metric` decides whether this checkpoint is the best."""
        found = {name: self.eval_epoch(name, epoch, skip_reload=True) for name in self.settings.valid_splits}
        split, metric = self.settings.valid_splits[0], self.settings.metric
        value = metric_value(found[split], metric, split)
        if not distributed.is_main():
            return
        best, step = self.store.best(), self.position.step
        if is_better(metric, value, best.get("value")):
            name = self.store.path(step).name
            best = {"checkpoint": name, "metric": metric, "value": value, "epoch": epoch, "worse_steps": []}
            log.info("best so far: %s, %s %.4f", name, metric, value)
        else:  # steps, not a count: a run that is resumed from before one of them validates it again
            best["worse_steps"] = sorted({*best.get("worse_steps", []), step})
        self.store.record_best({**best, "validated_step": step})
        self.store.prune(self.settings.keep_last)

    def _improves_no_more(self) -> bool:
        """Whether the last `early_stop_epochs` validations found nothing better; read from disk, so also resumed."""
        worse = [step for step in self.store.best().get("worse_steps", []) if step <= self.position.step]
        if len(worse) < self.settings.early_stop_epochs:
            return False
        log.info("stopping: run.%s has not improved in the last %d validations", self.settings.metric, len(worse))
        return True

    # ---- evaluation ---------------------------------------------------------------------------------------------

    def _evaluate_splits(self, splits: Sequence[str], cur_epoch: int | str, *, skip_reload: bool) -> dict[str, Any]:
        if splits and not skip_reload:
            self._reload_best()
        return {name: self.eval_epoch(name, cur_epoch, skip_reload=True) for name in splits}

    def _reload_best(self) -> None:
        name = distributed.on_main(lambda: self.store.best().get("checkpoint"))
        if name is None:  # nothing was validated: the weights at hand are the last ones
            return
        self._load(self.store.folder / name)

    def _load(self, folder: Path) -> None:
        self.engine.load_trained_state(checkpoint.load_weights(folder), folder)

    def eval_epoch(self, split_name: str, cur_epoch: int | str, skip_reload: bool = False) -> dict[str, Any]:
        """Metrics of a split, the same on each rank, always in eval mode."""
        if not skip_reload:
            self._reload_best()
        started, s = time.perf_counter(), self.settings
        metrics = evaluate_split(
            self.task,
            self.engine,
            evaluation_dataset(self.datasets, split_name),
            split=split_name,
            epoch=cur_epoch,
            config=self.plain_config,
            output_dir=self.output_dir,
            device=self.device,
            precision=s.precision,
            batch_size=s.batch_size_eval,
            num_workers=s.num_workers,
            seed=s.seed,
            allow_partial=s.allow_partial,
            limit_batches=s.limit_batches,
        )
        shown = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        partial = "PARTIAL, not the score of the split: " if metrics.get("partial") else ""
        log.info("%s: %s%s", split_name, partial, ", ".join(f"{name} {value:.4g}" for name, value in shown.items()))
        seconds = round(time.perf_counter() - started, 3)
        where = {"split": split_name, "step": self.position.step, "epoch": cur_epoch, "seconds": seconds}
        self.json_log.write("eval", **where, **shown)
        return metrics


def _made(output_dir: str | os.PathLike) -> Path:
    """`run.output_dir`, absolute and with its folder of results."""
    folder = expanded(output_dir).absolute()
    try:
        (folder / "result").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.output_dir: cannot write to {folder} ({error.strerror})") from error
    return folder
