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

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lavis_lstp.errors import LstpError, WeightsError
from lavis_lstp.files import sha256_file, write_json

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
_NAME = re.compile(r"step_(\d{8,})")


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
        return self.folder / f".step_{step:08d}.tmp"

    def begin(self, step: int) -> Path:
        """An empty folder to write into, out of sight of `complete`."""
        folder = self.temporary(step)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def commit(self, step: int, manifest: Mapping[str, Any]) -> Path:
        """Write the manifest and give the folder its name."""
        folder, final = self.temporary(step), self.path(step)
        files = {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        for name in files:
            _fsync(folder / name)
        write_json(folder / MANIFEST, {**manifest, "files": files})
        _fsync(folder)
        if final.exists():  # the same step, saved by a run that was resumed from an earlier one
            shutil.rmtree(final)
        os.replace(folder, final)
        _fsync(self.folder)
        self.point("last", final)
        return final

    def abandon(self, step: int) -> None:
        shutil.rmtree(self.temporary(step), ignore_errors=True)

    def complete(self) -> list[Path]:
        """Folders of complete checkpoints by ascending step; a torn one is named in the log and left out."""
        found = []
        for path in sorted(self.folder.glob("step_*"), key=step_of):
            reason = what_is_torn(path)
            if reason:
                log.warning("skipping torn checkpoint %s: %s", path, reason)
            else:
                found.append(path)
        return found

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
        partial = self.folder / f".{name}.{os.getpid()}.tmp"
        partial.unlink(missing_ok=True)
        partial.symlink_to(target.name, target_is_directory=True)
        os.replace(partial, self.folder / name)

    def best(self) -> dict[str, Any]:
        """Content of best.json; empty before any validation.

        Keys: checkpoint, metric, value, epoch, worse_steps (validated since without improvement), validated_step.
        """
        path = self.folder / "best.json"
        best = json.loads(path.read_text()) if path.is_file() else {}
        if best.get("checkpoint") and what_is_torn(self.folder / best["checkpoint"]):
            log.warning("ignoring %s: its checkpoint %s is gone or torn", path, best["checkpoint"])
            return {}
        return best

    def record_best(self, record: Mapping[str, Any]) -> None:
        if record.get("checkpoint"):
            self.point("best", self.folder / record["checkpoint"])
        write_json(self.folder / "best.json", dict(record))

    def forget_best(self, metric: str) -> None:
        """Forget the best checkpoint, and what was validated, unless `metric` made it the best."""
        best = self.best()
        if best.get("metric", metric) != metric:
            log.warning("run.metric is %s: forgetting the best checkpoint by %s", metric, best["metric"])
            for name in ("best.json", "best"):
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
        """Remove what killed writers left behind; in a fresh run also marks of an earlier one without checkpoints."""
        for name in ("best.json", "best", "last") if fresh else ():
            (self.folder / name).unlink(missing_ok=True)
        for path in self.folder.glob(".*.tmp"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def what_is_torn(path: Path) -> str | None:
    """Why a folder is no complete checkpoint, or None if it is one. Compares sizes, not content."""
    if step_of(path) < 0 or not path.is_dir():
        return "not a folder named step_<number>"
    if not (path / MANIFEST).is_file():
        return f"no {MANIFEST}"
    try:
        files = read_manifest(path)["files"]
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError):
        return f"unreadable {MANIFEST}"
    for name, facts in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        size = (path / name).stat().st_size
        if size != facts["bytes"]:
            return f"{name} has {size} bytes, expected {facts['bytes']}"
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / MANIFEST).read_text(encoding="utf-8"))


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
    folder = path.resolve()
    if not os.path.isdir(folder):
        raise WeightsError(f"no checkpoint at {path}; expected a folder such as <output_dir>/checkpoints/step_00000100")
    reason = what_is_torn(folder)
    if reason:
        raise WeightsError(f"{path} is not a complete checkpoint: {reason}")
    return folder


def save_weights(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Tensors on the CPU, contiguous and without shared storage, as safetensors."""
    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    save_file(plain, str(path), metadata={"format": "pt"})  # of several entries the order would differ each time
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)  # safetensors leaves 0600, which no colleague can read


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Trained weights of a checkpoint folder."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise WeightsError(f"no {WEIGHTS} in {folder}; expected a checkpoint folder")
    return load_file(str(path))


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
                f"{name} {tuple(state[name].shape)} for {tuple(expected[name])}"
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
