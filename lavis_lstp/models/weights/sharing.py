"""What was trained, as a folder in the hub's layout, and onto the hub: `lavis_lstp.push_to_hub`, `LSTP.push_to_hub`.

In: a run's folder or one of its checkpoints; or a model, and the run that trained it. Out: `model.safetensors` with the
parts that learnt, those of earlier checkpoints included; `manifest.json`, by which `lavis_lstp.load` builds the model
as it was trained; and `README.md`, a card made from the run: data, seed, numbers, each with who judged it. The folder
is a checkpoint like any other. huggingface_hub's HfApi uploads it, and not its PyTorchModelHubMixin: that one would
save the frozen billions of the backbone, too, which are on the hub already, and `from_pretrained` is a name of LAVIS's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis_lstp import __version__
from lavis_lstp.errors import ConfigError, WeightsError
from lavis_lstp.files import complete_folder, read_record, write_json
from lavis_lstp.models.weights.hub import HUB, HUB_MODELS, hub_answers, local_path
from lavis_lstp.models.weights.recorded import HUB_KEYS, READING, recorded_model, recorded_run
from lavis_lstp.redaction import printable, without_secrets, without_secrets_in

WEIGHTS, MANIFEST, CARD = "model.safetensors", "manifest.json", "README.md"


def save_for_hub(
    checkpoint: str | Path | None,
    out: str | Path,
    *,
    license: str,
    sampler_only: bool = False,
    results: Sequence[str | Path] = (),
    model: Any = None,
) -> Path:
    """Writes the folder `out`, complete or not at all.

    Args:
        checkpoint: a run's folder or one of its checkpoints; with `model`, None = the card tells of no run.
        license: of the weights, by the hub's short names, such as "mit" or "apache-2.0".
        sampler_only: leave out everything but the temporal sampler, which serves in front of any model.
        results: output folders of evaluations, whose numbers the card shows beside the run's own.
        model: an `LSTP` whose weights and settings are written in place of those that the run left.

    Raises:
        ConfigError: `out` exists, there is no license, or the model has merged its adapters.
        WeightsError: no weights, no manifest of a run beside them, or none of a sampler where this is asked for.
    """
    from safetensors.torch import save_file

    if not license.strip():
        raise ConfigError("name a license, such as license='apache-2.0': without one nobody may use the weights")
    manifest, config = recorded_run(str(checkpoint)) if checkpoint is not None else (None, {})
    if checkpoint is not None and not config:
        raise WeightsError(f"{manifest}: no manifest of a run, so nobody could tell what these weights are of")
    section = recorded_model(str(checkpoint)) if model is None else model.built_from
    state = model.own_state_dict() if model is not None else _merged([*section["checkpoint"], str(checkpoint)])
    begins = "sampler." if sampler_only else ""
    shared = {key: value for key, value in state.items() if key.startswith(begins)}
    tensors = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in shared.items()}
    if not tensors:
        raise WeightsError(f"{checkpoint or 'the model'}: has no weights of a temporal sampler")
    record = {"format": "lavis_lstp.checkpoint", "version": 1, "lavis_lstp": __version__}
    record["config"] = _shared(section, config, sampler_only)
    record = without_secrets_in(record)
    counts = _counts(tensors)
    folders = [*([_run_folder(manifest)] if manifest else []), *map(Path, results)]
    rows = [row for folder in folders for row in _numbers(folder)]
    with complete_folder(out) as folder:
        save_file(tensors, str(folder / WEIGHTS), {"format": "pt"})
        write_json(folder / MANIFEST, record)
        (folder / CARD).write_text(_card(record["config"], license, counts, rows), encoding="utf-8")
    return Path(out)


def push_to_hub(
    checkpoint: str | Path | None,
    repo_id: str,
    *,
    license: str,
    private: bool = False,
    token: str | None = None,
    **how: Any,
) -> str:
    """Uploads what a run trained, with its card; `lavis_lstp.load("hf://REPO_ID")` answers with it.

    Args:
        repo_id: owner/name; made where it is missing.
        private: of a repository that is made.
        token: of the hub; default: the one that `hf auth login` stored.
        license, how: see `save_for_hub`.

    Returns:
        The address of the commit.

    Raises:
        ConfigError, WeightsError: see `save_for_hub`; or the hub refuses, or cannot be reached.
    """
    import tempfile

    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    if not hub_answers():
        raise ConfigError(f"{repo_id}: the hub cannot be reached, or HF_HUB_OFFLINE is set; save_for_hub needs none")
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_for_hub(checkpoint, Path(scratch) / "model", license=license, **how)
        try:
            api = HfApi(token=token, library_name="lavis_lstp", library_version=__version__)
            api.create_repo(repo_id, private=private, exist_ok=True)
            message = f"Weights, manifest and card, by lavis_lstp {__version__}"
            return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message).commit_url
        except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError, ValueError) as error:
            why = without_secrets(" ".join(str(error).split()))[:300]
            raise ConfigError(f"{repo_id}: the hub does not take it ({why}); try `hf auth whoami`") from None


def _merged(checkpoints: Sequence[str]) -> dict[str, Any]:
    """Weights of all checkpoints under this package's names, the later over the earlier."""
    from lavis_lstp.models.weights.reading import load_as_ours

    merged: dict[str, Any] = {}
    for path in checkpoints:
        merged |= load_as_ours(path)
    return merged


def _shared(model: dict[str, Any], config: Mapping[str, Any], sampler_only: bool) -> dict[str, Any]:
    """What others need of a run's configuration: no path of this machine is in it."""
    model = {**model, "checkpoint": [], **({"train": [], "losses": ["lm"], "lora": None} if sampler_only else {})}
    for part, _, key in (place.partition(".") for place in (*HUB_KEYS, "flow.weights")):
        section = model.get(part)
        if isinstance(section, Mapping) and isinstance(section.get(key), str):
            model[part] = {**section, key: _hub_id(section[key])}
    backbone = model.get("backbone")
    if isinstance(backbone, Mapping) and isinstance(backbone.get("endpoint"), Mapping):
        model["backbone"] = {**backbone, "endpoint": {**backbone["endpoint"], "cache": None}}
    sections = config.get("datasets")
    datasets = {
        name: {key: section[key] for key in ("num_frames", *READING) if key in section}
        for name, section in (sections.items() if isinstance(sections, Mapping) else ())
        if isinstance(section, Mapping)
    }
    run = config.get("run") if isinstance(config.get("run"), Mapping) else {}
    kept = ("task", "seed", "max_epoch", "max_steps", "init_lr", "batch_size_train", "accum_grad_iters", "precision")
    return {"model": model, "datasets": datasets, "run": {key: run[key] for key in kept if run.get(key) is not None}}


def _hub_id(name: str) -> str:
    """The hub's name for weights that may lie in a folder of this machine."""
    if name in HUB_MODELS or local_path(name) is None:
        return name
    pair = "/".join(Path(name).parts[-2:])
    return pair if pair in HUB_MODELS else Path(name).name


def _run_folder(manifest: Path) -> Path:
    """The run that a checkpoint's manifest belongs to."""
    checkpoints = manifest.resolve().parent.parent
    return checkpoints.parent if checkpoints.name == "checkpoints" else manifest.parent


def _counts(tensors: Mapping[str, Any]) -> dict[str, int]:
    """Part -> number of its weights."""
    counts: dict[str, int] = {}
    for key, value in tensors.items():
        part = ".".join(key.split(".")[: 2 if key.startswith("backbone.") else 1])
        counts[part] = counts.get(part, 0) + value.numel()
    return counts


def _numbers(folder: Path) -> Iterator[tuple[str, ...]]:
    """Rows of the card's table: what was evaluated, metric, value, questions, who judged."""
    for file in sorted((folder / "result").glob("*.json")):
        found = read_record(file, error=ConfigError)
        judges = found.get("judges")
        scored = f"{found.get('num_scored')} of {found.get('num_questions')}"
        scored += ", PARTIAL: not the score of the data set" if found.get("partial") else ""
        names = ("accuracy", "score") if judges else [key for key in found if key not in ("agg_metrics", "coverage")]
        judge = ", ".join(map(str, judges)) if isinstance(judges, Mapping) else "the task's own rules, no judge"
        for name in names:
            if isinstance(found.get(name), float):
                yield f"{folder.name}, {file.stem}", name, f"{found[name]:.4f}", scored, judge


def _card(config: Mapping[str, Any], license: str, counts: Mapping[str, int], rows: Sequence[Sequence[str]]) -> str:
    """The README.md of the hub."""
    from huggingface_hub import ModelCardData

    model, run = config["model"], config["run"]
    base = (model.get("backbone") or {}).get("weights")
    data = ModelCardData(
        license=license,
        library_name="lavis_lstp",
        pipeline_tag="video-text-to-text",
        tags=["lavis", "video-question-answering", "frame-selection"],
        base_model=base if base in HUB_MODELS else None,
    )
    rest = f"; all others come from `{_cell(base)}`" if base else ""
    parts = "\n".join(f"| `{_cell(part)}` | {count:,} |" for part, count in counts.items())
    sets = "\n".join(f"- `{_cell(name)}`: {_cell(_listed(section))}" for name, section in config["datasets"].items())
    table = "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)
    numbers = f"| evaluation | metric | value | questions | judged by |\n|---|---|---|---|---|\n{table}" if rows else ""
    return f"""---
{data.to_yaml()}
---

# {_cell(str(model.get("arch")))}, trained with lavis_lstp {__version__}

    import lavis_lstp

    with lavis_lstp.load("{HUB}OWNER/NAME") as predictor:  # this repository, or a folder with its files
        print(predictor.answer("video.mp4", "what happens?"))
    model = lavis_lstp.LSTP.from_pretrained("OWNER/NAME")

In a recipe `model.checkpoint: {HUB}OWNER/NAME` loads these parts{rest}.

| part | weights |
|---|---|
{parts}

## Training

{_cell(_listed(run)) or "No run is recorded."}

Data sets:

{sets or "none recorded"}

## Numbers

{numbers or "Nobody has evaluated this checkpoint."}
"""


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _cell(text: str) -> str:
    """A text as one cell of a Markdown table, without markup of its own."""
    return printable(" ".join(text.split())).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
