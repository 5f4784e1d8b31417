"""Keys that only other packages' classes know: LAVIS's models, data sets, tasks and runners, and transformers' parts.

In: a section as plain dicts and lists (interpolations unresolved), the defaults it is merged over, the classes that
will read it. Out: nothing, or a `ConfigError` that names the nearest valid key. LAVIS validates nothing, and a misspelt
key is silently without effect there. Its classes read keys that no YAML lists; those are found in the classes' sources
(`keys_read_by`). LAVIS's own files also hold keys that nothing reads, so there a key is an error where it comes close
to a valid one, and otherwise a warning. "backbone.config" and "generation" of our models go to transformers, whose
classes say which keys there are.
"""

from __future__ import annotations

import ast
import functools
import inspect
import logging
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping

from lavis_lstp.config.fields import MAPPING, nearest, reason, unknown_key
from lavis_lstp.config.model import MODEL_KEYS
from lavis_lstp.errors import ConfigError, unknown_name

logger = logging.getLogger(__name__)

LEGACY = frozenset(
    ("attn_implementation", "bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id", "rope_scaling")
    + ("rope_theta", "tie_word_embeddings", "torch_dtype", "use_cache")
)
"""Keys that configurations of published models hold and not every transformers release lists."""

TYPO = 0.75
"""Similarity (difflib) from which an unknown key is taken for a misspelt one: one letter in four."""

PROCESSOR_KEYS: dict[str, set | None] = {
    "vis_processor": {"train", "eval"},
    "vis_processor.*": None,  # each processor has its own
    "text_processor": {"train", "eval"},
    "text_processor.*": None,
}

LAVIS_DATASET_KEYS: dict[str, set | None] = {
    "": {"type", "data_type", "build_info", "vis_processor", "text_processor", "sample_ratio"}
    | {f"{modality}_processor" for modality in ("image", "video", "audio", "pc")},  # git main
    "build_info": {"annotations", "images", "videos", "features", "audio", "storage", "kwargs", "instance_id_key"},
    "build_info.annotations": {"train", "val", "test", "url", "storage"},
    "build_info.annotations.*": {"url", "storage", "md5"},
    "build_info.images": {"url", "storage"},
    "build_info.videos": {"url", "storage"},
    "build_info.features": {"url", "storage"},
    "build_info.*": None,
    **PROCESSOR_KEYS,
    "*": None,
}
"""Keys of LAVIS's data sets that are legal whether or not the default YAML has them, by dotted place.

Places not listed are handed to classes that nobody can tell from a YAML file, and accept any key.
"""


def is_ours(cls: type) -> bool:
    """Classes of this package, whose keys are listed in `config/model.py`, `data.py` and `run.py`."""
    return cls.__module__.split(".")[0] == "lavis_lstp"


def check_lavis_model(given: Mapping, defaults: Mapping, model_cls: type) -> None:
    """Raise ConfigError for a key of `model` that neither the defaults nor a class of LAVIS's know."""
    read = keys_read_by(model_cls)
    if read is not None:
        _check_mapping(given, defaults, "model", {"": {*MODEL_KEYS, *read}})


def check_transformers(given: Mapping, defaults: Mapping) -> None:
    """Raise ConfigError for a key of our models' sections that transformers would swallow."""
    if given.get("generation"):
        _check_generation(given["generation"])
    if (given.get("backbone") or {}).get("config"):
        _check_backbone(given["backbone"], defaults["backbone"])


def _check_generation(given: Mapping) -> None:
    from transformers import GenerationConfig

    _check_known("model.generation", given, GenerationConfig().to_dict())
    if (wanted := given.get("num_return_sequences") or 1) != 1:
        raise ConfigError(f"model.generation.num_return_sequences={wanted}: a question has one answer; set it to 1")
    try:
        GenerationConfig(**given)
    except transformers_errors() as error:
        raise ConfigError(f"model.generation: transformers says {reason(error)}") from error


def _check_backbone(given: Mapping, defaults: Mapping) -> None:
    """Raise ConfigError for a key of `model.backbone.config` that transformers' classes would swallow."""
    from transformers import CONFIG_MAPPING

    if (given.get("source") or defaults["source"]) != "hub":
        return  # the answerer's builder knows
    where, config = "model.backbone.config", given["config"]
    family = given.get("family") or defaults["family"]
    if family not in ("blip2", "instructblip"):
        return  # the error of the model says more
    family_class = CONFIG_MAPPING[{"blip2": "blip-2"}.get(family, family)]
    classes, listed = dict(family_class.sub_configs), defaults.get("config") or {}
    for name in classes:
        if name in config and not isinstance(config[name], Mapping):
            raise ConfigError(f"{where}.{name} must be {MAPPING}, got {config[name]!r}")
    texts = (config.get("text_config") or {}, listed.get("text_config") or {})
    language = texts[0].get("model_type") or texts[1].get("model_type")
    if not isinstance(language, str) or language not in CONFIG_MAPPING:
        raise ConfigError(unknown_name(f"model_type in {where}.text_config:", language, ("llama", "opt", "t5")))
    classes["text_config"] = CONFIG_MAPPING[language]
    parts = {name: {} for name in classes} | {"text_config": {"model_type": language}}
    _check_known(where, config, _keys_of(family_class(**parts)))
    for name, cls in classes.items():
        # The defaults' keys are legal although they are another language model's: they lie under every file.
        _check_known(f"{where}.{name}", config.get(name) or {}, _keys_of(cls()) | set(listed.get(name) or ()))


def transformers_errors() -> tuple[type[Exception], ...]:
    """Errors that transformers' classes raise for a value that they cannot use."""
    from huggingface_hub.errors import StrictDataclassError

    wrong = (ValueError, TypeError, KeyError, AttributeError, IndexError, AssertionError)
    return (*wrong, ArithmeticError, NotImplementedError, RuntimeError, ImportError, StrictDataclassError)


def _keys_of(config: object) -> set[str]:
    """Keys that a transformers configuration takes: its own, other names of them, and those of older releases."""
    return {*config.to_dict(), *config.attribute_map, *inspect.signature(type(config).__init__).parameters, *LEGACY}


def _check_known(where: str, given: Mapping, known: Iterable[str]) -> None:
    known = {name for name in known if not name.startswith("_")} - {"self", "kwargs", "transformers_version"}
    for key in given:
        if key not in known:
            raise ConfigError(unknown_key(where, key, known))


def check_lavis_dataset(given: Mapping, defaults: Mapping, name: str, builder_cls: type) -> None:
    """Raise ConfigError for a key of `datasets.<name>` that neither the defaults nor a builder of LAVIS's know."""
    read = keys_read_by(builder_cls)
    if read is None:
        return
    kinds = given.get("data_type") or defaults.get("data_type") or []  # build_info has a key for each
    kinds = [kinds] if isinstance(kinds, str) else kinds
    extra = {
        **LAVIS_DATASET_KEYS,
        "": {*LAVIS_DATASET_KEYS[""], *read},
        "build_info": {*LAVIS_DATASET_KEYS["build_info"], *kinds},
    }
    _check_mapping(given, defaults, f"datasets.{name}", extra)


def run_keys_of(classes: Iterable[type]) -> set[str]:
    """Keys that tasks and runners of other packages read, by their `RUN_KEYS` and by LAVIS's sources."""
    found: set[str] = set()
    for cls in classes:
        for klass in cls.__mro__:
            found |= set(vars(klass).get("RUN_KEYS", ()))
        if not is_ours(cls):
            found |= keys_read_by(cls) or set()
    return found


def _check_mapping(given: Mapping, defaults: Mapping, where: str, extra: Mapping, place: str = "") -> None:
    """Check the keys of a section of LAVIS's, and go down wherever it is known what may lie there.

    Args:
        where: what the error calls this mapping, such as "datasets.coco_caption.build_info".
        extra: keys legal beside the defaults, by dotted place below the section; None there means that nothing
            below is checked.
        place: this mapping's place in `extra`.
    """
    known = set(defaults) | (_extra_at(extra, place) or set())
    for key, value in given.items():
        if key not in known and "*" not in known:
            if nearest(str(key), known, TYPO):
                raise ConfigError(unknown_key(where, key, known))
            logger.warning("nothing reads the key '%s.%s'", where, key)
        inner = f"{place}.{key}".lstrip(".")
        default, legal = defaults.get(key), _extra_at(extra, inner)
        if isinstance(value, Mapping) and legal is not None and (default or legal):
            below = default if isinstance(default, Mapping) else {}
            _check_mapping(value, below, f"{where}.{key}", extra, inner)


def _extra_at(extra: Mapping[str, set | None], place: str) -> set | None:
    """Extra keys legal at a dotted place, None for any; the last part of an entry may be `*`."""
    parent = place.rpartition(".")[0]
    return extra.get(place, extra.get(f"{parent}.*".lstrip("."), set()))


_CONFIG_NAME = re.compile(r"(^|_)(cfg|config|kwargs)$")
_DICT_METHODS = {"get", "pop", "items", "keys", "values", "update", "copy", "setdefault"}


@functools.cache
def keys_read_by(cls: type) -> frozenset[str] | None:
    """Names that the sources of a class and its bases read from a configuration.

    Found are `cfg.get("x")`, `cfg["x"]`, `cfg.x`, `"x" in cfg`, `getattr(cfg, "x")` for every name that ends in cfg or
    config, and the same in the classes to which a `from_config(cfg)` is passed on.

    Returns:
        None where a class has no source to read, so that nothing can be said about its keys.
    """
    keys: set[str] = set()
    waiting, seen = [cls], set()
    while waiting:
        for klass in waiting.pop().__mro__:
            if klass in seen or klass.__module__.split(".")[0] in ("builtins", "torch", "abc", "transformers"):
                continue
            seen.add(klass)
            try:
                tree = ast.parse(textwrap.dedent(inspect.getsource(klass)))
            except (OSError, TypeError):
                return None
            keys |= _keys_in(tree)
            waiting += _delegates(tree, klass)
    return frozenset(keys)


def _keys_in(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        names: list[ast.AST | str] = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in _DICT_METHODS and _is_config(node.func.value):
                names = node.args[:1]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("getattr", "hasattr") and len(node.args) > 1 and _is_config(node.args[0]):
                names = node.args[1:2]
        elif isinstance(node, ast.Subscript) and _is_config(node.value):
            names = [node.slice]
        elif isinstance(node, ast.Compare) and any(_is_config(right) for right in node.comparators):
            names = [node.left]
        elif isinstance(node, ast.Attribute) and _is_config(node.value) and node.attr not in _DICT_METHODS:
            names = [node.attr]
        for name in names:
            value = name if isinstance(name, str) else getattr(name, "value", None)
            if isinstance(value, str):
                found.add(value)
    return found


def _is_config(node: ast.AST) -> bool:
    name = getattr(node, "id", None) or getattr(node, "attr", None)
    return isinstance(name, str) and bool(_CONFIG_NAME.search(name))


def _delegates(tree: ast.AST, klass: type) -> list[type]:
    """Classes named in the source whose `from_config` is called."""
    names = vars(sys.modules[klass.__module__])
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    called = (
        f.value.id for f in calls if isinstance(f, ast.Attribute) and f.attr == "from_config" and hasattr(f.value, "id")
    )
    return [names[name] for name in called if isinstance(names.get(name), type)]
