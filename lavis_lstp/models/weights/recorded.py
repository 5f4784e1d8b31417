"""What a run recorded beside its weights: the model it trained, and how it read videos.

In: a run's folder, a checkpoint or a repository of the hub. Out: sections of the configuration in its `manifest.json`,
each of whose texts has passed `untrusted.recorded`: a manifest may be anybody's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis_lstp.config.data import VideoSettings, settings_of
from lavis_lstp.config.fields import checked, generation_over
from lavis_lstp.errors import ConfigError, WeightsError, shortened
from lavis_lstp.files import expanded, strict_json
from lavis_lstp.models.weights.hub import HUB_MODELS, checkpoint_source, local_path, weights_file
from lavis_lstp.untrusted import recorded, why_no_path

DEFAULT_FRAMES = 64  # T where no run says how many
READING = ("frames", "flow_pairs", "fps", "short_videos", "decode_size")
"""Keys of a data set that decide which pixels and which flow are read of a video, beside num_frames."""
HUB_KEYS = ("backbone.weights", "sampler.weights", "sampler.tokenizer", "scorer.weights")
"""Settings of a model that may name a repository of the hub."""
CONVERTED = "lavis-lstp convert"
"""What a manifest that `lavis-lstp convert` wrote says of its writer."""


def recorded_run(checkpoint: str) -> tuple[Path, dict[str, Any]]:
    """The manifest beside a checkpoint's weights, and the config in it; empty where there is no manifest.

    Raises:
        WeightsError: no weights there, or a manifest that is damaged or not a run's.
    """
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
    made = section.get("generation")
    if isinstance(made, Mapping) and not made.get("do_sample") and "model.generation.do_sample" not in given:
        section["generation"] = generation_over(made, {"do_sample": False})  # a temperature in it had no effect
    earlier = section.get("checkpoint") or []
    earlier = [earlier] if isinstance(earlier, str) else earlier
    return section | {"checkpoint": [_where_the_run_stood(manifest, path) for path in earlier if path]}


def _may_be_fetched(name: str) -> bool:
    """Whether `name` is on this machine, in the hub's cache, or of a model that this package's own files name."""
    from huggingface_hub.constants import HF_HUB_CACHE

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
