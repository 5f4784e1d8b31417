"""A section of `datasets`: every key, its type, its default, its range and its meaning.

A YAML file of configs/datasets holds what differs. LAVIS's own data sets are not described here; `lavis_keys` finds
their keys.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from lavis_lstp.config.fields import BOOLEAN, SEED, TEXT, TEXTS, checked, key, laid_over

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "datasets"
EXTRA = frozenset({"type"})
"""LAVIS's key for one of several default files, legal for every data set."""

SUBTITLES = ("none", "frames", "whole")

SIDE, FRAMES = 100_000, 1_000_000
"""The largest side of a picture in px, and number of frames, that are taken for meant."""


@dataclass
class Storage:
    storage: Any = key(kind=TEXTS)  # a file, several, or shards: "train-{000000..000123}.tar"


@dataclass
class Folder:
    storage: str | None = key()  # folder that the annotation's paths are relative to


@dataclass
class NamedFolder(Folder):
    names: str | None = key()  # file with other names of the videos, where the benchmark has one


@dataclass
class Annotations:
    annotations: dict[str, Storage | None] | None = key({})  # {train: {storage: FILE or [FILES]}, val: ..., test: ...}


@dataclass
class WithVideos(Annotations):
    videos: Folder = key(Folder)


@dataclass
class WithSubtitles(WithVideos):
    subtitles: Folder = key(Folder)  # folder of .srt, .vtt or .json files; null = beside the videos


@dataclass
class WithImages(Annotations):
    images: Folder = key(Folder)


@dataclass
class WithAnswers(Annotations):
    answers: dict[str, Storage | None] | None = key(
        {}
    )  # {test: {storage: FILE}}, where answers have files of their own
    videos: NamedFolder = key(NamedFolder)
    subtitles: Folder = key(Folder)  # as for lstp_video_qa


@dataclass
class Processors:
    train: Any = key()  # {name: a processor of LAVIS, and its arguments}
    eval: Any = key()


@dataclass
class Shards:
    """Where a storage names shards: docs/data_format.md."""

    loader: str = key("offsets", one_of=("offsets", "stream"))  # stream: training reads shards from end to end
    window: int = key(0, least=0)  # offsets: shards shuffled together, then the next ones; 0 = all samples at once
    lanes: int = key(16, least=1, most=4096)  # stream: shards read side by side, over all processes and workers
    buffer: int = key(16, least=1, most=1_000_000)  # stream: questions of a lane shuffled together, kept in memory
    resampled: bool = key(False)  # draw samples with replacement instead of each once
    flow: Any = key(kind=TEXTS, per_split=True)  # parallel set with the flow, where it is not in the shards
    spans: Any = key(kind=TEXTS, per_split=True)  # the same with span.json members, for `spans: shards`
    cache: Any = key(
        kind=TEXT, per_split=True
    )  # folder that shards are copied to: of `pipe:`, of servers without ranges
    check: Any = key(True, kind=BOOLEAN, per_split=True)  # compare what is read with its SHA-256
    attempts: int = key(6, least=1, most=1000)  # tries of a remote read, with waits that double from wait_s
    wait_s: int | float = key(0.5, least=0, most=3600)
    timeout_s: int | float = key(30, least=0.1, most=86400)
    redirects: list[str] = key([])  # hosts beside its own that a server may redirect to; "*" = any


@dataclass
class DataSettings:
    """Settings that every data set of this package has."""

    data_type: Any = key("videos")  # LAVIS's word for what is read
    image_size: int | None = key(224, least=1, most=SIDE)  # px, frames are resized to a square; null = as stored
    flow: str = key("none", one_of=("none", "motion_vectors", "precomputed"))  # none: the model computes it
    flow_size: int | None = key(None, least=1, most=SIDE)  # px, side of the field of motion_vectors and of images and
    # texts; null = image_size
    max_bad_fraction: int | float = key(0.0, least=0, most=1)  # share of questions whose video may fail to decode
    quarantine: str | None = key()  # file that gets a line of JSON for each sample that cannot be read
    shards: Shards = key(Shards)


@dataclass
class PictureSettings(DataSettings):
    max_megapixels: int | float = key(
        64, above=0
    )  # millions of pixels; a picture or video of a larger area is not read
    image_frames: int = key(1, least=1, most=FRAMES)  # evenly spaced frames in `image`; 1 = the middle one
    vis_processor: dict[str, Any] | None = key(
        None, keys=Processors
    )  # {train: {name: ...}, eval: ...} of LAVIS: also give `image`


@dataclass
class VideoSettings(PictureSettings):
    num_frames: int = key(32, least=1, most=FRAMES)  # T, evenly spaced frames read of each video, the candidates
    fps: int | float | None = key(
        None, above=0
    )  # candidates a second where these are at most num_frames; null = num_frames
    short_videos: str = key("keep", one_of=("keep", "double"))  # double: frames repeat to num_frames (published)
    # what the sampler learns, for the split train: a file of pseudo spans; "shards": span.json of shards; "gold": the
    # annotation's own moments, of several at each step the one that the sampler likes best
    spans: Any = key(kind=TEXT, per_split=True)
    span_weight: int | float = key(1.0, least=0, most=1_000)  # factor on the span loss of this data set's questions
    # recorded frames (`lavis-lstp select --questions`, AKS, BOLT, vLLM) in place of num_frames candidates, for selector
    # recorded; a file is for the splits that are evaluated
    selection: Any = key(kind=TEXT, per_split=True)
    spans_form: str = key(
        "lavis_lstp", one_of=("lavis_lstp", "indices", "fractions")
    )  # published files: indices (0..31) or fractions (0..1), both ends inclusive
    backend: str = key("pyav", one_of=("pyav", "decord", "torchcodec"))  # what decodes
    decode_threads: int = key(1, least=1, most=64)  # parts of a file that each loader process decodes at the same time
    decode_size: int | None = key(None, least=1, most=SIDE)  # px, FFmpeg brings the shorter side down to it; null = no
    hardware: str | None = key(None, one_of=("cuda", "vaapi", "videotoolbox", "qsv", "d3d11va"))  # device that decodes
    # keyframe: in place of each frame the nearest key frame, at its own time; several times faster. Of a file whose key
    # frames are no help, such as a short clip with one, exact frames are read, and a warning says so once
    frames: str = key("exact", one_of=("exact", "keyframe"))
    # flow from a frame to the next one read (sampled, as published), or to the next picture of the file (local)
    flow_pairs: str = key("sampled", one_of=("sampled", "local"))
    bit_cost: bool = key(False)  # also give the codec's bytes a frame, for model.selector.name: bitcost
    motion_energy: bool = key(False)  # also give how much moves at each, for motion
    cache_videos: int = key(0, least=0)  # decoded videos kept in memory by each loader process
    store: bool = key(False)  # keep decoded frames of files on disk for all runs and `ask`: `lavis-lstp cache`


@dataclass
class FolderSettings(VideoSettings):
    flow_root: str | None = key()  # precomputed: folder written by `lavis-lstp flow`, or published <video_id>_raft.npy
    max_flows: int | None = key(None, least=1)  # published flow files: most fields of a video (published training: 64)


@dataclass
class VideoQA(FolderSettings):
    """Questions about your own videos."""

    text_processor: dict[str, Any] | None = key(None, keys=Processors)  # as vis_processor; changes the question
    # lines that the language model reads before the question: frames = those near the chosen frames; whole = all
    subtitles: str = key("none", one_of=SUBTITLES)
    subtitles_window_s: int | float = key(2.0, least=0)  # frames: seconds before and behind each chosen frame
    build_info: WithSubtitles = key(WithSubtitles)


@dataclass
class Benchmark(VideoQA):
    """A benchmark in its authors' files: docs/benchmarks.md."""

    form: str | None = key("authors")  # of the files; some benchmarks are handed round in two
    build_info: WithAnswers = key(WithAnswers)


@dataclass
class VideoInstruct(FolderSettings):
    """Video instruction data: Video-LLaVA's layout, or the published video-only form."""

    form: str = key("conversations")  # [{id, video, conversations}], other kinds of rows are left out;
    # questions: {id: {q, a, video_id}}
    build_info: WithVideos = key(WithVideos)


@dataclass
class ImageInstruct(PictureSettings):
    """Image instruction data in LLaVA's form. Mixed with videos, image_size and flow must be as theirs."""

    data_type: Any = key("images")
    build_info: WithImages = key(WithImages)


@dataclass
class TextInstruct(DataSettings):
    """Text instruction data in LLaVA's form, to be mixed with images and videos, whose image_size and flow it needs."""

    data_type: Any = key("text")
    build_info: Annotations = key(Annotations)


@dataclass
class ShardSettings(VideoSettings):
    """Whatever is in shards: questions about videos and images, conversations, texts."""

    kind: str | None = key(
        None, one_of=("image", "text", "video")
    )  # video, image or text: only these questions; null = all
    text_processor: dict[str, Any] | None = key(None, keys=Processors)
    subtitles: str = key("none", one_of=SUBTITLES)  # as for lstp_video_qa, where they were packed
    subtitles_window_s: int | float = key(2.0, least=0)
    build_info: Annotations = key(Annotations)


@dataclass
class Generate:
    """Settings that decide the content of Shapes-QA."""

    seed: int = key(0, least=0, most=SEED)
    train_videos: int = key(400, least=0)
    val_videos: int = key(40, least=0)
    test_videos: int = key(100, least=0)
    train_images: int = key(8000, least=0)
    size: int = key(96, least=32, most=4096)  # px, even
    film: str | None = key()  # needles: a film that events of 2 to 60 s are drawn over
    window_s: int = key(64, least=1, most=86400)  # needles: seconds of train and val videos; from 151 with all events
    haystack_s: int = key(600, least=1, most=86400)  # needles: seconds of test videos


@dataclass
class Shapes(FolderSettings):
    """Shapes-QA: generated into `root` from a seed where it is not there yet."""

    root: str = key("output/shapes_qa")
    generate: Generate = key(Generate)
    from_shards: bool = key(False)  # pack it to `root`/shards and read it from there
    text_processor: dict[str, Any] | None = key(None, keys=Processors)
    build_info: Any = key()  # filled in from `root`


SETTINGS: dict[str, type[DataSettings]] = {
    "lstp_video_qa": VideoQA,
    "lstp_video_instruct": VideoInstruct,
    "lstp_image_instruct": ImageInstruct,
    "lstp_text_instruct": TextInstruct,
    "lstp_shards": ShardSettings,
    "lstp_shapes": Shapes,
}
"""The other data sets of configs/datasets are benchmarks."""


def names() -> list[str]:
    """The data sets of this package: each has a YAML file in configs/datasets."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def benchmark_names() -> list[str]:
    """The benchmarks: data sets whose YAML file describes their authors' files."""
    return [name for name in names() if name not in SETTINGS]


def settings_of(name: str) -> type[DataSettings] | None:
    """The settings of a data set of this package; None for one of LAVIS's."""
    if name in SETTINGS:
        return SETTINGS[name]
    return Benchmark if (CONFIGS / f"{name}.yaml").is_file() and name.isidentifier() else None


@functools.cache
def differences_of(name: str) -> Mapping[str, Any]:
    """The content of a data set's YAML: all that differs from its settings' defaults."""
    content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    return content["datasets"][name] or {}


def complete_dataset(name: str, given: Any) -> DictConfig:
    """The section of a data set of this package, however short, with the default of every key it leaves out."""
    return laid_over(settings_of(name), differences_of(name), given)


def checked_dataset(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The section of a data set of this package, every value as its field declares it; it need not be complete.

    Raises:
        ConfigError: a key that nobody reads, or a value that cannot be used.
    """
    return checked(given, settings_of(name), f"datasets.{name}", EXTRA)
