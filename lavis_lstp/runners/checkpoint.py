"""Checkpoint folders that are either complete or not counted.

    <output_dir>/checkpoints/step_00000123/
        model.safetensors   trained weights only
        ...                 what the engine and the runner need to go on (optimizer.pt, trainer.pt)
        manifest.json       last: config, versions, sizes and SHA-256 of the files above
    <output_dir>/checkpoints/{last,best}   symbolic links to one of them
    <output_dir>/checkpoints/best.json     the metric that made it the best, and how far validation has come

A folder is filled under a temporary name and renamed when its manifest is on disk. Weights go in and out as a state
dict; this module knows neither models nor optimizers.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lavis_lstp.errors import LstpError, WeightsError, no_value
from lavis_lstp.files import sha256_file, temporary, write_json, writing_to
from lavis_lstp.models.weights.reading import load_torch
from lavis_lstp.models.weights.saved_runs import (
    BEST,
    MANIFEST,
    checkpoint_of_run,
    complete_checkpoints,
    read_best,
    read_manifest,
    what_is_torn,
)
from lavis_lstp.redaction import without_secrets_in

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"


class CheckpointError(LstpError, OSError):
    """A checkpoint cannot be written; the ones already there are untouched."""


class CheckpointStore:
    """The checkpoints of one run.

    Saving is `begin` (one process), any number of writers, `commit` (one process).
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def temporary(self, step: int) -> Path:
        """The folder in which a checkpoint is written; the process that asks chooses it for all others."""
        return temporary(self.path(step))

    def begin(self, folder: Path) -> None:
        """Make the folder to write into, out of sight of `complete`."""
        folder.mkdir(parents=True)

    def commit(self, step: int, folder: Path, manifest: Mapping[str, Any]) -> Path:
        """Write the manifest and give the folder its name."""
        final = self.path(step)
        files = {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        for name in files:
            _fsync(folder / name)
        write_json(folder / MANIFEST, {**without_secrets_in(manifest), "files": files})
        _fsync(folder)
        if final.exists():  # the same step, saved by a run that was resumed from an earlier one
            shutil.rmtree(final)
        os.replace(folder, final)
        _fsync(self.folder)
        self.point("last", final)
        return final

    def abandon(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)

    def complete(self) -> list[Path]:
        """Folders of complete checkpoints by ascending step; a torn one is named in the log and left out."""
        return complete_checkpoints(self.folder)

    def latest(self) -> Path | None:
        """The complete checkpoint with the highest step whose files have the recorded content."""
        for path in reversed(self.complete()):
            files = read_manifest(path)["files"]
            damaged = [name for name, facts in files.items() if sha256_file(path / name) != facts["sha256"]]
            if not damaged:
                return path
            log.warning("skipping torn checkpoint %s: content of %s differs", path, ", ".join(damaged))
        return None

    def point(self, name: str, target: Path) -> None:
        """Make `checkpoints/<name>` a symbolic link to a checkpoint, in one step."""
        partial = temporary(self.folder / name)
        partial.symlink_to(target.name, target_is_directory=True)
        os.replace(partial, self.folder / name)

    def mend_links(self) -> None:
        """Point `last` and `best` at what they stand for: a killed process may have left them behind."""
        complete, best = self.complete(), self.best().get("checkpoint")
        for name, target in (("last", complete[-1].name if complete else None), ("best", best)):
            link = self.folder / name
            if target and not (link.is_symlink() and os.readlink(link) == target):
                self.point(name, self.folder / target)
            elif not target and link.is_symlink():
                link.unlink()

    def best(self) -> dict[str, Any]:
        """Content of best.json; empty before any validation.

        Keys: checkpoint, metric, value, epoch, worse_steps (validated since without improvement), validated_step.

        Raises:
            WeightsError: the file is not of this form.
        """
        return read_best(self.folder)

    def record_best(self, record: Mapping[str, Any]) -> None:
        if record.get("checkpoint"):
            self.point("best", self.folder / record["checkpoint"])
        write_json(self.folder / BEST, dict(record))

    def forget_best(self, metric: str) -> None:
        """Forget the best checkpoint, and what was validated, unless `metric` made it the best."""
        best = self.best()
        if best.get("metric", metric) != metric:
            log.warning("run.metric is %s: forgetting the best checkpoint by %s", metric, best["metric"])
            for name in (BEST, "best"):
                (self.folder / name).unlink(missing_ok=True)

    def prune(self, keep_last: int) -> None:
        """Delete all but the last `keep_last` complete checkpoints and the best one."""
        kept = {path.name for path in self.complete()[-keep_last:]} | {self.best().get("checkpoint")}
        for path in self.complete():
            if path.name not in kept:
                doomed = path.with_name(f".{path.name}.old.tmp")  # so that a kill leaves no half-deleted step_*
                os.replace(path, doomed)
                shutil.rmtree(doomed)

    def clean(self, *, fresh: bool = False) -> None:
        """Remove what killed writers left behind, and mend the links that they left wrong.

        In a fresh run also marks of an earlier one without checkpoints are removed.
        """
        for name in (BEST, "best", "last") if fresh else ():
            (self.folder / name).unlink(missing_ok=True)
        for path in self.folder.glob(".*.tmp"):  # also those of versions that named them otherwise
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        self.mend_links()


def find(path: str | os.PathLike) -> Path:
    """The checkpoint folder meant by a path: the folder itself, `checkpoints/best`, or the last one in a run's folder.

    Raises:
        WeightsError: there is none, or it is torn.
    """
    path = Path(path)
    if os.path.isdir(path / "checkpoints"):
        latest = CheckpointStore(path / "checkpoints").latest()
        if latest is None:
            raise WeightsError(f"no complete checkpoint in {path / 'checkpoints'}")
        return latest
    folder = (checkpoint_of_run(path) or path).resolve()
    if not os.path.isdir(folder):
        expected = "expected a folder such as <output_dir>/checkpoints/step_00000100"
        raise WeightsError(f"run.resume_ckpt_path: no checkpoint at {path}; {expected}{no_value(path)}")
    reason = what_is_torn(folder)
    if reason:
        raise WeightsError(f"{path} is not a complete checkpoint: {reason}")
    return folder


def save_weights(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Tensors on the CPU, contiguous and without shared storage, as safetensors."""
    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    with writing_to(path):
        save_file(plain, str(path), metadata={"format": "pt"})  # of several entries the order would differ each time
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)  # safetensors leaves 0600, which no colleague can read


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Trained weights of a checkpoint folder.

    Raises:
        WeightsError: there are none, or the file is damaged.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise WeightsError(f"no {WEIGHTS} in {folder}; expected a checkpoint folder")
    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise WeightsError(f"{path}: damaged, or no safetensors file ({error})") from None


def load_state(path: Path) -> dict[str, Any]:
    """The state of a run as `torch.save` wrote it: containers, numbers and tensors, on the CPU.

    Raises:
        WeightsError: the file is missing, damaged, or holds something else.
    """
    try:
        state = load_torch(path)
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror or error}") from None
    if not isinstance(state, dict):
        raise WeightsError(f"{path}: expected the state of a run, got a {type(state).__name__}")
    return state


def trained_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint of a model holds: the model's own say, or every weight that requires a gradient and the
    persistent buffers of the modules that own one."""
    if hasattr(model, "trainable_state_dict"):
        return model.trainable_state_dict()
    state = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for prefix, module in model.named_modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    state[f"{prefix}.{name}" if prefix else name] = buffer
    return state


def load_trained_state(model: torch.nn.Module, state: Mapping[str, torch.Tensor], source: object) -> None:
    """Put trained weights back, strictly.

    Raises:
        WeightsError: a trained tensor is missing from `state`, `state` has one the model does not train, or a
            shape differs; the line names the first few of each.
    """
    expected = trained_state(model)
    check_trained_state({name: tensor.shape for name, tensor in expected.items()}, state, source)
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(state[name])
    log.info("loaded %d trained tensors from %s", len(expected), source)


def check_trained_state(expected: Mapping[str, torch.Size], state: Mapping[str, torch.Tensor], source: object) -> None:
    """Compare names and shapes; raises as `load_trained_state` does."""
    problems = [
        *_some("missing", sorted(expected.keys() - state.keys())),
        *_some("unexpected", sorted(state.keys() - expected.keys())),
        *_some(
            "wrong shape",
            [
                f"{name} {tuple(state[name].shape)!r:.80} for {tuple(expected[name])}"
                for name in sorted(expected.keys() & state.keys())
                if expected[name] != state[name].shape
            ],
        ),
    ]
    if problems:
        raise WeightsError(f"trained weights in {source} do not fit the model: {'; '.join(problems)}")


def _some(kind: str, names: Iterable[str], limit: int = 3) -> list[str]:
    names = list(names)
    if not names:
        return []
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return [f"{len(names)} {kind}: {', '.join(names[:limit])}{more}"]


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
