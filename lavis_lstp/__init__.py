"""LSTP for LAVIS: a plug-in that `import lavis` finds by itself.

What comes in: nothing but the import of this package, which the installed `lavis_lstp.pth` does in every process.
What goes out: one import hook (`_hook.py`) that waits for `lavis`, and `register()`, which does the hook's work by
hand. Only the standard library is imported here, because every interpreter of the environment pays for it.
"""

from __future__ import annotations

__version__ = "0.1.0"


def register() -> None:
    """Make LAVIS know this package's data sets, models, tasks and runners; any number of times.

    Raises:
        ModuleNotFoundError: LAVIS is not installed; the message is the line to type.
    """
    from lavis_lstp import plugin

    plugin.register()


def _install_hook() -> None:
    from lavis_lstp import _hook

    _hook.install()


_install_hook()
