"""Questions that cannot be read: counted by cause in all loader processes, listed in a file, and too many stop the run.

A question is counted once, however often it is asked for; none is replaced by another.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch

from lavis_lstp.errors import ShardError, VideoError
from lavis_lstp.files import expanded

CAUSES = ("undecodable", "connection", "not found", "refused", "truncated", "hash", "missing member", "schema", "json")
CAUSES += ("no ranges", "frames", "flow", "index", "other")
"""What `ShardError.cause` may say of one sample; a video or picture that cannot be decoded is undecodable."""

logger = logging.getLogger(__name__)


class LeftOut:
    """The questions of one data set that could not be read so far.

    Args:
        total: questions there are.
        max_bad_fraction: share of them that may be left out.
        quarantine: file that a line of JSON is appended to for each; None = the log alone.
        section: of the configuration, for messages.
    """

    def __init__(self, total: int, max_bad_fraction: float, quarantine: str | os.PathLike | None, section: str):
        self.total = total
        self.max_bad_fraction = max_bad_fraction
        self.quarantine = expanded(quarantine) if quarantine else None
        self.section = section
        # A number a question, 0 or 1 + that of its cause, in memory that loader processes share: they stop together.
        self._cause = torch.zeros(max(1, total), dtype=torch.uint8).share_memory_()

    def by_cause(self) -> dict[str, int]:
        counts = torch.bincount(self._cause.long(), minlength=len(CAUSES) + 1).tolist()[1:]
        return {name: count for name, count in zip(CAUSES, counts, strict=True) if count}

    def add(self, index: int, question_id: str, where: Mapping[str, str], error: VideoError | ShardError) -> None:
        """Counts a question.

        Args:
            where: what else the quarantine file says of it; "annotation" is file and row of the question.

        Raises:
            VideoError: with it there are too many.
        """
        known = bool(self._cause[index])
        cause = error.cause if isinstance(error, ShardError) else "undecodable"
        cause = cause if cause in CAUSES else "other"
        self._cause[index] = 1 + CAUSES.index(cause)
        causes = self.by_cause()
        count = sum(causes.values())
        if not known:
            self._list({"question_id": question_id, **where, "cause": cause, "error": str(error)})
        if count > self.max_bad_fraction * self.total:
            counted = ", ".join(f"{number} {name}" for name, number in causes.items())
            stands = f" ({where['annotation']})" if "annotation" in where else ""
            raise VideoError(
                f"question {question_id!r}{stands}: {error}; with it {count} of {self.total} questions cannot be read "
                f"({counted}), {self.section}.max_bad_fraction allows {self.max_bad_fraction:g}"
            ) from error
        if not known:
            logger.warning("left out question %r (%d so far, %s): %s", question_id, count, cause, error)

    def _list(self, row: Mapping[str, Any]) -> None:
        """Appends a line in one write, because several processes do."""
        if self.quarantine is None:
            return
        self.quarantine.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.quarantine, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, (json.dumps(row, ensure_ascii=False) + "\n").encode())
        finally:
            os.close(file)
