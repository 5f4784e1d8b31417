"""Files of pseudo spans -> a span for each question: this package's form, and the two of the published data sets.

    lavis_lstp   written by the task `pseudo_span`: a header, and half-open spans in frames
    indices      {question id: [first, last]}, both part of the span, 0..31: of 32 frames
    fractions    {question id: [first, last]}, both part of the span, 0..1: shares of the last frame's index

The published sampler takes both ends independently, so a row of a published file may be reversed: it gives no span.

Nothing in an old file says which of the two it is, and [0, 1] may be either, so `datasets.<name>.spans_form` does.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavis_lstp.data.annotation import SECTION, parse, read_text
from lavis_lstp.errors import AnnotationError, ConfigError, unknown_name
from lavis_lstp.schema import Span

logger = logging.getLogger(__name__)

SPANS_FORMAT = "lavis_lstp.spans"
SPANS_VERSION = 1
GOLD = "gold"
"""In place of a file: the annotation's own moments are learned."""
SPANS_FORMS = ("lavis_lstp", "indices", "fractions")
LAST_INDEX = 31
"""Of the 32 frames that the published labels count."""

Spans = Mapping[str, "Span | tuple[float, float] | None"]
"""By question id: a span in frames, fractions that become one when the number of frames is known
(`Span.from_fractions`), or None for a sample without a span."""


def read_spans(
    path: str | Path,
    num_frames: int,
    *,
    form: str = "lavis_lstp",
    fps: float | None = None,
    short_videos: str = "keep",
    section: str = SECTION,
) -> Spans:
    """Pseudo spans by question id.

    Args:
        num_frames, fps, short_videos: how the data set chooses frames; spans of this package's form count those.
        form: of SPANS_FORMS.

    Raises:
        ConfigError: the form is not known.
        AnnotationError: not such a file, or for other frames.
    """
    path = Path(path)
    if form not in SPANS_FORMS:
        raise ConfigError(unknown_name(f"{section}.spans_form", form, SPANS_FORMS))
    if not os.path.isfile(path):
        raise AnnotationError(
            f"{path}: no such span file ({section}.spans); write it with run.task=pseudo_span, or "
            "temporal_grounding and run.spans_out for what a sampler finds"
        )
    content = parse(read_text(path), path, "file")
    if form != "lavis_lstp":
        return _read_published(path, content, form, section)
    frames = {"num_frames": num_frames, "fps": fps, "short_videos": short_videos}
    return checked_spans(content, str(path), **frames, section=section)


def checked_spans(
    content: Any, place: str, *, num_frames: int, fps: float | None, short_videos: str, section: str = SECTION
) -> dict[str, Span | None]:
    """Spans out of the content of a file of this package's form, or of a shard's member; see `read_spans`."""
    header = content if isinstance(content, dict) else {}
    if (header.get("format"), header.get("version")) != (SPANS_FORMAT, SPANS_VERSION):
        raise AnnotationError(
            f"{place}: expected format {SPANS_FORMAT!r} version {SPANS_VERSION}; files of the published code need "
            f"{section}.spans_form: indices or fractions"
        )
    if header.get("num_frames") != num_frames:
        raise AnnotationError(
            f"{place}: spans count {header.get('num_frames')} frames per video, {section}.num_frames is {num_frames}"
        )
    for key, default, wanted in (("fps", None, fps), ("short_videos", "keep", short_videos)):
        if header.get(key, default) != wanted:
            raise AnnotationError(
                f"{place}: spans were made with {key} {header.get(key, default)}, {section}.{key} is {wanted}"
            )
    rows = header.get("spans")
    if not isinstance(rows, dict):
        raise AnnotationError(f"{place}: 'spans' must be an object by question id, got {type(rows).__name__}")
    return {name: _own_span(row, name, place, num_frames) for name, row in rows.items()}


def _own_span(row: Any, name: str, place: str, num_frames: int) -> Span | None:
    span = row.get("span") if isinstance(row, dict) else None
    if span is None and isinstance(row, dict) and "span" in row:
        return None  # labelled, and nothing in it moves
    whole = isinstance(span, list) and len(span) == 2 and all(type(edge) is int for edge in span)
    if not whole or not 0 <= span[0] < span[1] <= num_frames:
        raise AnnotationError(
            f"{place}: question {name!r} must have span [start, end) in frames, "
            f"0 <= start < end <= {num_frames}, got {span!r}"
        )
    return Span(*span)


def _read_published(path: Path, content: Any, form: str, section: str) -> dict[str, tuple[float, float] | None]:
    """Fractions by question id, of either published form; None for a reversed row."""
    if not isinstance(content, dict):
        raise AnnotationError(f"{path}: expected {{question id: [first, last]}}, got {type(content).__name__}")
    if content.get("format") == SPANS_FORMAT:
        raise AnnotationError(f"{path}: is of the form 'lavis_lstp', {section}.spans_form is '{form}'")
    last, kinds = (LAST_INDEX, "whole numbers") if form == "indices" else (1, "numbers")
    spans: dict[str, tuple[float, float] | None] = {}
    reversed_rows = []
    for name, row in content.items():
        fits = isinstance(row, list) and len(row) == 2 and all(type(edge) in (int, float) for edge in row)
        fits = fits and all(0 <= edge <= last for edge in row)
        if not fits or (form == "indices" and any(edge != int(edge) for edge in row)):
            raise AnnotationError(
                f"{path}: question {name!r} must have [first, last], {kinds} of 0..{last} as {section}.spans_form "
                f"'{form}' says, got {row!r}"
            )
        spans[name] = (row[0] / last, row[1] / last) if row[0] <= row[1] else None
        if spans[name] is None:
            reversed_rows.append(name)
    if reversed_rows:
        logger.warning(
            "%s: %d of %d spans end before they begin, and are read as no span, first that of question %r: %s",
            *(path, len(reversed_rows), len(spans), reversed_rows[0], content[reversed_rows[0]]),
        )
    return spans
