"""A run, a checkpoint or a name -> a model in eval mode.

In: weights, and the manifest that lies beside them: the model is built as it was trained. Out: the model, and what
whoever reads its answers should know.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis_lstp.config.data import VideoSettings, settings_of
from lavis_lstp.config.fields import checked
from lavis_lstp.config.model import asks_sampler
from lavis_lstp.errors import ConfigError, WeightsError, shortened
from lavis_lstp.files import expanded, strict_json
from lavis_lstp.untrusted import recorded, why_no_path

logger = logging.getLogger(__name__)

DEFAULT_FRAMES = 64  # T where no run says how many
READING = ("frames", "flow_pairs", "fps", "short_videos", "decode_size")
"""Keys of a data set that decide which pixels and which flow are read of a video, beside num_frames."""
EXAMPLE = Path(__file__).resolve().parents[1] / "example"
"""A tiny trained checkpoint with `clip.mp4` and `questions.json`, which ship with the package."""
HUB_KEYS = ("backbone.weights", "sampler.weights", "sampler.tokenizer", "scorer.weights")
"""Settings of a model that may name a repository of the hub."""
CONVERTED = "lavis-lstp convert"
"""What a manifest that `lavis-lstp convert` wrote says of its writer."""
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
        used = model.selector
        what = "spans" if used.needs_span else "bit costs" if used.needs_cost else "frames"
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


def recorded_run(checkpoint: str) -> tuple[Path, dict[str, Any]]:
    """The manifest beside a checkpoint's weights, and the config in it; empty where there is no manifest.

    Raises:
        WeightsError: no weights there, or a manifest that is damaged or not a run's.
    """
    from lavis_lstp.models.weights.reading import weights_file

    manifest = weights_file(checkpoint).parent / "manifest.json"
    if not manifest.is_file():
        return manifest, {}
    try:
        recorded = strict_json(manifest.read_text(encoding="utf-8-sig"), finite=False)
        config = recorded["config"]
        if recorded.get("written_by") == CONVERTED and "arch" not in config["model"]:
            return manifest, {}  # RAFT or a sampler alone: of any model
        config["model"]["arch"]
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{manifest}: not the manifest of a run's checkpoint ({type(error).__name__}: {error}); "
            "name the weights of a run, or move the file away and choose --model"
        ) from error
    return manifest, config


def recorded_model(checkpoint: str, options: Sequence[str] = ()) -> dict[str, Any]:
    """The model section of the run that wrote the checkpoint, with the checkpoints it began with where they lie.

    Args:
        options: overrides of the user's own; what the manifest says under their keys is not looked at.

    Raises:
        ConfigError: the manifest names a variable, a command or an address, see `untrusted.recorded`, something that
            would be downloaded, or a file to write.
    """
    from lavis_lstp.config import options_to_dotlist

    manifest, config = recorded_run(checkpoint)
    if not config:
        return {}
    given = [option.partition("=")[0] for option in options_to_dotlist(options)]
    section = recorded({"model": config["model"]}, manifest, replaced=given)["model"]
    for key in HUB_KEYS:
        part, _, name = key.partition(".")
        found = section[part].get(name) if isinstance(section.get(part), Mapping) else None
        if isinstance(found, str) and f"model.{key}" not in given and not _may_be_fetched(found):
            raise ConfigError(
                f"{manifest}: model.{key} is '{found}', which is neither on this machine nor in the hub's cache nor "
                "one of the published models, and what is downloaded is not for a file to say; where you trust it: "
                f"--options model.{key}={found}"
            )
    served = section["backbone"].get("endpoint") if isinstance(section.get("backbone"), Mapping) else None
    cache = served.get("cache") if isinstance(served, Mapping) else None
    if cache is not None and "model.backbone.endpoint.cache" not in given:
        raise ConfigError(
            f"{manifest}: model.backbone.endpoint.cache is {shortened(cache)!r}, and where answers are written is not "
            "for a file to say; where you want it name it: --options model.backbone.endpoint.cache=FILE, or =null"
        )
    earlier = section.get("checkpoint") or []
    earlier = [earlier] if isinstance(earlier, str) else earlier
    return section | {"checkpoint": [_where_the_run_stood(manifest, path) for path in earlier if path]}


def _may_be_fetched(name: str) -> bool:
    """Whether `name` is on this machine, in the hub's cache, or of a model that this package's own files name."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from lavis_lstp.models.weights.hub import HUB_MODELS, local_path

    repository = "/".join(name.split("/")[:2])
    cached = Path(HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    return local_path(name) is not None or repository in HUB_MODELS or (why_no_path(name) is None and cached.is_dir())


def _where_the_run_stood(manifest: Path, path: str) -> str:
    """A relative path in a run's config, looked for in the folders above the run before the current one.

    The run was started in one of those, as a rule. Only there is it the run's own: another `output/demo/base` may lie
    in the current folder.

    Raises:
        WeightsError: it is in none of them.
    """
    from lavis_lstp.models.weights.hub import checkpoint_source

    given = expanded(path)
    for folder in () if given.is_absolute() else manifest.resolve().parents:
        if (folder / given).exists():
            return str(folder / given)
    try:
        if not _may_be_fetched(path):
            raise WeightsError("not on this machine, in the hub's cache, or of a published model")
        return str(checkpoint_source(path))  # below the current folder, among the user's weights, or on the hub
    except WeightsError as error:
        where = "" if given.is_absolute() else ", neither in the current folder nor in one above that run"
        raise WeightsError(
            f"the run of {manifest} began with the weights '{path}', which are gone{where}; "
            f"put them back there, or start `ask` in the folder where the run was started ({error})"
        ) from error


def recorded_frames(checkpoint: str | None, default: int = DEFAULT_FRAMES) -> int:
    """T of the run that wrote the checkpoint, the largest of its data sets; `default` where nothing says."""
    counts = [section["num_frames"] for section in _recorded_videos(checkpoint).values() if "num_frames" in section]
    return max(counts, default=default)


def recorded_reading(checkpoint: str | None) -> tuple[dict[str, Any], list[str]]:
    """Return how the run that wrote the checkpoint read frames: keys of READING that differ from their defaults.

    Where its data sets read differently, the first one of the configuration counts, and a note says so.

    Returns:
        The settings, and notes.

    Raises:
        ConfigError: the manifest has a value that cannot be used.
    """
    sections = _recorded_videos(checkpoint)
    default = VideoSettings()
    read = {
        name: {key: section.get(key, getattr(default, key)) for key in READING} for name, section in sections.items()
    }
    if not read:
        return {}, []
    first, chosen = next(iter(read.items()))
    notes = []
    for key, value in chosen.items():
        others = {name: one[key] for name, one in read.items() if one[key] != value}
        if others:
            told = ", ".join(f"{other} in {name}" for name, other in others.items())
            notes.append(f"{key} is {value} as the run's data set {first} was read, not {told}")
    return {key: value for key, value in chosen.items() if value != getattr(default, key)}, notes


def _recorded_videos(checkpoint: str | None) -> dict[str, dict[str, Any]]:
    """What a run says of num_frames and READING, by data set of videos, checked."""
    manifest, config = recorded_run(checkpoint) if checkpoint is not None else (None, {})
    sections = config.get("datasets")
    found = {}
    for name, section in sections.items() if isinstance(sections, Mapping) else ():
        if isinstance(section, Mapping) and issubclass(settings_of(name) or object, VideoSettings):
            given = {key: section[key] for key in ("num_frames", *READING) if section.get(key) is not None}
            where = f"{manifest}: datasets.{name}"
            found[name] = checked(recorded(given, where), VideoSettings, where)
    return found
