"""The registered class and the type that a model's name stands for."""

from __future__ import annotations

from lavis_lstp.errors import ConfigError, unknown_name


def default_model_type(model_cls: type) -> str:
    """The type meant where none is named: "default", else the class's DEFAULT_MODEL_TYPE, else its first one.

    Raises:
        ConfigError: the class has no types at all (LAVIS's base classes).
    """
    types = list(getattr(model_cls, "PRETRAINED_MODEL_CONFIG_DICT", {}))
    if "default" in types:
        return "default"
    named = getattr(model_cls, "DEFAULT_MODEL_TYPE", None)
    if named is not None:
        return named
    if not types:
        raise ConfigError(f"model class {model_cls.__name__} has no model types to choose from")
    return types[0]


def resolve_model(name: str, model_type: str | None) -> tuple[type, str]:
    """The registered class and a type it has.

    Raises:
        ConfigError: no such model, or no such type of it; the nearest known name is in the message.
    """
    from lavis.common.registry import registry

    model_cls = registry.get_model_class(name)
    if model_cls is None:
        raise ConfigError(unknown_name("model", name, registry.list_models()))
    model_type = model_type or default_model_type(model_cls)
    if model_type not in model_cls.PRETRAINED_MODEL_CONFIG_DICT:
        raise ConfigError(unknown_name(f"model_type of {name}", model_type, model_cls.PRETRAINED_MODEL_CONFIG_DICT))
    return model_cls, model_type
