"""What a shard's sample is: keys, members, and the form of each member; docs/data_format.md tells it to people.

In: ids and paths from annotation files, bytes from tars. Out: names that are safe in a tar and on any disk, checked
JSON, and NumPy arrays; a `ShardError` with a cause to count by where something is not of the form.

A sample is one *medium* (a video, a picture, or nothing for a text) with all questions about it, so that a video is
stored once however many questions there are. `frames` and `flow` are safetensors: no pickle, offsets that are checked,
and any language reads them.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

import numpy as np

from lavis_lstp.data.annotation import check_optional
from lavis_lstp.data.flow_files import is_finite
from lavis_lstp.data.pictures import ENDINGS
from lavis_lstp.data.prompts import conversation_prompt
from lavis_lstp.data.shards import flow_code
from lavis_lstp.data.subtitles import from_stored
from lavis_lstp.data.video.reading import VIDEO_ENDINGS
from lavis_lstp.errors import AnnotationError, ShardError
from lavis_lstp.files import sorted_header, strict_json
from lavis_lstp.untrusted import why_no_path

SAMPLE_FORMAT = "lavis_lstp.shard_sample"
FRAMES_FORMAT = "lavis_lstp.frames"
FLOW_FORMAT = "lavis_lstp.flow"
VERSION = 1
FLOW_VERSION = 2
PUBLISHED_FLOW = 2 * 224 * 224 * 4
"""Bytes of a field in the published files, float32 [T,2,224,224]."""
FLOW_SHARE = 50
"""They are at least so many times larger than ours."""

KINDS = ("video", "image", "text")
VIDEO_MEMBERS = tuple(ending[1:] for ending in VIDEO_ENDINGS)
IMAGE_MEMBERS = (*(ending[1:] for ending in ENDINGS), "gif")
MEDIA_MEMBERS = tuple(dict.fromkeys(VIDEO_MEMBERS + IMAGE_MEMBERS))  # a GIF is either
MEMBERS = (*MEDIA_MEMBERS, "frames", "flow", "json", "span.json")
"""Every member there is, in the order in which a sample's members stand in the tar: the medium first, because its
SHA-256, which the json holds, is made while it is copied; what training from stored frames reads lies together."""

JSON_LIMIT = 16 << 20
"""Bytes. A sample's text is a few kB; more is a mistake, and reading it would take the memory of a loader."""
KEY_LIMIT = 1024

_KEY = re.compile(r"(?:[A-Za-z0-9_-]|%[0-9A-F]{2})+")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-]+")
_NEEDLESS = re.compile("%(?:2D|3[0-9]|[46][1-9A-F]|5[0-9AF]|7[0-9A])")  # a letter, a digit, "-" or "_"
_ESCAPED = re.compile(rb"[^A-Za-z0-9_-]")


# ---------------------------------------------------------------- keys and names


def escape(name: str) -> str:
    """A key of ASCII letters, digits, "_", "-" and "%": every other byte of the UTF-8 name becomes %XX.

    >>> escape("a/clip 1.mp4")
    'a%2Fclip%201%2Emp4'
    """
    if len(name) <= KEY_LIMIT and _PLAIN_NAME.fullmatch(name):
        return name
    try:
        raw = name.encode("utf-8")
    except UnicodeEncodeError:
        raise ShardError(f"name {name!r} is not Unicode text; rename the file", "unsafe name") from None
    key = _ESCAPED.sub(lambda byte: b"%%%02X" % ord(byte[0]), raw).decode()
    if not key or len(key) > KEY_LIMIT:
        raise ShardError(f"name {name[:80]!r} gives a key of {len(key)} bytes, expected 1..{KEY_LIMIT}", "unsafe name")
    return key


@functools.lru_cache(maxsize=64)  # asked for each member of a sample
def unescape(key: str) -> str:
    """The name that `escape` made `key` of.

    Raises:
        ShardError: it made it of none.
    """
    if not _KEY.fullmatch(key) or len(key) > KEY_LIMIT:
        raise ShardError(f"{key[:80]!r} is not a key; expected ASCII letters, digits, _, - and %XX", "unsafe name")
    raw = unquote_to_bytes(key)
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise ShardError(f"key {key[:80]!r} is not UTF-8 when unescaped", "unsafe name") from None
    if _NEEDLESS.search(key):
        raise ShardError(f"key {key[:80]!r} escapes a byte that needs none", "unsafe name")
    return name


def split_member(name: str) -> tuple[str, str]:
    """(key, member) of a name in a tar.

    Raises:
        ShardError: a path, a name of several parts, or a member that is not known.
    """
    key, _, member = name.partition(".")
    unescape(key)
    if member not in MEMBERS:
        raise ShardError(f"{name!r}: unknown member {member!r}; known: {', '.join(MEMBERS)}", "unknown member")
    return key, member


@functools.lru_cache(maxsize=64)
def media_path(name: str) -> str:
    """A relative path as POSIX writes it, without "." and doubled slashes.

    Raises:
        ShardError: it is absolute or leads out of its folder.
    """
    path = PurePosixPath(name)
    if why_no_path(name) or ":" in path.parts[0]:
        raise ShardError(f"path {name[:200]!r} is not a relative path inside its folder", "unsafe name")
    return str(path)


def media_key(kind: str, name: str) -> str:
    """The key of a medium by its path, of a text by its question id. Never the same for two of them."""
    return escape(f"text:{name}") if kind == "text" else escape(media_path(name))


# ---------------------------------------------------------------- json


def dump_json(value: Any) -> bytes:
    """The same bytes for the same value, whatever the order of keys."""
    return _ENCODER.encode(value).encode()


_ENCODER = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def parse_json(raw: bytes, place: str) -> dict[str, Any]:
    if len(raw) > JSON_LIMIT:
        raise ShardError(f"{place}: {len(raw)} bytes of JSON, at most {JSON_LIMIT} are read", "json too large")
    try:
        value = strict_json(raw)
    except ValueError as error:
        raise ShardError(f"{place}: not JSON ({error})", "json") from None
    if not isinstance(value, dict):
        raise ShardError(f"{place}: expected a JSON object, got {type(value).__name__}", "json")
    return value


_MOST = 1 << 53
_NUMBERS = {"fps": float, "duration_s": float, "num_frames": int, "width": int, "height": int, "bytes": int}


def check_sample(value: Mapping[str, Any], place: str, key: str | None = None) -> None:
    """Raises ShardError (cause "schema") where a sample's json is not of the form of this version."""

    def wrong(text: str) -> ShardError:
        return ShardError(f"{place}: {text}", "schema")

    if (value.get("format"), value.get("version")) != (SAMPLE_FORMAT, VERSION):
        got = f"{value.get('format')!r} version {value.get('version')!r}"
        raise wrong(f"expected format {SAMPLE_FORMAT!r} version {VERSION}, got {got}")
    kind = value.get("kind")
    if kind not in KINDS:
        raise wrong(f"'kind' must be one of {', '.join(KINDS)}, got {kind!r}")
    if not isinstance(value.get("video_id"), str):
        raise wrong(f"'video_id' must be a string, got {value.get('video_id')!r}")
    if kind != "text":
        source, digest = value.get("source"), value.get("sha256")
        if not isinstance(source, str) or media_path(source) != source:
            raise wrong(f"'source' must be a relative path, got {source!r}")
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise wrong(f"'sha256' must be 64 hexadecimal digits, got {digest!r}")
    for name, number in _NUMBERS.items():
        if name in value and not (type(value[name]) in (int, number) and 0 <= value[name] <= _MOST):
            raise wrong(f"'{name}' must be a number of at least 0, got {value[name]!r}")
    if "subtitles" in value:
        try:
            from_stored(value["subtitles"], f"{place}, subtitles")
        except AnnotationError as error:
            raise ShardError(str(error), "schema") from None
    rows = value.get("questions")
    if not isinstance(rows, list) or not rows:
        raise wrong(f"'questions' must be a list of at least one entry, got {type(rows).__name__}")
    for number, row in enumerate(rows):
        _check_question(row, f"{place}, question {number}")
    ids = [row["question_id"] for row in rows]
    if len(set(ids)) < len(ids):
        raise ShardError(f"{place}: a question_id occurs twice", "duplicate question")
    if key is not None and key != media_key(kind, value["source"] if kind != "text" else ids[0]):
        raise wrong(f"key {key!r} is not that of its source")


def _check_question(row: Any, place: str) -> None:
    if not isinstance(row, dict):
        raise ShardError(f"{place}: expected an object, got {type(row).__name__}", "schema")
    if not isinstance(row.get("question_id"), str):
        raise ShardError(f"{place}: 'question_id' must be a string, got {row.get('question_id')!r}", "schema")
    place = f"{place} ({row['question_id']!r})"
    for name in () if "conversations" in row else ("question", "answer"):
        hidden = name == "answer" and name in row and row[name] is None  # a test set's
        if not isinstance(row.get(name), str) and not hidden:
            raise ShardError(f"{place}: '{name}' must be a string, got {row.get(name)!r}", "schema")
    turns = row.get("conversations")
    if "conversations" in row and not (isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)):
        raise ShardError(f"{place}: 'conversations' must be a list of {{from, value}}", "schema")
    try:
        if turns is not None:
            conversation_prompt(turns)  # what a data set makes of it
        check_optional(row, place)
    except AnnotationError as error:
        said = str(error)
        raise ShardError(said if said.startswith(place) else f"{place}: {said}", "schema") from None


# ---------------------------------------------------------------- frames and flow


class StoredFrames(NamedTuple):
    """Frames of a video as they were read once, or a folder of pictures, byte for byte, that is a video itself.

    Attributes:
        pictures: N JPEG or WebP files; of a folder those of `pictures.ENDINGS`.
        times_s: float64 [N], seconds since the start of the video file.
        settings: how they were chosen: num_frames, fps, short_videos, size, encoding, as texts. Of a folder nothing
            was: num_frames is "all", and "names" are its files', parted by "/".
    """

    pictures: Sequence[bytes]
    times_s: np.ndarray
    settings: Mapping[str, str]

    @property
    def folder(self) -> list[str]:
        """Names of a folder's files; empty for chosen frames."""
        return self.settings.get("names", "").split("/") if self.settings.get("num_frames") == "all" else []


def dump_frames(frames: StoredFrames) -> bytes:
    from safetensors.numpy import save

    ends = np.cumsum([len(picture) for picture in frames.pictures], dtype=np.int64)
    data = np.frombuffer(b"".join(frames.pictures), dtype=np.uint8)
    header = {"format": FRAMES_FORMAT, "version": str(VERSION), **frames.settings}
    return sorted_header(save({"data": data, "ends": ends, "times_s": np.asarray(frames.times_s, np.float64)}, header))


def parse_frames(raw: bytes, place: str) -> StoredFrames:
    tensors, settings = _parse_tensors(raw, place, FRAMES_FORMAT, {"data": ("U8", 1), "ends": ("I64", 1)})
    data, ends, times_s = tensors["data"], tensors["ends"], tensors.get("times_s")
    starts = np.concatenate([[0], ends[:-1]])
    fits = len(ends) and (ends > starts).all() and ends[0] > 0 and ends[-1] == len(data)
    if not fits or times_s is None or times_s.shape != ends.shape:
        raise ShardError(f"{place}: the places of its {len(ends)} frames do not fit its {len(data)} bytes", "frames")
    if times_s.dtype.kind != "f" or not np.isfinite(times_s).all():
        raise ShardError(
            f"{place}: 'times_s' must be finite seconds, got {times_s.dtype} {times_s[:3].tolist()}", "frames"
        )
    content = data.tobytes()
    pictures = [content[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
    stored = StoredFrames(pictures, times_s.astype(np.float64), settings)
    if stored.folder and len(set(stored.folder)) != len(ends):
        raise ShardError(f"{place}: {len(ends)} pictures have {len(set(stored.folder))} names", "frames")
    return stored


def dump_flow(flow: np.ndarray, settings: Mapping[str, str]) -> bytes:
    """float [T,2,H,W] in px per frame, H x W the frames' size, in 1/FLOW_SHARE of the published files' bytes.

    Fields of more than 224 x 224 px may take as many bytes a px.

    Raises:
        ShardError: numbers that are not finite or not of float16's range, or more than a reader takes.
    """
    from safetensors.numpy import save

    if 2 * flow.size > flow_code.LARGEST_CLIP:
        raise ShardError(f"flow: {list(flow.shape)} takes more than {flow_code.LARGEST_CLIP} bytes in float16", "flow")
    if not (np.abs(flow) <= np.finfo(np.float16).max).all():
        raise ShardError(f"flow: expected finite px, at most {np.finfo(np.float16).max}", "flow")

    def member(coded: flow_code.Coded) -> bytes:
        header = {"format": FLOW_FORMAT, "version": str(FLOW_VERSION), **coded.form.about(), **settings}
        return sorted_header(save({"data": np.frombuffer(coded.data, np.uint8), "steps": coded.steps}, header))

    empty = flow_code.Coded(b"", np.zeros(len(flow), np.float32), flow_code.Form(*flow.shape[-2:], "corners", False))
    allowed = max(4 * flow.size, len(flow) * PUBLISHED_FLOW) // FLOW_SHARE
    return member(flow_code.encode(flow, allowed - len(member(empty)) - 16))  # its header tells the size of the data


def parse_flow(raw: bytes, place: str) -> tuple[np.ndarray, dict[str, str]]:
    """float16 [T,2,H,W] in px per frame of the frames' own size, and how it was made."""
    expected = {"data": ("U8", 1), "steps": ("F32", 1)}
    tensors, settings = _parse_tensors(raw, place, FLOW_FORMAT, expected, FLOW_VERSION)
    try:
        form = flow_code.Form.of(settings)
        flow = flow_code.decode(flow_code.Coded(tensors["data"].tobytes(), tensors["steps"], form))
    except ValueError as error:
        raise ShardError(f"{place}: {error}", "flow") from None
    if not is_finite(flow):
        raise ShardError(f"{place}: expected finite px, as float16 has them", "flow")
    return flow, {name: value for name, value in settings.items() if name not in form.about()}


def _parse_tensors(
    raw: bytes, place: str, wanted: str, expected: Mapping[str, tuple[str, int]], version: int = VERSION
):
    what = wanted.rpartition(".")[2]
    try:
        tensors, kinds, header = load_tensors(raw)
    except ValueError as error:
        raise ShardError(f"{place}: not safetensors ({error})", what) from None
    if (header.get("format"), header.get("version")) != (wanted, str(version)):
        got = f"{header.get('format')!r} version {header.get('version')!r}"
        raise ShardError(f"{place}: expected {wanted!r} version {version}, got {got}", what)
    for name, kind in expected.items():
        if kinds.get(name) != kind:
            raise ShardError(f"{place}: expected '{name}' of {kind[0]} [{kind[1]} axes], got {kinds.get(name)}", what)
    return tensors, {name: value for name, value in header.items() if name not in ("format", "version")}


def load_tensors(raw: bytes) -> tuple[dict[str, np.ndarray], dict[str, tuple[str, int]], dict[str, str]]:
    """Tensors of a safetensors file, type and number of axes of each, and the file's metadata.

    Raises:
        ValueError: the file is none, or has a tensor that NumPy cannot hold.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(raw)  # checks every offset and size
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        kinds = {name: (header[name]["dtype"], len(header[name]["shape"])) for name in tensors}
    except (SafetensorError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
    return tensors, kinds, header.get("__metadata__") or {}


def by_member(names: Iterable[str]) -> list[str]:
    """Member names in the order in which they are stored."""
    return sorted(names, key=MEMBERS.index)
