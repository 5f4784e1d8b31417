"""A run, a checkpoint or a name -> a model in eval mode.

In: weights, and the manifest that lies beside them: the model is built as it was trained. Out: the model, and what
whoever reads its answers should know.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis_lstp.config.model import asks_sampler
from lavis_lstp.errors import ConfigError
from lavis_lstp.models.weights.recorded import recorded_model

logger = logging.getLogger(__name__)

EXAMPLE = Path(__file__).resolve().parents[1] / "example"
"""A tiny trained checkpoint with `clip.mp4` and `questions.json`, which ship with the package."""
RANDOM_WEIGHTS = (
    "the model has random weights, so its answer means nothing; train one (make demo), then --checkpoint RUN"
)


def build_model(name: str, model_type: str | None, checkpoint: str | None, options: Sequence[str]):
    """The model in eval mode, and notes: lines that whoever reads its answers should see.

    Args:
        checkpoint: a run's folder, one of its checkpoints, or a weights file. With a manifest beside the weights, the
            model is built as it was trained, the checkpoints that run began with included.
        options: `model.a.b=c` overrides.
    """
    chosen = {"arch": name, **({"model_type": model_type} if model_type else {})}
    section = recorded_model(checkpoint, options) if checkpoint is not None else {}
    model_class, config = model_config({**chosen, **section}, [] if checkpoint is None else [checkpoint], options)
    notes = []
    if config.flow.name == "precomputed":
        notes.append("flow is computed with dis, as nobody has precomputed this video's")
        config.flow.name = "dis"
    if not config.checkpoint and not config.backbone.weights:
        notes.append(RANDOM_WEIGHTS)
    if not asks_sampler(config.selector.name, config.scorer.name):  # it was trained, and is not asked
        config.train = [part for part in config.train or () if part != "sampler"]
        config.losses, config.refinement.in_loop = ["lm"], False
    model = model_class.from_config(config).eval()
    if model.selector.by_data:
        what = "spans" if model.selector.needs_span else "frames"
        raise ConfigError(
            f"selector '{model.selector.name}' takes {what} from a data set, and a video alone has none; "
            "add --options model.selector.name=lstp"
        )
    return model, notes


def model_config(section: Mapping[str, Any], checkpoints: Sequence[str], options: Sequence[str]):
    """The class and the complete config of a model.

    Args:
        section: `model` of a config, however short; of a recorded one, what `recorded_model` gives.
        checkpoints: loaded after those that `section` names.

    Raises:
        ConfigError: not a model of LSTP, or an option that nobody reads.
    """
    from lavis_lstp import register

    register()
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from lavis_lstp.config import complete_model, with_options
    from lavis_lstp.config.names import resolve_model
    from lavis_lstp.models.lstp import LSTP

    given = with_options(OmegaConf.create({"model": dict(section)}), options)
    if set(given) != {"model"} or not isinstance(given.model, DictConfig):
        raise ConfigError(f"--options of this command begin with 'model.', got {' '.join(options)}")
    model_class, _ = resolve_model(given.model.get("arch"), given.model.get("model_type"))
    if not issubclass(model_class, LSTP):
        raise ConfigError(f"this command is for LSTP models, '{given.model.arch}' is {model_class.__name__}")
    try:
        config = OmegaConf.create(OmegaConf.to_container(complete_model(given), resolve=True)).model
    except OmegaConfBaseException as error:
        raise ConfigError(f"cannot apply --options {' '.join(options)}: {str(error).splitlines()[0]}") from error
    if checkpoints:
        earlier = config.checkpoint or []
        config.checkpoint = [*([earlier] if isinstance(earlier, str) else earlier), *checkpoints]
    return model_class, config
