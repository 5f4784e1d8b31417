"""The recipes of projects/lstp as files: their names, their configurations, their headers and the commands in these."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import yaml

import lavis_lstp
from lavis_lstp.config import Config

ROOT = Path(__file__).resolve().parent.parent
PROJECT = ROOT / "projects" / "lstp"
ORDER = (
    *("spans_flant5xl", "spans_vicuna7b", "sampler_flant5xl", "sampler_vicuna7b", "locate_flant5xl", "locate_vicuna7b"),
    *("sf_flant5xl", "sf_vicuna7b", "sf_instruct_flant5xl"),
    *("video_flant5xl", "video_instruct_flant5xl", "video_vicuna7b"),
    *("flant5xl_ft", "vicuna_ft", "flant5xl_lora", "vicuna_lora", "own_videos"),
    *("spans_qwen3vl", "sampler_qwen3vl", "locate_qwen3vl", "qwen3vl_lora"),
    *("spans_nextgqa_qwen3vl", "sampler_gold_vicuna7b", "sampler_both_vicuna7b"),
)
TRAINS = [name for name in ORDER if not name.startswith(("spans", "locate"))]


def recipe(name: str) -> dict:
    return yaml.safe_load((PROJECT / f"{name}.yaml").read_text())


def config(name: str, *options: str):
    """The complete configuration."""
    lavis_lstp.register()
    return Config(SimpleNamespace(cfg_path=f"projects/lstp/{name}.yaml", options=list(options))).config


def header(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("#").strip() for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")]]


def commands(name: str) -> dict[str, list[str]]:
    """{label: words} of the header's commands."""
    found = (
        re.match(r"(1 GPU|8 GPUs|several nodes|evaluation|other videos|by scores): +(.*)", x)
        for x in header(file(name))
    )
    return {match[1]: shlex.split(match[2]) for match in found if match}


def file(name: str) -> Path:
    return PROJECT / f"{name}.yaml"


def options_of(words: list[str]) -> list[str]:
    return words[words.index("--options") + 1 :] if "--options" in words else []
