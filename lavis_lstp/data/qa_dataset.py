"""Annotation file and folder of videos -> samples (`lavis_lstp.schema`), map-style.

In: a JSON list or JSON lines, one entry per question:

    {"question_id": str, "video_id": str, "video": "path below the video folder" (or "image": ...),
     "question": str, "answer": str, "span_s": [start, end] (optional, gold, seconds), "category": str (optional),
     "categories": {axis: kind or [kinds]} (optional), "moments_s": [[start, end], ...] (optional, gold, where there may
     be several; span_s is then the longest of them),
     "options": [str, ...] (optional, the answer is one of them), "clip_s": [start, end] (optional, seconds: this part)}

Out: one sample per question, `collater` makes the batch. A picture is a sample of one frame, and an entry with neither
video nor image (`instruct` makes such) one without frames. `shards` gives the same samples of tars. Everything that can
be wrong with an annotation is said when it is read, not in the middle of an epoch; a video that cannot be decoded stops
the run, or, up to `max_bad_fraction`, leaves the batch and is counted. It is never replaced by another one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset, default_collate

from lavis_lstp.batch import with_equal_keys
from lavis_lstp.config.data import FolderSettings
from lavis_lstp.config.fields import checked
from lavis_lstp.config.model import FIGURES
from lavis_lstp.data.annotation import SECTION, read_annotation
from lavis_lstp.data.folder import FolderQuestions, kind_of
from lavis_lstp.data.frame_numbers import sample_indices
from lavis_lstp.data.left_out import LeftOut
from lavis_lstp.data.pictures import open_picture
from lavis_lstp.data.published_flow import read_published_flow
from lavis_lstp.data.selections import Recorded
from lavis_lstp.data.shards.questions import ShardQuestions, unpack_frames
from lavis_lstp.data.spans import GOLD, Spans
from lavis_lstp.data.store import content_digest, default_store, kept_figures, read_kept
from lavis_lstp.data.subtitles import Subtitles
from lavis_lstp.data.video.choosing import check_inside
from lavis_lstp.data.video.reading import VideoFrames, read_frames
from lavis_lstp.errors import AnnotationError, ConfigError, ShardError, VideoError
from lavis_lstp.files import sha256_json
from lavis_lstp.schema import NO_SPAN, Batch, Sample, Span

__all__ = ["VideoQADataset", "read_annotation"]

_FLOW_OF_PARTS = (
    "{section}.flow: precomputed is of whole videos, and questions here are about parts of videos (clip_s); use "
    "motion_vectors, or none and let the model compute it"
)


class VideoQADataset(Dataset):
    """Questions about videos, images and texts.

    Args:
        annotation: entries as `read_annotation` gives them, or without "video" and "image"; "prompt" is the whole
            prompt where there is one. Or the questions of shards.
        root: folder that "video" and "image" paths are relative to; none leads out of it. None for shards.
        settings: what `config.data` describes, of one split; by default frames stay as large as they are stored.
        spans: pseudo spans by question id; GOLD where the gold spans are learned; or None; see `data.spans`.
        recorded: frames by question id, which are read in place of num_frames ones, or None; see `data.selections`.
        subtitles: lines of the videos that the language model reads, or None.
        vis_processor, text_processor: LAVIS processors; the first makes `image`, [3,h,w], or with image_frames
            [K,3,h,w], for LAVIS's own models, the second changes the question (not a prompt).
        section: of the configuration that the settings stand in, for messages.
        changes: keys of `settings` that are to be others.

    Raises:
        ConfigError: a setting is out of range, or settings do not go together.
        AnnotationError: a path leads out of `root`, an id occurs twice, or a question about a video has no span.
        VideoError: a file is missing.
    """

    unanswerable: Sequence[str] = ()
    """Ids of a benchmark's questions without a right option: no samples of this set, which makes its score partial."""

    def __init__(
        self,
        annotation: Sequence[Mapping[str, Any]] | FolderQuestions | ShardQuestions,
        root: str | Path | None = None,
        settings: FolderSettings | None = None,
        *,
        spans: Spans | str | None = None,
        recorded: Mapping[str, Recorded] | None = None,
        subtitles: Subtitles | None = None,
        vis_processor=None,
        text_processor=None,
        section: str = SECTION,
        **changes: Any,
    ):
        given = vars(replace(settings or FolderSettings(image_size=None), **changes))
        shards = given.pop("shards")
        self.settings = FolderSettings(**checked(given, FolderSettings, section), shards=shards)
        in_shards = isinstance(annotation, ShardQuestions)
        flow_root = self.settings.flow_root
        folder = {"flow_root": flow_root, "section": section}
        ready = in_shards or isinstance(annotation, FolderQuestions)
        self.annotation = annotation if ready else FolderQuestions(annotation, root, **folder)
        self.spans, self.recorded, self.subtitles, self.section = spans, recorded, subtitles, section
        self.vis_processor, self.text_processor = vis_processor, text_processor
        self.window, self.resampled, self.blocks = shards.window, shards.resampled, self.annotation.blocks
        self.lanes, self.buffer = (shards.lanes, shards.buffer) if shards.loader == "stream" else (0, 1)
        self.kinds = self.annotation.kinds
        self._decode = None
        self._check_settings()
        self._check_kinds(bool(flow_root) or in_shards)
        self._check_ids()
        self.annotation.check_files(self.settings.max_bad_fraction)
        self.left_out = LeftOut(len(self), self.settings.max_bad_fraction, self.settings.quarantine, section)

    def _check_settings(self) -> None:
        settings = self.settings
        free = [getattr(settings, name) for name in ("flow", "fps", "short_videos", "frames", *FIGURES)]
        fixed = ["none", None, "keep", "exact", *[False] * len(FIGURES)]
        if self.recorded is not None and (free != fixed or self.spans is not None):
            raise ConfigError(
                f"{self.section}.selection says which frames are read; it goes with flow: none, fps: null, "
                f"short_videos: keep and frames: exact, and without spans, {' and '.join(FIGURES)}"
            )
        if settings.frames == "keyframe" and settings.flow == "precomputed":
            raise ConfigError(f"{self.section}.frames: keyframe does not go with flow: precomputed, which is of others")
        if settings.flow_pairs == "local" and settings.flow == "none":
            raise ConfigError(
                f"{self.section}.flow_pairs: local is for flow: motion_vectors, or precomputed by `lavis-lstp flow "
                "--flow-pairs local`; flow is none"
            )
        if settings.max_flows is not None and settings.flow != "precomputed":
            raise ConfigError(f"{self.section}.max_flows is for flow: precomputed, flow is {settings.flow}")
        if settings.flow == "precomputed" and settings.fps is not None:
            raise ConfigError(
                f"{self.section}.fps does not go with flow: precomputed; `lavis-lstp flow` reads num_frames frames"
            )
        if settings.flow != "none" and settings.short_videos == "double":
            raise ConfigError(
                f"{self.section}.short_videos: double does not go with flow: {settings.flow}; the model can compute it "
                "(flow: none), or keep short videos"
            )

    def _check_kinds(self, has_flow: bool) -> None:
        """What only videos, or only images and texts, need."""
        settings = self.settings
        if settings.flow == "precomputed" and "video" in self.kinds and not has_flow:
            raise ConfigError(
                f"{self.section}.flow: precomputed needs flow_root, the folder written by `lavis-lstp flow`"
            )
        if settings.flow == "precomputed" and self.kinds - {"video"} and not settings.flow_size:
            raise ConfigError(
                f"{self.section}.flow: precomputed needs flow_size, the side of the stored fields, for images and texts"
            )
        if "text" in self.kinds and not settings.image_size:
            raise ConfigError(f"{self.section}.image_size is needed for texts: that of the data they are mixed with")
        if "text" in self.kinds and self.vis_processor is not None:
            raise ConfigError(f"{self.section}.vis_processor: a text has no picture to process")

        if settings.flow == "precomputed" and self.annotation.has_clips:
            raise ConfigError(_FLOW_OF_PARTS.format(section=self.section))

    def _check_ids(self) -> None:
        ids = Counter(self.annotation.question_ids())
        if len(ids) < len(self.annotation):
            name, times = ids.most_common(1)[0]
            raise AnnotationError(
                f"question_id {name!r} occurs {times} times in the files of a split; ids must be unique"
            )
        if self.spans == GOLD:
            for row in () if isinstance(self.annotation, ShardQuestions) else self.annotation:
                self._check_gold(row)
        elif self.spans is not None:
            videos = self.annotation.video_question_ids()
            without = [name for name in videos if name not in self.spans]
            if without:
                raise AnnotationError(
                    f"{self.section}.spans has no span for {len(without)} of {len(videos)} questions, "
                    f"first {without[0]!r}; label this split with run.task=pseudo_span"
                )

    def _check_gold(self, row: Mapping[str, Any]) -> None:
        if kind_of(row) == "video" and not row.get("span_s"):
            raise AnnotationError(
                f"{self.section}.spans: gold, but question {row['question_id']!r} has no gold span (span_s); leave it "
                "out, or name a file of pseudo spans"
            )

    def __len__(self) -> int:
        return len(self.annotation)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decode": None}  # a cache is of one process

    def question_ids(self) -> list[str]:
        return self.annotation.question_ids()

    def eval_groups(self) -> list[list[int]]:
        """Questions about the same frames, which are then decoded once.

        What comes together is of like length: in a group short questions come first, and of groups those whose longest
        question is short.
        """
        groups: dict[str, list[int]] = {}
        length = []
        for index, row in enumerate(self.annotation):
            groups.setdefault(self._shown(row) or f"text {index}", []).append(index)
            length.append(len(row["question"]) + sum(map(len, row.get("options") or ())))
        ordered = [sorted(group, key=lambda index: (length[index], index)) for group in groups.values()]
        return sorted(ordered, key=lambda group: length[group[-1]])

    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the samples, but the videos' content."""
        own = self.settings
        settings = [own.num_frames, own.image_size, own.flow, own.flow_size, own.backend]
        if own.fps is not None or own.short_videos != "keep":
            settings += [own.fps, own.short_videos]
        settings += [own.frames] if own.frames != "exact" else []
        settings += [own.decode_size] if own.decode_size else []
        settings += [own.flow_pairs] if own.flow_pairs != "sampled" else []
        settings += [own.max_flows] if own.max_flows is not None else []
        settings += [] if self.recorded is None else [sorted((name, str(one)) for name, one in self.recorded.items())]
        settings += [self.subtitles.identity()] if self.subtitles is not None else []
        settings += ["span_weight", own.span_weight] if own.span_weight != 1 else []
        spans: Any = self.spans or {}
        if spans != GOLD:
            spans = {name: span and list(span) for name, span in spans.items()}
        return sha256_json([self.annotation.identity(), settings, spans])

    def batch_settings(self) -> dict[str, Any]:
        """What data sets whose samples come into the same batches must have in common, by the name of the setting."""
        own = self.settings
        settings: dict[str, Any] = {"image_size": own.image_size, "flow": "none" if own.flow == "none" else "given"}
        if own.flow == "motion_vectors" or own.flow_size:
            settings["flow_size"] = own.flow_size or own.image_size
        if "video" in self.kinds:
            settings |= {name: getattr(own, name) for name in ("num_frames", *FIGURES)}
        settings["vis_processor"] = "none" if self.vis_processor is None else "given"
        if self.subtitles is not None:
            settings["subtitles"] = self.subtitles.window_s
        return settings

    # ---- samples ----------------------------------------------------------------------------------------------

    def __getitem__(self, index: int) -> Sample | None:
        """A sample without the batch axis; None for one that cannot be decoded, while those are few enough."""
        try:
            row = self.annotation[index]
            frames, times, flow, figures, end_s = self._media(row)
        except (VideoError, ShardError) as error:
            self.left_out.add(index, self.annotation.question_id(index), self.annotation.where(index), error)
            return None
        sample: Sample = {
            "frames": frames,
            "frame_times": torch.from_numpy(times.astype(np.float32)),
            "end_s": end_s,
            "text_input": self.text_processor(row["question"]) if self.text_processor else row["question"],
            "prompt": row.get("prompt") or "",
            "options": row.get("options") or [],
            "category": row.get("category") or "",
            "categories": row.get("categories") or {},
            "media": f"{self.annotation.origin} {self._shown(row)}" if kind_of(row) != "text" else "",
            "text_output": row["answer"] or "",
            "answer": row["answer"],
            "question_id": row["question_id"],
            "instance_id": row["question_id"],
            "video_id": row["video_id"],
            "span": self._span(row, times),
            "span_weight": torch.tensor(float(self.settings.span_weight)),
            "gold_span": self._gold_span(row, times),
            "moments_s": _gold_moments(row),
        }
        if self.subtitles is not None:
            sample["subtitles"], sample["subtitles_window_s"] = self.subtitles.of(row), self.subtitles.window_s
        if flow is not None:
            sample["flow"] = flow
        sample |= {name: torch.from_numpy(figure) for name, figure in figures.items()}
        if self.settings.flow == "precomputed" and kind_of(row) == "video" and self._published_flow(row):
            sample["flow_mask"] = torch.ones(len(flow), dtype=torch.long)
        if self._pseudo_span(row) is None and self.spans not in (None, GOLD) and kind_of(row) == "video":
            sample["no_moment"] = torch.tensor(1)
        if self.spans == GOLD and len(sample["moments_s"]) > 1:
            sample["any_span"] = torch.stack([self._frames_of(moment, times) for moment in sample["moments_s"]])
        if self.vis_processor is not None:
            sample["image"] = self._image(frames)
        return sample

    def _shown(self, row: Mapping[str, Any]) -> str:
        """Return a name that questions about the same frames share, '' for a text."""
        chosen = self._chosen(row)
        return _media_name(row) + (f" frames {chosen.frames}" if chosen else "")

    def _chosen(self, row: Mapping[str, Any]) -> Recorded | None:
        """Recorded frames of a question about a video."""
        if self.recorded is None or kind_of(row) != "video":
            return None
        return replace(self.recorded[row["question_id"]], question=None)

    def _published_flow(self, row: Mapping[str, Any]) -> bool:
        return self.annotation.published_flow(self.annotation.place(row)) is not None

    def _image(self, frames: torch.Tensor) -> torch.Tensor:
        """The middle frame [3,h,w]; or K evenly spaced ones [K,3,h,w], repeated in order where there are fewer."""
        count, chosen = self.settings.image_frames, [len(frames) // 2]
        if count > 1:
            chosen = sample_indices(count, len(frames))
        pictures = [self.vis_processor(Image.fromarray(frames[i].permute(1, 2, 0).numpy())) for i in chosen]
        return torch.stack(pictures) if count > 1 else pictures[0]

    def _media(
        self, row: Mapping[str, Any]
    ) -> tuple[torch.Tensor, np.ndarray, torch.Tensor | None, dict[str, np.ndarray], float | None]:
        """frames uint8 [T,3,H,W], seconds float64 [T], flow float16 [T,2,h,w], or as published [L,2,h,w], or None, of
        FIGURES those that are asked for, float32 [T], and `Sample.end_s`."""
        kind, place = kind_of(row), self.annotation.place(row)
        if kind != "video":
            side = self.settings.image_size
            frames = self._read_image(place) if kind == "image" else torch.zeros(0, 3, side, side).byte()
            figures = dict.fromkeys(self._figures, np.ones(len(frames), np.float32))
            return frames, np.zeros(len(frames)), self._no_flow(frames), figures, None
        if self._decode is None:  # the last video is kept always: questions about it may come one after the other
            self._decode = lru_cache(maxsize=max(1, self.settings.cache_videos))(self._read)
        clip_s = tuple(row.get("clip_s") or ()) or None
        frames, times, flow, figures, duration_s = self._decode(place, clip_s, self._chosen(row))
        for start_s, end_s in () if duration_s is None else _gold_moments(row):
            check_inside([max(0, start_s), end_s], "span_s", duration_s, str(row["video"]))
        end_s = None if duration_s is None else round(duration_s, 6)
        if clip_s and end_s is not None and clip_s[1] > times[-1]:  # recorded frames may lie behind it
            end_s = min(end_s, clip_s[1])
        return torch.from_numpy(frames), times, None if flow is None else torch.from_numpy(flow), figures, end_s

    @property
    def _figures(self) -> list[str]:
        """Names of the figures that are asked for."""
        return [name for name in FIGURES if getattr(self.settings, name)]

    def _read(
        self, place: Any, clip_s: tuple[float, float] | None = None, recorded: Recorded | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, dict[str, np.ndarray], float | None]:
        settings = self.settings
        codec, flow, figures, duration_s = settings.flow == "motion_vectors", None, {}, None
        chosen = {name: getattr(settings, name) for name in ("fps", "short_videos", "max_megapixels")}
        chosen |= {"num": settings.num_frames, "size": settings.image_size}
        stored = self.annotation.frames(place)
        if recorded is not None:
            if stored is not None:
                raise ConfigError(
                    f"{self.annotation.name(place)}: {self.section}.selection needs the video, not frames"
                )
            video = self._read_recorded(place, recorded)
            return video.frames, video.times_s, None, {}, video.info.duration_s
        if stored is not None:
            if settings.frames == "keyframe":
                raise ConfigError(
                    f"{self.section}.frames: keyframe needs the video, and shards hold frames of it; exact"
                )
            if codec or clip_s or self._figures:
                what = "questions about a part of a video (clip_s) need"
                if codec or self._figures:
                    what = f"{'flow: motion_vectors' if codec else self._figures[0]} needs"
                raise ConfigError(f"{self.annotation.name(place)}: {self.section}: {what} the video, not stored frames")
            frames, times_s = unpack_frames(stored, self.annotation.name(place), self.section, **chosen), stored.times_s
            duration_s = self.annotation.duration_s(place, times_s[-1])
        else:
            source, name = self.annotation.medium(place)
            codec_flow = {"motion_vectors": codec, "exact": settings.frames == "exact"}
            if codec:  # other flow decides nothing of what is read here, and kept
                codec_flow |= {"flow_size": settings.flow_size, "flow_pairs": settings.flow_pairs}
            store = default_store() if settings.store and isinstance(source, Path) else None
            content = content_digest(source, store) if store else ""
            how = {**chosen, **codec_flow, **self._decoding(), "between_s": clip_s}
            video = read_kept(store, content, source, name=name, **how)
            frames, times_s, flow = video.frames, video.times_s, video.flow.astype(np.float16) if codec else None
            duration_s = video.info.duration_s
            if self._figures:
                how = {"name": name, "max_megapixels": settings.max_megapixels}
                figures = kept_figures(self._figures, store, content, source, video.indices, clip_s, **how)
        if settings.flow == "precomputed":
            if clip_s:
                raise ConfigError(_FLOW_OF_PARTS.format(section=self.section))
            published = self.annotation.published_flow(place)
            if published is not None:
                flow = read_published_flow(published, settings.max_flows)
            else:
                flow = self.annotation.flow(place, len(frames), settings.flow_pairs)
        return frames, times_s, flow, figures, duration_s

    def _read_recorded(self, place: Any, recorded: Recorded) -> VideoFrames:
        """The frames that were chosen for a question, of the video that they were chosen of."""
        source, name = self.annotation.medium(place)
        recorded.check_video(lambda: content_digest(source), name)
        how = {"size": self.settings.image_size, "max_megapixels": self.settings.max_megapixels, **self._decoding()}
        return read_frames(source, name=name, **recorded.frames, **how)

    def _decoding(self) -> dict[str, Any]:
        """Arguments of `read_frames` that change no frame's number."""
        how = {name: getattr(self.settings, name) for name in ("backend", "decode_size", "hardware")}
        return {"threads": self.settings.decode_threads, **how}

    def _read_image(self, place: Any) -> torch.Tensor:
        """uint8 [1,3,H,W]; pictures are resized as published: bicubic with antialias."""
        source, name = self.annotation.medium(place)
        picture = open_picture(source, name, max_megapixels=self.settings.max_megapixels)
        if side := self.settings.image_size:
            picture = picture.resize((side, side), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].contiguous()

    def _no_flow(self, frames: torch.Tensor) -> torch.Tensor | None:
        """Pictures and texts do not move."""
        if self.settings.flow == "none":
            return None
        side = self.settings.flow_size
        height, width = (side, side) if side else frames.shape[-2:]
        return torch.zeros(len(frames), 2, height, width, dtype=torch.float16)

    def _pseudo_span(self, row: Mapping[str, Any]) -> Span | tuple[float, float] | None:
        there = self.spans not in (None, GOLD) and kind_of(row) == "video"
        return self.spans[row["question_id"]] if there else None

    def _span(self, row: Mapping[str, Any], times: np.ndarray) -> torch.Tensor:
        if self.spans == GOLD:
            self._check_gold(row)
            return self._gold_span(row, times)
        span, num_frames = self._pseudo_span(row), len(times)
        if span is not None and not isinstance(span, Span):
            span = Span.from_fractions(*span, num_frames)
        if span is not None and span.end > num_frames:
            raise AnnotationError(
                f"{self.section}.spans: question {row['question_id']!r} has the span {list(span)}, its video gives "
                f"{num_frames} frames; label this split again with run.task=pseudo_span"
            )
        return torch.tensor(list(span or NO_SPAN), dtype=torch.long)

    def _gold_span(self, row: Mapping[str, Any], times: np.ndarray) -> torch.Tensor:
        return self._frames_of(row["span_s"], times) if row.get("span_s") else torch.tensor(NO_SPAN)

    def _frames_of(self, moment_s: Sequence[float], times: np.ndarray) -> torch.Tensor:
        # Not of float32 times: 1.8 s would become 1.79999995 and its frame fall out of a span that begins there.
        return torch.tensor(list(Span.from_seconds(*moment_s, times.round(6).tolist())), dtype=torch.long)

    # ---- batches ----------------------------------------------------------------------------------------------

    def collater(self, samples: Sequence[Sample | None]) -> Batch | None:
        """Pads T with zeros and adds the batch axis; None when no sample is left."""
        samples = [sample for sample in samples if sample is not None]
        if not samples:
            return None
        samples = with_equal_keys(samples)
        length = max(1, *(len(sample["frames"]) for sample in samples))
        flows = max([1, *(len(sample["flow_mask"]) for sample in samples if "flow_mask" in sample)])
        spans = max([1, *(len(sample["any_span"]) for sample in samples if "any_span" in sample)])
        batch: dict[str, Any] = {}
        for key, first in samples[0].items():
            values = [sample[key] for sample in samples]
            if key in ("frames", "frame_times", "flow", "flow_mask", *FIGURES):
                own = key.startswith("flow") and "flow_mask" in samples[0]
                values = [_padded(value, flows if own else length) for value in values]
            elif key == "any_span":
                values = [F.pad(value, (0, 0, 0, spans - len(value)), value=NO_SPAN[0]) for value in values]
            batch[key] = self._stacked(key, values, samples) if torch.is_tensor(first) else values
        counts = torch.tensor([len(sample["frames"]) for sample in samples])
        batch["frame_mask"] = (torch.arange(length)[None] < counts[:, None]).long()
        return batch

    def _stacked(self, key: str, values: list[torch.Tensor], samples: Sequence[Sample]) -> torch.Tensor:
        for value, sample in zip(values, samples, strict=True):
            if value.shape != values[0].shape:
                ids, shapes = (samples[0]["question_id"], sample["question_id"]), (values[0].shape, value.shape)
                raise ConfigError(
                    f"'{key}' of question {ids[0]!r} is {list(shapes[0])}, of {ids[1]!r} {list(shapes[1])}: they "
                    f"cannot share a batch; set {'flow_size' if key == 'flow' else 'image_size'} in {self.section}"
                )
        return default_collate(values)  # in a loader process straight into shared memory


def _media_name(row: Mapping[str, Any]) -> str:
    """Of the frames a question is about: equal where they are the same; '' for a text."""
    kind, clip = kind_of(row), row.get("clip_s")
    return "" if kind == "text" else f"{row[kind]} {clip[0]:g} to {clip[1]:g} s" if clip else row[kind]


def _gold_moments(row: Mapping[str, Any]) -> list[list[float]]:
    return row.get("moments_s") or ([row["span_s"]] if row.get("span_s") else [])


def _padded(value: torch.Tensor, length: int) -> torch.Tensor:
    if len(value) == length:
        return value
    return torch.cat([value, value.new_zeros(length - len(value), *value.shape[1:])])
