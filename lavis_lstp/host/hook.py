"""What the finder in `__init__.py` answers with; loaded when one of its names is imported for the first time.

LAVIS has no plug-in discovery, so these names, and no others, are answered for:

    lavis                         the real package, wrapped: compatibility shims, real module, our registration
    lavis.train, lavis.evaluate   files of ours, unless this LAVIS has its own
    the modules in MOVED          old names of our modules
    the modules in NEEDS_LAVIS    ours, which import LAVIS: `lavis` is imported before they run, because half-imported
                                  they would be asked to register by the very import they make

Standard library only, and no torch: code that asks `importlib.util.find_spec("lavis")` gets here as well.
"""

import os
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec

from lavis_lstp import MOVED

INSTALL_LINE = "pip install --no-deps salesforce-lavis==1.0.2"
"""What to type where LAVIS is missing; `--no-deps` because its pins exclude every Python and torch of today."""

OLDEST_LAVIS = (1, 0, 2)

_checked = []

SERVED = {"lavis.train": "train.py", "lavis.evaluate": "evaluate.py"}


def find_spec(finder, fullname, path, target):
    """The spec of a watched name, or None where another finder should be asked.

    Raises:
        ImportError: `lavis` is missing or too old; the message says what to type.
    """
    if fullname == "lavis":
        sleep_while_waiting()
        spec = _ask_others(finder, fullname, path, target)
        check_lavis(spec)
        _check_run(spec)
        spec.loader = _LavisLoader(spec.loader)
        return spec
    if fullname in SERVED:
        return _ask_others(finder, fullname, path, target) or _served_spec(fullname)
    if fullname in MOVED:
        return ModuleSpec(fullname, _MovedLoader(MOVED[fullname]))
    if "lavis" in sys.modules:
        return None
    spec = _ask_others(finder, fullname, path, target)
    if spec is not None:
        spec.loader = _AfterLavisLoader(spec.loader)
    return spec


def _check_run(spec):
    """`python -m lavis.train` imports LAVIS to find the module; what is wrong with its words is said before that."""
    if sys.argv[:1] != ["-m"] or "-m" not in sys.orig_argv or _checked:  # Python is not looking for a module to run
        return
    name = sys.orig_argv[sys.orig_argv.index("-m") + 1]
    if name in SERVED and not os.path.exists(os.path.join(os.path.dirname(spec.origin), SERVED[name])):
        from lavis_lstp.host import launch

        _checked.append(name)  # the check itself asks where LAVIS is
        launch.check_first(sys.argv[1:], name)


def sleep_while_waiting():
    """Let torch's threads sleep where they wait for one another, unless the environment says otherwise.

    GNU OpenMP, which reads this when torch is first imported, lets them spin: on a machine with more work than cores
    two threads took 13 to 29 s for what one does in 1 s, and 1 s when they sleep (`benchmarks/load.py --only threads`).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _ask_others(finder, fullname, path, target):
    for other in sys.meta_path:
        if other is not finder and hasattr(other, "find_spec"):
            spec = other.find_spec(fullname, path, target)
            if spec is not None:
                return spec
    return None


class _Wrapper:
    """A loader that leaves everything but the two steps of an import to the loader it wraps."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        if name == "_loader":  # while being copied or unpickled
            raise AttributeError(name)
        return getattr(self._loader, name)

    def _hand_back(self, module):
        """From here on the module looks as if the wrapped loader had been alone."""
        module.__spec__.loader = module.__loader__ = self._loader


class _LavisLoader(_Wrapper):
    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        from lavis_lstp.host import plugin

        self._hand_back(module)
        plugin.before_lavis()
        self._loader.exec_module(module)
        plugin.register()


class _AfterLavisLoader(_Wrapper):
    """Imports LAVIS, which registers and thereby imports the wanted module; that one is then handed out."""

    def create_module(self, spec):
        import lavis  # noqa: F401

        self._done = spec.name in sys.modules
        return sys.modules.get(spec.name) or self._loader.create_module(spec)

    def exec_module(self, module):
        self._hand_back(module)
        if not self._done:
            self._loader.exec_module(module)


class _MovedLoader:
    """Hands out the module that took the place of an old name; both names are the same object."""

    def __init__(self, target):
        self._target = target

    def create_module(self, spec):
        module = import_module(self._target)
        self._spec = module.__spec__
        return module

    def exec_module(self, module):
        module.__spec__ = self._spec  # which the import system has just replaced


def _served_spec(fullname):
    from importlib.util import spec_from_file_location

    return spec_from_file_location(fullname, os.path.join(os.path.dirname(__file__), SERVED[fullname]))


def check_lavis(spec) -> None:
    """Raise, with the line to type, where LAVIS is missing or older than 1.0.2."""
    if spec is None:
        raise ModuleNotFoundError(f"lavis_lstp needs LAVIS; install it by: {INSTALL_LINE}", name="lavis")
    if spec.origin is None:  # a namespace package: some folder named lavis
        where = ", ".join(spec.submodule_search_locations or [])
        message = f"lavis_lstp needs LAVIS, and the folder {where} is not it; install it by: {INSTALL_LINE}"
        raise ModuleNotFoundError(message, name="lavis")
    folder = os.path.dirname(spec.origin)
    version = _version_beside(folder)
    too_old = version is not None and version < OLDEST_LAVIS
    if too_old or not os.path.exists(os.path.join(folder, "models", "blip2_models", "blip2_t5.py")):
        found = ".".join(map(str, version)) if version else "a version without BLIP-2"
        message = f"lavis_lstp needs LAVIS 1.0.2, found {found} in {folder}; install it by: {INSTALL_LINE}"
        raise ImportError(message, name="lavis", path=spec.origin)


def _version_beside(folder):
    """Version of salesforce-lavis as a tuple, or None where `folder` is a checkout and has no metadata."""
    for entry in os.listdir(os.path.dirname(folder)):
        name, _, rest = entry.partition("-")
        if name.lower() == "salesforce_lavis" and rest.endswith(".dist-info"):
            numbers = rest[: -len(".dist-info")].split(".")
            return tuple(int(n) for n in numbers if n.isdigit())
    return None
