"""Shared fixtures. Tests make every input they need; only real footage is looked for outside the repository."""

from __future__ import annotations

import logging
import os
import random
import sys
from pathlib import Path

import hypothesis
import pytest

# A test process has cores to itself only when told so; two threads is what the time limits assume.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in every command of the package
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["LAVIS_LSTP_STORE"] = "off"  # what one test kept would spare another one its work
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The same examples in each run; `--hypothesis-profile=default` looks for others.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"
# Test modules use one another's small makers of input, whichever folder they lie in.
sys.path += sorted(str(path) for path in Path(__file__).resolve().parent.iterdir() if path.is_dir())


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Weights that a test does not seed are the same in each run: PyTorch begins with another seed in each process."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_log_handler_is_left():
    """A command that is called here logs to this test's stderr, which is closed when the next test logs."""
    before = logging.root.handlers[:]
    yield
    for handler in set(logging.root.handlers) - set(before):
        logging.root.removeHandler(handler)


@pytest.fixture(autouse=True, scope="module")
def no_process_group_is_left():
    """A run of one process makes a group where LAVIS or DeepSpeed asks for one, and a process can have but one.

    DeepSpeed also wants LOCAL_RANK, from which accelerate would conclude that there are several processes.
    """
    launched = "LOCAL_RANK" in os.environ
    yield
    if not launched:
        os.environ.pop("LOCAL_RANK", None)
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        if "deepspeed.comm.comm" in sys.modules:
            sys.modules["deepspeed.comm.comm"].cdb = None


@pytest.fixture(scope="module")
def predictor():
    """The shipped example's model, ready to answer."""
    import lavis_lstp

    with lavis_lstp.load("example") as loaded:
        yield loaded


@pytest.fixture(scope="session")
def ranks():
    """Starts the processes of a run in milliseconds: `ranks.run(2, job, {...})`."""
    from ranks import Ranks

    server = Ranks()
    yield server
    server.close()


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def real_videos() -> list[Path]:
    """The real clips, kept beside the repository; `LAVIS_LSTP_TEST_VIDEOS` names another folder.

    Films are left out: chained motion vectors of ten minutes take two, and benchmarks are their place.
    """
    from lavis_lstp.data.video import probe

    folder = Path(os.environ.get("LAVIS_LSTP_TEST_VIDEOS", ROOT.parent / "shared" / "videos"))
    clips = [path for path in sorted(folder.glob("*.mp4")) if probe(path).duration_s <= 60]
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
