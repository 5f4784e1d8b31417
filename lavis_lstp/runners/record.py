"""What a run leaves behind for people and machines: log.jsonl, run_manifest.json, a progress bar.

In: numbers and settings from the runner, on rank 0. Out: one JSON line per event in `log.jsonl` (kind "train",
"eval", "checkpoint"), one manifest with everything needed to repeat the run, a bar on a terminal or a log line
elsewhere.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import lavis_lstp
from lavis_lstp.errors import ConfigError
from lavis_lstp.files import read_jsonl, read_record, write_json, write_jsonl, writing_to
from lavis_lstp.redaction import without_secrets_in
from lavis_lstp.runners.trackers import Trackers, check_trackers

log = logging.getLogger(__name__)

PACKAGES = tuple("torch torchvision transformers salesforce-lavis peft numpy av safetensors deepspeed".split())


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "lavis_lstp": getattr(lavis_lstp, "__version__", "unknown")}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """Commit of the checkout this package runs from, "-dirty" where files differ; None outside a checkout."""
    root = Path(lavis_lstp.__file__).resolve().parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


class RunManifest:
    """`run_manifest.json`: who ran what on which data, and how it ended.

    Nothing is written before `running`, so that a run which is refused leaves an earlier one's manifest alone.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], *, enabled: bool = True):
        self.path = path
        self.enabled = enabled
        self.facts: dict[str, Any] = {
            "format": "lavis_lstp.run",
            "version": 1,
            "command": sys.argv,
            "cwd": os.getcwd(),
            "versions": versions(),
            "git_revision": git_revision() if enabled else None,
            "threads": torch.get_num_threads(),
            **facts,
        }

    def add(self, **facts: Any) -> None:
        self.facts.update(facts)

    def earlier(self) -> dict[str, Any]:
        """The manifest that is there now, of the run that is being continued."""
        return read_record(self.path, error=ConfigError) if self.path.is_file() else {}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Keep the status true: running, then finished, terminated or failed, and why."""
        self._write(status="running", started=_now())
        with contextlib.ExitStack() as at_the_end:
            at_the_end.push(self._ended)
            yield

    def _ended(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is None:
            self._write(status="finished", finished=_now())
        elif issubclass(kind, SystemExit):
            self._write(status="terminated", finished=_now())
        else:
            self._write(status="failed", finished=_now(), error=f"{kind.__name__}: {error}")

    def _write(self, **facts: Any) -> None:
        self.facts.update(facts)
        if self.enabled:
            write_json(self.path, without_secrets_in(self.facts))


class JsonLog:
    """Appends JSON lines; lines of steps that a resumed run will do again are removed first.

    Args:
        track: trackers that get the same numbers.
    """

    def __init__(self, path: Path, *, enabled: bool = True, track: Sequence[str] = ()):
        self.path = path
        self.enabled = enabled
        self.track = tuple(track) if enabled else ()
        self._step = -1
        self._trackers: Trackers | None = None
        check_trackers(self.track)

    def rewind(self, step: int) -> None:
        """Keep what happened up to and including optimizer step `step`; -1 starts afresh."""
        self._step = step
        if not self.enabled or not self.path.exists():
            return
        write_jsonl(self.path, [row for row in read_jsonl(self.path) if row.get("step", 0) <= step])

    def write(self, kind: str, **values: Any) -> None:
        if self.enabled:
            with writing_to(self.path), open(self.path, "a", encoding="utf-8") as handle:
                handle.write(json.dumps({"kind": kind, **values}, ensure_ascii=False) + "\n")
        if self.track:
            self._trackers = self._trackers or Trackers(self.track, self.path.parent, self._step)
            self._trackers.write(kind, values)

    def close(self) -> None:
        """Let the trackers write what they hold."""
        if self._trackers:
            self._trackers.close()
            self._trackers = None


def progress(iterable: Iterable | None = None, *, total: int, initial: int = 0, title: str, main: bool) -> Any:
    """A tqdm bar on rank 0's terminal, silent elsewhere."""
    from tqdm import tqdm

    return tqdm(
        iterable,
        total=total,
        initial=initial,
        desc=title,
        disable=not main or not sys.stderr.isatty(),
        dynamic_ncols=True,
        leave=False,
    )


def parameter_table(model: torch.nn.Module) -> str:
    """Trained and all parameters of each part, one line: what is trained is a setting that is easy to get wrong."""
    rows = []
    for name, part in model.named_children():
        total = sum(p.numel() for p in part.parameters())
        if total:
            rows.append(f"{name} {sum(p.numel() for p in part.parameters() if p.requires_grad):,} of {total:,}")
    if hasattr(model, "trained_parts"):
        rows.append("trained parts: " + ", ".join(f"{name} {count:,}" for name, count in model.trained_parts().items()))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return f"trained parameters: {trained:,} of {total:,} ({'; '.join(rows)})"


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
