"""LAVIS dataset builders: a config section -> a data set for each split.

`lstp_video_qa` takes anybody's videos and annotation files, `lstp_{image,video,text}_instruct` the instruction data of
LLaVA and Video-ChatGPT, one kind each, `lstp_shapes` generates its own, and those of `data.benchmarks` read the files
of their authors. Where a storage names tar shards, questions and media come from those. `config/data.py` lists every
key with its default, their YAML files in `configs/datasets` hold what differs.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lavis.common.registry import registry
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from omegaconf import DictConfig, OmegaConf

from lavis_lstp.config.data import CONFIGS, FolderSettings, Shards, complete_dataset
from lavis_lstp.config.fields import checked
from lavis_lstp.data.annotation import read_annotation
from lavis_lstp.data.benchmarks import BENCHMARKS, read_benchmark
from lavis_lstp.data.instruct import read_instructions
from lavis_lstp.data.qa_dataset import VideoQADataset
from lavis_lstp.data.selections import Recorded, read_recorded
from lavis_lstp.data.shapes import shapes_qa
from lavis_lstp.data.shards.questions import ShardQuestions, first_process_alone, is_shards
from lavis_lstp.data.shards.storage import Retry
from lavis_lstp.data.spans import GOLD, read_spans
from lavis_lstp.data.subtitles import NOT_PACKED, Subtitles
from lavis_lstp.errors import ConfigError, no_value, unknown_name
from lavis_lstp.files import expanded

logger = logging.getLogger(__name__)

KINDS = ("image", "text", "video")


def local_path(path: str) -> Path:
    """As given, relative to where the user stands; failing that, in LAVIS's cache_root."""
    given = expanded(path)
    if given.is_absolute() or os.path.exists(given):
        return given
    cached = Path(registry.get_path("cache_root") or "") / given
    return cached if os.path.exists(cached) else given


def shard_settings(config: Mapping[str, Any], split: str, section: str) -> Shards:
    """The section `shards` of a data set as one split has it.

    Raises:
        ConfigError: a value that cannot be used, or values that do not go together.
    """
    given = checked(config, Shards, f"{section}.shards")
    found = Shards(**{name: value.get(split) if isinstance(value, Mapping) else value for name, value in given.items()})
    if found.loader == "stream" and found.window:
        raise ConfigError(
            f"{section}.shards.window is for loader: offsets; with stream, lanes says how many shards are mixed"
        )
    return found


def retry_of(shards: Shards) -> Retry:
    return Retry(shards.attempts, shards.wait_s, shards.timeout_s, tuple(shards.redirects))


@registry.register_builder("lstp_video_qa")
class VideoQABuilder(BaseDatasetBuilder):
    """Questions about videos in files and folders; see `qa_dataset` for their form."""

    name = "lstp_video_qa"
    media = "videos"  # the section of build_info that names their folder
    kind: str | None = None  # of the questions taken out of shards; None = all
    train_dataset_cls = VideoQADataset
    eval_dataset_cls = VideoQADataset
    DATASET_CONFIG_DICT = {"default": str(CONFIGS / "lstp_video_qa.yaml")}

    def __init__(self, cfg=None):
        self.recorded = cfg if OmegaConf.is_config(cfg) else None
        """The run's own section, which its manifest records."""
        if OmegaConf.is_config(cfg):  # while it lies in the configuration that its interpolations speak of
            cfg = OmegaConf.to_container(cfg, resolve=True)
        super().__init__(complete_dataset(self.name, cfg or {}))

    @classmethod
    def default_config(cls, kind: str = "default") -> DictConfig:
        """The data set's whole section, every key of it."""
        return OmegaConf.create({"datasets": {cls.name: complete_dataset(cls.name, {})}})

    def build_datasets(self) -> dict[str, VideoQADataset]:
        """{split: data set} for every split that `build_info.annotations` names.

        Raises:
            ConfigError, AnnotationError, VideoError: what is missing or wrong, and where.
        """
        return self.build()

    @property
    def section(self) -> str:
        """Of the configuration, for messages."""
        return f"datasets.{self.name}"

    def build(self) -> dict[str, VideoQADataset]:
        self.build_processors()
        config = OmegaConf.to_container(self.config, resolve=True)
        info = config["build_info"] or {}
        annotations = {name: value for name, value in (info.get("annotations") or {}).items() if value}
        if not annotations:
            raise ConfigError(
                f"{self.section}.build_info.annotations names no file; expected {{train: {{storage: FILE}}, ...}}"
            )
        in_files = any(not is_shards(value.get("storage")) for value in annotations.values())
        folder = self._folder(info) if in_files else Path()
        return {split: self._split(split, value.get("storage"), folder, config) for split, value in annotations.items()}

    def _folder(self, info: Mapping[str, Any]) -> Path:
        folder = (info.get(self.media) or {}).get("storage")
        if not folder or not os.path.isdir(local_path(folder)):
            raise ConfigError(
                f"{self.section}.build_info.{self.media}.storage: no such folder: {folder}{no_value(folder)}"
            )
        return local_path(folder)

    def _annotation(
        self, split: str, paths: list[Path], folder: Path, config: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        return [row for path in paths for row in read_annotation(path, section=self.section)]

    def _split(
        self, split: str, storage: str | list[str] | None, folder: Path, config: Mapping[str, Any]
    ) -> VideoQADataset:
        paths = [storage] if isinstance(storage, str) else storage
        if not isinstance(paths, list) or not paths or not all(isinstance(path, str) for path in paths):
            raise ConfigError(
                f"{self.section}.build_info.annotations.{split}.storage must be a file or a list of files, "
                f"got {storage!r}"
            )
        shards = shard_settings(config.get("shards") or {}, split, self.section)
        known = {field.name for field in fields(FolderSettings)}
        settings = FolderSettings(**{name: value for name, value in config.items() if name in known})
        settings.shards = shards
        if is_shards(paths):
            flow_root = local_path(config["flow_root"]) if config.get("flow_root") else None
            how = {"flow": shards.flow, "flow_root": flow_root, "cache": shards.cache, "check": shards.check}
            annotation = ShardQuestions(paths, kind=self.kind, **how, retry=retry_of(shards), section=self.section)
        else:
            annotation = self._annotation(split, [local_path(path) for path in paths], folder, config)
        kind = "train" if split.startswith("train") else "eval"
        dataset = VideoQADataset(
            annotation,
            folder,
            settings,
            spans=self._spans(split, settings, annotation),
            recorded=self._recorded(split, settings, annotation),
            subtitles=self._subtitles(folder, config, annotation),
            vis_processor=self.vis_processors[kind] if (config.get("vis_processor") or {}).get(kind) else None,
            text_processor=self.text_processors[kind] if (config.get("text_processor") or {}).get(kind) else None,
            section=self.section,
        )
        dataset.unanswerable = list(getattr(annotation, "unanswerable", ()))
        logger.info("%s: %d questions about %s", split, len(dataset), dataset.annotation.size())
        return dataset

    def _subtitles(
        self, folder: Path, config: Mapping[str, Any], annotation: ShardQuestions | list
    ) -> Subtitles | None:
        shown = config.get("subtitles", "none")  # of questions about videos alone
        if shown == "none":
            return None
        how = (shown, config["subtitles_window_s"], self.section)
        if isinstance(annotation, ShardQuestions):
            first = next((row for row in annotation if "video" in row), {})
            if first and "lines" not in first:
                raise ConfigError(f"{self.section}.subtitles: question {first['question_id']!r}: {NOT_PACKED}")
            return Subtitles((), folder, *how)
        given = (config["build_info"].get("subtitles") or {}).get("storage")
        if given and not os.path.isdir(local_path(given)):
            raise ConfigError(f"{self.section}.build_info.subtitles.storage: no such folder: {given}{no_value(given)}")
        root = local_path(given) if given else folder
        return Subtitles(annotation, root, *how)

    def _spans(self, split: str, settings: FolderSettings, annotation: ShardQuestions | list):
        """`spans` is one file for the split train, or {split: file}; "shards" in place of a file means theirs, "gold"
        the moments of the annotation."""
        spans = settings.spans
        files = {"train": spans} if isinstance(spans, str) else spans or {}
        if not files.get(split):
            return None
        if files[split] == GOLD:
            return GOLD
        frames = {name: getattr(settings, name) for name in ("num_frames", "fps", "short_videos")}
        if files[split] == "shards":
            if not isinstance(annotation, ShardQuestions):
                raise ConfigError(f"{self.section}.spans: 'shards' is for tar shards; split {split} is read from files")
            return annotation.spans(settings.shards.spans, **frames)
        return read_spans(local_path(files[split]), form=settings.spans_form, section=self.section, **frames)

    def _recorded(self, split: str, settings: FolderSettings, annotation: Sequence) -> dict[str, Recorded] | None:
        """`selection` is one file for the splits that are evaluated, or {split: file}."""
        files = settings.selection
        if not isinstance(files, Mapping):
            files = {split: str(files)} if files and not split.startswith("train") else {}
        if not files.get(split):
            return None
        return read_recorded(local_path(files[split]), annotation, f"{self.section}.selection")


class InstructBuilder(VideoQABuilder):
    """Instruction data of one kind; see `instruct` for the forms of their files."""

    def _annotation(
        self, split: str, paths: list[Path], folder: Path, config: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        if config.get("text_processor"):
            raise ConfigError(f"{self.section}.text_processor: a conversation's prompt is made as published; remove it")
        form = config.get("form", "conversations")
        return read_instructions(paths, kind=self.kind, form=form, root=folder, section=self.section)


@registry.register_builder("lstp_video_instruct")
class VideoInstructBuilder(InstructBuilder):
    name, kind, media = "lstp_video_instruct", "video", "videos"
    DATASET_CONFIG_DICT = {"default": str(CONFIGS / "lstp_video_instruct.yaml")}


@registry.register_builder("lstp_image_instruct")
class ImageInstructBuilder(InstructBuilder):
    name, kind, media = "lstp_image_instruct", "image", "images"
    DATASET_CONFIG_DICT = {"default": str(CONFIGS / "lstp_image_instruct.yaml")}


@registry.register_builder("lstp_text_instruct")
class TextInstructBuilder(InstructBuilder):
    name, kind = "lstp_text_instruct", "text"
    DATASET_CONFIG_DICT = {"default": str(CONFIGS / "lstp_text_instruct.yaml")}

    def _folder(self, info: Mapping[str, Any]) -> Path:
        return Path()  # a text has no file


class BenchmarkBuilder(VideoQABuilder):
    """A benchmark of `BENCHMARKS`; its file in configs/datasets holds what differs from lstp_video_qa."""

    def _annotation(
        self, split: str, paths: list[Path], folder: Path, config: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        info = config["build_info"]
        answers, names = info.get("answers") or {}, info["videos"].get("names")
        for known in answers:
            if known not in info["annotations"]:
                where = f"split ({self.section}.build_info.answers)"
                raise ConfigError(unknown_name(where, known, info["annotations"]))
        storage = (answers.get(split) or {}).get("storage")
        return read_benchmark(
            BENCHMARKS[self.name],
            paths,
            folder,
            split=split,
            form=config.get("form"),
            answers=local_path(storage) if storage else None,
            video_names=local_path(names) if names else None,
            subtitles=config.get("subtitles", "none") != "none",
            section=self.section,
        )


for _name in BENCHMARKS:
    _path = str(CONFIGS / f"{_name}.yaml")
    registry.register_builder(_name)(
        type(
            _name,
            (BenchmarkBuilder,),
            {"name": _name, "DATASET_CONFIG_DICT": {"default": _path}, "__module__": __name__},
        )
    )


@registry.register_builder("lstp_shards")
class ShardsBuilder(VideoQABuilder):
    """Whatever is in shards: questions about videos and images, conversations, texts."""

    name = "lstp_shards"
    DATASET_CONFIG_DICT = {"default": str(CONFIGS / "lstp_shards.yaml")}

    def build(self) -> dict[str, VideoQADataset]:
        self.kind = self.config.get("kind")
        if self.kind not in (None, *KINDS):
            raise ConfigError(unknown_name(f"{self.section}.kind", self.kind, KINDS))
        return super().build()

    def _folder(self, info: Mapping[str, Any]) -> Path:
        raise ConfigError(
            f"{self.section}.build_info.annotations names a file; expected {{train: {{storage: "
            "'shards/train-{000000..000123}.tar'}}}}, or use lstp_video_qa"
        )


@registry.register_builder("lstp_shapes")
class ShapesBuilder(VideoQABuilder):
    """Shapes-QA, generated into `root` where it is not there yet (seconds)."""

    name = "lstp_shapes"
    DATASET_CONFIG_DICT = {"default": str(CONFIGS / "lstp_shapes.yaml")}

    def build(self) -> dict[str, VideoQADataset]:
        root = expanded(self.config.root)
        parameters = OmegaConf.to_container(self.config.generate, resolve=True)
        generate_once(root, parameters)
        counts = {split: parameters.get(f"{split}_videos") for split in shapes_qa.SPLITS}
        counts["train_images"] = parameters.get("train_images")
        splits = [split for split, count in counts.items() if count != 0]
        storages = {split: str(root / f"{split}.json") for split in splits}
        if self.config.from_shards:
            storages = pack_once(root, splits)
        self.config.build_info = {
            "annotations": {split: {"storage": storage} for split, storage in storages.items()},
            "videos": {"storage": str(root)},
        }
        if self.recorded is not None:
            self.recorded.build_info = self.config.build_info
        return super().build()


def generate_once(root: Path, parameters: Mapping[str, int]) -> None:
    """Shapes-QA in `root`; of several processes the first writes and the others wait, even if it fails.

    Raises:
        ConfigError: other parameters are there already, or the folder cannot be written.
    """

    def work() -> None:
        logger.info("Shapes-QA in %s (generated if it is not there)", root)
        try:
            shapes_qa.generate(root, **parameters)
        except OSError as error:
            raise ConfigError(f"datasets.lstp_shapes.root: cannot write to {root} ({error})") from error

    first_process_alone(work)


def pack_once(root: Path, splits: Sequence[str]) -> dict[str, list[str]]:
    """Shards of Shapes-QA's splits, packed where they are not there yet; `webdataset_tools` stands on this package.

    Raises:
        ConfigError: packing failed; its own line is in the message.
    """

    def work() -> None:
        for split in splits:
            command = [sys.executable, "-m", "webdataset_tools", "pack", str(root / "shards" / split), str(root)]
            command += ["--from", "shapes", "--root", str(root), "--split", split, "--max-count", "64"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
                raise ConfigError(f"datasets.lstp_shapes.from_shards: split {split} cannot be packed ({said[-1]})")

    first_process_alone(work)
    return {split: sorted(map(str, (root / "shards").glob(f"{split}-[0-9]*.tar"))) for split in splits}
