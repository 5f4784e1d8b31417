"""LSTP for LAVIS: a plug-in that `import lavis` finds by itself.

`lavis_lstp.pth` imports this package in every process of the environment, so this file is all that such a process
pays for (`benchmarks/startup.py`): one finder, which hands the few names it watches to `host/hook.py`.
`LAVIS_LSTP_DISABLE=1` leaves `sys.meta_path` alone; `register()` does by hand what the hook does.
"""

import os
import sys

__version__ = "0.1.0"

NEEDS_LAVIS = {
    "lavis_lstp.config.config",
    "lavis_lstp.data.builders",
    "lavis_lstp.data.qa_dataset",
    "lavis_lstp.models.lstp",
    "lavis_lstp.runners",
    "lavis_lstp.tasks",
}  # our modules that import LAVIS when they are imported; tests/host/test_imports.py compares this with the sources

MOVED = {
    "lavis_lstp.ask": "lavis_lstp.inference.loading",
    "lavis_lstp.cli": "lavis_lstp.commands.cli",
    "lavis_lstp.flow_files": "lavis_lstp.commands.flow",
    "lavis_lstp.launch": "lavis_lstp.host.launch",
    "lavis_lstp.lmms": "lavis_lstp.inference.lmms",
    "lavis_lstp.models.backbone": "lavis_lstp.models.answer.qformer",
    "lavis_lstp.models.flow": "lavis_lstp.models.where.flow",
    "lavis_lstp.models.frame_selector": "lavis_lstp.models.where.frame_selector",
    "lavis_lstp.models.temporal_sampler": "lavis_lstp.models.where.temporal_sampler",
    "webdataset_tools.storage": "lavis_lstp.data.shards.storage",
    "webdataset_tools.tar": "lavis_lstp.data.shards.tar",
}  # old names that scripts of users import -> where the module is now

WATCHED = NEEDS_LAVIS | MOVED.keys() | {"lavis", "lavis.train", "lavis.evaluate"}


PUBLIC = {
    "load": "lavis_lstp.inference.predictor",
    "push_to_hub": "lavis_lstp.models.weights.sharing",
    "select": "lavis_lstp.inference.selection",
    "select_from_scores": "lavis_lstp.models.where.selectors",
    "LSTP": "lavis_lstp.models.lstp",
    "TemporalSampler": "lavis_lstp.models.where.temporal_sampler",
    "Span": "lavis_lstp.schema",
    "read_frames": "lavis_lstp.data.video.reading",
    "probe": "lavis_lstp.data.video.reading",
}  # public name -> its module, which is imported when the name is asked for


def __getattr__(name):
    if name not in PUBLIC:
        raise AttributeError(f"module 'lavis_lstp' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(PUBLIC[name]), name)


def register():
    """Make LAVIS know this package's data sets, models, tasks and runners; any number of times."""
    from lavis_lstp.host import plugin

    plugin.register()


class Finder:
    """Stands first in `sys.meta_path`; `None`, for all names but the watched ones, means "ask the next finder"."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in WATCHED:
            return None
        from lavis_lstp.host import hook

        return hook.find_spec(self, fullname, path, target)


if os.environ.get("LAVIS_LSTP_DISABLE", "0") in ("", "0"):
    sys.meta_path.insert(0, Finder())
    if "lavis" in sys.modules:  # too late to wait for it
        register()
