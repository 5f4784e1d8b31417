"""Names of the models and the YAML file behind each type.

In: a registered name and a type. Out: the complete `model` section: `config/model.py` lists every key, a file holds
what differs and may name with `extends` another file that it differs from.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from lavis_lstp.config.fields import laid_over
from lavis_lstp.config.model import ModelSettings
from lavis_lstp.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "models"

MODEL_TYPES: dict[str, dict[str, Path]] = {
    name: {kind: CONFIGS / f"{file}.yaml" for kind, file in types.items()}
    for name, types in {
        "lstp_tiny": {"default": "lstp_tiny"},
        "lstp_vicuna7b": {
            "default": "lstp_7b",
            "pretrained": "lstp_7b",
            "base": "lstp_vicuna7b",
            "lora": "lstp_vicuna7b_lora",
        },
        "lstp_flant5xl": {"default": "lstp_flant5xl", "base": "lstp_flant5xl", "lora": "lstp_flant5xl_lora"},
        "lstp_instruct_flant5xl": {
            "default": "lstp_instruct_flant5xl",
            "base": "lstp_instruct_flant5xl",
            "lora": "lstp_instruct_flant5xl_lora",
        },
        "lstp_video_llm": {
            "default": "lstp_video_llm",
            "qwen3_vl_8b": "lstp_video_llm",
            "qwen2_5_vl_7b": "lstp_qwen2_5_vl_7b",
            "smolvlm2_2b": "lstp_smolvlm2_2b",
            "llava_onevision_7b": "lstp_llava_onevision_7b",
            "internvl3_8b": "lstp_internvl3_8b",
            "endpoint": "lstp_endpoint",
        },
    }.items()
}
"""Registered name -> type -> YAML. A new variant is a line here and a file there."""


def load_variant(path: str | Path) -> DictConfig:
    """The file's root, with `model` laid over what it extends and over the defaults of `ModelSettings`.

    Raises:
        ConfigError: a file is missing, which only a damaged installation can cause.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"the default configuration {path} is missing from the installation; install it again")
    own = OmegaConf.load(path)
    parent = own.pop("extends", None)
    below = load_variant(path.parent / parent) if parent else base()
    return OmegaConf.unsafe_merge(below, own)  # nobody else has it


def base() -> DictConfig:
    """The defaults that lie under every file."""
    return OmegaConf.create({"model": laid_over(ModelSettings)})


def complete(model_cfg) -> dict:
    """A `model` section, however short, with the default of every key it leaves out."""
    if OmegaConf.is_config(model_cfg):  # while it lies in the configuration that its interpolations speak of
        model_cfg = OmegaConf.to_container(model_cfg, resolve=True)
    return OmegaConf.to_container(laid_over(ModelSettings, model_cfg), resolve=True)
