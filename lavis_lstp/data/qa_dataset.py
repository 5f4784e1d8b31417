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

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, default_collate

from lavis_lstp.data.annotation import SECTION, read_annotation
from lavis_lstp.data.folder import FolderQuestions, kind_of
from lavis_lstp.data.frame_numbers import sample_indices
from lavis_lstp.data.left_out import LeftOut
from lavis_lstp.data.pictures import DEFAULT_MAX_MEGAPIXELS, open_picture
from lavis_lstp.data.published_flow import read_published_flow
from lavis_lstp.data.shards.questions import ShardQuestions, unpack_frames
from lavis_lstp.data.spans import Spans
from lavis_lstp.data.store import Store, content_digest, entry_key
from lavis_lstp.data.video.codec_figures import of_candidates, packet_costs
from lavis_lstp.data.video.reading import SHORT_VIDEOS, check_inside, read_frames
from lavis_lstp.errors import AnnotationError, ConfigError, ShardError, VideoError, unknown_name
from lavis_lstp.schema import NO_SPAN, Span

__all__ = ["VideoQADataset", "read_annotation"]

FLOWS = ("none", "motion_vectors", "precomputed")
READ_VERSION = 1
"""Of what a store keeps; a reader that gives other pixels or another flow counts it up."""
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
        num_frames: T; uniform centres of the video, all frames of a shorter one.
        fps: frames a second to read where these are at most num_frames; None = num_frames of any video.
        short_videos: keep, or double: repeat the frames of a shorter video to num_frames; see `read_frames`.
        image_size: side in px that frames are resized to (bilinear, aspect not kept); None = as stored.
        flow: none, motion_vectors (read while decoding) or precomputed: `flow_root`/<video_id>.safetensors, or as
            published <video_id>_raft.npy, which has its own number of fields, and so `flow_mask` [L] beside `flow`.
        max_flows: of published flow files with more fields so many are taken; published training took 64.
        flow_size: side in px of motion vectors' field, and of the still flow of images and texts; None = that of the
            frames.
        spans: pseudo spans by question id, or None; see `data.spans`.
        backend: pyav, decord or torchcodec.
        decode_threads, decode_size, hardware: how pyav decodes; see `read_frames`.
        frames: exact, or keyframe: in place of each frame the nearest key frame of the file.
        flow_pairs: sampled, from each frame to the next one read, or local, to the file's next.
        bit_cost: also give the bytes that the codec spent on the pictures around each frame.
        store: folder that keeps what was read of each video file, for other epochs and processes; None = none.
        cache_videos: so many decoded videos are kept in memory, in each loader process; at least one always is.
        max_bad_fraction: share of samples that may fail to decode, or have no file, before the run stops.
        quarantine: file that a line of JSON is appended to for each sample that fails; None = the log alone.
        max_megapixels: a picture of a larger area, in millions of pixels, is not read.
        window, resampled, lanes, buffer: how a training epoch goes through shards; see `runners.data_order.Sampling`.
        image_frames: frames in `image`, evenly spaced; 1 = the middle one.
        vis_processor, text_processor: LAVIS processors; the first makes `image`, [3,h,w], or with image_frames
            [K,3,h,w], for LAVIS's own models, the second changes the question (not a prompt).
        section: of the configuration that these settings stand in, for messages.

    Raises:
        ConfigError: a setting is out of range, or settings do not go together.
        AnnotationError: a path leads out of `root`, an id occurs twice, or a question about a video has no span.
        VideoError: a file is missing.
    """

    def __init__(
        self,
        annotation: Sequence[Mapping[str, Any]] | FolderQuestions | ShardQuestions,
        root: str | Path | None = None,
        *,
        num_frames: int = 32,
        fps: float | None = None,
        short_videos: str = "keep",
        image_size: int | None = None,
        flow: str = "none",
        flow_root: str | Path | None = None,
        flow_size: int | None = None,
        max_flows: int | None = None,
        spans: Spans | None = None,
        backend: str = "pyav",
        decode_threads: int = 1,
        decode_size: int | None = None,
        hardware: str | None = None,
        frames: str = "exact",
        flow_pairs: str = "sampled",
        bit_cost: bool = False,
        store: str | Path | None = None,
        cache_videos: int = 0,
        max_bad_fraction: float = 0.0,
        quarantine: str | Path | None = None,
        max_megapixels: float = DEFAULT_MAX_MEGAPIXELS,
        window: int = 0,
        resampled: bool = False,
        lanes: int = 0,
        buffer: int = 1,
        image_frames: int = 1,
        vis_processor=None,
        text_processor=None,
        section: str = SECTION,
    ):
        in_shards = isinstance(annotation, ShardQuestions)
        folder = {"flow_root": flow_root, "section": section}
        ready = in_shards or isinstance(annotation, FolderQuestions)
        self.annotation = annotation if ready else FolderQuestions(annotation, root, **folder)
        self.num_frames = num_frames
        self.fps = fps
        self.short_videos = short_videos
        self.image_size = image_size
        self.flow = flow
        self.flow_size = flow_size
        self.max_flows = max_flows
        self.spans = spans
        self.backend = backend
        self.decoding = {"threads": decode_threads, "decode_size": decode_size, "hardware": hardware}
        self.exact = frames == "exact"
        self.flow_pairs = flow_pairs
        self.bit_cost = bit_cost
        self.store = Store(store) if store else None
        self.cache_videos = cache_videos
        self.max_bad_fraction = max_bad_fraction
        self.max_megapixels = max_megapixels
        self.image_frames = image_frames
        self.vis_processor = vis_processor
        self.text_processor = text_processor
        self.section = section
        self.window, self.resampled, self.blocks = window, resampled, self.annotation.blocks
        self.lanes, self.buffer = lanes, buffer
        self.kinds = self.annotation.kinds
        self._decode = None
        self._check_settings()
        self._check_kinds(bool(flow_root) or in_shards)
        self._check_ids()
        self.annotation.check_files(max_bad_fraction)
        self.left_out = LeftOut(len(self), max_bad_fraction, quarantine, section)

    def _check_settings(self) -> None:
        if not self.exact and self.flow == "precomputed":
            raise ConfigError(f"{self.section}.frames: keyframe does not go with flow: precomputed, which is of others")
        if self.flow_pairs == "local" and self.flow == "none":
            raise ConfigError(
                f"{self.section}.flow_pairs: local is for flow: motion_vectors, or precomputed by `lavis-lstp flow "
                "--flow-pairs local`; flow is none"
            )
        if self.flow not in FLOWS:
            raise ConfigError(unknown_name(f"{self.section}.flow", self.flow, FLOWS))
        if self.short_videos not in SHORT_VIDEOS:
            raise ConfigError(unknown_name(f"{self.section}.short_videos", self.short_videos, SHORT_VIDEOS))
        if self.fps is not None and (type(self.fps) not in (int, float) or not self.fps > 0):
            raise ConfigError(f"{self.section}.fps must be a number greater than 0 or null, got {self.fps!r}")
        if self.max_flows is not None and self.flow != "precomputed":
            raise ConfigError(f"{self.section}.max_flows is for flow: precomputed, flow is {self.flow}")
        if self.flow == "precomputed" and self.fps is not None:
            raise ConfigError(
                f"{self.section}.fps does not go with flow: precomputed; `lavis-lstp flow` reads num_frames frames"
            )
        if self.flow != "none" and self.short_videos == "double":
            raise ConfigError(
                f"{self.section}.short_videos: double does not go with flow: {self.flow}; the model can compute it "
                "(flow: none), or keep short videos"
            )
        for name, least in (
            ("num_frames", 1),
            ("image_frames", 1),
            ("image_size", 1),
            ("flow_size", 1),
            ("max_flows", 1),
            ("cache_videos", 0),
        ):
            value = getattr(self, name)
            optional = value is None and (name.endswith("_size") or name == "max_flows")
            if not optional and (type(value) is not int or value < least):
                raise ConfigError(f"{self.section}.{name} must be a whole number of at least {least}, got {value!r}")
        limit = self.max_megapixels
        if type(limit) not in (int, float) or not 0 < limit < float("inf"):
            raise ConfigError(f"{self.section}.max_megapixels must be a number greater than 0, got {limit!r}")
        share = self.max_bad_fraction
        if type(share) not in (int, float) or not 0 <= share <= 1:
            raise ConfigError(f"{self.section}.max_bad_fraction must lie in 0..1, got {share!r}")

    def _check_kinds(self, has_flow: bool) -> None:
        """What only videos, or only images and texts, need."""
        if self.flow == "precomputed" and "video" in self.kinds and not has_flow:
            raise ConfigError(
                f"{self.section}.flow: precomputed needs flow_root, the folder written by `lavis-lstp flow`"
            )
        if self.flow == "precomputed" and self.kinds - {"video"} and not self.flow_size:
            raise ConfigError(
                f"{self.section}.flow: precomputed needs flow_size, the side of the stored fields, for images and texts"
            )
        if "text" in self.kinds and not self.image_size:
            raise ConfigError(f"{self.section}.image_size is needed for texts: that of the data they are mixed with")
        if "text" in self.kinds and self.vis_processor is not None:
            raise ConfigError(f"{self.section}.vis_processor: a text has no picture to process")

        if self.flow == "precomputed" and self.annotation.has_clips:
            raise ConfigError(_FLOW_OF_PARTS.format(section=self.section))

    def _check_ids(self) -> None:
        ids = Counter(self.annotation.question_ids())
        if len(ids) < len(self.annotation):
            name, times = ids.most_common(1)[0]
            raise AnnotationError(
                f"question_id {name!r} occurs {times} times in the files of a split; ids must be unique"
            )
        if self.spans is not None:
            videos = self.annotation.video_question_ids()
            without = [name for name in videos if name not in self.spans]
            if without:
                raise AnnotationError(
                    f"{self.section}.spans has no span for {len(without)} of {len(videos)} questions, "
                    f"first {without[0]!r}; label this split with run.task=pseudo_span"
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
            groups.setdefault(_media_name(row) or f"text {index}", []).append(index)
            length.append(len(row["question"]) + sum(map(len, row.get("options") or ())))
        ordered = [sorted(group, key=lambda index: (length[index], index)) for group in groups.values()]
        return sorted(ordered, key=lambda group: length[group[-1]])

    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the samples, but the videos' content."""
        settings = [self.num_frames, self.image_size, self.flow, self.flow_size, self.backend]
        if self.fps is not None or self.short_videos != "keep":
            settings += [self.fps, self.short_videos]
        settings += [] if self.exact else ["keyframe"]
        settings += [self.decoding["decode_size"]] if self.decoding["decode_size"] else []
        settings += [self.flow_pairs] if self.flow_pairs != "sampled" else []
        settings += [self.max_flows] if self.max_flows is not None else []
        spans = {name: span and list(span) for name, span in (self.spans or {}).items()}
        content = json.dumps([self.annotation.identity(), settings, spans], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()

    def batch_settings(self) -> dict[str, Any]:
        """What data sets whose samples come into the same batches must have in common, by the name of the setting."""
        settings: dict[str, Any] = {"image_size": self.image_size, "flow": "none" if self.flow == "none" else "given"}
        if self.flow == "motion_vectors" or self.flow_size:
            settings["flow_size"] = self.flow_size or self.image_size
        if "video" in self.kinds:
            settings["num_frames"] = self.num_frames
        settings["vis_processor"] = "none" if self.vis_processor is None else "given"
        return settings

    # ---- samples ----------------------------------------------------------------------------------------------

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        """A sample without the batch axis; None for one that cannot be decoded, while those are few enough."""
        try:
            row = self.annotation[index]
            frames, times, flow, cost = self._media(row)
        except (VideoError, ShardError) as error:
            self.left_out.add(index, self.annotation.question_id(index), self.annotation.where(index), error)
            return None
        sample = {
            "frames": frames,
            "frame_times": torch.from_numpy(times.astype(np.float32)),
            "text_input": self.text_processor(row["question"]) if self.text_processor else row["question"],
            "prompt": row.get("prompt", ""),
            "options": row.get("options") or [],
            "category": row.get("category") or "",
            "categories": row.get("categories") or {},
            "media": f"{self.annotation.origin} {_media_name(row)}" if kind_of(row) != "text" else "",
            "text_output": row["answer"] or "",
            "answer": row["answer"],
            "question_id": row["question_id"],
            "instance_id": row["question_id"],
            "video_id": row["video_id"],
            "span": self._span(row, len(frames)),
            "gold_span": self._gold_span(row, times),
            "moments_s": row.get("moments_s") or ([row["span_s"]] if row.get("span_s") else []),
        }
        if flow is not None:
            sample["flow"] = flow
        if self.bit_cost:
            sample["bit_cost"] = torch.from_numpy(cost)
        if self.flow == "precomputed" and kind_of(row) == "video" and self._published_flow(row):
            sample["flow_mask"] = torch.ones(len(flow), dtype=torch.long)
        if self.spans is not None and kind_of(row) == "video" and self.spans[row["question_id"]] is None:
            sample["no_moment"] = torch.tensor(1)
        if self.vis_processor is not None:
            sample["image"] = self._image(frames)
        return sample

    def _published_flow(self, row: Mapping[str, Any]) -> bool:
        return self.annotation.published_flow(self.annotation.place(row)) is not None

    def _image(self, frames: torch.Tensor) -> torch.Tensor:
        """The middle frame [3,h,w]; or K evenly spaced ones [K,3,h,w], repeated in order where there are fewer."""
        count, chosen = self.image_frames, [len(frames) // 2]
        if count > 1:
            chosen = sample_indices(count, len(frames))
        pictures = [self.vis_processor(Image.fromarray(frames[i].permute(1, 2, 0).numpy())) for i in chosen]
        return torch.stack(pictures) if count > 1 else pictures[0]

    def _media(self, row: Mapping[str, Any]) -> tuple[torch.Tensor, np.ndarray, torch.Tensor | None, np.ndarray | None]:
        """frames uint8 [T,3,H,W], seconds float64 [T], flow float16 [T,2,h,w], or as published [L,2,h,w], or None, and
        bit cost float32 [T] or None."""
        kind, place = kind_of(row), self.annotation.place(row)
        if kind != "video":
            nothing = (0, 3, self.image_size, self.image_size)
            frames = self._read_image(place) if kind == "image" else torch.zeros(nothing).byte()
            return frames, np.zeros(len(frames)), self._no_flow(frames), np.ones(len(frames), np.float32)
        if self._decode is None:  # the last video is kept always: questions about it may come one after the other
            self._decode = lru_cache(maxsize=max(1, self.cache_videos))(self._read)
        frames, times, flow, cost, duration_s = self._decode(place, tuple(row.get("clip_s") or ()) or None)
        if row.get("span_s") and duration_s is not None:
            check_inside(row["span_s"], "span_s", duration_s, str(row["video"]))
        return torch.from_numpy(frames), times, None if flow is None else torch.from_numpy(flow), cost

    def _read(
        self, place: Any, clip_s: tuple[float, float] | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None, float | None]:
        codec, flow, cost, duration_s = self.flow == "motion_vectors", None, None, None
        chosen = {"num": self.num_frames, "fps": self.fps, "short_videos": self.short_videos, "size": self.image_size}
        chosen["max_megapixels"] = self.max_megapixels
        stored = self.annotation.frames(place)
        if stored is not None:
            if not self.exact:
                raise ConfigError(
                    f"{self.section}.frames: keyframe needs the video, and shards hold frames of it; exact"
                )
            if codec or clip_s or self.bit_cost:
                parts = "questions about a part of a video (clip_s) need"
                what = "flow: motion_vectors needs" if codec else "bit_cost needs" if self.bit_cost else parts
                raise ConfigError(f"{self.annotation.name(place)}: {self.section}: {what} the video, not stored frames")
            frames, times_s = unpack_frames(stored, self.annotation.name(place), self.section, **chosen), stored.times_s
        else:
            source, name = self.annotation.medium(place)
            codec_flow = {"motion_vectors": codec, "flow_size": self.flow_size if codec else None}
            codec_flow |= {"flow_pairs": self.flow_pairs, "exact": self.exact, **self.decoding}
            how = {"between_s": clip_s, "backend": self.backend, **chosen, **codec_flow}
            frames, times_s, flow, cost, duration_s = self._kept(source, name, how)
        if self.flow == "precomputed":
            if clip_s:
                raise ConfigError(_FLOW_OF_PARTS.format(section=self.section))
            published = self.annotation.published_flow(place)
            if published is not None:
                flow = read_published_flow(published, self.max_flows)
            else:
                flow = self.annotation.flow(place, len(frames), self.flow_pairs)
        return frames, times_s, flow, cost, duration_s

    def _kept(self, source: Any, name: str, how: Mapping[str, Any]) -> tuple:
        """What `_read` returns of a video, from the store where it has it; bytes of shards are not kept."""
        key = None
        if self.store is not None and isinstance(source, (str, Path)):
            settings = {**how, "bit_cost": self.bit_cost, "read": READ_VERSION}
            key = entry_key("frames", content_digest(source, self.store), settings)
            if found := self.store.get(key):
                return *(found.get(part) for part in ("frames", "times_s", "flow", "cost")), float(found["duration_s"])
        video = read_frames(source, name=name, **how)
        flow = None if video.flow is None else video.flow.astype(np.float16)
        cost = None
        if self.bit_cost:
            costs = packet_costs(source, name=name, max_megapixels=self.max_megapixels).num_bytes
            cost = of_candidates(costs, np.asarray(video.indices)).astype(np.float32)
        if key:
            arrays = {"frames": video.frames, "times_s": video.times_s, "flow": flow, "cost": cost}
            arrays["duration_s"] = np.float64(video.info.duration_s)
            self.store.put(key, {part: array for part, array in arrays.items() if array is not None})
        return video.frames, video.times_s, flow, cost, video.info.duration_s

    def _read_image(self, place: Any) -> torch.Tensor:
        """uint8 [1,3,H,W]; pictures are resized as published: bicubic with antialias."""
        source, name = self.annotation.medium(place)
        picture = open_picture(source, name, max_megapixels=self.max_megapixels)
        if self.image_size:
            picture = picture.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].contiguous()

    def _no_flow(self, frames: torch.Tensor) -> torch.Tensor | None:
        """Pictures and texts do not move."""
        if self.flow == "none":
            return None
        height, width = (self.flow_size, self.flow_size) if self.flow_size else frames.shape[-2:]
        return torch.zeros(len(frames), 2, height, width, dtype=torch.float16)

    def _span(self, row: Mapping[str, Any], num_frames: int) -> torch.Tensor:
        span = self.spans[row["question_id"]] if self.spans is not None and kind_of(row) == "video" else None
        if span is not None and not isinstance(span, Span):
            span = Span.from_fractions(*span, num_frames)
        if span is not None and span.end > num_frames:
            raise AnnotationError(
                f"{self.section}.spans: question {row['question_id']!r} has the span {list(span)}, its video gives "
                f"{num_frames} frames; label this split again with run.task=pseudo_span"
            )
        return torch.tensor(list(span or NO_SPAN), dtype=torch.long)

    def _gold_span(self, row: Mapping[str, Any], times: np.ndarray) -> torch.Tensor:
        # Not of float32 times: 1.8 s would become 1.79999995 and its frame fall out of a span that begins there.
        span = Span.from_seconds(*row["span_s"], times.round(6).tolist()) if row.get("span_s") else NO_SPAN
        return torch.tensor(list(span), dtype=torch.long)

    # ---- batches ----------------------------------------------------------------------------------------------

    def collater(self, samples: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
        """Pads T with zeros and adds the batch axis; None when no sample is left."""
        samples = [sample for sample in samples if sample is not None]
        if not samples:
            return None
        if any("flow_mask" in sample for sample in samples):  # beside others, with one field for each frame
            samples = [
                {"flow_mask": sample["flow"].new_ones(len(sample["flow"])).long(), **sample} for sample in samples
            ]
        if any("no_moment" in sample for sample in samples):
            samples = [{"no_moment": torch.tensor(0), **sample} for sample in samples]
        length = max(1, *(len(sample["frames"]) for sample in samples))
        flows = max([1, *(len(sample["flow_mask"]) for sample in samples if "flow_mask" in sample)])
        batch: dict[str, Any] = {}
        for key, first in samples[0].items():
            values = [sample[key] for sample in samples]
            if key in ("frames", "frame_times", "flow", "flow_mask", "bit_cost"):
                own = key.startswith("flow") and "flow_mask" in samples[0]
                values = [_padded(value, flows if own else length) for value in values]
            batch[key] = self._stacked(key, values, samples) if torch.is_tensor(first) else values
        counts = torch.tensor([len(sample["frames"]) for sample in samples])
        batch["frame_mask"] = (torch.arange(length)[None] < counts[:, None]).long()
        return batch

    def _stacked(self, key: str, values: list[torch.Tensor], samples: Sequence[dict[str, Any]]) -> torch.Tensor:
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


def _padded(value: torch.Tensor, length: int) -> torch.Tensor:
    if len(value) == length:
        return value
    return torch.cat([value, value.new_zeros(length - len(value), *value.shape[1:])])
