"""What the import hook does around `import lavis`: shims before it, our registration after it.

Both halves may be called by hand and any number of times. LAVIS itself is reached only through names that 1.0.2
and its git main share: the registry, `lavis.models`, `lavis.common.config`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from types import ModuleType

REGISTERING = ("lavis_lstp.data.builders", "lavis_lstp.models.lstp", "lavis_lstp.tasks", "lavis_lstp.runners")
"""Importing one of these registers what it defines; they lie in the order in which imports may point."""

_state: dict = {"prepared": False, "registering": False, "registered": False, "failure": None}


def before_lavis() -> None:
    """Let LAVIS 1.0.2 import under today's transformers, and import no more than it needs. Idempotent."""
    if _state["failure"] is not None:  # LAVIS cannot be imported twice; say again what went wrong
        raise _state["failure"]
    if _state["prepared"]:
        return
    # Before decord, which LAVIS imports and whose bundled codec libraries otherwise replace those of PyAV in the whole
    # process: opening an encoder of VP9 then fails with "Invalid argument".
    import av  # noqa: F401

    from lavis_lstp.host import lazy_imports, shims

    shims.apply()
    lazy_imports.install()
    _state["prepared"] = True


def register() -> None:
    """Register data sets, models, tasks and runners with LAVIS and complete its entry points. Idempotent.

    Raises:
        ImportError: LAVIS is missing or too old; the message says what to type.
    """
    from lavis_lstp.host import hook, shims

    if "lavis" not in sys.modules:
        hook.check_lavis(importlib.util.find_spec("lavis"))
    before_lavis()
    import lavis  # the hook, where it is installed, calls this function from inside this import

    if _state["registered"] or _state["registering"]:
        return
    _state["registering"] = True
    try:
        shims.apply_to_lavis()
        for name in REGISTERING:
            importlib.import_module(name)
        _complete(lavis)
        _state["registered"] = True
    except Exception as error:
        _state["failure"] = error
        if hasattr(error, "add_note"):  # Python 3.11
            error.add_note("raised while lavis_lstp registered itself; LAVIS_LSTP_DISABLE=1 turns lavis_lstp off")
        raise
    finally:
        _state["registering"] = False


def _complete(lavis: ModuleType) -> None:
    """Patch the entry points that LAVIS's users call, in `lavis` and `lavis.models` alike."""
    import lavis.common.config as config_module
    import lavis.datasets.builders as builders
    import lavis.models as models

    from lavis_lstp.config.config import Config

    patched = {
        "load_model": _with_default_type(models.load_model),
        "load_model_and_preprocess": _with_default_preprocess(models.load_model_and_preprocess, models),
    }
    for module in (models, lavis):
        for name, function in patched.items():
            if hasattr(module, name):
                setattr(module, name, function)
    config_module.Config = Config
    # Both zoos are snapshots taken while LAVIS was imported; they are brought up to date in place.
    models.model_zoo.__init__()
    builders.dataset_zoo.__init__()


def _with_default_type(load_model):
    from lavis_lstp.config.names import resolve_model

    @functools.wraps(load_model)
    def load_model_by_name(name, model_type=None, *args, **kwargs):
        return load_model(name, resolve_model(name, model_type)[1], *args, **kwargs)

    return load_model_by_name


def _with_default_preprocess(load_model_and_preprocess, models):
    """LAVIS's function fails for a model without a `preprocess` section; LSTP normalises frames itself."""

    from lavis_lstp.config.names import resolve_model

    @functools.wraps(load_model_and_preprocess)
    def load_model_and_preprocess_by_name(name, model_type=None, is_eval=False, device="cpu"):
        from omegaconf import OmegaConf

        model_cls, model_type = resolve_model(name, model_type)
        config = OmegaConf.load(model_cls.default_config_path(model_type))
        if config.get("preprocess") is not None:
            return load_model_and_preprocess(name, model_type, is_eval, device)
        model = models.load_model(name, model_type, is_eval, str(device))
        return model, *models.load_preprocess({})

    return load_model_and_preprocess_by_name
