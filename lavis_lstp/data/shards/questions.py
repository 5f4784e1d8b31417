"""Questions and media in tar shards (docs/data_format.md), for `VideoQADataset`: any of them by its number.

In: locations of shards: paths, http(s) addresses, what fsspec opens, `pipe:` commands. Out: entries as annotation files
hold them, and the bytes of their media. With an index beside each shard, question n is one read at an offset, so shards
are map-style data: order, exactly-once and resume are those of `runners.data_order`, for any number of ranks and
workers. Of what has no index, headers and JSON are read when the run starts, because that order needs to know how many
there are; a pipe, which has no offsets, is first copied to a folder.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from lavis_lstp.data.annotation import SECTION
from lavis_lstp.data.flow_files import check_pairs, flow_file, read_flow_file
from lavis_lstp.data.pictures import DEFAULT_MAX_MEGAPIXELS, open_picture
from lavis_lstp.data.prompts import conversation_prompt
from lavis_lstp.data.shards.format import (
    MEDIA_MEMBERS,
    StoredFrames,
    check_sample,
    parse_flow,
    parse_frames,
    parse_json,
)
from lavis_lstp.data.shards.sets import Read, ShardSet
from lavis_lstp.data.shards.storage import (
    RETRY,
    ForwardReader,
    Retry,
    expand,
    knows_ranges,
    open_stream,
    read_at,
    scheme,
)
from lavis_lstp.data.spans import Spans, checked_spans
from lavis_lstp.errors import AnnotationError, ConfigError, ShardError, VideoError
from lavis_lstp.files import expanded, whole_file

logger = logging.getLogger(__name__)

COPIES_AT_ONCE = 4
KEPT = 8
"""Samples whose bytes a loader process keeps: the questions of one are often asked one after the other."""

Place = tuple[int, int]
"""(shard, sample): where a medium lies."""


def is_shards(storage: object) -> bool:
    """Whether a configuration's `storage` names shards and not an annotation file."""
    first = storage[0] if isinstance(storage, (list, tuple)) and storage else storage
    return isinstance(first, str) and (first.startswith("pipe:") or first.partition("?")[0].endswith(".tar"))


class ShardQuestions(Sequence):
    """Questions of a set of shards.

    Args:
        storage: locations, braces allowed.
        kind: video, image or text: take these alone and leave others to other data sets; None = all.
        flow: locations of a parallel set with the samples' flow, where it is not in the shards themselves.
        flow_root: folder written by `lavis-lstp flow`, instead.
        cache: folder that pipes are copied to, and what a server has that knows no ranges.
        check: compare what is read with its SHA-256.
        section: of the configuration, for messages.

    Raises:
        ConfigError, ShardError, AnnotationError: what is missing, damaged or does not go together, and where.
    """

    def __init__(
        self,
        storage: str | Sequence[str],
        *,
        kind: str | None = None,
        flow: str | Sequence[str] | None = None,
        flow_root: Path | None = None,
        cache: str | Path | None = None,
        retry: Retry = RETRY,
        check: bool = True,
        section: str = SECTION,
    ):
        self.section = section
        self._flow_root = flow_root
        self._set = ShardSet(_seekable(expand(storage), cache, retry, section), retry=retry, check=check, quick=True)
        flow = _seekable(expand(flow), cache, retry, section) if flow else None
        self._flow = ShardSet(flow, retry=retry, check=check, quick=True) if flow else None
        self._cache = cache
        self.kinds = {kind} if kind else self._set.kinds()
        self._numbers, self.blocks = self._choose(kind)
        if not len(self):
            raise AnnotationError(f"{section}: no question of the kind '{kind}' in {storage}")
        if self._flow is not None:
            self._check_parallel(self._flow, "flow")
        self._kept: OrderedDict[Place, dict[str, bytes]] = OrderedDict()
        self._handed: tuple[Place, dict[str, bytes] | ShardError] | None = None

    def _choose(self, kind: str | None) -> tuple[np.ndarray | None, list[int]]:
        """Numbers of the questions of a kind, None for all, and where each shard's end among them."""
        if kind is None or self._set.kinds() == {kind}:
            return None, list(self._set.ends)
        numbers, blocks, before = [], [], 0
        for shard in range(len(self._set.shards)):
            row = before
            for sample in self._set.index(shard).samples():
                if sample.kind == kind:
                    numbers += range(row, row + len(sample.question_ids))
                row += len(sample.question_ids)
            before = row
            blocks.append(len(numbers))
        return np.array(numbers, dtype=np.int64), blocks

    def _check_parallel(self, theirs: ShardSet, what: str) -> None:
        mine, key = self._set, f"{self.section}.shards.{what}"
        if len(mine.shards) != len(theirs.shards):
            raise ConfigError(f"{key}: {len(theirs.shards)} shards of {what} for {len(mine.shards)} of media")
        for shard, (one, other) in enumerate(zip(mine.entries, theirs.entries, strict=True)):
            if one["samples"] != other["samples"] or mine.index(shard).keys() != theirs.index(shard).keys():
                raise ConfigError(
                    f"{key}: {theirs.shards[shard]} does not hold the samples of {mine.shards[shard]} in their order; "
                    f"make it again with `python -m webdataset_tools {what}`"
                )

    def spans(self, storage: str | Sequence[str] | None = None, **frames: Any) -> Spans:
        """Pseudo spans by question id, out of the samples' `span.json`.

        Args:
            storage: locations of a parallel set with these members, where they are not in the shards themselves.
            frames: `num_frames`, `fps` and `short_videos` of the data set.

        Raises:
            ShardError: a video has no such member.
            AnnotationError: one is not of the form, or for other frames.
        """
        source = self._set
        if storage:
            storage = _seekable(expand(storage), self._cache, self._set.retry, self.section)
            source = ShardSet(storage, retry=self._set.retry, check=self._set.check)
            self._check_parallel(source, "spans")
        found: dict[str, Any] = {}
        for shard in range(len(source.shards)):
            for number, sample in enumerate(self._set.index(shard).samples()):
                if sample.kind != "video":
                    continue
                place = f"{source.shards[shard]}, {sample.key}.span.json"
                raw = source.read(shard, number, ("span.json",)).get("span.json")
                if raw is None:
                    raise ShardError(
                        f"{place}: there is none; attach spans with `python -m webdataset_tools spans` and name their "
                        f"set in {self.section}.shards.spans",
                        "missing member",
                    )
                found |= checked_spans(parse_json(raw, place), place, **frames, section=self.section)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict(), "_handed": None}  # of one process

    # ---- entries ----------------------------------------------------------------------------------------------

    @property
    def shards(self) -> list[str]:
        """Where the shards lie."""
        return self._set.shards

    @property
    def origin(self) -> str:
        """What tells media of the same name in two data sets apart."""
        return f"{self.section} {self._set.shards[0]}"

    def __len__(self) -> int:
        return len(self._set) if self._numbers is None else len(self._numbers)

    def _number(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return index if self._numbers is None else int(self._numbers[index])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """An entry as `read_annotation` gives them, and "place"."""
        shard, sample, which = self._set.locate(self._number(index))
        return self._entry((shard, sample), which, self.content((shard, sample)).get("json", b""))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All entries; of each sample only the JSON is read."""
        last, raw = None, b""
        for index in range(len(self)):
            shard, sample, which = self._set.locate(self._number(index))
            if (shard, sample) != last:
                last, raw = (shard, sample), self._set.read(shard, sample, ("json",)).get("json", b"")
            yield self._entry((shard, sample), which, raw)

    def _entry(self, place: Place, which: int, raw: bytes) -> dict[str, Any]:
        (shard, sample), place = place, self.name(place)
        value = parse_json(raw, f"{place}.json")
        check_sample(value, f"{place}.json", self._set.index(shard).key(sample))
        row = value["questions"][which]
        entry = {"question_id": row["question_id"], "video_id": value["video_id"], "place": (shard, sample)}
        if value["kind"] != "text":
            entry[value["kind"]] = value["source"]
        if "subtitles" in value:
            entry["lines"] = value["subtitles"]
        if "conversations" not in row:
            return {**row, **entry}
        try:
            prompt = conversation_prompt(row["conversations"])
        except AnnotationError as error:
            raise ShardError(f"{place}, question {row['question_id']!r}: {error}", "schema") from None
        return entry | {"question": prompt.question, "prompt": prompt.prompt, "answer": prompt.answer}

    def question_id(self, index: int) -> str:
        """Without reading the sample, which may not be readable."""
        shard, sample, which = self._set.locate(self._number(index))
        return self._set.index(shard).sample(sample).question_ids[which]

    def question_ids(self) -> list[str]:
        ids = self._set.question_ids()
        return ids if self._numbers is None else [ids[number] for number in self._numbers.tolist()]

    def video_question_ids(self) -> list[str]:
        samples = (one for n in range(len(self._set.shards)) for one in self._set.index(n).samples())
        return [name for sample in samples if sample.kind == "video" for name in sample.question_ids]

    def where(self, index: int) -> dict[str, str]:
        """Shard and key of a question, for the quarantine list."""
        shard, sample, _ = self._set.locate(self._number(index))
        return {"shard": self._set.shards[shard], "key": self._set.index(shard).key(sample)}

    def size(self) -> str:
        return f"{sum(entry['samples'] for entry in self._set.entries)} samples in {len(self._set.shards)} shards"

    def identity(self) -> str:
        """Of all content, whatever the shards are called."""
        flow = self._flow.digest() if self._flow is not None else ""
        chosen = "" if self._numbers is None else hashlib.sha256(self._numbers.tobytes()).hexdigest()
        return f"{self._set.digest()} {flow} {chosen}"

    has_clips = False  # a question that has one says so when it is read

    def check_files(self, max_bad_fraction: float = 0.0) -> None:
        """Nothing to look for: what the indexes name is there or found missing when it is read."""

    # ---- media ------------------------------------------------------------------------------------------------

    def name(self, place: Place) -> str:
        return f"{self._set.shards[place[0]]}, {self._set.index(place[0]).key(place[1])}"

    def content(self, place: Place) -> dict[str, bytes]:
        """The members that training reads, as `hand_over` brought them, or in one read."""
        if self._handed is not None and self._handed[0] == place:
            if isinstance(self._handed[1], ShardError):
                raise self._handed[1]
            return self._handed[1]
        if place not in self._kept:
            self._kept[place] = self.read(place)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return self._kept[place]

    def read(self, place: Place, by: Read = read_at, flow_by: Read = read_at) -> dict[str, bytes]:
        """The members that training reads: not the video where there are frames of it."""
        names = set(self._set.index(place[0]).members(place[1]))
        wanted = names - set(MEDIA_MEMBERS) if "frames" in names else names
        found = self._set.read(*place, tuple(wanted), by)
        if self._flow is not None:
            found |= self._flow.read(*place, ("flow",), flow_by)
        return found

    def readers(self, shard: int) -> tuple[ForwardReader, ...]:
        """What reads a shard, and its parallel one, from one sample to the next: for `read`."""
        return tuple(ForwardReader(one.shards[shard], one.retry) for one in (self._set, self._flow) if one is not None)

    def hand_over(self, place: Place, content: dict[str, bytes] | ShardError) -> None:
        """What a stream has read of a sample, or why it could not; kept until the next one is handed over."""
        self._handed = place, content

    def place_of(self, index: int) -> Place:
        """Where the medium of a question lies."""
        return self._set.locate(self._number(index))[:2]

    def place(self, row: Mapping[str, Any]) -> Place:
        """What a decoded video is kept under."""
        return row["place"]

    def medium(self, place: Place) -> tuple[bytes | list[bytes], str]:
        """The bytes of a video or picture, or of a folder's pictures, and what messages call it."""
        content = self.content(place)
        for name in content:
            if name in MEDIA_MEMBERS:
                return content[name], f"{self.name(place)}.{name}"
        if "frames" in content:
            return list(self._stored(place).pictures), f"{self.name(place)}.frames"
        raise ShardError(f"{self.name(place)}: has no medium, only {', '.join(content)}", "missing member")

    def frames(self, place: Place) -> StoredFrames | None:
        """Frames in place of the video, None where there is the video, or all pictures of a folder."""
        stored = self._stored(place) if "frames" in self.content(place) else None
        return None if stored is None or stored.folder else stored

    def duration_s(self, place: Place, last_s: float) -> float | None:
        """Return how long the video lasts of which frames are stored, the last at `last_s`; None where nobody looked.

        Raises:
            ShardError: it ends before that frame.
        """
        duration_s = parse_json(self.content(place)["json"], self.name(place)).get("duration_s")
        if duration_s is not None and duration_s < last_s:
            raise ShardError(f"{self.name(place)}: lasts {duration_s:g} s, and a frame is at {last_s:g} s", "schema")
        return duration_s

    def _stored(self, place: Place) -> StoredFrames:
        return parse_frames(self.content(place)["frames"], f"{self.name(place)}.frames")

    def published_flow(self, place: Place) -> None:
        """Shards hold flow of this package's form alone."""
        return None

    def flow(self, place: Place, num_frames: int, pairs: str = "sampled") -> np.ndarray:
        """float16 [T,2,h,w] in px of its own grid, between sampled frames or from each to the file's next picture.

        Raises:
            ShardError: there is none, or it is for other frames.
            VideoError: it is of other pairs.
        """
        if self._flow_root is not None:
            video_id = parse_json(self.content(place)["json"], self.name(place))["video_id"]
            return read_flow_file(flow_file(self._flow_root, video_id), num_frames, pairs)
        raw = self.content(place).get("flow")
        if raw is None:
            raise ShardError(
                f"{self.name(place)}: has no flow; make it with `python -m webdataset_tools flow`", "missing member"
            )
        flow, about = parse_flow(raw, f"{self.name(place)}.flow")
        check_pairs(about, pairs, f"{self.name(place)}.flow", "python -m webdataset_tools flow")
        if len(flow) != num_frames:
            raise ShardError(
                f"{self.name(place)}.flow: {len(flow)} fields (made with num_frames {about.get('num_frames')}), "
                f"expected {num_frames}; make it again with `python -m webdataset_tools flow`",
                "flow",
            )
        return flow.astype(np.float16, copy=False)


def unpack_frames(
    stored: StoredFrames,
    name: str,
    section: str,
    *,
    num: int,
    fps: float | None,
    short_videos: str,
    size: int | None,
    max_megapixels: float = DEFAULT_MAX_MEGAPIXELS,
) -> np.ndarray:
    """uint8 [T,3,H,W] of stored frames.

    Raises:
        ConfigError: they are not the ones that these settings of a data set choose.
        ShardError: one of them cannot be decoded.
    """
    wanted = {"num_frames": num, "fps": fps, "short_videos": short_videos, "size": size}
    for key, value in wanted.items():
        found, setting = stored.settings.get(key), "image_size" if key == "size" else key
        if found != str(value):
            raise ConfigError(
                f"{name}: its frames were stored with {setting} {found}, {section}.{setting} is {value}; set it alike, "
                "or pack again"
            )
    frames = np.empty((len(stored.pictures), 3, size, size), dtype=np.uint8)
    for number, raw in enumerate(stored.pictures):
        try:  # not by OpenCV, which is faster (0.30 ms, not 0.42) and fills what is cut off with grey
            picture = open_picture(raw, f"frame {number}", max_megapixels=max_megapixels)
        except VideoError as error:
            raise ShardError(f"{name}.frames: frame {number} cannot be decoded ({error})", "frames") from None
        if picture.size != (size, size):
            raise ShardError(f"{name}.frames: frame {number} cannot be decoded as {size} x {size} px", "frames")
        frames[number] = np.asarray(picture).transpose(2, 0, 1)
    return frames


def _seekable(shards: Sequence[str], cache: str | Path | None, retry: Retry, section: str) -> list[str]:
    """The same, with pipes, and what a server without ranges has, as files in `cache`, copied by the first process."""
    pipes = [shard for shard in shards if scheme(shard) == "pipe"]
    hosts = {urlsplit(shard).netloc: shard for shard in shards if cache and scheme(shard) == "http"}
    if not pipes and not hosts:
        return list(shards)
    if cache is None:
        raise ConfigError(
            f"{section}.shards.cache is needed for {pipes[0]!r}: a pipe cannot be read at an offset, so it is copied "
            "to that folder, once"
        )
    folder = expanded(cache)
    copies: dict[str, Path] = {}

    def copy_all() -> None:  # asks the servers, too: processes that got different answers would wait for each other
        whole = {host for host, shard in hosts.items() if not knows_ranges(shard, retry)}
        streams = pipes + [shard for shard in shards if scheme(shard) == "http" and urlsplit(shard).netloc in whole]
        for shard in streams:
            copies[shard] = folder / f"{hashlib.sha256(shard.encode()).hexdigest()[:24]}.tar"
        with ThreadPoolExecutor(COPIES_AT_ONCE) as pool:
            list(pool.map(lambda one: _copy(*one, retry), copies.items()))

    first_process_alone(copy_all)
    return [str(copies.get(shard, shard)) for shard in shards]


def _copy(shard: str, path: Path, retry: Retry) -> None:
    from lavis_lstp.data.shards import index

    if path.is_file():
        return
    logger.info("copying %s to %s", shard, path)
    with whole_file(path) as partial:
        with open(partial, "wb") as file, open_stream(shard, retry) as stream:
            while block := stream.read(1 << 20):
                file.write(block)
        found = index.scan(str(partial), retry)  # a copy that broke off is not kept
    index.write(found, path)


def first_process_alone(work) -> None:
    """Runs `work` in the main process, then in the others, which find it done, or meet the same error."""
    import torch.distributed as dist

    several = dist.is_available() and dist.is_initialized()
    if several and dist.get_rank():
        dist.barrier()
        work()
        return
    try:
        work()
    finally:
        if several:
            dist.barrier()
