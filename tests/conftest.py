"""Shared fixtures. Tests make every input they need; only real footage is looked for outside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# A test process has cores to itself only when told so; two threads is what the time limits assume.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def real_videos() -> list[Path]:
    """The real clips, kept beside the repository; `LAVIS_LSTP_TEST_VIDEOS` names another folder."""
    folder = Path(os.environ.get("LAVIS_LSTP_TEST_VIDEOS", ROOT.parent / "shared" / "videos"))
    clips = sorted(folder.glob("*.mp4"))
    if not clips:
        pytest.skip(f"no real footage in {folder}; set LAVIS_LSTP_TEST_VIDEOS to a folder with .mp4 files")
    return clips


@pytest.fixture(scope="session")
def build():
    """(name, changes to the defaults) -> {split: data set}."""
    import lavis_lstp

    lavis_lstp.register()
    from lavis.common.registry import registry
    from lavis.datasets.builders.base_dataset_builder import load_dataset_config
    from omegaconf import OmegaConf

    def build(name: str, **changes):
        builder = registry.get_builder_class(name)
        config = OmegaConf.merge(load_dataset_config(builder.default_config_path()), changes)
        return builder(config).build_datasets()

    return build
