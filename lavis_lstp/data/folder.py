"""Questions of annotation files and media in a folder, for `VideoQADataset`; `shards` is the same for tar shards.

In: entries as `annotation.read_annotation` gives them, and the folder that their paths are relative to. Out: entries by
number, and where each medium lies. What is wrong with an annotation is said when it is read, not in the middle of an
epoch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lavis_lstp.data.annotation import SECTION
from lavis_lstp.data.flow_files import flow_file, read_flow_file
from lavis_lstp.data.published_flow import ENDING
from lavis_lstp.errors import AnnotationError, VideoError
from lavis_lstp.files import find_path
from lavis_lstp.untrusted import why_no_path

logger = logging.getLogger(__name__)


def check_name(name: str, root: Path, where: str) -> None:
    """Raises AnnotationError, which begins with `where`, for a medium's name that is no path of a file below `root`."""
    if not Path(name).name or not name.strip():  # the folder itself is no video, whatever lies in it
        raise AnnotationError(f"{where}: expected the path of a file, got {name!r}")
    # By the name alone: a folder may well hold links to where the videos are kept.
    if why := why_no_path(name):
        what = f"is absolute or leads out of {root}; write it relative to this folder" if "leads out" in why else why
        raise AnnotationError(f"{where}: path {name[:200]!r} {what}")


Place = tuple[str, str]
"""(path below the folder, video id)."""


def kind_of(row: Mapping[str, Any]) -> str:
    """video, image or text."""
    return "image" if "image" in row else "video" if "video" in row else "text"


def _named(row: Mapping[str, Any]) -> str:
    """A question, for messages, with file and row where these are known."""
    stands = getattr(row, "stands", "")
    return f"question {row['question_id']!r}" + (f" ({stands})" if stands else "")


class FolderQuestions(Sequence):
    """Questions about files.

    Args:
        annotation: entries.
        root: folder that "video" and "image" paths are relative to; none leads out of it.
        flow_root: folder written by `lavis-lstp flow`, or of the published code's flow (`published_flow`).
        section: of the configuration, for messages.
    """

    blocks: Sequence[int] = ()  # files lie anywhere

    def __init__(
        self,
        annotation: Sequence[Mapping[str, Any]],
        root: str | Path,
        *,
        flow_root: str | Path | None = None,
        section: str = SECTION,
    ):
        self._rows = list(annotation)
        self.root = Path(root)
        self.flow_root = Path(flow_root) if flow_root else None
        self.section = section
        self.kinds = {kind_of(row) for row in self._rows}

    @property
    def origin(self) -> str:
        """What tells media of the same name in two data sets apart."""
        return f"{self.section} {self.root}"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self._rows[index]

    def question_id(self, index: int) -> str:
        return self._rows[index]["question_id"]

    def question_ids(self) -> list[str]:
        return [row["question_id"] for row in self._rows]

    def video_question_ids(self) -> list[str]:
        return [row["question_id"] for row in self._rows if kind_of(row) == "video"]

    def size(self) -> str:
        return f"{len({row.get(kind_of(row)) for row in self._rows} - {None})} files"

    def identity(self) -> Any:
        """What decides the questions, as plain containers."""
        return self._rows

    def where(self, index: int) -> dict[str, str]:
        """For the quarantine list."""
        row = self._rows[index]
        stands = getattr(row, "stands", "")
        return {"file": row.get(kind_of(row), ""), **({"annotation": stands} if stands else {})}

    @property
    def has_clips(self) -> bool:
        """Whether a question is about a part of its video."""
        return any(row.get("clip_s") for row in self._rows)

    def check_files(self, max_bad_fraction: float = 0.0) -> None:
        """Says which files are missing.

        Args:
            max_bad_fraction: share of questions that may be about missing files.

        Raises:
            AnnotationError: a path leads out of the folder, or one video_id names two files.
            VideoError: more files are missing than that.
        """
        paths: dict[str, Mapping[str, Any]] = {}
        files: dict[str, str] = {}
        for row in self._rows:
            if kind_of(row) != "text":
                paths.setdefault(row[kind_of(row)], row)
            if kind_of(row) == "video" and self.flow_root is not None:
                flow_file(self.flow_root, row["video_id"])  # said now, and not in the middle of an epoch
            if kind_of(row) == "video" and files.setdefault(row["video_id"], row["video"]) != row["video"]:
                raise AnnotationError(  # flow files and what is kept of a video go by its id
                    f"{_named(row)}: video_id {row['video_id']!r} names two files, "
                    f"{files[row['video_id']]!r} and {row['video']!r}; give each an id (or a file name) of its own"
                )
        missing = []
        for name, row in paths.items():
            check_name(name, self.root, _named(row))
            if not find_path(self.root, name).exists():  # a folder of pictures is a video, too
                missing.append((self.root / name, row))
        lost = {path for path, _ in missing}
        open_questions = sum(self.root / row.get(kind_of(row), "") in lost for row in self._rows)
        if missing and open_questions <= max_bad_fraction * len(self):
            names = ", ".join(str(path) for path, _ in missing[:5]) + ", ..." * (len(missing) > 5)
            what = f"{len(missing)} of {len(paths)} files are missing"
            logger.warning("%s, %d questions about them stay open: %s", what, open_questions, names)
        elif missing:
            path, row = missing[0]
            if len(missing) > 1:  # all of them, so that one go is enough to bring them
                logger.error("missing files:\n%s", "\n".join(str(path) for path, _ in missing))
            raise VideoError(
                f"{path}: no such file, needed by {_named(row)}; {len(missing)} of {len(paths)} files are "
                f"missing. Check the folder in {self.section}.build_info; {self.section}.max_bad_fraction allows some"
            )

    # ---- media ------------------------------------------------------------------------------------------------

    def place(self, row: Mapping[str, Any]) -> Place:
        """What a decoded video is kept under."""
        return row.get(kind_of(row), ""), row["video_id"]

    def medium(self, place: Place) -> tuple[Path, str]:
        """Where a video or picture lies, and what messages call it."""
        path = find_path(self.root, place[0])
        return path, str(path)

    def frames(self, place: Place) -> None:
        """A folder holds videos, not frames of them."""
        return None

    def published_flow(self, place: Place) -> Path | None:
        """The flow file of the published code, where it lies in place of ours."""
        if self.flow_root is None or self._flow_file(place).is_file():
            return None
        path = find_path(self.flow_root, f"{place[1]}{ENDING}")
        return path if path.is_file() else None

    def flow(self, place: Place, num_frames: int, pairs: str = "sampled") -> np.ndarray:
        """float16 [T,2,h,w] in px of its own grid, between sampled frames or from each to the file's next picture."""
        return read_flow_file(self._flow_file(place), num_frames, pairs)

    def _flow_file(self, place: Place) -> Path:
        """By the id; else by the whole name, which `lavis-lstp flow` uses in folders with a.mp4 beside a.gif."""
        by_id = flow_file(self.flow_root, place[1])
        by_name = by_id.with_name(f"{Path(place[0]).name}.safetensors")
        return by_name if by_name.is_file() and not by_id.is_file() else by_id
