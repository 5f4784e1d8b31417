"""One list of settings and the way from a YAML file and `--options` to a complete configuration.

`model`, `data` and `run` list every key with type, default, range and meaning; `fields` checks values by them; `load`
finds and reads files and options. None of these imports torch or LAVIS. `config` asks LAVIS's registry which models,
tasks, runners and data sets there are, and `other_keys` which keys they read.
"""

from __future__ import annotations

from typing import Any

from lavis_lstp.config.load import (
    PACKAGE,
    evaluation_parts,
    evaluations,
    find_config,
    load_recipe,
    options_to_dotlist,
    project_files,
    recipes,
    with_options,
)

__all__ = [
    "PACKAGE",
    "evaluation_parts",
    "evaluations",
    "find_config",
    "load_recipe",
    "options_to_dotlist",
    "project_files",
    "recipes",
    "with_options",
]


def __getattr__(name: str) -> Any:
    """`Config` and `complete_model`, which need LAVIS."""
    if name not in ("Config", "complete_model"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lavis_lstp.config import config

    return getattr(config, name)
