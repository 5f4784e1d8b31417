"""The frames that were chosen, as small JPEGs, read again from where the evaluation read its videos.

In: evaluations, and which questions. Out: data URIs by question, and a line that says what is not there and why. The
data set is built from the run's manifest, without flow or spans, so folders, shards and the files of benchmarks are
all known; `--videos` names another folder, or shards. Only the chosen frames are decoded, each once.
"""

from __future__ import annotations

import io
import logging
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from lavis_lstp.data.folder import FolderQuestions, kind_of
from lavis_lstp.data.pictures import DEFAULT_MAX_MEGAPIXELS, open_picture
from lavis_lstp.data.shards.questions import ShardQuestions, is_shards
from lavis_lstp.data.shards.storage import expand
from lavis_lstp.data.video.reading import VIDEO_ENDINGS, read_frames
from lavis_lstp.errors import ConfigError, LstpError, VideoError
from lavis_lstp.files import expanded
from lavis_lstp.report.evaluations import Evaluation
from lavis_lstp.report.shell import data_uri
from lavis_lstp.schema import Prediction
from lavis_lstp.untrusted import recorded, what_it_names

if TYPE_CHECKING:
    from lavis_lstp.data.qa_dataset import VideoQADataset

log = logging.getLogger(__name__)

MOST_PROBLEMS = 5
SIDE = 160  # px, longer side
QUALITY = 80
HALF_A_STEP_S = 0.0005
"""Times in predictions are rounded to a millisecond: so much later it is surely that frame, and not the next."""
ALONE = {
    "flow": "none",
    "flow_root": None,
    "spans": None,
    "max_bad_fraction": 1.0,
    "quarantine": None,
    "vis_processor": None,
    "text_processor": None,
    "shards": {},
}
"""Settings under which a data set needs nothing but its questions and its media, and writes nothing."""


class Media:
    """Where the media of questions lie.

    Args:
        questions: of a folder or of shards; None where nothing is known.
        files: or files by video_id, of any folder.
        cwd: folder where the run was started, which messages leave out.
        max_megapixels: the run's limit, from its data set's section.
        far: what to say of a folder that a manifest names, and that is neither here nor near the run; '' = nothing.
    """

    def __init__(
        self,
        questions: FolderQuestions | ShardQuestions | None = None,
        files: Mapping[str, Path] | None = None,
        cwd: Path | None = None,
        far: str = "",
        max_megapixels: float = DEFAULT_MAX_MEGAPIXELS,
    ):
        self.questions, self.files, self.cwd, self.far = questions, files or {}, cwd, far
        self.limit = {"max_megapixels": max_megapixels}
        self.numbers = {name: i for i, name in enumerate(questions.question_ids())} if questions is not None else {}

    def find(self, key: str, row: Prediction) -> tuple[Any, Any] | str:
        """(what equal media have in common, a row of `questions` or a path); or why it is not known."""
        if self.questions is None:
            name = str(row.get("video_id", ""))
            nfc = unicodedata.normalize("NFC", name)
            path = self.files.get(nfc) or self.files.get(f"v_{nfc}")
            return "no file has the name of the video" if path is None else (path, path)
        if key not in self.numbers:
            return "the run's data set has no such question"
        try:
            entry = self.questions[self.numbers[key]]
            return "a text has no pictures" if kind_of(entry) == "text" else (self.questions.place(entry), entry)
        except (LstpError, OSError) as error:
            return _line(error, self.cwd)

    def read(self, place: Any, entry: Any, times_s: Sequence[float]) -> list[Image.Image]:
        """Pictures at these times.

        Raises:
            LstpError, OSError: the medium is missing or cannot be decoded.
        """
        if self.questions is None:
            return _of_video(entry, str(entry), times_s, self.limit)
        stored = self.questions.frames(place)
        if stored is not None:
            nearest = [int(np.abs(stored.times_s - time).argmin()) for time in times_s]
            name = self.questions.name(place)
            return [open_picture(stored.pictures[i], f"{name}, frame {i}", **self.limit) for i in nearest]
        source, name = self.questions.medium(place)
        if kind_of(entry) == "image":
            return [open_picture(source, name, **self.limit)] * len(times_s)
        return _of_video(source, name, times_s, self.limit)


def _of_video(source: Any, name: str, times_s: Sequence[float], limit: Mapping[str, float]) -> list[Image.Image]:
    later = [time + HALF_A_STEP_S for time in times_s]
    frames = read_frames(source, times_s=later, name=name, **limit).frames
    return [Image.fromarray(frame.transpose(1, 2, 0)) for frame in frames]


def chosen_frames(
    evaluations: Sequence[Evaluation], keys: Sequence[str], videos: str | None = None
) -> tuple[dict[tuple[str, int], list[int]], list[str], list[str]]:
    """Pictures of the frames that each evaluation chose for the questions `keys`.

    Returns:
        {(question_id, number of the evaluation): a number in the second for each chosen frame, -1 where there is
        none}, data URIs, and what to say about those that are not there.
    """
    wanted: dict[Any, dict[float, list[tuple[str, int, int]]]] = {}
    entries: dict[Any, tuple[Media, Any]] = {}
    found: dict[tuple[str, int], list[int]] = {}
    problems: Counter[str] = Counter()
    known: dict[str, Media | str] = {}
    for number, one in enumerate(evaluations):
        asked = [key for key in keys if any(t is not None for t in one.rows.get(key, {}).get("frame_times") or ())]
        home = videos or str(one.predictions.resolve())  # the splits of one run have their own questions
        if asked and home not in known:
            known[home] = _media(one, videos)
        for key in asked:
            media, row = known[home], one.rows[key]
            lies = media if isinstance(media, str) else media.find(key, row)
            if isinstance(lies, str):
                problems[lies] += 1
                continue
            found[key, number] = [-1] * len(row["frame_times"])
            entries[home, lies[0]] = (media, lies[1])
            for position, time in enumerate(row["frame_times"]):
                if time is not None:
                    places = wanted.setdefault((home, lies[0]), {}).setdefault(float(time), [])
                    places.append((key, number, position))
    uris: dict[str, int] = {}
    for name, times in wanted.items():
        media, entry = entries[name]
        try:
            pictures = media.read(name[1], entry, sorted(times))
        except (LstpError, OSError) as error:
            problems[_line(error, media.cwd)] += len({key for uses in times.values() for key, *_ in uses})
            continue
        for time, picture in zip(sorted(times), pictures, strict=True):
            place = uris.setdefault(_jpeg(picture), len(uris))
            for key, number, position in times[time]:
                found[key, number][position] = place
    found = {key: places for key, places in found.items() if max(places) >= 0}
    notes = [f"{count} without pictures: {why}" for why, count in problems.most_common(MOST_PROBLEMS)]
    far = {media.far: None for media in known.values() if isinstance(media, Media) and media.far}
    return found, list(uris), [*notes, *far]


def _line(error: Exception, cwd: Path | None) -> str:
    """The error's message with paths as the run's configuration has them."""
    text = " ".join(str(error).split())
    return text if cwd is None else text.replace(f"{cwd}/", "")


def _jpeg(picture: Image.Image) -> str:
    picture.thumbnail((SIDE, SIDE))
    raw = io.BytesIO()
    picture.save(raw, "JPEG", quality=QUALITY)
    return data_uri(raw.getvalue(), "image/jpeg")


# ---- where the videos are -------------------------------------------------------------------------------------------


def _media(one: Evaluation, videos: str | None) -> Media | str:
    """Of an evaluation; or why they are not known."""
    if videos is not None:
        if is_shards(videos):
            return Media(ShardQuestions(videos))
        folder = Path(videos)
        if not folder.is_dir():
            raise ConfigError(f"--videos {videos}: no such folder; expected one with videos, or shards (*.tar)")
        files = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in VIDEO_ENDINGS)
        return Media(files={unicodedata.normalize("NFC", path.stem): path for path in files})
    config = one.manifest.get("config")
    sections = config.get("datasets") if isinstance(config, Mapping) else None
    if not isinstance(sections, Mapping):
        return f"no manifest in {one.run_dir} says where the videos are; name their folder, --videos"
    run = config.get("run")
    task = run.get("task", "video_qa") if isinstance(run, Mapping) else "video_qa"
    split = one.predictions.stem.removesuffix(f"_{task}")
    recorded_in = one.manifest.get("cwd")
    cwd = Path(recorded_in) if isinstance(recorded_in, str) and recorded_in and Path(recorded_in).is_dir() else None
    reasons = []
    for name, section in sections.items():
        if split not in _storages(section):
            continue
        try:
            data = _data_set(name, section, split, cwd, one.manifest_file)
            far = _far(data.annotation, one)
            return Media(data.annotation, cwd=cwd, far=far, max_megapixels=data.settings.max_megapixels)
        except (LstpError, OSError) as error:
            reasons.append(_line(error, cwd))
    return reasons[0] if reasons else f"the run's data sets have no split '{split}'"


def _far(questions: FolderQuestions | ShardQuestions, one: Evaluation) -> str:
    """A line where pictures on the page are of files far from it, so that nobody shares them unknowingly."""
    folder = questions.root if isinstance(questions, FolderQuestions) else Path(questions.shards[0]).parent
    near = (Path.cwd(), one.run_dir.resolve().parent)
    if any(folder.resolve().is_relative_to(place) for place in near):
        return ""
    return f"the pictures are of files in {folder}, as {one.manifest_file} says; --pictures 0 leaves them out"


def _storages(section: Any) -> Mapping[str, Any]:
    """`build_info.annotations` of a recorded section, {} where it is not of that form."""
    for key in ("build_info", "annotations"):
        section = section.get(key) if isinstance(section, Mapping) else None
    return {split: value for split, value in section.items() if value} if isinstance(section, Mapping) else {}


def _data_set(name: str, section: Mapping[str, Any], split: str, cwd: Path | None, source: Path) -> VideoQADataset:
    """The data set of a split, from a section of a run's config; read, never written, and from local files alone.

    Args:
        cwd: where the run was started, which relative paths begin at; None = the current folder.
        source: the manifest.

    Raises:
        LstpError: files are missing, the data set is not one of ours, or the manifest names what only the user may.
    """
    from lavis_lstp import register

    register()
    from lavis.common.registry import registry
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from lavis_lstp.data.builders import ShapesBuilder, VideoQABuilder

    builder = registry.get_builder_class(name)
    if builder is None or not issubclass(builder, VideoQABuilder):
        raise VideoError(f"data set '{name}' does not say where its videos are; name their folder, --videos")
    if issubclass(builder, ShapesBuilder):
        builder = VideoQABuilder  # the recorded files are looked for, none is generated
    try:
        info = {
            key: {split: value[split]} if key in ("annotations", "answers") and value and split in value else value
            for key, value in section["build_info"].items()
        }
        kept = {key: value for key, value in section.items() if key not in (*ALONE, "build_info", "root", "generate")}
        content = recorded({**kept, "build_info": _placed(info, cwd)}, f"{source}: datasets.{name}")
        return builder(OmegaConf.create({**content, **ALONE})).build_datasets()[split]
    except (OmegaConfBaseException, KeyError, TypeError, AttributeError) as error:  # a manifest that was changed
        raise ConfigError(
            f"{source}: the section of data set '{name}' in the run's manifest is damaged: {_line(error, cwd)}"
        ) from error


def _placed(value: Any, cwd: Path | None) -> Any:
    """Recorded places, braces expanded and relative ones put where the run was started."""
    if isinstance(value, Mapping):
        return {key: _placed(one, cwd) for key, one in value.items()}
    if is_shards(value):
        places = [_place(one, cwd) for one in expand(value)]
        if special := [place for place in places if Path(place).exists() and not Path(place).is_file()]:
            raise ConfigError(f"{special[0]}: is no file; expected a shard")  # a pipe or a device may never end
        return places
    if isinstance(value, list):
        return [_placed(one, cwd) for one in value]
    return _place(value, cwd) if isinstance(value, str) else value


def _place(name: str, cwd: Path | None) -> str:
    from lavis_lstp.data.builders import local_path

    given = expanded(name)
    if what_it_names(name) or cwd is None or given.is_absolute():
        return name
    here = cwd / given
    cached = local_path(str(here)) if here.exists() else local_path(name)
    return str(cached if cached.is_absolute() else here)
