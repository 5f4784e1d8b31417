"""Packages that LAVIS imports at its top and uses in a corner, put off until that corner is reached.

`import lavis` loads spacy for one VQA model and pandas for one helper: a third of what it costs beyond transformers.
Between `install()` and `finish()`, when a LAVIS module imports one of `PUT_OFF`, it gets a stand-in that imports the
real package at the first use of any attribute. The stand-in stays in LAVIS's namespace only: `finish()` takes it out
of `sys.modules`, so whoever imports the package later gets the package itself, by Python's own import, locks included.
What is already imported is left alone, and what is not installed fails as before.

Meanwhile the garbage collector runs less often: an import makes objects that stay.
"""

from __future__ import annotations

import gc
import importlib
import sys
import types
from collections.abc import Iterable
from importlib.machinery import ModuleSpec, PathFinder

PUT_OFF = ("pandas", "spacy")
_GC_THRESHOLD = (200_000, 50, 100)  # allocations, and collections of the younger generation, between two collections
_MADE_BY_IMPORT = frozenset(("__name__", "__doc__", "__package__", "__loader__", "__spec__", "__file__", "__cached__"))


class _StandIn(types.ModuleType):
    """A module that forwards to the real one, which it imports when first needed."""

    def _real(self) -> types.ModuleType:
        name = self.__name__
        if sys.modules.get(name) is self:
            _finder.names.discard(name)
            del sys.modules[name]
        return importlib.import_module(name)

    def __getattr__(self, name: str):
        if name in _MADE_BY_IMPORT or not vars(self).get("_stands_in"):  # asked by the import itself
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(self._real(), name)

    def __setattr__(self, name: str, value) -> None:
        if name in _MADE_BY_IMPORT:
            super().__setattr__(name, value)
        else:
            setattr(self._real(), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._real(), name)

    def __dir__(self) -> list[str]:
        return dir(self._real())


class _StandInLoader:
    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        # Importing a submodule asks its parent for __path__; that has to import the parent for good.
        spec.submodule_search_locations = None
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        vars(module)["_stands_in"] = True


class _Finder:
    """Answers LAVIS's imports of `names` with stand-ins, and nobody else's."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if fullname not in self.names or not _imported_by_lavis():
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None:
            spec.loader = _StandInLoader()
        return spec


def _imported_by_lavis() -> bool:
    frame = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("importlib"):
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__", "").startswith("lavis.")


_finder = _Finder()
_saved_threshold: list[tuple[int, int, int]] = []


def install(names: Iterable[str] = PUT_OFF) -> None:
    """Put off `names` until `finish()`. Call before LAVIS is imported; a second call changes nothing."""
    if _finder in sys.meta_path:
        return
    _finder.names = set(names)
    sys.meta_path.insert(0, _finder)
    _saved_threshold[:] = [gc.get_threshold()]
    if gc.get_threshold()[0] > 0:  # 0 means that the user has switched it off
        gc.set_threshold(*_GC_THRESHOLD)


def finish() -> None:
    """From here on imports are Python's own. Call after LAVIS is imported; a second call changes nothing."""
    if _finder not in sys.meta_path:
        return
    sys.meta_path.remove(_finder)
    for name in [name for name, module in sys.modules.items() if isinstance(module, _StandIn)]:
        del sys.modules[name]
    gc.set_threshold(*_saved_threshold.pop())
