"""`lavis-lstp convert SOURCE OUT`: published weights -> a small folder of ours that `model.checkpoint` takes.

In: a checkpoint of LSTP, RAFT of princeton-vl, BERT for the sampler, or LAVIS's BLIP-2 or InstructBLIP; a file, a
folder or `owner/repository/file` of the hub. Out: OUT/ with `model.safetensors` (under our names, in the dtype asked
for), `config.yaml` (the model section that goes with it) and `manifest.json` (where it came from, and the report).

Vision tower and language model are frozen in every published recipe but one, and are left out: they come with the base
model. Source tensors stay mapped from the file, and only those that are kept are read, so a checkpoint of 32 GB needs
neither that much memory nor that much disk.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lavis_lstp import __version__
from lavis_lstp.config.model import Sampler
from lavis_lstp.errors import ConfigError, WeightsError, unknown_name
from lavis_lstp.files import complete_folder, sha256_file, write_json
from lavis_lstp.models.answer.loading import DTYPES
from lavis_lstp.models.weights.parts import part_of
from lavis_lstp.models.weights.published_names import NOT_IN_BERT
from lavis_lstp.models.weights.reading import INDEX, convert_published_with_report, load_state_dict_file, weights_file
from lavis_lstp.models.weights.recorded import CONVERTED
from lavis_lstp.models.weights.shapes import below
from lavis_lstp.models.weights.sizes import fit
from lavis_lstp.models.where.temporal_sampler import sizes_in
from lavis_lstp.redaction import printable

logger = logging.getLogger(__name__)

KINDS = {"lstp": ("lstp", "sampler"), "raft": ("raft",), "bert": ("bert",), "lavis": ("lavis_blip2", "lavis_instruct")}
"""What `--kind` says -> what the names say."""
LEARNING = ("sampler", "flow", "qformer", "query_tokens", "projection")
"""Parts that are always written; RAFT is there because LSTP's checkpoints bring it."""
FROZEN = ("vision", "language_model")
ARCHS = {
    ("instructblip", "llama"): "lstp_vicuna7b",
    ("instructblip", "t5"): "lstp_instruct_flant5xl",
    ("blip2", "t5"): "lstp_flant5xl",
}
"""(family, language model) of a checkpoint -> the model whose config it goes with."""
PUBLISHED_LORA = {"alpha": 32, "dropout": 0.1}


@dataclass
class Report:
    """What became of every key. `read` is the sum of `renamed`, `dropped` and `left_out`.

    Attributes:
        kind: what the source was read as.
        read: keys in the source.
        renamed: part -> source keys that were written.
        dropped: reason -> keys.
        left_out: part -> {"keys", "bytes"} of what is frozen.
        missing: our keys that the source cannot have and that keep a fresh model's values.
        absent: parts of which the source has nothing.
        bytes: of the weights that were written.
    """

    kind: str
    read: int = 0
    renamed: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    bytes: int = 0

    def lines(self) -> list[str]:
        """As printed."""
        frozen = sum(facts["keys"] for facts in self.left_out.values())
        rows = [f"read       {self.read:6d} keys, {_KIND_NAMES[self.kind]}"]
        rows += [f"renamed    {sum(self.renamed.values()):6d}"]
        rows += [f"           {count:6d} {part}" for part, count in self.renamed.items()]
        rows += [f"dropped    {sum(self.dropped.values()):6d} by name"]
        rows += [f"           {count:6d} {reason}" for reason, count in self.dropped.items()]
        rows += [f"left out   {frozen:6d} frozen, they come with the base model; --keep writes them"]
        rows += [f"           {f['keys']:6d} {part}, {f['bytes'] / 1e6:.1f} MB" for part, f in self.left_out.items()]
        rows += [_TRAINED_TOO] if "language_model" in self.left_out else []
        fresh = " by design: the sampler has them and BERT has not" if self.missing else ""
        rows += [f"missing    {len(self.missing):6d}{fresh}"]
        rows += [f"           {pattern}" for pattern in NOT_IN_BERT if self.missing]
        rows += [f"no part of the source: {', '.join(self.absent)}"] if self.absent else []
        return [*rows, f"written    {self.bytes / 1e6:8.1f} MB"]


_TRAINED_TOO = (
    "           no key says whether they were trained; if so (published: self-refinement of BLIP-2-FLAN-T5-XL), add "
    "--keep language_model"
)
_KIND_NAMES = {
    "lstp": "LSTP",
    "sampler": "the sampler of LSTP alone",
    "raft": "RAFT of princeton-vl",
    "bert": "BERT",
    "lavis_blip2": "LAVIS's BLIP-2",
    "lavis_instruct": "LAVIS's InstructBLIP",
}


def convert(
    source: str, out: str | Path, *, dtype: str = "float32", kind: str = "auto", keep: Sequence[str] = ()
) -> Report:
    """Writes the folder `out`, complete or not at all.

    Args:
        source: file, folder or `owner/repository/file`.
        dtype: of the weights that are written; numbers that are no weights, such as counters, keep theirs.
        kind: of KINDS, or "auto" to tell it by the keys.
        keep: of FROZEN.

    Raises:
        WeightsError: unsafe, damaged or incomplete, a key that nothing explains, or weights of another kind.
        ConfigError: `out` exists.
    """
    if dtype not in DTYPES:
        raise ConfigError(unknown_name("dtype (--dtype)", dtype, DTYPES))
    if kind not in ("auto", *KINDS):
        raise ConfigError(unknown_name("kind (--kind)", kind, ("auto", *KINDS)))
    for part in keep:
        if part not in FROZEN:
            raise ConfigError(unknown_name("part (--keep)", part, FROZEN))
    with complete_folder(out) as folder:
        file = weights_file(source)
        kept, config, report = _convert_file(file, dtype, kind, keep)
        _save(kept, folder / "model.safetensors")
        report.bytes = (folder / "model.safetensors").stat().st_size
        (folder / "config.yaml").write_text(_config_text(config, report), encoding="utf-8")
        write_json(
            folder / "manifest.json",
            {
                "written_by": CONVERTED,
                "source": _source_facts(file),
                "dtype": dtype,
                "report": asdict(report),
                "config": {"model": config},
                "versions": {"lavis_lstp": __version__, "torch": torch.__version__},
                "files": {
                    name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
                    for name in ("model.safetensors", "config.yaml")
                },
            },
        )
    return report


def _convert_file(
    file: Path, dtype: str, kind: str, keep: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Any], Report]:
    """What is kept of a source, the model section for it, and the report."""
    source = load_state_dict_file(file)
    if all(part_of(key) for key in source):
        raise WeightsError(f"'{file}' has this package's names already; set model.checkpoint to it")
    found = convert_published_with_report(source, as_whole=True)
    if kind != "auto" and found.kind not in KINDS[kind]:
        raise WeightsError(f"'{file}' is {_KIND_NAMES[found.kind]}, not of the kind '{kind}' (--kind)")
    report = Report(found.kind, read=len(source), dropped=dict(Counter(found.dropped.values())))
    kept: dict[str, Tensor] = {}
    for key, tensor in found.state_dict.items():
        part, count = part_of(key), found.joined.get(key, 1)
        if part in FROZEN and part not in keep:
            facts = report.left_out.setdefault(part, {"keys": 0, "bytes": 0})
            facts["keys"] += count
            facts["bytes"] += tensor.nbytes
        else:
            report.renamed[part] = report.renamed.get(part, 0) + count
            kept[key] = tensor
    if not kept:
        raise WeightsError(f"'{file}' holds frozen parts alone: {', '.join(report.left_out)}; --keep writes them")
    present = {part_of(key) for key in found.state_dict}
    report.missing = _checked(file, found.kind, found.state_dict, kept)
    if found.kind in ("lstp", "lavis_blip2", "lavis_instruct"):
        report.absent = [part for part in LEARNING if part not in present]
    counted = (*report.renamed.values(), *report.dropped.values(), *(f["keys"] for f in report.left_out.values()))
    assert sum(counted) == report.read, (counted, report.read)
    config = _model_section(found.kind, source, found.state_dict, report)
    return {key: _cast(key, tensor, dtype) for key, tensor in kept.items()}, config, report


def _checked(file: Path, kind: str, state_dict: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> list[str]:
    """The keys that a kind cannot have.

    Args:
        state_dict: all of the source, under our names. What is kept must be whole; of frozen parts that are left out,
            what lies in no numbered layer may be missing: LAVIS saves what learnt alone.

    Raises:
        WeightsError: keys that nothing explains, that are missing, or of another shape than the rest asks for.
    """
    present, written = ({part_of(key) for key in keys} for keys in (state_dict, kept))
    fresh = [f"sampler.{pattern}" for pattern in NOT_IN_BERT] if kind == "bert" else []
    missing, problems = [], []
    for part in (*LEARNING, *FROZEN):
        if part in present or (part == "language_model" and "lora" in present):
            excused, found = fit(state_dict, part, allowed_missing=fresh, layers_only=part not in (*LEARNING, *written))
            missing += excused if part in written else []
            problems += [f"of the part {part}, {problem}" for problem in found]
    if problems:
        raise WeightsError(f"'{file}' does not fit a model of its sizes: {'; '.join(problems)}")
    return missing


def _cast(key: str, tensor: Tensor, dtype: str) -> Tensor:
    """A copy in `dtype`, or the mapped tensor itself where it has that already.

    Raises:
        WeightsError: a number is too large for float16.
    """
    if not tensor.is_floating_point():
        return tensor.contiguous()
    cast = tensor.to(getattr(torch, dtype)).contiguous()
    if dtype == "float16" and bool(cast.isinf().any()) and not bool(tensor.isinf().any()):
        raise WeightsError(f"'{key}' has numbers that float16 cannot hold; choose --dtype bfloat16 or float32")
    return cast


def _save(state_dict: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    seen: set[int] = set()
    plain = {}
    for key, tensor in state_dict.items():  # safetensors refuses two names of one tensor, such as T5's embeddings
        plain[key] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    save_file(plain, str(path), metadata={"format": "pt"})


def _source_facts(file: Path) -> dict[str, Any]:
    """Name, size and digest of each file of the source."""
    files = [file]
    if file.name.endswith(INDEX):
        files += sorted(file.parent.glob(f"*{'.safetensors' if 'safetensors' in file.name else '.bin'}"))
    return {
        "path": str(file.resolve()),
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in files},
    }


# ---- the config that goes with it -----------------------------------------------------------------------------


def _model_section(
    kind: str, source: Mapping[str, Tensor], state_dict: Mapping[str, Tensor], report: Report
) -> dict[str, Any]:
    """The keys of a model config that the source decides; for LSTP those of its published evaluation as well."""
    section: dict[str, Any] = {}
    present = {part_of(key) for key in state_dict}
    if arch := _arch(source, state_dict):
        adapters = _lora(state_dict)
        section["arch"] = arch
        section["model_type"] = "lora" if adapters else "base"
        if adapters:
            section["lora"] = adapters
        learnt = ("qformer", "query_tokens", "projection", "lora")
        section["train"] = [part for part in learnt if part in report.renamed]
    if "sampler" in present:
        section["sampler"] = {} if kind == "bert" else {"weights": None}
        section["sampler"] |= _unlike_default(sizes_in(below("sampler.", state_dict)))
    if kind == "lstp":
        section.setdefault("sampler", {})["mode"] = "multi_modal"
        section["fusion"] = "mean"
        section["flow"] = {"flow_preset": "published_inference"}
    if "flow" in present:
        section["flow"] = {"name": "raft_large", "weights": "checkpoint", **section.get("flow", {})}
    if flow_size := section.get("sampler", {}).get("flow_size"):
        section.setdefault("flow", {})["flow_size"] = flow_size
    return section


def _arch(source: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> str | None:
    """The model for a checkpoint's Q-Former and language model; None for parts alone and for other language models.

    Args:
        source: under the published names: those of LAVIS's projections say the language model, which may be left out.
        state_dict: the same under ours.
    """
    begin = r"backbone\.model\.language_model\.(base_model\.model\.)?"
    language = None
    if any(re.match(begin + r"model\.layers\.", key) or key.startswith("llm_proj.") for key in (*source, *state_dict)):
        language = "llama"
    elif any(
        re.match(begin + r"encoder\.block\.", key) or key.startswith("t5_proj.") for key in (*source, *state_dict)
    ):
        language = "t5"
    family = None
    if "backbone.model.qformer.layernorm.weight" in state_dict:
        family = "blip2"
    elif "backbone.model.qformer.embeddings.layernorm.weight" in state_dict:
        family = "instructblip"
    width = state_dict.get("backbone.model.language_projection.weight")
    if width is not None and len(width) > {"llama": 4096, "t5": 2048}.get(language, 0):
        return None  # Vicuna-13B, FLAN-T5-XXL
    return ARCHS.get((family, language))


def _lora(state_dict: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The adapters' rank and places; alpha and dropout show in no weight and are the published ones."""
    adapters = {key.partition(".lora_A.")[0]: t for key, t in state_dict.items() if ".lora_A." in key}
    ranks = {layer.rpartition(".")[2]: tensor.shape[0] for layer, tensor in adapters.items()}
    if not ranks:
        return None
    return {"r": next(iter(ranks.values())), **PUBLISHED_LORA, "targets": sorted(ranks)}


def _unlike_default(sizes: Mapping[str, int]) -> dict[str, int]:
    default = Sampler()
    return {name: size for name, size in sizes.items() if getattr(default, name) != size}


def _config_text(config: Mapping[str, Any], report: Report) -> str:
    import yaml

    key = "model.sampler.weights (a fresh sampler starts from it)" if report.kind == "bert" else "model.checkpoint"
    head = [
        "# Written by `lavis-lstp convert` for the weights beside it; keys that are not here have their defaults.",
        f"# The folder is a value of {key}.",
    ]
    if report.kind == "lstp":
        head.append("# mode, fusion, flow_preset: the published evaluation's; video-only recipes had fusion concat.")
    if "lora" in config:
        head.append("# r and targets are the checkpoint's; alpha and dropout show in no weight: the published ones.")
    return "\n".join(head) + "\n" + yaml.safe_dump({"model": dict(config)}, sort_keys=False)


# ---- command line ---------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="lavis-lstp convert",
        description="Turn published weights into a small folder for model.checkpoint.",
        epilog="One published recipe (self-refinement of BLIP-2-FLAN-T5-XL) trained the language model too: add "
        "--keep language_model for its checkpoints.",
    )
    parser.add_argument("source", metavar="SOURCE", help="file, folder, or owner/repository/file of the hub")
    parser.add_argument("out", metavar="OUT", help="new folder")
    parser.add_argument("--dtype", default="float32", help=f"{', '.join(DTYPES)}; default float32")
    parser.add_argument("--kind", default="auto", help=f"auto, {', '.join(KINDS)}; default auto, told by the keys")
    frozen = f"frozen parts to write as well: {', '.join(FROZEN)}"
    parser.add_argument("--keep", nargs="+", default=(), metavar="PART", help=frozen)
    args = parser.parse_args(argv)
    report = convert(args.source, args.out, dtype=args.dtype, kind=args.kind, keep=args.keep)
    print(printable("\n".join([*report.lines(), f"           {args.out}"])))
    return 0
